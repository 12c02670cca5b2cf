"""`foretoken import`, in the manner of `cli`: options read, the library called, results printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretoken.cli_common import Json, print_json

importing = typer.Typer(help="Bring in a model with heads that another program made.", rich_markup_mode=None)

Out = Annotated[Path, typer.Argument(help="A new directory for the checkpoint.")]


@importing.command("meta", epilog="Example: foretoken import meta multi-token-prediction/7B_1T_4 7b-mtp")
def import_meta(
    directory: Annotated[Path, typer.Argument(help="A folder with params.json and consolidated.pth.")],
    out: Out,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.model or tokenizer.json. Default: there, or in the folder above.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Meta's multi-token models, as released with the paper (facebook/multi-token-prediction)."""
    from foretoken.display import Display
    from foretoken.formats.meta import import_meta as run

    with Display(quiet_text=as_json) as display:
        run(directory, out, tokenizer, display.progress)
    _show(out, as_json)


@importing.command("fast-llm", epilog="Example: foretoken import fast-llm mtp-llama imported")
def import_fast_llm(
    directory: Annotated[Path, typer.Argument(help="A Hugging Face folder of MTPLlamaForCausalLM.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Fast-LLM's MTPLlamaForCausalLM, when its heads share a final norm."""
    from foretoken.display import Display
    from foretoken.formats.fast_llm import import_fast_llm as run

    with Display(quiet_text=as_json) as display:
        run(directory, out, display.progress)
    _show(out, as_json)


def _show(checkpoint: Path, as_json: bool) -> None:
    from foretoken.checkpoint import describe
    from foretoken.display import Display

    values = describe(checkpoint)
    print_json(values) if as_json else Display().table(values)
