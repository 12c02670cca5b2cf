"""Conversations to tokens by the tokenizer's own chat template, and which of them the assistant wrote.

1. Special tokens that a message spells out are broken by a mark, so that a rendering holds the template's own alone.
2. The assistant's turns are what {% generation %} blocks enclose. Where the template has none, a turn begins where the
   rendering of what precedes it ends, generation prompt included, and ends where the rendering up to it does.
3. The rendering is encoded whole, as transformers does it; a special token that lies on a mark becomes text again.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from foretoken.errors import DataError
from foretoken.tokenizer import Tokenizer, utf8

Message = Mapping[str, Any]
# Unicode's noncharacters, which no text has: inside a special token that a message spells out, around a turn.
BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"([{BREAK}{OPEN}{CLOSE}])")
_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Chat:
    """A conversation of L tokens. targets (L,): what the assistant wrote, with the special tokens that end its turns.

    text_bytes: UTF-8 bytes of what it wrote, the template's special tokens left out.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.bool_]
    text_bytes: int


@dataclass(frozen=True)
class _Rendering:
    """A rendered conversation: its text, the assistant's turns in it, and where a mark broke a special token."""

    text: str
    turns: list[tuple[int, int]]
    breaks: list[int]

    def broken(self, start: int, stop: int) -> bool:
        """Whether a mark stood behind a character of `text[start:stop]`."""
        following = bisect.bisect_right(self.breaks, start)
        return following < len(self.breaks) and self.breaks[following] <= stop


class ChatTemplate:
    """A tokenizer's chat template. Raises DataError where it has none, or one that Jinja cannot read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.source = source = _source(tokenizer.chat_template)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the tokenizer's chat template: line {error.lineno}: {error.message}") from None
        except Exception as error:  # it becomes a program, whose limits Python has
            raise DataError(f"the tokenizer's chat template: {type(error).__name__}: {error}") from None
        self.tokenizer = tokenizer
        # Of its own: here special tokens in the text are tokens, and no post-processor trims offsets or adds a bos.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False
        self._backend.post_processor = None
        self._names = {i: str(tokenizer.backend.id_to_token(i)) for i in tokenizer.special_ids}
        longest_first = sorted(self._names.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._last_special = re.compile(f"(?:{self._special.pattern})(?=\\s*\\Z)")
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self._variables = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        self._has_blocks = _BLOCK.search(source) is not None

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The text of a conversation, as transformers renders it; its own {% generation %} blocks stay marked."""
        given = [{key: v for key, v in message.items() if v is not None or key == "content"} for message in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=generation_prompt, **self._variables
            )
        except Exception as error:  # a template is a program of its own
            says = " ".join(str(error).split())
            raise DataError(f"the tokenizer's chat template fails: {says or type(error).__name__}") from None

    def encode(self, conversations: Sequence[tuple[str, Sequence[Message]]]) -> list[Chat]:
        """Tokens of conversations, each with its name, which a DataError begins with where one cannot be rendered."""
        renderings = []
        for name, messages in conversations:
            try:
                renderings.append(_without_marks(self._with_turns(each_text(messages, self._break))))
            except (DataError, RecursionError) as error:
                raise DataError(f"{name}: {error}") from None
        encoded = self._backend.encode_batch([rendering.text for rendering in renderings], add_special_tokens=False)
        return [self._chat(*pair) for pair in zip(renderings, encoded, strict=True)]

    def prompt(self, text: str) -> list[int]:
        """Tokens of a conversation that begins with a user's message, up to where the assistant is to write."""
        broken = self._break(text)
        rendering = _without_marks(self.render([{"role": "user", "content": broken}], generation_prompt=True))
        encoded = self._backend.encode(rendering.text, add_special_tokens=False)
        return [int(i) for i in self._chat(rendering, encoded).ids]

    @cached_property
    def end_id(self) -> int | None:
        """The special token that ends the assistant's turns, if one does."""
        turn = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        last = self._last_special.search(_without_marks(turn).text)
        return None if last is None else self._backend.token_to_id(last[0])

    def _break(self, text: str) -> str:
        if _MARKS.search(text):
            raise DataError(f"a message holds a noncharacter of Unicode, U+{ord(_MARKS.findall(text)[0]):X}")
        return self._special.sub(lambda found: found[0][:1] + BREAK + found[0][1:], text)

    def _with_turns(self, messages: Sequence[Message]) -> str:
        """The rendering, the assistant's turns between OPEN and CLOSE."""
        whole = self.render(messages)
        if self._has_blocks:
            return whole
        pieces, done = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], generation_prompt=True)
            through = self.render(messages[: index + 1]) if index + 1 < len(messages) else whole
            if not (whole.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"the tokenizer's chat template renders {len(messages)} messages otherwise than the first"
                    f" {index + 1} of them, so that the assistant's turns cannot be found; put {{% generation %}} and"
                    " {% endgeneration %} around these in chat_template.jinja"
                )
            last = self._last_special.search(through, len(before))  # what follows it, a newline, is not the turn's
            end = len(through) if last is None else last.end()
            pieces += [whole[done : len(before)], OPEN, whole[len(before) : end], CLOSE]
            done = end
        return "".join(pieces) + whole[done:]

    def _chat(self, rendering: _Rendering, encoded: tokenizers.Encoding) -> Chat:
        text, ids = rendering.text, np.array(encoded.ids, np.int64)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)  # in characters
        own, spelled = list[int](), dict[int, list[int]]()
        for i in np.flatnonzero(np.isin(ids, [*self._names])).tolist():
            name, (start, stop) = self._names[int(ids[i])], offsets[i].tolist()
            at = text.find(name, start, stop)  # it may have taken spaces beside it along
            if at < 0 or rendering.broken(at, at + len(name)):
                spelled[i] = self.tokenizer.encode(text[start:stop])
            else:
                offsets[i] = at, at + len(name)
                own.append(i)
        targets = _inside(offsets, rendering.turns)
        size = sum(len(utf8(text[start:stop])) for start, stop in rendering.turns)
        size -= sum(len(utf8(self._names[int(ids[i])])) for i in own if targets[i])
        if spelled:
            parts = [spelled.get(i, [token]) for i, token in enumerate(ids.tolist())]
            targets = np.repeat(targets, [len(part) for part in parts])
            ids = np.array([token for part in parts for token in part], np.int64)
        return Chat(ids, targets, size)


@lru_cache(maxsize=4)
def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer, read once."""
    return ChatTemplate(tokenizer)


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text: eos, the end of a turn where a chat template writes one, and what else it came with."""
    turn = None
    if tokenizer.chat_template is not None:
        with contextlib.suppress(DataError):  # without a template that fails; where it is used it says so
            turn = chat_template(tokenizer).end_id
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_id, turn, *tokenizer.further_ends) if i is not None))


def generation_config(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """The contents of generation_config.json, by which engines know where a text begins and ends."""
    ends = end_ids(tokenizer)
    eos = [*ends] if len(ends) > 1 else next(iter(ends), None)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


def _source(template: object) -> str:
    """The template's text; of several with names the default one."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str) or not template:
        raise DataError("the tokenizer has no chat template; put one into chat_template.jinja beside tokenizer.json")
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with what templates are written for: transformers' options, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda wanted: datetime.now().strftime(wanted),
    }
    return environment


class _Generation(Extension):
    """{% generation %} and {% endgeneration %}: what they enclose comes between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        """The call of `_mark` on a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed, but keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each_text(part, change) for key, part in value.items()}
    return [each_text(part, change) for part in value] if isinstance(value, list | tuple) else value


def _without_marks(marked: str) -> _Rendering:
    pieces, at, found = list[str](), 0, {BREAK: list[int](), OPEN: list[int](), CLOSE: list[int]()}
    for piece in _MARKS.split(marked):
        if piece in found:
            found[piece].append(at)
        else:
            pieces.append(piece)
            at += len(piece)
    return _Rendering("".join(pieces), [*zip(found[OPEN], found[CLOSE], strict=True)], found[BREAK])


def _inside(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which of the offsets (L, 2) lie wholly in one of the spans, which are in order."""
    bounds = np.array(spans, np.int64).ravel()
    before = np.searchsorted(bounds, offsets[:, 0], side="right")
    inside: NDArray[np.bool_] = (before % 2 == 1) & (np.searchsorted(bounds, offsets[:, 1], side="left") == before)
    return inside
