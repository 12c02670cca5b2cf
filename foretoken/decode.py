"""The decode loop: plain and self-speculative decoding, one loop and one rule.

1. Prefill: the model runs on the prompts. Head 1 gives the first token, the further heads the first K drafts.
2. Step: the model runs on the last committed token and the K drafts, K + 1 positions in one forward.
3. The target's own token is picked at each of these positions; drafts are accepted as long as they are that token.
4. The accepted drafts and the target's next token are committed; the cache forgets everything behind them.
5. The further heads draft from the last accepted position. Repeat from 2. K = 0 is plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from foretoken.draft import make_drafter
from foretoken.errors import ConfigError
from foretoken.model import Model
from foretoken.request import Request, Step
from foretoken.sampling import Sampling, accepted, choose, keyed_noise


@torch.inference_mode()
def decode(
    model: Model, requests: Sequence[Request], sampling: Sampling, drafts: int
) -> Iterator[tuple[Request, list[int]]]:
    """Run `requests` as one batch; yields (request, newly committed tokens) as they come.

    drafts: K. 0 is plain decoding; parallel heads draft up to n_future - 1, a sequential head goes on from its own
    drafts as far as asked. A request leaves the batch as soon as its `finish_reason` is set, by `commit` or by the
    caller between two yields. Raises ConfigError for a K or a prompt that the model cannot run.
    """
    check_requests(model, requests, drafts)
    active = [request for request in requests if request.max_tokens > 0]
    if not active:
        return
    stepper, device = model.stepper(), model.device
    capacity = max(len(r.prompt) + r.max_tokens for r in active) + drafts + 1
    drafter = make_drafter(stepper, drafts, len(active), capacity)
    cache = stepper.new_cache(len(active), capacity, drafter.heads)
    width = max(len(r.prompt) for r in active)
    # What stands right of a shorter prompt is padding that no kept position attends to.
    tokens = torch.tensor([r.prompt + [0] * (width - len(r.prompt)) for r in active], device=device)
    hidden, z = stepper.forward(tokens, cache, drafter.heads)
    at = [len(r.prompt) - 1 for r in active]
    verified = hidden[0, torch.arange(len(active), device=device), torch.tensor(at, device=device), None]  # (B, 1, D)
    drafted: list[list[int]] = [[] for _ in active]  # the prefill verifies nothing and is no step
    noise = _noise(model, active, sampling, 1)
    prefill = True
    while True:
        picked, logprobs = _pick_targets(stepper.logits(verified), noise, sampling)
        counts = [accepted(draft, tokens) for draft, tokens in zip(drafted, picked, strict=True)]
        for row, request in enumerate(active):
            new = _commit(request, picked[row][: counts[row] + 1], logprobs[row])
            if not prefill:
                request.steps.append(Step(tuple(drafted[row]), min(counts[row], len(new)), len(new)))
            yield request, new
        at, prefill = (at if prefill else counts), False
        # Everything committed stays but the newest token, which has not been through the model yet.
        cache.roll_back([min(n, r.length - 1) for n, r in zip(cache.lengths, active, strict=True)])
        alive = [row for row, request in enumerate(active) if request.finish_reason is None]
        if not alive:
            return
        if len(alive) < len(active):
            cache.select(alive)
            drafter.select(alive)
            active, at = [active[row] for row in alive], [at[row] for row in alive]
            hidden, z = hidden[:, alive], z[alive]
        # The tokens that stand next are drafted, and then verified, with the same noise, so that they agree more often.
        noise = _noise(model, active, sampling, drafts + 1)
        if drafts:
            drafted = drafter.propose(active, at, hidden, z, partial(_pick_drafts, noise, sampling)).tolist()
        else:
            drafted = [[] for _ in active]
        tokens = torch.tensor([[r.ids[-1], *d] for r, d in zip(active, drafted, strict=True)], device=device)
        hidden, z = stepper.forward(tokens, cache, drafter.heads)
        verified = hidden[0]


def check_requests(model: Model, requests: Sequence[Request], drafts: int) -> None:
    """Raises ConfigError for a K or a prompt that the model cannot run."""
    n, limit = model.config.n_future, model.config.max_position_embeddings
    if model.config.sequential and not 0 <= drafts < limit:
        raise ConfigError(
            f"drafts = {drafts}, but a model of {limit} positions drafts 0 to {limit - 1} tokens per step"
        )
    if not model.config.sequential and not 0 <= drafts < n:
        raise ConfigError(f"drafts = {drafts}, but a model with {n} heads drafts 0 to {n - 1} tokens per step")
    for request in requests:
        if not request.prompt:
            raise ConfigError("the prompt holds no token, and this tokenizer has no token that begins a text")
        if len(request.prompt) + request.max_tokens > limit:
            raise ConfigError(
                f"prompt of {len(request.prompt)} tokens + {request.max_tokens} new ones exceed the model's "
                f"{limit} positions; lower max_tokens or shorten the prompt"
            )


def _noise(model: Model, requests: Sequence[Request], sampling: Sampling, count: int) -> Tensor | None:
    """The noise of the next `count` tokens of each request, (B, count, V)."""
    device = model.device
    lengths = torch.tensor([[request.length] for request in requests], device=device)
    seeds = torch.tensor([[request.seed] for request in requests], device=device)
    return keyed_noise(seeds, lengths + torch.arange(count, device=device), model.config.vocab_size, sampling)


def _pick_targets(
    logits: Tensor, noise: Tensor | None, sampling: Sampling
) -> tuple[list[list[int]], list[list[float]]]:
    """The target's own token after each of a step's positions, logits (B, T, V), and its log-probability."""
    tokens = choose(logits, noise, sampling)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return tokens.tolist(), logprobs.tolist()


def _pick_drafts(noise: Tensor | None, sampling: Sampling, logits: Tensor, first: int) -> Tensor:
    """Drafts (B, k) from logits (B, k, V), the first of them the step's draft number `first`."""
    return choose(logits, None if noise is None else noise[:, first : first + logits.size(1)], sampling)


def _commit(request: Request, tokens: Sequence[int], logprobs: Sequence[float]) -> list[int]:
    new: list[int] = []
    for token, logprob in zip(tokens, logprobs, strict=False):
        request.commit(token, logprob)
        new.append(token)
        if request.finish_reason is not None:
            break
    return new
