"""Parallel heads, a sequential head and no further head, after the same time of training: what each gives and costs.

    python -m foretoken.lab.head_kinds all --out runs/head-kinds --minutes 3 10 --seeds 0 1 2

1. probe: a few steps of each arm, one after the other in rounds, so that all meet the same machine. Their median gives
   the steps that fit into the minutes; an arm whose steps cost more takes fewer.
2. train: the shipped recipe `demo`, an arm, a seed and a number of steps at a time. Finished runs are kept.
3. measure: held-out files scored by every head; held-out prompts continued plainly and with drafts, K by K.
4. report: one JSON of all figures, and the table in the docs that is made from it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from foretoken.config import Recipe
from foretoken.display import Display
from foretoken.files import read_json, write_json
from foretoken.metrics import Record
from foretoken.recipe import load_recipe
from foretoken.train import train

ARMS = {
    "one": ("model.n_future=1",),
    "parallel": ("model.n_future=4", "model.head_kind=parallel"),
    "sequential": ("model.n_future=4", "model.head_kind=sequential"),
}
DRAFTS = {"one": (), "parallel": (3,), "sequential": (3, 4, 5)}
PROBE_ROUNDS, PROBE_STEPS = 4, 15
NAME = "head-kinds"


def arm_recipe(arm: str, seed: int, steps: int) -> Recipe:
    """The demo's recipe for an arm; nothing is evaluated or saved on the way."""
    quiet = ("train.eval_every=0", f"train.save_every={steps + 1}")
    return load_recipe("demo", (*ARMS[arm], f"train.seed={seed}", f"train.steps={steps}", *quiet))


def probe(out: Path, arms: Sequence[str], display: Display) -> dict[str, float]:
    """Median seconds of a training step of each arm, measured once and kept in `out`/probe.json."""
    path = out / "probe.json"
    if path.exists():
        return read_json(path)["seconds_per_step"]  # type: ignore[no-any-return]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(PROBE_ROUNDS):
        for arm in arms:
            display.say(f"Timing steps: round {number + 1} of {PROBE_ROUNDS}, {arm}")
            recipe = arm_recipe(arm, 0, PROBE_STEPS)
            seconds[arm] += _step_seconds(recipe)[3:]  # the first ones warm up
    out.mkdir(parents=True, exist_ok=True)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    write_json(path, {"seconds_per_step": medians, "all": seconds, "machine": machine()})
    return medians


def _step_seconds(recipe: Recipe) -> list[float]:
    records: list[Record] = []
    timed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_every": 1, "eval_windows": 3})})
    with tempfile.TemporaryDirectory() as folder:
        train(timed, Path(folder) / "probe", report=records.append)
    per_step = recipe.train.batch_size * recipe.train.seq_len
    return [per_step / record["tokens_per_second"] for record in records if record["kind"] == "train"]


def machine() -> dict[str, Any]:
    """Where figures were measured."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name"),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def runs(out: Path, arms: Sequence[str], minutes: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Every (arm, minutes, seed, folder), short runs first."""
    for length in minutes:
        for seed in seeds:
            for arm in arms:
                yield arm, length, seed, out / f"{arm}-{length:g}min-seed{seed}"


def train_all(out: Path, arms: Sequence[str], minutes: Sequence[float], seeds: Sequence[int], display: Display) -> None:
    """Train what is not trained yet."""
    seconds = probe(out, arms, display)
    for arm, length, seed, folder in runs(out, arms, minutes, seeds):
        if (folder / "config.json").exists():
            continue
        steps = round(length * 60 / seconds[arm])
        display.say(f"{folder.name}: {steps} steps")
        if not train(arm_recipe(arm, seed, steps), folder, resume=folder.exists(), report=display.record).finished:
            raise KeyboardInterrupt


def main() -> None:
    """Entry point of `python -m foretoken.lab.head_kinds`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("probe", "train", "measure", "report", "all"))
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME)
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    options = parser.parse_args()
    with Display() as display:
        if options.stage in ("probe", "train", "all"):
            probe(options.out, tuple(ARMS), display)
        if options.stage in ("train", "all"):
            train_all(options.out, options.arms, options.minutes, options.seeds, display)


if __name__ == "__main__":
    main()
