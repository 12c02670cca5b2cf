"""The experiments: their data and measures against oracles, every one from end to end at its smoke size."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from scipy import stats
from small_runs import write_corpus
from test_readme import run as run_command
from torch import Tensor

from foretoken.config import OptimConfig
from foretoken.errors import ConfigError, TrainingError
from foretoken.kernels import library
from foretoken.lab import arithmetic, cli, experiment, fit, heads, induction, information, intervals, nth_token, star
from foretoken.lab.experiment import EXPERIMENTS, find, page, run_experiment, settings_of, with_summary
from foretoken.lab.story import ENDINGS, HELD_OUT, MADE_UP, NAMES, ONSETS, story, two_names
from foretoken.request import Request
from foretoken.tokenizer import train_bpe

ROOT = Path(__file__).parents[1]


# Intervals.


@pytest.mark.parametrize("count", [2, 3, 5, 20, 31, 40, 200])
def test_mean_has_students_interval(count: int) -> None:
    values = [math.sin(7.0 * i) for i in range(count)]
    low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert intervals.mean(values) == pytest.approx((sum(values) / count, low, high), rel=2e-3, abs=2e-4)
    assert intervals.difference(values, values) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("successes", "count"), [(0, 20), (20, 20), (7, 20), (1, 3)])
def test_rate_has_wilsons_interval(successes: int, count: int) -> None:
    wanted = stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert intervals.rate(successes, count) == pytest.approx((successes / count, wanted.low, wanted.high), abs=1e-6)


# Star graphs.

SHAPE = {"arms": 3, "length": 4, "labels": 20}


def read_graph(row: list[int], shape: dict[str, int]) -> tuple[dict[int, int], list[int], list[int]]:
    """Edges by their outer end, the question and the path of a sequence, which must be written as it should be."""
    labels, edges = shape["labels"], shape["arms"] * (shape["length"] - 1)
    parents = {}
    for index in range(edges):
        a, b = row[2 * index : 2 * index + 2]
        assert b not in parents
        parents[b] = a
    slash, start, goal, equals = row[2 * edges : 2 * edges + 4]
    assert (slash, equals) == (labels, labels + 1)
    return parents, [start, goal], row[2 * edges + 4 :]


def test_star_graphs_are_stars_and_paths_lead_to_the_goal() -> None:
    firsts = set()
    for row in star.problems(SHAPE, 50, seed=3, held_out=False).tolist():
        parents, (start, goal), path = read_graph(row, SHAPE)
        assert len(path) == SHAPE["length"]
        assert path[0] == start
        assert path[-1] == goal
        assert all(parents[b] == a for a, b in itertools.pairwise(path))
        children = [a for a in parents.values()]
        assert children.count(start) == SHAPE["arms"]
        assert all(children.count(node) <= 1 for node in parents)
        assert start not in parents
        firsts.add([b for b in parents if parents[b] == start].index(path[1]))
    assert firsts == {0, 1, 2}  # the goal's arm is in no fixed place


def test_held_out_graphs_are_so_in_any_order() -> None:
    names = torch.rand(500, 20, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :10]
    centre, rest = names[:, :1], names[:, 1:].view(500, 3, 3)
    held = star._held_out(centre, rest)
    assert torch.equal(held, star._held_out(centre, rest[:, [0, 2, 1]]))
    assert 0.06 < held.float().mean() < 0.2
    assert not torch.equal(held, star._held_out(centre, rest[:, [1, 0, 2]]))  # another goal is another problem
    for part in (False, True):
        first, second = (star.problems(SHAPE, 40, seed, held_out=part) for seed in (1, 1))
        assert torch.equal(first, second)
        for row in first.tolist():
            parents, (start, goal), _ = read_graph(row, SHAPE)
            arms = []
            for end in sorted(set(parents) - set(parents.values()), key=lambda node: node != goal):
                arm = [end]
                while parents[arm[-1]] != start:
                    arm.append(parents[arm[-1]])
                arms.append(arm[::-1])
            assert bool(star._held_out(torch.tensor([[start]]), torch.tensor([arms]))) == part


# The loop.


def windows(step: int) -> fit.Sample:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 17, (4, 9), generator=generator)
    return fit.whole_sequences(tokens, torch.arange(9).expand(4, -1) >= 5, 3)


def test_fit_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def check(step: int) -> dict[str, Any]:
        if stop and step == 6:
            raise KeyboardInterrupt
        return {"seen": step}

    config = OptimConfig(name="muon", lr=1e-3, warmup_steps=2)
    models = [tiny_model(n_future=3, dtype=torch.float32, peaked=False) for _ in range(2)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    stop = False
    whole = fit.fit(models[0], windows, 10, config, tmp_path / "whole", check=check, check_every=3, save_every=4)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        fit.fit(models[1], windows, 10, config, tmp_path / "parts", check=check, check_every=3, save_every=4)
    stop = False
    fresh = tiny_model(n_future=3, dtype=torch.float32, peaked=False, seed=9)
    for _ in range(2):  # the second time nothing is left to do
        parts = fit.fit(fresh, windows, 10, config, tmp_path / "parts", check=check, check_every=3, save_every=4)
        assert parts == whole
        for name, value in models[0].state_dict().items():
            assert torch.equal(value, fresh.state_dict()[name]), name
    assert [h["seen"] for h in whole] == [3, 6, 9, 10]
    assert len(whole[0]["losses"]) == 3


def test_batches_that_other_processes_make_are_the_same() -> None:
    """They are for a GPU; a run that goes on begins in the middle."""

    def sample(step: int) -> fit.Sample:
        return (torch.tensor([[step]]), torch.zeros(1, 1), torch.ones(1, 1))

    made = list(fit.batches(sample, range(3, 20), torch.device("cuda")))
    assert [int(tokens) for tokens, _, _ in made] == [*range(3, 20)]
    assert not list(fit.batches(sample, range(0), torch.device("cuda")))


def test_with_one_head_the_loop_is_ordinary_training(tmp_path: Path) -> None:
    """Cross-entropy of the next token in a plain loop, with torch's own AdamW: what n is compared with is no bug."""
    given, plain = (tiny_model(n_future=1, dtype=torch.float32, peaked=False) for _ in range(2))
    settings = {"lr": 3e-3, "weight_decay": 0.0, "warmup_steps": 0, "final_lr_ratio": 1.0}
    config = OptimConfig(name="adamw", **settings)
    is_target = torch.arange(12).expand(8, -1) >= 4

    def tokens_of(step: int) -> Tensor:
        return torch.randint(0, 17, (8, 12), generator=torch.Generator().manual_seed(step))

    def sample(step: int) -> fit.Sample:
        return fit.whole_sequences(tokens_of(step), is_target, 1)

    history = fit.fit(given, sample, 12, config, tmp_path, check=lambda step: {}, check_every=1)
    adam = torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=config.betas, eps=config.eps, weight_decay=0.0)
    for step in range(12):
        tokens = tokens_of(step)
        x = plain.embed_tokens(tokens[:, :-1])
        for block in (*plain.trunk, *plain.heads):
            x = block(x, plain.context(11))
        logits = F.linear(plain.norm(x), plain.lm_head.weight)
        loss = F.cross_entropy(logits[is_target[:, 1:]], tokens[:, 1:][is_target[:, 1:]])
        assert history[step]["losses"] == [pytest.approx(loss.item(), rel=1e-5)]
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.clip)
        adam.step()
    for (name, a), b in zip(given.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name


def test_fit_learns_the_targets_alone(tmp_path: Path) -> None:
    """Windows whose marked tokens are all 5 are learnt; the loss ends early where that is enough."""

    def sample(step: int) -> fit.Sample:
        tokens, documents, mask = windows(step)
        return torch.where(mask, 5, tokens), documents, mask

    model = tiny_model(n_future=3, dtype=torch.float32, peaked=False)
    history = fit.fit(
        model, sample, 60, OptimConfig(lr=1e-2, warmup_steps=2), tmp_path, check=lambda step: {}, check_every=10,
        enough=lambda figures: max(figures["losses"]) < 0.05,
    )  # fmt: skip
    assert history[-1]["step"] < 60
    assert all(loss < 0.05 for loss in history[-1]["losses"])


def test_answers_by_decoding_are_those_by_scoring() -> None:
    model = tiny_model(vocab=5, dtype=torch.float32)
    tokens = torch.randint(0, 5, (60, 8), generator=torch.Generator().manual_seed(0))
    is_target = torch.zeros(60, 8, dtype=torch.bool)
    is_target[:30, 5:7], is_target[30:, 3:4] = True, True
    found = fit.answered_by_decoding(model, tokens, is_target)
    assert 0 < int(found.sum()) < 60
    tokens[:, 7] = 0  # what stands behind the answer changes nothing
    assert torch.equal(found, fit.answered(model, tokens, is_target))


def test_answers_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "answered", lambda model, tokens, is_target: torch.ones(len(tokens), dtype=torch.bool))
    tokens = torch.randint(0, 17, (20, 6), generator=torch.Generator().manual_seed(0))
    model, is_target = tiny_model(dtype=torch.float32), torch.arange(6).expand(20, -1) >= 3
    with pytest.raises(TrainingError, match="decoding and scoring do not give the same answers"):
        fit.answered_by_decoding(model, tokens, is_target)

    def wrong(model: object, requests: list[Request], sampling: object, drafts: int, slots: int) -> list[None]:
        for request in requests:
            request.ids = [] if drafts else request.prompt
        return []

    monkeypatch.setattr(fit, "decode", wrong)
    answers = torch.cat((tokens[:, :3], tokens[:, :3]), 1)  # without drafts right, with drafts wrong
    with pytest.raises(TrainingError, match="drafts changed"):
        fit.answered_by_decoding(model, answers, is_target)


# Arithmetic.


def value_of(signs: list[Any], p: int, d: int) -> list[int]:
    """An expression's value by another way: polynomials as functions, powers summed, nothing cut off on the way."""

    def product(a: list[int], b: list[int]) -> list[int]:
        found = [0] * (len(a) + len(b) - 1)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                found[i + j] += x * y
        return found

    def plus(a: list[int], b: list[int]) -> list[int]:
        size = max(len(a), len(b))
        return [(a[i] if i < len(a) else 0) + (b[i] if i < len(b) else 0) for i in range(size)]

    def read(at: int) -> tuple[list[int], int]:
        if signs[at] != "(":
            return list(signs[at : at + d]), at + d
        if signs[at + 1] == "-":
            inner, at = read(at + 2)
            assert signs[at] == ")"
            return [-x % p for x in inner], at + 1
        left, at = read(at + 1)
        operator = signs[at]
        right, at = read(at + 1)
        assert signs[at] == ")"
        if operator == "o":
            found, power = [0], [1]
            for coefficient in left:
                found = plus(found, [coefficient * x for x in power])
                power = product(power, right)
        else:
            found = plus(left, right) if operator == "+" else product(left, right)
        return [x % p for x in found][:d], at + 1

    value, end = read(0)
    assert end == len(signs)
    return value


@pytest.mark.parametrize(("p", "d"), [(7, 5), (7, 2), (3, 1)])
def test_expressions_have_their_value(p: int, d: int) -> None:
    rng, seen = random.Random(0), set()
    for index in range(150):
        m = index % 6
        signs, value = arithmetic.expression(m, p, d, rng)
        assert list(value) == value_of(signs, p, d)
        assert sum(sign in arithmetic.OPERATORS for sign in signs) == m
        seen |= {sign for sign in signs if sign in arithmetic.OPERATORS}
    assert seen == set(arithmetic.OPERATORS)


def test_arithmetic_problems_end_in_their_answers() -> None:
    s = {"p": 7, "d": 3, "pauses": 2}
    ids = arithmetic.vocabulary(7)
    signs = {index: sign for sign, index in ids.items()}
    tokens, is_target = arithmetic.problems([1, 4, 2] * 20, s, 5, held_out=True)
    assert tokens.size(1) <= arithmetic.longest(4, s)
    for row, wanted in zip(tokens.tolist(), is_target.tolist(), strict=True):
        start = wanted.index(True)
        assert sum(wanted) == 3
        text = [signs[token] for token in row]
        assert text[start - 3 : start] == [".", ".", "="]
        assert text[start : start + 3] == value_of(text[: start - 3], 7, 3)
        assert set(text[start + 3 :]) <= {"pad"}
    trained, _ = arithmetic.problems([1] * 300, s, 5, held_out=False)
    held_out, _ = arithmetic.problems([1] * 300, s, 6, held_out=True)
    rows = [{tuple(t for t in row if t != ids["pad"]) for row in part.tolist()} for part in (trained, held_out)]
    assert not rows[0] & rows[1]


# Information.


@torch.no_grad()
def test_tables_are_the_models_own_law() -> None:
    model = tiny_model(n_future=2, vocab=7)
    prefix = torch.tensor([[3, 1, 4, 1, 5]])
    joint, second = information.table_of(model, prefix)
    assert float(joint.sum()) == pytest.approx(1.0)
    for x in range(7):
        laws = model.logits(model(torch.cat((prefix, torch.tensor([[x]])), 1))[0][0, -2:]).softmax(-1)
        torch.testing.assert_close(joint[x], laws[0, x] * laws[1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(second, model.logits(model(prefix)[1][0, -1]).softmax(-1).double())


def test_loss_around_choice_points() -> None:
    """One uncertain token in twenty, whose loss is 3, and 2 for a head that reads before it and predicts behind it."""
    n, T = 2, 101
    nats, entropy = torch.ones(1, n, T), torch.zeros(1, T)
    points = torch.arange(10, 90, 20)
    entropy[0, points] = 1.0
    nats[0, 0, points] = 3.0  # head 1 at position t predicts token t + 1, the point
    nats[0, 1, points - 1] = 3.0  # head 2 predicts it one position earlier
    nats[0, 1, points] = 2.0  # and from the point's own position the token behind it
    found = information.choice_points(nats, entropy, len(points) / T)
    known = T - 1  # the first token has no head 2
    total = 2 * known + len(points) * (2 + 2 + 1)
    assert found["crossing"]["high"]["loss"] == pytest.approx(len(points) * (3 + 3 + 2) / total)
    assert found["crossing"]["high"]["terms"] == pytest.approx(len(points) * 3 / (2 * known))
    average = total / known
    profile = found["profile"][information.BEFORE :]
    assert profile[:3] == pytest.approx([6 / average, 3 / average, 2 / average])
    assert found["profile"][information.BEFORE - 1] == pytest.approx(2 / average)


def test_loss_of_equal_tokens_has_no_choice_points() -> None:
    nats, entropy = torch.ones(2, 4, 60), torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    found = information.choice_points(nats, entropy, 0.1)
    assert found["profile"] == pytest.approx([1.0] * len(found["profile"]))
    assert found["crossing"]["high"]["loss"] == pytest.approx(found["crossing"]["high"]["terms"])


# Induction.


def test_named_stories_score_second_tokens_from_the_second_mention_on() -> None:
    rng = random.Random(0)
    tokenizer = train_bpe((story(rng, two_names(rng, 0.3)) for _ in range(150)), 1000)
    pairs = set(induction.two_token_names(tokenizer))
    assert len(pairs) > 40
    tokens, scored = induction.named_stories(tokenizer, 6, 128)
    for row, wanted in zip(tokens.tolist(), scored.tolist(), strict=True):
        places = [at for at, is_scored in enumerate(wanted) if is_scored]
        assert len(places) > 4
        for at in places:
            pair = (row[at - 1], row[at])
            assert pair in pairs
            earlier = [i for i in range(at - 2) if (row[i], row[i + 1]) == pair]
            assert earlier, "a first mention is not scored"
            name = tokenizer.decode(list(pair))
            assert name[0] == " "
            assert name[1].isupper()
            assert tokenizer.encode(name) == list(pair)


def test_names_of_the_test_are_new_but_their_syllables_are_not() -> None:
    rng = random.Random(0)
    learnt = {name for _ in range(20_000) for name in two_names(rng, 0.3)}
    assert learnt == {*NAMES, *MADE_UP}
    assert not learnt & set(HELD_OUT)
    assert {*MADE_UP, *HELD_OUT} == {onset + ending for onset in ONSETS for ending in ENDINGS}
    for part in (MADE_UP, HELD_OUT):
        assert {onset for onset in ONSETS if any(name.startswith(onset) for name in part)} == set(ONSETS)
        assert {ending for ending in ENDINGS if any(name.endswith(ending) for name in part)} == set(ENDINGS)


# From end to end.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some small files with enough text held out."""
    corpus = write_corpus(tmp_path_factory.mktemp("lab"))
    for i in range(30):
        (corpus / "text" / f"more_{i}.py").write_text(f"def more_{i}(x):\n    return x * {i}\n" * 40)
    library()  # compiled before the tests' own cache hides the one that is there
    return corpus


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_at_smoke_size_and_reports(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
    given = f" --data {text / 'text'}" if find(name).sizes["smoke"].get("data") else ""
    run_command(f"foretoken lab run {name} --size smoke{given} --json")
    out = json.loads(capsys.readouterr().out)
    assert out[name]["verdict"]
    found = json.loads((tmp_path / "runs" / "lab" / f"{name}-smoke" / "result.json").read_text())
    assert {len(runs) for runs in found["runs"].values()} == {found["settings"]["seeds"]}
    broken = replace(find(name), run=lambda run: pytest.fail("what is done is done again"), measure=None)
    settings = settings_of(find(name), "smoke", None, [str(text / "text")] if given else ())
    again = run_experiment(broken, "smoke", settings, tmp_path / "runs" / "lab" / f"{name}-smoke", 1, lambda text: None)
    assert json.dumps(again["runs"]) == json.dumps(found["runs"])
    run_command(f"foretoken lab report {name}")
    results = tmp_path / "docs" / "results"
    written = (results / f"{name}.md").read_text()
    assert f"foretoken lab run {name} --size smoke" in written
    assert "**Verdict.**" in written
    for table in find(name).tables(with_summary(found)):
        assert {len(table.head)} == {len(row) for row in table.rows}
        assert table.markdown() in written
    drawn = (results / f"{name}.svg").read_bytes()
    run_command(f"foretoken lab report {name} --runs nowhere")  # from the JSON alone: the same
    assert (results / f"{name}.md").read_text() == written
    assert (results / f"{name}.svg").read_bytes() == drawn


def test_stored_pages_are_those_of_their_results() -> None:
    for path in (ROOT / "docs" / "results").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if "experiment" in found:
            assert path.with_suffix(".md").read_text(encoding="utf-8") == page(found)
            assert path.with_suffix(".svg").exists()
            assert find(found["experiment"]).summarise(found)["verdict"] == found["summary"]["verdict"]


def test_runs_in_several_processes_are_the_same(tmp_path: Path) -> None:
    settings = settings_of(star.EXPERIMENT, "smoke", 1)
    settings["arms"] = settings["arms"][:2]
    one, two = (
        run_experiment(star.EXPERIMENT, "smoke", settings, tmp_path / str(n), n, lambda text: None) for n in (1, 2)
    )
    for arm, runs in one["runs"].items():
        assert [r["losses"] for r in runs] == [r["losses"] for r in two["runs"][arm]]


def test_every_size_has_what_it_needs() -> None:
    for name in EXPERIMENTS:
        found = find(name)
        assert found.name == name
        assert set(found.sizes) == set(experiment.SIZES)
        for size in found.sizes:
            settings = settings_of(found, size, None)
            assert settings["arms"]
            assert settings["seeds"] >= 1
            assert json.loads(json.dumps(settings)) == settings  # JSON values: they are compared with stored ones


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no experiment 'stars': there are star, heads"):
        find("stars")
    with pytest.raises(ConfigError, match="size huge: must be one of smoke, cpu, gpu"):
        settings_of(star.EXPERIMENT, "huge", None)
    with pytest.raises(ConfigError, match="seeds = 0"):
        settings_of(star.EXPERIMENT, "smoke", 0)
    with pytest.raises(ConfigError, match="star makes its own data"):
        settings_of(star.EXPERIMENT, "smoke", None, ["text"])
    quick = replace(star.EXPERIMENT, run=lambda run: {"steps_to_solve": None, "solved": 0.0})
    settings = settings_of(quick, "smoke", 1)
    run_experiment(quick, "smoke", settings, tmp_path, 1, lambda text: None)
    run_experiment(quick, "smoke", {**settings, "seeds": 2}, tmp_path, 1, lambda text: None)
    with pytest.raises(ConfigError, match="holds runs with another lr"):
        run_experiment(quick, "smoke", {**settings, "lr": 1.0}, tmp_path, 1, lambda text: None)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="the size gpu needs a GPU"):
            run_experiment(quick, "gpu", settings, tmp_path, 1, lambda text: None)


@pytest.mark.parametrize("name", ["information", "star", "all"])
def test_a_field_of_no_data_is_a_mistake(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first of all experiments runs."""
    monkeypatch.setattr(experiment, "run_experiment", None)
    with pytest.raises(ConfigError, match="--split-field split is of the records of --data: name them, or leave it"):
        cli.run(name, size="smoke", split_field="split", out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nth-token", "star"])
def test_a_killed_run_goes_on(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between what an experiment saves, a second call ends with the figures of one that was never stopped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
    found = find(name)
    settings = settings_of(found, "smoke", 1, [str(text / "text")] if name == "nth-token" else ())
    settings["arms"] = [settings["arms"][0], settings["arms"][-1]]
    whole = run_experiment(found, "smoke", settings, tmp_path / "whole", 1, lambda text: None)
    module: Any = nth_token if name == "nth-token" else star
    at = "forget_head_1" if name == "nth-token" else "answered_by_decoding"
    real: Callable[..., Any] = getattr(module, at)

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, at, stopped)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(found, "smoke", settings, tmp_path / "parts", 1, lambda text: None)
    monkeypatch.setattr(module, at, real)
    parts = run_experiment(found, "smoke", settings, tmp_path / "parts", 1, lambda text: None)
    for arm, runs in whole["runs"].items():
        for a, b in zip(runs, parts["runs"][arm], strict=True):
            assert {k: v for k, v in a.items() if "seconds" not in k} == {
                k: v for k, v in b.items() if "seconds" not in k
            }


def test_heads_know_every_domain() -> None:
    settings = settings_of(heads.EXPERIMENT, "cpu", None, ["stdlib", "../data/novels.jsonl.gz"], "split")
    assert len(settings["arms"]) == 2 * 2 * len(heads.KINDS)
    assert "novels-bpe-parallel" in settings["arms"]
