"""The head kinds: how n hidden states come from the trunk's output. One small class each, one signature.

`first` is head 1, the last layer of the next-token path; `rest` are heads 2..n. States are not normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foretoken.config import ModelConfig
from foretoken.layers import MLP, Attention, Block, Context, RMSNorm

# What `rest` may ask for at a depth d = 1..n-1: the embedding (B, T, D) of the token d further on than each position,
# and the context whose rotary tables start at position d - 1.
Ahead = Callable[[int], Tensor]
ContextAt = Callable[[int], Context]


class ParallelHeads(nn.ModuleList):
    """n transformer blocks on the same trunk output (Gloeckle et al. 2024, section 2).

    Block d predicts token t + d + 1 at position t. Block 0 is head 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Block(config) for _ in range(config.n_future))

    def first(self, z: Tensor, context: Context) -> Tensor:
        """State (B, T, D) of head 1 from the trunk output z (B, T, D)."""
        return self[0](z, context)  # type: ignore[no-any-return]

    def rest(self, z: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """States (B, T, D) of heads 2..n. No head sees a token behind its position."""
        return [block(z, context_at(1)) for block in list(self)[1:]]

    @torch.no_grad()
    def start_from_head_1(self) -> None:
        """Give heads 2..n head 1's weights."""
        for block in list(self)[1:]:
            block.load_state_dict(self[0].state_dict())


class SequentialHeads(nn.ModuleList):
    """Head 1, and one block that drafts token after token: an EAGLE-3 layer (Li et al. 2025) trained with its model.

    Depth d = 1..n-1 at position t reads the embedding of token t + d and the block's own state of depth d - 1 at t
    (depth 1: the trunk's output), and predicts token t + d + 1. All depths share the block.
    """

    def __init__(self, config: ModelConfig) -> None:
        blocks = [Block(config), SequentialBlock(config)]
        super().__init__(blocks[: config.n_future])
        self.depths = config.n_future - 1

    def first(self, z: Tensor, context: Context) -> Tensor:
        """State (B, T, D) of head 1 from the trunk output z (B, T, D)."""
        return self[0](z, context)  # type: ignore[no-any-return]

    def rest(self, z: Tensor, ahead: Ahead, context_at: ContextAt) -> list[Tensor]:
        """States (B, T, D) of all depths, unrolled with the true tokens.

        Depth d attends to the keys of depth 1 up to its position, and at its own position alone to those of depths
        2..d: what drafting from that position would have in its cache.
        """
        states, keys, values = [z], list[Tensor](), list[Tensor]()
        for depth in range(1, self.depths + 1):
            context = context_at(depth)
            context = Context(context.cos, context.sin, _own_positions(context.mask, z.size(1), depth, z.device))
            states.append(self[1](ahead(depth), states[-1], context, keys, values))
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


class SequentialBlock(nn.Module):
    """A Llama layer whose attention reads two states side by side: a token's embedding and the hidden state.

    The hidden state is also the residual. A plain Llama's whatever the model is, as engines' EAGLE-3 layers are: no
    biases, no norm of queries and keys. Parameter names are theirs.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config = config.model_copy(update={"architecture": "llama"})
        self.self_attn = Attention(config, inputs=2)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # of the embedding
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, context: Context, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """Embeddings and states (B, T, D) -> states (B, T, D).

        keys and values (B, T, Nkv, H) are those of earlier depths, which the mask covers first; this one's are added.
        """
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), -1)
        q, k, v = self.self_attn.project(both, context)
        keys.append(k)
        values.append(v)
        x = hidden + self.self_attn.attend(q, torch.cat(keys, 1), torch.cat(values, 1), context.mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


def _own_positions(mask: Tensor | None, length: int, depth: int, device: torch.device) -> Tensor | None:
    """Mask (B or 1, 1, T, depth T) over the keys of depths 1..depth: `mask` or causal, then each position's own."""
    if depth == 1:
        return mask
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    own = torch.eye(length, dtype=torch.bool, device=device).expand_as(mask)
    return torch.cat((mask, *[own] * (depth - 1)), -1)


def make_heads(config: ModelConfig) -> ParallelHeads | SequentialHeads:
    """The heads of the kind that `config` names."""
    return SequentialHeads(config) if config.head_kind == "sequential" else ParallelHeads(config)
