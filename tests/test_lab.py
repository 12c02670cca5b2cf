"""The experiments run from end to end, at a size of seconds, and the docs show what is stored."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from small_runs import write_corpus

from foretoken import demo
from foretoken.config import Recipe
from foretoken.display import Display
from foretoken.lab import acceptance, draft_vocab, head_kinds, retrofit
from foretoken.recipe import load_recipe
from foretoken.sources import Document
from foretoken.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[1]


def stored() -> dict[str, object]:
    text = (resources.files("foretoken.lab") / head_kinds.RESULT).read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def test_docs_hold_the_table_of_the_stored_result() -> None:
    page = (ROOT / "docs" / "head-kinds.md").read_text(encoding="utf-8")
    assert head_kinds.tables(stored()) in page


def test_the_demo_trains_what_was_compared() -> None:
    for kind, arm in (("parallel", "parallel"), ("sequential", "distilled")):
        compared = head_kinds.arm_recipe(arm, 0, 1)
        trained = demo._recipe(4, compared.model.hidden_size, compared.model.num_hidden_layers, 0, kind)
        assert (trained.model, trained.loss, trained.optim) == (compared.model, compared.loss, compared.optim)


def test_head_kinds_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path)
    for i in range(24):
        (corpus / "text" / f"more_{i}.py").write_text(f"def more_{i}(x):\n    return x * {i}\n" * 40)

    def small(arm: str, seed: int, steps: int) -> Recipe:
        more = (
            f'data.source=["{corpus}/text"]', f"data.cache_dir={corpus}/cache", "data.validation_fraction=0.4",
            "model.hidden_size=32", "model.num_attention_heads=2", "model.num_hidden_layers=3", "train.batch_size=1",
            "train.seq_len=200", "train.eval_windows=2", "train.eval_every=0", f"train.seed={seed}",
            f"train.steps={min(steps, 5)}",
        )  # fmt: skip
        return load_recipe("demo", (*head_kinds.ARMS[arm], *more))

    monkeypatch.setattr(head_kinds, "arm_recipe", small)
    monkeypatch.setattr(head_kinds, "PROBE_ROUNDS", 1)
    monkeypatch.setattr(head_kinds, "MAX_TOKENS", 8)
    monkeypatch.setattr(head_kinds, "PROMPTS", 2)
    out = tmp_path / "runs"
    with Display(quiet_text=True) as display:
        for _ in range(2):  # the second time everything is there
            head_kinds.train_all(out, tuple(head_kinds.ARMS), [0.01], [0, 1], display)
            result = head_kinds.report(out, [0.01], [0, 1], display)
    arms = result["budgets"]["0.01"]
    assert {arm: sorted(values["seeds"]) for arm, values in arms.items()} == {arm: [0, 1] for arm in head_kinds.ARMS}
    assert set(arms["sequential"]["along_text"]) == {"3", "4", "5"}
    keyed = {*(f"{k} drafts" for k in (3, 4, 5)), "4 drafts, tree of 8", "as many drafts as pay"}
    for mode in ("compiled", "pytorch"):
        values = arms["sequential"][mode]
        assert set(values["greedy"]) == {*keyed, "best"}
        assert set(values["sampled"]) == {*keyed, *(f"{k} drafts, rejection" for k in (3, 4)), "best"}
        assert all(values[name][way]["outputs_equal"] for name in ("greedy", "sampled") for way in keyed)
    learnt, decoded = (table.splitlines() for table in head_kinds.tables(result).split("\n\n"))
    assert len(learnt) == 2 + 4
    assert len(decoded) == 2 + 2 * (3 + 7 + 7)
    assert all(len({row.count("|") for row in rows}) == 1 for rows in (learnt, decoded))
    assert "Measuring" in capsys.readouterr().err
    assert set(arms["parallel"]) == set(stored()["budgets"]["3"]["parallel"])  # type: ignore[index]


def test_acceptance_of_three_rules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "evaluation_documents", lambda folder: [Document("x = 1\n" * 200, "here")])
    monkeypatch.setattr(acceptance, "load_checkpoint", lambda folder, dtype: (tiny_model(vocab=260), byte_tokenizer()))
    monkeypatch.setattr(acceptance, "PROMPTS", 2)
    monkeypatch.setattr(acceptance, "MAX_TOKENS", 20)
    with Display(quiet_text=True) as display:
        result = acceptance.compare([Path("a"), Path("b")], display)
    assert set(result["models"]) == {"a", "b"}
    for values in result["models"].values():
        assert all(row["outputs_equal"] for row in values["rows"].values())
        assert all(1 <= row[rule] <= 4 for row in values["rows"].values() for rule in acceptance.RULES)
    assert len(acceptance.table(result).splitlines()) == 2 + 2 * 3


def test_retrofit_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All arms at a size of seconds; a second call finds them there."""
    corpus = write_corpus(tmp_path)
    for i in range(24):
        (corpus / "text" / f"more_{i}.py").write_text(f"def more_{i}(x):\n    return x * {i}\n" * 40)
    real = load_recipe

    def small(name: str, overrides: tuple[str, ...]) -> Recipe:
        shape = ("model.hidden_size=32", "model.num_attention_heads=2", "model.num_hidden_layers=3")
        less = ("train.batch_size=1", "train.seq_len=200", "train.eval_windows=2", "data.validation_fraction=0.4")
        more = (f"data.cache_dir={corpus}/cache", "train.precision=float32", *less)
        return real(name, (*overrides, *more, *(shape if name == "demo" else ())))

    monkeypatch.setattr(retrofit, "load_recipe", small)
    sizes = {"RESPONSE": 8, "TIMED": 5, "SAMPLES_TIMED": 24, "MAX_TOKENS": 8, "PROMPTS": 2, "SCORED_BYTES": 600}
    for name, value in sizes.items():
        monkeypatch.setattr(retrofit, name, value)
    monkeypatch.setattr(head_kinds, "step_seconds", lambda recipe: [1.0] * 5)
    command = ["--data", f"{corpus}/text", "--out", str(tmp_path / "runs"), "--minutes", "0.1", "0.05"]
    command += ["--seeds", "0", "1", "--records", "40", "--result", str(tmp_path / "result.json")]
    retrofit.main(command)
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert retrofit.table(result["arms"]) in shown
    assert set(result["arms"]) == set(retrofit.ARMS)
    for arm, values in result["arms"].items():
        assert values["bits_per_byte"]["min"] > 0
        assert arm == "base" or (values["outputs_equal"] and 1 <= values["greedy"]["mean"] <= 4)
        same = arm in ("base", *retrofit.ADDED)  # frozen: the next-token path is the base's
        assert (values["bits_per_byte"] == result["arms"]["base"]["bits_per_byte"]) == same
    monkeypatch.setattr(retrofit, "train", None)
    retrofit.main(command)
    assert capsys.readouterr().out == shown


def test_vocabularies_of_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"split": "train" if i % 4 else "validation", "text": f"x_{i} = {i}\n" * 9}) for i in range(40)]
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    document = Document("x = 1\n" * 200, "here")
    monkeypatch.setattr(draft_vocab, "evaluation_documents", lambda folder: [document])
    monkeypatch.setattr(draft_vocab, "load_checkpoint", lambda folder: (tiny_model(vocab=260), byte_tokenizer()))
    for name, value in (("PROMPTS", 2), ("MAX_TOKENS", 20), ("SIZES", (32, 100, 270, 9999))):
        monkeypatch.setattr(draft_vocab, name, value)
    command = ["a", "--data", str(tmp_path / "code.jsonl"), "--split-field", "split", "--vocab-size", "290"]
    draft_vocab.main([*command, "--out", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    shares, within = (result["data"]["code.jsonl"][name] for name in ("shares", "shares_of_foretold"))
    assert list(within) == list(shares)
    assert 0 < result["data"]["code.jsonl"]["foretold"] < 1
    assert list(shares) == ["32", "100", "270"]
    assert 0 < shares["32"] < shares["100"] < shares["270"] <= 1
    model = result["models"]["a"]
    assert model["shares"] == pytest.approx({"32": 1 / 6, "100": 5 / 6})  # of "x = 1" all but the x, and the line's end
    assert set(model["greedy"]) == set(model["sampled"]) == {"32", "100", "260"}
    assert all(1 <= value <= 4 for how in ("greedy", "sampled") for value in model[how].values())
    assert draft_vocab.table(result) in capsys.readouterr().out


def test_the_log_holds_the_stored_vocabularies() -> None:
    result = json.loads((ROOT / "docs" / "results" / "draft-vocab.json").read_text(encoding="utf-8"))
    assert draft_vocab.table(result) in (ROOT / "docs" / "log.md").read_text(encoding="utf-8")


def test_what_two_tokens_foretell() -> None:
    """The follower of a pair that was most frequent; nothing for a pair that was not there."""
    train, held = np.array([1, 2, 3, 1, 2, 4, 1, 2, 3]), np.array([1, 2, 3, 1, 2, 4, 4, 4, 1, 2, 3])
    # (1 2) -> 3 and not 4; (2 4) -> 1; (4 4) was not there
    assert draft_vocab.foretold(train, held, 10).tolist() == [3, 1, 2, 2, 3]
