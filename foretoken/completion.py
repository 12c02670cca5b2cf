"""Text in, text out: prompts through the decode loop, with stop strings, streaming and what each step drafted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict, TypeVar, Unpack, cast, overload

from foretoken.chat import chat_template, end_ids
from foretoken.decode import check_draft_vocab, check_nodes, check_requests, decode
from foretoken.drafters import Lookup, Source
from foretoken.errors import ConfigError
from foretoken.grammar import Grammar
from foretoken.model import Model
from foretoken.processors import Processing, Processors
from foretoken.request import Request, Step
from foretoken.sampling import Accept, Sampling
from foretoken.tokenizer import TextStream, Tokenizer

Kind = TypeVar("Kind", Sampling, Processing)


class Options(TypedDict, total=False):
    """What `generate` and `stream` take by keyword, with the defaults."""

    max_tokens: int  # 128
    temperature: float  # 0.0: greedy
    top_k: int  # 0: off
    top_p: float  # 1.0: off
    min_p: float  # 0.0: off
    accept: Accept  # "keyed": drafts change no output; "rejection": more of them accepted, the same law
    seed: int  # 0; prompt i of a list uses seed + i
    stop: str | Sequence[str]  # (): strings that end the text and are cut off
    min_tokens: int  # 0: before so many, no end-of-text and no stop string
    repetition_penalty: float  # 1.0: off; see `Processing` for these four
    presence_penalty: float  # 0.0: off
    frequency_penalty: float  # 0.0: off
    logit_bias: Mapping[int, float]  # {}
    json_schema: str | Mapping[str, Any]  # text that follows a schema; with the extra `grammar`, one of these three
    regex: str  # .. or a regular expression
    lark: str  # .. or a Lark grammar
    drafts: int | None  # None: as many as pay; 0: plain decoding
    nodes: int | None  # None: what pays, or a chain where drafts are given; else drafts as a tree of so many places
    draft_vocab: int | None  # None: all, or what pays where `drafts` is None; else so many first tokens
    lookup: int  # 0: off; else drafts are what followed the last so many tokens where they stood before
    draft_model: Model  # drafts are another model's, with the same tokens
    ignore_eos: bool  # False
    chat: bool  # False; the prompt is a user's message, which the tokenizer's chat template puts before the assistant's
    batch_size: int  # 16 prompts at a time


@dataclass
class TextRequest(Request):
    """A request that can follow its own text, so that a stop string ends it wherever it falls in a block.

    Without stop strings the text is only read when it is asked for: a token costs a tokenizer more than a small model.
    """

    decoder: TextStream | None = None
    stop: tuple[str, ...] = ()
    text: str = ""
    released: int = 0
    searched: int = 0
    read: int = 0

    def commit(self, token: int, logprob: float) -> None:
        """As `Request.commit`; a stop string that appears is cut off with what follows it."""
        super().commit(token, logprob)
        if not self.stop:
            return
        text, searched = self.read_on(), self.searched
        self.searched = max(searched, len(text))
        if self.processors and len(self.ids) < self.processors.processing.min_tokens:
            return
        found = [at for s in self.stop if (at := text.find(s, max(0, searched - len(s) + 1))) >= 0]
        if found:
            self.text, self.finish_reason = text[: min(found)], "stop"

    def read_on(self) -> str:
        """Make `text` that of all ids so far; returns it with what waits, but an unfinished character."""
        assert self.decoder is not None
        for token in self.ids[self.read :]:
            if token not in self.end_ids:
                self.text += self.decoder.push(token)
        self.read = len(self.ids)
        waiting = self.decoder.finish()
        if self.finish_reason is None:
            return self.text + waiting.rstrip("\ufffd")
        self.text += waiting
        return self.text

    def release(self) -> str:
        """Text that can be shown: all that is new, less a tail that may yet become a stop string."""
        if not self.stop:
            self.read_on()
        end = len(self.text)
        if self.finish_reason is None:
            end -= max((_overlap(self.text, s) for s in self.stop), default=0)
        piece = self.text[self.released : end]
        self.released = max(self.released, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


@dataclass(frozen=True)
class Generation:
    """What a prompt gave.

    text: without the prompt. ids: its tokens, with the one that ends it. logprobs: the target's natural logarithms,
    of the tokens in `ids`, before temperature and filters. finish_reason: "stop" or "length". steps: one a forward
    behind the prompt's.
    """

    prompt: str
    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    steps: list[Step]
    seed: int

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens / steps; the first token comes from the prefill and belongs to no step."""
        return sum(step.committed for step in self.steps) / len(self.steps) if self.steps else 1.0

    def to_json(self) -> dict[str, Any]:
        """What `foretoken generate --json` prints."""
        given = asdict(self)
        del given["prompt"]
        return given | {"tokens_per_step": self.tokens_per_step}

    @property
    def sources(self) -> list[int]:
        """For each id the head that produced it: 1 for the target's own tokens, i for an accepted draft of head i."""
        heads = [1] if self.ids else []
        for step in self.steps:
            heads += [*range(2, step.accepted + 2), 1][: step.committed]
        return heads


@overload
def generate(model: Model, tokenizer: Tokenizer, prompt: str, **options: Unpack[Options]) -> Generation: ...
@overload
def generate(
    model: Model, tokenizer: Tokenizer, prompt: list[str] | tuple[str, ...], **options: Unpack[Options]
) -> list[Generation]: ...
def generate(
    model: Model, tokenizer: Tokenizer, prompt: str | list[str] | tuple[str, ...], **options: Unpack[Options]
) -> Generation | list[Generation]:
    """Continue a prompt, or a list of prompts of any lengths, by at most `max_tokens` tokens each.

    The output depends on the weights, the prompt, the sampling options and the seed; `drafts` changes the speed
    alone, except under `accept="rejection"`. Returns a Generation, or of a list one for each prompt in its order.
    Raises ConfigError for options or a prompt that the model cannot run, DataError for text without UTF-8 or for
    `chat` without a template, CheckpointError where the model gives no numbers.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    requests, loop = begin(model, tokenizer, prompts, options)
    for _ in loop:
        pass
    done = [finished(*pair) for pair in zip(prompts, requests, strict=True)]
    return done[0] if isinstance(prompt, str) else done


def stream(
    model: Model, tokenizer: Tokenizer, prompt: str, **options: Unpack[Options]
) -> Iterator[tuple[str, Generation | None]]:
    """As `generate` for one prompt, but yields pieces of text as they are settled; the last comes with the Generation.

    The pieces joined are the Generation's text. A piece may hold several tokens. Raises as `generate`, on the first
    one.
    """
    requests, loop = begin(model, tokenizer, [prompt], options)
    for _ in loop:
        done = requests[0].finish_reason is not None
        yield requests[0].release(), finished(prompt, requests[0]) if done else None


def token_pieces(tokenizer: Tokenizer, generation: Generation) -> list[str]:
    """The text that each id of a generation brought, in order; joined, the text of all its ids."""
    decoder = tokenizer.stream()
    pieces = [decoder.push(token) for token in generation.ids]
    pieces[-1] += decoder.finish()
    return pieces


def begin(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], options: Options
) -> tuple[list[TextRequest], Iterator[tuple[Request, list[int]]]]:
    """The requests of prompts, and the decode loop that runs them: see `decode` for what it yields.

    For those who time the loop or look at it on its way; `finished` makes a Generation of a request that has ended.
    """
    if unknown := options.keys() - Options.__annotations__.keys():
        raise ConfigError(f"unknown option {min(unknown)}: there are {', '.join(sorted(Options.__annotations__))}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(f"tokenizer of {tokenizer.vocab_size} tokens beside a model of {model.config.vocab_size}")
    sampling = _own(Sampling, options)
    size = options.get("batch_size", 16)
    if size < 1:
        raise ConfigError(f"batch_size = {size} must be at least 1")
    max_tokens, seed, stop = options.get("max_tokens", 128), options.get("seed", 0), options.get("stop")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens} must be at least 1")
    if not -(1 << 63) <= seed <= (1 << 63) - len(prompts):  # the last prompt's fits, too
        raise ConfigError(f"seed = {seed} does not fit 64 bits")
    if not all(stops):
        raise ConfigError("a stop string must not be empty")
    chat = chat_template(tokenizer) if options.get("chat") else None
    ends = frozenset(() if options.get("ignore_eos") else end_ids(tokenizer))
    requests = [
        TextRequest(
            chat.prompt(prompt) if chat else tokenizer.encode(prompt, add_special_tokens=True), max_tokens,
            seed + index, ends, decoder=tokenizer.stream(), stop=stops,
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    _process(model, tokenizer, requests, options)
    drafts, source, nodes = options.get("drafts"), _source(options), options.get("nodes")
    draft_vocab = options.get("draft_vocab")
    check_requests(model, requests, drafts, source)
    check_nodes(nodes, sampling, source)
    check_draft_vocab(draft_vocab, model, source)
    return requests, decode(model, requests, sampling, drafts, size, source, nodes, draft_vocab)


def _process(model: Model, tokenizer: Tokenizer, requests: Sequence[TextRequest], options: Options) -> None:
    """Give requests the processors that options ask for, if any."""
    processing = _own(Processing, options)
    processing.check(model.config.vocab_size)
    asked = {"json_schema": options.get("json_schema"), "regex": options.get("regex"), "lark": options.get("lark")}
    grammars = [Grammar(tokenizer, kind, text) for kind, text in asked.items() if text is not None]
    if len(grammars) > 1:
        raise ConfigError("json_schema, regex and lark: only one of them can be followed")
    if processing == Processing() and not grammars:
        return
    for request in requests:
        matcher = grammars[0].matcher() if grammars else None
        request.processors = Processors(processing, request.prompt, request.end_ids, matcher)


def _own(kind: type[Kind], options: Options) -> Kind:
    """A `kind` of those options that are its fields; None is the default."""
    given = cast(dict[str, Any], options)
    return kind(**{f.name: given[f.name] for f in fields(kind) if given.get(f.name) is not None})


def _source(options: Options) -> Source:
    model, lookup = options.get("draft_model"), options.get("lookup", 0)
    if model is not None and lookup:
        raise ConfigError("lookup and draft_model: drafts can come from only one of them")
    return Lookup(lookup) if lookup else model


def finished(prompt: str, request: TextRequest) -> Generation:
    """What a request that has ended gave."""
    assert request.finish_reason is not None
    if request.read < len(request.ids):
        request.read_on()
    return Generation(
        prompt, request.text, request.ids, request.logprobs, request.finish_reason, request.steps, request.seed
    )
