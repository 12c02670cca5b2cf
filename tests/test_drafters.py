"""Drafts from elsewhere: another model, or the text so far. They change the speed, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import tiny_model
from invariants import counts_add_up, same_output, sampling_law
from test_decode import PROMPTS

from foretoken import decode as decoding
from foretoken.completion import generate, stream
from foretoken.decode import decode
from foretoken.draft import Drafter, Proposal, Start
from foretoken.drafters import Lookup, LookupDrafter, ModelDrafter, Source, looked_up, step_pace
from foretoken.errors import ConfigError
from foretoken.model import Model
from foretoken.pace import Pace
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.tokenizer import byte_tokenizer
from foretoken.tree import Tree

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
REJECTION = Sampling(1.0, accept="rejection")
SAMPLINGS = [Sampling(), Sampling(1.0), Sampling(0.8, top_p=0.9)]


def small(kind: str = "parallel", dtype: torch.dtype = torch.float64, **fields: object) -> Model:
    return tiny_model(**{"head_kind": kind, "dtype": dtype, **fields})  # type: ignore[arg-type]


def decoded(
    model: Model,
    source: Source,
    drafts: int | None,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    slots: int | None = None,
    limits: Sequence[int] = (24, 1, 17, 9, 30),
) -> list[Request]:
    requests = [Request(list(p), limits[i % len(limits)], i, frozenset([11])) for i, p in enumerate(prompts)]
    for _ in decode(model, requests, sampling, drafts, slots, source):
        pass
    return requests


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lookup", "long lookup", "smaller", "other kind", "itself"])
def test_output_is_plain(name: str, dtype: torch.dtype) -> None:
    """To the last bit where steps are compiled. A model that drafts for itself is always right."""
    model = small(dtype=dtype, seed=1)
    sources: dict[str, Source] = {
        "lookup": Lookup(),
        "long lookup": Lookup(9),
        "smaller": small(dtype=dtype, n_future=1, layers=1, width=16, seed=4),
        "other kind": small("sequential", dtype, seed=5),
        "itself": model,
    }
    gap, accepted = 1e-9 if dtype == torch.float64 else 0.0, 0
    for sampling in SAMPLINGS:
        plain = decoded(model, None, 0, sampling)
        for drafts, slots in ((1, None), (2, 2), (5, None), (None, 2)):
            found = decoded(model, sources[name], drafts, sampling, slots=slots)
            for a, b in zip(found, plain, strict=True):
                same_output(a, b, gap)
                accepted += sum(step.accepted for step in a.steps)
                if name == "itself" and drafts is not None:
                    assert all(step.committed == drafts + 1 for step in a.steps[:-1])
                    counts_add_up(a, drafts)
    assert accepted > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("name", ["lookup", "model"])
def test_law_of_rejection(name: str, dtype: torch.dtype) -> None:
    model, other = (small(width=8, vocab=5, peaked=False, seed=seed) for seed in (3, 4))
    with torch.no_grad():
        for m in (model, other):
            m.lm_head.weight.mul_(25)
            for key, p in m.named_parameters():
                if p.dim() == 2 and key != "lm_head.weight":
                    p.mul_(12)
    source: Source = Lookup(2) if name == "lookup" else other.to(dtype)
    sampling_law(model.to(dtype), [1, 2, 3, 1, 2], 2, REJECTION, 3000, source=source)


def test_lookup_finds_the_newest_longest_match() -> None:
    assert looked_up([1, 2, 3, 9, 1, 2, 4, 1, 2], 3, 4) == [4, 1, 2]  # "1 2" stood twice before; the newer one
    assert looked_up([5, 1, 2, 7, 3, 1, 2, 8, 5, 1, 2], 3, 2) == [7, 3]  # three tokens before two
    assert looked_up([5, 1, 2, 7, 3, 1, 2, 8, 5, 1, 2], 2, 2) == [8, 5]
    assert looked_up([1, 1, 1], 3, 3) == [1]  # a match may reach into the end
    assert looked_up([1, 2, 3], 3, 3) == []
    assert looked_up([1], 3, 3) == looked_up([], 3, 3) == []


def slowly_looked_up(text: Sequence[int], longest: int, count: int) -> list[int]:
    for size in range(longest, 0, -1):
        starts = [s for s in range(len(text) - size) if list(text[s : s + size]) == list(text[len(text) - size :])]
        if size < len(text) and starts:
            return list(text[starts[-1] + size :][:count])
    return []


def test_lookup_is_its_definition() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = [rng.randrange(3) for _ in range(rng.randrange(30))]
        longest, count = rng.randint(1, 5), rng.randint(1, 6)
        assert looked_up(text, longest, count) == slowly_looked_up(text, longest, count)


def test_lookup_drafts_what_repeats() -> None:
    """A text that repeats itself is decoded in fewer steps; where nothing is found, a step is plain."""
    model = small(peaked=True, dtype=torch.float32)
    request = Request([3, 1, 4], 240)
    for _ in decode(model, [request], Sampling(), 4, None, Lookup()):
        pass
    assert sum(step.accepted for step in request.steps) > 80  # greedy text of a small model falls into loops
    (nothing,) = decoded(model, Lookup(), 4, Sampling(), [[3]], limits=[2])
    assert nothing.steps[0].drafted == ()


def test_models_of_one_head_gain_too() -> None:
    model = small(n_future=1, dtype=torch.float32)
    found = decoded(model, model, 3, Sampling(1.0))
    assert sum(s.committed for r in found for s in r.steps) > 2 * sum(len(r.steps) for r in found)
    for a, b in zip(found, decoded(model, None, 0, Sampling(1.0)), strict=True):
        same_output(a, b, 0.0)


def test_pace_knows_each_source() -> None:
    model, other = small(dtype=torch.float32), small(dtype=torch.float32, seed=2)
    stepper = model.stepper()
    paces = [step_pace(stepper, 1, source) for source in (None, Lookup(), other)]
    assert [len(pace.costs) for pace in paces] == [4, 9, 5]
    assert step_pace(stepper, 1, Lookup()) is paces[1]
    assert step_pace(stepper, 1, Lookup(4)) is not paces[1]


def test_text_in_and_out() -> None:
    model = tiny_model(vocab=260, dtype=torch.float32)
    other, tokenizer = tiny_model(vocab=260, dtype=torch.float32, seed=2), byte_tokenizer()
    prompts = ["abc abc ab", "", "xyz"]
    plain = generate(model, tokenizer, prompts, max_tokens=30, drafts=0)
    for found in (
        generate(model, tokenizer, prompts, max_tokens=30, lookup=3),
        generate(model, tokenizer, prompts, max_tokens=30, draft_vocab=128),
        generate(model, tokenizer, prompts, max_tokens=30, draft_model=other, drafts=2),
        generate(model, tokenizer, prompts, max_tokens=30, draft_model=other, drafts=2, batch_size=1),
    ):
        assert [g.ids for g in found] == [g.ids for g in plain]
    pieces = list(stream(model, tokenizer, prompts[0], max_tokens=30, lookup=2, drafts=5))
    assert "".join(piece for piece, _ in pieces) == plain[0].text


def test_mistakes() -> None:
    model, tokenizer = tiny_model(vocab=260, dtype=torch.float32), byte_tokenizer()
    short = tiny_model(vocab=260, dtype=torch.float32, max_position_embeddings=8)
    for options, part in (
        ({"draft_model": small()}, "the draft model has 17 tokens, the model 260"),
        ({"draft_model": short, "max_tokens": 9}, "2 tokens + 9 new ones exceed the draft model's 8 positions"),
        ({"draft_model": short, "max_tokens": 2, "drafts": 8}, "a draft model of 8 positions drafts 0 to 7"),
        ({"draft_model": model, "lookup": 2}, "only one of them"),
        ({"lookup": -1}, "lookup = -1 must be at least 1 token"),
        ({"draft_vocab": 0}, "draft_vocab = 0 must lie between 1 and the model's 260 tokens"),
        ({"draft_vocab": 261}, "draft_vocab = 261 must lie between 1 and the model's 260 tokens"),
        ({"draft_vocab": 9, "lookup": 2}, "whatever tokens they are"),
        ({"lookup": 2, "drafts": 256}, "drafts 0 to 255 tokens per step"),
    ):
        with pytest.raises(ConfigError) as error:
            generate(model, tokenizer, "x", **options)  # type: ignore[call-overload]
        assert part in str(error.value)


@pytest.mark.parametrize("drafter", [LookupDrafter, ModelDrafter])
def test_wrong_drafts_change_nothing(drafter: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that is always wrong is only slow."""
    model = small(dtype=torch.float32)
    source: Source = Lookup() if drafter is LookupDrafter else small(dtype=torch.float32, seed=3)
    plain = decoded(model, None, 0, Sampling(1.0))

    def propose(own: Drafter, start: Start, cache: object) -> Proposal:
        return [[(len(request.ids) * 7) % 17] * own.drafts for request in start.requests], None

    monkeypatch.setattr(drafter, "propose", propose)
    for a, b in zip(decoded(model, source, 3, Sampling(1.0)), plain, strict=True):
        same_output(a, b, 0.0)


def test_luck_behind_a_short_lookup_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with fewer drafts than its neighbour is filled up with token 0; here that is what the target picks."""
    model = tiny_model(n_future=1)
    model.lm_head.weight.data.zero_()  # all tokens are alike: the first is picked
    seen: list[tuple[list[int], list[list[int]]]] = []

    class Watched(Pace):
        def record(self, trees: Sequence[Tree], paths: Sequence[Sequence[int]], *rest: Any) -> None:
            seen.append(([len(tree.parents) for tree in trees], [list(path) for path in paths]))
            super().record(trees, paths, *rest)

    monkeypatch.setattr(decoding, "step_pace", lambda *_: Watched([1.0] * 4))
    requests = [Request([0, 0, 0, 0], 12), Request([5, 6, 7], 12)]
    for _ in decode(model, requests, Sampling(), None, None, Lookup()):
        pass
    assert all(request.ids == [0] * 12 for request in requests)
    assert all(step.accepted <= len(step.drafted) for request in requests for step in request.steps)
    assert (seen[0][0][:2], seen[0][1][:2]) == ([1, 0], [[0, 1], [0]])
    assert all(len(path) <= count + 1 for counts, paths in seen for count, path in zip(counts, paths, strict=True))
