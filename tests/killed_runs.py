"""A program for test_train.py: training runs in processes that get signals, forked so that torch is imported once.

    killed_runs.py CORPUS FOLDER

FOLDER/changes/1, 2, ...: runs of which the i-th is killed when it is about to change its folder for the i-th time.
FOLDER/moments/run: a run killed at six moments and resumed after each.
FOLDER/signals/SIGINT, SIGTERM: `foretoken train` with this signal; what it prints is in out-SIGINT, errors-SIGINT.
Prints a JSON object: how many were killed in `changes` and `moments`, the exit codes in `signals`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it, which takes longer than a whole run here
from small_runs import check_loads, finish, lines, overrides, recipe

from foretoken import cli

CHANGES = ("train.steps=2", "train.save_every=1", "train.log_every=1")
MOMENTS = ("train.steps=60", "train.save_every=1", "train.log_every=3", "train.keep_checkpoints=2")
SIGNALS = ("train.steps=60", "train.save_every=1000", "train.log_every=1")


def main(corpus: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    for name in ("changes", "moments", "signals"):
        (folder / name).mkdir()
    result = {
        "changes": kill_at_changes(corpus, folder / "changes"),
        "moments": kill_at_moments(corpus, folder / "moments" / "run"),
        "signals": [send(corpus, folder / "signals", number) for number in (signal.SIGINT, signal.SIGTERM)],
    }
    print(json.dumps(result))


def kill_at_changes(corpus: Path, folder: Path) -> int:
    for change in itertools.count(1):
        run = folder / str(change)

        def work(run: Path = run, change: int = change) -> None:
            kill_before(change, f"{run}")
            finish(recipe(corpus, *CHANGES), run)

        _, status = os.waitpid(forked(work), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return change - 1
    raise AssertionError


def kill_before(change: int, folder: str) -> None:
    """SIGKILL this process when it is about to make its `change`-th change in `folder`.

    Where a name is relative to an open directory, as in rmtree, it is taken as lying in `folder`.
    """
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            name = str(arguments[0])
            seen += name.startswith(folder) or "/" not in name
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_moments(corpus: Path, run: Path) -> int:
    moments, kills = random.Random(0), 6
    for _ in range(kills):
        child = forked(lambda: finish(recipe(corpus, *MOMENTS), run))
        wait_for_a_record(run)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run ended before it could be killed"
        check_loads(run)
    return kills


def send(corpus: Path, folder: Path, number: signal.Signals) -> int:
    """The exit code of `foretoken train` after the signal."""
    run = folder / number.name
    sets = [word for override in overrides(corpus, *SIGNALS) for word in ("--set", override)]

    def work() -> None:
        for stream, name in ((1, "out"), (2, "errors")):
            os.dup2(os.open(folder / f"{name}-{number.name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["foretoken", "train", "tiny", "--out", str(run), *sets]
        cli.main()

    child = forked(work)
    wait_for_a_record(run)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for_a_record(run: Path) -> None:
    begun, end = lines(run), time.monotonic() + 60
    while lines(run) <= begun:
        assert time.monotonic() < end, f"{run} does not go on"
        time.sleep(0.005)


def forked(work: Callable[[], object]) -> int:
    """Process id of a child that does `work`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
