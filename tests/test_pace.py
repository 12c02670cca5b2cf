"""How many drafts a step has: what promises most, none where drafts do not pay, and never another output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from conftest import Oracle, run, tiny_model
from invariants import same_output
from test_decode import CONFIDENT, PROMPTS, VAGUE

from foretoken import decode as decoding
from foretoken import drafters
from foretoken.decode import decode
from foretoken.drafters import step_pace
from foretoken.pace import PROBE_EVERY, WARY, WARY_OF_ROWS, Pace, measured_costs, never_falling
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.tree import Tree, chain

CHEAP, DEAR = [1.0, 1.1, 1.2, 1.3], [1.0, 2.1, 3.1, 4.1]


def record(pace: Pace, drafted: int, right: int) -> None:
    """A step of one row with a chain of drafts, the first `right` of them accepted."""
    pace.record([chain(drafted)], [range(right + 1)])


def after(costs: Sequence[float], accepted: int, steps: int = 60) -> Pace:
    pace = Pace(costs)
    for _ in range(steps):
        record(pace, 3, accepted)
    return pace


def test_the_best_expected_speed_is_taken() -> None:
    """Acceptances of 0.75, then 0.5, then 0: 1.75 tokens for 1.2, 2.125 for 1.5, 2.125 for 1.9."""
    pace = Pace([1.0, 1.2, 1.5, 1.9])
    for _ in range(100):
        for accepted in (0, 1, 2, 2, 1, 2, 0, 1):
            record(pace, 3, accepted)
    assert pace.tokens_per_step()[1] == pytest.approx(1.75, abs=0.08)
    assert pace.tokens_per_step()[2] == pytest.approx(2.125, abs=0.1)
    assert pace.tokens_per_step()[3] == pytest.approx(pace.tokens_per_step()[2], abs=0.02)
    assert pace.choose(3) in (1, 2)  # 1.46 and 1.42 tokens a second, 1.12 with three
    assert pace.choose(1) == 1


def test_drafts_that_are_refused_stop() -> None:
    for steps in (60, 200):
        assert after(CHEAP, 0, steps).choose(3) == 0
        assert after(CHEAP, 3, steps).choose(3) == 3
        assert after(DEAR, 3, steps).choose(3) == 0  # all are right, and still do not pay
    few = next(steps for steps in range(60) if after([1.0, 1.5, 1.8, 2.1], 0, steps).choose(3) == 0)
    assert few <= 12


def test_what_has_not_paid_is_tried_again_now_and_then() -> None:
    pace = after(CHEAP, 0)
    begun = [pace.begin(3) for _ in range(3 * PROBE_EVERY)]
    assert sum(begun) == 3
    assert set(begun) == {0, 1}
    for _ in range(60):
        record(pace, 1, 1)
    assert pace.choose(3) > 0


def test_one_text_does_not_speak_for_the_next() -> None:
    """A text that refuses drafts stops them for itself; the next begins with what all of them gave."""
    pace = after([1.0, 1.3, 1.6, 1.9], 3, 400)
    for _ in range(100):
        record(pace, 3, 0)
    assert pace.choose(3) == 0
    assert pace.begin(3) == 3
    for _ in range(2000):
        record(pace, 3, 0)
    assert pace.begin(3) == 0


def test_bad_luck_stops_no_heads() -> None:
    """Nor do three refusals in a row where half of the drafts are right."""
    pace = Pace([1.0, 1.3])
    for step in range(100):
        record(pace, 1, step % 2)
    for _ in range(3):
        record(pace, 1, 0)
    assert pace.choose(1) == 1


def test_small_promises_change_nothing() -> None:
    pace = after([1.0, 1.0, 1.0, 1.0], 3)
    assert pace.choose(3) == 3
    pace.costs = [0.5, 1.0, 0.7499, 1.0]  # with two: 0.01 % more
    assert pace.choose(3) == 3
    pace.costs = [0.5, 1.0, 0.7, 1.0]
    assert pace.choose(3) == 2


def test_costs_never_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretoken.pace.ENOUGH", 0.0)
    seen = []
    costs = measured_costs([lambda k=k: seen.append(k) for k in range(3)], rounds=2)
    assert seen == [0, 1, 2, 0, 1, 2, *[0] * 20, *[1] * 20, *[2] * 20]  # short ones some times in a row
    assert all(cost > 0 for cost in costs)
    assert never_falling([3.0, 2.0, 4.0, 1.0]) == [3.0, 3.0, 4.0, 4.0]


def test_costs_are_the_lowest_of_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = [0.0], iter([9.0, 9.0, 0.2, 0.5, 0.1, 0.3, 0.7, 0.2])  # in turn; two to warm up
    monkeypatch.setattr("foretoken.pace.time.perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += next(seconds)

    assert measured_costs([step, step], rounds=3) == pytest.approx([0.1, 0.2])


def with_vocabularies(within: float, spared: dict[int, float], steps: int = 200) -> Pace:
    """After steps of three drafts, all right; of the accepted ones, so many lie among the first 100 tokens."""
    pace, odd = Pace([1.0, 1.5, 1.6, 1.7], spared=spared), 0.0
    for _ in range(steps):
        row = [0]
        for _ in range(3):
            odd += within
            row.append(50 if odd >= 1 else 150)
            odd %= 1
        pace.record([chain(3)], [range(4)], [row], pace.draft_vocab)
        pace.choose(3)
    return pace


def test_fewer_tokens_are_drafted_where_that_pays() -> None:
    """4 tokens for 1.7, or 1 + .9 + .81 + .73 = 3.44 for 1.7 less what is spared."""
    assert with_vocabularies(0.9, {100: 0.35}).draft_vocab == 100
    assert with_vocabularies(0.9, {100: 0.15}).draft_vocab is None
    assert with_vocabularies(0.9, {}).draft_vocab is None
    assert with_vocabularies(0.9, {100: 0.35}).tokens_per_step()[3] == pytest.approx(4, abs=0.1)  # as with all tokens
    assert with_vocabularies(0.3, {100: 0.35}).draft_vocab is None
    assert with_vocabularies(1.0, {100: 0.35}, steps=4).draft_vocab is None  # not before it is known
    pace = with_vocabularies(1.0, {200: 0.2, 100: 0.35})
    assert pace.draft_vocab == 100
    for _ in range(400):  # another text: seen where all tokens are drafted, now and then
        pace.record([chain(3)], [range(4)], [[0, 150, 150, 150]], pace.draft_vocab)
        pace.choose(3)
    assert pace.draft_vocab == 200


def test_what_a_smaller_vocabulary_spares() -> None:
    """In proportion to the drafts, and no step with drafts is cheaper than one without."""
    for spared, wanted in ((0.3, [1.0, 1.4, 1.4, 1.4]), (0.6, [1.0, 1.3, 1.2, 1.1]), (0.9, [1.0, 1.2, 1.0, 1.0])):
        pace = Pace([1.0, 1.5, 1.6, 1.7], spared={100: spared})
        assert [pace.cost(k, 100) for k in range(4)] == pytest.approx(wanted)
        assert [pace.cost(k, None) for k in range(4)] == pace.costs
    pace = Pace([0.65, 1.74, 1.96, 2.81], spared={100: 1.71})
    for _ in range(100):
        record(pace, 3, 0)
    assert pace.choose(3) == 0


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_output_does_not_depend_on_the_vocabulary_of_drafts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafters, "SMALLEST_VOCABULARY", 64)
    model, seen = tiny_model(head_kind=kind, vocab=300, peaked=False, seed=1), set()
    sizes = itertools.cycle([128, None, 64])
    for sampling in (Sampling(), Sampling(0.8, top_p=0.9)):
        pace = step_pace(model.stepper(), len(PROMPTS), temperature=sampling.temperature)
        assert list(pace.spared) == [None, 128, 64]
        monkeypatch.setattr(pace, "_choose_vocabulary", lambda pace=pace: setattr(pace, "draft_vocab", next(sizes)))
        pace.costs = [1.0] * len(pace.costs)  # all drafts pay
        plain, chosen = run(model, PROMPTS, 0, sampling, 60), run(model, PROMPTS, None, sampling, 60)
        for a, b in zip(chosen, plain, strict=True):
            same_output(a, b)
            seen |= {max(step.drafted, default=0) // 64 for step in a.steps}
    assert seen == {0, 1, 2, 3, 4}


def test_all_places_of_a_tree_are_recorded() -> None:
    """Its nodes stand in the order of their odds, so the last is none of the deepest."""
    pace, tree = Pace([1.0] * 5), Tree((0, 1, 2, 0), (0, 0, 0, 1))
    assert (tree.depths[-1], max(tree.depths)) == (1, 3)
    for _ in range(20):
        pace.record([tree], [[0, 1, 2, 3]], [[0] * 5])
    assert all(tried > 10 for tried in pace.tried[:3])
    assert pace.tried[3] == 0


def test_temperatures_do_not_learn_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measured = tiny_model(seed=1), list[object]()
    real = drafters.measured_costs
    monkeypatch.setattr(drafters, "measured_costs", lambda steps: measured.append(steps) or real(steps))
    for temperature in (0.0, 0.8):
        run(model, PROMPTS, None, Sampling(temperature))
    cold, warm, near = (step_pace(model.stepper(), len(PROMPTS), temperature=t) for t in (0.0, 0.8, 0.75))
    assert warm is near
    assert warm.costs == cold.costs
    assert (warm.row, warm.branching, warm.spared) == (cold.row, cold.branching, cold.spared)
    before = list(warm.all_tried)
    cold.record([chain(2)], [[0, 1, 2]])
    assert warm.all_tried == before
    assert len(measured) == 1


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_output_does_not_depend_on_the_pace(kind: str, costs: list[float]) -> None:
    model = tiny_model(head_kind=kind, peaked=False, seed=1)
    for sampling in (Sampling(), Sampling(0.8, top_p=0.9)):
        pace = step_pace(model.stepper(), len(PROMPTS), temperature=sampling.temperature)
        pace.costs = costs + [1.4] * (len(pace.costs) - len(costs))
        for _ in range(2):
            plain, chosen = run(model, PROMPTS, 0, sampling), run(model, PROMPTS, None, sampling)
            for a, b in zip(chosen, plain, strict=True):
                same_output(a, b)


def test_the_pace_follows_what_is_accepted(oracle_drafter: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {tuple(r.prompt): r.ids for r in run(CONFIDENT, [PROMPTS[0]], 0, max_tokens=60)}
    for right, wanted in ((3, 3), (1, 1), (0, 0)):
        pace = Pace([1.0, 1.2, 1.7, 2.2])
        monkeypatch.setattr(decoding, "step_pace", lambda *_, pace=pace: pace)
        oracle_drafter(plain, right, 17)
        (request,) = run(CONFIDENT, [PROMPTS[0]], None, max_tokens=60)
        assert request.ids == plain[tuple(PROMPTS[0])]
        assert len(request.steps[-1].drafted) == wanted


def test_one_prompt_does_not_end_drafting_for_a_list(oracle_drafter: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are in use heads that have stopped cannot come back; between two prompts they can."""
    plain = {tuple(r.prompt): r.ids for r in run(CONFIDENT, PROMPTS[:3], 0, max_tokens=90)}
    pace = Pace([1.0, 1.3, 1.6, 1.9])
    monkeypatch.setattr(decoding, "step_pace", lambda *_: pace)
    bad = tuple(PROMPTS[1])
    oracle_drafter(plain | {bad: [(token + 1) % 17 for token in plain[bad]]}, 3, 17)
    requests = [Request(prompt, 90) for prompt in PROMPTS[:3]]
    for _ in decode(CONFIDENT, requests, Sampling(), None, 1):
        pass
    assert [r.ids for r in requests] == [*plain.values()]
    assert [len(r.steps[-1].drafted) for r in requests] == [3, 0, 3]


def test_a_sequential_head_may_draft_one_more_than_it_was_trained_for() -> None:
    assert len(step_pace(tiny_model(head_kind="sequential").stepper(), 1).costs) == 5
    assert len(step_pace(VAGUE.stepper(), 2).costs) == 4
    assert len(step_pace(tiny_model(n_future=1).stepper(), 1).costs) == 1


def test_drafts_must_promise_more_than_none() -> None:
    """All accepted, one draft gives twice the tokens: at a cost of 1.85 that is 8 % more."""
    for wary, best in ((WARY, 1), (WARY_OF_ROWS, 0)):
        for pace in (Pace([1.0, 1.85], wary=wary), Pace([1.0, 1.85], wary=wary).anew()):
            for _ in range(300):
                pace.record([chain(1)], [range(2)])
            assert pace.begin(1) == best
