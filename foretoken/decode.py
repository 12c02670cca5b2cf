"""The decode loop: plain and self-speculative decoding, one loop and one rule.

1. Prefill: the model runs on a request's prompt. Head 1 gives the first token, the drafter the first K drafts.
2. Step: the model runs on each row's last committed token and its K drafts, K + 1 positions in one forward.
3. The target's own token is picked at each of these positions; drafts are accepted as long as they are that token.
4. The accepted drafts and the target's next token are committed; the cache forgets everything behind them.
5. The drafter goes on from the last accepted position. Repeat from 2. K = 0 is plain decoding.

Rows advance by different numbers of tokens. A request that ends leaves its row to one that waits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.draft import Turn
from foretoken.drafters import Lookup, LookupDrafter, Source, make_drafter, step_pace, tree_pace
from foretoken.errors import CheckpointError, ConfigError
from foretoken.model import Model
from foretoken.pace import MOST_NODES, Pace
from foretoken.request import Request, Step, changes
from foretoken.sampling import Keys, Sampling
from foretoken.tree import Tree, chain

LARGEST_TREE = 32  # nodes
CHOOSE_EVERY, GROW_EVERY = 8, 32  # steps, where their number of drafts, and their shape, are not given


def decode(
    model: Model, requests: Sequence[Request], sampling: Sampling, drafts: int | None, slots: int | None = None,
    source: Source = None, nodes: int | None = None, draft_vocab: int | None = None,
) -> Iterator[tuple[Request, list[int]]]:  # fmt: skip
    """Run `requests` to their ends; yields (request, newly committed tokens) as they come.

    drafts: K. 0 is plain decoding; parallel heads draft up to n_future - 1, a sequential head goes on from its own
    drafts as far as asked, where its depths share an unembedding. None: as many as pay, by what steps cost on this
    machine and how many drafts are accepted (see `pace`), at most those the model was trained for and, of a sequential
    head, one more. nodes: drafts of a step as a tree of so many places, at most K deep; by default a chain, or what
    pays where K is None. slots: how many requests run at a time, by default all; the others wait, and take the rows of
    those that end. source: where drafts come from, by default the model's heads. draft_vocab: of how many first tokens
    drafts are, by default all, or what pays where K is None. A request ends when its `finish_reason` is set, by
    `commit` or by the caller between two yields. Raises ConfigError for a K or a prompt that the model cannot run, and
    CheckpointError where the model gives no numbers.
    """
    check_requests(model, requests, drafts, source)
    check_nodes(nodes, sampling, source)
    check_draft_vocab(draft_vocab, model, source)
    waiting = deque(request for request in requests if request.max_tokens > 0)
    if not waiting:
        return
    batch = Batch(
        model, waiting, sampling, drafts, min(len(waiting), slots or len(waiting)), source, nodes, draft_vocab
    )
    while batch.requests or waiting:
        while waiting and len(batch.requests) < batch.rows:
            request = waiting.popleft()
            if request.finish_reason is not None:
                continue
            row, hidden, z = batch.prefill(request)
            (token,), (logprob,) = batch.stepper.pick_targets(
                hidden[0, :, -1:], batch.keys([request], 1), changes([request], lambda row: [[]])
            )
            yield request, _commit(request, token, logprob)  # the prefill verifies nothing and is no step
            if request.finish_reason is None:
                batch.join(request, row, hidden, z)
        if not batch.requests:
            continue
        drafted, turn = batch.drafted, batch.step()
        for index, request in enumerate(batch.requests):
            if request.finish_reason is None:
                count = len(turn.paths[index]) - 1
                new = _commit(request, turn.picked[index][: count + 1], turn.logprobs[index])
                # Where a row has fewer drafts than others, what fills it up may be right by luck: then it was a draft.
                own = (*drafted[index], *turn.picked[index][len(drafted[index]) : count])
                request.steps.append(Step(own, min(count, len(new)), len(new)))
                yield request, new
        batch.settle(turn)
    batch.learn()


class Batch:
    """The requests that run, one a row, with the drafts on their way and the caches behind them."""

    def __init__(
        self, model: Model, requests: Iterable[Request], sampling: Sampling, drafts: int | None, rows: int,
        source: Source = None, nodes: int | None = None, draft_vocab: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.sampling, self.rows, self.stepper = model, sampling, rows, model.stepper()
        self.pace: Pace | None = None
        self.count = 0  # steps
        self.nodes, self.adaptive = nodes, drafts is None
        if drafts is None:
            self.pace = step_pace(self.stepper, rows, source, draft_vocab, sampling.temperature)
            drafts = len(self.pace.costs) - 1
        elif nodes is not None:
            self.pace = tree_pace(self.stepper, drafts, source)
        # The last step may begin one token before the end, accept K drafts and draft K more.
        capacity = max(len(r.prompt) + r.max_tokens for r in requests) + 2 * drafts + 1 + (nodes or MOST_NODES)
        self.drafter = make_drafter(self.stepper, drafts, rows, capacity, source)
        self.most, self.draft_vocab = drafts, draft_vocab
        self.tree: Tree | None = None  # the shape of what is drafted
        self.among: int | None = None  # and of how many first tokens it is
        self.cache = self.stepper.new_cache(rows, capacity, self.drafter.heads)
        self.cache.select([])
        self.requests: list[Request] = []
        self.drafted: list[list[int]] = []
        self.ahead: Keys | None = None  # of the tokens that are drafted, and then verified, with the same noise
        # Of rows that the pace has not heard of: the shapes of their drafts, which were accepted, what they hold.
        self.unheard: tuple[list[Tree], list[list[int]], list[list[int]]] = ([], [], [])

    def learn(self) -> None:
        """Tell the pace of the last steps: of some at once, since that takes a part of a small model's step."""
        if self.pace is not None and self.unheard[0]:
            self.pace.record(*self.unheard, self.among)
        self.unheard = ([], [], [])

    def grow(self) -> None:
        """Choose the shape of the next drafts, and the tokens they are among."""
        chosen = self.pace.draft_vocab if self.pace is not None and self.adaptive else None
        self.drafter.draft_vocab = self.draft_vocab or chosen
        if self.pace is not None and not self.sampling.rejects and not isinstance(self.drafter, LookupDrafter):
            self.drafter.tree = self.pace.tree(self.drafter.drafts, self.nodes)

    def keys(self, requests: Sequence[Request], count: int) -> Keys:
        """The noise of the next `count` tokens of each request."""
        seeds, positions = [r.seed for r in requests], [r.length for r in requests]
        return Keys(self.sampling, seeds, positions, count, self.model.config.vocab_size, self.model.device)

    def prefill(self, request: Request) -> tuple[KVCache, Tensor, Tensor]:
        """Run the model on a request's prompt, alone: its row, and what `Stepper.forward` returns."""
        if not self.requests:  # no row's caches are behind: heads that have stopped can come back
            self.learn()
            if self.pace is not None and self.adaptive:
                self.drafter.drafts = self.pace.begin(self.most)
            self.grow()
        row = self.cache.vacant()
        prompt = torch.tensor([request.prompt], device=self.model.device)
        return row, *self.stepper.forward(prompt, row, self.drafter.heads, last=True)

    def join(self, request: Request, row: KVCache, hidden: Tensor, z: Tensor) -> None:
        """Take in a request whose first token has come."""
        self.cache.join(row)
        self.drafted.append(self.drafter.join(request, hidden, z, self.keys([request], self.drafter.drafts + 1)))
        self.requests.append(request)
        self.ahead, self.tree, self.among = None, self.drafter.tree, self.drafter.draft_vocab

    def step(self) -> Turn:
        """Verify the drafts, and draft on."""
        longest = max(map(len, self.drafted))  # of a lookup, rows may have fewer; what stands behind is refused or luck
        tokens = [
            [request.ids[-1], *draft, *[0] * (longest - len(draft))]
            for request, draft in zip(self.requests, self.drafted, strict=True)
        ]
        keys = self.ahead or self.keys(self.requests, len(tokens[0]))
        self.count += 1
        if self.pace is not None and self.drafter.drafts and self.count % CHOOSE_EVERY == 0:
            # Chosen from the steps before this one: its own are not known until it has drafted on.
            self.learn()
            before = self.drafter.drafts, self.pace.draft_vocab
            if self.adaptive:
                self.drafter.drafts = self.pace.choose(self.drafter.most())
            if (self.drafter.drafts, self.pace.draft_vocab) != before or self.count % GROW_EVERY == 0:
                self.grow()
        turn = self.drafter.turn(self.requests, tokens, self.cache, keys, self.tree)
        if self.pace is not None and longest:
            trees, paths, held = self.unheard
            trees += [self.tree or chain(len(draft)) for draft in self.drafted]
            # Luck behind a row's own drafts says nothing of them.
            paths += [path[: len(draft) + 1] for path, draft in zip(turn.paths, self.drafted, strict=True)]
            held += tokens
        return turn

    def settle(self, turn: Turn) -> None:
        """Forget what was not committed, and the rows of requests that have ended."""
        # Everything committed stays but the newest token, which has not been through the model yet.
        self.cache.roll_back([min(n, r.length - 1) for n, r in zip(self.cache.lengths, self.requests, strict=True)])
        self.drafted, self.ahead = turn.drafts, turn.ahead
        if self.among != self.drafter.draft_vocab:
            self.learn()
        self.tree, self.among = self.drafter.tree, self.drafter.draft_vocab
        alive = [index for index, request in enumerate(self.requests) if request.finish_reason is None]
        if len(alive) < len(self.requests):
            # The last rows take the places of those that ended: to move up would copy the caches of all behind them.
            last = alive[::-1]
            alive = [index if index in alive else last.pop(0) for index in range(len(alive))]
            self.cache.select(alive)
            self.drafter.select(alive)
            self.requests, self.drafted = [self.requests[i] for i in alive], [self.drafted[i] for i in alive]
            self.ahead = None


def check_requests(model: Model, requests: Sequence[Request], drafts: int | None, source: Source = None) -> None:
    """Raises ConfigError for a K or a prompt that the model cannot run."""
    n, limit, whose = model.config.n_future, model.config.max_position_embeddings, "model"
    drafts = drafts or 0
    if not (source is None or isinstance(source, Lookup | Model)):
        raise ConfigError(f"drafts come from a Model or a Lookup, and not from {source!r:.80}")
    if isinstance(source, Model):
        if source.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"the draft model has {source.config.vocab_size} tokens, the model {model.config.vocab_size}: "
                "they must be the same ones"
            )
        if source.config.max_position_embeddings < limit:
            limit, whose = source.config.max_position_embeddings, "draft model"
    if (model.config.goes_on or source is not None) and not 0 <= drafts < limit:
        raise ConfigError(
            f"drafts = {drafts}, but a {whose} of {limit} positions drafts 0 to {limit - 1} tokens per step"
        )
    if not model.config.goes_on and source is None and not 0 <= drafts < n:
        raise ConfigError(f"drafts = {drafts}, but a model with {n} heads drafts 0 to {n - 1} tokens per step")
    for request in requests:
        if not request.prompt:
            raise ConfigError("the prompt holds no token, and this tokenizer has no token that begins a text")
        if not 0 <= min(request.prompt) <= max(request.prompt) < model.config.vocab_size:
            raise ConfigError(f"the prompt holds a token that is none of the model's {model.config.vocab_size}")
        if len(request.prompt) + request.max_tokens > limit:
            raise ConfigError(
                f"prompt of {len(request.prompt)} tokens + {request.max_tokens} new ones exceed the {whose}'s "
                f"{limit} positions; lower max_tokens or shorten the prompt"
            )


def check_nodes(nodes: int | None, sampling: Sampling, source: Source = None) -> None:
    """Raises ConfigError for a tree that cannot be."""
    if nodes is None:
        return
    if not 1 <= nodes <= LARGEST_TREE:
        raise ConfigError(f"nodes = {nodes} must lie between 1 and {LARGEST_TREE}")
    if sampling.rejects:
        raise ConfigError("nodes: drafts are accepted by rejection along chains only")
    if isinstance(source, Lookup):
        raise ConfigError("nodes: a lookup has one continuation, and no trees")


def check_draft_vocab(draft_vocab: int | None, model: Model, source: Source = None) -> None:
    """Raises ConfigError for a part of the vocabulary that cannot be, or is not asked."""
    if draft_vocab is None:
        return
    if not 1 <= draft_vocab <= model.config.vocab_size:
        raise ConfigError(
            f"draft_vocab = {draft_vocab} must lie between 1 and the model's {model.config.vocab_size} tokens"
        )
    if isinstance(source, Lookup):
        raise ConfigError("draft_vocab: a lookup takes drafts from the text, whatever tokens they are")


def _commit(request: Request, tokens: Sequence[int], logprobs: Sequence[float]) -> list[int]:
    new: list[int] = []
    for token, logprob in zip(tokens, logprobs, strict=False):
        if math.isnan(logprob):
            raise CheckpointError("a token's log-probability is nan: the model's weights are no numbers, or overflow")
        request.commit(token, logprob)
        new.append(token)
        if request.finish_reason is not None:
            break
    return new
