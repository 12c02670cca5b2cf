"""Options and output that the commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Checkpoint = Annotated[str, typer.Argument(help="A checkpoint directory or the folder of a run.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16. Default: as stored.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU when there is one.")]


def print_json(values: dict[str, Any]) -> None:
    """One JSON object, and nothing else, on standard output; null for a figure that is no number."""
    print(json.dumps(json.loads(json.dumps(values), parse_constant=lambda _: None)))


def dtype_of(name: str) -> str | None:
    """What --dtype means to `load_checkpoint`."""
    from foretoken.errors import ConfigError

    if name not in ("", "float32", "bfloat16"):
        raise ConfigError(f"--dtype {name}: must be float32 or bfloat16")
    return name or None


def device_of(name: str) -> str:
    """What --device means to `load_checkpoint`."""
    import torch

    from foretoken.errors import ConfigError

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no usable GPU")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
