"""Drafts from elsewhere than the model's own heads, which drafter a decode takes, and what its steps cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.draft import Drafter, ParallelDrafter, Proposal, SequentialDrafter, Start, Turn, chained, last_of, padded
from foretoken.draft_heads import DeepSeekDrafter, JointDrafter, LinearDrafter, StackedDrafter
from foretoken.errors import ConfigError
from foretoken.model import Model, Stepper
from foretoken.pace import SMALLEST_VOCABULARY, WARY, WARY_OF_ROWS, WIDTH, Pace, measured_costs, never_falling
from foretoken.request import Request
from foretoken.sampling import Keys, Sampling
from foretoken.tree import Tree


@dataclass(frozen=True)
class Lookup:
    """Draft what followed the last `longest` tokens, or fewer of them, where they stood before in prompt and output."""

    longest: int = 3

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ConfigError(f"lookup = {self.longest} must be at least 1 token")


# Where drafts come from: None for the model's own heads, or another model with the same tokens, or the text so far.
Source = Model | Lookup | None
LENGTH = 256  # positions behind which steps are measured
MOST = {Lookup: 8, Model: 4}  # drafts a step, where nobody says how many


class ModelDrafter(Drafter):
    """Another model with the same tokens, which decodes plainly from draft to draft (Leviathan et al. 2023)."""

    heads_draft = False
    cache: KVCache

    def __init__(self, stepper: Stepper, drafts: int, rows: int, capacity: int, other: Stepper) -> None:
        super().__init__(stepper, drafts)
        self.other = other
        self.cache = other.new_cache(rows, capacity, 1)
        self.cache.select([])

    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """See `Drafter`."""
        assert cache is not None
        unread = [own or text for own, text in zip(start.new, start.texts, strict=True)]
        kept = [length + len(tokens) for length, tokens in zip(cache.lengths, unread, strict=True)]
        hidden, _ = self.other.forward(padded(unread, self.other.model.device), cache, 1, last=len(unread) == 1)
        cache.roll_back(kept)  # what was padding
        state = last_of(hidden[0], [len(tokens) - 1 for tokens in unread])

        def states(picks: list[Tensor]) -> Tensor:
            return self.other.forward(picks[-1], cache, 1)[0][0] if picks else state

        proposal = chained(self, start, self.other, states)
        cache.roll_back(kept)
        return proposal


class LookupDrafter(Drafter):
    """What followed the last tokens where they stood before (prompt lookup, Saxena 2023): no model drafts."""

    heads_draft = False

    def __init__(self, stepper: Stepper, drafts: int, longest: int) -> None:
        super().__init__(stepper, drafts)
        self.longest = longest

    def propose(self, start: Start, cache: KVCache | None) -> Proposal:
        """See `Drafter`. A row has as many drafts as follow its match, maybe none."""
        return [looked_up(text, self.longest, self.drafts) for text in start.texts], None

    def turn(
        self, requests: Sequence[Request], tokens: list[list[int]], cache: KVCache, keys: Keys, tree: Tree | None = None
    ) -> Turn:
        """See `Drafter`. Its drafts are certain: under rejection, q is 1 for each of them."""
        self.proposed = None
        if keys.sampling.rejects and len(tokens[0]) > 1:
            drafted = torch.tensor([row[1:] for row in tokens], device=self.stepper.model.device)
            certain = torch.full((*drafted.shape, keys.vocab_size), float("-inf"), device=drafted.device)
            self.proposed = certain.scatter_(-1, drafted[..., None], 0.0)
        return super().turn(requests, tokens, cache, keys, tree)


def looked_up(text: Sequence[int], longest: int, count: int) -> list[int]:
    """Up to `count` tokens that followed the newest earlier place of the last `longest` tokens, or of fewer of them."""
    back = list(reversed(text))
    best, length, at = 0, 0, 0
    while length < longest:
        try:
            at = back.index(back[0], at + 1)  # the next older place of the last token
        except (IndexError, ValueError):
            break
        same = 1
        while same < longest and at + same < len(back) and back[at + same] == back[same]:
            same += 1
        if same > length:
            best, length = at, same
    return back[max(0, best - count) : best][::-1]


def most_drafts(stepper: Stepper, source: Source) -> int:
    """How many drafts a step may have where nobody says how many; of a sequential head, one beyond its training."""
    if source is not None:
        return MOST[type(source)]
    return stepper.config.n_future - (0 if stepper.config.goes_on else 1)


def step_pace(
    stepper: Stepper, rows: int, source: Source = None, draft_vocab: int | None = None, temperature: float = 0.0
) -> Pace:
    """The pace of steps of `rows` rows, whose costs are measured when first asked for; kept with the stepper.

    draft_vocab: how many first tokens drafts are among; where nobody says, smaller vocabularies are tried.
    temperature: what is accepted at another one tells little, so each has a pace of its own, to a quarter.
    """
    steps, heat = (rows, source, draft_vocab), round(4 * min(temperature, 2.0))
    if (steps, heat) not in stepper.paces:
        known = next((pace for (same, _), pace in stepper.paces.items() if same == steps), None)
        stepper.paces[steps, heat] = known.anew() if known else _measured(stepper, *steps)
    return stepper.paces[steps, heat]


def _measured(stepper: Stepper, rows: int, source: Source, draft_vocab: int | None) -> Pace:
    length, V = min(LENGTH, stepper.config.max_position_embeddings), stepper.config.vocab_size
    requests = [Request([0] * length, 1, ids=[0]) for _ in range(rows)]
    sampling = Sampling(1.0)
    most = min(most_drafts(stepper, source), stepper.config.max_position_embeddings - 1)
    room = length + 3 * most + 2 + WIDTH
    # One for all: where a cache's memory lies, and whether it is in the processor's caches, is a matter of luck.
    cache = stepper.new_cache(rows, room, make_drafter(stepper, most, rows, room, source).heads)

    def step(drafts: int, tree: Tree | None = None, among: int | None = draft_vocab) -> Callable[[], Turn]:
        drafter = make_drafter(stepper, drafts, rows, room, source)
        drafter.tree, drafter.draft_vocab = tree, among
        tokens = [[0] * (1 + (drafts if tree is None else len(tree.parents))) for _ in range(rows)]

        def run() -> Turn:
            cache.lengths = [length] * rows
            drafter.stand(cache.lengths)
            keys = Keys(sampling, [0] * rows, [length] * rows, drafts + 1, V, stepper.model.device)
            return drafter.turn(requests, tokens, cache, keys, tree)

        for place in range((drafts + 1) // 2):  # half of the drafts shall be accepted, which takes its time, too
            for row, picked in zip(tokens, run().picked, strict=True):
                row[place + 1] = picked[place]
        return run

    steps = [step(drafts) for drafts in range(most + 1)]
    further = WIDTH - 1 if most and not isinstance(source, Lookup) and V >= WIDTH else 0
    if further:
        steps.append(step(most, Tree((*range(most), *[0] * further), (*[0] * most, *range(1, WIDTH)))))
    sizes = smaller_vocabularies(stepper, source) if most and draft_vocab is None else []
    costs = measured_costs([*steps, *(step(most, None, sizes[-1]) for _ in sizes[:1])])
    smallest = costs.pop() if sizes else 0.0
    costs = never_falling(costs)
    row = (costs.pop() - costs[-1]) / further if further else math.inf
    branching = source is None and not stepper.config.drafts_follow
    gained = max(0.0, costs[-1] - smallest)
    spared = {size: gained * (V - size) / (V - sizes[-1]) for size in sizes}
    return Pace(costs, row, branching, spared, WARY if rows == 1 else WARY_OF_ROWS)


def smaller_vocabularies(stepper: Stepper, source: Source) -> list[int]:
    """Vocabularies that drafts may be among beside the whole one, large ones first: halves of halves."""
    if isinstance(source, Lookup):
        return []
    halves = (stepper.config.vocab_size >> power for power in range(1, 5))
    return [size // 64 * 64 for size in halves if size >= SMALLEST_VOCABULARY]


def tree_pace(stepper: Stepper, drafts: int, source: Source = None) -> Pace:
    """A pace that only follows acceptance, to grow trees of a given size by."""
    return Pace([1.0] * (drafts + 1), branching=source is None and not stepper.config.drafts_follow)


def make_drafter(stepper: Stepper, drafts: int, rows: int, capacity: int, source: Source = None) -> Drafter:
    """What drafts `drafts` tokens a step for the model behind `stepper`; its rows hold at most `capacity` positions."""
    if drafts and isinstance(source, Lookup):
        return LookupDrafter(stepper, drafts, source.longest)
    if drafts and isinstance(source, Model):
        return ModelDrafter(stepper, drafts, rows, capacity, source.stepper())
    kind = stepper.config.head_kind
    if kind in ("sequential", "deepseek") and drafts:
        return (SequentialDrafter if kind == "sequential" else DeepSeekDrafter)(stepper, drafts, rows, capacity)
    return _PARALLEL.get(kind, StackedDrafter)(stepper, drafts)


_PARALLEL: dict[str, type[ParallelDrafter]] = {
    "parallel": ParallelDrafter,
    "sequential": ParallelDrafter,  # plain decoding
    "linear": LinearDrafter,
    "joint": JointDrafter,
}
