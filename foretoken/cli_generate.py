"""`foretoken generate`, in the manner of `cli`: options read, the library called, results printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from foretoken.cli_common import Checkpoint, Device, Dtype, Json, device_of, dtype_of, print_json

if TYPE_CHECKING:
    from foretoken.completion import Options
    from foretoken.model import Model
    from foretoken.tokenizer import Tokenizer

Accept = Annotated[
    str, typer.Option(help="keyed: drafts change no text; rejection: more drafts accepted, text of the same law.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Make tokens of prompt and text less likely; 1 is off.")]
LogitBias = Annotated[list[str] | None, typer.Option(help="TOKEN_ID=BIAS, added to its logit; any number of times.")]
Drafts = Annotated[int | None, typer.Option(help="Drafts per step; 0: plain decoding. Default: as many as pay.")]
Nodes = Annotated[int | None, typer.Option(help="Drafts as a tree of so many places. Default: a chain, or what pays.")]
DraftVocab = Annotated[
    int | None, typer.Option(help="Drafts among so many first tokens of the vocabulary. Default: all, or what pays.")
]
Lookup = Annotated[
    int, typer.Option(help="Draft what followed the last so many tokens before, not with heads; 0 is off.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Answer: the prompt is a user's message, for the chat template.")]


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read it from a file; - is standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the highest probability.")] = 0.0,
    accept: Accept = "keyed",
    seed: Annotated[int, typer.Option(help="Same seed, same text, however it is decoded.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; any number of times.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Do not end before so many tokens.")] = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from logits of the text's tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each time they stand there.")] = 0.0,
    logit_bias: LogitBias = None,
    json_schema: Annotated[Path | None, typer.Option(help="Text that follows the JSON schema in this file.")] = None,
    regex: Annotated[str, typer.Option(help="Text that follows this regular expression.")] = "",
    lark: Annotated[Path | None, typer.Option(help="Text that follows the Lark grammar in this file.")] = None,
    drafts: Drafts = None,
    nodes: Nodes = None,
    draft_vocab: DraftVocab = None,
    lookup: Lookup = 0,
    draft_model: Annotated[str, typer.Option(help="Draft with another checkpoint, not with heads.")] = "",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after what ends a text.")] = False,
    chat: Chat = False,
    dtype: Dtype = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, drafting with the extra heads: the same text as without them, but for near-ties on a GPU."""
    from foretoken.checkpoint import load_checkpoint
    from foretoken.completion import stream
    from foretoken.display import summary

    text = read_prompt(prompt, prompt_file)
    model, tokenizer = load_checkpoint(checkpoint, dtype_of(dtype), device_of(device))
    options: Options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "accept": cast(Any, accept), "seed": seed, "stop": stop or (), "min_tokens": min_tokens,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "logit_bias": _biases(logit_bias or ()),
        "drafts": drafts, "nodes": nodes, "draft_vocab": draft_vocab, "lookup": lookup, "ignore_eos": ignore_eos,
        "chat": chat,
    }  # fmt: skip
    options.update(_grammar(json_schema, regex, lark))
    if draft_model:
        options["draft_model"] = _draft_model(draft_model, tokenizer, dtype, device)
    final, shown = None, "" if chat else text  # an answer stands alone
    for piece, final in stream(model, tokenizer, text, **options):  # noqa: B007 - the last one is used below
        if not as_json:
            write(shown + piece)  # the prompt too only now, when the options have been found right
            shown = ""
    assert final is not None
    if as_json:
        print_json(final.to_json())
    else:
        write("\n")
        summary(final)


def _draft_model(folder: str, tokenizer: Tokenizer, dtype: str, device: str) -> Model:
    from foretoken.checkpoint import load_checkpoint
    from foretoken.errors import ConfigError

    model, own = load_checkpoint(folder, dtype_of(dtype), device_of(device))
    words, own_words = (each.backend.get_vocab(with_added_tokens=False) for each in (tokenizer, own))
    if words != own_words:  # added ones may have other names or be more: such models draft well
        raise ConfigError(f"--draft-model {folder}: its tokens are not those of the model")
    return model


def _grammar(json_schema: Path | None, regex: str, lark: Path | None) -> Options:
    found: Options = {}
    if regex:
        found["regex"] = regex
    if json_schema is not None:
        found["json_schema"] = read_text(json_schema)
    if lark is not None:
        found["lark"] = read_text(lark)
    return found


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


def write(text: str) -> None:
    """Text on standard output, at once, whatever its encoding."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.flush()


def read_prompt(prompt: str | None, path: Path | None) -> str:
    """The prompt given, or that of a file; - is standard input."""
    from foretoken.errors import ConfigError

    if (prompt is None) == (path is None):
        raise ConfigError("give a prompt, or --prompt-file FILE")
    if path is None:
        assert prompt is not None
        return prompt
    return read_text(path)


def read_text(path: Path) -> str:
    """The text of a file; - is standard input."""
    from foretoken.errors import DataError

    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: invalid UTF-8 at byte {error.start}") from None
