"""The compiled decoding step is its PyTorch twin, depends on nothing beside a request, and is never needed."""

from __future__ import annotations

import copy
import gc
import logging
import math
import os
import platform
import random
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run, tiny_model
from invariants import (
    Violation,
    counts_add_up,
    drafts_are_the_heads,
    follows,
    greedy_is_argmax,
    logprobs_are_targets,
    require,
    same_output,
    sampling_law,
)
from test_sampling import slow_gumbel, slow_mix
from torch import Tensor

from foretoken import model as stepping
from foretoken.cache import KVCache
from foretoken.decode import Batch, decode
from foretoken.errors import CheckpointError
from foretoken.kernels import library
from foretoken.model import Model, Stepper
from foretoken.native import MOST_TOKENS, Native
from foretoken.request import Request
from foretoken.sampling import Keys, Sampling, filtered, rejection

if library() is None:
    pytest.skip("no compiled decoding step here", allow_module_level=True)

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["parallel", "sequential"]
DRAFTS = {"parallel": [0, 1, 2, 3], "sequential": [0, 1, 2, 3, 6]}
GREEDY, SOFT, REJECTION = Sampling(), Sampling(1.0), Sampling(1.0, accept="rejection")
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]


def small(kind: str = "parallel", dtype: torch.dtype = torch.float32, **fields: object) -> Model:
    return tiny_model(**{"head_kind": kind, "dtype": dtype, **fields})


def native(model: Model) -> Native:
    found = model.stepper().native
    assert found is not None
    return found


def twin(model: Model) -> Model:
    """The same weights, decoded by PyTorch alone."""
    model = copy.deepcopy(model)
    model.use_stepper(Stepper(model, compiled=False))
    return model


def through(
    model: Model,
    requests: Sequence[Request],
    drafts: int,
    sampling: Sampling,
    slots: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Request]:
    """Decode requests, at most `slots` at a time; `between` is what the caller does between two yields."""
    for _ in decode(model, requests, sampling, drafts, slots):
        between()
    return list(requests)


def some_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(17) for _ in range(length)] for length in lengths]


# Compiled is PyTorch

HEADS = [("parallel", 1), ("parallel", 2), ("parallel", 3), ("parallel", 4), ("sequential", 4)]
SHAPES = [  # tails behind vectors of 4, 8, 16 and 32: of the width, of a head's, of the MLP's
    {"width": 16, "head_dim": 4},
    {"width": 36, "head_dim": 22, "intermediate_size": 50},
    {"width": 64, "head_dim": 16},
    {"width": 40, "head_dim": 80, "intermediate_size": 96},
    {"width": 72, "head_dim": 34, "vocab": 35},
]


def agree(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Equal to `tolerance` of the root mean square of what is wanted."""
    require(found.shape == wanted.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(wanted.shape)}")
    gap = float((found.float() - wanted.float()).square().mean().sqrt() / wanted.float().square().mean().sqrt())
    require(gap <= tolerance, f"{what}: differ by {gap:.3g} of their size")


def ways(rng: random.Random, moves: int) -> Iterator[tuple[str, list[int]]]:
    """Random moves of a cache of three rows: what is written, forgotten, kept and taken in."""
    rows, written = 3, 0
    for _ in range(moves):
        kind = rng.choice(["write", "write", "back", "select", "join"]) if written else "write"
        if kind == "back":
            yield kind, [rng.randrange(6) for _ in range(rows)]
        elif kind == "select":
            kept = rng.sample(range(rows), rng.randint(1, rows))
            rows = len(kept)
            yield kind, kept
        elif kind == "join" and rows < 3:
            rows += 1
            yield kind, [rng.randint(1, 9)]
        else:
            written += 1
            yield "write", [rng.choice([1, 2, 3, 4, 5, 9])]


def written(
    stepper: Stepper, tokens: Tensor, caches: tuple[KVCache, KVCache | None], heads: int
) -> list[tuple[str, Tensor]]:
    """All that a stepper gives for tokens (B, T + 2) behind what its caches hold, the last two of them as drafts."""
    cache, drafts = caches
    hidden, z = stepper.forward(tokens[:, :-2], cache, heads)
    found = [("states", hidden), ("the trunk's output", z), ("logits", stepper.logits(hidden))]
    if drafts is not None:
        state = stepper.draft(tokens[:, 1:-1], z, drafts)
        kept = list(drafts.lengths)
        further = stepper.draft(tokens[:, -1:], state[:, -1:], drafts)
        drafts.roll_back(kept)
        found += [("drafting states", state), ("further states", further), ("drafts", stepper.logits(further))]
    return found


def driven_together(models: Sequence[Model], seed: int, tolerance: float) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    config = models[0].config
    heads = 1 if config.sequential else config.n_future
    steppers = [model.stepper() for model in models]
    caches = [(s.new_cache(3, 96, heads), s.new_draft_cache(3, 96) if config.sequential else None) for s in steppers]
    held = [cache for pair in caches for cache in pair if cache is not None]
    for kind, numbers in ways(rng, 9):
        for cache in held if kind in ("back", "select") else []:
            if kind == "select":
                cache.select(numbers)
            else:
                cache.roll_back([max(0, length - n) for length, n in zip(cache.lengths, numbers, strict=True)])
        if kind in ("write", "join"):
            rows = 1 if kind == "join" else len(held[0].lengths)
            tokens = torch.randint(0, config.vocab_size, (rows, numbers[0] + 2), generator=g)
            views = [tuple(c.vacant() if kind == "join" and c else c for c in pair) for pair in caches]
            both = [written(s, tokens, view, heads) for s, view in zip(steppers, views, strict=True)]
            for (what, found), (_, wanted) in zip(*both, strict=True):
                agree(found, wanted, tolerance, f"{what} after {kind} {numbers}")
            for pair, view in zip(caches, views, strict=True) if kind == "join" else []:
                for cache, row in zip(pair, view, strict=True):
                    if cache is not None:
                        cache.join(row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_equal_pytorch(architecture: str, kv_heads: int, dtype: torch.dtype) -> None:
    first = ARCHITECTURES.index(architecture) + kv_heads
    for index, (kind, n) in enumerate(HEADS):
        shape = SHAPES[(first + index) % len(SHAPES)]
        model = small(kind, dtype, architecture=architecture, kv_heads=kv_heads, n_future=n, seed=index, **shape)
        assert native(model)
        driven_together([model, twin(model)], index, 1e-5 if dtype == torch.float32 else 0.1)


def test_another_model_does_not_agree() -> None:
    """What the wide tolerance of bfloat16 still sees: one matrix of one head turned by a quarter."""
    model = small(dtype=torch.bfloat16)
    changed = twin(model)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weight = getattr(changed.heads[2].self_attn, name).weight
            weight.copy_(weight.roll(4, 0))
        with pytest.raises(Violation):
            driven_together([model, changed], 0, 0.1)


def steps_agree(found: Sequence[Request], wanted: Sequence[Request]) -> None:
    for a, b in zip(found, wanted, strict=True):
        same_output(a, b, 1e-4)
        require(a.steps == b.steps, "other drafts, or accepted otherwise")


DECODED = [
    GREEDY, SOFT, Sampling(0.7, top_p=0.9), Sampling(1.5, min_p=0.1), Sampling(0.9, top_k=8, top_p=0.9, min_p=0.02),
    REJECTION, Sampling(0.8, top_k=5, accept="rejection"), Sampling(1.2, top_p=0.6, accept="rejection"),
    Sampling(0.0, accept="rejection"),
]  # fmt: skip
DECODED_NAMES = [
    "greedy", "soft", "top-p", "min-p", "filters",
    "rejection", "rejection-top-k", "rejection-top-p", "rejection-greedy",
]  # fmt: skip


@pytest.mark.parametrize("sampling", DECODED, ids=DECODED_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_pytorch(kind: str, sampling: Sampling) -> None:
    for peaked in (True, False):
        model = small(kind, seed=3, peaked=peaked)
        slow = twin(model)
        for drafts in DRAFTS[kind]:
            found = run(model, PROMPTS, drafts, sampling, [24, 1, 17, 9])
            steps_agree(found, run(slow, PROMPTS, drafts, sampling, [24, 1, 17, 9]))
            for request in found:
                counts_add_up(request, drafts)
                logprobs_are_targets(model, request, 1e-4)
                if sampling.temperature == 0:
                    greedy_is_argmax(model, request, 1e-4)
                if sampling.accept == "keyed":
                    drafts_are_the_heads(model, request, sampling)


FLAT = [Sampling(3.0, top_p=0.97), Sampling(3.0, top_k=2000), Sampling(2.0, top_k=900, top_p=0.5, min_p=0.001)]


@pytest.mark.parametrize("sampling", FLAT, ids=["top-p", "top-k", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_filters_of_a_large_vocabulary_equal_pytorch(kind: str, sampling: Sampling) -> None:
    """Which keep most of it: many tokens are as likely as the last one kept, but for rounding."""
    model = small(kind, vocab=3000, peaked=False)
    kept = {token for request in run(model, PROMPTS, 3, sampling, 40) for token in request.ids}
    assert len(kept) > 100
    steps_agree(*(run(each, PROMPTS, 3, sampling, 40) for each in (model, twin(model))))
    rejection = replace(sampling, accept="rejection")
    steps_agree(*(run(each, PROMPTS, 3, rejection, 40) for each in (model, twin(model))))


def test_filters_pass_over_logits_that_are_no_numbers() -> None:
    """Where sorting them could leave its memory; the token's log-probability is an error later."""
    for sampling in FLAT:
        model = small("parallel", vocab=3000)
        steps = decode(model, [Request([3, 1, 4], 9)], sampling, 0)
        next(steps)  # the prompt, which PyTorch reads
        with torch.no_grad():
            model.lm_head.weight[::3] = math.nan
        with pytest.raises(CheckpointError, match="no numbers"):
            next(steps)


@pytest.mark.parametrize("sampling", [GREEDY, SOFT, REJECTION], ids=["greedy", "soft", "rejection"])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_among_the_first_tokens_equal_pytorch(kind: str, sampling: Sampling) -> None:
    """And to the last bit plain decoding, in bfloat16, where that does not depend on drafts."""
    model, short = small(kind, seed=3, peaked=False), small(kind, torch.bfloat16, width=40, peaked=False)
    for draft_vocab in (1, 5, 16, 17):
        found, wanted = (run(m, PROMPTS, 3, sampling, draft_vocab=draft_vocab) for m in (model, twin(model)))
        steps_agree(found, wanted)
        assert max(token for r in found for step in r.steps for token in step.drafted) < draft_vocab
        if sampling.accept == "keyed":
            drafted = run(short, PROMPTS, 3, sampling, draft_vocab=draft_vocab)
            for a, b in zip(drafted, run(short, PROMPTS, 0, sampling), strict=True):
                same_output(a, b, 0.0)


@pytest.mark.parametrize("sampling", [GREEDY, SOFT, REJECTION], ids=["greedy", "soft", "rejection"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_is_its_parts(
    kind: str, dtype: torch.dtype, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn is the compiled forward, the picks in PyTorch and the compiled chain of drafts, to the last bits."""
    model = small(kind, dtype, width=64)
    found = {drafts: run(model, PROMPTS, drafts, sampling) for drafts in DRAFTS[kind]}
    monkeypatch.setattr("foretoken.draft.MOST_TOKENS", 0)
    monkeypatch.setattr(Native, "turn", None)
    for drafts in DRAFTS[kind]:
        steps_agree(found[drafts], run(model, PROMPTS, drafts, sampling))


# Small models lie in memory once more, as panels

panels = pytest.mark.skipif(library().foretoken_panel() == 0, reason="this machine multiplies no pairs of bfloat16")


def packed(kind: str = "parallel", **fields: object) -> Model:
    """A model of whole panels, but for its vocabulary."""
    model = small(kind, torch.bfloat16, **{"width": 64, "head_dim": 16, **fields})
    assert native(model).packing is not None
    return model


@panels
@pytest.mark.parametrize("fields", [{}, {"width": 96, "head_dim": 48, "kv_heads": 1}, {"intermediate_size": 112}])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_panels_give_what_rows_give(
    architecture: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, n in HEADS:
        model = packed(kind, n_future=n, architecture=architecture, **fields)
        with monkeypatch.context() as patch:
            patch.setattr("foretoken.native.MOST_PACKED", 0)
            rows = copy.deepcopy(model)
            assert native(rows).packing is None
        driven_together([model, rows], n, 0.03)


@panels
@pytest.mark.parametrize("kind", KINDS)
def test_panels_follow_their_weights(kind: str) -> None:
    """Changed in their own memory, as training and loading do, and with two rows in each other's places."""
    model, other = packed(kind, seed=1, peaked=False), packed(kind, seed=2, peaked=False)
    before = run(model, PROMPTS, 3, SOFT)
    with torch.no_grad():
        for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
            found.copy_(wanted)
    after = run(model, PROMPTS, 3, SOFT)
    assert [r.ids for r in after] == [r.ids for r in run(other, PROMPTS, 3, SOFT)] != [r.ids for r in before]
    with torch.no_grad():
        for each in (model, other):
            each.trunk[0].mlp.down_proj.weight[[1, 40]] = each.trunk[0].mlp.down_proj.weight[[40, 1]]
            each.lm_head.weight[[3, 11]] = each.lm_head.weight[[11, 3]]
    swapped = [r.ids for r in run(model, PROMPTS, 3, SOFT)]
    assert swapped == [r.ids for r in run(copy.deepcopy(other), PROMPTS, 3, SOFT)] != [r.ids for r in after]


@panels
@pytest.mark.parametrize("kind", KINDS)
def test_panels_read_long_prompts_in_parts(kind: str) -> None:
    model = packed(kind, peaked=False)
    slow = twin(model)
    for length in (MOST_TOKENS + 1, 2 * MOST_TOKENS, 150):
        tokens = torch.tensor(some_prompts([length, length]))
        found, wanted = (written(m.stepper(), tokens, caches_of(m), 1) for m in (model, slow))
        for (what, a), (_, b) in zip(found, wanted, strict=True):
            agree(a, b, 0.1, what)
        plain, drafted = (run(model, tokens.tolist(), drafts, SOFT, 20) for drafts in (0, 3))
        for a, b in zip(drafted, plain, strict=True):
            same_output(a, b, 0.0)


def caches_of(model: Model) -> tuple[KVCache, KVCache | None]:
    stepper = model.stepper()
    return stepper.new_cache(2, 192, 1), stepper.new_draft_cache(2, 192) if model.config.sequential else None


# Drafts, batch, slots and threads change no bit

LONG = some_prompts([3, 70, 1, MOST_TOKENS, 8])  # prompts that PyTorch reads and that the compiled step reads
LIMITS = [20, 5, 13, 9, 16]


def same_bits(a: Request, b: Request) -> None:
    same_output(a, b, 0.0)


def fresh_requests(prompts: Sequence[list[int]], limits: Sequence[int]) -> list[Request]:
    return [
        Request(list(prompt), limit, seed) for seed, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def each_alone(model: Model, drafts: int, sampling: Sampling) -> list[Request]:
    return [through(model, [request], drafts, sampling)[0] for request in fresh_requests(LONG, LIMITS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 40, 64])  # heads of 8, 10 and 16
@pytest.mark.parametrize("kind", KINDS)
def test_speculative_is_plain_to_the_last_bit(kind: str, width: int, dtype: torch.dtype) -> None:
    model = small(kind, dtype, width=width)
    for sampling in (GREEDY, SOFT, Sampling(1.1, top_p=0.95)):
        plain, accepted = each_alone(model, 0, sampling), 0
        for drafts in DRAFTS[kind]:
            together = through(model, fresh_requests(LONG, LIMITS), drafts, sampling)
            slots = through(model, fresh_requests(LONG, LIMITS), drafts, sampling, 2)
            for found in (each_alone(model, drafts, sampling), together, slots):
                for a, b in zip(found, plain, strict=True):
                    same_bits(a, b)
            accepted += sum(step.accepted for request in together for step in request.steps)
        assert accepted > 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_their_neighbours(dtype: torch.dtype, kv_heads: int) -> None:
    """Heads of 32: whole vectors in both types, whose keys are turned for up to six queries at a time."""
    model = small("sequential", dtype, width=128, kv_heads=kv_heads, peaked=False)
    plain = run(model, LONG, 0, SOFT, 8)
    for drafts in range(1, 9):
        for a, b in zip(run(model, LONG, drafts, SOFT, 8), plain, strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_long_drafts_are_plain(kind: str, dtype: torch.dtype) -> None:
    """Up to the longest block, and beyond it; PyTorch picks where a turn would be longer than one."""
    n = MOST_TOKENS + 2 if kind == "parallel" else 4
    model = small(kind, dtype, width=16, n_future=n, layers=n + 1 if kind == "parallel" else 3)
    edge = (MOST_TOKENS - 1) // 2
    for drafts in (edge - 1, edge, MOST_TOKENS - 1, MOST_TOKENS):
        exact = dtype == torch.float32 or drafts < MOST_TOKENS
        for sampling in (GREEDY, SOFT) if exact else ():
            plain, found = run(model, PROMPTS, 0, sampling, 9), run(model, PROMPTS, drafts, sampling, 9)
            for a, b in zip(found, plain, strict=True):
                same_output(a, b, 1e-4)
                assert len(a.steps[0].drafted) == drafts


@pytest.mark.parametrize("sampling", [GREEDY, SOFT, REJECTION], ids=["greedy", "soft", "rejection"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str, dtype: torch.dtype, sampling: Sampling) -> None:
    for kv_heads, width in ((1, 40), (2, 40), (4, 40), (2, 64)):
        model = small(kind, dtype, kv_heads=kv_heads, width=width)
        outputs = []
        for threads in (1, 2, 3):
            native(model).model.threads = threads
            outputs.append(run(model, [*PROMPTS, *PROMPTS], 3, sampling, 9))  # more rows than a thread makes alone
        for found in outputs[1:]:
            for a, b in zip(found, outputs[0], strict=True):
                same_bits(a, b)
                assert a.steps == b.steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rejection_depends_on_drafts_alone(kind: str, dtype: torch.dtype) -> None:
    """Not on the batch nor on the slots; and without a draft it is a plain draw."""
    model = small(kind, dtype, width=64, peaked=False)
    for sampling in (REJECTION, Sampling(1.0, top_k=9, accept="rejection")):
        for drafts in DRAFTS[kind]:
            alone = each_alone(model, drafts, sampling)
            for slots in (None, 2):
                found = through(model, fresh_requests(LONG, LIMITS), drafts, sampling, slots)
                for a, b in zip(found, alone, strict=True):
                    same_bits(a, b)
                    assert a.steps == b.steps
    for a, b in zip(each_alone(model, 0, REJECTION), each_alone(model, 0, SOFT), strict=True):
        same_bits(a, b)


# Picks


def picks_are_chosen(model: Model, temperature: float, rows: int) -> None:
    """A turn's tokens and log-probabilities are those that `Keys.choose` and log_softmax make of the same logits."""
    V, T, stepper = model.config.vocab_size, 4, model.stepper()
    g = torch.Generator().manual_seed(int(10 * temperature) + V)
    tokens = torch.randint(0, V, (rows, T), generator=g)
    seeds = [-(2**63), 2**63 - 1, *(torch.randint(-(2**63), 2**63 - 1, (rows - 2,), generator=g).tolist())]
    positions = torch.randint(0, 10**6, (rows,), generator=g).tolist()
    keys = Keys(Sampling(temperature), seeds, positions, T, V, torch.device("cpu"))
    caches = [stepper.new_cache(rows, 8, 1) for _ in range(2)]
    logits = stepper.logits(stepper.forward(tokens, caches[0], 1)[0][0])
    picked, logprobs, *_ = native(model).turn(tokens.tolist(), caches[1], None, keys, 0, None)
    wanted = keys.choose(logits)
    assert picked == wanted.tolist()
    exact = logits.double().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    assert float((torch.tensor(logprobs) - exact).abs().max()) < 2e-6 * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("vocab", [5, 17, 260, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 3.0])
def test_picks_are_pytorchs(temperature: float, vocab: int) -> None:
    for peaked in (True, False):
        picks_are_chosen(small(n_future=1, layers=1, vocab=vocab, peaked=peaked), temperature, 300)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_logits_are_picked_alike(temperature: float) -> None:
    model = small(n_future=1, layers=1, vocab=260)
    with torch.no_grad():
        model.lm_head.weight[130:] = model.lm_head.weight[:130]
    picks_are_chosen(model, temperature, 100)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    picks_are_chosen(model, temperature, 100)


# Rejection


def law_model(kind: str = "parallel", dtype: torch.dtype = torch.float32) -> Model:
    """Five tokens; heads unlike each other, and far from uniform, so that a draft taken on trust shows."""
    model = small(kind, torch.float64, width=8, vocab=5, peaked=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "lm_head.weight":
                p.mul_(12)
    return model.to(dtype)


LAWS = [
    ("parallel", 1, REJECTION, 4000),
    ("parallel", 3, REJECTION, 8000),
    ("sequential", 2, REJECTION, 5000),
    ("parallel", 2, Sampling(2.0, top_k=4, accept="rejection"), 4000),
    ("sequential", 1, Sampling(0.7, top_p=0.9, accept="rejection"), 4000),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "pytorch"])
@pytest.mark.parametrize(("kind", "drafts", "sampling", "samples"), LAWS, ids=["K1", "K3", "chain", "top-k", "top-p"])
def test_law_of_rejection(kind: str, drafts: int, sampling: Sampling, samples: int, dtype: torch.dtype) -> None:
    model = law_model(kind, dtype)
    assert (model.stepper().native is not None) == (dtype == torch.float32)
    samples = samples if dtype == torch.float32 else samples // 2  # PyTorch takes its time
    requests = sampling_law(model, [1, 2, 3], drafts, sampling, samples)
    assert {step.accepted for request in requests for step in request.steps} == set(range(drafts + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_law_of_rejection_among_the_first_tokens(kind: str) -> None:
    """Compiled, and, with a filter, where PyTorch picks."""
    for sampling, samples in ((REJECTION, 3000), (Sampling(1.5, top_k=2, accept="rejection"), 1200)):
        requests = sampling_law(law_model(kind), [1, 2, 3], 2, sampling, samples, draft_vocab=3)
        assert {step.accepted for request in requests for step in request.steps} == {0, 1, 2}


def test_a_law_of_all_tokens_for_drafts_of_some_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug to fear: q as the head gives it, for drafts that were drawn among fewer tokens."""
    real = Stepper.pick_drafts

    def pick_drafts(own: Stepper, states: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return real(own, states, *rest)[0], own.logits(states)  # type: ignore[arg-type]

    model = law_model(dtype=torch.float64)
    sampling_law(model, [1, 2, 3], 1, REJECTION, 1200, draft_vocab=3)
    monkeypatch.setattr(Stepper, "pick_drafts", pick_drafts)
    with pytest.raises(Violation):
        sampling_law(model, [1, 2, 3], 1, REJECTION, 1200, draft_vocab=3)


def slow_rejection(
    p: list[list[float]], q: list[list[float]], drafts: list[int], seed: int, position: int, bug: str = ""
) -> tuple[list[int], int]:
    """Chen et al. 2023, token by token, for one row: p (K + 1, V), q (K, V); with a bug, if one is named."""

    def drawn(odds: list[float], at: int) -> int:
        scores = [slow_gumbel(seed, at, token) + torch.tensor(x).log().item() for token, x in enumerate(odds)]
        return max(range(len(odds)), key=lambda token: scores[token])

    for k, draft in enumerate(drafts):
        bits = slow_mix(slow_mix(slow_mix(seed % 2**64) ^ (position + k)) ^ len(p[k]))
        u = ((bits >> 12) + 0.5) / 2**52
        if u * (1.0 if bug == "accepted_with_p" else q[k][draft]) < p[k][draft]:
            continue
        rest = [a - b for a, b in zip(p[k], q[k], strict=True)]
        if bug == "residual_not_clamped":
            rest = [abs(x) for x in rest]
        if bug == "residual_is_p":
            rest = p[k]
        return [*drafts[:k], drawn([max(0.0, x) for x in rest], position + k)], k
    last = q[-1] if bug == "bonus_from_q" else p[-1]
    return [*drafts, drawn(last, position + len(drafts))], len(drafts)


def rejection_with(bug: str) -> Callable[[Tensor, Tensor, Tensor, Keys], tuple[list[list[int]], list[int]]]:
    """`sampling.rejection`, row by row."""

    def rejected(logits: Tensor, drafts: Tensor, proposed: Tensor, keys: Keys) -> tuple[list[list[int]], list[int]]:
        temperature, K = keys.sampling.temperature, drafts.size(1)
        p = (filtered(logits, keys.sampling) / temperature).softmax(-1).tolist()
        q = (proposed.to(logits.dtype) / temperature).softmax(-1).tolist()
        rows = zip(p, q, drafts.tolist(), keys.seeds, keys.positions, strict=True)
        tokens, counts = zip(*[slow_rejection(*row, bug) for row in rows], strict=True)
        return torch.tensor([[*row, *[0] * (K + 1 - len(row))] for row in tokens]), torch.tensor(counts)

    return rejected


@pytest.mark.parametrize("sampling", [REJECTION, Sampling(1.7, top_k=5, accept="rejection")], ids=["all", "top-k"])
def test_rejection_equals_slow_reference(sampling: Sampling) -> None:
    g = torch.Generator().manual_seed(0)
    logits, proposed = (2 * torch.randn(200, k, 9, generator=g, dtype=torch.float64) for k in (4, 3))
    proposed = filtered(proposed + logits[:, :3], sampling)
    seeds = torch.randint(-(2**63), 2**63 - 1, (200,), generator=g).tolist()
    keys = Keys(sampling, seeds, list(range(200)), 4, 9, torch.device("cpu"))
    drafts = keys.choose_drafts(proposed)[..., 0]
    found = rejection(logits, drafts, proposed, keys)
    for a, b in zip(found, rejection_with("")(logits, drafts, proposed, keys), strict=True):
        assert torch.equal(a, b)
    assert set(found[1].tolist()) == {0, 1, 2, 3}


REJECTION_BUGS = ["residual_not_clamped", "residual_is_p", "accepted_with_p", "bonus_from_q"]


@pytest.mark.parametrize("bug", ["", *REJECTION_BUGS])
def test_wrong_rejection_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "rejection", rejection_with(bug))
    if not bug:
        sampling_law(law_model(dtype=torch.float64), [1, 2, 3], 1, REJECTION, 3000)
        return
    with pytest.raises(Violation):
        sampling_law(law_model(dtype=torch.float64), [1, 2, 3], 1, REJECTION, 3000)


def first_tokens(samples: int) -> tuple[Tensor, Tensor]:
    """How often each of 9 tokens comes first when one draft is verified, and its law."""
    g = torch.Generator().manual_seed(0)
    q, p, bonus = torch.randn(3, 1, 1, 9, generator=g, dtype=torch.float64).expand(3, samples, 1, 9)
    keys = Keys(REJECTION, list(range(samples)), [5] * samples, 2, 9, torch.device("cpu"))
    tokens, _ = rejection(torch.cat((p, bonus), 1), keys.choose_drafts(q)[..., 0], q, keys)
    return tokens[:, 0].bincount(minlength=9), p[0, 0].softmax(-1)


def test_law_of_one_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it would be if the noise that made the draft also made the token that comes in its place."""
    follows(*(x.numpy() for x in first_tokens(200_000)))
    monkeypatch.setattr(Keys, "draft_noise", Keys.noise)
    with pytest.raises(Violation):
        follows(*(x.numpy() for x in first_tokens(200_000)))


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_accepts_more(kind: str) -> None:
    model = small(kind, seed=1, peaked=False)
    rates = {}
    for sampling in (SOFT, REJECTION):
        steps = [step for r in run(model, [[1, 2, 3]] * 300, 3, sampling, 12) for step in r.steps[:-1]]
        rates[sampling.accept] = sum(step.accepted for step in steps) / len(steps)
    assert rates["rejection"] >= rates["keyed"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_towards_temperature_zero_is_greedy(kind: str) -> None:
    model = small(kind)
    for a, b in zip(run(model, PROMPTS, 3, Sampling(1e-9, accept="rejection")), run(model, PROMPTS, 3), strict=True):
        same_bits(a, b)


# Slots


def cancelling(requests: Sequence[Request], after: dict[int, int]) -> Callable[[], None]:
    """A caller that ends request i once it has `after[i]` tokens, also while it waits."""

    def between() -> None:
        for index, count in after.items():
            if requests[index].finish_reason is None and len(requests[index].ids) >= count:
                requests[index].finish_reason = "cancelled"

    return between


@pytest.mark.parametrize("sampling", [GREEDY, SOFT, REJECTION], ids=["greedy", "soft", "rejection"])
@pytest.mark.parametrize("slots", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "pytorch"])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_change_nothing(kind: str, dtype: torch.dtype, slots: int, sampling: Sampling) -> None:
    model = small(kind, dtype, width=64, seed=1, peaked=False)
    prompts = some_prompts([3, 8, 1, 5, 2, 7, 4, 1, 6, 3, 2, 9])
    limits = [14, 3, 0, 9, 20, 1, 11, 0, 6, 12, 2, 8]
    after = {0: 5, 3: 1, 8: 0, 9: 7}  # in its course, at its first token, while it waits, and with another one
    requests = fresh_requests(prompts, limits)
    requests[6].finish_reason = "cancelled"  # before anything runs
    through(model, requests, 3, sampling, slots, cancelling(requests, after))
    for index, request in enumerate(requests):
        (alone,) = through(model, [Request(request.prompt, request.max_tokens, request.seed)], 3, sampling)
        gap = 0.0 if dtype == torch.float32 else 1e-9
        if request.finish_reason == "cancelled":
            assert index in (6, *after)
            assert after.get(index, 0) <= len(request.ids) < after.get(index, 0) + 4
            assert request.ids == alone.ids[: len(request.ids)]
            assert request.logprobs == pytest.approx(alone.logprobs[: len(request.ids)], abs=gap)
        else:
            same_output(request, alone, gap)
            assert request.finish_reason == (None if request.max_tokens == 0 else "length")
            assert request.steps == alone.steps
    assert sum(request.finish_reason == "cancelled" for request in requests) == 5
    assert requests[6].ids == []


def test_all_running_requests_may_be_cancelled_at_once() -> None:
    model = small()
    requests = fresh_requests(some_prompts([2] * 6), [9] * 6)
    through(model, requests, 3, SOFT, 2, cancelling(requests, {0: 2, 1: 1, 2: 1, 3: 1}))
    for request in requests[4:]:
        same_bits(request, through(model, [Request(request.prompt, 9, request.seed)], 3, SOFT)[0])
    assert [r.finish_reason for r in requests] == ["cancelled"] * 4 + ["length"] * 2


def resident() -> int:
    """Bytes of memory that the process has now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def held() -> int:
    """How many batches and caches there are."""
    gc.collect()
    return sum(type(each) in (Batch, KVCache) for each in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what a process has now")
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_requests(kind: str) -> None:
    model, rng = small(kind, layers=3, n_future=3, width=16), random.Random(0)
    prompts = some_prompts([rng.randint(1, 8) for _ in range(2000)])
    requests = fresh_requests(prompts, [rng.randint(1, 12) for _ in prompts])
    ended, cancelled, after_500, before = 0, 0, 0, held()
    for request, _ in decode(model, requests, SOFT, 2, 8):
        victim = rng.choice(requests)  # one that runs, waits, or has ended
        for chosen, odds in ((request, 0.01), (victim, 0.01)):
            if chosen.finish_reason is None and rng.random() < odds:
                chosen.finish_reason = "cancelled"
                cancelled += 1
        ended += request.finish_reason is not None
        if ended >= 500 and not after_500:
            after_500 = resident()
    assert resident() - after_500 < 4e6
    assert held() == before
    assert all(request.finish_reason in ("length", "cancelled") for request in requests)
    assert 40 < cancelled == sum(request.finish_reason == "cancelled" for request in requests) < 200
    for request in requests[::50]:
        (alone,) = through(model, [Request(request.prompt, request.max_tokens, request.seed)], 0, SOFT)
        assert request.ids == alone.ids[: len(request.ids)]
        assert request.finish_reason == "cancelled" or request.ids == alone.ids


def test_caches_that_lie_where_others_lay() -> None:
    """A row of four, of which blocks lie four rows apart, begins where a cache of one row lay before."""
    model = small(layers=5)
    stepper, c, capacity = model.stepper(), model.config, 64
    stepper.grow_tables(capacity)
    blocks = len(stepper.trunk) + 1
    memory = [torch.zeros(blocks * 4 * c.num_key_value_heads * capacity * c.head_dim) for _ in range(2)]

    def logits(rows: int) -> Tensor:
        shape = (blocks, rows, c.num_key_value_heads, capacity, c.head_dim)
        keys, values = (side[: math.prod(shape)].view(shape) for side in memory)
        cache = KVCache(shape, model.dtype, model.device, (keys, values))
        cache.select([])
        for first in range(1, min(rows, 2) + 1):
            row = cache.vacant()
            stepper.forward(torch.tensor([[first, 2, 3, 4, 5]]), row, 1)
            cache.join(row)
        return stepper.logits(stepper.forward(torch.tensor([[6]] * len(cache.lengths)), cache, 1)[0][0])

    wanted, alone = logits(4), logits(1)
    assert torch.equal(logits(4), wanted)
    assert torch.equal(logits(1), alone)


# Where nothing can be compiled


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A machine on which nothing is compiled yet; the library of this one is found again afterwards."""
    monkeypatch.delenv("FORETOKEN_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("foretoken.kernels", logging.WARNING)
    return record.getMessage()


def decodes_in_pytorch() -> None:
    """Twice, so that a second warning would be seen."""
    for kind in KINDS:
        model = small(kind)
        assert model.stepper().native is None
        steps_agree(run(model, PROMPTS, 3, SOFT), run(twin(model), PROMPTS, 3, SOFT))


def test_it_can_be_switched_off(elsewhere: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere.setenv("FORETOKEN_NATIVE", "0")
    assert library() is None
    decodes_in_pytorch()
    assert not caplog.records


def test_without_a_compiler(elsewhere: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    elsewhere.delenv("CXX", raising=False)
    elsewhere.setenv("PATH", str(tmp_path))
    assert library() is None
    decodes_in_pytorch()
    assert "no C++ compiler" in one_warning(caplog)


BROKEN = {
    "no version": "exit 1",
    "no such file": None,
    "errors": '[ "$1" = --version ] || { echo "kernels.cpp:1:1: error: not today" >&2; exit 1; }',
    "nothing made": "exit 0",
    "no library": '[ "$1" = --version ] || { while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"; }',
}


@pytest.mark.parametrize("how", BROKEN)
def test_with_a_compiler_that_fails(
    how: str, elsewhere: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    compiler, body = tmp_path / "broken", BROKEN[how]
    if body is not None:
        script(compiler, body)
    elsewhere.setenv("CXX", str(compiler))
    assert library() is None
    decodes_in_pytorch()
    says = one_warning(caplog)
    assert str(compiler) in says
    assert "decoding runs in PyTorch" in says
    assert "not today" in says or how != "errors"
    assert "\n" not in says


def test_with_a_cache_that_cannot_be_written(
    elsewhere: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert library() is None
    decodes_in_pytorch()
    assert "decoding runs in PyTorch" in one_warning(caplog)


# Other processors


def compiler_for(march: str, path: Path) -> Path:
    """This machine's compiler, for another processor, and in a hurry."""
    real = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    words = f"s/^-march=native$/-march={march}/; s/^-O3$/-O1/"
    return script(path, f"exec {real} $(printf '%s\\n' \"$@\" | sed '{words}')")


def runs(march: str) -> bool:
    """Whether this machine runs programs for an x86-64 processor of that kind."""
    wide = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
    needed = {"x86-64": (), "sandybridge": ("avx",), "haswell": ("avx2", "fma", "bmi2"), "skylake-avx512": wide}[march]
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8").split() if cpu.exists() else []
    return platform.machine() == "x86_64" and all(flag in flags for flag in needed)


@pytest.mark.parametrize("march", ["x86-64", "sandybridge", "haswell", "skylake-avx512"])
def test_older_processors_give_the_same(march: str, elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not runs(march):
        pytest.skip(f"this machine is no {march}")
    elsewhere.setenv("CXX", str(compiler_for(march, tmp_path / "compiler")))
    for index, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            kind, n = HEADS[index]
            model = small(kind, dtype, n_future=n, **shape)
            assert native(model)
            driven_together([model, twin(model)], index, 1e-5 if dtype == torch.float32 else 0.1)
    for kind in KINDS:
        model = small(kind, width=64)
        for sampling in (SOFT, REJECTION):
            steps_agree(run(model, PROMPTS, 3, sampling), run(twin(model), PROMPTS, 3, sampling))
        for drafts in DRAFTS[kind]:
            for a, b in zip(run(model, PROMPTS, drafts, SOFT), run(model, PROMPTS, 0, SOFT), strict=True):
                same_bits(a, b)


def test_it_is_compiled_once(elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    made = f'echo "$1" >> {calls}; [ "$1" = --version ] || {{ while [ "$1" != -o ]; do shift; done; echo > "$2"; }}'
    for _ in range(2):
        elsewhere.setenv("CXX", str(script(tmp_path / "compiler", made)))
        library()
        library.cache_clear()
    assert calls.read_text().split() == ["--version", "-O3", "--version"]
    elsewhere.setenv("CXX", str(script(tmp_path / "compiler", f"{made}; echo another version")))
    library()
    assert calls.read_text().split()[3:] == ["--version", "-O3"]


# Weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_seen(kind: str, dtype: torch.dtype) -> None:
    model, other = small(kind, dtype), small(kind, dtype, seed=9)
    stepper, before = model.stepper(), run(model, PROMPTS, 3)
    model.load_state_dict(other.state_dict())
    assert model.stepper() is stepper
    for a, b, old in zip(run(model, PROMPTS, 3), run(other, PROMPTS, 3), before, strict=True):
        same_bits(a, b)
        assert a.ids != old.ids
    model.load_state_dict(
        {name: tensor.clone() for name, tensor in small(kind, dtype).state_dict().items()}, assign=True
    )
    assert model.stepper() is not stepper
    for a, b in zip(run(model, PROMPTS, 3), before, strict=True):
        same_bits(a, b)


@torch.no_grad()
def test_every_parameter_is_seen() -> None:
    for kind, architecture in (("parallel", "qwen3"), ("sequential", "qwen2")):
        model, g = small(kind, architecture=architecture), torch.Generator().manual_seed(7)
        stepper, slow = model.stepper(), twin(model)
        for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
            q.copy_(p.add_(torch.randn(p.shape, generator=g), alpha=0.3))
            driven_together([model, slow], 2, 1e-5)
            assert model.stepper() is stepper, name


def test_tied_embeddings() -> None:
    model = small(tie_word_embeddings=True)
    steps_agree(run(model, PROMPTS, 3, SOFT), run(twin(model), PROMPTS, 3, SOFT))


def test_other_types_go_through_pytorch() -> None:
    for dtype in (torch.float64, torch.float16):
        assert small(dtype=dtype).stepper().native is None
    model = small()
    assert native(model)
    model.double()
    assert model.stepper().native is None
    assert native(model.float())


@pytest.mark.parametrize("kind", KINDS)
def test_long_blocks_go_through_pytorch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small(kind), {"forward": list[int](), "draft": list[int]()}
    noted = {name: getattr(Native, name) for name in seen}

    def note(name: str) -> Callable[..., object]:
        def noting(own: Native, tokens: list[list[int]], *rest: object) -> object:
            seen[name].append(len(tokens[0]))
            return noted[name](own, tokens, *rest)

        return noting

    for name in seen:
        monkeypatch.setattr(Native, name, note(name))
    prompts = some_prompts([MOST_TOKENS - 1, MOST_TOKENS, MOST_TOKENS + 1, 3])
    found = run(model, prompts, 3, SOFT, 6)
    assert seen["forward"] == [MOST_TOKENS - 1, MOST_TOKENS, 3]
    # A sequential head reads all of a prompt but the last token, with which it begins to draft.
    read = [MOST_TOKENS - 2, MOST_TOKENS - 1, MOST_TOKENS, 2]
    assert seen["draft"] == (read if kind == "sequential" else [])
    steps_agree(found, run(twin(model), prompts, 3, SOFT, 6))
