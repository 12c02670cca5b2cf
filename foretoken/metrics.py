"""What training measures: sums over steps, the records made of them, and where the records go."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from foretoken.config import Recipe, TrainConfig
from foretoken.errors import CheckpointError, ConfigError, TrainingError
from foretoken.loss import LossOutput, agreement, predicted_tokens_per_step

Record = dict[str, Any]
FILE = "metrics.jsonl"


class Meter:
    """Sums of what loss passes give, per head, until `take` makes a record of them and starts anew."""

    def __init__(
        self, n: int, tokens_per_byte: float, compared: bool = True,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:  # fmt: skip
        self.n, self.tokens_per_byte, self.total = n, tokens_per_byte, total  # total: over the processes
        self.compared = compared  # whether heads are of the n next tokens, so that they can agree with head 1
        self._reset()

    def _reset(self) -> None:
        names = ("loss", "count", "correct", "agreed", "pairs", "accepted")
        self.sums = {name: torch.zeros(self.n, dtype=torch.float64) for name in names}
        self.positions: torch.Tensor | int = 0

    def add(self, output: LossOutput, counts: torch.Tensor, document_ids: torch.Tensor) -> None:
        """Add one pass: its output, its valid targets (n,), and the document ids (B, T + n) of its windows."""
        values = {"loss": output.sums, "count": counts, "correct": output.correct}
        if self.compared:
            agreed = agreement(output.predictions, document_ids)
            accepted = torch.nn.functional.pad(agreed.accepted, (1, 0))  # nothing drafts head 1's token
            values |= {"agreed": agreed.agreed, "pairs": agreed.count, "accepted": accepted}
            self.positions = agreed.positions + self.positions
        for name, value in values.items():  # where they are: no micro-batch waits for its sums
            self.sums[name] = value + self.sums[name].to(value.device, non_blocking=True)

    def take(self, kind: str, step: int) -> Record:
        """The record of everything added since the last one; a head with no target has None."""
        sums = {name: self.total(values) for name, values in self.sums.items()}
        positions = self.total(torch.as_tensor(self.positions))
        loss, bits = sums["loss"], self.tokens_per_byte / math.log(2)
        record = {
            "kind": kind,
            "step": step,
            "loss": _means(loss, sums["count"]),
            "bits_per_byte": _means(loss * bits, sums["count"]),
            "top1": _means(sums["correct"], sums["count"]),
            "agreement": _means(sums["agreed"], sums["pairs"]),
            "count": sums["count"].long().tolist(),
            "predicted_tokens_per_step": predicted_tokens_per_step(sums["accepted"], positions),
        }
        self._reset()
        return record

    def state(self) -> Record:
        """What is added and not yet taken, in all processes, as JSON values, for `restore`."""
        sums = {name: self.total(values).tolist() for name, values in self.sums.items()}
        return {"positions": int(self.total(torch.as_tensor(self.positions))), **sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises CheckpointError for one of another shape."""
        try:
            self.positions = int(state["positions"])
            self.sums = {name: torch.tensor(state[name], dtype=torch.float64) for name in self.sums}
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("the training state's unlogged.json is not what training saved") from None
        if any(total.shape != (self.n,) for total in self.sums.values()):
            raise CheckpointError(f"the training state's unlogged.json is not of {self.n} heads")


def _means(sums: torch.Tensor, counts: torch.Tensor) -> list[float | None]:
    return [value / count if count else None for value, count in zip(sums.tolist(), counts.tolist(), strict=True)]


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """A run's metrics.jsonl, and TensorBoard and Weights & Biases when the recipe asks for them.

    Records of steps after `step` are dropped first: a resumed run repeats them. silent: of processes but the first.
    """

    def __init__(
        self, run: Path, step: int, recipe: Recipe, report: Callable[[Record], None], silent: bool = False
    ) -> None:
        self.silent = silent
        if silent:
            return
        self.path = run / FILE
        if self.path.exists():
            kept = "".join(f"{line}\n" for line in self.path.read_text().splitlines() if _step(line) <= step)
            rewritten = self.path.with_suffix(".rewritten")
            rewritten.write_text(kept)
            os.replace(rewritten, self.path)
        self.file = self.path.open("a", encoding="utf-8")
        extra = _extra_writers(run, recipe)
        self.writers = [report, *(write for write, _ in extra)]
        self.closers = [close for _, close in extra]

    def __exit__(self, *_: object) -> None:
        if self.silent:
            return
        for close in self.closers:
            close()
        with suppress(OSError):  # nothing is left to write, but for a record that has failed already
            self.file.close()

    def write(self, record: Record) -> None:
        """Append a record and hand it to the other writers. Raises TrainingError when it cannot be written."""
        if self.silent:
            return
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written: {error.strerror}") from None
        for writer in self.writers:
            writer(record)


def _step(line: str) -> float:
    """Step of a line of metrics.jsonl, infinite for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_extras(config: TrainConfig) -> None:
    """Raises ConfigError when the recipe asks for a writer that is not installed."""
    for wanted, package, option in (
        (config.tensorboard, "tensorboard", "tensorboard"),
        (config.wandb_project, "wandb", "wandb_project"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"train.{option} needs: pip install 'foretoken[{package}]'")


def _extra_writers(run: Path, recipe: Recipe) -> list[tuple[Callable[[Record], None], Callable[[], None]]]:
    """What TensorBoard and Weights & Biases need: a function for each record and one for the end."""
    writers: list[tuple[Callable[[Record], None], Callable[[], None]]] = []
    if recipe.train.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run))

        def to_tensorboard(record: Record) -> None:
            for name, value in _flat(record).items():
                board.add_scalar(name, value, record["step"])

        writers.append((to_tensorboard, board.close))
    if recipe.train.wandb_project:
        import wandb

        session = wandb.init(project=recipe.train.wandb_project, dir=str(run), config=recipe.model_dump(mode="json"))
        writers.append((lambda record: session.log(_flat(record), step=record["step"]), session.finish))
    return writers


def _flat(record: Record) -> dict[str, float]:
    """Numbers of a record by name, a list's as name/head_1, name/head_2 and so on."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat |= {f"{record['kind']}/{key}/head_{i + 1}": v for i, v in enumerate(value) if v is not None}
        elif isinstance(value, int | float) and key != "step":
            flat[f"{record['kind']}/{key}"] = value
    return flat
