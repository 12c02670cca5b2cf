"""The command line's benchmarks, in the manner of `cli`: options read, the library called, results printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foretoken.cli_common import device_of

bench = typer.Typer(help="Time decoding, or training, beside other ways to do it, in one run.", rich_markup_mode=None)


@bench.command("decode", epilog="Example: foretoken bench decode runs/demo --size 110m --out decode.json")
def decode(
    checkpoint: Annotated[str | None, typer.Argument(help="A checkpoint, decoded on held-out text.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text for its prompts, a domain each; any number.")] = None,
    split_field: Annotated[
        str | None, typer.Option(help="Field of records that says train: what it does not call so is taken.")
    ] = None,
    prompt_field: Annotated[
        str | None, typer.Option(help="Field of records that are prompts as they stand, texts or lists of texts.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="Random weights: 30m, 110m, 350m, 1b; any number.")] = None,
    head_kind: Annotated[
        str | None, typer.Option(help="Of the random weights: parallel, sequential, ... Default: parallel.")
    ] = None,
    n_future: Annotated[int | None, typer.Option(help="Of the random weights. Default: 4.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts at a time; any number. Default: 1.")] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Any number. Default: 0; for a checkpoint, 0 and 0.8.")
    ] = None,
    draft_vocab: Annotated[
        list[int] | None, typer.Option(help="Time drafts among so many first tokens too; any number.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens before random weights' timed ones. Default: 512.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are timed.")] = 64,
    prompts: Annotated[int | None, typer.Option(help="Of the checkpoint, per domain. Default: 8, or a batch.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, after one that warms up.")] = 3,
    dtype: Annotated[str, typer.Option(help="Type of the weights: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time transformers and llama.cpp too.")] = True,
    eager: Annotated[bool, typer.Option("--eager", help="Time our steps as PyTorch runs them, too.")] = False,
    random_heads: Annotated[
        bool,
        typer.Option("--random-heads", help="Spoil the checkpoint's further heads: the worst case of drafts that pay."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
) -> None:
    """Time decoding steps, plain and with drafts, beside transformers and llama.cpp on the same weights."""
    from foretoken.bench_decode import bench_decode, table
    from foretoken.display import Display

    with Display() as display:
        result = bench_decode(
            display, checkpoint=checkpoint, data=data or (), sizes=size or (), head_kind=head_kind, n_future=n_future,
            batches=batch or [1], temperatures=temperature or (), context=context, tokens=tokens,
            prompts=prompts, rounds=rounds, dtype=dtype, device=device_of(device), peers=peers,
            random_heads=random_heads, split_field=split_field, prompt_field=prompt_field,
            draft_vocabs=draft_vocab or (), eager=eager, out=out,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
        else:
            display.result(table(result["rows"]))
            display.result(f"memory: {result['bandwidth_gb_s']:.1f} GB/s, by the {result['bandwidth_measured']}")


@bench.command("train", epilog="Example: foretoken bench train --vocabulary 32000 --heads 1 --heads 4 --out train.json")
def train(
    vocabulary: Annotated[list[int] | None, typer.Option(help="Any number. Default: 256, 32000, 128256.")] = None,
    heads: Annotated[list[int] | None, typer.Option(help="n; any number. Default: 1, 2, 4, 8.")] = None,
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="chunked, sequential, naive, replicated; any number. Default: these. Others': liger, cce, cce_exact, "
            "torch."
        ),
    ] = None,
    width: Annotated[int, typer.Option(help="Of the model.")] = 512,
    blocks: Annotated[int, typer.Option(help="Of the model, with those of the further heads.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds, after one that warms up.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the products: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks with torch.compile.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")] = False,
) -> None:
    """Time training steps and their memory, by number of heads and by how their loss is taken."""
    from foretoken.bench_train import WAYS, bench_train, table
    from foretoken.display import Display

    with Display() as display:
        result = bench_train(
            display, vocabularies=vocabulary or (256, 32_000, 128_256), heads=heads or (1, 2, 4, 8), ways=way or WAYS,
            width=width, blocks=blocks, context=context, batch=batch, rounds=rounds, dtype=dtype,
            device=device_of(device), compiled=compiled, out=out,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(result))
        else:
            display.result(table(result["rows"]))
