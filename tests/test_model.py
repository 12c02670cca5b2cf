"""The model's two forms agree, nothing peeks, weights exist once; initialisation and rotary tables."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import run, tiny_config, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from invariants import cached_is_full, close, no_peeking, possible
from torch import Tensor, nn

from foretoken import layers
from foretoken.config import OptimConfig
from foretoken.layers import Block, Context, Rotary
from foretoken.loss import mtp_loss, scales, targets, valid_counts
from foretoken.model import Model
from foretoken.optim import make_optimizers
from foretoken.stack import At, BlockStack, grouped_mask

ARCHITECTURES = ["llama", "qwen2", "qwen3"]
MODELS = {name: tiny_model(name, n_future=3, layers=3, width=16) for name in ARCHITECTURES}


# Block and BlockStack


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@torch.no_grad()
def test_stack_equals_its_blocks(architecture: str, kv_heads: int, m: int) -> None:
    model = tiny_model(architecture, n_future=m, layers=1, kv_heads=kv_heads, width=16)
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    context = model.context(7)
    blocks: list[Block] = list(model.heads)
    wanted = [block(x, context) for block in blocks]
    stack = BlockStack(blocks)
    close(torch.stack([block(x, context) for block in blocks]), torch.stack(wanted), "the blocks, once they are views")
    for used in range(1, m + 1):
        cache = model.stepper().new_cache(2, 7, m)
        positions = cache.positions(7)
        cos, sin = (table.double() for table in model.rotary(positions))
        visible = torch.ones(2, 7, 7, dtype=torch.bool).tril()
        mask = grouped_mask(visible, 4 // kv_heads, torch.float64)
        found = stack.forward(x[None], At(Context(cos, sin, mask), positions, cache), 0, used)
        close(found, torch.stack(wanted[:used]), f"{used} of {m} blocks")


# The cache

WRITE = st.tuples(st.just("write"), st.lists(st.integers(1, 4), min_size=1, max_size=1))
BACK = st.tuples(st.just("back"), st.lists(st.integers(0, 5), min_size=3, max_size=3))
SELECT = st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))


@settings(max_examples=25)
@given(st.sampled_from(ARCHITECTURES), st.lists(WRITE | BACK | SELECT, min_size=2, max_size=9), st.integers(0, 99))
@example("llama", [("write", [3]), ("back", [0, 3, 1]), ("write", [2]), ("back", [1, 0, 4]), ("write", [1])], 0)
@example("qwen3", [("write", [4]), ("back", [1, 2, 0]), ("select", [2, 0]), ("write", [2]), ("write", [1])], 1)
def test_cached_stepping_equals_full_forward(architecture: str, moves: list[tuple[str, list[int]]], seed: int) -> None:
    cached_is_full(MODELS[architecture], [*possible(moves), ("write", [2])], seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["parallel", "linear", "causal", "anticausal", "joint", "sequential", "deepseek"])
def test_of_a_prompt_heads_make_keys_and_the_last_state(architecture: str, kind: str) -> None:
    model = tiny_model(architecture, layers=5, head_kind=kind)
    stepper, n = model.stepper(), 1 if kind in ("linear", "sequential", "deepseek") else 4
    tokens = torch.randint(0, 17, (1, 40), generator=torch.Generator().manual_seed(0))
    full, spared = stepper.new_cache(1, 45, n), stepper.new_cache(1, 45, n)
    for cache in (full, spared):
        stepper.forward(tokens[:, :5], cache, n)
    (wanted, z), (found, y) = stepper.forward(tokens, full, n), stepper.forward(tokens, spared, n, last=True)
    close(found[:, :, -1], wanted[:, :, -1], "the last states")
    close(y, z, "the trunk's output")
    reads_all = kind in ("causal", "anticausal", "deepseek")
    assert torch.equal(found, found[:, :, -1:].expand(-1, -1, 40, -1)) != reads_all
    caches = [(full, spared)]
    if kind == "sequential":
        a, b = stepper.new_draft_cache(1, 45), stepper.new_draft_cache(1, 45)
        states = stepper.draft(tokens, z, a), stepper.draft(tokens, z, b, last=True)
        close(states[1][:, -1], states[0][:, -1], "the drafter's last state")
        caches.append((a, b))
    for whole, own in caches:
        assert own.lengths == whole.lengths
        for side in ("keys", "values"):
            close(getattr(own, side), getattr(whole, side), side)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_last_state_of_head_1_does_not_depend_on_how_many_heads_run(kv_heads: int) -> None:
    model = tiny_model("llama", kv_heads=kv_heads, dtype=torch.float32, width=48)
    stepper, found = model.stepper(), list[Tensor]()
    tokens = torch.randint(0, 17, (1, 90), generator=torch.Generator().manual_seed(kv_heads))
    for heads in (1, 2, 4):
        found.append(stepper.forward(tokens, stepper.new_cache(1, 90, heads), heads, last=True)[0][0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_full_cache_says_so() -> None:
    model = MODELS["llama"]
    stepper = model.stepper()
    cache = stepper.new_cache(2, 4, 1)
    stepper.forward(torch.zeros(2, 4, dtype=torch.int64), cache, 1)
    with pytest.raises(AssertionError, match="cache is full"):
        stepper.forward(torch.zeros(2, 1, dtype=torch.int64), cache, 1)
    with pytest.raises(AssertionError):
        cache.roll_back([3, 5])  # forward is no roll-back


# Who sees what


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_head_sees_what_comes_later(architecture: str) -> None:
    tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
    for at in range(9):
        no_peeking(MODELS[architecture], tokens, at)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("length", [1, 37, layers.SHORT])
def test_short_windows_in_bfloat16_attend_as_the_kernel_does(length: int, kv_heads: int) -> None:
    """Values and gradients are as near to exact ones as the kernel's are, and nothing is seen of what comes later."""
    g = torch.Generator().manual_seed(length)
    heads = (4, kv_heads, kv_heads)
    leaves = [2 * torch.randn(2, length, N, 16, generator=g).bfloat16() for N in heads]
    upstream = torch.randn(2, length, 4, 16, generator=g).bfloat16()

    def passed(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves)
        y = layers.attention(q, k, v, None)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), upstream.to(dtype))]

    def off(found: list[Tensor]) -> list[float]:
        return [float((x.double() - e).norm() / e.norm().clamp(min=1e-9)) for x, e in zip(found, exact, strict=True)]

    exact, short = passed(torch.float64), passed(torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "SHORT", 0)
        kernel = passed(torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in short)
    assert length == 1 or not torch.equal(short[0], kernel[0]), "both took the same way"
    if length > 1:
        for ours, theirs in zip(off(short), off(kernel), strict=True):
            assert ours < max(3 * theirs, 0.01)
    changed = [leaf.clone() for leaf in leaves]
    for leaf in changed:
        leaf[:, length // 2 :] += 1
    torch.testing.assert_close(
        layers.attention(changed[0], changed[1], changed[2], None)[:, : length // 2],
        short[0][:, : length // 2], rtol=0, atol=0,
    )  # fmt: skip


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    model = MODELS["qwen2"]
    tokens = torch.randint(0, 17, (1, 10), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1, -1]])
    parts = [slice(0, 4), slice(4, 7), slice(7, 10)]
    before = model(tokens, documents)
    for part in parts:
        changed = tokens.clone()
        changed[:, part] = (changed[:, part] + 1) % 17
        for a, b in zip(before, model(changed, documents), strict=True):
            same = (a == b).all(-1)[0]
            assert [bool(same[t]) for t in range(10)] == [t not in range(part.start, part.stop) for t in range(10)]
    for other in (model(tokens), model(tokens, torch.zeros_like(tokens))):  # without the mask, they do
        assert (before[0][:, 4:] != other[0][:, 4:]).any(-1).all()
        close(before[0][:, :4], other[0][:, :4], "the first document")
    # Rotary positions are relative: a document reads the same as it would alone, to the tables' float32.
    close(before[2][:, 4:7], model(tokens[:, 4:7])[2], "the second document", 1e-5)


# Weights exist once


def train_step(model: Model, optimizers: list[torch.optim.Optimizer], seed: int) -> float:
    n = model.config.n_future
    tokens = torch.randint(0, 17, (2, 10 + n), generator=torch.Generator().manual_seed(seed))
    labels = targets(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool), n)
    factors = scales([1.0] * n, valid_counts(labels))
    total = mtp_loss(model(tokens[:, :10]), model.lm_head.weight, labels, factors).total
    total.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total.item()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_in_the_middle_of_training_changes_nothing(architecture: str, name: str) -> None:
    quiet, sampled = (tiny_model(architecture, n_future=3, width=16, peaked=False) for _ in range(2))
    config = OptimConfig.model_validate({"name": name, "lr": 0.01})
    optimizers = [make_optimizers(model, config) for model in (quiet, sampled)]
    losses = []
    for step in range(6):
        losses.append(train_step(quiet, optimizers[0], step))
        assert train_step(sampled, optimizers[1], step) == pytest.approx(losses[-1], abs=1e-12)
        if step in (1, 3):
            run(sampled, [[1, 2, 3]], 2, max_tokens=4)
    for (parameter, p), q in zip(quiet.named_parameters(), sampled.parameters(), strict=True):
        close(p, q, parameter)
    assert len({round(value, 6) for value in losses}) == 6  # it does train


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_an_update_in_place_is_seen_by_both_forms(architecture: str) -> None:
    model = tiny_model(architecture, n_future=3, width=16)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    stepper = model.stepper()
    before = model(tokens)[2]
    for name, p in model.named_parameters():
        p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(7)), alpha=0.1)
        stepped = model.norm(stepper.forward(tokens, stepper.new_cache(1, 5, 3), 3)[0])
        close(stepped, torch.stack(model(tokens)), f"after a change of {name}")
    assert model.stepper() is stepper
    assert not torch.allclose(before, model(tokens)[2])


@torch.no_grad()
def test_moved_weights_make_a_new_stepper() -> None:
    model = tiny_model(n_future=2)
    old = model.stepper()
    assert model.stepper() is old
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    model.to(torch.float32)
    new = model.stepper()
    assert new is not old
    stepped = model.norm(new.forward(tokens, new.new_cache(1, 5, 2), 2)[0])
    assert stepped.dtype == torch.float32
    close(stepped, torch.stack(model(tokens)), "in float32", 1e-5)
    model.heads[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32))
    newest = model.stepper()
    assert newest is not new
    stepped = model.norm(newest.forward(tokens, newest.new_cache(1, 5, 2), 2)[0])
    close(stepped, torch.stack(model(tokens)), "with a parameter replaced", 1e-5)


def test_a_decoded_model_saves_and_loads_the_same_weights() -> None:
    model, copy = tiny_model(seed=1), tiny_model(seed=2)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, [[1, 2]], 3, max_tokens=3)
    copy.stepper()
    copy.load_state_dict(model.state_dict())  # in place, so the stepper sees it
    assert model.state_dict().keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert run(copy, [[1, 2]], 3)[0].ids == run(model, [[1, 2]], 3)[0].ids


# Numbers


def test_initialisation_statistics() -> None:
    model = Model(tiny_config("qwen2", n_future=3, layers=8, width=64, vocab=600))
    model.init_weights(5)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            wanted = 0.02 / math.sqrt(16) if into_residual else 0.02  # 8 blocks add to the stream twice each
            error = 4 / math.sqrt(2 * p.numel())  # four deviations of a deviation
            assert p.std().item() == pytest.approx(wanted, rel=error), name
            assert abs(p.mean().item()) < 4 * wanted / math.sqrt(p.numel()), name
    heads = [head.mlp.up_proj.weight for head in model.heads]
    assert not torch.equal(heads[0], heads[1])
    again = Model(model.config)
    again.init_weights(5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    again.init_weights(6)
    assert not torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_tied_embeddings_are_one_parameter() -> None:
    model = tiny_model(tie_word_embeddings=True, n_future=2)
    assert model.lm_head.weight is model.embed_tokens.weight
    untied, tied = (sum(p.numel() for p in m.parameters()) for m in (tiny_model(n_future=2), model))
    assert untied - tied == 17 * 32
    model.to(torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_rotation_worked_example() -> None:
    # Head width 2 has one frequency, 1: position p turns the vector by p radians.
    rotary = Rotary(tiny_config(width=8))
    cos, sin = rotary(torch.tensor([0, 1, 2]))
    assert cos[:, 0].tolist() == pytest.approx([1, math.cos(1), math.cos(2)], abs=1e-6)
    assert sin.tolist()[1] == pytest.approx([-math.sin(1), math.sin(1)], abs=1e-6)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_equal_transformers(factor: float) -> None:
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    ours = Rotary(tiny_config(width=512, rope_theta=500_000.0, rope_scaling=scaling)).inv_freq
    theirs_config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072,
        rope_theta=500_000.0, rope_scaling={**scaling, "rope_theta": 500_000.0},
    )  # fmt: skip
    theirs, _ = utils.ROPE_INIT_FUNCTIONS["llama3"](theirs_config, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = Rotary(tiny_config(width=512, rope_theta=500_000.0)).inv_freq
    kinds = ours / plain  # kept, divided, and between: all three are there
    assert (kinds == 1).any()
    assert torch.isclose(kinds, torch.tensor(1 / factor)).any()
    assert ((kinds < 0.99) & (kinds > 1.01 / factor)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_narrow_model_keeps_exact_angles(dtype: torch.dtype) -> None:
    model = Model(tiny_config(width=64))
    position = torch.tensor([[200_000]])
    wanted = model.rotary(position)
    model.to(dtype)
    for found, table in zip(model.rotary(position), wanted, strict=True):
        assert torch.equal(found, table)
