"""A program for test_train.py: training runs in processes that are killed, forked so that torch is imported once.

changes CORPUS FOLDER OVERRIDES: one run after another in FOLDER/run-1, run-2, ...; the i-th kills itself before its
    i-th change of the folder; ends after the first that lives, and prints how many were killed.
moments CORPUS FOLDER OVERRIDES: one run in FOLDER/run, killed at six moments and resumed after each.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from small_runs import check_loads, finish, recipe

from foretoken.config import Recipe


def main(mode: str, corpus: str, folder: str, *more: str) -> None:
    torch.set_num_threads(1)
    kill = {"changes": kill_at_changes, "moments": kill_at_moments}[mode]
    print(kill(recipe(Path(corpus), *more), Path(folder)))


def kill_at_changes(wanted: Recipe, folder: Path) -> int:
    for change in itertools.count(1):
        run = folder / f"run-{change}"

        def work(run: Path = run, change: int = change) -> None:
            kill_before(change, run.name)
            finish(wanted, run)

        _, status = os.waitpid(forked(work), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return change - 1
    raise AssertionError


def kill_before(change: int, name: str) -> None:
    """SIGKILL this process when it is about to make its `change`-th change of what has `name` in its path."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") and name in str(arguments[0]):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_moments(wanted: Recipe, folder: Path, kills: int = 6) -> int:
    run, moments = folder / "run", random.Random(0)
    for _ in range(kills):
        begun = lines(run)
        child = forked(lambda: finish(wanted, run))
        while lines(run) <= begun:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run ended before it could be killed"
        check_loads(run)
    return kills


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def forked(work: Callable[[], object]) -> int:
    """Process id of a child that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


if __name__ == "__main__":
    main(*sys.argv[1:])
