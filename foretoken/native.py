"""The decoding step in C++ for CPUs: `kernels.cpp` on the decoder's own tensors.

A compiled step is used for blocks of few tokens in float32 and bfloat16, and for small models' prompts. Longer ones,
other types and other devices go through PyTorch: the same tokens, several times slower for small models.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretoken.cache import KVCache
from foretoken.kernels import AT, INT, Items, Layer, Turn, array
from foretoken.kernels import Model as Weights
from foretoken.sampling import Keys
from foretoken.stack import BlockStack, Parts, SequentialStack
from foretoken.tree import Tree, chain

MOST_TOKENS = 63  # a row's block: the slots behind its base are one word of bits
DTYPES = (torch.float32, torch.bfloat16)
MOST_PACKED = 12 << 20  # bytes of matrices; larger ones are read no faster as panels
LEAST_BYTES = 4 << 20  # bytes of the matrices that draft; less is multiplied as fast as it is
MOST_READ = 512  # tokens of a small model's prompt; behind how many PyTorch is faster was not measured


class Native:
    """The compiled twin of `Stepper`: the same methods on the same caches, and a chain of drafts as one call.

    States are float32 whatever the weights are. Tensors that are returned belong to the caller.
    """

    def __init__(self, loaded: ctypes.CDLL, parts: Parts, further: Sequence[BlockStack] = (), early: int = 0) -> None:
        """further: blocks of heads on top of the others.

        early: how many of the trunk's last blocks end in a head's state, that of the last in head 2's.
        """
        embedding, unembedding, norm, eps, trunk, heads, drafter = parts
        self.library, self.drafter = loaded, drafter
        self.stacks = [(stack, index) for stack in (*trunk, heads, *further) for index in range(stack.m)]
        self.early, self.stacked = early, early > 0 or len(further) > 0
        self.trunk = len(trunk)
        self.vocabulary, self.width = embedding.shape
        self.tables: tuple[Tensor, Tensor] | None = None
        self.panels: dict[int, Tensor] = {}  # of matrices, by their id: see `kernels.cpp`
        self.bytes: dict[tuple[int, int], Tensor] = {}  # of blocks' matrices, by id and index in the stack
        self.packing: Any = None
        self.byte_packing: Any = None
        self.version = -1  # of the weights that lie there as bytes
        stacks = [*trunk, heads, *further, *([] if drafter is None else [drafter])]
        sizes = self.width, heads.head_dim, heads.down.size(2)
        self._pack([unembedding, *(matrix for stack in stacks for matrix in _matrices(stack))], *sizes)
        if not self.stacked:
            blocks = [(heads, index) for index in range(1, heads.m)] if drafter is None else [(drafter, 0)]
            self._pack_bytes(unembedding, blocks, *sizes)
        self.model = Weights(
            int(embedding.dtype == torch.bfloat16),
            int(self.packing is not None),
            int(self.byte_packing is not None),
            torch.get_num_threads(),
            self.width,
            heads.heads,
            heads.kv_heads,
            heads.head_dim,
            heads.down.size(2),
            self.vocabulary,
            eps,
            embedding.data_ptr(),
            self.panels.get(id(unembedding), unembedding).data_ptr(),
            self.bytes[id(unembedding), 0].data_ptr() if self.byte_packing else None,
            norm.data_ptr(),
        )
        self.layers: tuple[Any, Any] = (None, None)
        self.draft_layer: tuple[Any, Any] = (None, None)

    def _pack(self, matrices: Sequence[Tensor], *sizes: int) -> None:
        """Make room for a small model's matrices (..., out, in) as panels, which `follow` fills."""
        lanes = self.library.foretoken_panel()
        small = sum(matrix.nbytes for matrix in matrices) <= MOST_PACKED
        if not small or not lanes or matrices[0].dtype != torch.bfloat16 or any(size % lanes for size in sizes):
            return
        # Of matrices in a stack each is whole panels; of an unembedding the last is filled up.
        self.panels = {id(m): F.pad(m.detach(), (0, 0, 0, -m.size(-2) % lanes)) for m in matrices}
        self.packing = _packing([(m, self.panels[id(m)]) for m in matrices])

    def _pack_bytes(self, unembedding: Tensor, blocks: Sequence[tuple[BlockStack, int]], *sizes: int) -> None:
        """Make room for what drafts alone come from as panels with a byte a weight, which `follow` fills.

        A step then reads half as much for its drafts. Rounding changes some of them, and no output.
        """
        lanes = self.library.foretoken_bytes()
        matrices = {(id(m), index): m[index] for stack, index in blocks for m in _matrices(stack)}
        large = sum(m.nbytes for m in matrices.values()) >= LEAST_BYTES
        if not large or not lanes or unembedding.dtype != torch.bfloat16 or any(size % lanes for size in sizes):
            return
        matrices[id(unembedding), 0] = unembedding.detach()
        # Behind each panel's weights a factor and a correction for each of its outputs.
        shapes = {key: (-(-m.size(0) // lanes), lanes * (m.size(1) + 8)) for key, m in matrices.items()}
        self.bytes = {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}
        self.byte_packing = _packing([(m, self.bytes[key]) for key, m in matrices.items()])

    def reads(self, count: int) -> bool:
        """Whether so many tokens of a prompt are read here, and not by PyTorch."""
        return count <= (MOST_TOKENS if self.packing is None else MOST_READ)

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Copy the weights, as they are now, to the panels; to those for drafts alone only where a version is new."""
        if self.packing is not None:
            self.library.foretoken_pack(self.packing, INT(len(self.panels)), INT(torch.get_num_threads()))
        if self.byte_packing is None:
            return
        try:
            version = sum(p._version for p in parameters)
        except RuntimeError:  # tensors that were made in inference mode have none
            version = -1
        if version == -1 or version != self.version:
            self.library.foretoken_pack_bytes(self.byte_packing, INT(len(self.bytes)), INT(torch.get_num_threads()))
            self.version = version

    def use_tables(self, tables: tuple[Tensor, Tensor]) -> None:
        """Take these rotary tables (positions, H), contiguous and in float32, from now on."""
        if self.tables is not tables:
            self.tables = tables  # their addresses stand in the structure
            self.model.cos, self.model.sin = (table.data_ptr() for table in tables)

    def forward(
        self, tokens: list[list[int]], cache: KVCache, heads: int, tree: Tree | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Stepper.forward`. More than MOST_TOKENS are read part by part."""
        B, T = len(tokens), len(tokens[0])
        if T > MOST_TOKENS:
            assert tree is None
            parts = [self.forward(part, cache, heads) for part in _parts(tokens)]
            return torch.cat([hidden for hidden, _ in parts], 2), torch.cat([z for _, z in parts], 1)
        early = self.early if heads > 1 else 0
        count = early + 1 if early else heads
        hidden, z = torch.empty(count, B, T, self.width), torch.empty(B, T, self.width)
        items, memory = _items(tokens, cache, tree)
        self.library.foretoken_forward(
            ctypes.byref(self.model), self._reading(cache), INT(self.trunk - early), INT(count),
            INT(self.stacked), ctypes.byref(items), AT(z.data_ptr()), AT(hidden.data_ptr()),
        )  # fmt: skip
        del memory
        cache.advance(T)
        return hidden.flip(0)[:heads] if early else hidden, z

    def draft(self, tokens: list[list[int]], hidden: Tensor, cache: KVCache, last: bool = False) -> Tensor:
        """See `Stepper.draft`, and `forward`."""
        if len(tokens[0]) > MOST_TOKENS:
            pairs = zip(_parts(tokens), torch.split(hidden, MOST_TOKENS, 1), strict=True)
            return torch.cat([self.draft(part, states, cache, last) for part, states in pairs], 1)
        states = hidden.float().clone(memory_format=torch.contiguous_format)
        items, memory = _items(tokens, cache)
        self.library.foretoken_draft(
            ctypes.byref(self.model), ctypes.byref(self._drafting(cache)), ctypes.byref(items),
            INT(len(tokens[0]) - 1 if last and len(tokens) == 1 else 0), AT(states.data_ptr()),
        )  # fmt: skip
        del memory
        cache.advance(len(tokens[0]))
        return states

    def logits(self, hidden: Tensor, draft_vocab: int | None = None, drafts: bool = False) -> Tensor:
        """See `Stepper.logits`; (..., draft_vocab) where that is given. drafts: that drafts are picked by."""
        states, count = hidden.float().contiguous(), draft_vocab or self.vocabulary
        logits = torch.empty(*hidden.shape[:-1], count)
        self.library.foretoken_logits(
            ctypes.byref(self.model), AT(states.data_ptr()), INT(states.numel() // self.width), INT(count),
            INT(drafts), AT(logits.data_ptr()),
        )  # fmt: skip
        return logits

    def turn(
        self, tokens: list[list[int]], cache: KVCache, drafts_cache: KVCache | None, keys: Keys, drafts: int,
        proposed: Tensor | None, tree: Tree | None = None, ranks: int = 1, draft_vocab: int | None = None,
        state: Tensor | None = None,
    ) -> tuple[list[list[int]], list[list[float]], list[list[int]], list[list[int]], Tensor | None]:  # fmt: skip
        """A whole step for tokens (B, T) that hang together as `tree` says, by default as a chain.

        Returns the target's tokens (B, T) behind the accepted nodes and their log-probabilities (what stands behind
        these means nothing), the accepted nodes of each row, and the next candidates (B, K x ranks), place by place.
        drafts_cache: of a sequential head, else heads 2..K+1 draft. Both caches then hold what was accepted.
        draft_vocab: new drafts are among so many first tokens. For acceptance by rejection, proposed (B, T - 1, V) are
        the logits that the drafts in `tokens` come from; the last that is returned are those of the new ones.
        state (B, D): the trunk's output before tokens (B, 1), which are the target's: a sequential head drafts on, in
        the one cache that is given twice, and that is all.
        """
        B, T, K, how = len(tokens), len(tokens[0]), drafts, keys.sampling
        parents = range(-1, T - 1) if tree is None else (-1, *tree.parents)
        behind = cache.lengths if drafts_cache is None else drafts_cache.lengths
        assert max(behind) + T + K <= cache.capacity, "cache is full"
        shape = B, T, K, ranks
        turn, given, logprobs, *found = cache.desk.get(shape) or cache.desk.setdefault(shape, _desk(*shape))
        flat = tokens[0] if B == 1 else itertools.chain(*tokens)
        given[:] = [*flat, *cache.lengths, *behind, *keys.seeds, *keys.positions, *parents]
        turn.draft_vocabulary, turn.top_k = draft_vocab or self.vocabulary, how.top_k
        turn.temperature, turn.top_p, turn.min_p = how.temperature, how.top_p, how.min_p
        proposal = torch.empty(B, K, self.vocabulary) if how.rejects and (T == 1 or proposed is not None) else None
        if proposed is not None:
            proposed = proposed.float().contiguous()
        turn.rejection = int(proposal is not None)
        pointers = (proposed, proposal, state)
        turn.proposed, turn.proposal, turn.state = (None if t is None else t.data_ptr() for t in pointers)
        self.library.foretoken_turn(
            ctypes.byref(self.model), self._reading(cache) if state is None else None,
            INT(self.trunk), INT(1 if drafts_cache else K + 1),
            ctypes.byref(self._drafting(drafts_cache)) if drafts_cache else None, ctypes.byref(turn),
        )  # fmt: skip
        picked, nodes, accepted, new = (part[:] for part in found)
        for held in {cache, drafts_cache}:
            if held is not None:
                held.lengths = [length + count + 1 for length, count in zip(held.lengths, accepted, strict=True)]
        paths = [path[: count + 1] for path, count in zip(_rows(nodes, T, B), accepted, strict=True)]
        return _rows(picked, T, B), _rows(logprobs[:], T, B), paths, _rows(new, K * ranks, B), proposal

    def _reading(self, cache: KVCache) -> Any:
        found = self.layers  # of this call, whatever another thread decodes meanwhile
        if found[0] != (where := cache.address):
            blocks = [self._layer(*pair, cache, block) for block, pair in enumerate(self.stacks[: cache.keys.size(0)])]
            self.layers = found = where, array(Layer, len(blocks))(*blocks)
        return found[1]

    def _drafting(self, cache: KVCache) -> Any:
        assert self.drafter is not None
        found = self.draft_layer
        if found[0] != (where := cache.address):
            self.draft_layer = found = where, self._layer(self.drafter, 0, cache, 0)
        return found[1]

    def _layer(self, stack: BlockStack, index: int, cache: KVCache, block: int) -> Any:
        """Addresses of block `index` of a stack, whose keys and values are block `block` of the cache."""
        assert self.tables is not None
        assert self.tables[0].size(0) >= cache.capacity, "the rotary tables are too short"

        def at(tensor: Tensor | None) -> int | None:
            if (found := self.bytes.get((id(tensor), index))) is not None:
                return found.data_ptr()
            return None if tensor is None else self.panels.get(id(tensor), tensor)[index].data_ptr()

        norms = (None, None) if stack.qk_norm is None else stack.qk_norm[index, 0].unbind(0)
        hidden_norm = stack.hidden_norm if isinstance(stack, SequentialStack) else None
        return Layer(
            int((id(stack.qkv), index) in self.bytes),
            *(at(weight) for weight in (stack.qkv, stack.qkv_bias, stack.o, stack.gate_up, stack.down)),
            *(at(weight) for weight in (stack.norm_1, stack.norm_2)),
            *(None if norm is None else norm.data_ptr() for norm in norms),
            at(hidden_norm),
            cache.keys[block].data_ptr(),
            cache.values[block].data_ptr(),
            cache.capacity,
        )


def _matrices(stack: BlockStack) -> tuple[Tensor, ...]:
    return stack.qkv, stack.o, stack.gate_up, stack.down


def _packing(pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Matrices (..., out, in) and what they become, as `kernels.cpp` takes them."""
    fields = [(m.data_ptr(), panels.data_ptr(), m[..., 0].numel(), m.size(-1)) for m, panels in pairs]
    return array(INT, 4 * len(fields))(*itertools.chain(*fields))


def _desk(B: int, T: int, K: int, ranks: int) -> tuple[Any, ...]:
    """Memory for steps of one shape, which a decode's cache keeps: to make it takes a tenth of a small step."""
    given, logprobs = array(INT, B * (T + 4) + T)(), array(ctypes.c_float, B * T)()
    found = [array(INT, count)() for count in (B * T, B * T, B, B * K * ranks)]
    at = ctypes.addressof(given)
    inputs = (at, *(at + 8 * B * (T + column) for column in range(5)))
    turn = Turn(B, T, K, ranks, 0, 0, 0, 0.0, 0.0, 0.0, *inputs, *map(ctypes.addressof, (*found, logprobs)))
    return turn, given, logprobs, *found


def _items(tokens: list[list[int]], cache: KVCache, tree: Tree | None = None) -> tuple[Any, Any]:
    """Items of T tokens for each row of a cache, behind what it holds; and the memory they lie in."""
    count = len(tokens[0])
    assert max(cache.lengths) + count <= cache.capacity, "cache is full"
    tree = chain(count - 1) if tree is None else tree
    ids, rows, slots, positions, bases = list[int](), list[int](), list[int](), list[int](), list[int]()
    for row, (start, new) in enumerate(zip(cache.lengths, tokens, strict=True)):
        ids += new
        rows += [row] * count
        slots += range(start, start + count)
        positions += [start + depth for depth in tree.depths]
        bases += [start] * count
    R = len(ids)
    memory = array(INT, 6 * R)(*ids, *rows, *slots, *positions, *bases, *tree.ancestors * len(tokens))
    start = ctypes.addressof(memory)
    return Items(R, *range(start, start + 48 * R, 8 * R)), memory


def _parts(tokens: list[list[int]]) -> list[list[list[int]]]:
    return [[row[at : at + MOST_TOKENS] for row in tokens] for at in range(0, len(tokens[0]), MOST_TOKENS)]


def _rows(values: list[Any], each: int, rows: int) -> list[list[Any]]:
    return [values] if rows == 1 else [values[row * each : (row + 1) * each] for row in range(rows)]
