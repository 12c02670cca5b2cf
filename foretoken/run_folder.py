"""What must hold of a run's folder, and of the checkpoint in it, before training begins or goes on there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from foretoken import metrics
from foretoken.checkpoint import newest_step, step_checkpoints
from foretoken.config import Recipe
from foretoken.data import Tokens
from foretoken.errors import CheckpointError, ConfigError
from foretoken.files import read_json
from foretoken.train_state import TRAIN_STATE

# What may differ between a run and its continuation: these decide what is written and where, not what is learned.
# Micro-batches change the rounding of sums alone, and a run that has met the end of its memory needs smaller ones.
FREE_TO_CHANGE = (
    "cache_dir", "log_every", "save_every", "keep_checkpoints", "async_save", "device", "compile", "micro_batch_size",
)  # fmt: skip


def check_folder(run: Path, resume: bool) -> None:
    """Raises ConfigError where a run cannot begin in, or go on in, this folder."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run}: is a file; the run needs a folder")
    above = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{run}: nothing can be written in {above}; choose another folder")
    if (run / "config.json").exists() and resume:
        raise ConfigError(f"{run}: this run is finished; nothing to resume")
    if resume and newest_step(run) is None and not (run / metrics.FILE).exists():
        raise ConfigError(f"{run}: no run that could be resumed; leave out --resume to begin one")
    if not resume and run.is_dir() and any(run.iterdir()):
        raise ConfigError(f"{run}: is not empty; continue that run with --resume or choose another folder")


def check_same_run(checkpoint: Path, recipe: Recipe, tokens: Tokens) -> None:
    """Raises ConfigError for a checkpoint of another recipe or other data, CheckpointError for one that is no run's."""
    stored = read_json(checkpoint / "foretoken.json")
    if not (checkpoint / TRAIN_STATE).is_dir():
        raise CheckpointError(f"{checkpoint}: has no {TRAIN_STATE}, so training cannot continue from it")
    recorded = stored.get("recipe")
    if not isinstance(recorded, Mapping) or not all(isinstance(section, Mapping) for section in recorded.values()):
        raise CheckpointError(f"{checkpoint}/foretoken.json: records no recipe, so training cannot continue from it")
    for section, wanted in recipe.model_dump(mode="json").items():
        for key, new in wanted.items():
            old = recorded.get(section, {}).get(key)
            if old != new and key not in FREE_TO_CHANGE:
                raise ConfigError(
                    f"{checkpoint}: was trained with {section}.{key} = {old}, the recipe says {new}; "
                    f"resume with the same recipe"
                )
    if stored.get("data_fingerprint") != tokens.fingerprint:
        raise ConfigError(f"{checkpoint}: the data have changed since; resume needs the same documents")


@contextmanager
def offering_older(checkpoint: Path | None) -> Iterator[None]:
    """Around what reads the checkpoint that a run goes on from: a CheckpointError says what to do without it."""
    try:
        yield
    except CheckpointError as error:
        if checkpoint is None:
            raise
        older = [path for path in step_checkpoints(checkpoint.parent) if path != checkpoint]
        advice = f"delete {checkpoint} and --resume goes on from {older[-1].name}" if older else "none older is there"
        raise CheckpointError(f"{error}; {advice}") from None


def what_is_left(run: Path) -> str:
    """What a run that fails has saved, in words."""
    newest = newest_step(run)
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint had been saved yet"
