"""Training runs of a second or less, and what tests ask of the folders they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from foretoken.checkpoint import find_checkpoint, load_checkpoint, load_model, newest_step, step_checkpoints
from foretoken.config import Recipe
from foretoken.errors import CheckpointError
from foretoken.recipe import load_recipe
from foretoken.train import TrainResult, train

TIMINGS = ("seconds", "seconds_left", "tokens_per_second")


def write_corpus(folder: Path) -> Path:
    """Twelve short files in `folder`/text, easy to learn, with document bounds in most windows."""
    (folder / "text").mkdir(parents=True)
    for i in range(12):
        lines = [f"def add_{i}(x, y):\n    return x + y + {j % 7}\n" for j in range(3 + i % 3)]
        (folder / "text" / f"{i}.py").write_text("\n".join(lines))
    return folder


def overrides(corpus: Path, *more: str) -> tuple[str, ...]:
    """What makes the recipe `tiny` train on `corpus`, exactly and in a moment; then `more`."""
    return (
        f'data.source=["{corpus}/text"]',
        f"data.cache_dir={corpus}/cache",
        "data.validation_fraction=0.2",
        "train.precision=float32",
        "train.seq_len=32",
        "train.eval_windows=4",
        *more,
    )


def recipe(corpus: Path, *more: str) -> Recipe:
    return load_recipe("tiny", overrides(corpus, *more))


def retrofitted(plain: Path, corpus: Path, *more: str) -> Recipe:
    """Three steps of the recipe `retrofit` on the checkpoint `plain`."""
    common = [text for text in overrides(corpus) if not text.startswith("train.seq_len")]
    steps = ("train.steps=3", "train.batch_size=4", "train.save_every=2", "train.seq_len=32", "optim.warmup_steps=0")
    return load_recipe("retrofit", (f"model.start_from={plain}", *common, *steps, *more))


def finish(wanted: Recipe, run: Path) -> TrainResult:
    """Begin the run, or go on with what an earlier process left in its folder."""
    begun = newest_step(run) is not None or (run / "metrics.jsonl").exists()
    return train(wanted, run, resume=begun)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load_model(find_checkpoint(folder), None).named_parameters()}


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close_weights(a: Path, b: Path, tolerance: float) -> None:
    second = weights(b)
    for name, value in weights(a).items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=tolerance, msg=name)


def records(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_loads(run: Path) -> None:
    """Whatever has a checkpoint's name is one, and the newest is found; or there is none yet."""
    for folder in step_checkpoints(run):
        load_checkpoint(folder)
        assert (folder / "train_state" / "optimizer.safetensors").is_file()
    try:
        load_checkpoint(run)
    except CheckpointError:
        assert not step_checkpoints(run)
        assert not (run / "config.json").exists()


def lines(run: Path) -> int:
    """Records in the run's metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
