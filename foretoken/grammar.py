"""Output that follows a grammar: a JSON schema, a regular expression or a Lark grammar, by the library llguidance."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken.chat import end_ids
from foretoken.errors import ConfigError
from foretoken.tokenizer import Tokenizer

# JSON as Python writes it. Free white space, which a schema can ask for in "x-guidance", tempts small models to no end.
SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A grammar over a tokenizer's tokens. Raises ConfigError for one that cannot be read."""

    def __init__(self, tokenizer: Tokenizer, kind: str, text: str | Mapping[str, Any]) -> None:
        """kind: "json_schema" (text or mapping), "regex" or "lark"."""
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError(f"{kind}: a grammar needs pip install 'foretoken[grammar]'")
        from llguidance import LLMatcher, LLTokenizer

        readers: dict[str, Callable[[Any], str]] = {
            "json_schema": functools.partial(LLMatcher.grammar_from_json_schema, defaults=SPACES),
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        if kind == "json_schema":
            text = text if isinstance(text, str) else json.dumps(text)
            if not text.lstrip().startswith("{"):
                raise ConfigError(f"json_schema: a schema is an object, as {{}} is for any JSON, and not {text!r:.80}")
        self.ends = end_ids(tokenizer)
        if not self.ends:  # the library would take token 0
            raise ConfigError(f"{kind}: a grammar needs a tokenizer that has an end-of-text token")
        try:
            vocabulary = LLTokenizer(tokenizer.backend.to_str(), eos_token=self.ends[0])
            self.first = LLMatcher(vocabulary, readers[kind](text), log_level=0)
        except ValueError as error:
            raise ConfigError(f"{kind}: {error}") from None
        if self.first.is_error():
            raise ConfigError(f"{kind}: {self.first.get_error()}")
        self.kind = kind

    def matcher(self) -> GrammarMatcher:
        """One that stands before the first token of a text."""
        return GrammarMatcher(self.first.deep_copy(), self.ends, self.kind)


class GrammarMatcher:
    """See `processors.Matcher`. Raises ConfigError where a text comes to a limit of the library."""

    def __init__(self, matcher: Any, ends: Sequence[int], kind: str) -> None:
        self.matcher, self.ends, self.kind = matcher, ends, kind
        self.read = 0
        self.bias = self._bias()

    def mask(self, ids: Sequence[int], further: Sequence[int]) -> Tensor | None:
        """See `processors.Matcher`."""
        self._follow(ids)
        further = [token for token in further if token not in self.ends]  # as `_follow` does
        bias = self.bias
        if further:
            trial = self.matcher.deep_copy()  # not every grammar can be rolled back
            fits = trial.try_consume_tokens(further) == len(further) and not trial.is_stopped()
            bias = trial.compute_logit_bias() if fits else None
            bias = None if trial.is_error() else bias
        if bias is None:
            return None
        allowed = torch.frombuffer(bytearray(bias), dtype=torch.uint8) > 0
        allowed[[*self.ends]] |= allowed[self.ends[0]]  # the library knows one of them
        return allowed

    def complete(self, ids: Sequence[int]) -> bool:
        """See `processors.Matcher`."""
        self._follow(ids)
        return bool(self.matcher.is_stopped())

    def _follow(self, ids: Sequence[int]) -> None:
        for token in ids[self.read :]:
            if token not in self.ends:
                self.matcher.consume_token(token)
                self.bias = self._bias()
        self.read = len(ids)

    def _bias(self) -> bytes | None:
        """What may come next, or None. Going beyond a limit is seen here, whether drafts were tried there or not."""
        bias = None if self.matcher.is_stopped() else self.matcher.compute_logit_bias()
        if self.matcher.is_error():
            raise ConfigError(f"{self.kind}: {self.matcher.get_error().splitlines()[0]}")
        return bias
