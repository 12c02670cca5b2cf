"""A program for test_failures.py: `foretoken train` in processes that something goes wrong with, forked from this one.

    failing_runs.py CORPUS FOLDER

FOLDER/full: a run for whose files there is no room any more once its first checkpoint is there.
FOLDER/preempted: a run that gets SIGTERM in the middle of a step while a slow disk writes a checkpoint.
What they print is in FOLDER/out-NAME and FOLDER/errors-NAME. Prints a JSON object: of each its exit code, and of the
second the seconds from the signal to its end.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it, which takes longer than a whole run here
from killed_runs import forked
from small_runs import overrides

from foretoken import cli, saver
from foretoken import train as training
from foretoken.checkpoint import Contents, newest_step

FULL = ("train.steps=120", "train.save_every=2", "train.log_every=100")
PREEMPTED = ("train.steps=60", "train.save_every=25", "train.log_every=1", "train.keep_checkpoints=2")
ROOM = 20_000  # bytes in a file: a checkpoint needs more, metrics.jsonl less
SLOW_WRITE, SLOW_STEP = 0.5, 0.2  # seconds


def main(corpus: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    print(json.dumps({"full": full(corpus, folder), "preempted": preempted(corpus, folder)}))


def full(corpus: Path, folder: Path) -> int:
    child = started(corpus, folder, "full", FULL)
    wait_for(lambda: newest_step(folder / "full") is not None)
    resource.prlimit(child, resource.RLIMIT_FSIZE, (ROOM, ROOM))
    return ended(child)


def preempted(corpus: Path, folder: Path) -> dict[str, Any]:
    real_write, real_update = saver.write_checkpoint, training._update

    def write(path: Path, contents: Contents) -> None:
        (folder / "writing").touch()
        wait_for((folder / "signalled").exists)
        time.sleep(SLOW_WRITE)
        real_write(path, contents)

    def update(*arguments: Any) -> float:
        if (folder / "writing").exists():
            (folder / "stepping").touch()
            time.sleep(SLOW_STEP)
        return real_update(*arguments)

    saver.write_checkpoint, training._update = write, update
    child = started(corpus, folder, "preempted", PREEMPTED)
    wait_for((folder / "stepping").exists)
    began = time.monotonic()
    os.kill(child, signal.SIGTERM)
    (folder / "signalled").touch()
    return {"code": ended(child), "seconds": time.monotonic() - began}


def started(corpus: Path, folder: Path, name: str, more: tuple[str, ...]) -> int:
    def work() -> None:
        for stream, file in ((1, "out"), (2, "errors")):
            os.dup2(os.open(folder / f"{file}-{name}", os.O_WRONLY | os.O_CREAT), stream)
        sets = [word for override in overrides(corpus, *more) for word in ("--set", override)]
        sys.argv = ["foretoken", "train", "tiny", "--out", str(folder / name), *sets]
        cli.main()

    return forked(work)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(event: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not event():
        assert time.monotonic() < end, "the run does not go on"
        time.sleep(0.002)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
