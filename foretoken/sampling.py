"""From logits to a token: filters, noise keyed by (seed, position, token), and the one acceptance rule.

The token at absolute position p is the argmax of filtered logits + temperature x Gumbel noise, and the noise is a pure
function of (seed, p, token id). So a request's output depends on (weights, prompt, parameters, seed) alone: not on how
many tokens were drafted nor on the batch. At temperature 0 the noise has no weight, which makes greedy decoding the
limit of the same rule. A draft is accepted when it equals the token that the target picks by this rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from foretoken.errors import ConfigError

Accept = Literal["keyed", "rejection"]

# Makes of a request's seed that of its drafts, where they need noise of their own.
DRAFT = 0xD1B54A32D192ED03


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing.

    accept: the rule by which drafts are accepted. "keyed": a draft must be the token that the target picks with its
    noise, so drafts change no output. "rejection" (Chen et al. 2023): a draft drawn from q is accepted with probability
    min(1, p / q), else a token is drawn from the positive part of p - q. It accepts more above temperature 0, and the
    output has the target's law, but depends on the drafts. At temperature 0 they are the same.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    accept: Accept = "keyed"

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k} must be 0 (off) or the number of tokens to keep")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must lie above 0 and at most at 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p = {self.min_p} must lie between 0 and 1")
        if self.accept not in get_args(Accept):
            raise ConfigError(f'accept = "{self.accept}" must be one of {", ".join(get_args(Accept))}')

    @property
    def rejects(self) -> bool:
        """Whether drafts are drawn by themselves and accepted by rejection."""
        return self.accept == "rejection" and self.temperature > 0


@dataclass(frozen=True)
class Keys:
    """What decides the noise of the next `count` tokens of each of B requests: their seeds and the first positions.

    The tensor of the noise is made when it is first asked for; compiled steps work from the keys.
    """

    sampling: Sampling
    seeds: Sequence[int] | Tensor
    positions: Sequence[int] | Tensor
    count: int
    vocab_size: int
    device: torch.device

    @property
    def noise(self) -> Tensor | None:
        """Of the target's own tokens (B, count, V), None at temperature 0."""
        return None if self._streams is None else self._streams[0]

    @property
    def draft_noise(self) -> Tensor | None:
        """Of the drafts (B, count, V): the target's, which makes them agree, but under rejection one of their own."""
        return None if self._streams is None else self._streams[-1]

    @cached_property
    def acceptance(self) -> Tensor:
        """Uniform numbers (B, count) for acceptance by rejection: those of a token behind the vocabulary."""
        seeds, positions = self._places
        return uniform(_mix(_mix(_mix(seeds) ^ positions) ^ self.vocab_size))

    @cached_property
    def _streams(self) -> Tensor | None:
        """The noise of the target's tokens and, where it is another, of the drafts: (1 or 2, B, count, V)."""
        seeds, positions = self._places
        streams = [seeds, seeds ^ _signed(DRAFT)] if self.sampling.rejects else [seeds]
        return keyed_noise(torch.stack(streams), positions, self.vocab_size, self.sampling)

    @property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Seeds (B, 1) and positions (B, count)."""
        seeds, first = (torch.as_tensor(given, device=self.device)[:, None] for given in (self.seeds, self.positions))
        return seeds, first + torch.arange(self.count, device=self.device)

    def behind(self, counts: Iterable[int], count: int) -> Keys:
        """Those of `count` tokens behind the next `counts` (B) ones."""
        positions = [int(first) + passed for first, passed in zip(self.positions, counts, strict=True)]
        return Keys(self.sampling, self.seeds, positions, count, self.vocab_size, self.device)

    def choose(self, logits: Tensor, places: Sequence[int] | Tensor | None = None) -> Tensor:
        """The target's tokens (B, k) from its logits (B, k, V); places: which of the next ones."""
        chosen = slice(logits.size(1)) if places is None else torch.as_tensor(places, device=self.device)
        noise = None if self.noise is None else self.noise[:, chosen]
        return choose(logits, noise, self.sampling)

    def choose_drafts(self, logits: Tensor, first: int = 0, ranks: int = 1) -> Tensor:
        """The best candidates (B, k, ranks) for drafts from logits (B, k, V), the first number `first` of its step."""
        noise = None if self.draft_noise is None else self.draft_noise[:, first : first + logits.size(1)]
        if ranks == 1:
            return choose(logits, noise, self.sampling)[..., None]
        kept = filtered(logits, self.sampling)
        return (kept if noise is None else kept + noise.to(kept.dtype)).topk(ranks, -1).indices


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., V) with -inf where a filter drops the token; the most likely token always stays.

    In this order, each on what the one before left: top-k keeps the k likeliest, top-p the smallest set of the
    likeliest whose probability reaches p, min-p those with at least min_p times the highest probability. Probabilities
    are those at `temperature`. Tokens as likely as the last one kept by top-k stay too.
    """
    if sampling.temperature == 0:
        return logits  # every filter keeps the argmax, and nothing else can be picked
    if sampling.top_k and sampling.top_k < logits.size(-1):
        kth = logits.topk(sampling.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # probability of the tokens ahead of this one
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if sampling.min_p > 0:
        probabilities = (logits / sampling.temperature).softmax(-1)
        drop = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def widened(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits (..., V) from those of the first tokens: the others are -inf, and never picked."""
    missing = vocab_size - logits.size(-1)
    return F.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def keyed_noise(seeds: Tensor, positions: Tensor, vocab_size: int, sampling: Sampling) -> Tensor | None:
    """temperature x Gumbel noise (..., V) of the tokens at `positions`; None at temperature 0, which needs none."""
    return sampling.temperature * gumbel(seeds, positions, vocab_size) if sampling.temperature > 0 else None


def choose(logits: Tensor, noise: Tensor | None, sampling: Sampling) -> Tensor:
    """The tokens (...) of the highest filtered logits (..., V) plus noise from `keyed_noise`."""
    kept = filtered(logits, sampling)
    return (kept if noise is None else kept + noise.to(kept.dtype)).argmax(-1)


def rejection(logits: Tensor, drafts: Tensor, proposed: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Tokens (B, K + 1) and how many of them (B) are accepted drafts (see `Sampling`); the rest are zeros.

    logits (B, K + 1, V) are the target's, drafts (B, K) were drawn from softmax(proposed (B, K, V) / temperature).
    """
    temperature, count = keys.sampling.temperature, drafts.size(1)
    p = (filtered(logits, keys.sampling) / temperature).softmax(-1)
    q = (proposed.to(p.dtype) / temperature).softmax(-1)
    of_p, of_q = (x[:, :count].gather(-1, drafts[..., None])[..., 0] for x in (p, q))
    accepted = (keys.acceptance[:, :count] * of_q < of_p).long().cumprod(-1).sum(-1)  # (B)
    rest = torch.cat(((p[:, :count] - q).clamp(min=0), p[:, count:]), 1)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    assert keys.noise is not None
    fresh = (temperature * rest.log() + keys.noise[:, : count + 1].to(rest.dtype)).argmax(-1)  # (B, K + 1)
    index = torch.arange(count + 1, device=logits.device)
    drawn = torch.where(index < accepted[:, None], F.pad(drafts, (0, 1)), fresh) * (index <= accepted[:, None])
    return drawn, accepted


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (..., V) in float64, a pure function of (seed, position, token id).

    seeds and positions are int64 and broadcast. The bits are a counter hash: splitmix64's finaliser (Steele et al.
    2014) over the three keys in turn, the same on every device.
    """
    tokens = torch.arange(vocab_size, device=positions.device)
    keys = _mix(_mix(_mix(seeds) ^ positions)[..., None] ^ tokens)
    return -torch.log(-torch.log(uniform(keys)))


def uniform(bits: Tensor) -> Tensor:
    """Numbers between 0 and 1, neither of them included, in float64 from int64's upper 52 bits."""
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's step on int64, whose products wrap around as unsigned ones do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift would copy the sign


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def logprobs_of(logits: Tensor, tokens: Tensor) -> list[list[float]]:
    """Log-probabilities of tokens (B, T) under logits (B, T, V)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].tolist()
