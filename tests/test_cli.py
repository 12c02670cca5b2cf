"""The command line: what it prints, for people and for programs, and what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from small_runs import content, overrides, write_corpus

from foretoken import checkpoint, cli, completion, metrics, optim, train_state
from foretoken.checkpoint import load_checkpoint, save_checkpoint
from foretoken.cli_common import print_json
from foretoken.formats import safetensors
from foretoken.tokenizer import train_bpe

COMMANDS = ("demo", "train", "generate", "evaluate", "info", "train-tokenizer")
PROGRAM = [sys.executable, "-c", "from foretoken.cli import main; main()"]


@dataclass
class Done:
    code: int
    out: str
    errors: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that is all of standard output."""
        assert self.code == 0, self.errors
        assert self.out.endswith("\n")
        return json.loads(self.out)  # type: ignore[no-any-return]


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs `foretoken` in this process."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["foretoken", *map(str, words)])
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, errors = capsysbinary.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out.decode(), errors.decode())

    return call


def sets(corpus: Path, *more: str) -> list[str]:
    return [word for override in overrides(corpus, *more) for word in ("--set", override)]


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three heads and 256 positions. Read only."""
    from foretoken.recipe import load_recipe
    from foretoken.train import train

    folder = tmp_path_factory.mktemp("cli") / "model"
    more = ("train.steps=30", "model.max_position_embeddings=256")
    train(load_recipe("tiny", overrides(corpus, *more)), folder)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of `model` to damage."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


# Help.


def test_help_is_quick_and_imports_no_torch() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0
        assert all(command in done.stdout for command in COMMANDS)
    assert min(seconds) < 0.5
    loaded = (
        "import sys, foretoken.cli; print(*(m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    text = " ".join(done.out.split())
    assert done.code == 0
    assert f"Example: foretoken {command} " in text
    assert "--json" in text


def test_nothing_asked_is_help(run: Run) -> None:
    done = run()
    assert done.code == 0
    assert "Usage: foretoken" in done.out


# JSON: one object, these keys.


def test_generate_json(run: Run, model: Path) -> None:
    values = run("generate", model, "def add", "--max-tokens", "20", "--json").json
    assert values.keys() == {"text", "ids", "logprobs", "finish_reason", "tokens_per_step", "steps", "seed"}
    assert len(values["ids"]) == len(values["logprobs"]) == 20
    assert bytes(values["ids"]).decode() == values["text"]
    assert values["finish_reason"] == "length"
    assert all(step.keys() == {"drafted", "accepted", "committed"} for step in values["steps"])
    assert values["tokens_per_step"] == pytest.approx(19 / len(values["steps"]))


def test_evaluate_json(run: Run, model: Path, corpus: Path, tmp_path: Path) -> None:
    values = run("evaluate", model, corpus / "text", "--json").json
    assert values.keys() == {"documents", "bytes", "heads", "predicted_tokens_per_step", "domains"}
    assert [head["offset"] for head in values["heads"]] == [1, 2, 3]
    for head in values["heads"]:
        assert head.keys() == {"offset", "bits_per_byte", "interval", "loss", "top1", "agreement", "count"}
    assert (values["documents"], values["domains"]) == (12, {})
    records = [{"text": "def add(x)", "kind": kind, "split": "test"} for kind in "aab"]
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = run("evaluate", model, data, "--domain-field", "kind", "--split-field", "split", "--json").json
    assert {name: part["documents"] for name, part in values["domains"].items()} == {"a": 2, "b": 1}


def test_evaluate_without_data_takes_what_training_held_out(run: Run, model: Path) -> None:
    held_out, everything = (
        run("evaluate", model, "--json").json,
        run("evaluate", model, "--split", "all", "--json").json,
    )
    assert 0 < held_out["bytes"] < 0.5 * everything["bytes"]


def test_fields_of_what_has_none_are_wrong(run: Run, model: Path, corpus: Path, tmp_path: Path) -> None:
    """Text files, those of the run's own data or others; beside records they are read as they are."""
    says = ("messages_field = messages: ", "/text holds text alone, which has no fields; leave that out")
    wrong(run("evaluate", model, "--messages-field", "messages"), *says)
    wrong(run("evaluate", model, corpus / "text", "--split", "all", "--messages-field", "messages"), *says)
    both = run("evaluate", model, "--text-field", "a", "--domain-field", "b")
    wrong(both, "text_field = a and domain_field = b: ")
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text('{"a": "other"}\n')
    found = run("evaluate", model, tmp_path / "a.txt", tmp_path / "b.jsonl", "--text-field", "a", "--json").json
    assert found["documents"] == 2


def test_info_json(run: Run, model: Path) -> None:
    values = run("info", model, "--json").json
    wanted = {"next_token_layers": 2, "n_future": 3, "head_kind": "parallel", "vocab_size": 260, "tokenizer": "bytes"}
    assert {key: values[key] for key in wanted} == wanted
    assert values["parameters"] > values["next_token_parameters"] > 0


def test_train_json(run: Run, corpus: Path, tmp_path: Path) -> None:
    done = run(
        "train", "tiny", "--out", tmp_path / "run", *sets(corpus, "train.steps=3", "train.log_every=1"), "--json"
    )
    values = done.json
    assert values.keys() == {"checkpoint", "step", "finished", "train_seconds", "metrics"}
    assert (values["checkpoint"], values["step"], values["finished"]) == (str(tmp_path / "run"), 3, True)
    assert "Training 0.1M parameters for 3 steps" in done.errors


def test_train_from_a_path_of_any_letters(run: Run, tmp_path: Path) -> None:
    wrong(run("train", "retrofit", "--from", tmp_path / "é😀", "--out", tmp_path / "run"), "é😀: no such directory")


def test_train_tokenizer_json(run: Run, corpus: Path, tmp_path: Path) -> None:
    done = run("train-tokenizer", corpus / "text", "--vocab-size", 270, "--out", tmp_path / "bpe", "--json")
    assert done.json == {"tokenizer": str(tmp_path / "bpe"), "vocab_size": 270}
    more = ("train.steps=1", "tokenizer.kind=file", f"tokenizer.path={tmp_path}/bpe")
    assert run("train", "tiny", "--out", tmp_path / "run", *sets(corpus, *more)).code == 0
    assert run("info", tmp_path / "run", "--json").json["vocab_size"] == 270


def test_demo_json(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo on three tiny files, a hundredth of a minute."""
    pytest.importorskip("matplotlib")
    demo = [*small_demo(tmp_path, monkeypatch), "--head-kind", "parallel"]
    done = run(*demo, "--json")
    values = done.json
    assert values.keys() >= {
        "bits_per_byte", "tokens_per_step", "step_cost", "speedup", "outputs_equal", "prompts", "train_seconds",
        "checkpoint", "distinct_8grams", "sampled",
    }  # fmt: skip
    assert (values["outputs_equal"], values["prompts"], values["checkpoint"]) == (True, 2, str(tmp_path / "demo"))
    assert (tmp_path / "demo" / "report.html").read_text().count("<svg") == 3
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == values
    again = run(*demo)
    assert again.code == 0, again.errors
    assert "Replacing the earlier run" in again.errors
    assert "tokens per step" in again.out
    assert f"foretoken evaluate {tmp_path}/demo" in again.out


def test_demo_with_a_sequential_head(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more drafts than it was trained for; the report says what the other kind gives."""
    pytest.importorskip("matplotlib")
    demo = [*small_demo(tmp_path, monkeypatch), "--head-kind", "sequential", "--layers", 3, "--drafts", 3]
    monkeypatch.setattr("foretoken.demo._steps_in", lambda *_: 21)  # as on a machine that was busy
    done = run(*demo, "--minutes", 3)
    assert done.code == 0, done.errors
    assert "of 3 minutes: the machine was busier when steps were timed" in done.errors
    assert "The other kind: in the stored comparison" in done.out
    assert "foretoken demo --head-kind parallel" in (tmp_path / "demo" / "report.html").read_text()
    values = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert (values["head_kind"], values["drafts"], values["outputs_equal"]) == ("sequential", 3, True)
    assert len(values["accepted_by_position"]) == 3
    assert "--head-kind sequential --drafts 3" in values["command"]
    assert run("info", tmp_path / "demo", "--json").json["head_kind"] == "sequential"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--head-kind", "chain"), "head_kind"),
        (("--seed", str(2**63)), "train.seed: Input should be less than"),
        (("--seed", str(2**63 - 9)), "--seed 9223372036854775799: that of the last prompt does not fit 64 bits"),
        (("--head-kind", "sequential", "--layers", "2"), "num_hidden_layers = 2"),
        (("--head-kind", "parallel", "--drafts", "4"), "--drafts 4: must be from 0 to 3 for 4 parallel heads"),
        (("--head-kind", "sequential", "--drafts", "33"), "--drafts 33: must be from 0 to 32"),
    ],
)
def test_mistakes_in_demo(run: Run, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    wrong(run("demo", "--out", tmp_path / "demo", *options), says)
    assert not (tmp_path / "demo").exists()


def small_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Options of a demo of seconds; the recipe's corpus is replaced, for the standard library takes seconds to read."""
    from foretoken import demo
    from foretoken.recipe import load_recipe

    corpus = write_corpus(folder)
    for i in range(24):
        (corpus / "text" / f"more_{i}.py").write_text(f"def more_{i}(x):\n    return x * {i}\n" * 40)
    few = (
        "data.validation_fraction=0.4",
        "train.eval_windows=2",
        "train.batch_size=1",
        "optim.warmup_steps=1",
        "optim.name=adamw",
    )
    more = (f'data.source=["{corpus}/text"]', f"data.cache_dir={corpus}/cache", *few)
    monkeypatch.setattr(demo, "load_recipe", lambda name, overrides: load_recipe(name, (*overrides, *more)))
    size = ["--width", 64, "--layers", 1, "--n-future", 2, "--minutes", 0.001, "--prompts", 2, "--max-tokens", 12]
    return ["demo", *size, "--out", folder / "demo"]


def test_demo_replaces_only_a_demo(run: Run, model: Path, copy: Path) -> None:
    before = content(copy)
    done = run("demo", "--out", copy)
    wrong(done, "is not an earlier demo")
    assert content(copy) == before


# Text.


def test_text_does_not_depend_on_drafts(run: Run, model: Path) -> None:
    for temperature in ("0", "0.8"):
        texts = {
            run("generate", model, "def add_1", "--temperature", temperature, "--drafts", k, "--max-tokens", 60).out
            for k in (0, 1, 2)
        }
        assert len(texts) == 1
        assert texts.pop().startswith("def add_1")


def test_sampling_options_reach_the_sampler(run: Run, model: Path) -> None:
    def text(*options: object) -> str:
        return str(run("generate", model, "def", "--max-tokens", 30, "--json", *options).json["text"])

    greedy = text()
    for options in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1.0)):
        assert text("--temperature", 1, *options) == greedy
    assert text("--temperature", 1, "--seed", 1) == text("--temperature", 1, "--seed", 1)
    assert text("--temperature", 1, "--seed", 1) != text("--temperature", 1, "--seed", 2)
    assert text("--stop", greedy[3]) == greedy[: greedy.index(greedy[3])]


def test_prompt_file(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "def add_2(x, y):\n  # é\n"
    (tmp_path / "prompt.txt").write_text(prompt)
    direct = run("generate", model, prompt, "--max-tokens", 9).out
    assert direct.startswith(prompt)
    assert run("generate", model, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 9).out == direct
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert run("generate", model, "--prompt-file", "-", "--max-tokens", 9).out == direct


def test_dtype(run: Run, model: Path, corpus: Path) -> None:
    for command in (["generate", model, "x", "--max-tokens", 4], ["evaluate", model, corpus / "text"]):
        results = [run(*command, "--dtype", dtype, "--json") for dtype in ("float32", "bfloat16")]
        assert [done.code for done in results] == [0, 0]
        assert results[0].out != results[1].out


def test_results_for_people(run: Run, model: Path, corpus: Path, tmp_path: Path) -> None:
    done = run("generate", model, "def", "--max-tokens", 8)
    assert "8 tokens in" in done.errors
    assert "tokens per step" in run("evaluate", model).out
    assert "parallel" in run("info", model).out
    done = run("train", "tiny", "--out", tmp_path / ("long" * 40), *sets(corpus, "train.steps=1"))
    assert f"{tmp_path}/{'long' * 40}\n" in done.out, "a path stays in one piece"


# Bad input: one line, exit code 2, nothing written.


def wrong(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    *progress, last = done.errors.splitlines()
    assert last.startswith("foretoken: error: ")
    for part in parts:
        assert part in last, last
    assert not [line for line in progress if "rror" in line or "Traceback" in line]


TRAIN_CASES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "unknown key": (["--set", "train.stepz=3"], ["unknown key 'train.stepz'; known are", "steps"]),
    "unknown section": (["--set", "trane.steps=3"], ["unknown key 'trane'; known are data, loss"]),
    "n_future": (["--set", "model.n_future=0"], ["model.n_future", "greater than or equal to 1 (got 0)"]),
    "a word for a number": (["--set", "train.steps=many"], ["train.steps", '(got "many")']),
    "no value": (["--set", "train.steps"], ["override 'train.steps': write section.key=value"]),
    "no section": (["--set", "steps=3"], ["override 'steps=3': write section.key=value"]),
    "a value for a section": (["--set", "train=3"], ["override 'train=3'"]),
    "key of a value": (["--set", "train.steps.a=3"], ["'steps' is not a section"]),
    "heads' weights": (["--set", "loss.head_weights=[1]"], ["loss.head_weights has 1 weights for n_future = 3 heads"]),
    "blocks": (["--set", "model.total_blocks=2"], ["total_blocks must be at least 3"]),
    "width": (["--set", "model.hidden_size=33"], ["hidden_size = 33 is not a multiple of num_attention_heads = 2"]),
    "odd head width": (["--set", "model.head_dim=7"], ["head_dim", "multiple of 2 (got 7)"]),
    "micro batch": (["--set", "train.micro_batch_size=3"], ["micro_batch_size = 3 does not divide batch_size = 4"]),
    "positions": (["--set", "model.max_position_embeddings=8"], ["is below train.seq_len = 32"]),
    "tokenizer without path": (["--set", "tokenizer.kind=file"], ['kind = "file" needs path']),
    "tokenizer that is not there": (
        ["--set", "tokenizer.kind=file", "--set", "tokenizer.path=no"],
        ["no", "No such fi"],
    ),
    "source that is not there": (["--set", 'data.source=["/none/*.txt"]'], ["'/none/*.txt' matches no file"]),
    "seq_len": (["--set", "train.seq_len=9000"], ["train split: corpus has", "one window needs 9003"]),
    "infinite": (["--set", "optim.clip=inf"], ["optim.clip: Input should be a finite number"]),
    "seed": (["--set", f"train.seed={2**63}"], ["train.seed: Input should be less than 9223372036854775808"]),
    "precision": (["--set", "train.precision=float8"], ["train.precision", '(got "float8")']),
    "resume of nothing": (["--resume"], ["no run that could be resumed"]),
    "option": (["--fast"], ["No such option", "--fast"]),
}


def test_mistakes_in_resume(run: Run, corpus: Path, tmp_path: Path) -> None:
    """What is wrong with the run that was to go on is one line, and its folder stays as it is."""
    mine, out = write_corpus(tmp_path / "mine"), tmp_path / "run"
    words = ["train", "tiny", "--out", out, *sets(mine, "train.steps=4", "train.save_every=2"), "--resume"]

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foretoken.saver.Saver.finish", fail)
        assert run(*words[:-1]).code == 130
    (saved,) = checkpoint.step_checkpoints(out)
    before = content(out)
    changed = [*words, "--set", "optim.lr=1"]
    wrong(run(*changed), f"{saved}: was trained with optim.lr = ", "the recipe says 1.0; resume with the same recipe")
    text = mine / "text" / "0.py"
    kept = text.read_bytes()
    text.write_text("something else\n" * 40)
    wrong(run(*words), f"{saved}: the data have changed since; resume needs the same documents")
    text.write_bytes(kept)
    for file, message in (
        ("model.safetensors", "model.safetensors: is not the file that foretoken.json recorded (sha256 differs)"),
        ("train_state/optimizer.safetensors", "optimizer.safetensors: missing"),
        ("train_state", f"{saved}: has no train_state, so training cannot continue from it"),
        ("foretoken.json", "foretoken.json: No such file"),
    ):
        path = saved / file
        whole, away = path.read_bytes() if path.is_file() else b"", tmp_path / "away"
        path.write_bytes(whole[:-8]) if file == "model.safetensors" else path.rename(away)
        wrong(run(*words), message, "; none older is there")
        path.write_bytes(whole) if file == "model.safetensors" else away.rename(path)
    assert content(out) == before
    done = run(*words)
    assert done.code == 0
    assert "for 4 steps, from step 2" in done.errors
    wrong(run(*words), f"{out}: this run is finished; nothing to resume")


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_mistakes_in_train(run: Run, corpus: Path, tmp_path: Path, case: str) -> None:
    options, parts = TRAIN_CASES[case]
    wrong(run("train", "tiny", "--out", tmp_path / "run", *sets(corpus), *options), *parts)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "raw", "part"),
    [
        ("none", None, "no recipe 'none': neither a file nor one of the shipped demo,"),
        ("not.toml", b"model: 3", "not TOML"),
        ("bytes.toml", b"\xff", "not TOML"),
        ("empty.toml", b"", "'model' is missing"),
        ("flat.toml", b"model = 3\n[train]\nsteps = 1\nbatch_size = 1\nseq_len = 8", "model: "),
        ("known.toml", b"[model]\nhidden_sise = 3", "'model.hidden_s"),
    ],
)
def test_mistakes_in_a_recipe(run: Run, tmp_path: Path, name: str, raw: bytes | None, part: str) -> None:
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    wrong(run("train", tmp_path / name if raw is not None else name, "--out", tmp_path / "run"), part)
    assert not (tmp_path / "run").exists()


def test_recipe_for_a_gpu_on_a_machine_without(
    run: Run, corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("train", "tiny", "--out", tmp_path / "run", *sets(corpus, "train.device=cuda"))
    wrong(done, "no usable GPU; set train.device=cpu or auto")
    wrong(run("generate", model, "a", "--device", "cuda"), "--device cuda: this machine has no usable GPU")
    assert os.listdir(tmp_path) == []


def test_bad_texts(run: Run, corpus: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine so far \xff and on" * 9)
    (tmp_path / "empty.txt").write_text("")
    for name, parts in (
        ("bad.txt", ["bad.txt: invalid UTF-8 at byte 12", 'errors = "replace"']),
        ("empty.txt", ["no"]),
    ):
        source = f'data.source=["{tmp_path}/{name}"]'
        wrong(run("train", "tiny", "--out", tmp_path / "run", *sets(corpus, source)), *parts)
        wrong(run("evaluate", model, tmp_path / name), *(parts[:1] if name == "bad.txt" else ["nothing to evaluate"]))
    wrong(run("train-tokenizer", tmp_path / "bad.txt", "--out", tmp_path / "bpe"), "invalid UTF-8 at byte 12")
    wrong(run("generate", model, "--prompt-file", tmp_path / "bad.txt"), "bad.txt: invalid UTF-8 at byte 12")
    assert sorted(os.listdir(tmp_path)) == ["bad.txt", "empty.txt"]


def test_finished_and_full_folders(run: Run, corpus: Path, model: Path, tmp_path: Path) -> None:
    before = content(model)
    wrong(run("train", "tiny", "--out", model, "--resume", *sets(corpus)), "this run is finished; nothing to resume")
    wrong(
        run("train", "tiny", "--out", model, *sets(corpus)), "is not empty; continue that run with --resume or choose"
    )
    wrong(run("demo", "--out", model), "is not an earlier demo; choose another folder with --out")
    assert content(model) == before
    train_bpe(["a"], 260).save(tmp_path / "bpe")
    wrong(run("train-tokenizer", corpus / "text", "--out", tmp_path / "bpe"), "bpe: exists already; choose another")
    wrong(
        run("train-tokenizer", corpus / "text", "--vocab-size", 9, "--out", tmp_path / "new"), "vocab_size = 9 is too"
    )
    assert os.listdir(tmp_path) == ["bpe"]


GENERATE_CASES: dict[str, tuple[Sequence[object], str]] = {
    "drafts": (["a", "--drafts", 3], "drafts = 3, but a model with 3 heads drafts 0 to 2 tokens per step"),
    "drafts below 0": (["a", "--drafts", -1], "drafts = -1"),
    "no prompt": ([], "give a prompt, or --prompt-file FILE"),
    "two prompts": (["a", "--prompt-file", "b"], "give a prompt, or --prompt-file FILE"),
    "prompt file": (["--prompt-file", "/none"], "/none: No such file or directory"),
    "prompt folder": (["--prompt-file", "/"], "/: Is a directory"),
    "dtype": (["a", "--dtype", "float8"], "--dtype float8: must be float32 or bfloat16"),
    "device": (["a", "--device", "tpu"], "--device tpu: must be auto, cpu or cuda"),
    "temperature": (["a", "--temperature", -1], "temperature"),
    "top p": (["a", "--top-p", 0], "top_p"),
    "top k": (["a", "--top-k", -2], "top_k"),
    "stop": (["a", "--stop", ""], "a stop string must not be empty"),
    "max tokens": (["a", "--max-tokens", 0], "max_tokens = 0 must be at least 1"),
    "too many tokens": (["a", "--max-tokens", 100_000], "exceed the model's 256 positions"),
    "too long a prompt": (["a" * 300], "exceed the model's 256 positions"),
    "logit bias": (["a", "--logit-bias", "9"], "--logit-bias 9: must be TOKEN_ID=BIAS"),
    "biased token": (["a", "--logit-bias", "9999=1"], "token 9999 is not among the model's"),
    "penalty": (["a", "--repetition-penalty", 0], "repetition_penalty = 0.0 must be a positive number"),
    "min tokens": (["a", "--min-tokens", -2], "min_tokens = -2 must be at least 0"),
    "regex": (["a", "--regex", "[a"], "regex: "),
    "schema": (["a", "--json-schema", "/none"], "/none: No such file or directory"),
    "two grammars": (["a", "--regex", "a", "--lark", __file__], "lark: "),
    "lookup": (["a", "--lookup", -1], "lookup = -1 must be at least 1 token"),
    "draft vocabulary": (["a", "--draft-vocab", 0], "draft_vocab = 0 must lie between 1 and the model's"),
    "draft model": (["a", "--draft-model", "/none"], "/none"),
    "accept": (["a", "--accept", "most"], 'accept = "most" must be one of keyed, rejection'),
    "a word for a number": (["a", "--max-tokens", "many"], "valid integer"),
    "surrogate": (["a\udcff"], "lone surrogate"),
    "option": (["a", "--fast"], "No such option"),
    "word too many": (["a", "b"], "unexpected extra argument"),
}


@pytest.mark.parametrize("case", GENERATE_CASES)
def test_mistakes_in_generate(run: Run, model: Path, case: str) -> None:
    words, part = GENERATE_CASES[case]
    wrong(run("generate", model, *words), part)
    wrong(run("generate", model, *words, "--json"), part)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nothing"], "No such command"),
        (["generate"], "Missing argument"),
        (["train"], "Missing argument"),
        (["train-tokenizer", "stdlib"], "Missing option"),
        (["demo", "--width", "100"], "--width 100: must be a multiple of 64"),
        (["demo", "--max-tokens", "100000"], "--max-tokens 100000: at most"),
        (["demo", "--n-future", "0"], "n_future"),
        (["demo", "--minutes", "0"], "must be above 0"),
        (["demo", "--layers", "0"], "num_hidden_layers"),
    ],
)
def test_mistakes_in_commands(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong(run(*words), part)
    assert os.listdir(tmp_path) == []


def test_mistakes_in_evaluate(run: Run, model: Path, copy: Path, tmp_path: Path) -> None:
    wrong(run("evaluate", model, "/none"), "'/none' matches no file")
    wrong(run("evaluate", model, "--split", "half"), "--split half: must be all, train or validation")
    wrong(run("evaluate", model, "--max-bytes", "0"), "max_bytes = 0 must be at least 1")
    (copy / "foretoken.json").unlink()
    wrong(run("evaluate", copy), "does not record what it was trained on; name the data to evaluate on")


@pytest.mark.parametrize("command", [["generate", "CKPT", "a"], ["evaluate", "CKPT"], ["info", "CKPT"]])
def test_mistakes_with_checkpoints(run: Run, copy: Path, corpus: Path, tmp_path: Path, command: list[str]) -> None:
    def call(folder: Path) -> Done:
        return run(*[str(folder) if word == "CKPT" else word for word in command])

    wrong(call(tmp_path / "none"), "none: no such directory")
    wrong(call(corpus), "has no config.json: not a checkpoint, and no run with one")
    if command[0] != "info":  # which reads no weights
        raw = (copy / "model.safetensors").read_bytes()
        for changed in (raw[:-1], raw[:-1] + bytes([raw[-1] ^ 1])):
            (copy / "model.safetensors").write_bytes(changed)
            wrong(call(copy), "model.safetensors: is not the file that foretoken.json recorded (sha256 differs)")
        (copy / "model.safetensors").write_bytes(raw)
        train_bpe(["def add"], 264).save(copy)
        wrong(call(copy), "tokens beside a model of 260")
    (copy / "config.json").write_text("{}{}")
    wrong(call(copy), "config.json: not JSON")


def test_disk_full(run: Run, corpus: Path, tmp_path: Path) -> None:
    """While the second checkpoint is written; the first stays, and the run goes on from it when there is room."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    saves = iter([None, full])

    def save_tensors(*arguments: Any) -> str:
        if error := next(saves):
            raise error
        return safetensors.save_tensors(*arguments)

    out = tmp_path / "run"
    words = ["train", "tiny", "--out", out, *sets(corpus, "train.steps=9", "train.save_every=3")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state, "save_tensors", save_tensors)
        wrong(run(*words), "checkpoint-6: cannot be written", "No space left on device")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-3", "metrics.jsonl"]
    checkpoint.load_checkpoint(out)
    assert run(*words, "--resume").code == 0


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_tokenizer_that_is_not_finished_leaves_nothing(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    """Interrupted, or without room, between its two files."""
    write = Path.write_text

    def write_text(path: Path, *text: Any, **options: Any) -> int:
        if path.name == "tokenizer_config.json":
            raise end
        return write(path, *text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    done = run("train-tokenizer", corpus / "text", "--vocab-size", 270, "--out", tmp_path / "bpe")
    assert done.code == 130 if isinstance(end, KeyboardInterrupt) else "bpe: cannot be written" in done.errors
    assert os.listdir(tmp_path) == []


def test_where_a_tokenizer_goes_is_looked_at_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    nothing = tmp_path / "none.txt"
    wrong(run("train-tokenizer", nothing, "--out", tmp_path / "file"), "file: exists already")
    wrong(run("train-tokenizer", nothing, "--out", tmp_path / "file" / "bpe"), "bpe: cannot be written")
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_for_metrics(run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(log: metrics.MetricsLog) -> metrics.MetricsLog:
        log.file = open("/dev/full", "w")  # noqa: SIM115 - the log closes it
        return log

    monkeypatch.setattr(metrics.MetricsLog, "__enter__", enter)
    done = run("train", "tiny", "--out", tmp_path / "run", *sets(corpus, "train.steps=2"))
    wrong(done, "metrics.jsonl: cannot be written: No space left on device")


def test_no_permission(run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "run"
    wrong(run("train", "tiny", "--out", below, *sets(corpus)), "file", "choose another folder")
    wrong(run("train", "tiny", "--out", tmp_path / "file", *sets(corpus)), "is a file; the run needs a folder")
    wrong(run("train-tokenizer", corpus / "text", "--vocab-size", 270, "--out", below), "Not a directory")
    cache = f"data.cache_dir={tmp_path}/file/cache"
    wrong(run("train", "tiny", "--out", tmp_path / "run", *sets(corpus, cache)), "token cache", "set data.cache_dir to")
    monkeypatch.setattr("foretoken.run_folder.os.access", lambda path, mode: False)
    wrong(run("train", "tiny", "--out", tmp_path / "run", *sets(corpus)), "nothing can be written in")
    assert content(tmp_path) == {"file": b"mine"}
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(run: Run, model: Path, corpus: Path, tmp_path: Path, value: float) -> None:
    """Those of the second further head alone harm no text."""
    for name, part in (("all", "trunk.0.mlp.up_proj"), ("further", "heads.2.mlp.up_proj")):
        spoiled, tokenizer = checkpoint.load_checkpoint(model, "float32")
        spoiled.get_submodule(part).get_parameter("weight").data[0, 0] = value
        checkpoint.save_checkpoint(tmp_path / name, spoiled, tokenizer)
    wrong(run("evaluate", tmp_path / "all", corpus / "text", "--json"), "the loss of head 1 is nan: weights are no num")
    wrong(run("evaluate", tmp_path / "further", corpus / "text"), "the loss of head 3 is nan: weights are no numbers")
    (tmp_path / "text.txt").write_text("a line of a text that goes on\n" * 40)
    own = ["distil-data", tmp_path / "all", "--data", tmp_path / "text.txt", "--out", tmp_path / "own.jsonl"]
    own += ["--records", 2, "--max-tokens", 8]
    for words in (["generate", tmp_path / "all", "a", "--temperature", 1], own):
        for more in ([], ["--json"]):
            wrong(run(*words, *more), "a token's log-probability is nan: the model's weights are no numbers")
    words = ["a", "--max-tokens", 9, "--drafts", 2, "--json"]
    text = run("generate", tmp_path / "further", *words).json["text"]
    assert text == run("generate", model, *words, "--dtype", "float32").json["text"]


def test_a_figure_that_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.nan, 1.5], "b": {"c": -math.inf}})
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": {"c": null}}\n'


def test_nan(run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "head_weights", lambda step, steps, n, config: [math.nan] * n)
    done = run("train", "tiny", "--out", tmp_path / "run", *sets(corpus))
    wrong(done, "step 1: the gradient's norm is nan, first in head 1; no checkpoint had been saved yet")


# Ends.


def test_drafts_from_elsewhere_and_grammars(run: Run, model: Path) -> None:
    plain = run("generate", model, "def add", "--max-tokens", 30, "--drafts", 0, "--json").json
    draft_model = ["--draft-model", model]
    for options in (["--lookup", 2], draft_model, [*draft_model, "--drafts", 2], ["--drafts", 1, "--draft-vocab", 99]):
        assert run("generate", model, "def add", "--max-tokens", 30, *options, "--json").json["ids"] == plain["ids"]
    options = ["--logit-bias", "65=100", "--max-tokens", 4, "--json"]
    assert run("generate", model, "def add", *options).json["text"] == "AAAA"
    assert run("generate", model, "def add", "--regex", "x=[0-9]{2}", "--json").json["text"][:2] == "x="


def test_drafts_of_a_model_with_other_tokens(run: Run, model: Path, tmp_path: Path) -> None:
    loaded, tokenizer = load_checkpoint(model)
    stored = tokenizer.backend.to_str()
    swapped = json.loads(stored)
    words = swapped["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    named = stored.replace("<|unused|>", "<|other|>")
    for name, text in (("swapped", json.dumps(swapped)), ("named", named)):
        other = dataclasses.replace(tokenizer, backend=tokenizers.Tokenizer.from_str(text))
        save_checkpoint(tmp_path / name, loaded, other)
    done = run("generate", model, "def add", "--draft-model", tmp_path / "swapped")
    wrong(done, "its tokens are not those of the model")
    assert run("generate", model, "def add", "--max-tokens", 4, "--draft-model", tmp_path / "named").out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_interrupt_in_generate(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    def interrupted(*arguments: object, **options: object) -> object:
        yield completion.TextRequest([1], 5), [1]
        raise KeyboardInterrupt

    monkeypatch.setattr(completion, "decode", interrupted)
    done = run("generate", model, "def", *options)
    assert done.code == 130
    assert "Traceback" not in done.errors + done.out
    assert "error" not in done.errors


def test_reader_that_goes_away(model: Path) -> None:
    """`foretoken generate ... | head -c 1` ends without a word."""
    process = subprocess.Popen(
        [*PROGRAM, "generate", str(model), "def", "--max-tokens", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(30) == 1
    assert errors == ""


def test_a_demo_that_cannot_be_removes_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "site"
    out.mkdir()
    for name in ("demo.json", "thesis.txt"):
        (out / name).write_text("{}")
    wrong(run("demo", "--out", out), "is not an earlier demo; choose another folder with --out")
    (out / "metrics.jsonl").write_text("")
    wrong(run("demo", "--out", out, "--layers", 2), "num_hidden_layers = 2")
    assert sorted(file.name for file in out.iterdir()) == ["demo.json", "metrics.jsonl", "thesis.txt"]
