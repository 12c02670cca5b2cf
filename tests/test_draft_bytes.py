"""Drafts from weights of one byte: their products are what they say, and no output changes."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import run, tiny_model
from invariants import Violation, same_output, sampling_law
from test_native import (
    DRAFTS,
    GREEDY,
    KINDS,
    LIMITS,
    LONG,
    PROMPTS,
    REJECTION,
    SOFT,
    agree,
    each_alone,
    fresh_requests,
    native,
    steps_agree,
    through,
    written,
)
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.kernels import library
from foretoken.model import Model, Stepper
from foretoken.native import Native
from foretoken.sampling import Sampling

LOADED = library()
if LOADED is None or LOADED.foretoken_bytes() == 0:
    pytest.skip("this machine multiplies no bytes", allow_module_level=True)

WIDTHS = [{"width": 64, "head_dim": 16}, {"width": 96, "head_dim": 48, "kv_heads": 1, "vocab": 35}]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretoken.native.LEAST_BYTES", 1)


def in_bytes(kind: str, **fields: object) -> Model:
    model = tiny_model(**{"head_kind": kind, "dtype": torch.bfloat16, **WIDTHS[0], **fields})
    assert native(model).byte_packing is not None
    return model


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The definition: x (R, in) and weight (out, in) as whole numbers of a 127th of their row's largest."""
    (a, of_x), (b, of_w) = (whole(x), whole(weight))
    return (a @ b.T * of_x * of_w.T).float()


def whole(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.float()
    most = rows.abs().amax(1, keepdim=True)
    return (rows * torch.div(torch.tensor(127.0), most)).round().double(), (most / 127).double()


@pytest.mark.parametrize("vocab", [5, 16, 35, 260])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_products_are_those_of_the_definition(rows: int, vocab: int) -> None:
    model = in_bytes("sequential", vocab=vocab)
    with torch.no_grad():
        model.norm.weight.fill_(1)
    # Whole numbers with a mean square of 1: the norm gives them again, to the last bit of bfloat16.
    generator = torch.Generator().manual_seed(rows)
    one = torch.tensor([2.0] * 8 + [1.0] * 32 + [0.0] * 24)
    signs = torch.randint(0, 2, (rows, 64), generator=generator) * 2.0 - 1
    states = torch.stack([one[torch.randperm(64, generator=generator)] for _ in range(rows)]) * signs
    native(model).follow(model.parameters())
    found = native(model).logits(states, drafts=True)
    agree(found, product(states, model.lm_head.weight.detach()), 1e-6, "logits")
    agree(found[:, :3], native(model).logits(states, 3, drafts=True), 0, "the first tokens' logits")
    with pytest.raises(Violation):
        agree(found, native(model).logits(states), 1e-6, "logits of other weights")


def multiplied_in_bytes(patch: pytest.MonkeyPatch, model: Model) -> None:
    """Let PyTorch's steps of a model multiply what drafts by the definition."""
    stepper = model.stepper()
    stack, first = (stepper.heads, 1) if stepper.drafter is None else (stepper.drafter, 0)
    ours = {m[i].data_ptr() for m in (stack.qkv, stack.o, stack.gate_up, stack.down) for i in range(first, stack.m)}

    def multiply(x: Tensor, weight: Tensor, apart: bool = False) -> Tensor:
        return torch.stack([
            product(a, w).to(a.dtype) if w.data_ptr() in ours else torch.nn.functional.linear(a, w)
            for a, w in zip(x.expand(weight.size(0), -1, -1), weight, strict=True)
        ])  # fmt: skip

    patch.setattr("foretoken.stack._bmm", multiply)


@pytest.mark.parametrize("fields", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_definition(
    kind: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_bytes(kind, peaked=False, **fields)
    slow = copy.deepcopy(model)
    slow.use_stepper(Stepper(slow, compiled=False))
    heads = 1 if kind == "sequential" else 4
    tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
    gaps = []
    for how in ("definition", "bfloat16"):
        with monkeypatch.context() as patch:
            if how == "definition":
                multiplied_in_bytes(patch, slow)
            pairs = zip(*(written(m.stepper(), tokens, caches_of(m, heads), heads) for m in (model, slow)), strict=True)
            gaps.append([size_of_gap(a, b) for (what, a), (_, b) in pairs if what in COMPARED[kind]])
    near, far = (sum(each) for each in gaps)
    assert max(gaps[0]) < 0.02
    assert near < far


def caches_of(model: Model, heads: int) -> tuple[KVCache, KVCache | None]:
    stepper = model.stepper()
    return stepper.new_cache(2, 64, heads), stepper.new_draft_cache(2, 64) if model.config.sequential else None


COMPARED = {"parallel": ["states"], "sequential": ["drafting states", "further states"]}


def size_of_gap(a: Tensor, b: Tensor) -> float:
    a, b = (a[1:], b[1:]) if a.dim() == 4 else (a, b)
    return float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt())


@pytest.mark.parametrize("fields", WIDTHS)
@pytest.mark.parametrize("kind", [*KINDS, "joint"])
def test_outputs_are_plain_to_the_last_bit(kind: str, fields: dict[str, object]) -> None:
    model = in_bytes(kind, **fields)
    for sampling in (GREEDY, SOFT, Sampling(1.1, top_p=0.95)):
        plain, accepted = each_alone(model, 0, sampling), 0
        for drafts in DRAFTS["parallel" if kind == "joint" else kind]:
            together = through(model, fresh_requests(LONG, LIMITS), drafts, sampling)
            slots = through(model, fresh_requests(LONG, LIMITS), drafts, sampling, 2)
            for found in (each_alone(model, drafts, sampling), together, slots):
                for a, b in zip(found, plain, strict=True):
                    same_output(a, b, 1e-6 if kind == "joint" else 0)  # whose tokens PyTorch picks
            accepted += sum(step.accepted for request in together for step in request.steps)
        assert accepted > 0


@pytest.mark.parametrize("sampling", [GREEDY, SOFT, REJECTION], ids=["greedy", "soft", "rejection"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_is_its_parts(kind: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_bytes(kind)
    found = {drafts: run(model, PROMPTS, drafts, sampling) for drafts in DRAFTS[kind]}
    monkeypatch.setattr("foretoken.draft.MOST_TOKENS", 0)
    monkeypatch.setattr(Native, "turn", None)
    for drafts in DRAFTS[kind]:
        steps_agree(found[drafts], run(model, PROMPTS, drafts, sampling))


@pytest.mark.parametrize("kind", KINDS)
def test_they_follow_their_weights(kind: str) -> None:
    """Drafts, too, are those of the weights as they are now."""
    model, other = in_bytes(kind, seed=1, peaked=False), in_bytes(kind, seed=2, peaked=False)
    before = run(model, PROMPTS, 3, SOFT)
    model.load_state_dict(other.state_dict())
    after = run(model, PROMPTS, 3, SOFT)
    steps_agree(after, run(other, PROMPTS, 3, SOFT))
    with pytest.raises(Violation):
        steps_agree(after, before)


@pytest.mark.parametrize("least", [1, 1 << 40])
def test_a_model_made_in_inference_mode_decodes(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors have no versions."""
    monkeypatch.setattr("foretoken.native.LEAST_BYTES", least)
    with torch.inference_mode():
        model = tiny_model(dtype=torch.bfloat16, width=64, head_dim=16)
    assert (native(model).byte_packing is not None) == (least == 1)
    for a, b in zip(run(model, PROMPTS, 3, SOFT), run(model, PROMPTS, 0, SOFT), strict=True):
        same_output(a, b, 0)


def test_what_verifies_has_none() -> None:
    """Head 1, the trunk, blocks that lie in the next-token path, and float32."""
    assert native(tiny_model(dtype=torch.float32, width=64, head_dim=16)).byte_packing is None
    assert native(tiny_model(dtype=torch.bfloat16, width=72, head_dim=18)).byte_packing is None  # no whole panels
    for kind in ("causal", "anticausal", "linear"):
        model = tiny_model(head_kind=kind, layers=5, dtype=torch.bfloat16, width=64, head_dim=16)
        assert native(model).byte_packing is None
    model = in_bytes("parallel")
    stack = model.stepper().heads
    assert {index for key, index in native(model).bytes if key == id(stack.qkv)} == {1, 2, 3}


def test_small_heads_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert native(tiny_model(dtype=torch.bfloat16, width=64, head_dim=16)).byte_packing is None


@pytest.mark.parametrize("kind", KINDS)
def test_law_of_rejection(kind: str) -> None:
    """The law that drafts are drawn from is that of the rounded weights, and the outcome's is head 1's."""
    model = in_bytes(kind, vocab=5, peaked=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    requests = sampling_law(model, [1, 2, 3], 2, REJECTION, 3000)
    assert {step.accepted for request in requests for step in request.steps} == {0, 1, 2}
