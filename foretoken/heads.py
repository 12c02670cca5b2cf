"""The head kinds: how n hidden states come from the trunk's output. One small class each, one signature.

Block 0 is head 1 of every kind, the last layer of the next-token path. States are not normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.config import ModelConfig
from foretoken.layers import Block, Context, RMSNorm
from foretoken.unrolled import SequentialBlock

# What further heads may ask for at a depth d = 1..n-1: the embedding (B, T, D) of the token d further on than each
# position, and the context whose rotary tables start at position d - 1.
Ahead = Callable[[int], Tensor]
ContextAt = Callable[[int], Context]
READ_OTHERS = ("causal", "anticausal", "deepseek")  # kinds of heads that read all states that others make


class Heads(nn.ModuleList):
    """Head 1 and, behind it, what heads 2..n are made of."""

    @property
    def further(self) -> list[Any]:
        """What heads 2..n are made of."""
        return list(self)[1:]

    def forward(self, z: Tensor, ahead: Ahead, context_at: ContextAt, *, apart: bool = False) -> list[Tensor]:
        """States (B, T, D), of fewer positions where a context keeps fewer, of heads 1..n from the trunk's output z.

        apart: losses of heads 2..n send no gradient into what they read of the next-token path.
        """
        first = self[0](z, context_at(1))
        if len(self) == 1:
            return [first]
        read = (z.detach(), first.detach()) if apart else (z, first)
        return [first, *self.rest(*read, ahead, context_at)]

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """States (B, T, D) of heads 2..n from the trunk's output and from head 1's state (B, T, D)."""
        raise NotImplementedError

    def start_from_head_1(self) -> None:
        """Give heads 2..n head 1's weights, or whatever lets them predict what it does, where there is such a thing."""
        raise NotImplementedError


class ParallelHeads(Heads):
    """n transformer blocks on the same trunk output (Gloeckle et al. 2024, section 2).

    Block d predicts token t + d + 1 at position t. No head sees a token behind its position.
    """

    def __init__(self, config: ModelConfig, further: type[Block] = Block) -> None:
        super().__init__([Block(config), *(further(config) for _ in range(config.n_future - 1))])

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """See `Heads`."""
        context = context_at(1)
        return [block(z, context) for block in self.further]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """See `Heads`."""
        for block in self.further:
            block.load_state_dict(self[0].state_dict(), strict=False)


class LinearHeads(Heads):
    """A matrix a head on head 1's state h, written around the identity: h + W h (the paper's table S4)."""

    def __init__(self, config: ModelConfig) -> None:
        width = config.hidden_size
        matrices = [nn.Linear(width, width, bias=False) for _ in range(config.n_future - 1)]
        super().__init__([Block(config), *matrices])

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """See `Heads`."""
        return [first + matrix(first) for matrix in self.further]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """See `Heads`."""
        for matrix in self.further:
            matrix.weight.zero_()


class CausalHeads(ParallelHeads):
    """n transformer blocks, head i + 1 on top of head i (the paper's table S4)."""

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """See `Heads`."""
        states, context = [first], context_at(1)
        for block in self.further:
            states.append(block(states[-1], context))
        return states[1:]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """See `Heads`; a block that adds nothing passes the state on."""
        super().start_from_head_1()
        for block in self.further:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()


class AnticausalHeads(ParallelHeads):
    """The last n blocks of the next-token path, the furthest token first (the paper's table S4).

    Block n - 1 reads the trunk's output, block d the state of block d + 1: further heads leave the path early, and have
    no block of their own.
    """

    def forward(self, z: Tensor, ahead: Ahead, context_at: ContextAt, *, apart: bool = False) -> list[Tensor]:
        """See `Heads`."""
        assert not apart, "further heads are what head 1 reads"
        states, context = [z], context_at(1)
        for block in reversed(list(self)):
            states.append(block(states[-1], context))
        return states[:0:-1]

    def start_from_head_1(self) -> None:
        """See `Heads`: there is nothing beside head 1 that could begin as it does."""


class JointBlock(Block):
    """A block that is told of the token before the one it predicts, by a map of its embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.before = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context, embedded: Tensor | None = None) -> Tensor:
        """(B, T, D) and the embedding (B, T, D) of the token before -> (B, T or context.keep, D)."""
        x = super().forward(x, context)
        return x if embedded is None else x + self.before(context.kept(embedded))


class JointHeads(ParallelHeads):
    """Parallel heads, each of which adds a map of the token before its own: a chain of first order, given the prefix.

    Head d + 1 at position t reads the embedding of token t + d, behind its block, so that all blocks still run at once.
    The map goes through the model's width: a table of all pairs of tokens, of that rank.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, JointBlock)

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """See `Heads`."""
        context = context_at(1)
        return [block(z, context, ahead(depth)) for depth, block in enumerate(self.further, 1)]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """See `Heads`."""
        super().start_from_head_1()
        for block in self.further:
            block.before.weight.zero_()


class DeepSeekBlock(Block):
    """A block on a projection of two normalised states: a hidden one and a token's embedding. DeepSeek's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What the block reads (..., D) of an embedding and a state (..., D)."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor, context: Context, embedded: Tensor | None = None) -> Tensor:
        """States and embeddings (B, T, D) -> states (B, T, D)."""
        assert embedded is not None
        return super().forward(self.join(embedded, hidden), context)


class DeepSeekHeads(Heads):
    """A block a depth, or one for all, each on the depth before it and the next token (DeepSeek-AI 2024, section 2.2).

    Depth d = 1..n-1 at position t reads the embedding of token t + d and depth d - 1's state at t (depth 1: head 1's),
    attends to its own depth up to t, and predicts token t + d + 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.depths = config.n_future - 1
        blocks = min(1, self.depths) if config.shared_block else self.depths
        super().__init__([Block(config), *(DeepSeekBlock(config) for _ in range(blocks))])

    def at(self, depth: int) -> DeepSeekBlock:
        """The block of a depth, counted from 1."""
        block = self[min(depth, len(self) - 1)]
        assert isinstance(block, DeepSeekBlock)
        return block

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """See `Heads`."""
        states, context = [first], context_at(1)
        for depth in range(1, self.depths + 1):
            states.append(self.at(depth)(states[-1], context, ahead(depth)))
        return states[1:]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """Give the blocks head 1's weights; of the two states they begin with the hidden one."""
        for block in self.further:
            block.load_state_dict(self[0].state_dict(), strict=False)
            width = block.hnorm.weight.numel()
            block.eh_proj.weight.zero_()
            block.eh_proj.weight[:, width:] = torch.eye(width)


class SequentialHeads(Heads):
    """Head 1, and one block that drafts token after token: an EAGLE-3 layer (Li et al. 2025) trained with its model.

    Depth d = 1..n-1 at position t reads the embedding of token t + d and the block's own state of depth d - 1 at t
    (depth 1: the trunk's output), and predicts token t + d + 1. All depths share the block.
    """

    def __init__(self, config: ModelConfig) -> None:
        blocks = [Block(config), SequentialBlock(config)]
        super().__init__(blocks[: config.n_future])
        self.depths = config.n_future - 1

    def rest(self, z: Tensor, first: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """States (B, T, D) of all depths, unrolled with the true tokens.

        Depth d attends to the keys of depth 1 up to its position, and at its own position alone to those of depths
        2..d: what drafting from that position would have in its cache.
        """
        states, keys, values = [z], list[Tensor](), list[Tensor]()
        for depth in range(1, self.depths + 1):
            embedded = ahead(depth)[:, -states[-1].size(1) :]  # behind depth 1 of those positions that are kept
            states.append(self[1](embedded, states[-1], context_at(depth), keys, values))
        return states[1:]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """Give the block head 1's weights where they fit: all but what reads the embedding and the biases."""
        if not self.depths:
            return
        head, drafter = self
        assert isinstance(head, Block)
        assert isinstance(drafter, SequentialBlock)
        width = drafter.hidden_norm.weight.numel()
        drafter.hidden_norm.load_state_dict(head.input_layernorm.state_dict())
        drafter.post_attention_layernorm.load_state_dict(head.post_attention_layernorm.state_dict())
        drafter.mlp.load_state_dict(head.mlp.state_dict())
        drafter.self_attn.o_proj.load_state_dict(head.self_attn.o_proj.state_dict())
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(drafter.self_attn, name).weight[:, width:] = getattr(head.self_attn, name).weight


_KINDS: dict[str, Callable[[ModelConfig], Heads]] = {
    "parallel": ParallelHeads,
    "linear": LinearHeads,
    "causal": CausalHeads,
    "anticausal": AnticausalHeads,
    "joint": JointHeads,
    "sequential": SequentialHeads,
    "deepseek": DeepSeekHeads,
}


def make_heads(config: ModelConfig) -> Heads:
    """The heads of the kind that `config` names."""
    return _KINDS[config.head_kind](config)


def make_unembeddings(config: ModelConfig) -> nn.ModuleList:
    """The unembeddings of heads 2..n, where they have their own (Gloeckle et al. 2024, table S4: replicated)."""
    count = config.n_future - 1 if config.own_unembeddings else 0
    return nn.ModuleList(nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(count))
