"""`foretoken export`: a checkpoint for other engines, and how they are started on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretoken.cli_common import Checkpoint, Json, print_json

export = typer.Typer(help="Write a checkpoint for other engines.", rich_markup_mode=None)


@export.command("hf", epilog="Example: foretoken export hf runs/demo runs/demo-hf")
def export_hf(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="A new directory for the model.")],
    as_json: Json = False,
) -> None:
    """Model and heads as one transformers class, whose generate(use_mtp=True) drafts with all heads."""
    from foretoken.formats.engines import hf_commands
    from foretoken.formats.hf_class import export_hf as run

    folder = run(checkpoint, out)
    _print({"model": str(folder), "commands": hf_commands(folder)}, as_json)


@export.command("eagle3", epilog="Example: foretoken export eagle3 runs/demo runs/demo-eagle3")
def export_eagle3(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="A new directory for the drafter.")],
    as_json: Json = False,
) -> None:
    """The drafter as an EAGLE-3 directory with its own unembedding, for SGLang and TensorRT-LLM.

    vLLM drafts with a sequential head's mtp_heads/ as it is.
    """
    from foretoken.formats.eagle3 import export_eagle3 as run
    from foretoken.formats.engines import eagle3_commands

    folder = run(checkpoint, out)
    _print({"drafter": str(folder), "commands": eagle3_commands(checkpoint, folder)}, as_json)


@export.command("gguf", epilog="Example: foretoken export gguf runs/demo runs/demo-gguf --dtype q8_0")
def export_gguf(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="A new directory for the files.")],
    dtype: Annotated[str, typer.Option(help="Type of the matrices: f32, f16, bf16 or q8_0.")] = "bf16",
    drafter: Annotated[bool, typer.Option(help="Write the heads too.")] = True,
    as_json: Json = False,
) -> None:
    """Model and drafter for llama.cpp: model.gguf and eagle3.gguf."""
    from foretoken.formats.engines import gguf_command
    from foretoken.formats.gguf import export_gguf as run

    files = [str(path) for path in run(checkpoint, out, dtype, drafter)]
    _print({"files": files, "commands": {"llama_server": gguf_command(checkpoint, files)}}, as_json)


def _print(values: dict[str, object], as_json: bool) -> None:
    """One JSON object, or what was written and the commands, one a line."""
    from foretoken.display import Display

    if as_json:
        print_json(values)
        return
    lines: list[str] = []
    for value in values.values():
        lines += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [str(value)]
    Display().result("\n".join(lines))
