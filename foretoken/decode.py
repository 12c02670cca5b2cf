"""The decode loop: plain and self-speculative decoding, one loop and one rule.

1. Prefill: the model runs on the prompts. Head 1 gives the first token, heads 2..K+1 the first drafts.
2. Step: the model runs on the last committed token and the K drafts, K + 1 positions in one forward.
3. The target's own token is picked at each of these positions; drafts are accepted as long as they are that token.
4. The accepted drafts and the target's next token are committed; the cache forgets everything behind them.
5. The other heads draft from the last accepted position. Repeat from 2. K = 0 is plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foretoken.errors import ConfigError
from foretoken.model import Model, Stepper
from foretoken.sampling import Sampling, accepted, pick


@dataclass(frozen=True)
class Step:
    """One forward after the prefill: the tokens drafted for it, how many the target accepted, how many it committed.

    committed is accepted + 1 unless the request ended inside the block.
    """

    drafted: tuple[int, ...]
    accepted: int
    committed: int


@dataclass
class Request:
    """A prompt on its way through the loop. `commit` is called token by token, so an end cuts inside a block."""

    prompt: list[int]
    max_tokens: int
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None

    def commit(self, token: int, logprob: float) -> None:
        """Append a token with the target's log-probability of it; sets `finish_reason` when it is the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish_reason = "length"

    @property
    def length(self) -> int:
        """Prompt and committed tokens."""
        return len(self.prompt) + len(self.ids)


@torch.inference_mode()
def decode(
    model: Model, requests: Sequence[Request], sampling: Sampling, drafts: int
) -> Iterator[tuple[Request, list[int]]]:
    """Run `requests` as one batch; yields (request, newly committed tokens) as they come.

    drafts: K, from 0 (plain) to n_future - 1. A request leaves the batch as soon as its `finish_reason` is set, by
    `commit` or by the caller between two yields. Raises ConfigError for a K or a prompt that the model cannot run.
    """
    check_requests(model, requests, drafts)
    active = [request for request in requests if request.max_tokens > 0]
    if not active:
        return
    stepper, heads, device = model.stepper(), drafts + 1, model.device
    cache = stepper.new_cache(len(active), max(len(r.prompt) + r.max_tokens for r in active) + heads, heads)
    width = max(len(r.prompt) for r in active)
    tokens = torch.tensor([r.prompt + [0] * (width - len(r.prompt)) for r in active], device=device)
    last = torch.tensor([len(r.prompt) - 1 for r in active], device=device)
    # (heads, B, 1, D): what stands right of a shorter prompt is padding that no kept position attends to
    hidden = stepper.forward(tokens, cache, heads)[:, torch.arange(len(active), device=device), last, None]
    drafted: list[list[int]] = [[] for _ in active]  # the prefill verifies nothing and is no step
    prefill = True
    while True:
        picked, logprobs = _pick_targets(stepper.logits(hidden[0]), active, sampling)
        counts = [accepted(draft, tokens) for draft, tokens in zip(drafted, picked, strict=True)]
        for row, request in enumerate(active):
            new = _commit(request, picked[row][: counts[row] + 1], logprobs[row])
            if not prefill:
                request.steps.append(Step(tuple(drafted[row]), min(counts[row], len(new)), len(new)))
            yield request, new
        prefill = False
        # Everything committed stays but the newest token, which has not been through the model yet.
        cache.roll_back([min(n, r.length - 1) for n, r in zip(cache.lengths, active, strict=True)])
        alive = [row for row, request in enumerate(active) if request.finish_reason is None]
        if not alive:
            return
        if len(alive) < len(active):
            cache.select(alive)
            active, counts, hidden = [active[row] for row in alive], [counts[row] for row in alive], hidden[:, alive]
        drafted = _pick_drafts(stepper, hidden[1:], counts, active, sampling)
        tokens = torch.tensor([[r.ids[-1], *d] for r, d in zip(active, drafted, strict=True)], device=device)
        hidden = stepper.forward(tokens, cache, heads)


def check_requests(model: Model, requests: Sequence[Request], drafts: int) -> None:
    """Raises ConfigError for a K or a prompt that the model cannot run."""
    n, limit = model.config.n_future, model.config.max_position_embeddings
    if not 0 <= drafts < n:
        raise ConfigError(f"drafts = {drafts}, but a model with {n} heads drafts 0 to {n - 1} tokens per step")
    for request in requests:
        if not request.prompt:
            raise ConfigError("the prompt holds no token, and this tokenizer has no token that begins a text")
        if len(request.prompt) + request.max_tokens > limit:
            raise ConfigError(
                f"prompt of {len(request.prompt)} tokens + {request.max_tokens} new ones exceed the model's "
                f"{limit} positions; lower max_tokens or shorten the prompt"
            )


def _pick_targets(
    logits: Tensor, requests: Sequence[Request], sampling: Sampling
) -> tuple[list[list[int]], list[list[float]]]:
    """The target's own token after each of a step's positions, logits (B, T, V), and its log-probability."""
    offsets = torch.arange(logits.size(1), device=logits.device)
    tokens = pick(logits, _lengths(requests, logits) + offsets, _seeds(requests, logits), sampling)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return tokens.tolist(), logprobs.tolist()


def _pick_drafts(
    stepper: Stepper, hidden: Tensor, counts: Sequence[int], requests: Sequence[Request], sampling: Sampling
) -> list[list[int]]:
    """Drafts from states (K, B, T, D) of heads 2..K+1 at each row's last accepted position, `counts` into the step.

    They are picked with the noise that the target will use at their position, which makes them agree more often.
    """
    rows = torch.arange(len(requests), device=hidden.device)
    at = hidden[:, rows, torch.tensor(counts, device=hidden.device)].transpose(0, 1)  # (B, K, D)
    logits = stepper.logits(at)
    offsets = torch.arange(logits.size(1), device=logits.device)
    drafts: list[list[int]] = pick(
        logits, _lengths(requests, logits) + offsets, _seeds(requests, logits), sampling
    ).tolist()
    return drafts


def _commit(request: Request, tokens: Sequence[int], logprobs: Sequence[float]) -> list[int]:
    new: list[int] = []
    for token, logprob in zip(tokens, logprobs, strict=False):
        request.commit(token, logprob)
        new.append(token)
        if request.finish_reason is not None:
            break
    return new


def _lengths(requests: Sequence[Request], like: Tensor) -> Tensor:
    """Position (B, 1) of each request's next token."""
    return torch.tensor([[request.length] for request in requests], device=like.device)


def _seeds(requests: Sequence[Request], like: Tensor) -> Tensor:
    return torch.tensor([[request.seed] for request in requests], device=like.device)
