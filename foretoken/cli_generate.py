"""`foretoken generate`, in the manner of `cli`: options read, the library called, results printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from foretoken.cli_common import (
    Checkpoint,
    Device,
    Dtype,
    Json,
    device_of,
    dtype_of,
    print_json,
    read_prompt,
    read_text,
    write,
)


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read it from a file; - is standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the highest probability.")] = 0.0,
    accept: Annotated[
        str, typer.Option(help="keyed: drafts change no text; rejection: more drafts accepted, text of the same law.")
    ] = "keyed",
    seed: Annotated[int, typer.Option(help="Same seed, same text, however it is decoded.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; any number of times.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Do not end before so many tokens.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Make tokens of prompt and text less likely; 1 is off.")
    ] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from logits of the text's tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each time they stand there.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="TOKEN_ID=BIAS, added to its logit; any number of times.")
    ] = None,
    json_schema: Annotated[Path | None, typer.Option(help="Text that follows the JSON schema in this file.")] = None,
    regex: Annotated[str, typer.Option(help="Text that follows this regular expression.")] = "",
    lark: Annotated[Path | None, typer.Option(help="Text that follows the Lark grammar in this file.")] = None,
    drafts: Annotated[
        int | None, typer.Option(help="Drafts per step; 0: plain decoding. Default: as many as pay.")
    ] = None,
    lookup: Annotated[
        int, typer.Option(help="Draft what followed the last so many tokens before, not with heads; 0 is off.")
    ] = 0,
    draft_model: Annotated[str, typer.Option(help="Draft with another checkpoint, not with heads.")] = "",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    dtype: Dtype = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, drafting with the extra heads. The text does not depend on the drafts."""
    from foretoken.checkpoint import load_checkpoint
    from foretoken.completion import Options, stream
    from foretoken.display import summary

    text = read_prompt(prompt, prompt_file)
    model, tokenizer = load_checkpoint(checkpoint, dtype_of(dtype), device_of(device))
    options: Options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "accept": cast(Any, accept), "seed": seed, "stop": stop or (), "min_tokens": min_tokens,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": _biases(logit_bias or ()), "regex": regex,
        "drafts": drafts, "lookup": lookup, "ignore_eos": ignore_eos,
    }  # fmt: skip
    if json_schema is not None:
        options["json_schema"] = read_text(json_schema)
    if lark is not None:
        options["lark"] = read_text(lark)
    if draft_model:
        options["draft_model"], _ = load_checkpoint(draft_model, dtype_of(dtype), device_of(device))
    final = None
    pieces = stream(model, tokenizer, text, **options)
    for piece, final in pieces:  # noqa: B007 - the last one is used below
        if not as_json:
            write(text + piece)  # the prompt too only now, when the options have been found right
            text = ""
    assert final is not None
    if as_json:
        print_json(final.to_json())
    else:
        write("\n")
        summary(final)


def _biases(given: Sequence[str]) -> dict[int, float]:
    from foretoken.errors import ConfigError

    biases = {}
    for word in given:
        token, _, bias = word.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ConfigError(f"--logit-bias {word}: must be TOKEN_ID=BIAS, such as 42=-1.5") from None
    return biases
