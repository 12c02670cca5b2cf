"""Positive controls: each bug, seeded here, must be caught by an invariant that holds without it.

The checks are those of invariants.py, which the other tests call on the real code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import run, tiny_model
from invariants import (
    Violation,
    cached_is_full,
    drafts_are_the_heads,
    greedy_is_argmax,
    logprobs_are_targets,
    loss_is_oracle,
    no_peeking,
    random_batch,
    sampling_law,
    speculative_is_plain,
)
from test_decode import CONFIDENT, LAW, PROMPTS, VAGUE
from torch import Tensor

from foretoken import draft as drafting
from foretoken import loss, sampling
from foretoken import model as stepping
from foretoken.cache import KVCache
from foretoken.draft import Start
from foretoken.model import Model, Stepper
from foretoken.sampling import Keys, Sampling
from foretoken.tree import Tree

SOFT = Sampling(1.0)
Check = Callable[[], None]
Patch = pytest.MonkeyPatch

# The invariants, on inputs of a fixed size


def losses() -> None:
    for seed in range(12):
        loss_is_oracle(random_batch(seed))


def no_head_peeks() -> None:
    no_peeking(VAGUE, torch.tensor([[1, 2, 3, 4, 5, 6]]), 3)


def cache_holds() -> None:
    cached_is_full(VAGUE, [("write", [4]), ("back", [2, 0, 3]), ("write", [3]), ("select", [2, 0]), ("write", [1])])


def speculative() -> None:
    speculative_is_plain(VAGUE, PROMPTS, 3, SOFT)


def greedy() -> None:
    for request in run(CONFIDENT, PROMPTS, 3):
        greedy_is_argmax(CONFIDENT, request)


def logprobs() -> None:
    for request in run(VAGUE, PROMPTS, 3, SOFT):
        logprobs_are_targets(VAGUE, request)


def drafts() -> None:
    for request in run(VAGUE, PROMPTS, 3, SOFT):
        drafts_are_the_heads(VAGUE, request, SOFT)


def law() -> None:
    sampling_law(LAW, [1, 2, 3], 3, SOFT, 2500)


def law_of_one_draft() -> None:
    sampling_law(LAW, [1, 2, 3], 1, SOFT, 2500)


# The bugs


def shifted(by: int) -> Callable[[Patch], None]:
    """Head i learns the token `by` places from its own."""

    def apply(patch: Patch) -> None:
        real = loss.targets

        def targets(tokens: Tensor, document_ids: Tensor, label_mask: Tensor, n: int, **options: bool) -> Tensor:
            return real(tokens.roll(-by, 1), document_ids, label_mask, n, **options)

        patch.setattr(loss, "targets", targets)

    return apply


def leaks_over_documents(patch: Patch) -> None:
    real = loss.targets

    def targets(*windows: Any, across_documents: bool = False) -> Tensor:
        return real(*windows, across_documents=True)

    patch.setattr(loss, "targets", targets)


def document_of_the_label_before(patch: Patch) -> None:
    """The bound is looked up one place too early, so the first token behind it is learned."""
    real = loss.targets

    def targets(tokens: Tensor, document_ids: Tensor, *rest: Any, **options: bool) -> Tensor:
        late = torch.cat((document_ids[:, :1], document_ids[:, :-1]), 1)
        return real(tokens, torch.where(document_ids < 0, document_ids, late), *rest, **options)

    patch.setattr(loss, "targets", targets)


def one_count_for_all_heads(patch: Patch) -> None:
    real = loss.valid_counts
    patch.setattr(loss, "valid_counts", lambda labels: real(labels)[:1].expand(len(labels)))


def masked_positions_counted(patch: Patch) -> None:
    patch.setattr(loss, "valid_counts", lambda labels: torch.full((len(labels),), labels[0].numel()))


def mask_of_the_position(patch: Patch) -> None:
    """The prompt mask is applied to the position that predicts, not to the label."""
    real = loss.targets

    def targets(tokens: Tensor, document_ids: Tensor, label_mask: Tensor, n: int, **options: bool) -> Tensor:
        labels = real(tokens, document_ids, torch.ones_like(label_mask), n, **options)
        return labels.masked_fill(~label_mask[:, : labels.size(2)], loss.IGNORE)

    patch.setattr(loss, "targets", targets)


def bidirectional(patch: Patch) -> None:
    real = Model.context

    def context(model: Model, length: int, *packed: Tensor | None) -> Any:
        found = real(model, length, *packed)
        everything = torch.ones(1, 1, length, length, dtype=torch.bool)
        return type(found)(found.cos, found.sin, everything)

    patch.setattr(Model, "context", context)


def one_rejected_draft_stays(patch: Patch) -> None:
    real = KVCache.roll_back

    def roll_back(cache: KVCache, lengths: Sequence[int]) -> None:
        real(cache, [min(new + 1, old) for new, old in zip(lengths, cache.lengths, strict=True)])

    patch.setattr(KVCache, "roll_back", roll_back)


def all_rows_roll_back_to_the_longest(patch: Patch) -> None:
    real = KVCache.roll_back

    def roll_back(cache: KVCache, lengths: Sequence[int]) -> None:
        real(cache, [min(max(lengths), old) for old in cache.lengths])

    patch.setattr(KVCache, "roll_back", roll_back)


def rows_mixed_up(patch: Patch) -> None:
    """When a row leaves, keys move up and lengths stay."""

    def select(cache: KVCache, rows: Sequence[int]) -> None:
        index = torch.tensor(list(rows), dtype=torch.int64)
        for tensor in (cache.keys, cache.values):
            tensor[:, : len(rows)] = tensor[:, index]
        cache.lengths = cache.lengths[: len(rows)]

    patch.setattr(KVCache, "select", select)


def rotary_off_by_one_in_a_block(patch: Patch) -> None:
    """Positions of a block of several tokens start one too late."""
    real = KVCache.positions
    patch.setattr(KVCache, "positions", lambda cache, count: real(cache, count) + (1 < count < 5))


def noise_with(patch: Patch, change: Callable[[Tensor, Tensor, Sampling], tuple[Tensor, Tensor, Sampling]]) -> None:
    """The noise is that of other seeds, positions or temperature."""
    real = sampling.keyed_noise

    def keyed_noise(seeds: Tensor, positions: Tensor, vocab: int, how: Sampling) -> Tensor | None:
        seeds, positions, how = change(seeds, positions, how)
        return real(seeds, positions, vocab, how)

    patch.setattr(sampling, "keyed_noise", keyed_noise)


def noise_off_by_one_in_a_block(patch: Patch) -> None:
    """The token behind k accepted drafts is picked with the noise of the position before it."""
    noise_with(
        patch, lambda seeds, positions, how: (seeds, positions - (torch.arange(positions.size(1)) > 0).long(), how)
    )


def bonus_from_the_position_before(patch: Patch) -> None:
    """Behind a whole accepted block the next token comes from the logits of the place before."""
    real = stepping.pick_targets

    def pick_targets(logits: Tensor, keys: Keys, *_: object) -> Any:
        if logits.size(1) > 1:
            logits = torch.cat((logits[:, :-1], logits[:, -2:-1]), 1)
        return real(logits, keys)

    patch.setattr(stepping, "pick_targets", pick_targets)


def drafts_logprob_returned(patch: Patch) -> None:
    """An accepted draft keeps the log-probability that its own head gave it."""
    real_drafts, real_targets = Stepper.pick_drafts, stepping.pick_targets
    drafted: list[Tensor] = []

    def pick_drafts(stepper: Stepper, states: Tensor, keys: Keys, *_: object) -> tuple[Tensor, Tensor]:
        drafts, logits = real_drafts(stepper, states, keys)
        drafted[:] = [logits.log_softmax(-1).gather(-1, drafts)[..., 0]]
        return drafts, logits

    def pick_targets(logits: Tensor, keys: Keys, *_: object) -> Any:
        tokens, logprobs = real_targets(logits, keys)
        for row, own in zip(logprobs, drafted[0].tolist() if drafted else [], strict=False):
            row[: len(own)] = own
        return tokens, logprobs

    patch.setattr(Stepper, "pick_drafts", pick_drafts)
    patch.setattr(stepping, "pick_targets", pick_targets)


def logprobs_after_temperature_and_filters(patch: Patch) -> None:
    real = stepping.pick_targets

    def pick_targets(logits: Tensor, keys: Keys, *_: object) -> Any:
        tokens, _ = real(logits, keys)
        kept = sampling.filtered(logits, Sampling(1.0, top_k=5)).log_softmax(-1)
        return tokens, kept.gather(-1, torch.tensor(tokens)[..., None])[..., 0].tolist()

    patch.setattr(stepping, "pick_targets", pick_targets)


def soft_at_temperature_zero(patch: Patch) -> None:
    """Greedy keeps the soft distribution and draws from it."""
    soft, real = Sampling(1.0, top_p=0.95), sampling.choose
    noise_with(patch, lambda seeds, positions, how: (seeds, positions, how if how.temperature else soft))
    patch.setattr(sampling, "choose", lambda logits, noise, how: real(logits, noise, how if how.temperature else soft))


def accepts_everything(patch: Patch) -> None:
    def walk(tree: Tree, drafts: list[int], picked: list[int]) -> list[int]:
        picked[: len(drafts)] = drafts
        return list(range(len(drafts) + 1))

    patch.setattr(Tree, "walk", walk)


def accepts_then_redraws(patch: Patch) -> None:
    """A draft is accepted when it equals the target's draw; if not, another draw is emitted."""
    real_targets, real_walk = stepping.pick_targets, Tree.walk
    redraws: dict[int, list[int]] = {}

    def pick_targets(logits: Tensor, keys: Keys, change: Any = None, places: Any = None) -> Any:
        tokens, logprobs = real_targets(logits, keys, change, places)
        assert keys.noise is not None
        logits = change(logits) if change else logits
        fresh = sampling.choose(logits, keys.noise.roll(1, -1)[:, : logits.size(1)], keys.sampling)  # no draft saw it
        redraws.update({id(row): again for row, again in zip(tokens, fresh.tolist(), strict=True)})
        return tokens, logprobs

    def walk(tree: Tree, drafts: list[int], picked: list[int]) -> list[int]:
        path = real_walk(tree, drafts, picked)
        if len(path) <= len(drafts):
            picked[len(path) - 1] = redraws[id(picked)][len(path) - 1]
        return path

    patch.setattr(stepping, "pick_targets", pick_targets)
    patch.setattr(Tree, "walk", walk)


def accepts_any_likely_draft(patch: Patch) -> None:
    """A draft is accepted where the target gives it a twentieth: "typical" acceptance, which changes the law."""
    real_targets, real_walk = stepping.pick_targets, Tree.walk
    likely: dict[int, list[list[bool]]] = {}

    def pick_targets(logits: Tensor, keys: Keys, *_: object) -> Any:
        tokens, logprobs = real_targets(logits, keys)
        rows = (logits.softmax(-1) > 0.05).tolist()
        likely.update({id(row): allowed for row, allowed in zip(tokens, rows, strict=True)})
        return tokens, logprobs

    def walk(tree: Tree, drafts: list[int], picked: list[int]) -> list[int]:
        for k, draft in enumerate(drafts):
            if likely[id(picked)][k][draft]:
                picked[k] = draft
        return real_walk(tree, drafts, picked)

    patch.setattr(stepping, "pick_targets", pick_targets)
    patch.setattr(Tree, "walk", walk)


def drafts_of_another_row(patch: Patch) -> None:
    real = drafting.ParallelDrafter.propose

    def propose(drafter: Any, start: Start, cache: Any) -> Any:
        return real(drafter, replace(start, hidden=start.hidden.roll(1, 1)), cache)

    patch.setattr(drafting.ParallelDrafter, "propose", propose)


def drafts_from_the_first_position(patch: Patch) -> None:
    real = drafting.ParallelDrafter.propose

    def propose(drafter: Any, start: Start, cache: Any) -> Any:
        return real(drafter, replace(start, at=[0] * len(start.at)), cache)

    patch.setattr(drafting.ParallelDrafter, "propose", propose)


def noise_shared_by_a_batch(patch: Patch) -> None:
    noise_with(patch, lambda seeds, positions, how: (seeds * 0, positions, how))


def noise_without_a_position(patch: Patch) -> None:
    """Each request draws its noise once: every token has the right law, the joint has not."""
    noise_with(patch, lambda seeds, positions, how: (seeds, positions * 0, how))


BUGS: list[tuple[Callable[[Patch], None], Check]] = [
    (shifted(1), losses),
    (shifted(-1), losses),
    (leaks_over_documents, losses),
    (document_of_the_label_before, losses),
    (mask_of_the_position, losses),
    (one_count_for_all_heads, losses),
    (masked_positions_counted, losses),
    (bidirectional, no_head_peeks),
    (one_rejected_draft_stays, cache_holds),
    (one_rejected_draft_stays, speculative),
    (one_rejected_draft_stays, greedy),
    (all_rows_roll_back_to_the_longest, cache_holds),
    (all_rows_roll_back_to_the_longest, speculative),
    (rows_mixed_up, cache_holds),
    (rotary_off_by_one_in_a_block, cache_holds),
    (rotary_off_by_one_in_a_block, logprobs),
    (noise_off_by_one_in_a_block, speculative),
    (noise_off_by_one_in_a_block, law),
    (bonus_from_the_position_before, speculative),
    (bonus_from_the_position_before, law_of_one_draft),
    (drafts_logprob_returned, logprobs),
    (logprobs_after_temperature_and_filters, logprobs),
    (soft_at_temperature_zero, greedy),
    (accepts_everything, speculative),
    (accepts_everything, greedy),
    (accepts_everything, law),
    (accepts_then_redraws, speculative),
    (accepts_then_redraws, law),
    (accepts_any_likely_draft, speculative),
    (accepts_any_likely_draft, law),
    (drafts_of_another_row, drafts),
    (drafts_from_the_first_position, drafts),
    (noise_shared_by_a_batch, law),
    (noise_without_a_position, law),
]
NAMES = [f"{bug.__qualname__.split('.')[0]}-{check.__name__}" for bug, check in BUGS]


@pytest.mark.parametrize(
    "check", [losses, no_head_peeks, cache_holds, speculative, greedy, logprobs, drafts, law, law_of_one_draft]
)
def test_holds_without_a_bug(check: Check) -> None:
    check()


@pytest.mark.parametrize(("bug", "check"), BUGS, ids=NAMES)
def test_bug_is_caught(bug: Callable[[Patch], None], check: Check, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(Violation):
        check()


def test_fewer_tokens_cannot_show_the_bonus_bug(monkeypatch: Patch) -> None:
    """Why the law is checked on the joint of more tokens than one block drafts: this is what it would miss."""
    bonus_from_the_position_before(monkeypatch)
    sampling_law(LAW, [1, 2, 3], 1, SOFT, 2500, length=2)
    with pytest.raises(Violation):
        sampling_law(LAW, [1, 2, 3], 1, SOFT, 2500, length=3)


def test_a_stale_stepper_would_show(monkeypatch: Patch) -> None:
    """If the decoding form copied the weights, training on would leave it behind."""
    model = tiny_model(n_future=2)
    monkeypatch.setattr(type(model.stepper()), "current", lambda *_: True)
    cached_is_full(model, [("write", [2])])
    model.heads[0].mlp.up_proj.weight.data = model.heads[0].mlp.up_proj.weight.data * 1.5
    with pytest.raises(Violation):
        cached_is_full(model, [("write", [2])])
