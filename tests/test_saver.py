"""Checkpoints that are written while training goes on: what is in them, when they are there, and when they are not."""

from __future__ import annotations

import errno
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import check_loads, content, finish, recipe, records, same_weights

from foretoken import checkpoint, optim, saver
from foretoken import train as training
from foretoken.checkpoint import Contents, step_checkpoints
from foretoken.errors import CheckpointError, TrainingError
from foretoken.formats.safetensors import save_tensors
from foretoken.metrics import Record
from foretoken.train import train

EVERY_TWO = ("train.steps=7", "train.save_every=2", "train.log_every=1")
SECONDS = 20.0  # for what takes milliseconds


@contextmanager
def writes(around: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Inside, `around` is called in the place of each intermediate checkpoint's write, with its step and the write."""
    real = checkpoint.write_checkpoint

    def write(path: Path, contents: Contents) -> None:
        if path.name.startswith("checkpoint-"):
            return around(int(path.name.removeprefix("checkpoint-")), lambda: real(path, contents))
        return real(path, contents)

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, saver):  # the one writes at once, the other in its thread
            patch.setattr(module, "write_checkpoint", write)
        yield


def full_at(step: int) -> Callable[[int, Callable[[], None]], None]:
    """Writes of which that of one step meets a full disk."""

    def around(this: int, write: Callable[[], None]) -> None:
        if this != step:
            return write()
        raise CheckpointError(f"checkpoint-{step}: cannot be written: {os.strerror(errno.ENOSPC)}")

    return around


def names(run: Path) -> list[str]:
    return [path.name for path in step_checkpoints(run)]


def test_steps_go_on_while_a_write_is_blocked(corpus: Path, tmp_path: Path) -> None:
    """The write of step 2 cannot end before step 4 is done; the save of step 4 waits for it."""
    go_on, events = threading.Event(), []

    def around(step: int, write: Callable[[], None]) -> None:
        events.append(f"begins {step}")
        if step == 2:
            assert go_on.wait(SECONDS), "training waits for the write"
        write()
        events.append(f"ends {step}")

    def report(record: Record) -> None:
        if record["kind"] == "train":
            events.append(f"step {record['step']}")
            if record["step"] == 4:
                assert names(tmp_path / "run") == []
                go_on.set()

    more = (*EVERY_TWO, "train.keep_checkpoints=9")
    with writes(around):
        train(recipe(corpus, *more), tmp_path / "run", report=report)
    told = [event for event in events if event.startswith("step") or event.endswith("2")]
    assert told[:5] == ["step 1", "step 2", "begins 2", "step 3", "step 4"]
    order = [event for event in events if not event.startswith("step")]
    assert order == [f"{what} {step}" for step in (2, 4, 6) for what in ("begins", "ends")]

    # Each holds its own step, not what training made of the tensors meanwhile.
    train(recipe(corpus, *more, "train.async_save=false"), tmp_path / "waiting")
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6", ""):
        found, wanted = content(tmp_path / "run" / name), content(tmp_path / "waiting" / name)
        assert found.keys() == wanted.keys()
        for file in found:
            if file.endswith(("safetensors", "unlogged.json")):
                assert found[file] == wanted[file], f"{name}/{file}"
    assert records(tmp_path / "run") == records(tmp_path / "waiting")


def test_an_old_checkpoint_goes_when_the_new_one_is_complete(corpus: Path, tmp_path: Path) -> None:
    seen = []

    def around(step: int, write: Callable[[], None]) -> None:
        seen.append(names(tmp_path / "run"))
        write()
        seen.append(names(tmp_path / "run"))

    with writes(around):
        train(recipe(corpus, *EVERY_TWO, "train.keep_checkpoints=2"), tmp_path / "run")
    two, four, six = "checkpoint-2", "checkpoint-4", "checkpoint-6"
    assert seen == [[], [two], [two], [two, four], [two, four], [two, four, six]]
    assert names(tmp_path / "run") == [six]  # the finished run's own is the other one


def test_what_async_save_is_off_for(corpus: Path, tmp_path: Path) -> None:
    """Then a step waits for the write before it."""
    seen = []

    def slow(step: int, write: Callable[[], None]) -> None:
        time.sleep(0.1)
        write()

    with writes(slow):
        train(recipe(corpus, *EVERY_TWO, "train.async_save=false"), tmp_path / "run",
              report=lambda record: seen.append(names(tmp_path / "run")))  # fmt: skip
    assert seen[4:6] == [["checkpoint-2"], ["checkpoint-2"]]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("last", [False, True])
def test_a_failed_write_ends_the_run_at_the_next_step(
    corpus: Path, tmp_path: Path, asynchronous: str, last: bool
) -> None:
    """Also that of the last save before the end: a run does not end well with a checkpoint that is not there."""
    more = ("train.steps=8", "train.save_every=3", "train.log_every=1", "train.keep_checkpoints=2")
    wanted, run, failed = recipe(corpus, *more, f"train.async_save={asynchronous}"), tmp_path / "run", threading.Event()
    failing, good = (6, 3) if last else (3, 0)

    def around(step: int, write: Callable[[], None]) -> None:
        if step == failing:
            failed.set()
        full_at(failing)(step, write)

    def report(record: Record) -> None:
        if record.get("step") == failing + 1:  # a step that is done before training can know
            assert failed.wait(SECONDS)
            time.sleep(0.05)

    with writes(around), pytest.raises(CheckpointError) as error:
        train(wanted, run, report=report)
    left = f"the last good checkpoint is {run}/checkpoint-{good}" if good else "no checkpoint had been saved yet"
    assert str(error.value) == f"checkpoint-{failing}: cannot be written: No space left on device; {left}"
    assert last or len(records(run)) < 6, "the next save is not awaited"
    assert not (run / "config.json").exists()
    check_loads(run)
    assert finish(wanted, run).finished  # after room was made
    train(wanted, tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")
    assert records(run) == records(tmp_path / "whole")


@pytest.mark.parametrize("full", [False, True])
def test_a_loss_that_is_no_number_waits_for_the_write(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Step 4 is being written when step 5 fails; where that write fails too, both are said."""
    run, failed = tmp_path / "run", threading.Event()
    real = optim.clip_gradients
    norms = []

    def clip(model: torch.nn.Module, limit: float) -> float:
        norms.append(real(model, limit))
        if len(norms) < 5:
            return norms[-1]
        failed.set()
        return math.nan

    def around(step: int, write: Callable[[], None]) -> None:
        if step == 4:
            assert failed.wait(SECONDS)
            time.sleep(0.05)
        return full_at(4 if full else 0)(step, write)

    monkeypatch.setattr(optim, "clip_gradients", clip)
    with writes(around), pytest.raises(TrainingError) as error:
        train(recipe(corpus, *EVERY_TWO), run)
    also = "; checkpoint-4: cannot be written: No space left on device" if full else ""
    left = f"; the last good checkpoint is {run}/checkpoint-{2 if full else 4}"
    assert str(error.value) == f"step 5: the gradient's norm is nan{also}{left}"
    check_loads(run)


def test_no_error_leaves_a_thread_behind(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(training, "_validate", broken)
    with pytest.raises(ZeroDivisionError):
        train(recipe(corpus, *EVERY_TWO), tmp_path / "run")
    assert names(tmp_path / "run") == ["checkpoint-6"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_write_lets_other_threads_run(tmp_path: Path) -> None:
    """The library writes and the digest is taken without the interpreter's lock."""
    tensors = {"a": torch.zeros(2**25)}
    ended, ticks = threading.Event(), []

    def tick() -> None:
        while not ended.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    save_tensors(tmp_path / "file", tensors)
    took = time.perf_counter() - began
    ended.set()
    thread.join()
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert len(ticks) > 10
    assert max(gaps) < took / 2
