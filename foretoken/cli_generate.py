"""`foretoken generate`, in the manner of `cli`: options read, the library called, results printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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

if TYPE_CHECKING:
    from foretoken.completion import Options
    from foretoken.model import Model
    from foretoken.tokenizer import Tokenizer

Prompt = Annotated[str | None, typer.Argument(help="The text to continue.")]
PromptFile = Annotated[Path | None, typer.Option(help="Read it from a file; - is standard input.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the highest probability.")]
Accept = Annotated[
    str, typer.Option(help="keyed: drafts change no text; rejection: more drafts accepted, text of the same law.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same text, however it is decoded.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; any number of times.")]
MinTokens = Annotated[int, typer.Option(help="Do not end before so many tokens.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Make tokens of prompt and text less likely; 1 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="Taken from logits of the text's tokens.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, once for each time they stand there.")]
LogitBias = Annotated[list[str] | None, typer.Option(help="TOKEN_ID=BIAS, added to its logit; any number of times.")]
JsonSchema = Annotated[Path | None, typer.Option(help="Text that follows the JSON schema in this file.")]
Regex = Annotated[str, typer.Option(help="Text that follows this regular expression.")]
Lark = Annotated[Path | None, typer.Option(help="Text that follows the Lark grammar in this file.")]
Drafts = Annotated[int | None, typer.Option(help="Drafts per step; 0: plain decoding. Default: as many as pay.")]
Nodes = Annotated[int | None, typer.Option(help="Drafts as a tree of so many places. Default: a chain, or what pays.")]
DraftVocab = Annotated[
    int | None, typer.Option(help="Drafts among so many first tokens of the vocabulary. Default: all, or what pays.")
]
Lookup = Annotated[
    int, typer.Option(help="Draft what followed the last so many tokens before, not with heads; 0 is off.")
]
DraftModel = Annotated[str, typer.Option(help="Draft with another checkpoint, not with heads.")]
Chat = Annotated[bool, typer.Option("--chat", help="Answer: the prompt is a user's message, for the chat template.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after what ends a text.")]


def generate(
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    accept: Accept = "keyed",
    seed: Seed = 0,
    stop: Stop = None,
    min_tokens: MinTokens = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    json_schema: JsonSchema = None,
    regex: Regex = "",
    lark: Lark = None,
    drafts: Drafts = None,
    nodes: Nodes = None,
    draft_vocab: DraftVocab = None,
    lookup: Lookup = 0,
    draft_model: DraftModel = "",
    ignore_eos: IgnoreEos = False,
    chat: Chat = False,
    dtype: Dtype = "",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, drafting with the extra heads. The text does not depend on the drafts."""
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
