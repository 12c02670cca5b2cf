"""What a person sees: progress on standard error while something runs, results on standard output."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from foretoken.completion import Generation
from foretoken.metrics import Record
from foretoken.train import TrainResult

Item = TypeVar("Item")
HEAD_STYLES = ("default", "black on green3", "black on turquoise2", "black on orchid1", "black on gold1")
LINE_SECONDS = 10.0  # between two lines where standard error is not a terminal


class Display(AbstractContextManager["Display"]):
    """Progress of one command. On a terminal it is redrawn in place, elsewhere a line appears now and then.

    quiet_text: print no results, for commands whose only standard output is one JSON object.
    """

    def __init__(self, quiet_text: bool = False) -> None:
        self.errors = Console(stderr=True, highlight=False)
        self.out = Console(highlight=False, quiet=quiet_text)
        self.live: Live | None = None
        self.last_line = 0.0
        self.steps = 0

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def record(self, record: Record) -> None:
        """Show a record of training; `train` calls it as its `report`."""
        if record["kind"] == "prepare":
            self.say("Preparing data ...")
        elif record["kind"] == "start":
            self.steps = record["steps"]
            first = f", from step {record['step']}" if record["step"] else ""
            self.say(f"Training {record['parameters'] / 1e6:.1f}M parameters for {self.steps} steps{first}")
        elif record["kind"] == "train":
            last = record["step"] >= self.steps
            steps = self.steps
            self._progress(lambda: _training_table(record, steps), lambda: _training_line(record, steps), last)
        elif record["kind"] == "validation":
            self.say(f"  held-out text at step {record['step']}: {_per_head(record['bits_per_byte'])} bits per byte")

    def say(self, text: str) -> None:
        """A line of progress."""
        self.errors.print(text, markup=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """A line of results, whole, however wide the terminal is."""
        self.out.print(text, markup=False, soft_wrap=True)

    def progress(self, text: str, last: bool = False) -> None:
        """A line of progress that replaces the one before on a terminal."""
        self._progress(lambda: text, lambda: text, last)

    def count(self, what: str) -> Callable[[int], None]:
        """A function that shows how many there are so far."""
        return lambda number: self.progress(f"{number:,} {what}")

    def counted(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """The items, while it is shown how many there have been."""
        show = self.count(what)
        for number, item in enumerate(items, 1):
            show(number)
            yield item

    def table(self, values: dict[str, Any]) -> None:
        """Names and values, one a line."""
        grid = Table.grid(padding=(0, 2))
        for key, value in values.items():
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            grid.add_row(key.replace("_", " "), Text(shown))
        self.out.print(grid)

    def engines(self, rows: list[dict[str, Any]]) -> None:
        """What each engine can do with a checkpoint, each with its commands or the reason why it cannot."""
        for row in rows:
            drafts = f", {row['drafts']} a step" if row["drafts"] else ""
            self.out.print(Text(f"{row['engine']}: {row['runs']}{drafts}", "bold" if row["works"] else "dim"))
            for line in row["commands"] or [f"no: {row['reason']}"]:
                self.result(f"    {line}")
            if row["works"]:
                self.result(f"    # tested by: {row['tested']}")

    def evaluation(self, values: dict[str, Any]) -> None:
        """What `evaluate` found, as a table per head."""
        self._end_live()
        table = Table("head", "bits per byte", "95 % interval", "top-1", "agrees with head 1", "targets", box=None)
        for head in values["heads"]:
            if head["count"]:
                low, high = head["interval"]
                table.add_row(
                    f"t+{head['offset']}", f"{head['bits_per_byte']:.3f}", f"{low:.3f} - {high:.3f}",
                    f"{head['top1']:.3f}", f"{head['agreement']:.3f}", f"{head['count']:,}",
                )  # fmt: skip
        self.out.print(table)
        self.result(
            f"{values['documents']} documents, {values['bytes']:,} bytes; "
            f"predicted tokens per step {values['predicted_tokens_per_step']:.2f}"
        )
        for name, part in values["domains"].items():
            first, steps = part["heads"][0]["bits_per_byte"], part["predicted_tokens_per_step"]
            self.result(f"  {name}: {_shown(first)} bits per byte, {steps:.2f} tokens per step")

    def trained(self, result: TrainResult) -> None:
        """How training ended."""
        self._end_live()
        if result.finished:
            self.result(f"Trained {result.step} steps in {result.seconds:.0f} s: {result.checkpoint}")
        else:
            self.result(f"Stopped at step {result.step}, saved as {result.checkpoint}; --resume goes on from there")

    def side_by_side(self, plain: Generation, drafted: Generation, pieces: list[str]) -> None:
        """A prompt's two outputs next to each other, each token of the second coloured by the head that drafted it."""
        self._end_live()
        coloured = Text()
        for piece, head in zip(pieces, drafted.sources, strict=True):
            coloured.append(piece, HEAD_STYLES[(head - 1) % len(HEAD_STYLES)])
        table = Table("plain", "self-speculative", show_lines=True, expand=True)
        table.add_row(Text(plain.text), coloured)
        self.out.print(Text(f"... {plain.prompt[-160:]}", "dim"), table)

    def legend(self, n: int) -> None:
        """Which colour is which head."""
        text = Text("Each token by the head that drafted it: ")
        for head in range(1, n + 1):
            text.append(f" head {head} ", HEAD_STYLES[(head - 1) % len(HEAD_STYLES)])
            text.append(" ")
        self.out.print(text)

    def next_commands(self, result: dict[str, Any]) -> None:
        """What a newcomer may want after the demo."""
        folder = result["checkpoint"]
        command = "foretoken" if shutil.which("foretoken") else sys.argv[0]
        self.result(
            f"\nThe report with plots: {folder}/report.html\nNext:\n"
            f'  {command} generate {folder} "def read(" --max-tokens 200\n'
            f"  {command} evaluate {folder}\n"
            f"  {command} train demo --out runs/mine --set data.source='[\"my/code\"]' --set train.steps=1000"
        )

    def _progress(self, drawn: Callable[[], Any], line: Callable[[], str], last: bool) -> None:
        if self.errors.is_terminal:
            if self.live is None:
                self.live = Live(console=self.errors, refresh_per_second=4, transient=True)
                self.live.start()
            self.live.update(drawn())
            if last:
                self._end_live()
        if not self.errors.is_terminal or last:
            now = time.monotonic()
            if last or now - self.last_line >= LINE_SECONDS:
                self.last_line = now
                self.say(line())

    def _end_live(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def summary(generation: Generation) -> None:
    """What a generation took, on standard error."""
    count, steps = len(generation.ids), len(generation.steps)
    rate, reason = generation.tokens_per_step, generation.finish_reason
    print(f"{count} tokens in {steps} steps: {rate:.2f} tokens per step ({reason})", file=sys.stderr)


def _training_table(record: Record, steps: int) -> Group:
    table = Table("head", "bits per byte", "top-1", "agrees with head 1", box=None)
    for depth, values in enumerate(zip(record["bits_per_byte"], record["top1"], record["agreement"], strict=True)):
        table.add_row(f"t+{depth + 1}", *map(_shown, values))
    done = round(30 * record["step"] / steps)
    bar = Text("#" * done + "-" * (30 - done), "green")
    return Group(bar + Text(f" {_training_line(record, steps, heads=False)}"), table)


def _training_line(record: Record, steps: int, heads: bool = True) -> str:
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    shown = f"  bits per byte {_per_head(record['bits_per_byte'])}" if heads else ""
    return (
        f"step {record['step']}/{steps}{shown}  tokens per step {record['predicted_tokens_per_step']:.2f} (predicted)  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {minutes}:{seconds:02d} left"
    )


def _per_head(values: list[float | None]) -> str:
    return " ".join(_shown(value, 2) for value in values)


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"  # of texts too short to predict anything
