"""What must always hold, as plain functions that raise Violation: the tests call them, and so do the seeded bugs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from conftest import run
from scipy.stats import chisquare
from torch import Tensor

from foretoken import loss
from foretoken.drafters import Source
from foretoken.model import Model
from foretoken.request import Request
from foretoken.sampling import Sampling, choose, keyed_noise

ALPHA = 1e-4  # of every statistical check; their seeds are fixed


class Violation(AssertionError):
    """An invariant does not hold. Not a bare AssertionError, so that a seeded bug is caught by the check alone."""


def require(holds: object, text: str) -> None:
    if not holds:
        raise Violation(text)


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-9) -> None:
    require(a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    gap = float((a - b).detach().abs().max()) if a.numel() else 0.0
    require(gap <= tolerance, f"{what}: differ by {gap:.3g}")  # not a number fails too


# Loss


@dataclass
class Batch:
    """Windows (B, T + n) and n hidden states for them."""

    n: int
    tokens: Tensor
    document_ids: Tensor
    label_mask: Tensor
    weights: list[float]
    across: bool
    hidden: list[Tensor]
    unembedding: Tensor

    def labels(self) -> Tensor:
        return loss.targets(self.tokens, self.document_ids, self.label_mask, self.n, across_documents=self.across)

    def leaves(self) -> tuple[list[Tensor], Tensor]:
        return [h.clone().requires_grad_() for h in self.hidden], self.unembedding.clone().requires_grad_()


def random_batch(
    seed: int, n: int = 3, rows: int = 2, positions: int = 9, vocab: int = 7, width: int = 5, across: bool = False
) -> Batch:
    """Random packing, padding and prompt masks; some documents are shorter than n, one head in six has no target."""
    g = torch.Generator().manual_seed(seed)
    T = positions + n
    breaks = torch.rand(rows, T, generator=g) < float(torch.rand((), generator=g)) * 0.6
    document_ids = breaks.long().cumsum(1)
    padding = int(torch.randint(0, T // 2 + 1, (), generator=g))
    if padding:
        side = slice(T - padding, T) if torch.rand((), generator=g) < 0.5 else slice(0, padding)
        document_ids[int(torch.randint(0, rows, (), generator=g)), side] = -1
    label_mask = torch.rand(rows, T, generator=g) < 0.8
    if torch.rand((), generator=g) < 1 / 6:
        document_ids = torch.arange(T).expand(rows, T).clone()  # no document has a second token
    if torch.rand((), generator=g) < 1 / 6:
        label_mask[:, : T - 1] = False  # only the last head can have a target
    return Batch(
        n,
        torch.randint(0, vocab, (rows, T), generator=g),
        document_ids,
        label_mask,
        (torch.rand(n, generator=g, dtype=torch.float64) * 2).tolist(),
        across,
        [torch.randn(rows, positions, width, generator=g, dtype=torch.float64) for _ in range(n)],
        torch.randn(vocab, width, generator=g, dtype=torch.float64),
    )


def loss_is_oracle(batch: Batch) -> None:
    """`mtp_loss` gives the oracle's value and its gradients for the hidden states and the unembedding."""
    hidden, weight = batch.leaves()
    labels = batch.labels()
    scales = loss.scales(batch.weights, loss.valid_counts(labels))
    fast = loss.mtp_loss(hidden, weight, labels, scales).total
    fast.backward()
    slow_hidden, slow_weight = batch.leaves()
    slow = loss.oracle_loss(
        slow_hidden, slow_weight, batch.tokens, batch.document_ids, batch.label_mask, batch.weights,
        across_documents=batch.across,
    )  # fmt: skip
    close(fast, slow, "loss")
    if slow.requires_grad:
        slow.backward()
    for d, (h, s) in enumerate(zip(hidden, slow_hidden, strict=True)):
        close(h.grad, torch.zeros_like(s) if s.grad is None else s.grad, f"gradient of head {d + 1}'s states")
    wanted = torch.zeros_like(slow_weight) if slow_weight.grad is None else slow_weight.grad
    close(weight.grad, wanted, "gradient of the unembedding")


# Model


@torch.no_grad()
def no_peeking(model: Model, tokens: Tensor, at: int) -> None:
    """Another token at `at` changes no head's output before it, and every head's from it on.

    Depth d of heads whose drafts follow each other reads d tokens further, so its outputs change from `at` - d on; of
    joint heads only the last of these tokens, so those at `at` - d do, and those from `at` on.
    """
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % model.config.vocab_size
    for d, (a, b) in enumerate(zip(model(tokens), model(changed), strict=True)):
        first = max(0, at - d) if model.config.drafts_follow else at
        require(torch.equal(a[:, :first], b[:, :first]), f"head {d + 1} sees token {at} before it comes")
        if model.config.head_kind == "joint" and d:
            require(not (a[:, first] == b[:, first]).all(-1).any(), f"head {d + 1} does not read token {at}")
            require(torch.equal(a[:, first + 1 : at], b[:, first + 1 : at]), f"head {d + 1} reads token {at} twice")
            first = at
        require(not (a[:, first:] == b[:, first:]).all(-1).any(), f"head {d + 1} does not see token {at}")


def before_maps(model: Model, tokens: Tensor) -> list[Tensor]:
    """All heads' states by a full forward, of joint heads without the maps of tokens that a drafter adds."""
    if model.config.head_kind != "joint":
        return model(tokens)  # type: ignore[no-any-return]
    context = model.context(tokens.size(1))
    z = model.run_trunk(tokens, context)
    return [model.norm(block(z, context)) for block in model.heads]


@torch.no_grad()
def cached_is_full(model: Model, moves: Sequence[tuple[str, list[int]]], seed: int = 0, rows: int = 3) -> None:
    """Every head's states from cached stepping are those of a full forward of the row's tokens.

    moves: ("write", [count]), ("back", how many to forget per row), ("select", rows to keep).
    """
    g = torch.Generator().manual_seed(seed)
    one = model.config.head_kind in ("linear", "sequential", "deepseek")  # the others run with head 1
    stepper, heads = model.stepper(), 1 if one else model.config.n_future
    cache = stepper.new_cache(rows, 64, heads)
    held: list[list[int]] = [[] for _ in range(rows)]
    for kind, numbers in moves:
        if kind == "back":
            held = [row[: max(0, len(row) - n)] for row, n in zip(held, numbers, strict=False)]
            cache.roll_back([len(row) for row in held])
        elif kind == "select":
            kept = [n % len(held) for n in numbers]
            held = [list(held[n]) for n in kept]
            cache.select(kept)
        else:
            new = torch.randint(0, model.config.vocab_size, (len(held), numbers[0]), generator=g)
            states = model.norm(stepper.forward(new, cache, heads)[0])
            for row, tokens in enumerate(held):
                tokens.extend(new[row].tolist())
                for d, full in enumerate(before_maps(model, torch.tensor([tokens]))[:heads]):
                    close(states[d, row], full[0, -numbers[0] :], f"head {d + 1}, row {row}, {len(tokens)} tokens")


def possible(moves: Sequence[tuple[str, list[int]]], rows: int = 3) -> list[tuple[str, list[int]]]:
    """The moves with selections that name rows which are left, each once."""
    pruned = []
    for kind, numbers in moves:
        if kind == "select":
            numbers = list(dict.fromkeys(n % rows for n in numbers))
            rows = len(numbers)
        pruned.append((kind, numbers))
    return pruned


# Decoding


def same_output(a: Request, b: Request, tolerance: float = 1e-9) -> None:
    require(a.ids == b.ids, f"tokens {a.ids} are not {b.ids}")
    require(a.finish_reason == b.finish_reason, f"{a.finish_reason} is not {b.finish_reason}")
    gap = max((abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)), default=0.0)
    require(gap <= tolerance, f"log-probabilities differ by {gap:.3g}")


def speculative_is_plain(
    model: Model,
    prompts: Sequence[Sequence[int]],
    drafts: int,
    sampling: Sampling | None = None,
    max_tokens: Sequence[int] = (24,),
    end_ids: Sequence[int] = (),
    tolerance: float = 1e-9,
    draft_vocab: int | None = None,
) -> list[Request]:
    """A drafted batch gives token for token what plain decoding gives each prompt alone; returns the drafted batch."""
    limits = [max_tokens[i % len(max_tokens)] for i in range(len(prompts))]
    drafted = run(model, prompts, drafts, sampling, limits, end_ids=end_ids, draft_vocab=draft_vocab)
    for i, (prompt, request) in enumerate(zip(prompts, drafted, strict=True)):
        plain = run(model, [prompt], 0, sampling, [limits[i]], [i], end_ids)[0]
        same_output(request, plain, tolerance)
        counts_add_up(request, drafts)
    return drafted


def counts_add_up(request: Request, drafts: int) -> None:
    """Prefill gives one token, each step what it accepted and one more, less what the end cut off the last."""
    require(
        len(request.ids) == 1 + sum(step.committed for step in request.steps), "tokens emitted are not those counted"
    )
    require(len(request.logprobs) == len(request.ids), "a token has no log-probability")
    for step in request.steps:
        require(len(step.drafted) == drafts, f"{len(step.drafted)} drafts instead of {drafts}")
    for step in request.steps[:-1]:
        require(step.committed == step.accepted + 1, "a step before the last was cut")
    for step in request.steps[-1:]:
        require(step.accepted <= step.committed <= step.accepted + 1, "the last step's counts cannot be")
    start = 1
    for step in request.steps:
        emitted = request.ids[start : start + step.committed]
        require(list(step.drafted[: step.accepted]) == emitted[: step.accepted], "an accepted draft was not emitted")
        start += step.committed


@torch.no_grad()
def target_logits(model: Model, request: Request) -> Tensor:
    """Head 1's logits (tokens, V) for every emitted token, from one full forward of the final sequence."""
    sequence = torch.tensor([request.prompt + request.ids])
    return model.logits(model(sequence)[0])[0, len(request.prompt) - 1 : -1]


def logprobs_are_targets(model: Model, request: Request, tolerance: float = 1e-9) -> None:
    """The returned log-probabilities are those of head 1 over the final sequence, before temperature and filters."""
    wanted = target_logits(model, request).log_softmax(-1).gather(-1, torch.tensor(request.ids)[:, None])[:, 0]
    close(torch.tensor(request.logprobs, dtype=wanted.dtype), wanted, "log-probabilities", tolerance)


def greedy_is_argmax(model: Model, request: Request, tolerance: float = 1e-9) -> None:
    """Every emitted token has, teacher-forced, the highest logit."""
    logits = target_logits(model, request)
    behind = logits.amax(-1) - logits.gather(-1, torch.tensor(request.ids)[:, None])[:, 0]
    require(float(behind.max()) <= tolerance, f"a token's logit lies {float(behind.max()):.3g} below the highest")


def with_heads(model: Model, n: int) -> Model:
    """The model, its sequential head unrolled to n - 1 depths."""
    deeper = Model(model.config.model_copy(update={"n_future": n})).to(model.dtype)
    deeper.load_state_dict(model.state_dict())
    return deeper.eval()


def pick(logits: Tensor, positions: Tensor, seeds: Tensor, sampling: Sampling) -> Tensor:
    """The tokens (...) that stand at `positions` (...), from logits (..., V) and seeds that broadcast to positions."""
    return choose(logits, keyed_noise(seeds, positions, logits.size(-1), sampling), sampling)


@torch.no_grad()
def drafts_are_the_heads(model: Model, request: Request, sampling: Sampling, draft_vocab: int | None = None) -> None:
    """Each step's drafts are what heads 2, 3, .. pick, among so many tokens, where head 1 picked the newest token.

    A sequential head is fed the step's own drafts. A wrong draft costs speed and changes no output, so no other check
    would see it.
    """
    most = max((len(step.drafted) for step in request.steps), default=0)
    model = with_heads(model, most + 1) if model.config.goes_on and most else model
    committed = 1
    for step in request.steps:
        newest = len(request.prompt) + committed - 1
        read = (request.prompt + request.ids)[: newest + 1] + list(step.drafted)
        logits = [model.logits(hidden, d)[0, newest - 1] for d, hidden in enumerate(model(torch.tensor([read])))]
        for k, draft in enumerate(step.drafted):
            position = torch.tensor(newest + 1 + k)
            logits[k + 1][draft_vocab or len(logits[k + 1]) :] = float("-inf")
            wanted = pick(logits[k + 1], position, torch.tensor(request.seed), sampling).item()
            require(draft == wanted, f"head {k + 2} drafted {draft} for position {int(position)}, not {wanted}")
        committed += step.committed


@torch.no_grad()
def drafting_is_unrolled(model: Model, moves: Sequence[tuple[str, list[int]]], seed: int = 0, rows: int = 3) -> None:
    """A sequential head stepping through its cache is the training forward, when what it is fed are the true tokens.

    moves as for `cached_is_full`. After each write the head goes on from its own states, a token at a time, and what
    it wrote is forgotten.
    """
    g = torch.Generator().manual_seed(seed)
    V, depths, stepper = model.config.vocab_size, model.config.n_future - 1, model.stepper()
    cache, drafts = stepper.new_cache(rows, 64, 1), stepper.new_draft_cache(rows, 64)
    held: list[list[int]] = [[] for _ in range(rows)]
    coming = torch.randint(0, V, (rows,), generator=g).tolist()  # each row's next token, which its last key has read
    for kind, numbers in moves:
        if kind == "back":
            for row, (tokens, n) in enumerate(zip(held, numbers, strict=False)):
                size = max(0, len(tokens) - n)
                coming[row] = [*tokens, coming[row]][size]
                del tokens[size:]
            cache.roll_back([len(row) for row in held])
            drafts.roll_back([len(row) for row in held])
        elif kind == "select":
            kept = [n % len(held) for n in numbers]
            held, coming = [list(held[n]) for n in kept], [coming[n] for n in kept]
            cache.select(kept)
            drafts.select(kept)
        else:
            new = torch.randint(0, V, (len(held), numbers[0] + 1), generator=g)
            new[:, 0] = torch.tensor(coming)
            coming = new[:, -1].tolist()
            z = stepper.forward(new[:, :-1], cache, 1)[1]
            states = [stepper.draft(new[:, 1:], z, drafts)]
            for row, tokens in enumerate(held):
                tokens.extend(new[row, :-1].tolist())
            fed = torch.randint(0, V, (len(held), depths - 1), generator=g)
            for d in range(depths - 1):
                states.append(stepper.draft(fed[:, d : d + 1], states[-1][:, -1:], drafts))
            drafts.roll_back([len(row) for row in held])
            for row, tokens in enumerate(held):
                read = torch.tensor([[*tokens, coming[row], *fed[row].tolist()]])
                for d, full in enumerate(model(read, length=len(tokens))[1:]):
                    count = states[d].size(1)
                    close(
                        model.norm(states[d][row]), full[0, -count:], f"depth {d + 1}, row {row}, {len(tokens)} tokens"
                    )


# Laws


def slow_probabilities(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """The distribution that tokens are drawn from, by its definition: top-k, then top-p, then min-p."""
    ids = list(range(len(logits)))
    top = max(ids, key=lambda i: logits[i])
    if sampling.temperature == 0:
        return [float(i == top) for i in ids]

    def softmax(kept: list[int]) -> dict[int, float]:
        powers = {i: math.exp((logits[i] - logits[top]) / sampling.temperature) for i in kept}
        return {i: power / sum(powers.values()) for i, power in powers.items()}

    if 0 < sampling.top_k < len(ids):
        last = sorted(logits, reverse=True)[sampling.top_k - 1]
        ids = [i for i in ids if logits[i] >= last]
    if sampling.top_p < 1:
        kept, mass = [], 0.0
        for i, p in sorted(softmax(ids).items(), key=lambda item: -item[1]):
            if mass >= sampling.top_p:
                break
            kept.append(i)
            mass += p
        ids = kept
    if sampling.min_p > 0:
        p = softmax(ids)
        ids = [i for i in ids if p[i] >= sampling.min_p * max(p.values())]
    p = softmax(ids)
    return [p.get(i, 0.0) for i in range(len(logits))]


def follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square of counts against probabilities; cells that expect under 5 are pooled, an impossible one is fatal."""
    require(not counts[probabilities == 0].any(), "something impossible happened")
    expected = probabilities * counts.sum()
    small = expected < 5
    seen, wanted = counts[~small].astype(float), expected[~small]
    if expected[small].sum() > 0:
        seen, wanted = np.append(seen, counts[small].sum()), np.append(wanted, expected[small].sum())
    p = float(chisquare(seen, wanted * (seen.sum() / wanted.sum())).pvalue)
    require(p > ALPHA, f"{len(seen)} cells, {int(counts.sum())} draws: p = {p:.2g}")


@torch.no_grad()
def joint_law(model: Model, prompt: Sequence[int], length: int, sampling: Sampling) -> np.ndarray:
    """Probability of each of the V ** length continuations, by enumeration through full forwards of the plain model."""
    V = model.config.vocab_size
    sequences = torch.cartesian_prod(*[torch.arange(V)] * length).view(-1, length)
    tokens = torch.cat((torch.tensor([list(prompt)]).expand(len(sequences), -1), sequences), 1)
    logits = model.logits(model(tokens[:, :-1])[0])[:, len(prompt) - 1 :]
    known: dict[tuple[int, ...], list[float]] = {}
    joint = []
    for row, sequence in zip(logits.tolist(), sequences.tolist(), strict=True):
        p = 1.0
        for k, token in enumerate(sequence):
            prefix = tuple(sequence[:k])
            if prefix not in known:
                known[prefix] = slow_probabilities(row[k], sampling)
            p *= known[prefix][token]
        joint.append(p)
    return np.array(joint)


def sampling_law(
    model: Model,
    prompt: Sequence[int],
    drafts: int,
    sampling: Sampling,
    samples: int,
    length: int | None = None,
    source: Source = None,
    draft_vocab: int | None = None,
) -> list[Request]:
    """The joint of `length` tokens (K + 2, which crosses a step) over seeds 0, 1, .. is the plain model's."""
    length = drafts + 2 if length is None else length
    law = joint_law(model, prompt, length, sampling)
    requests = []
    for start in range(0, samples, 2500):
        seeds = range(start, min(start + 2500, samples))
        requests += run(model, [prompt] * len(seeds), drafts, sampling, length, list(seeds), (), source, draft_vocab)
    V = model.config.vocab_size
    cells = [sum(token * V ** (length - 1 - k) for k, token in enumerate(r.ids)) for r in requests]
    follows(np.bincount(cells, minlength=len(law)), law)
    return requests
