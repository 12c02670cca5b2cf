"""Targets, the oracle, the two fast losses that equal it, and the counts reported beside them."""

from __future__ import annotations

import math
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import Batch, close, loss_is_oracle, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from foretoken import loss
from foretoken.errors import ConfigError
from foretoken.loss import IGNORE, agreement, mtp_loss, oracle_loss, scales, sequential_backward, targets, valid_counts

X = IGNORE
BATCHES = st.builds(
    random_batch,
    seed=st.integers(0, 2**31),
    n=st.integers(1, 4),
    rows=st.integers(1, 3),
    positions=st.integers(1, 9),
    across=st.booleans(),
)


def whole(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)


# Targets


def test_targets_of_one_document_are_the_offset_picture() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])
    assert targets(*whole(tokens), n=3).tolist() == [[[11, 12, 13]], [[12, 13, 14]], [[13, 14, 15]]]


def test_targets_stay_inside_a_document() -> None:
    tokens = torch.arange(10, 18)[None]
    documents = torch.tensor([[5, 5, 5, 9, 9, 9, 9, 9]])
    wanted = [[[11, 12, X, 14, 15]], [[12, X, X, 15, 16]], [[X, X, X, 16, 17]]]
    assert targets(tokens, documents, torch.ones(1, 8, dtype=torch.bool), 3).tolist() == wanted
    across = targets(tokens, documents, torch.ones(1, 8, dtype=torch.bool), 3, across_documents=True)
    assert across.tolist() == [[[11, 12, 13, 14, 15]], [[12, 13, 14, 15, 16]], [[13, 14, 15, 16, 17]]]


def test_targets_leave_out_padding_and_masked_labels() -> None:
    tokens = torch.arange(10, 17)[None]
    padded = torch.tensor([[0, 0, 0, 0, -1, -1, -1]])
    mask = torch.ones(1, 7, dtype=torch.bool)
    assert targets(tokens, padded, mask, 2).tolist() == [[[11, 12, 13, X, X]], [[12, 13, X, X, X]]]
    # Padding is no document, so it never is a target and never has one, even across documents.
    assert targets(tokens, padded, mask, 2, across_documents=True).tolist() == [
        [[11, 12, 13, X, X]],
        [[12, 13, X, X, X]],
    ]
    left = torch.tensor([[-1, -1, 0, 0, 0, 1, 1]])
    assert targets(tokens, left, mask, 2, across_documents=True).tolist() == [
        [[X, X, 13, 14, 15]],
        [[X, X, 14, 15, 16]],
    ]
    # A prompt (10 11 12) is read but not learned: the mask is of the label, not of the position that predicts it.
    prompt = torch.tensor([[False, False, False, True, True, True, True]])
    assert targets(tokens, torch.zeros_like(tokens), prompt, 2).tolist() == [
        [[X, X, 13, 14, 15]],
        [[X, 13, 14, 15, 16]],
    ]


def test_targets_of_documents_shorter_than_n() -> None:
    tokens = torch.arange(10, 18)[None]
    documents = torch.tensor([[0, 1, 2, 2, 3, 4, 4, 4]])
    labels = targets(tokens, documents, torch.ones(1, 8, dtype=torch.bool), 4)
    assert labels.tolist() == [[[X, X, 13, X]], [[X, X, X, X]], [[X, X, X, X]], [[X, X, X, X]]]
    assert valid_counts(labels).tolist() == [1, 0, 0, 0]
    assert scales([1, 2, 3, 4], valid_counts(labels)).tolist() == [1, 2, 3, 4]  # no division by zero


# Value and gradient


@given(BATCHES, st.sampled_from([1, 14, 50, 1 << 20]), st.sampled_from([1, 3, 1 << 11]))
def test_loss_equals_oracle(batch: Batch, chunk: int, part: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        patch.setattr(loss, "SLICE", part)  # of the vocabulary: the batches' is smaller than the real one
        loss_is_oracle(batch)


def test_random_batches_reach_the_corners() -> None:
    """The property test above means something only if its batches hold what it speaks of."""
    labels = [random_batch(seed).labels() for seed in range(200)]
    counts = [valid_counts(label).tolist() for label in labels]
    assert any(c[0] > 0 and c[2] == 0 for c in counts)
    assert any(c[0] == 0 and c[2] > 0 for c in counts)
    assert any(c == [0, 0, 0] for c in counts)
    assert sum(len(set(c)) == 3 for c in counts) > 50
    assert sum(bool((random_batch(seed).document_ids == -1).any()) for seed in range(200)) > 50


@settings(max_examples=25)
@given(BATCHES, st.booleans(), st.sampled_from(["shared", "per_head"]), st.integers(0, 10))
def test_sequential_backward_equals_oracle(batch: Batch, tied: bool, unembedding: str, seed: int) -> None:
    n, T = batch.n, batch.hidden[0].size(1)
    fields = {"layers": 2, "width": 8, "vocab": 7, "seed": seed, "tie_word_embeddings": tied, "peaked": False}
    fields["unembedding"] = unembedding
    fast, slow = (tiny_model(n_future=n, **fields) for _ in range(2))
    inputs, documents = batch.tokens[:, :T], batch.document_ids[:, :T]
    context = fast.context(T, documents)
    labels = batch.labels()
    heads = [partial(fast.run_head, context=context, depth=d) for d in range(n)]
    factors = scales(batch.weights, valid_counts(labels))
    output = sequential_backward(fast.run_trunk(inputs, context), heads, fast.unembeddings(), labels, factors)
    wanted = oracle_loss(
        slow(inputs, documents), slow.unembeddings(), batch.tokens, batch.document_ids, batch.label_mask, batch.weights,
        across_documents=batch.across,
    )  # fmt: skip
    close(output.total, wanted, "loss")
    if wanted.requires_grad:
        wanted.backward()
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        a = torch.zeros_like(p) if p.grad is None else p.grad
        close(a, torch.zeros_like(q) if q.grad is None else q.grad, name)
    twin = mtp_loss(fast(inputs, documents), fast.unembeddings(), labels, factors)
    close(output.sums, twin.sums, "sums")
    assert torch.equal(output.predictions, twin.predictions)
    assert torch.equal(output.correct, twin.correct)


def test_one_head_is_ordinary_cross_entropy() -> None:
    batch = random_batch(3, n=1, rows=4, positions=20)
    batch.document_ids.zero_()
    hidden, weight = batch.leaves()
    labels = targets(batch.tokens, batch.document_ids, batch.label_mask, 1)
    total = mtp_loss(hidden, weight, labels, scales([1.0], valid_counts(labels))).total
    total.backward()
    plain_hidden, plain_weight = batch.leaves()
    wanted_labels = batch.tokens[:, 1:].masked_fill(~batch.label_mask[:, 1:], -100)
    wanted = F.cross_entropy((plain_hidden[0] @ plain_weight.T).flatten(0, 1), wanted_labels.flatten())
    wanted.backward()
    close(total, wanted, "loss")
    close(hidden[0].grad, plain_hidden[0].grad, "gradient of the states")
    close(weight.grad, plain_weight.grad, "gradient of the unembedding")


def test_micro_batches_of_unequal_counts_equal_the_whole_batch() -> None:
    batch = random_batch(11, n=3, rows=4, positions=12)
    labels = batch.labels()
    counts = valid_counts(labels)
    parts = [slice(0, 1), slice(1, 4)]
    shares = torch.stack([valid_counts(labels[:, part]) for part in parts])
    assert (shares[0] * 3 != shares[1]).any()  # a mean of means would be wrong here
    factors = scales(batch.weights, counts)
    hidden, weight = batch.leaves()
    whole_total = mtp_loss(hidden, weight, labels, factors).total
    whole_total.backward()
    part_hidden, part_weight = batch.leaves()
    total = 0.0
    for part in parts:
        output = mtp_loss([h[part] for h in part_hidden], part_weight, labels[:, part], factors)
        output.total.backward()
        total += output.total.item()
    assert total == pytest.approx(whole_total.item(), abs=1e-12)
    close(part_weight.grad, weight.grad, "gradient of the unembedding")
    for a, b in zip(part_hidden, hidden, strict=True):
        close(a.grad, b.grad, "gradient of the states")


def test_gradient_scales_with_what_follows_the_loss() -> None:
    batch = random_batch(5)
    labels = batch.labels()
    factors = scales(batch.weights, valid_counts(labels))
    (one, weight), (half, half_weight) = batch.leaves(), batch.leaves()
    mtp_loss(one, weight, labels, factors).total.backward()
    (mtp_loss(half, half_weight, labels, factors).total * 0.5).backward()
    close(half_weight.grad * 2, weight.grad, "gradient of the unembedding")
    close(half[0].grad * 2, one[0].grad, "gradient of the states")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_stay_near_the_oracle(dtype: torch.dtype) -> None:
    batch = random_batch(8, rows=3, positions=30, vocab=50, width=16)
    labels = batch.labels()
    factors = scales(batch.weights, valid_counts(labels))
    hidden, weight = [h.to(dtype).requires_grad_() for h in batch.hidden], batch.unembedding.to(dtype).requires_grad_()
    output = mtp_loss(hidden, weight, labels, factors)
    output.total.backward()
    batch.hidden, batch.unembedding = [h.detach().double() for h in hidden], weight.detach().double()
    wide, wide_weight = batch.leaves()
    wanted = mtp_loss(wide, wide_weight, labels, factors).total
    wanted.backward()
    eps = torch.finfo(dtype).eps
    assert (weight.grad.dtype, hidden[0].grad.dtype) == (dtype, dtype)
    assert output.total.dtype == torch.float32  # sums are wide whatever the products are
    assert output.total.item() == pytest.approx(wanted.item(), rel=8 * eps)
    for narrow, full in ((weight, wide_weight), (hidden[1], wide[1])):
        close(narrow.grad.double(), full.grad, "gradient", 8 * eps * float(full.grad.max()))


def test_every_parameter_of_every_head_learns() -> None:
    model = tiny_model("qwen2", n_future=4, peaked=False)
    tokens = torch.randint(0, 17, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = targets(*whole(tokens), n=4)
    all_heads = scales([1.0] * 4, valid_counts(labels))
    mtp_loss(model(tokens[:, :12]), model.lm_head.weight, labels, all_heads).total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []
    model.zero_grad()
    only_head_3 = scales([0.0, 0.0, 1.0, 0.0], valid_counts(labels))
    mtp_loss(model(tokens[:, :12]), model.lm_head.weight, labels, only_head_3).total.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any(name.startswith(("heads.0.", "heads.1.", "heads.3.")) for name in learns)
    assert {"embed_tokens.weight", "trunk.0.mlp.up_proj.weight", "heads.2.mlp.up_proj.weight"} <= learns


# Memory and work


class Recorder(TorchDispatchMode):
    """Memory larger than the unembedding's, which is that of logits: the largest piece, and the most held together."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.others = vocab * width
        self.largest = self.peak = self.products = 0
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        mm, bmm, addmm = torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm
        self.products += func in (mm.default, mm.out, bmm.default, addmm.default)
        if isinstance(out, torch.Tensor) and out.is_floating_point() and held(out) > self.others:
            self.largest = max(self.largest, held(out))
            self.alive = [*(ref for ref in self.alive if ref() is not None), weakref.ref(out)]
            storages = {t.untyped_storage().data_ptr(): held(t) for ref in self.alive if (t := ref()) is not None}
            self.peak = max(self.peak, sum(storages.values()))
        return out


def held(tensor: torch.Tensor) -> int:
    """Numbers that the memory behind a tensor holds, of which it may be a part."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def logits_held(n: int, positions: int, naive: bool = False) -> Recorder:
    vocab, width, rows = 512, 4, 2
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(rows, positions, width, generator=generator, requires_grad=True) for _ in range(n)]
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    tokens = torch.randint(0, vocab, (rows, positions + n), generator=generator)
    labels = targets(*whole(tokens), n=n)
    factors = scales([1.0] * n, valid_counts(labels))
    with Recorder(vocab, width) as recorder:
        if naive:
            pairs = zip(hidden, labels, strict=True)
            sum(F.cross_entropy((h @ weight.T).flatten(0, 1), y.flatten()) for h, y in pairs).backward()
        else:
            mtp_loss(hidden, weight, labels, factors).total.backward()
    return recorder


@pytest.mark.parametrize("part", [128, 1 << 12])  # slices of the vocabulary, and one of all
def test_logits_are_held_for_one_chunk_only(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 512 * 16
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(loss, "SLICE", part)
    records = {(n, positions): logits_held(n, positions) for n in (1, 4) for positions in (16, 40)}
    assert {record.largest for record in records.values()} == {chunk}
    (peak,) = {record.peak for record in records.values()}  # the same for every n and every number of positions
    assert peak <= 3 * chunk  # a chunk's logits, the softmax's scaled copy, and one not yet freed
    naive = {(n, positions): logits_held(n, positions, naive=True) for n in (1, 4) for positions in (16, 40)}
    assert naive[1, 40].largest == 2 * 40 * 512  # the recorder does see what the chunks avoid
    assert naive[4, 40].peak >= 4 * naive[1, 40].largest


def test_no_product_is_computed_twice_and_evaluation_computes_no_gradient() -> None:
    assert logits_held(3, 16).products == 3 * 3  # logits, gradient of the states, gradient of the weight
    weight = torch.randn(9, 4, requires_grad=True)
    labels = torch.randint(0, 9, (3, 2, 5))
    hidden = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    with torch.no_grad(), Recorder(9, 4) as recorder:
        output = mtp_loss(hidden, weight, labels, torch.ones(3))
    assert recorder.products == 3
    assert not output.total.requires_grad
    close(output.sums, mtp_loss(hidden, weight, labels, torch.ones(3)).sums, "sums")


def test_a_whole_step_can_be_compiled() -> None:
    """In one graph, without a warning, to the same loss and gradients."""

    def step(hidden: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        return mtp_loss([2 * h for h in hidden], weight, labels, factors).total

    hidden, weight = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(2)], torch.randn(9, 4, requires_grad=True)
    labels = torch.randint(0, 9, (2, 2, 5))
    factors = scales([1.0, 0.5], valid_counts(labels))
    wanted = torch.autograd.grad(step(hidden, weight), [*hidden, weight])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = torch.autograd.grad(compiled(hidden, weight), [*hidden, weight])
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("matrices", [1, 3])
def test_a_gpu_s_loss_is_plain_cross_entropy(
    dtype: torch.dtype, near: float, matrices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums are compiled, and products are added where they are made; several chunks; bfloat16 by autocast."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 60_000)
    generator, wide = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    sizes = [(2, 250, 64)] * 3 + [(1000, 64)] * matrices
    given = [torch.randn(size, generator=generator).to(dtype).to("cuda", wide) for size in sizes]
    labels = torch.randint(0, 1000, (3, 2, 250), generator=generator).cuda()
    labels[:, :, ::7] = IGNORE
    factors = scales([1.0, 0.5, 0.25], valid_counts(labels))
    tensors, plain = ([x.detach().to(kind).requires_grad_() for x in given] for kind in (wide, torch.float64))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = mtp_loss(tensors[:3], tensors[3] if matrices == 1 else tensors[3:], labels, factors).total
    heads = zip(plain[:3], plain[3:] * (3 // matrices), labels, factors, strict=True)
    wanted = torch.stack(
        [F.cross_entropy((h @ w.T).flatten(0, 1), y.flatten(), reduction="sum") * factor for h, w, y, factor in heads]
    ).sum()
    (2 * total).backward()
    (2 * wanted).backward()
    assert float(total) == pytest.approx(float(wanted), rel=near)
    for found, right in zip(tensors, plain, strict=True):
        assert float((found.grad - right.grad).norm() / right.grad.norm()) < near


# What is reported


def test_loss_output_worked_example() -> None:
    # Four tokens, the unembedding is the identity, a state is 3 e_k: logit 3 for token k and 0 for the three others.
    states = torch.tensor([[[0, 1, 2], [3, 3, 3]], [[1, 2, 3], [0, 0, 1]]])
    hidden = [3.0 * F.one_hot(k, 4).double() for k in states]  # heads 1 and 2 choose states[0] and states[1]
    labels = torch.tensor([[[0, 1, 0], [3, X, X]], [[X, X, X], [2, 0, X]]])
    output = mtp_loss(hidden, torch.eye(4, dtype=torch.float64), labels, scales([1.0, 0.5], valid_counts(labels)))
    lse = math.log(math.exp(3) + 3)
    assert output.predictions.tolist() == states.tolist()
    assert valid_counts(labels).tolist() == [4, 2]
    assert output.correct.tolist() == [3, 1]
    assert output.sums.tolist() == pytest.approx([4 * lse - 9, 2 * lse - 3])
    assert output.total.item() == pytest.approx((4 * lse - 9) / 4 + 0.5 * (2 * lse - 3) / 2)


def test_agreement_worked_example() -> None:
    # Head 1 chooses tokens for places 1..4, head 2 for 2..5, head 3 for 3..6.
    predictions = torch.tensor([[[1, 2, 3, 4]], [[2, 9, 4, 9]], [[3, 4, 9, 9]]])
    found = agreement(predictions, torch.zeros(1, 7, dtype=torch.int64))
    # Place 2: heads 1, 2 say 2, 2. Place 3: 3, 9, 3. Place 4: 4, 4, 4. Places 5 and 6 have no choice of head 1.
    assert found.agreed.tolist() == [4, 2, 2]
    assert found.count.tolist() == [4, 3, 2]
    # Positions 0 and 1 have both pairs: 0 agrees twice; 1 fails at head 2, so head 3's agreement does not count.
    assert (found.accepted.tolist(), int(found.positions)) == ([1, 1], 2)
    assert loss.predicted_tokens_per_step(found.accepted, found.positions) == 2.0
    # A document that ends behind place 3 leaves position 0 complete, and position 1 of the first document is cut.
    cut = agreement(predictions, torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))
    assert (cut.agreed.tolist(), cut.count.tolist()) == ([3, 1, 1], [3, 2, 1])
    assert (cut.accepted.tolist(), int(cut.positions)) == ([1, 1], 1)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 8))
def test_agreement_equals_loops(seed: int, n: int, T: int) -> None:
    batch = random_batch(seed, n=n, positions=T)
    documents = batch.document_ids.tolist()
    first = torch.randint(0, 2, (n, 2, T), generator=torch.Generator().manual_seed(seed)).tolist()
    agreed, count, accepted, positions = [0] * n, [0] * n, [0] * (n - 1), 0
    for b in range(2):
        for t in range(T):
            pairs = []
            for d in range(n):
                # Head d + 1 at t and head 1 at t + d speak of the same token, t + d + 1.
                if t + d < T and documents[b][t] >= 0 and documents[b][t] == documents[b][t + d + 1]:
                    pairs.append(first[d][b][t] == first[0][b][t + d])
                    agreed[d] += pairs[-1]
                    count[d] += 1
            if len(pairs) == n:
                positions += 1
                for d in range(1, n):
                    accepted[d - 1] += all(pairs[1 : d + 1])
    found = agreement(torch.tensor(first), batch.document_ids)
    assert (found.agreed.tolist(), found.count.tolist()) == (agreed, count)
    assert (found.accepted.tolist(), int(found.positions)) == (accepted, positions)


def test_gradients_in_float16_are_refused() -> None:
    hidden, weight = [torch.ones(1, 4, 8, requires_grad=True)], torch.ones(5, 8, requires_grad=True)
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ConfigError, match="float16 rounds this loss's gradients to 0; use bfloat16"):
            mtp_loss(hidden, weight, labels, torch.ones(1))
        with torch.no_grad():
            assert mtp_loss(hidden, weight, labels, torch.ones(1)).sums.isfinite().all()
