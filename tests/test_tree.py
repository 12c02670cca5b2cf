"""Drafts as trees: shapes, the walk, and decoding that gives what plain decoding gives, with any shape."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from conftest import tiny_model
from invariants import counts_add_up, logprobs_are_targets, same_output, sampling_law
from test_decode import PROMPTS

from foretoken import decode as decoding
from foretoken.cache import KVCache
from foretoken.decode import Batch, decode
from foretoken.layers import Context
from foretoken.model import Model, Stepper
from foretoken.pace import MOST_NODES, WIDTH, Pace
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.stack import At
from foretoken.tree import Tree, chain, grown

KINDS = ["parallel", "sequential"]
GREEDY, SOFT, NUCLEUS = Sampling(), Sampling(1.0), Sampling(0.9, top_p=0.9)
FORK = Tree((0, 0, 1, 1, 2, 3), (0, 1, 0, 1, 0, 0))  # 0 -> 1, 2; 1 -> 3, 4; 2 -> 5; 3 -> 6


def small(kind: str = "parallel", dtype: torch.dtype = torch.float64, **fields: Any) -> Model:
    return tiny_model(**{"head_kind": kind, "dtype": dtype, "peaked": False, "seed": 2, **fields})


def decoded(
    model: Model, drafts: int | None, sampling: Sampling, nodes: int | None, slots: int | None = None, more: int = 1
) -> list[Request]:
    limits = itertools.cycle([20, 1, 13, 7, 25])
    requests = [Request(list(p), next(limits), i, frozenset([11])) for i, p in enumerate(PROMPTS * more)]
    for _ in decode(model, requests, sampling, drafts, slots, None, nodes):
        pass
    return requests


def test_a_shape_says_what_it_is() -> None:
    assert FORK.depths == (0, 1, 1, 2, 2, 2, 3)
    assert FORK.width == 2
    assert [{node for node in range(7) if seen >> node & 1} for seen in FORK.ancestors] == [
        {0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 2, 5}, {0, 1, 3, 6},
    ]  # fmt: skip
    assert FORK.nodes([[10, 20], [11, 21], [12, 22]]) == [10, 20, 11, 21, 11, 12]
    assert FORK.before([10, 20, 11, 21, 11, 12]) == [
        [], [10], [20], [10, 11], [10, 21], [20, 11], [10, 11, 12],
    ]  # fmt: skip
    assert chain(3) == Tree((0, 1, 2), (0, 0, 0))
    assert chain(0).depths == (0,)


@pytest.mark.parametrize(
    ("picked", "path"),
    [
        ([10, 11, 0, 12, 0, 0, 0], [0, 1, 3, 6]),
        ([10, 21, 0, 12, 0, 0, 0], [0, 1, 4]),
        ([20, 11, 11, 12, 0, 0, 0], [0, 2, 5]),
        ([9, 11, 11, 12, 0, 0, 0], [0]),
        ([10, 9, 11, 12, 0, 0, 0], [0, 1]),
    ],
)
def test_the_walk_follows_the_targets_tokens(picked: list[int], path: list[int]) -> None:
    assert FORK.walk([10, 20, 11, 21, 11, 12], picked) == path


def test_a_chain_is_walked_to_its_first_miss() -> None:
    assert chain(0).walk([], [4]) == [0]
    assert chain(3).walk([4, 5, 6], [4, 5, 6, 7]) == [0, 1, 2, 3]
    assert chain(3).walk([4, 5, 6], [4, 9, 6, 7]) == [0, 1]  # what agrees behind a miss was conditioned on the miss
    assert chain(3).walk([4, 5, 6], [9, 4, 5, 6]) == [0]


def odds_of(tree: Tree, rates: list[list[float]]) -> list[float]:
    odds = [1.0]
    for depth, parent, rank in zip(tree.depths[1:], tree.parents, tree.ranks, strict=True):
        odds.append(odds[parent] * rates[depth - 1][rank])
    return odds


@pytest.mark.parametrize("branching", [True, False])
def test_the_best_nodes_grow(branching: bool) -> None:
    """Of all nodes that may be there, the tree has the likeliest."""
    rng = random.Random(0)
    for _ in range(50):
        depth, width, count = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 12)
        rates = [[rng.random() / (rank + 1) for rank in range(width)] for _ in range(depth)]
        every = []
        for length in range(1, depth + 1):
            for ranks in itertools.product(range(width), repeat=length):
                if branching or not any(ranks[:-1]):
                    odds = 1.0
                    for d, rank in enumerate(ranks):
                        odds *= rates[d][rank]
                    every.append(odds)
        best = sorted(every, reverse=True)
        tree, odds = grown(count, depth, width, branching, lambda d, r, rates=rates: rates[d - 1][r])
        assert odds == pytest.approx(best[:count])
        assert odds == pytest.approx(odds_of(tree, rates)[1:])
        assert len(tree.first(len(odds) - 1).parents) == len(odds) - 1


@pytest.mark.parametrize("sampling", [GREEDY, SOFT, NUCLEUS], ids=["greedy", "soft", "top-p"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["pytorch", "compiled", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_plain(kind: str, dtype: torch.dtype, sampling: Sampling) -> None:
    """With every number of nodes, alone and in slots; to the last bit where steps are compiled."""
    model, gap, beside = small(kind, dtype), 1e-9 if dtype == torch.float64 else 0.0, 0
    plain = decoded(model, 0, sampling, None, more=3)
    for drafts, nodes in ((1, 3), (2, 5), (3, 7), (3, 16), (3, 2)):
        for slots in (None, 2):
            found = decoded(model, drafts, sampling, nodes, slots, more=3)
            for a, b in zip(found, plain, strict=True):
                same_output(a, b, gap)
                assert all(len(step.drafted) <= nodes and step.accepted <= drafts for step in a.steps)
            beside += sum(step.accepted for r in found for step in r.steps)
    assert beside > 0


@pytest.mark.parametrize("kind", KINDS)
def test_more_nodes_accept_more(kind: str) -> None:
    for dtype in (torch.float64, torch.float32):
        model = small(kind, dtype)
        steps = [sum(len(r.steps) for r in decoded(model, 3, SOFT, nodes, more=30)) for nodes in (None, 6, 14)]
        assert steps[0] > steps[1] > steps[2]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_draft_and_accept_as_pytorch(kind: str) -> None:
    model, slow = small(kind, torch.float32), small(kind, torch.float32)
    slow.use_stepper(Stepper(slow, compiled=False))
    for sampling in (GREEDY, SOFT):
        found, wanted = (decoded(m, 3, sampling, 9, more=2) for m in (model, slow))
        for a, b in zip(found, wanted, strict=True):
            same_output(a, b, 1e-4)
            assert [step.accepted for step in a.steps] == [step.accepted for step in b.steps]
            assert [sorted(step.drafted) for step in a.steps] == [sorted(step.drafted) for step in b.steps]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_law(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(kind, width=8, vocab=5, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "lm_head.weight":
                p.mul_(12)
    monkeypatch.setattr(decoding, "decode", decode)
    real = Batch.__init__
    monkeypatch.setattr(Batch, "__init__", lambda own, *rest: real(own, *rest[:-2], 6, None))  # six nodes
    requests = sampling_law(model.to(dtype), [1, 2, 3], 2, SOFT, 4000)
    assert max(len(step.drafted) for r in requests for step in r.steps) == 6


def test_log_probabilities_and_counts() -> None:
    for kind in KINDS:
        model = small(kind)
        for request in decoded(model, 3, SOFT, 8):
            logprobs_are_targets(model, request)
            assert len(request.ids) == 1 + sum(step.committed for step in request.steps)
        for request in decoded(model, 3, SOFT, None):
            counts_add_up(request, 3)


BUGS = ["all nodes see each other", "accepted nodes stay where they were", "the positions are the slots"]


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    plain = decoded(model, 0, SOFT, None, more=10)
    if bug == BUGS[0]:
        monkeypatch.setattr(Tree, "ancestors", property(lambda own: [(2 << n) - 1 for n in range(len(own.depths))]))
    elif bug == BUGS[1]:
        real = KVCache.keep
        monkeypatch.setattr(KVCache, "keep", lambda own, row, path, n: real(own, row, range(len(path)), n))
    else:
        real_at = Stepper._at

        def at(own: Stepper, count: int, cache: KVCache, tree: Tree | None = None) -> At:
            right, chained = real_at(own, count, cache, tree), real_at(own, count, cache)
            context = Context(chained.context.cos, chained.context.sin, right.context.mask)
            return right if tree is None else At(context, right.slots, cache)

        monkeypatch.setattr(Stepper, "_at", at)
    found = decoded(model, 3, SOFT, 9, more=10)
    gaps = [abs(x - y) for a, b in zip(found, plain, strict=True) for x, y in zip(a.logprobs, b.logprobs, strict=False)]
    assert [r.ids for r in found] != [r.ids for r in plain] or max(gaps) > 1e-6


def test_the_pace_learns_what_candidates_are_worth() -> None:
    pace = Pace([1.0, 1.1, 1.2, 1.3], 0.01)
    shape = Tree((0, 0, 0, 1, 1), (0, 1, 2, 0, 1))
    rng = random.Random(0)
    for _ in range(4000):  # the first candidate is right in half of the steps, the second in a third, never the third
        at = rng.choices([[0, 1], [0, 2], [0]], [3, 2, 1])[0]
        if at == [0, 1] and rng.random() < 0.75:
            at = [0, 1, 4 if rng.random() < 0.5 else 5]
        pace.record([shape], [at])
    assert pace.rate(1, 0) == pytest.approx(1 / 2, abs=0.2)
    assert pace.rate(1, 1) / (1 - pace.rate(1, 0)) == pytest.approx(2 / 3, abs=0.1)
    assert pace.rate(1, 2) < 0.02
    assert pace.rate(2, 1) / (1 - pace.rate(2, 0)) == pytest.approx(0.6, abs=0.12)
    cheap = pace.tree(3)
    assert cheap is not None
    assert len(cheap.parents) > 6
    pace.row = 1.0
    assert pace.tree(3) is None
    pace.row = 0.01
    sizes = [tree and len(tree.parents) for tree in (pace.tree(3, 5), pace.tree(1, 3), pace.tree(0, 5))]
    assert sizes == [5, 3, None]
    assert MOST_NODES >= 8
    assert WIDTH >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_trees_that_pay_are_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many drafts as pay, as a tree where further nodes cost nothing; the output is plain decoding's."""
    for dtype in (torch.float64, torch.float32):
        model = small(kind, dtype)
        plain = decoded(model, 0, SOFT, None, more=6)
        pace = Pace([1.0, 1.001, 1.002, 1.003], 0.0001, kind == "parallel")
        monkeypatch.setattr(decoding, "step_pace", lambda *_, pace=pace: pace)
        for name in ("CHOOSE_EVERY", "GROW_EVERY"):
            monkeypatch.setattr(decoding, name, 4)
        found = decoded(model, None, SOFT, None, more=6)
        assert max(len(step.drafted) for r in found for step in r.steps) > 4
        for a, b in zip(found, plain, strict=True):
            same_output(a, b, 1e-9 if dtype == torch.float64 else 0.0)
