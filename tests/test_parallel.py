"""Several processes give what one gives: losses and gradients, runs that others go on with, and errors."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import overrides, recipe, weights

from foretoken.checkpoint import load_model, newest_step, step_checkpoints
from foretoken.errors import ConfigError
from foretoken.files import read_json
from foretoken.parallel import ALONE, join_world, like, whole
from foretoken.train import train

WORKER = Path(__file__).with_name("parallel_worker.py")
STEPS = ("train.steps=6", "train.save_every=2", "train.keep_checkpoints=3", "train.batch_size=8", "train.log_every=2",
         "train.eval_every=2")  # fmt: skip


def together(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parents[1]}:{WORKER.parent}"}
    if processes == 1:
        command = [sys.executable]
    return subprocess.run(
        [*command, str(WORKER), *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.parametrize(
    ("processes", "within", "kind"),
    [
        (2, 0, "parallel"),
        (2, 0, "sequential"),
        (4, 2, "parallel"),
        (4, 0, "parallel per_head"),
        (2, 0, "parallel shared sequential"),
        (4, 2, "parallel per_head sequential"),
        (2, 0, "parallel per_head sequential frozen"),
    ],
)
def test_loss_and_gradients_of_one_process(processes: int, within: int, kind: str) -> None:
    """Counts are summed over processes; in float64 to the last digits. 4 within 2: two copies, each in two parts.

    kind: of heads, and of their unembeddings, how the loss is taken, and whether further heads alone learn.
    """
    done = together(processes, "gradients", within, kind)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("processes", [2, 4])
def test_one_process_alone_has_a_model_whole(processes: int, corpus: Path) -> None:
    """The others hold their part, and a tensor at a time of the rest; the weights are those of a run of one process."""
    done = together(processes, "start", corpus)
    assert done.returncode == 0, done.stderr


def run(processes: int, corpus: Path, out: Path, *more: str, resume: bool = False, stop: str = "") -> Any:
    return together(processes, "run", corpus, out, "resume" if resume else "new", stop, *STEPS, *more)


def close_runs(found: Path, wanted: Path) -> None:
    """The same but for the rounding of sums in another order, in weights and in every record."""
    a, b = weights(found), weights(wanted)
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)
    records = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (found, wanted)
    ]
    assert len(records[0]) == len(records[1]) > 3
    for x, y in zip(*records, strict=True):
        assert (x["kind"], x["step"], x["count"]) == (y["kind"], y["step"], y["count"])
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
        assert x.get("gradient_norm", 0.0) == pytest.approx(y.get("gradient_norm", 0.0), rel=1e-2)


def test_a_run_that_goes_on_with_others(corpus: Path, tmp_path: Path) -> None:
    """Two processes, then four, then one: the run that one process makes."""
    train(recipe(corpus, *STEPS), tmp_path / "one")
    out = tmp_path / "parts"
    for processes, left in ((2, "checkpoint-2"), (4, "checkpoint-4")):
        assert run(processes, corpus, out, resume=processes == 4, stop="interrupt 3").returncode != 0
        assert (newest_step(out) or Path()).name == left
    done = run(1, corpus, out, resume=True)
    assert done.returncode == 0, done.stderr
    close_runs(out, tmp_path / "one")


def test_slurm_starts_them_too(corpus: Path, tmp_path: Path) -> None:
    """By its own variables, and the command that one process is started with; here the loss is taken head by head."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = (*STEPS, "loss.method=sequential", "train.micro_batch_size=2")
    sets = [part for change in overrides(corpus, *asked) for part in ("--set", change)]
    command = [sys.executable, "-m", "foretoken", "train", "tiny", "--out", str(tmp_path / "run"), *sets]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        started.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    train(recipe(corpus, *asked), tmp_path / "one")
    close_runs(tmp_path / "run", tmp_path / "one")


def test_a_killed_process_ends_all_and_harms_no_checkpoint(corpus: Path, tmp_path: Path) -> None:
    done = run(2, corpus, tmp_path / "run", stop="kill 3")
    assert done.returncode != 0
    assert "Signal 9" in done.stderr
    assert (
        "TrainingError: rank 0 of 2: another process has ended without a word; the last good checkpoint is"
        in done.stderr
    )
    saved = newest_step(tmp_path / "run")
    assert saved is not None
    load_model(saved, None)
    assert run(2, corpus, tmp_path / "run", resume=True).returncode == 0
    assert load_model(tmp_path / "run", None).config.n_future == 3


def test_a_signal_to_one_stops_all(corpus: Path, tmp_path: Path) -> None:
    """As a scheduler sends it before it takes the machine away: all save the same step."""
    done = run(2, corpus, tmp_path / "run", stop="term 3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] in (3, 4)  # the one that was under way when it came
    assert not json.loads(done.stdout)["finished"]
    assert read_json((newest_step(tmp_path / "run") or Path()) / "foretoken.json")["step"] in (3, 4)


def test_what_is_no_number_in_one_process_stops_all(corpus: Path, tmp_path: Path) -> None:
    done = run(2, corpus, tmp_path / "run", stop="nan 3")
    assert done.returncode != 0
    assert done.stderr.count("TrainingError: step 4") >= 2


def test_out_of_memory_and_a_full_disk_in_one_process(corpus: Path, tmp_path: Path) -> None:
    """All end with the reason of the one that has it; the run goes on from its last checkpoint, here in one process."""
    out = tmp_path / "run"
    done = run(2, corpus, out, stop="memory 3")
    assert done.returncode != 0
    reason = (
        r"TrainingError: rank 1 of 2: out of memory \(.*you tried to allocate.*\); lower train.micro_batch_size, now 4"
    )
    left = rf"the last good checkpoint is {out}/checkpoint-2"
    assert len(re.findall(f"{reason}, and --resume; {left}", done.stderr)) == 2, done.stderr
    done = run(2, corpus, out, resume=True, stop="full 1")
    assert done.returncode != 0
    assert f"CheckpointError: {out}/checkpoint-4: cannot be written: " in done.stderr
    assert len(re.findall(f"Error: .*; {left}", done.stderr)) == 2, done.stderr
    assert [path.name for path in step_checkpoints(out)] == ["checkpoint-2"]
    assert train(recipe(corpus, *STEPS), out, resume=True).finished
    train(recipe(corpus, *STEPS), tmp_path / "one")
    close_runs(out, tmp_path / "one")


def test_tensors_are_gathered_as_they_are_written(corpus: Path, tmp_path: Path) -> None:
    """Without async_save the first process holds one of them whole at a time; a disk that is full ends all."""
    waiting, out = "train.async_save=false", tmp_path / "run"
    done = run(2, corpus, out, waiting, stop="full 3")
    assert done.returncode != 0
    assert f"CheckpointError: {out}/checkpoint-4: cannot be written: " in done.stderr
    assert len(re.findall(f"Error: .*; the last good checkpoint is {out}/checkpoint-2", done.stderr)) == 2, done.stderr
    done = run(2, corpus, out, waiting, resume=True, stop="gathered 0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[1-9]\d+ gathered", done.stderr, re.M)
    train(recipe(corpus, *STEPS), tmp_path / "one")
    close_runs(out, tmp_path / "one")


def test_no_memory_for_a_tensor_that_the_others_are_giving(corpus: Path, tmp_path: Path) -> None:
    done = run(2, corpus, tmp_path / "run", "train.async_save=false", stop="lost 1")
    assert done.returncode != 0
    assert "rank 0 of 2: out of memory" in done.stderr
    assert not newest_step(tmp_path / "run")


def test_slurm_s_tasks_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="srun starts 2 tasks, but MASTER_ADDR is not set"):
        join_world("cpu")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # in a batch script itself there is one process
    assert join_world("cpu").size == 1


def test_rows_that_do_not_divide(corpus: Path, tmp_path: Path) -> None:
    done = run(2, corpus, tmp_path / "run", "train.batch_size=3")
    assert "batch_size = 3 is not a multiple of the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_alone_nothing_is_sharded() -> None:
    tensor = torch.ones(3)
    assert whole(tensor) is tensor
    assert torch.equal(like(tensor, torch.zeros(3)), tensor)
    assert ALONE.total(tensor) is tensor
    assert not ALONE.any(False)
    with pytest.raises(ZeroDivisionError):
        ALONE.first_does(lambda: 1 // 0)
