"""The step whose shapes are fixed, which CUDA captures: the same tokens as in its other forms, on any device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import tiny_model
from invariants import counts_add_up, logprobs_are_targets, same_output
from test_decode import PROMPTS

from foretoken.cache import KVCache
from foretoken.decode import decode
from foretoken.graphs import BUCKETS, Graphs
from foretoken.model import Model, Stepper
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
    stepper.graphs = Graphs(*stepper.parts())
    model.use_stepper(stepper)
    return model


def eager(model: Model) -> Model:
    model.use_stepper(Stepper(model, compiled=False))
    return model


def decoded(
    model: Model, drafts: int | None, sampling: Sampling, nodes: int | None = None, slots: int | None = None
) -> list[Request]:
    limits = itertools.cycle([20, 1, 13, 7, 25])
    requests = [Request(list(p), next(limits), i, frozenset([11])) for i, p in enumerate(PROMPTS * 2)]
    for _ in decode(model, requests, sampling, drafts, slots, None, nodes):
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
    assert turns > 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_behind_the_used_slots_means_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full bucket's slots are read, and masked; caches are filled with numbers that would be seen."""
    plain = decoded(eager(small(kind)), 0, SAMPLINGS["soft"])
    real = KVCache.__init__

    def filled(cache: KVCache, blocks: int, rows: int, kv_heads: int, capacity: int, *rest: Any) -> None:
        real(cache, blocks, rows, kv_heads, next(size for size in BUCKETS if size >= capacity), *rest)
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
    graphs = model.stepper().graphs
    assert graphs is not None
    assert graphs.captured
    plain = decoded(slow, 0, sampling)
    if not sampling.rejects:
        for a, b in zip(decoded(model, None, sampling), plain, strict=True):
            same_output(a, b, 1e-9)


@CUDA
def test_bfloat16_on_a_gpu() -> None:
    for kind in KINDS:
        model = small(kind, torch.bfloat16, width=64).cuda()
        found, plain = decoded(model, 3, SAMPLINGS["soft"]), decoded(model, 0, SAMPLINGS["soft"])
        equal = sum(a.ids == b.ids for a, b in zip(found, plain, strict=True))
        assert equal >= len(plain) // 2, f"{equal} of {len(plain)}"
