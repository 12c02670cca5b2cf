"""What an error amid training becomes: in every process one line that says why, what to do and what is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from foretoken.config import TrainConfig
from foretoken.errors import ForetokenError, TrainingError
from foretoken.parallel import World
from foretoken.run_folder import what_is_left

WORD = "failed"  # the key under which a process that fails leaves word for the others


@contextmanager
def explained(run: Path, config: TrainConfig, world: World) -> Iterator[None]:
    """Around a run's steps: errors of ours say what is left of the run, and two kinds more become TrainingErrors.

    Out of memory, with what to lower; and what goes wrong because another process is no longer there, with what that
    one failed of, where it left word. Any other error passes as it is.
    """
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, ForetokenError) else _out_of_memory(error, config, world)
        if world.size > 1:
            known = known or _of_another(error, world)
            _leave_word(known or error, world)
        if known is None:
            raise
        raise type(known)(f"{known}; {what_is_left(run)}") from None


def _out_of_memory(error: Exception, config: TrainConfig, world: World) -> TrainingError | None:
    """torch raises an error of its own for a GPU's memory, and a RuntimeError for that of a CPU."""
    text = " ".join(str(error).split())
    told = isinstance(error, RuntimeError) and ("out of memory" in text or "DefaultCPUAllocator" in text)
    if not told and not isinstance(error, MemoryError):
        return None
    who = f"rank {world.rank} of {world.size}: " if world.size > 1 else ""
    size = config.micro_batch_size or config.batch_size // world.size
    advice = f"lower train.micro_batch_size, now {size}, and --resume"
    if size == 1:
        advice = "a window at a time is too much already: lower train.seq_len, or the model's size, in a new run"
    return TrainingError(f"{who}out of memory ({text[:200] or type(error).__name__}); {advice}")


def _of_another(error: Exception, world: World) -> TrainingError | None:
    """What an error of an exchange with other processes says, None for an error of another kind."""
    if not isinstance(error, RuntimeError):
        return None
    if word := _word(world):
        return TrainingError(word)
    if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
        return None
    return TrainingError(f"rank {world.rank} of {world.size}: another process has ended without a word")


def _leave_word(error: Exception, world: World) -> None:
    name = "" if isinstance(error, ForetokenError) else f"{type(error).__name__}: "
    if world.store is not None and not _word(world):
        with suppress(RuntimeError):  # the process that holds the store is gone
            world.store.set(WORD, f"{name}{' '.join(str(error).split())}")


def _word(world: World) -> str | None:
    """The word that a process has left."""
    with suppress(RuntimeError):
        if world.store is not None and world.store.check([WORD]):
            return str(world.store.get(WORD), "utf-8")
    return None
