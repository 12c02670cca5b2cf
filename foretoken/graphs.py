"""The decoding step for CUDA: one function of tensors with fixed shapes, captured once as a graph and then replayed.

A step (forward, picks, acceptance, next drafts) becomes one launch: the host copies some numbers in, and waits once,
for those that come out. Batch sizes are rounded up to powers of two, with rows that are not in use. Blocks run by the
kernels of `gpu`; without them in PyTorch, with attention over as many slots as the next of `BUCKETS` that holds the
longest row. On other devices the same function runs uncaptured, which is how tests compare it with the other forms.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from foretoken.cache import KVCache, Window
from foretoken.layers import Context
from foretoken.sampling import Keys, Sampling, filtered, rejection, widened
from foretoken.stack import At, BlockStack, Parts, grouped_mask
from foretoken.tree import Tree, chain

if TYPE_CHECKING:
    from foretoken import gpu

BUCKETS = sorted(size << power for size in (256, 384) for power in range(16))  # slots
Caches = tuple[KVCache, KVCache | None]  # the model's, and a sequential head's
MOST_GRAPHS = 128  # that are kept; each holds the memory of its step's intermediate values


def bucket(slots: int) -> int:
    """The next size in `BUCKETS`."""
    return next(size for size in BUCKETS if size >= slots)


class Shape(NamedTuple):
    """What a graph is fixed to: rows, tokens a row, slots, drafts and their candidates, and how tokens are picked.

    slots: that a row's attention reads. draft_vocab: how many first tokens drafts are among, None for all.
    """

    rows: int
    tokens: int
    slots: int
    drafts: int
    ranks: int
    sampling: Sampling
    tree: bool
    proposed: bool
    draft_vocab: int | None = None


class Graphs:
    """Steps of one model."""

    def __init__(self, parts: Parts) -> None:
        self.embedding, self.unembedding, self.norm, self.eps, self.trunk, self.heads, self.drafter = parts
        self.device = self.embedding.device
        self.kernels: Any = _kernels(self.embedding, self.trunk[0] if self.trunk else self.heads)
        self.tables: tuple[Tensor, Tensor] | None = None
        self.captured: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def use_tables(self, tables: tuple[Tensor, Tensor]) -> None:
        """Take the rotary tables (positions, H), which reach over all positions of a cache."""
        self.tables = tables

    def turn(
        self, tokens: list[list[int]], cache: KVCache, drafts_cache: KVCache | None, keys: Keys, drafts: int,
        proposed: Tensor | None, tree: Tree | None = None, ranks: int = 1, draft_vocab: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]], list[list[int]], list[list[int]], Tensor | None]:  # fmt: skip
        """A whole step, with filters too: see `Native.turn`."""
        B, T = len(tokens), len(tokens[0])
        behind = cache.lengths if drafts_cache is None else drafts_cache.lengths
        need = max(*cache.lengths, *behind) + T + drafts
        assert need <= cache.capacity, "cache is full"
        slots = cache.capacity if self.kernels else min(bucket(need), cache.capacity)
        rows = min(1 << (B - 1).bit_length(), cache.keys.size(1))
        rejects = keys.sampling.rejects and proposed is not None
        shape = Shape(rows, T, slots, drafts, ranks, keys.sampling, tree is not None, rejects, draft_vocab)
        tree = chain(T - 1) if tree is None else tree
        each = zip(tokens, cache.lengths, behind, keys.seeds, keys.positions, strict=True)
        given = [number for ids, *others in each for number in (*ids, *others)]
        given += [0] * ((rows - B) * (T + 4)) + [0, *tree.parents, *tree.depths, *tree.ancestors]
        law = F.pad(proposed, (0, 0, 0, 0, 0, rows - B)) if rejects and proposed is not None else None
        memory = (cache, drafts_cache)
        numbers, proposal = self._run(shape, memory, given, law)
        logprobs = numbers[:B, -T:].view(np.float64).tolist()
        found = numbers[:B].tolist()
        accepted = [row[0] + 1 for row in found]
        for held in (cache, drafts_cache):
            if held is not None:
                held.lengths = [length + count for length, count in zip(held.lengths, accepted, strict=True)]
        paths = [row[1 : count + 1] for row, count in zip(found, accepted, strict=True)]
        picked, new = [row[T + 1 : 2 * T + 1] for row in found], [row[2 * T + 1 : -T] for row in found]
        return picked, logprobs, paths, new, None if proposal is None else proposal[:B]

    def _run(
        self, shape: Shape, memory: Caches, given: list[int], proposed: Tensor | None
    ) -> tuple[NDArray[np.int64], Tensor | None]:
        """`_step`, on the host's numbers; the result is on the host again, the law of new drafts is not."""
        assert self.tables is not None
        if self.device.type != "cuda":
            found, law = self._step(shape, memory, torch.tensor(given), proposed)
            return found.numpy(), law
        addresses = [cache.address for cache in memory if cache is not None]
        key = (shape, *addresses, *(table.data_ptr() for table in self.tables))
        graph = self.captured.pop(key, None)
        if graph is None:
            graph = _Graph(given, proposed, lambda numbers, law: self._step(shape, memory, numbers, law))
        self.captured[key] = graph
        while len(self.captured) > MOST_GRAPHS:
            self.captured.popitem(last=False)
        return graph.run(given, proposed)

    @torch.inference_mode()
    def _step(
        self, shape: Shape, memory: Caches, given: Tensor, proposed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Of each row: the number of accepted nodes less one, these (T), the target's tokens behind them (T), the next
        candidates (K x ranks) and the log-probabilities' bits (T); and the law of the drafts (B, K, V)."""
        B, T = shape.rows, shape.tokens
        rows, (parents, depths, seen) = given[: B * (T + 4)].view(B, T + 4), given[B * (T + 4) :].view(3, T)
        tokens, lengths, behind, seeds, positions = rows[:, :T], *rows[:, T:].unbind(1)
        cache, drafts_cache = memory
        hidden, z = self._forward(shape, cache, tokens, lengths, seen, depths)
        vocab_size = self.unembedding.size(0)
        keys = Keys(shape.sampling, seeds, positions, T, vocab_size, self.device)
        logits = self._logits(hidden[0])  # (B, T, V)
        picked, right, path = _accepted(logits, tokens, proposed, keys, parents, depths, seen)
        logprobs = logits.log_softmax(-1).gather(-1, picked[..., None])[..., 0].double()
        if shape.tree:
            every = torch.arange(B, device=self.device)[:, None]
            picked, logprobs, hidden, z = (
                picked.gather(1, path), logprobs.gather(1, path), hidden[:, every, path], z[every, path]
            )  # fmt: skip
            cache.move(every, lengths[:, None] + path, lengths[:, None] + torch.arange(T, device=self.device))
        law = None
        found = [right[:, None], path, picked]
        if shape.drafts:
            ahead = Keys(shape.sampling, seeds, positions + right + 1, shape.drafts, vocab_size, self.device)
            if drafts_cache is None:
                candidates, laws = self._parallel(shape, ahead, hidden, right)
            else:
                candidates, laws = self._sequential(shape, ahead, drafts_cache, picked, z, behind, right)
            found.append(candidates.flatten(1))
            law = filtered(laws, shape.sampling) if keys.sampling.rejects else None
        return torch.cat((*found, logprobs.view(torch.int64)), 1), law

    def _forward(
        self, shape: Shape, cache: KVCache, tokens: Tensor, lengths: Tensor, seen: Tensor, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States (heads, B, T, D) and the trunk's output (B, T, D); seen (T): of which nodes each sees what."""
        at = self._at(shape, cache, lengths, seen, depths)
        x = F.embedding(tokens, self.embedding)[None]
        for index, stack in enumerate(self.trunk):
            x = self._blocks(stack, x, at, index, 1)
        used = 1 if self.drafter is not None else min(shape.drafts + 1, self.heads.m)
        return self._blocks(self.heads, x.repeat(used, 1, 1, 1) if self.kernels else x, at, len(self.trunk), used), x[0]

    def _at(self, shape: Shape, cache: KVCache, lengths: Tensor, seen: Tensor, depths: Tensor) -> At | gpu.Places:
        """Behind the first `lengths` (B) slots, as nodes of these depths (T) that see each other by bits of `seen`."""
        assert self.tables is not None
        count = seen.numel()
        node = torch.arange(count, device=self.device)
        positions, slots = lengths[:, None] + depths, lengths[:, None] + node
        window = Window(cache, shape.rows, shape.slots)
        if self.kernels:
            places: gpu.Places = self.kernels.Places(self.tables, positions, slots, lengths, seen, window)
            return places
        own = (seen[:, None] >> node & 1) > 0  # (T, T)
        among = torch.arange(shape.slots, device=self.device) - lengths[:, None]  # (B, S): which node stands there
        visible = own[:, among.clamp(0, count - 1)].transpose(0, 1) & (among < count)[:, None] | (among < 0)[:, None]
        cos, sin = (table[positions].to(self.embedding.dtype) for table in self.tables)
        groups = self.heads.heads // self.heads.kv_heads
        return At(Context(cos, sin, grouped_mask(visible, groups, self.embedding.dtype)), slots, window)

    def _blocks(self, stack: BlockStack, x: Tensor, at: At | gpu.Places, block: int, used: int) -> Tensor:
        """The first `used` blocks of a stack on x (1, B, T, D), or (used, B, T, D) for kernels, which overwrite it."""
        if isinstance(at, At):
            return stack.forward(x, at, block, used)
        states: Tensor = self.kernels.run(stack, x[:1].flatten(1, 2), stack.norm_1[:used], x, at, block)
        return states

    def _logits(self, states: Tensor, draft_vocab: int | None = None) -> Tensor:
        weight = self.unembedding[:draft_vocab]
        if self.kernels:
            flat = states.reshape(1, -1, states.size(-1))
            logits = self.kernels.product(flat, weight[None], self.norm.view(1, 1, -1), self.eps)
            logits = logits.view(*states.shape[:-1], -1)
        else:
            logits = F.linear(F.rms_norm(states, (states.size(-1),), self.norm.to(states.dtype), self.eps), weight)
        logits = widened(logits, self.unembedding.size(0))
        return logits if logits.dtype == torch.float64 else logits.float()

    def _parallel(self, shape: Shape, ahead: Keys, hidden: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates (B, K, ranks) of heads 2..K+1 behind the accepted nodes, and the logits they are picked from."""
        states = hidden[1:, torch.arange(shape.rows, device=self.device), right].transpose(0, 1)
        logits = self._logits(states, shape.draft_vocab)
        return ahead.choose_drafts(logits, 0, shape.ranks), logits

    def _sequential(
        self, shape: Shape, ahead: Keys, cache: KVCache, following: Tensor, z: Tensor, behind: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of a sequential head: once over the committed positions, then from draft to draft."""
        every = torch.arange(shape.rows, device=self.device)
        state = self._draft(shape, cache, following, z, behind)[every, right][:, None]
        candidates: list[Tensor] = []
        laws: list[Tensor] = []
        for number in range(shape.drafts):
            if candidates:
                state = self._draft(shape, cache, candidates[-1][..., 0], state, behind + right + number)
            laws.append(self._logits(state, shape.draft_vocab))
            candidates.append(ahead.choose_drafts(laws[-1], number, shape.ranks))
        return torch.cat(candidates, 1), torch.cat(laws, 1)

    def _draft(self, shape: Shape, cache: KVCache, tokens: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        """The sequential head's block on tokens (B, T) and states (B, T, D), behind `lengths` (B) slots."""
        stack, node = self.drafter, torch.arange(tokens.size(1), device=self.device)
        assert stack is not None
        at = self._at(shape, cache, lengths, (2 << node) - 1, node)
        embedded = F.embedding(tokens, self.embedding)
        states = states.to(embedded.dtype)
        if isinstance(at, At):
            return stack.draft(embedded, states, at)
        sides = zip((embedded, states), (stack.norm_1, stack.hidden_norm), strict=True)
        inputs = torch.cat([self.kernels.normed(x.reshape(1, -1, x.size(-1)), w, self.eps) for x, w in sides], -1)
        found: Tensor = self.kernels.run(stack, inputs, None, states[None].clone(), at, 0)
        return found[0]


def _accepted(
    logits: Tensor, tokens: Tensor, proposed: Tensor | None, keys: Keys, parents: Tensor, depths: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The target's tokens (B, T), the accepted nodes' number less one (B), and these nodes (B, T)."""
    B, T = tokens.shape
    node = torch.arange(T, device=tokens.device)
    if proposed is not None:
        return *rejection(logits, tokens[:, 1:], proposed, keys), node.expand(B, T)
    picked = keys.choose(logits, depths)
    if T == 1:
        return picked, torch.zeros_like(picked[:, 0]), torch.zeros_like(picked)
    found = F.pad(tokens[:, 1:] == picked[:, parents[1:]], (1, 0), value=True)
    own = (seen[:, None] >> node & 1) > 0  # (T, T)
    accepted = ~(own & ~found[:, None]).any(-1)  # (B, T): all on the way to a node were found
    path = ((accepted[:, None] & (depths == node[:, None])) * node).amax(-1)  # one a depth, but in unused rows
    return picked, accepted.sum(-1) - 1, path


def _kernels(weight: Tensor, stack: BlockStack) -> Any:
    """The module `gpu` where its kernels can run the model."""
    if weight.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from foretoken import gpu

    return gpu if weight.dtype in gpu.DTYPES and stack.head_dim % 2 == 0 else None


class _Graph:
    """A captured call. Its inputs and results lie in memory of its own, which the next call writes anew."""

    def __init__(
        self, given: list[int], law: Tensor | None,
        call: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    ) -> None:  # fmt: skip
        self.host = torch.tensor(given).pin_memory()
        self.numbers, self.given = self.host.numpy(), self.host.cuda()
        self.law = None if law is None else law.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a run before, so that what libraries allocate at first is not captured
            call(self.given, self.law)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found, self.proposal = call(self.given, self.law)
        self.back = torch.empty(self.found.shape, dtype=self.found.dtype, pin_memory=True)
        self.result: NDArray[np.int64] = self.back.numpy()

    def run(self, given: list[int], law: Tensor | None) -> tuple[NDArray[np.int64], Tensor | None]:
        """Replay it; waits for the result."""
        self.numbers[:] = given
        self.given.copy_(self.host, non_blocking=True)
        if self.law is not None and law is not None:
            self.law.copy_(law, non_blocking=True)
        self.graph.replay()
        self.back.copy_(self.found, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return self.result, self.proposal
