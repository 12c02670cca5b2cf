"""The model: trunk, heads, one shared final norm and one unembedding.

Heads return hidden states; only the loss and the decode loop turn them into logits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretoken.cache import KVCache
from foretoken.config import ModelConfig, Shared
from foretoken.graphs import Graphs, bucket
from foretoken.heads import READ_OTHERS, make_heads, make_unembeddings
from foretoken.kernels import library
from foretoken.layers import Block, Context, RMSNorm, Rotary
from foretoken.native import DTYPES, Native
from foretoken.pace import Pace
from foretoken.packing import document_mask
from foretoken.processors import Change, pick_targets
from foretoken.sampling import Keys, filtered, logprobs_of, rejection, widened
from foretoken.stack import At, BlockStack, Parts, SequentialStack, grouped_mask
from foretoken.tree import Tree

MOST_FREE = 4  # caches whose memory is kept for the next
ALL_SHARED: tuple[Shared, ...] = ("trunk", "embedding", "unembedding")


class Model(nn.Module):
    """A Llama-family model with n heads. Trunk + head 1 + norm + unembedding is an ordinary Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.trunk_blocks))
        self.heads = make_heads(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.own_unembeddings = make_unembeddings(config)
        self.rotary = Rotary(config)
        self._stepper: Stepper | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not the decoding form, which holds addresses."""
        return {**self.__dict__, "_stepper": None}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of deviation 0.02; projections back into the residual stream divided by sqrt(2 depth)."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        back = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, back if into_residual else 0.02, generator=generator)

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """Give heads 2..n head 1's weights, as far as they fit, and unembeddings of their own its unembedding."""
        self.heads.start_from_head_1()
        for weight in self.own_unembeddings.parameters():
            weight.copy_(self.lm_head.weight)

    def unembeddings(self) -> list[Tensor]:
        """The n heads' unembeddings (V, D), head 1's first: n times the same, or with `per_head` n different ones."""
        own: list[Tensor] = [*self.own_unembeddings.parameters()]
        return [self.lm_head.weight, *(own or [self.lm_head.weight] * (self.config.n_future - 1))]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.embed_tokens.weight.dtype

    def context(self, length: int, document_ids: Tensor | None = None, position_ids: Tensor | None = None) -> Context:
        """What the blocks share for windows of `length` positions.

        document_ids (B, length): when given, a position attends only inside its own document. position_ids
        (B, length): what the rotary embedding counts, by default 0..length-1.
        """
        mask = None if document_ids is None else document_mask(document_ids, self.config.head_dim, self.dtype)
        return Context(*self.rotary.forward(self._positions(length, position_ids)), mask)

    def _positions(self, length: int, position_ids: Tensor | None) -> Tensor:
        return torch.arange(length, device=self.device)[None] if position_ids is None else position_ids[:, :length]

    def compile_blocks(self) -> None:
        """Let torch.compile make training faster, block by block: blocks of a kind share what is compiled."""
        for block in (*self.trunk, *self.heads):
            block.compile()

    def run_trunk(self, tokens: Tensor, context: Context) -> Tensor:
        """Tokens (B, T) -> trunk output z (B, T, D), not normalised."""
        x: Tensor = self.embed_tokens(tokens)
        for block in self.trunk:
            x = block(x, context)
        return x

    def run_head(self, z: Tensor, context: Context, depth: int) -> Tensor:
        """Trunk output (B, T, D) -> normalised state (B, T, D) of head 1, depth 0, or of a parallel head at `depth`."""
        return self.norm(self.heads[depth](z, context))  # type: ignore[no-any-return]

    def forward(
        self, tokens: Tensor, document_ids: Tensor | None = None, length: int | None = None,
        head_gradients: Sequence[Shared] = ALL_SHARED, position_ids: Tensor | None = None, keep: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Tokens -> n normalised hidden states (B, T, D), head 1 first.

        length: T, by default all of them; tokens (B, T or more) behind it are only read as those that heads of some
        kinds are fed: depth d at position t reads token t + d, or 0 where there is none, and its state means nothing.
        document_ids (B, T): attention stays inside a document. head_gradients: see `LossConfig`. position_ids (B, T):
        see `context`; depth d of a sequential head stands d - 1 further. keep: states of so many last positions alone.
        """
        T = tokens.size(1) if length is None else length
        positions = self._positions(T, position_ids)
        context = self.context(T, None if document_ids is None else document_ids[:, :T], positions)
        z = Model.run_trunk(self, tokens[:, :T], context)  # FSDP2 wraps the instance's, for calls from outside
        if self.config.head_kind not in READ_OTHERS and isinstance(context.mask, Tensor | None):
            context = replace(context, keep=keep)
        table = self.embed_tokens.weight if "embedding" in head_gradients else self.embed_tokens.weight.detach()
        scale = self.norm.weight if "unembedding" in head_gradients else self.norm.weight.detach()
        further = F.pad(tokens, (0, max(0, T + self.config.n_future - 1 - tokens.size(1))))
        states = self.heads(
            z,
            lambda depth: F.embedding(further[:, depth : depth + T], table),
            lambda depth: context if depth == 1 else context.turned(*self.rotary.forward(positions + depth - 1)),
            apart="trunk" not in head_gradients,
        )
        first, *rest = states if keep is None else [h[:, -keep:] for h in states]
        return [self.norm(first)] + [F.rms_norm(h, (h.size(-1),), scale.to(h.dtype), self.norm.eps) for h in rest]

    def logits(self, hidden: Tensor, depth: int = 0) -> Tensor:
        """Normalised states (..., D) of the head at `depth` -> logits (..., V) in float32 or wider."""
        logits = F.linear(hidden, self.unembeddings()[depth])
        return logits if logits.dtype == torch.float64 else logits.float()

    def use_stepper(self, stepper: Stepper) -> None:
        """Decode by this form, such as one that is not compiled, until the weights move."""
        self._stepper = stepper

    def stepper(self) -> Stepper:
        """The form of this model that decodes with a cache, made on first use and whenever the weights have moved."""
        if self._stepper is None or not self._stepper.current(self):
            self._stepper = Stepper(self)
        return self._stepper


class Stepper:
    """The model as decoding runs it: cached, ragged positions, all heads of a step in one batched block.

    Blocks of few tokens on a CPU run compiled, by `native`.
    """

    def __init__(self, model: Model, compiled: bool = True) -> None:
        self.model, self.config = model, model.config
        # One block that drafts stands apart, as matrices do; heads that read what head 1 reads run with it.
        (first, *others), kind = model.heads, self.config.head_kind
        self.early = len(others) if kind == "anticausal" else 0  # how many of the trunk's blocks end in heads' states
        self.trunk = [BlockStack([block]) for block in (*model.trunk, *others[::-1][: self.early])]
        self.drafter = SequentialStack(model.heads[1]) if self.config.sequential else None
        self.heads = BlockStack(list(model.heads) if kind in ("parallel", "joint") else [first])
        self.further = [BlockStack([block]) for block in others] if kind == "causal" else []
        self.tables: tuple[Tensor, Tensor] | None = None
        self.shorter: list[tuple[Tensor, Tensor]] = []  # which another thread's step may be reading
        self.made_from = _addresses(model)
        self.paces: dict[tuple[object, int], Pace] = {}  # by what steps cost, and temperature
        self.native = self._native() if compiled else None
        self.free: list[tuple[Tensor, Tensor]] = []  # memory of caches that are gone
        self.graphs = Graphs(self.parts()) if compiled and model.device.type == "cuda" else None

    def parts(self) -> Parts:
        """What compiled forms are made of."""
        model = self.model
        ends = (model.embed_tokens.weight, model.lm_head.weight, model.norm.weight, model.norm.eps)
        return Parts(*ends, self.trunk, self.heads, self.drafter)

    def _native(self) -> Native | None:
        fits = self.model.device.type == "cpu" and self.model.dtype in DTYPES
        return Native(found, self.parts(), self.further, self.early) if fits and (found := library()) else None

    def current(self, model: Model) -> bool:
        """Whether the model's weights are still the memory this form shares."""
        return self.made_from == _addresses(model)

    def new_cache(self, rows: int, capacity: int, heads: int) -> KVCache:
        """An empty cache for `rows` requests of at most `capacity` positions, for the trunk and the first `heads`."""
        if self.native is not None:
            self.native.follow(self.model.parameters())  # the weights are taken as they are now
        return self._cache(len(self.trunk) + (1 if self.early else heads), rows, capacity)

    def new_draft_cache(self, rows: int, capacity: int, blocks: int = 1) -> KVCache:
        """An empty cache of the sequential head's block, or of so many blocks that draft."""
        return self._cache(blocks, rows, capacity)

    def _cache(self, blocks: int, rows: int, capacity: int) -> KVCache:
        c, model = self.config, self.model
        capacity = bucket(capacity) if self.graphs else capacity
        self.grow_tables(capacity)
        if self.graphs is None:
            return KVCache((blocks, rows, c.num_key_value_heads, capacity, c.head_dim), model.dtype, model.device)
        # What is captured writes to fixed memory, so caches that come after each other share it, whatever K is.
        most = len(self.trunk) + self.heads.m + len(self.further)
        blocks = most if len(self.trunk) < blocks < most else blocks
        shape = (blocks, rows, c.num_key_value_heads, capacity, c.head_dim)
        at = next((index for index, memory in enumerate(self.free) if memory[0].shape == shape), None)
        cache = KVCache(shape, model.dtype, model.device, None if at is None else self.free.pop(at))
        weakref.finalize(cache, self._give_back, (cache.keys, cache.values))
        return cache

    def _give_back(self, memory: tuple[Tensor, Tensor]) -> None:
        self.free = [memory, *self.free[: MOST_FREE - 1]]

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, cache: KVCache, heads: int, tree: Tree | None = None, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run tokens (B, T) behind what the cache holds, as a chain, or as the nodes of a tree.

        Returns the first `heads` heads' states (heads, B, T, D) and the trunk's output (B, T, D), not normalised. The
        cache then holds all T positions: roll back those not kept. last: of a single row's states only the last are
        asked for; heads that are spared the others show it in their places.
        """
        T = tokens.size(1)
        if self.native is not None and self.native.reads(T):
            return self.native.forward(tokens.tolist(), cache, heads, tree)
        at = self._at(T, cache, tree)
        x, early = F.embedding(tokens, self.model.embed_tokens.weight)[None], list[Tensor]()  # (1, B, T, D)
        for index, stack in enumerate(self.trunk):
            x = stack.forward(x, at, index, 1)
            early = [x, *early][: min(heads - 1, self.early)]
        last = last and self.config.head_kind not in READ_OTHERS
        first = self.heads.forward(x, at, len(self.trunk), min(heads, self.heads.m), last)
        hidden = [first.expand(-1, -1, T, -1), *early]
        for block, stack in enumerate(self.further[: heads - 1], len(self.trunk) + 1):
            hidden.append(stack.forward(hidden[-1], at, block, 1))
        cache.advance(T)
        return torch.cat(hidden), x[0]

    def pick_targets(
        self, states: Tensor, keys: Keys, change: Change | None = None, places: Sequence[int] | None = None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The target's own tokens (B, k) and their log-probabilities from head 1's states (B, k, D).

        change: of the logits that tokens are picked by. Log-probabilities are the model's own. places: which of the
        next tokens these are, by default the first k.
        """
        return pick_targets(self.logits(states), keys, change, places)

    def reject(
        self, states: Tensor, drafts: Tensor, proposed: Tensor, keys: Keys, change: Change | None = None
    ) -> tuple[list[list[int]], list[list[float]], list[int]]:
        """Tokens (B, K + 1), their log-probabilities, and how many are accepted drafts; see `sampling.rejection`."""
        logits = self.logits(states)
        tokens, accepted = rejection(change(logits) if change else logits, drafts, proposed, keys)
        return tokens.tolist(), logprobs_of(logits, tokens), accepted.tolist()

    def pick_drafts(
        self, states: Tensor, keys: Keys, first: int = 0, change: Change | None = None, ranks: int = 1,
        draft_vocab: int | None = None, depth: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Candidates (B, k, ranks) for drafts, the first number `first` of its step, from heads' states (B, k, D).

        draft_vocab: they are among so many first tokens. depth: see `logits`. Also the logits (B, k, V) of the law they
        are picked by, which acceptance by rejection needs.
        """
        logits = self.logits(states, draft_vocab, depth)
        logits = change(logits) if change else logits
        drafts = keys.choose_drafts(logits, first, ranks)
        return drafts, filtered(logits, keys.sampling) if keys.sampling.rejects else logits

    @torch.inference_mode()
    def draft(self, tokens: Tensor, hidden: Tensor, cache: KVCache, last: bool = False) -> Tensor:
        """Run the sequential head's block behind what its cache holds, on the tokens (B, T) that follow its positions.

        hidden (B, T, D): the trunk's output, or the block's own state where the token is a draft. Returns its states
        (B, T, D), not normalised, which predict the tokens behind `tokens`. last: of one row only that is asked for.
        """
        assert self.drafter is not None
        if self.native is not None and self.native.reads(tokens.size(1)):
            return self.native.draft(tokens.tolist(), hidden, cache, last)
        embedded = F.embedding(tokens, self.model.embed_tokens.weight)
        at = self._at(tokens.size(1), cache, last=last)
        state = self.drafter.draft(embedded, hidden.to(embedded.dtype), at, last)
        cache.advance(tokens.size(1))
        return state.expand(-1, tokens.size(1), -1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, draft_vocab: int | None = None, depth: int = 0) -> Tensor:
        """States (..., D) as `forward` returns them -> logits (..., V), float32 or wider.

        draft_vocab: of so many first tokens alone; those of the others are -inf. depth: of the first of the states
        (..., k, D), the next is one deeper; 0: all are head 1's.
        """
        if depth and self.config.own_unembeddings:
            states = self.model.norm(hidden.to(self.model.dtype)).unbind(-2)
            weights = self.model.unembeddings()[depth : depth + len(states)]
            pairs = zip(states, weights, strict=True)
            logits = torch.stack([F.linear(state, weight[:draft_vocab]) for state, weight in pairs], -2)
        elif self.native is not None:
            logits = self.native.logits(hidden, draft_vocab, depth > 0)
        else:
            logits = F.linear(self.model.norm(hidden), self.model.lm_head.weight[:draft_vocab])
        return widened(logits if logits.dtype == torch.float64 else logits.float(), self.config.vocab_size)

    def grow_tables(self, capacity: int) -> None:
        """Make the rotary tables reach over so many positions."""
        if self.tables is None or self.tables[0].size(0) < capacity:
            self.shorter += [] if self.tables is None else [self.tables]
            self.tables = self.model.rotary(torch.arange(capacity, device=self.model.device))
        for steps in (self.native, self.graphs):
            if steps is not None:
                steps.use_tables(self.tables)

    def _at(self, count: int, cache: KVCache, tree: Tree | None = None, last: bool = False) -> At:
        """Of the next `count` tokens. Without a tree their slots are their positions. last: the last of a row asks."""
        assert self.tables is not None
        slots, start = cache.positions(count), min(cache.lengths)
        alike, at = start == max(cache.lengths), slots.device
        positions = slots if tree is None else slots[:, :1] + torch.tensor(tree.depths, device=at)
        flat = tree is None and alike and (count == 1 or len(cache.lengths) == 1)
        among = slice(start, start + count) if flat else positions
        cos, sin = (table[among].to(self.model.dtype) for table in self.tables)  # (B, T, H), or of all rows (T, H)
        if alike and (last or count == 1):
            return At(Context(cos, sin), slots, cache)  # the only query sees all there is
        there = torch.arange(max(cache.lengths) + count, device=at)
        visible = there <= slots[:, :, None] if tree is None else tree.visible(there, slots)  # (B, T, S)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        return At(Context(cos, sin, grouped_mask(visible, groups, self.model.dtype)), slots, cache)


def _addresses(model: Model) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]
