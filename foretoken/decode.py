"""The decode loop: plain and self-speculative decoding, one loop and one rule.

1. Prefill: the model runs on a request's prompt. Head 1 gives the first token, the drafter the first K drafts.
2. Step: the model runs on each row's last committed token and its K drafts, K + 1 positions in one forward.
3. The target's own token is picked at each of these positions; drafts are accepted as long as they are that token.
4. The accepted drafts and the target's next token are committed; the cache forgets everything behind them.
5. The drafter goes on from the last accepted position. Repeat from 2. K = 0 is plain decoding.

Rows advance by different numbers of tokens. A request that ends leaves its row to one that waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from foretoken.draft import make_drafter
from foretoken.errors import ConfigError
from foretoken.model import Model
from foretoken.request import Request, Step
from foretoken.sampling import Keys, Sampling


def decode(
    model: Model, requests: Sequence[Request], sampling: Sampling, drafts: int, slots: int | None = None
) -> Iterator[tuple[Request, list[int]]]:
    """Run `requests` to their ends; yields (request, newly committed tokens) as they come.

    drafts: K. 0 is plain decoding; parallel heads draft up to n_future - 1, a sequential head goes on from its own
    drafts as far as asked. slots: how many requests run at a time, by default all; the others wait, and take the rows
    of those that end. A request ends when its `finish_reason` is set, by `commit` or by the caller between two yields.
    Raises ConfigError for a K or a prompt that the model cannot run.
    """
    check_requests(model, requests, drafts)
    waiting = deque(request for request in requests if request.max_tokens > 0)
    if not waiting:
        return
    stepper, rows = model.stepper(), min(len(waiting), slots or len(waiting))
    # The last step may begin one token before the end, accept K drafts and draft K more.
    capacity = max(len(r.prompt) + r.max_tokens for r in waiting) + 2 * drafts + 1
    drafter = make_drafter(stepper, drafts, rows, capacity)
    cache = stepper.new_cache(rows, capacity, drafter.heads)
    cache.select([])

    def keys(batch: Sequence[Request], count: int) -> Keys:
        """The noise of the next `count` tokens of each request."""
        positions = [request.length for request in batch]
        return Keys(sampling, [r.seed for r in batch], positions, count, model.config.vocab_size, model.device)

    batch: list[Request] = []
    drafted: list[list[int]] = []
    ahead: Keys | None = None  # of the tokens that are drafted, and then verified, with the same noise
    while batch or waiting:
        while waiting and len(batch) < rows:
            request = waiting.popleft()
            if request.finish_reason is not None:
                continue
            row = cache.vacant()
            hidden, z = stepper.forward(torch.tensor([request.prompt], device=model.device), row, drafter.heads)
            (token,), (logprob,) = stepper.pick_targets(hidden[0, :, -1:], keys([request], 1))
            yield request, _commit(request, token, logprob)  # the prefill verifies nothing and is no step
            if request.finish_reason is None:
                cache.join(row)
                drafted.append(drafter.join(request, hidden, z, keys([request], drafts)))
                batch.append(request)
                ahead = None
        if not batch:
            continue
        tokens = [[request.ids[-1], *draft] for request, draft in zip(batch, drafted, strict=True)]
        turn = drafter.turn(batch, tokens, cache, ahead or keys(batch, drafts + 1))
        for index, request in enumerate(batch):
            if request.finish_reason is None:
                count = turn.accepted[index]
                new = _commit(request, turn.picked[index][: count + 1], turn.logprobs[index])
                request.steps.append(Step(tuple(drafted[index]), min(count, len(new)), len(new)))
                yield request, new
        # Everything committed stays but the newest token, which has not been through the model yet.
        cache.roll_back([min(n, r.length - 1) for n, r in zip(cache.lengths, batch, strict=True)])
        drafted, ahead = turn.drafts, turn.ahead
        alive = [index for index, request in enumerate(batch) if request.finish_reason is None]
        if len(alive) < len(batch):
            cache.select(alive)
            drafter.select(alive)
            batch, drafted, ahead = [batch[index] for index in alive], [drafted[index] for index in alive], None


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


def _commit(request: Request, tokens: Sequence[int], logprobs: Sequence[float]) -> list[int]:
    new: list[int] = []
    for token, logprob in zip(tokens, logprobs, strict=False):
        request.commit(token, logprob)
        new.append(token)
        if request.finish_reason is not None:
            break
    return new
