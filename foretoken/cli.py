"""The command line. No logic: each command reads its options, calls the library and prints.

Imports stand inside the commands, so that `foretoken --help` answers at once. Results go to standard output, progress
and errors to standard error. A user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from foretoken.bench_cli import bench
from foretoken.cli_common import Checkpoint, Device, Dtype, Json, device_of, dtype_of, print_json
from foretoken.cli_export import export
from foretoken.cli_generate import generate
from foretoken.cli_import import importing
from foretoken.lab.cli import lab

app = typer.Typer(
    name="foretoken",
    help="Train language models that predict the next n tokens, and decode with them: faster, and unchanged.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command(epilog="Example: foretoken demo --minutes 12 --width 192 --layers 10")
def demo(
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 6.0,
    n_future: Annotated[int, typer.Option(help="Tokens predicted at each position; 1 is an ordinary model.")] = 4,
    head_kind: Annotated[
        str, typer.Option(help="parallel: a head per token; sequential: one that drafts on.")
    ] = "sequential",
    drafts: Annotated[int | None, typer.Option(help="Drafts per step. Default: as many as pay.")] = None,
    width: Annotated[int, typer.Option(help="Width of the model (hidden_size), a multiple of 64.")] = 128,
    layers: Annotated[int, typer.Option(help="Blocks of the next-token path (num_hidden_layers).")] = 8,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to decode.")] = 24,
    max_tokens: Annotated[int, typer.Option(help="Tokens to decode per prompt.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; replaces an earlier demo.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train a byte-level model on Python's standard library, then decode with and without its extra heads."""
    from foretoken.demo import run_demo
    from foretoken.display import Display

    with Display(quiet_text=as_json) as display:
        result = run_demo(
            display, out, minutes, n_future, width, layers, head_kind=head_kind, drafts=drafts, prompt_count=prompts,
            max_tokens=max_tokens, seed=seed,
        )  # fmt: skip
    print_json(result) if as_json else display.next_commands(result)


@app.command(
    epilog="Example: foretoken train tiny --out runs/a --set train.steps=100 --set data.source='[\"src/*.py\"]'"
)
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML recipe, or the name of a shipped one such as tiny or demo.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/RECIPE.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="A checkpoint to begin with, ours or Hugging Face's, such as one without heads."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model as a recipe says. Ctrl-C finishes the step and saves; --resume goes on."""
    from foretoken.display import Display
    from foretoken.parallel import first_process, leave_world
    from foretoken.recipe import load_recipe
    from foretoken.train import train as run

    given = () if start is None else (f"model.start_from={json.dumps(start, ensure_ascii=False)}",)
    resolved = load_recipe(recipe, (*given, *(overrides or ())))
    folder = out or Path("runs") / Path(recipe).name.removesuffix(".toml")
    with Display(quiet_text=as_json) as display:
        try:
            result = run(resolved, folder, resume=resume, report=display.record)
        finally:
            leave_world()
    if not first_process():
        pass  # the first one says how it went
    elif as_json:
        print_json({
            "checkpoint": str(result.checkpoint), "step": result.step, "finished": result.finished,
            "train_seconds": result.seconds, "metrics": result.last,
        })  # fmt: skip
    else:
        display.trained(result)
    if not result.finished:
        raise typer.Exit(130)


app.command(epilog='Example: foretoken generate runs/demo "def main(" --max-tokens 100 --temperature 0.8 --seed 1')(
    generate
)


@app.command(
    "distil-data", epilog="Example: foretoken distil-data runs/demo --data src/ --out own.jsonl --records 2000"
)
def distil_data(
    checkpoint: Checkpoint,
    data: Annotated[list[str], typer.Option(help="Text for prompts: files, folders, globs, stdlib; any number.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file; one that was interrupted is gone on with.")],
    records: Annotated[int, typer.Option(help="How many it shall hold.")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="Of each response.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Record i uses seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 16,
    dtype: Dtype = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let a model write text, to train heads on: with data.prompt_field=prompt and data.response_field=response."""
    from foretoken.checkpoint import load_checkpoint
    from foretoken.config import DataConfig, validated
    from foretoken.data import documents
    from foretoken.display import Display
    from foretoken.distil_data import distil_data as run

    model, tokenizer = load_checkpoint(checkpoint, dtype_of(dtype), device_of(device))
    config = validated(DataConfig, {"source": data}, "options")
    texts = [document.text for document in documents(config, config.source)]
    with Display(quiet_text=as_json) as display:
        before = run(
            model, tokenizer, texts, out, records=records, max_tokens=max_tokens, temperature=temperature, seed=seed,
            batch_size=batch_size, display=display,
        )  # fmt: skip
    if as_json:
        print_json({"out": str(out), "records": records, "written": max(0, records - before)})


@app.command(epilog="Example: foretoken evaluate runs/demo src/ --json   (without DATA: what training held out)")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[list[str] | None, typer.Argument(help="Files, folders, globs, stdlib, hf:NAME.")] = None,
    split: Annotated[str | None, typer.Option(help="all, train or validation part of DATA.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of a record's text. Default: text.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="Field of a prompt, which is not scored.")] = None,
    response_field: Annotated[str | None, typer.Option(help="Field of the response to that prompt.")] = None,
    messages_field: Annotated[str | None, typer.Option(help="Field of a chat: the assistant is scored.")] = None,
    domain_field: Annotated[str | None, typer.Option(help="Field that names a record's domain.")] = None,
    split_field: Annotated[str | None, typer.Option(help="Field that says which split a record is of.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stop after this many bytes of text.")] = None,
    dtype: Dtype = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Bits per byte, accuracy and agreement of each head, and the tokens per step to expect.

    Without DATA, on what training held out.
    """
    from foretoken.checkpoint import load_checkpoint
    from foretoken.display import Display
    from foretoken.evaluate import evaluate as run
    from foretoken.evaluate import evaluation_documents

    fields = {
        "text_field": text_field, "prompt_field": prompt_field, "response_field": response_field,
        "messages_field": messages_field, "domain_field": domain_field, "split_field": split_field,
    }  # fmt: skip
    given = {name: value for name, value in fields.items() if value is not None}
    documents = evaluation_documents(checkpoint, tuple(data or ()), split, given)
    model, tokenizer = load_checkpoint(checkpoint, dtype_of(dtype), device_of(device))
    with Display(quiet_text=as_json) as display:
        result = run(model, documents, tokenizer, max_bytes=max_bytes, progress=display.count("bytes evaluated"))
    print_json(result.to_json()) if as_json else display.evaluation(result.to_json())


@app.command(epilog="Example: foretoken info runs/demo --engines")
def info(
    checkpoint: Checkpoint,
    engines: Annotated[
        bool, typer.Option("--engines", help="What each engine can do with it, and the commands.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, and which engine runs what of it."""
    from foretoken.checkpoint import describe
    from foretoken.display import Display
    from foretoken.formats.engines import uses

    values = describe(checkpoint)
    rows = [use.to_json() for use in uses(checkpoint)] if engines else []
    if as_json:
        print_json(values | ({"engines": rows} if engines else {}))
    elif engines:
        Display().engines(rows)
    else:
        Display().table(values)


app.add_typer(export, name="export")
app.add_typer(importing, name="import")
app.add_typer(bench, name="bench")
app.add_typer(lab, name="lab")


@app.command("train-tokenizer", epilog="Example: foretoken train-tokenizer 'src/**/*.py' --vocab-size 8192 --out bpe")
def train_tokenizer(
    data: Annotated[list[str], typer.Argument(help="Files, folders, globs, stdlib or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="A new folder for tokenizer.json and tokenizer_config.json.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, bytes and specials included.")] = 32_768,
    text_field: Annotated[str, typer.Option(help="Field of a record's text.")] = "text",
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on your data."""
    from foretoken.config import DataConfig, validated
    from foretoken.data import documents
    from foretoken.display import Display
    from foretoken.errors import DataError
    from foretoken.files import new_directory
    from foretoken.tokenizer import train_bpe

    config = validated(DataConfig, {"source": data, "text_field": text_field}, "options")
    with new_directory(out) as staging, Display(quiet_text=as_json) as display:
        read = display.counted(documents(config, config.source), "documents read")
        first = next(read, None)
        if first is None:
            raise DataError(f"{' '.join(data)}: holds no text to train a tokenizer on")
        tokenizer = train_bpe((document.text for document in itertools.chain([first], read)), vocab_size)
        tokenizer.save(staging)
    values = {"tokenizer": str(out), "vocab_size": tokenizer.vocab_size}
    print_json(values) if as_json else display.table(values)


def main() -> None:
    """Entry point of the console script."""
    from foretoken.errors import ForetokenError

    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="foretoken", standalone_mode=False)
    except ForetokenError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as in `foretoken ... | head`
        sys.stderr.close()
        code = 1
    except OSError as error:
        code = _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        code = _fail(error.format_message())  # the command line's own: an unknown option, a missing argument
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("foretoken: error: " + " ".join(message.split()), file=sys.stderr)
    return 2
