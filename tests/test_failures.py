"""What goes wrong amid a run, up to the resume: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import failing_runs
import pytest
import torch
from small_runs import check_loads, close_weights, finish, recipe, records, same_weights

from foretoken import train as training
from foretoken.checkpoint import load_checkpoint, newest_step, step_checkpoints
from foretoken.config import Recipe
from foretoken.errors import CheckpointError, TrainingError
from foretoken.files import read_json
from foretoken.train import train

EVERY_TWO = ("train.steps=6", "train.save_every=2", "train.log_every=1")
TOO_MUCH = 2**60  # bytes


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def stopped(wanted: Recipe, run: Path, after: int) -> None:
    """A run that ends in its step after `after`, with what had been saved by then."""
    real, steps = training._update, []

    def update(*arguments: Any) -> float:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(real(*arguments))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            train(wanted, run)


# In processes: see failing_runs.py.


@pytest.fixture(scope="module")
def failed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs, and what failing_runs.py says of them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("another process's limits can be set on Linux alone")
    folder = tmp_path_factory.mktemp("failed")
    program = Path(__file__).with_name("failing_runs.py")
    done = subprocess.run([sys.executable, program, corpus, folder], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_no_room_on_the_disk(corpus: Path, tmp_path: Path, failed: tuple[Path, dict[str, Any]]) -> None:
    """The system refuses a write amid a file."""
    folder, result = failed
    run = folder / "full"
    assert result["full"] == 2
    assert (folder / "out-full").read_text() == ""
    last = (folder / "errors-full").read_text().splitlines()[-1]
    good = newest_step(run)
    assert good is not None
    next_one = run / f"checkpoint-{int(good.name.removeprefix('checkpoint-')) + 2}"
    assert last.startswith(f"foretoken: error: {next_one}: cannot be written: ")
    assert last.endswith(f"[Errno 27] File too large; the last good checkpoint is {good}")
    assert not list(run.glob(".*")), "nothing half written is left"
    check_loads(run)
    train(recipe(corpus, *failing_runs.FULL), tmp_path / "whole")
    assert train(recipe(corpus, *failing_runs.FULL), run, resume=True).finished
    assert same_weights(run, tmp_path / "whole")


def test_preempted_amid_a_step_and_a_slow_write(
    corpus: Path, tmp_path: Path, failed: tuple[Path, dict[str, Any]]
) -> None:
    """Both checkpoints are there, that of the signal's step too, long before 30 seconds are over."""
    folder, result = failed
    run = folder / "preempted"
    assert result["preempted"]["code"] == 130
    assert 2 * failing_runs.SLOW_WRITE < result["preempted"]["seconds"] < 30
    first, second = step_checkpoints(run)
    steps = len(records(run))
    assert (first.name, second.name) == ("checkpoint-25", f"checkpoint-{steps}")
    assert 25 < steps < 50
    assert read_json(second / "foretoken.json")["step"] == steps
    wanted = f"Stopped at step {steps}, saved as {second}; --resume goes on from there\n"
    assert (folder / "out-preempted").read_text() == wanted
    assert "rror" not in (folder / "errors-preempted").read_text()
    train(recipe(corpus, *failing_runs.PREEMPTED), tmp_path / "whole")
    assert finish(recipe(corpus, *failing_runs.PREEMPTED), run).finished
    assert same_weights(run, tmp_path / "whole")
    assert records(run) == records(tmp_path / "whole")


# Memory.


@pytest.mark.parametrize("kind", ["cpu", "gpu", "numpy"])
def test_out_of_memory_says_what_to_lower(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And the run goes on with less. The error of a CPU is its allocator's own."""
    run, real, calls = tmp_path / "run", training.mtp_loss, []

    def greedy(hidden: list[torch.Tensor], *arguments: Any, **options: Any) -> Any:
        calls.append(hidden[0].size(0))
        if calls[-1] == 4 and len(calls) > 3:
            if kind == "cpu":
                torch.empty(TOO_MUCH)
            raise MemoryError if kind == "numpy" else torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return real(hidden, *arguments, **options)

    monkeypatch.setattr(training, "mtp_loss", greedy)
    with pytest.raises(TrainingError) as error:
        train(recipe(corpus, *EVERY_TWO), run)
    reason = {"cpu": "you tried to allocate", "gpu": "CUDA out of memory. Tried", "numpy": "MemoryError"}[kind]
    left = f"the last good checkpoint is {run}/checkpoint-2"
    advice = "lower train.micro_batch_size, now 4, and --resume"
    assert re.fullmatch(rf"out of memory \(.*{reason}.*\); {advice}; {left}", str(error.value))
    assert train(recipe(corpus, *EVERY_TWO, "train.micro_batch_size=2"), run, resume=True).finished
    monkeypatch.undo()
    train(recipe(corpus, *EVERY_TWO), tmp_path / "whole")
    close_weights(run, tmp_path / "whole", 2e-5)


def test_out_of_memory_with_nothing_to_lower(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "mtp_loss", lambda *arguments, **options: torch.empty(TOO_MUCH))
    with pytest.raises(TrainingError, match=r"lower train\.seq_len, or the model's size, in a new run; no checkpoint"):
        train(recipe(corpus, "train.micro_batch_size=1"), tmp_path / "run")


def test_errors_of_another_kind_pass(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(training, "mtp_loss", broken)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        train(recipe(corpus), tmp_path / "run")


# Files that are not what was written.


def test_damaged_tokens_are_made_anew(corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, *EVERY_TWO, f"data.cache_dir={tmp_path}/cache")
    train(wanted, tmp_path / "whole")
    stopped(wanted, tmp_path / "run", 3)
    (shard,) = (tmp_path / "cache").glob("*/train-tokens-00000.bin")
    before = shard.read_bytes()
    flip(shard)
    assert finish(wanted, tmp_path / "run").finished
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert shard.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("train_state/optimizer.safetensors", "is not the file that foretoken.json recorded (sha256 differs)"),
        ("mtp_heads/model.safetensors", "is not the file that foretoken.json recorded (sha256 differs)"),
        ("foretoken.json", "not JSON"),
        ("config.json", "not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_one_before(
    corpus: Path, tmp_path: Path, file: str, message: str
) -> None:
    """Nothing is removed, and the older one goes on when the user has removed the damaged one."""
    wanted, run = recipe(corpus, *EVERY_TWO, "train.keep_checkpoints=2"), tmp_path / "run"
    stopped(wanted, run, 5)
    damaged = run / "checkpoint-4"
    path = damaged / file
    path.write_text("{") if file.endswith("json") else flip(path)
    with pytest.raises(CheckpointError) as error:
        train(wanted, run, resume=True)
    assert str(error.value).startswith(f"{path}: {message}")
    assert str(error.value).endswith(f"; delete {damaged} and --resume goes on from checkpoint-2")
    assert [folder.name for folder in step_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    for inside in sorted(damaged.rglob("*"), reverse=True):
        inside.rmdir() if inside.is_dir() else inside.unlink()
    damaged.rmdir()
    assert finish(wanted, run).finished
    train(wanted, tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")
    load_checkpoint(run)


def test_a_resume_that_fails_removes_nothing(corpus: Path, tmp_path: Path) -> None:
    """Where a kill had left two checkpoints, one that is to be removed, the newer may be damaged."""
    run = tmp_path / "run"
    stopped(recipe(corpus, *EVERY_TWO, "train.keep_checkpoints=2"), run, 5)
    flip(run / "checkpoint-4" / "model.safetensors")
    with pytest.raises(CheckpointError, match="--resume goes on from checkpoint-2"):
        train(recipe(corpus, *EVERY_TWO), run, resume=True)
    assert [folder.name for folder in step_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
