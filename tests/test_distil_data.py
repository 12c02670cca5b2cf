"""Text that a model writes for its heads: the same however it is interrupted, and fit to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_cli import Run, run, wrong  # noqa: F401 - a fixture
from tokenizer_twins import sentencepiece

from foretoken.checkpoint import load_checkpoint, load_model, save_checkpoint
from foretoken.completion import generate
from foretoken.config import DataConfig
from foretoken.data import prepare
from foretoken.framing import framed, scored
from foretoken.recipe import load_recipe
from foretoken.sources import Document
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It writes ASCII, and ends a text after a dozen tokens or so."""
    tiny = tiny_model(vocab=260, dtype=torch.float32, peaked=False, seed=3)
    with torch.no_grad():
        tiny.embed_tokens.weight[:, 0], tiny.norm.weight[0] = 5, 1  # a feature that is always there
        tiny.lm_head.weight[:, 0] = 0
        tiny.lm_head.weight[128:, 0] = -20
        tiny.lm_head.weight[byte_tokenizer().eos_id, 0] = 0.4
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model", tiny, byte_tokenizer())


@pytest.fixture(scope="module")
def any_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes any bytes, often no UTF-8."""
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
    run(*command(model, text, tmp_path / "few.jsonl", 3))
    assert run(*command(model, text, tmp_path / "few.jsonl", 7), "--json").json["written"] == 4
    assert (tmp_path / "few.jsonl").read_text() == whole.read_text()  # nor on how many there were to be at first
    records = [json.loads(line) for line in lines]
    assert all(record["text"] == record["prompt"] + record["response"] for record in records)
    assert [record["seed"] for record in records] == list(range(7))
    assert len({record["response"] for record in records}) > 3


def test_a_response_ends_where_it_is_no_text(run: Run, any_bytes: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """And counts as cut there, so that no end is learned."""
    out = tmp_path / "own.jsonl"
    run(*command(any_bytes, text, out, 30))
    model, tokenizer = load_checkpoint(any_bytes)
    cut = 0
    for record in map(json.loads, out.read_text().splitlines()):
        ids = generate(model, tokenizer, record["prompt"], max_tokens=8, temperature=1.0, seed=record["seed"]).ids
        assert "\ufffd" not in record["text"]
        if len(record["response"].encode()) < 8 and tokenizer.eos_id not in ids:
            cut += 1
            assert record["finish_reason"] == "length"
        assert bytes(i for i in ids if i < 256).startswith(record["response"].encode())
    assert cut > 20


def test_a_response_that_the_limit_cut_teaches_no_end(run: Run, model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out, tokenizer = tmp_path / "own.jsonl", byte_tokenizer()
    run(*command(model, text, out, 40))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    ends = {record["prompt"] + record["response"]: record["finish_reason"] for record in records}
    assert set(ends.values()) == {"stop", "length"}
    config = DataConfig(
        source=(str(out),), prompt_field="prompt", response_field="response", cache_dir=str(tmp_path / "cache")
    )
    tokens = prepare(config, tokenizer, "train")
    for document in map(tokens.document, range(tokens.documents)):
        end = ends[tokenizer.decode(document.tolist())]
        assert (document[-1] == tokenizer.eos_id) == (end == "stop")


def test_a_response_is_learned_as_it_was_written(run: Run, text: Path, tmp_path: Path) -> None:  # noqa: F811
    """By a tokenizer that puts a space in front of a text, and takes it away where a text begins."""
    tokenizer = sentencepiece([text.read_text()] * 3, 300)
    tiny = tiny_model(vocab=tokenizer.vocab_size, dtype=torch.float32, peaked=False, seed=3)
    with torch.no_grad():
        tiny.embed_tokens.weight[:, 0], tiny.norm.weight[0] = 5, 1
        tiny.lm_head.weight[:, 0] = 0
        tiny.lm_head.weight[:259, 0] = -20  # writes no bytes
    save_checkpoint(tmp_path / "model", tiny, tokenizer)
    run(*command(tmp_path / "model", text, tmp_path / "own.jsonl", 12))
    spaces = 0
    for record in map(json.loads, (tmp_path / "own.jsonl").read_text().splitlines()):
        ids = generate(tiny, tokenizer, record["prompt"], max_tokens=8, temperature=1.0, seed=record["seed"]).ids
        assert record["text"] == tokenizer.decode(tokenizer.encode(record["prompt"]) + ids)
        document = Document(record["response"], "own", record["prompt"], cut=True)
        (learned,) = framed(tokenizer, [document], "<u4")
        assert tokenizer.decode(learned.ids.tolist()) == record["text"]
        assert scored(tokenizer, document)[0] == learned.ids.tolist()
        spaces += record["response"].startswith(" ")
    assert 0 < spaces < 12


def test_heads_learn_from_it(run: Run, model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "own.jsonl"
    run(*command(model, text, out, 40))
    sets = (
        f"model.start_from={model}", f'data.source=["{out}"]',
        "data.prompt_field=prompt", "data.response_field=response",
        f"data.cache_dir={tmp_path}/cache", "data.validation_fraction=0.2", "train.steps=2", "train.batch_size=4",
        "train.seq_len=192", "train.eval_windows=2", "train.precision=float32",
    )  # fmt: skip
    train(load_recipe("retrofit", sets), tmp_path / "run")
    assert load_model(tmp_path / "run", None).config.n_future == 4


def test_mistakes(run: Run, model: Path, any_bytes: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "own.jsonl"
    run(*command(model, text, out, 3))
    before = out.read_text()
    for other in (["--seed", 1], ["--temperature", 0.5], ["--max-tokens", 9], ["--dtype", "bfloat16"]):
        wrong(run(*command(model, text, out, 3, *other)), "record 1 is of other options or another model; choose")
    wrong(run(*command(any_bytes, text, out, 3)), "record 1 is of other options or another model; choose")
    assert out.read_text() == before
    for option, value, says in (
        ("--records", 0, "records = 0 must be at least 1"),
        ("--max-tokens", 0, "max_tokens = 0 must be at least 1"),
        ("--max-tokens", 200, "exceed the model's 256 positions"),
        ("--batch-size", 0, "batch_size = 0 must be at least 1"),
        ("--temperature", -1, "temperature = -1.0 must be 0 (greedy) or a positive number"),
        ("--seed", 2**63 - 20, "seed = 9223372036854775788 does not fit 64 bits"),  # of the last records
    ):
        wrong(run(*command(model, text, tmp_path / "new.jsonl", 30, option, value)), says)
        assert not (tmp_path / "new.jsonl").exists()
    out.write_text("[1]\n")
    wrong(run(*command(model, text, out, 3)), "holds something else")
    for theirs in ("my only copy", '{"a": 1}\n{"a": 2}', '{"pro'[:4] + "x"):
        out.write_text(theirs)
        assert run(*command(model, text, out, 3)).code == 2
        assert out.read_text() == theirs
    short = tmp_path / "short.txt"
    short.write_text("too short")
    wrong(run(*command(model, short, tmp_path / "new.jsonl", 3)), "no text of more than 512 characters")
