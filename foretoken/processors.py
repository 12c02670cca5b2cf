"""What changes a request's logits before a token is picked: penalties, biases, a shortest length, a grammar.

Each position of a step is changed by the tokens that stand before it there, drafts included. So a draft is accepted
when it is what plain decoding with the same processors picks, and the output is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from foretoken.errors import ConfigError
from foretoken.sampling import Keys, logprobs_of

Change = Callable[[Tensor], Tensor]


class Matcher(Protocol):
    """Follows a grammar along a text's tokens; `grammar.Grammar` makes them."""

    def mask(self, ids: Sequence[int], further: Sequence[int]) -> Tensor | None:
        """Which tokens (V, bool) may follow ids + further; None where these do not follow the grammar anyway."""
        ...

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether nothing but an end may follow ids."""
        ...


@dataclass(frozen=True)
class Processing:
    """How logits are changed; the defaults change nothing. The penalties are those of vLLM and of OpenAI's API.

    repetition_penalty: logits of tokens that stand in prompt or output are divided by it where positive, else
    multiplied (Keskar et al. 2019). presence_penalty: taken from tokens that stand in the output. frequency_penalty:
    taken once for each time they stand there. logit_bias: added, by token id. min_tokens: before so many, neither
    end-of-text nor stop string.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty = {self.repetition_penalty} must be a positive number; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(value := getattr(self, name)):
                raise ConfigError(f"{name} = {value} must be a number; 0 is off")
        if self.min_tokens < 0:
            raise ConfigError(f"min_tokens = {self.min_tokens} must be at least 0")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ConfigError(f"logit_bias of token {token} = {bias} must be a number or -inf")

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError for a token that a vocabulary does not have."""
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"logit_bias: token {token} is not among the model's {vocab_size}")


class Processors:
    """The processors of one request, with what they remember of its tokens so far."""

    def __init__(
        self, processing: Processing, prompt: Iterable[int], end_ids: Iterable[int], matcher: Matcher | None = None
    ) -> None:
        self.processing, self.matcher = processing, matcher
        self.prompt, self.ends = torch.tensor(sorted(set(prompt))), torch.tensor(sorted(end_ids), dtype=torch.long)
        self.biased = torch.tensor(list(processing.logit_bias), dtype=torch.long)
        self.biases = torch.tensor(list(processing.logit_bias.values()))
        self.counts: Tensor | None = None  # (V), of the first `counted` tokens of the output
        self.counted = 0

    def apply(self, logits: Tensor, ids: Sequence[int], further: Sequence[int]) -> Tensor:
        """The changed logits (V) of the token behind ids + further; `ids` are committed and only ever grow."""
        p, device, given, logits = self.processing, logits.device, logits, logits.clone()
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            counts = self._counts(ids, logits.numel()).index_add(
                0, torch.tensor(list(further), dtype=torch.long), torch.ones(len(further))
            )
            present = counts > 0
            if p.repetition_penalty != 1:
                met = present.index_fill(0, self.prompt, True).to(device)
                lower = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
                logits = torch.where(met, lower, logits)
            logits -= (p.frequency_penalty * counts + p.presence_penalty * present).to(logits)
        if p.logit_bias:
            logits[self.biased.to(device)] += self.biases.to(logits)
        if len(ids) + len(further) < p.min_tokens:
            logits[self.ends.to(device)] = float("-inf")
        if self.matcher is not None and (allowed := self.matcher.mask(ids, further)) is not None:
            if logits[: len(allowed)][allowed.to(device)].max() == -math.inf:
                logits = given.clone()  # what bans all that the grammar allows gives way to it
            logits[: len(allowed)].masked_fill_(~allowed.to(device), float("-inf"))
            logits[len(allowed) :] = float("-inf")
        return logits

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether a grammar ends the output here."""
        return self.matcher is not None and self.matcher.complete(ids)

    def _counts(self, ids: Sequence[int], vocab_size: int) -> Tensor:
        if self.counts is None:
            self.counts = torch.zeros(vocab_size)
        if self.counted < len(ids):
            new = torch.tensor(ids[self.counted :])
            self.counts.index_add_(0, new, torch.ones(len(new)))
            self.counted = len(ids)
        return self.counts


def pick_targets(
    logits: Tensor, keys: Keys, change: Change | None = None, places: Sequence[int] | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """The target's own token after each of a step's positions, logits (B, T, V), and its log-probability."""
    tokens = keys.choose(change(logits) if change else logits, places)
    return tokens.tolist(), logprobs_of(logits, tokens)
