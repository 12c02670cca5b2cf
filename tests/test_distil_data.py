"""Text that a model writes for its heads: the same however it is interrupted, and fit to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_model
from test_cli import Run, run, wrong  # noqa: F401 - a fixture

from foretoken.checkpoint import load_model, save_checkpoint
from foretoken.recipe import load_recipe
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    tiny = tiny_model(vocab=260, dtype=torch.float32, peaked=False, seed=3)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model", tiny, byte_tokenizer())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {i} of a text that goes on\n" for i in range(60)))
    return file


def command(model: Path, text: Path, out: Path, records: int, *more: object) -> list[object]:
    return ["distil-data", model, "--data", text, "--out", out, "--records", records, "--max-tokens", 8, *more]


def test_interrupted_it_is_the_same_file(run: Run, model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert run(*command(model, text, whole, 7), "--json").json == {"out": str(whole), "records": 7, "written": 7}
    run(*command(model, text, parts, 7, "--batch-size", 2))
    assert parts.read_text() == whole.read_text()  # nor does it depend on the batch
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    assert run(*command(model, text, parts, 7), "--json").json["written"] == 4
    assert parts.read_text() == whole.read_text()
    assert run(*command(model, text, parts, 7), "--json").json["written"] == 0
    records = [json.loads(line) for line in lines]
    assert all(record["text"] == record["prompt"] + record["response"] for record in records)
    assert [record["seed"] for record in records] == list(range(7))
    assert len({record["response"] for record in records}) > 3


def test_heads_learn_from_it(run: Run, model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "own.jsonl"
    run(*command(model, text, out, 40))
    sets = (
        f"model.start_from={model}", f'data.source=["{out}"]',
        "data.prompt_field=prompt", "data.response_field=response",
        f"data.cache_dir={tmp_path}/cache", "data.validation_fraction=0.2", "train.steps=2", "train.batch_size=2",
        "train.seq_len=32", "train.eval_windows=2", "train.precision=float32",
    )  # fmt: skip
    train(load_recipe("retrofit", sets), tmp_path / "run")
    assert load_model(tmp_path / "run", None).config.n_future == 4


def test_mistakes(run: Run, model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "own.jsonl"
    run(*command(model, text, out, 3))
    wrong(run(*command(model, text, out, 3, "--seed", 1)), "record 1 was made with other options")
    wrong(run(*command(model, text, out, 0)), "records = 0 must be at least 1")
    out.write_text("[1]\n")
    wrong(run(*command(model, text, out, 3)), "holds something else")
    for theirs in ("my only copy", '{"a": 1}\n{"a": 2}', '{"pro'[:4] + "x"):
        out.write_text(theirs)
        assert run(*command(model, text, out, 3)).code == 2
        assert out.read_text() == theirs
    short = tmp_path / "short.txt"
    short.write_text("too short")
    wrong(run(*command(model, short, tmp_path / "new.jsonl", 3)), "no text of more than 512 characters")
