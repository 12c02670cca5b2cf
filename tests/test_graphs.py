"""The step whose shapes are fixed, which CUDA captures: the same tokens as in its other forms, on any device."""

from __future__ import annotations

import importlib.util
import itertools
import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from invariants import counts_add_up, logprobs_are_targets, same_output
from test_decode import PROMPTS

from foretoken.cache import KVCache
from foretoken.decode import decode
from foretoken.graphs import BUCKETS, Graphs, Shape
from foretoken.model import MOST_FREE, Model, Stepper
from foretoken.request import Request
from foretoken.sampling import Sampling

KINDS = ["parallel", "sequential"]
SAMPLINGS = {
    "greedy": Sampling(),
    "soft": Sampling(1.0),
    "top-p": Sampling(0.9, top_p=0.9),
    "rejection": Sampling(1.0, accept="rejection"),
    "rejection, top-k": Sampling(1.2, top_k=5, accept="rejection"),
}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small(kind: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Model:
    return tiny_model(**{"head_kind": kind, "dtype": dtype, "peaked": False, "seed": 2, **fields})


def with_graphs(model: Model) -> Model:
    """Its steps run as one function of fixed shapes, on any device."""
    stepper = Stepper(model, compiled=False)
    stepper.graphs = Graphs(stepper.parts())
    model.use_stepper(stepper)
    return model


def eager(model: Model) -> Model:
    model.use_stepper(Stepper(model, compiled=False))
    return model


def decoded(
    model: Model, drafts: int | None, sampling: Sampling, nodes: int | None = None, slots: int | None = None,
    draft_vocab: int | None = None,
) -> list[Request]:  # fmt: skip
    limits = itertools.cycle([20, 1, 13, 7, 25])
    requests = [Request(list(p), next(limits), i, frozenset([11])) for i, p in enumerate(PROMPTS * 2)]
    for _ in decode(model, requests, sampling, drafts, slots, None, nodes, draft_vocab):
        pass
    return requests


def same_steps(found: list[Request], wanted: list[Request], gap: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        same_output(a, b, gap)
        assert [(sorted(s.drafted), s.accepted, s.committed) for s in a.steps] == [
            (sorted(s.drafted), s.accepted, s.committed) for s in b.steps
        ]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_steps_as_in_pytorch(kind: str, architecture: str, sampling: Sampling) -> None:
    """Drafts, acceptances and tokens, of chains of every length, alone and in slots; without drafts too."""
    model, slow = with_graphs(small(kind, architecture=architecture)), eager(small(kind, architecture=architecture))
    for drafts, slots in ((0, None), (1, 3), (3, None), (3, 3), (None, 2)):
        if drafts is not None or not sampling.rejects:  # K by the clock changes what rejection draws
            found, wanted = (decoded(m, drafts, sampling, None, slots) for m in (model, slow))
            if drafts is None:
                wanted = decoded(slow, 0, sampling)
                for a, b in zip(found, wanted, strict=True):
                    same_output(a, b, 1e-9)
            else:
                same_steps(found, wanted, 1e-9)


@pytest.mark.parametrize("sampling", [SAMPLINGS["greedy"], SAMPLINGS["soft"], SAMPLINGS["top-p"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_trees(kind: str, sampling: Sampling) -> None:
    model, slow = with_graphs(small(kind)), eager(small(kind))
    for drafts, nodes, slots in ((2, 5, None), (3, 9, 3), (3, 16, None)):
        same_steps(decoded(model, drafts, sampling, nodes, slots), decoded(slow, drafts, sampling, nodes, slots), 1e-9)


def test_candidates_that_are_one_token() -> None:
    """Rows that no request uses hold zeros alone; where 0 follows 0, several nodes of a depth are accepted there."""
    model = with_graphs(small("parallel", n_future=3))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    requests = [Request([3, 1, 4], limit) for limit in (9, 9, 9, 5)]
    for _ in decode(model, requests, Sampling(), 2, nodes=9):
        pass
    assert [request.ids for request in requests] == [[0] * limit for limit in (9, 9, 9, 5)]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_among_the_first_tokens(kind: str, sampling: Sampling) -> None:
    model, slow = with_graphs(small(kind)), eager(small(kind))
    for draft_vocab, nodes in ((1, None), (6, None), (16, 3), (9, 7)):
        nodes = None if sampling.rejects else nodes
        found, wanted = (decoded(m, 3, sampling, nodes, 3, draft_vocab) for m in (model, slow))
        same_steps(found, wanted, 1e-9)
        assert max(token for r in found for step in r.steps for token in step.drafted) < draft_vocab
        for a, b in zip(found, decoded(slow, 0, sampling), strict=True) if not sampling.rejects else ():
            same_output(a, b, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_used_and_adds_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, turns = with_graphs(small(kind)), 0
    real = Graphs.turn

    def turn(*args: Any) -> Any:
        nonlocal turns
        turns += 1
        return real(*args)

    monkeypatch.setattr(Graphs, "turn", turn)
    for request in decoded(model, 3, SAMPLINGS["soft"]):
        counts_add_up(request, 3)
        logprobs_are_targets(model, request)
    assert turns > 3


def test_caches_that_follow_each_other_share_memory() -> None:
    """Else what is captured would be captured again; whatever K is, and not more of them than is said."""
    stepper = with_graphs(small("parallel")).stepper()
    first = stepper.new_cache(2, 100, 4)
    address = first.address
    beside = stepper.new_cache(2, 90, 1)  # of the same bucket, while the first is there
    assert beside.address != address
    del first
    again = stepper.new_cache(2, 120, 2)
    assert again.address == address
    assert again.lengths == [0, 0]
    held = [stepper.new_cache(rows, 100, 4) for rows in range(1, 9)]
    del held, beside, again
    assert len(stepper.free) == MOST_FREE


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_behind_the_used_slots_means_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full bucket's slots are read, and masked; caches are filled with numbers that would be seen."""
    plain = decoded(eager(small(kind)), 0, SAMPLINGS["soft"])
    real = KVCache.__init__

    def filled(cache: KVCache, shape: tuple[int, ...], *rest: Any) -> None:
        assert shape[3] in BUCKETS
        real(cache, shape, *rest)
        cache.keys.fill_(50.0)
        cache.values.fill_(50.0)

    monkeypatch.setattr(KVCache, "__init__", filled)
    for a, b in zip(decoded(with_graphs(small(kind)), 3, SAMPLINGS["soft"], None, 3), plain, strict=True):
        same_output(a, b, 1e-9)


@CUDA
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_are_the_same(kind: str, sampling: Sampling) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model, slow = small(kind, torch.float64).cuda(), eager(small(kind, torch.float64).cuda())
    for drafts, nodes, slots in ((0, None, None), (1, None, 3), (3, None, None), (3, 9, 3), (2, 5, None)):
        if nodes and sampling.rejects:
            continue
        for _ in range(2):  # captured, and replayed
            found = decoded(model, drafts, sampling, nodes, slots)
            same_steps(found, decoded(slow, drafts, sampling, nodes, slots), 1e-9)
    found = decoded(model, 3, sampling, None, None, 9)
    same_steps(found, decoded(slow, 3, sampling, None, None, 9), 1e-9)
    graphs = model.stepper().graphs
    assert graphs is not None
    assert graphs.captured
    plain = decoded(slow, 0, sampling)
    if not sampling.rejects:
        for a, b in zip(decoded(model, None, sampling), plain, strict=True):
            same_output(a, b, 1e-9)


KERNELS = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="needs Triton, and a GPU or its interpreter",
)


def seen_by(parents: list[int]) -> list[int]:
    """Words of ancestors' bits."""
    seen = [1]
    for node, parent in enumerate(parents, 1):
        seen.append(seen[parent] | 1 << node)
    return seen


@KERNELS
@pytest.mark.parametrize("parts", [1, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_kernels_are_the_blocks(architecture: str, kv_heads: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block and several side by side, as chains and trees, in caches that are filled with what would be seen."""
    from foretoken import gpu

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(gpu, "PROGRAMS", 1 if parts == 1 else 1 << 20)
    monkeypatch.setattr(gpu, "FEW", 4 if parts == 1 else 32)
    model = tiny_model(architecture, width=96, kv_heads=kv_heads, dtype=torch.float32, peaked=False).to(device)
    stepper = Stepper(model, compiled=False)
    for B, filled, parents in ((1, 5, []), (3, 30, [0, 1, 2]), (2, 150, [0, 0, 1, 1, 2])):
        T, seen = len(parents) + 1, torch.tensor(seen_by(parents), device=device)
        depths = torch.tensor([0, 1, 2, 3] if T == 4 else [0, 1, 1, 2, 2, 2][:T], device=device)
        lengths = torch.tensor([filled + row for row in range(B)], device=device)
        for stack, used in ((stepper.trunk[0], 1), (stepper.heads, 4), (stepper.heads, 2)):
            caches = [KVCache((4, B, kv_heads, 256, 24), torch.float32, device) for _ in range(2)]
            for side in ("keys", "values"):
                filling = torch.randn(getattr(caches[0], side).shape, device=device)
                for cache in caches:
                    getattr(cache, side).copy_(filling)
            stepper.grow_tables(256)
            x = torch.randn(1, B, T, 96, device=device)
            found = []
            for cache, kernels in zip(caches, (None, gpu), strict=True):
                graphs = Graphs(stepper.parts())
                assert stepper.tables is not None
                graphs.use_tables(stepper.tables)
                graphs.kernels = kernels
                shape = Shape(B, T, 256, 0, 1, Sampling(), True, False)
                at = graphs._at(shape, cache, lengths, seen, depths)
                own = x.repeat(used, 1, 1, 1) if kernels else x
                found.append(graphs._blocks(stack, own, at, 0, used))
            assert torch.allclose(*found, atol=1e-4)
            for side in ("keys", "values"):
                assert torch.allclose(*(getattr(cache, side) for cache in caches), atol=1e-5)


@KERNELS
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("width", "lines"), [(1500, 36), (40, 4100)])
def test_a_kernel_s_product(width: int, lines: int, rows: int) -> None:
    """Of widths and lines that fill no tile, of one weight and of several that read the same rows."""
    from foretoken import gpu

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, device=device, generator=generator)
    for m in (1, 2):
        x, weight, norm = normal(1, rows, width), normal(m, lines, width) / width**0.5, normal(m, 1, width)
        into = normal(m, rows, lines)
        unit = F.rms_norm(x, (width,), eps=1e-5) * norm
        gate, up = (unit @ weight.mT).chunk(2, -1)
        found = gpu.product(x, weight, norm, 1e-5, gated=True)
        assert torch.allclose(found, F.silu(gate) * up, atol=1e-4)
        wanted = into + x @ weight.mT
        assert torch.allclose(gpu.product(x.expand(m, -1, -1), weight, into=into), wanted, atol=1e-4)
        assert torch.allclose(into, wanted, atol=1e-4)


@CUDA
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_decode_the_same(kind: str) -> None:
    """In float32, whose sums go another way: the same tokens but for near-ties."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model, slow = small(kind, torch.float32).cuda(), eager(small(kind, torch.float32).cuda())
    for sampling in (SAMPLINGS["greedy"], SAMPLINGS["soft"]):
        for drafts, nodes, slots in ((0, None, None), (3, None, 3), (3, 9, None)):
            found, wanted = (decoded(m, drafts, sampling, nodes, slots) for m in (model, slow))
            for a, b in zip(found, wanted, strict=True):
                same_output(a, b, 1e-4)


@CUDA
def test_bfloat16_on_a_gpu() -> None:
    for kind in KINDS:
        model = small(kind, torch.bfloat16, width=64).cuda()
        found, plain = decoded(model, 3, SAMPLINGS["soft"]), decoded(model, 0, SAMPLINGS["soft"])
        equal = sum(a.ids == b.ids for a, b in zip(found, plain, strict=True))
        assert equal >= len(plain) // 2, f"{equal} of {len(plain)}"
