"""Windows of several documents: packed and run one by one they give the same losses and gradients.

The GPU's form of attention runs here in the plain PyTorch form that FlexAttention has beside its kernel; of the kernel
itself nothing is tested without a GPU but the tables of tiles that it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from invariants import Violation, close
from small_runs import close_weights, recipe, records
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from foretoken import packing, unrolled
from foretoken import train as training
from foretoken.checkpoint import load_checkpoint
from foretoken.config import TrainConfig
from foretoken.heads import READ_OTHERS
from foretoken.loss import LossOutput, mtp_loss, scales, targets, valid_counts
from foretoken.model import Model
from foretoken.recipe import load_recipe
from foretoken.windows import Batch

N = 4  # heads of the models here
dense = packing.dense_mask
WEIGHTS = [1.0, 0.7, 0.4, 2.0]
KINDS = ["parallel", "sequential", "linear", "causal", "anticausal", "joint", "deepseek"]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention inside documents goes the way it does on a GPU, in FlexAttention's plain form.

    Of that, torch refuses a CPU's backward although it is there.
    """
    torch.compiler.reset()
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_warn_once", lambda *_, **__: None)  # that this form is slow
    monkeypatch.setattr(packing, "LEAST_HEAD_WIDTH", 0)
    monkeypatch.setattr(packing, "dense_mask", packing.block_mask)
    yield
    torch.compiler.reset()


def model_of(kind: str, **fields: Any) -> Model:
    """Two layers, more where the heads need them."""
    layers = {"sequential": 3, "anticausal": 5}.get(kind, 2)
    fields = {"layers": layers, "width": 16, "vocab": 11, "peaked": False, "head_kind": kind, **fields}
    return tiny_model(n_future=N, **fields)


def packed(lengths: list[int], positions: int, seed: int, rows: int = 1) -> Batch:
    """Rows of documents of these lengths, cut where the window ends, or with padding behind; some labels masked."""
    g = torch.Generator().manual_seed(seed)
    size = positions + N
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:size]
    ids = F.pad(ids, (0, size - len(ids)), value=-1).expand(rows, size)
    tokens = torch.randint(0, 11, (rows, size), generator=g)
    return Batch(tokens, ids.clone(), (torch.rand(rows, size, generator=g) < 0.8) & (ids >= 0))


def parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens, batch.document_ids, batch.label_mask


def widened(batch: Batch, more: int) -> Batch:
    """With so many positions of padding behind."""
    return Batch(*(F.pad(part, (0, more), value=value) for part, value in zip(parts(batch), (0, -1, 0), strict=True)))


def joined(batches: Iterable[Batch]) -> Batch:
    return Batch(*(torch.cat(same) for same in zip(*map(parts, batches), strict=True)))


def documents_of(batch: Batch) -> Iterator[tuple[int, int, Batch]]:
    """The documents of a window (1, T + n): where each starts, its positions there, and it in a window of its own."""
    T = batch.tokens.size(1) - N
    for document in batch.document_ids[0, :T].unique().tolist():
        if document >= 0:
            at = (batch.document_ids[0] == document).nonzero()[:, 0]
            start, end = int(at[0]), int(at[-1]) + 1
            length = min(end, T) - start
            own = Batch(*(part[:, start:end] for part in parts(batch)))
            yield start, length, widened(own, length + N - (end - start))


def run(
    model: Model, batch: Batch, config: TrainConfig, factors: Tensor, position_ids: Tensor | None = None
) -> LossOutput:
    """Losses of a batch as training takes them, backpropagated."""
    documents, positions = training._packed(batch, config)
    positions = positions if position_ids is None else position_ids
    labels = targets(*parts(batch), N)
    hidden = model(batch.tokens, documents, labels.size(2), position_ids=positions)
    output = mtp_loss(hidden, model.lm_head.weight, labels, factors)
    if output.total.requires_grad:
        output.total.backward()
    return output


def settings_of(positions: int, **fields: Any) -> TrainConfig:
    return TrainConfig(steps=1, batch_size=1, seq_len=positions, **fields)


def gradients(model: Model) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def packed_is_one_by_one(
    kind: str, batch: Batch, reset: bool, from_zero: bool, tolerance: float = 1e-9, **fields: Any
) -> None:
    """Every head's loss and count, and every parameter's gradient. from_zero: documents alone begin at position 0."""
    model, positions = model_of(kind, **fields), batch.tokens.size(1) - N
    counts = valid_counts(targets(*parts(batch), N))
    factors = scales(WEIGHTS, counts)
    inside = settings_of(positions, attention_across_documents=False, reset_position_ids=reset)
    output = run(model, batch, inside, factors)
    wanted = gradients(model)
    sums, total = torch.zeros(N, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    alone_counts = torch.zeros(N, dtype=torch.int64)
    for start, length, window in documents_of(batch):
        place = None if from_zero else torch.arange(start, start + length)[None]
        alone = run(model, window, settings_of(length), factors, place)
        sums, total = sums + alone.sums, total + alone.total.detach()
        alone_counts += valid_counts(targets(*parts(window), N))
    assert alone_counts.tolist() == counts.tolist()
    close(output.sums, sums, "losses", tolerance)
    close(output.total, total, "total", tolerance)
    for name, found in gradients(model).items():
        close(found, wanted[name], name, tolerance)


# Where documents begin, and what a position sees


def test_worked_example() -> None:
    ids = torch.tensor([[7, 7, 7, 8, 9, 9, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3]])
    assert packing.document_starts(ids).tolist() == [[0, 0, 0, 3, 4, 4, 6, 6], [0] * 8]
    assert packing.restarted_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]
    mask = packing.document_mask(ids, 64, torch.float32)
    assert isinstance(mask, Tensor)  # on a CPU
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


TABLES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
          "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")  # fmt: skip


@settings(max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([2, 3, 16]), st.integers(0, 3))
@example([1], 4, 0)
@example([8, 8], 4, 0)
@example([3, 30, 2, 25], 4, 0)
def test_tables_of_tiles_are_those_of_every_pair(lengths: list[int], size: int, padding: int) -> None:
    """What is found from where documents begin is what `create_block_mask` finds by asking the mask everywhere."""
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = torch.stack([F.pad(row, (0, padding), value=-1) for row in (ids, ids.flip(0))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", size)
        found = packing.block_mask(packing.document_starts(ids))
    T = ids.size(1)
    wanted = flex.create_block_mask(
        lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k), 2, None, T, T, device="cpu", BLOCK_SIZE=size
    )
    assert (found.seq_lengths, found.BLOCK_SIZE) == (wanted.seq_lengths, wanted.BLOCK_SIZE)
    for name in TABLES:
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), name
    pairs = flex.create_mask(found.mask_mod, 2, None, T, T, device="cpu")
    assert torch.equal(pairs, packing.dense_mask(packing.document_starts(ids)))


class Largest(TorchDispatchMode):
    """The most elements that a tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_tables_of_tiles_take_no_memory_of_all_pairs() -> None:
    B, T = 2, 8192
    ids = (torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.003).long().cumsum(1)
    with Largest() as largest:
        packing.block_mask(packing.document_starts(ids))
    assert largest.elements == B * T  # the tiles are fewer: B (T / 128)^2


def test_tiles_are_found_without_waiting_for_the_gpu() -> None:
    """No number is read: on the device that has none it would fail."""
    ids = torch.zeros(2, 300, dtype=torch.int64, device="meta")
    mask = packing.block_mask(packing.document_starts(ids))
    assert mask.kv_indices.shape == (2, 1, 3, 3)
    assert packing.restarted_positions(ids).shape == (2, 300)


@pytest.mark.parametrize(
    ("on_gpu", "width", "dtype", "form"),
    [
        (True, 64, torch.float32, "block_mask"),
        (True, 8, torch.float32, "dense_mask"),
        (True, 64, torch.float64, "dense_mask"),
        (False, 64, torch.float32, "dense_mask"),
    ],
)
def test_the_form_is_chosen_by_what_the_kernel_can(
    on_gpu: bool, width: int, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("block_mask", "dense_mask"):
        monkeypatch.setattr(packing, name, lambda starts, name=name: name)
    monkeypatch.setattr(packing, "document_starts", lambda ids: SimpleNamespace(is_cuda=on_gpu))
    assert packing.document_mask(torch.zeros(1, 4), width, dtype) == form


# Packed and one by one


@settings(max_examples=40)
@given(st.sampled_from(KINDS), LENGTHS, st.integers(1, 24), st.booleans(), st.integers(0, 99))
@example("sequential", [1, 2, 1, 1, 3], 6, True, 0)  # all shorter than n, the last is cut
@example("parallel", [1, 1, 1], 2, True, 0)  # no target at all
@example("parallel", [5, 6], 20, True, 1)  # padding
@example("sequential", [5, 6], 20, False, 1)
def test_packed_documents_are_run_one_by_one(kind: str, lengths: list[int], T: int, reset: bool, seed: int) -> None:
    """With positions that restart, or the documents at the places they have in the window: to the last digits."""
    packed_is_one_by_one(kind, packed(lengths, T, seed), reset, from_zero=reset)


@pytest.mark.parametrize("form", ["one document", "mask", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_the_last_positions_alone(kind: str, form: str, request: pytest.FixtureRequest) -> None:
    """Losses and gradients are those of a pass that makes all states; heads that can spare the others' work do."""
    if form == "tiles":
        request.getfixturevalue("tiles")
    model, T = model_of(kind, kv_heads=2), 18
    batch = packed([5, 4, 13], T, 0, rows=2)
    documents = None if form == "one document" else batch.document_ids[:, :T]
    label_mask = batch.label_mask & (torch.arange(T + N) >= 14)
    labels = targets(batch.tokens, batch.document_ids, label_mask, N)
    first, factors = int((labels != -100).any(0).any(0).nonzero()[0]), scales(WEIGHTS, valid_counts(labels))
    assert 14 - N <= first < 14

    def passed(keep: int | None) -> dict[str, Tensor]:
        hidden = model(batch.tokens, documents, T, keep=keep)
        assert {h.shape for h in hidden} == {(2, keep or T, 16)}
        output = mtp_loss(hidden, model.lm_head.weight, labels[..., -(keep or T) :], factors)
        output.total.backward()
        return {"loss": output.total, **gradients(model)}

    read = list[int]()  # positions that the MLPs of heads are run on
    for block in model.heads:
        if hasattr(block, "mlp"):
            block.mlp.register_forward_hook(lambda mlp, inputs, y: read.append(y.size(1)))
    wanted = passed(None)
    assert set(read) == {T}
    for keep in (T - first, T - first + 1, T):
        read.clear()
        for name, value in passed(keep).items():
            close(value, wanted[name], name, 1e-12)
        spared = form != "tiles" and kind not in READ_OTHERS
        assert set(read) == {keep if spared else T}


@settings(max_examples=10)
@given(st.sampled_from(KINDS), LENGTHS, st.integers(0, 99))
def test_restarting_changes_nothing_inside_documents(kind: str, lengths: list[int], seed: int) -> None:
    """Rotary positions are relative; what differs is the rounding of their tables, which are float32."""
    batch = packed(lengths, max(1, sum(lengths) - 2), seed)
    packed_is_one_by_one(kind, batch, False, from_zero=True, tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_sees_bugs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = packed([4, 5, 6], 14, 0)
    packed_is_one_by_one(kind, batch, True, from_zero=True)
    real = packing.document_starts
    bugs = {
        "dense_mask": lambda starts: torch.ones(1, 1, *[starts.size(1)] * 2).bool().tril(),  # sees the one before
        "document_starts": lambda ids: (real(ids) + 1).clamp(max=torch.arange(ids.size(1))),  # misses its first token
    }
    for name, bug in bugs.items():
        with monkeypatch.context() as patch:
            patch.setattr(packing, name, bug)
            with pytest.raises(Violation):
                packed_is_one_by_one(kind, batch, True, from_zero=True)


# By training's own functions


WAYS = [("parallel", "sequential"), *((kind, "chunked") for kind in KINDS)]


@pytest.mark.parametrize(("kind", "method"), WAYS)
@pytest.mark.parametrize("reset", [True, False])
def test_training_on_packed_windows_is_training_on_documents(kind: str, method: str, reset: bool) -> None:
    """Whole documents, in two packed windows and then a row each: the same losses, counts and gradients."""
    T, windows = 20, [packed(lengths, 20, seed) for seed, lengths in enumerate(([3, 1, 7, 2, 4], [9, 2, 8]))]
    alone = joined(widened(own, T - length) for window in windows for _, length, own in documents_of(window))
    both = (f"model.head_kind={kind}", f"model.n_future={N}", f"loss.method={method}", f"train.seq_len={T}")
    inside = ("train.attention_across_documents=false", f"train.reset_position_ids={str(reset).lower()}")
    micro = ("train.micro_batch_size=1",)
    model, found = model_of(kind), []
    for batch, options in ((joined(windows), (*both, *inside, *micro)), (alone, both)):
        outputs = list(training._backward(model, batch, WEIGHTS, load_recipe("tiny", options)))
        sums = torch.stack([output.sums for _, output, _ in outputs]).sum(0)
        counts = torch.stack([count for _, _, count in outputs]).sum(0)
        found.append(({"losses": sums, **gradients(model)}, counts.tolist()))
    (a, counts), (b, others) = found
    assert counts == others
    assert min(counts) > 0
    for name in a:
        close(a[name], b[name], name, 1e-9 if reset else 1e-5)


@pytest.mark.parametrize(("kind", "method"), WAYS)
def test_validation_is_of_documents_too(corpus: Path, tmp_path: Path, kind: str, method: str) -> None:
    layers = 5 if kind == "anticausal" else 3
    shape = (f"model.head_kind={kind}", f"model.n_future={N}", f"model.num_hidden_layers={layers}")
    options = ("train.steps=2", *shape, f"loss.method={method}")
    wanted = recipe(corpus, *options, "train.attention_across_documents=false", "train.reset_position_ids=true")
    training.train(wanted, tmp_path / "run")
    model, tokenizer = load_checkpoint(tmp_path / "run")
    held_out = training._windows(wanted, tokenizer, "validation")
    windows = min(wanted.train.eval_windows, held_out.windows_per_epoch)
    count = -(-windows // held_out.batch_size)
    sums, counts = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    for batches, batch in enumerate(map(held_out.batch, range(count))):
        for row in range(min(held_out.batch_size, windows - batches * held_out.batch_size)):
            for _, length, own in documents_of(Batch(*(part[row : row + 1] for part in parts(batch)))):
                with torch.no_grad():
                    sums += run(model, own, settings_of(length), torch.ones(N)).sums
                counts += valid_counts(targets(*parts(own), N))
    record = records(tmp_path / "run")[-1]
    assert record["count"] == counts.tolist()
    assert record["loss"] == pytest.approx((sums / counts).tolist(), rel=1e-5)


def test_restarting_trains_the_same_model_inside_documents_and_another_across(corpus: Path, tmp_path: Path) -> None:
    for name, options in {
        "inside": ("train.attention_across_documents=false",),
        "inside-reset": ("train.attention_across_documents=false", "train.reset_position_ids=true"),
        "across": (),
        "across-reset": ("train.reset_position_ids=true",),
    }.items():
        training.train(recipe(corpus, "train.steps=4", *options), tmp_path / name)
    close_weights(tmp_path / "inside", tmp_path / "inside-reset", 2e-5)
    with pytest.raises(AssertionError):
        close_weights(tmp_path / "across", tmp_path / "across-reset", 2e-5)


# The form of a GPU


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("kind", "dtype"), [("parallel", torch.float64), ("sequential", torch.float64), ("sequential", torch.float32)]
)
def test_tiles_run_documents_one_by_one(kind: str, dtype: torch.dtype) -> None:
    for seed, lengths in enumerate(([3, 1, 7, 2, 9], [1, 1, 8])):
        batch = packed(lengths, 18, seed)
        assert isinstance(model_of(kind).context(22, batch.document_ids).mask, packing.BlockMask)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        packed_is_one_by_one(kind, batch, True, from_zero=True, tolerance=tolerance, dtype=dtype)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("kv_heads", "depths"), [(1, 4), (4, 2)])
def test_merged_tiles_are_the_masked_form(kv_heads: int, depths: int) -> None:
    g = torch.Generator().manual_seed(depths)

    def leaf(count: int) -> Tensor:
        return torch.randn(2, 11, count, 8, generator=g, dtype=torch.float64).requires_grad_()

    q, keys, values = leaf(4), [leaf(kv_heads) for _ in range(depths)], [leaf(kv_heads) for _ in range(depths)]
    upstream = torch.randn(2, 11, 4, 8, generator=g, dtype=torch.float64)
    ids = torch.tensor([[0] * 3 + [1] + [2] * 5 + [-1] * 2, [4] * 11])
    dense = (ids[:, :, None] == ids[:, None]).tril()[:, None]
    found = []
    for mask in (packing.block_mask(packing.document_starts(ids)), dense):
        y = unrolled.unrolled_attention(q, keys, values, mask)
        found.append([y, *torch.autograd.grad(y, [q, *keys, *values], upstream)])
    for tiled, masked in zip(*found, strict=True):
        close(tiled, masked, "tiles", 1e-12)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_compiled_blocks_take_the_tiles_of_every_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled once, each as one graph, and not again for the next batch's documents."""
    fields: dict[str, Any] = {"n_future": 3 if kind == "sequential" else 2, "layers": 3 if kind == "sequential" else 2}
    fields |= {"width": 16, "vocab": 11, "peaked": False, "head_kind": kind, "dtype": torch.float32}
    plain, model = (tiny_model(**fields) for _ in range(2))
    graphs, counts, T = list[torch.fx.GraphModule](), [], 18

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: real(block, backend=backend, fullgraph=True))
    model.compile_blocks()
    for seed, lengths in enumerate(([3, 1, 7, 2, 9], [1, 1, 8], [22])):
        batch, found = packed(lengths, T, seed, rows=2), []
        upstream = torch.randn(2, T, 16, generator=torch.Generator().manual_seed(seed))
        for one in (model, plain):
            ids = batch.document_ids[:, :T]
            with pytest.MonkeyPatch.context() as patch:
                if one is plain:
                    patch.setattr(packing, "dense_mask", dense)
                states = one(batch.tokens, ids, T, position_ids=packing.restarted_positions(ids))
            sum((state * upstream).sum() for state in states).backward()
            found.append({**dict(enumerate(states)), **gradients(one)})
        for name, value in found[0].items():
            close(value, found[1][name], str(name), 2e-5 * max(1.0, float(value.detach().abs().max())))
        counts.append(len(graphs))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


@pytest.mark.usefixtures("tiles")
def test_autocast_reaches_the_tiles() -> None:
    """Qwen3 norms queries and keys, which then may be wider than values."""
    model = model_of("sequential", architecture="qwen3", dtype=torch.float32)
    config = settings_of(18, attention_across_documents=False)
    batch = packed([3, 1, 7, 2, 9], 18, 0)
    wide = run(model, batch, config, torch.ones(N))
    wanted = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = run(model, batch, config, torch.ones(N))
    close(narrow.sums / wide.sums, torch.ones(N), "losses", 0.02)
    for name, found in gradients(model).items():
        assert float((found - wanted[name]).norm()) <= 0.1 * float(wanted[name].norm()) + 1e-6, name
