"""A run's checkpoints: copied between two steps and written by a thread while training goes on, or written at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from foretoken.checkpoint import STEP_PREFIX, Contents, gather_checkpoint, prune, save_checkpoint, write_checkpoint
from foretoken.config import TrainConfig
from foretoken.errors import ForetokenError
from foretoken.model import Model
from foretoken.parallel import World
from foretoken.provenance import Provenance
from foretoken.tokenizer import Tokenizer


class Saver(AbstractContextManager["Saver"]):
    """Saves the checkpoints of the run in a folder, one write at a time; old ones go when a new one is complete.

    With `train.async_save`, `save` copies what is to be saved and returns while the first process's thread writes it.
    All processes call its methods together. Leaving it as a context waits for the write, whatever has happened.
    """

    def __init__(self, run: Path, config: TrainConfig, tokenizer: Tokenizer, world: World) -> None:
        self.run, self.config, self.tokenizer, self.world = run, config, tokenizer, world
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.thread.shutdown()
        failure = self.writing.exception() if self.writing else None
        if isinstance(error, ForetokenError) and failure:
            raise type(error)(f"{error}; {failure}") from None

    @property
    def failed(self) -> bool:
        """Whether a write of this process has failed, so that `save` and `wait` will raise its error."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Return when what was saved is on the disk. Raises CheckpointError where it could not be written."""

        def end() -> None:
            writing, self.writing = self.writing, None
            if writing is not None:
                writing.result()

        self.world.first_does(end)

    def save(
        self, step: int, model: Model, provenance: Provenance, optimizers: Sequence[torch.optim.Optimizer],
        unlogged: Mapping[str, Any],
    ) -> Path:  # fmt: skip
        """Save checkpoint-STEP, when the save before it is written. Raises CheckpointError where that one failed."""
        self.wait()
        path, everything = self.run / f"{STEP_PREFIX}{step}", (provenance, optimizers, unlogged, self.world)
        if not self.config.async_save:
            save_checkpoint(path, model, self.tokenizer, *everything)
            self.world.first_does(lambda: prune(self.run, self.config.keep_checkpoints))
            return path
        contents = gather_checkpoint(model, self.tokenizer, *everything)
        if self.world.first:
            self.writing = self.thread.submit(self._write, path, contents)
        return path

    def finish(self, model: Model, provenance: Provenance) -> None:
        """Write the finished run's checkpoint into its folder."""
        self.wait()
        save_checkpoint(self.run, model, self.tokenizer, provenance, world=self.world)

    def _write(self, path: Path, contents: Contents) -> None:
        write_checkpoint(path, contents)
        prune(self.run, self.config.keep_checkpoints)
