"""The model: trunk, heads, one shared final norm and one unembedding.

Heads return hidden states; only the loss and the decode loop turn them into logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretoken.cache import KVCache
from foretoken.config import ModelConfig
from foretoken.heads import ParallelHeads
from foretoken.layers import Block, BlockStack, Context, RMSNorm, Rotary, grouped_mask


class Model(nn.Module):
    """A Llama-family model with n heads. Trunk + head 1 + norm + unembedding is an ordinary Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers - 1))
        self.heads = ParallelHeads(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rotary = Rotary(config)
        self._stepper: Stepper | None = None

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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.embed_tokens.weight.dtype

    def context(self, length: int, document_ids: Tensor | None = None) -> Context:
        """What the blocks share for windows of `length` positions.

        document_ids (B, length): when given, a position attends only inside its own document.
        """
        cos, sin = self.rotary(torch.arange(length, device=self.device)[None], torch.float32)
        mask = None
        if document_ids is not None:
            same = document_ids[:, :, None] == document_ids[:, None, :]
            mask = torch.ones(length, length, dtype=torch.bool, device=self.device).tril() & same
            mask = mask[:, None]  # (B, 1, T, T)
        return Context(cos, sin, mask)

    def run_trunk(self, tokens: Tensor, context: Context) -> Tensor:
        """Tokens (B, T) -> trunk output z (B, T, D), not normalised."""
        x: Tensor = self.embed_tokens(tokens)
        for block in self.trunk:
            x = block(x, context)
        return x

    def run_head(self, z: Tensor, context: Context, depth: int) -> Tensor:
        """Trunk output (B, T, D) -> normalised hidden state (B, T, D) of the head at `depth`, ready to unembed."""
        return self.norm(self.heads(z, context, depth))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> list[Tensor]:
        """Tokens (B, T) -> n normalised hidden states (B, T, D), head 1 first."""
        context = self.context(tokens.size(1), document_ids)
        z = self.run_trunk(tokens, context)
        return [self.run_head(z, context, depth) for depth in range(self.config.n_future)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in float32 or wider."""
        logits: Tensor = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def stepper(self) -> Stepper:
        """The form of this model that decodes with a cache, made on first use and whenever the weights have moved."""
        if self._stepper is None or not self._stepper.current(self):
            self._stepper = Stepper(self)
        return self._stepper


class Stepper:
    """The model as decoding runs it: cached, ragged positions, all heads of a step in one batched block."""

    def __init__(self, model: Model) -> None:
        self.config = model.config
        self.model = model
        self.trunk = [BlockStack([block]) for block in model.trunk]  # type: ignore[list-item]
        self.heads = BlockStack(list(model.heads))  # type: ignore[arg-type]
        self.tables: tuple[Tensor, Tensor] | None = None
        self.made_from = _addresses(model)

    def current(self, model: Model) -> bool:
        """Whether the model's weights are still the memory this form shares."""
        return self.made_from == _addresses(model)

    def new_cache(self, rows: int, capacity: int, heads: int) -> KVCache:
        """An empty cache for `rows` requests of at most `capacity` positions, for the trunk and the first `heads`."""
        c, model = self.config, self.model
        blocks = len(self.trunk) + heads
        return KVCache(blocks, rows, c.num_key_value_heads, capacity, c.head_dim, model.dtype, model.device)

    def forward(self, tokens: Tensor, cache: KVCache, heads: int) -> Tensor:
        """Run tokens (B, T) behind what the cache holds; returns the first `heads` heads' states (heads, B, T, D).

        The states are not normalised. The cache then holds all T positions: roll back those that are not kept.
        """
        T = tokens.size(1)
        positions = cache.positions(T)
        context = self._context(positions, cache)
        x = F.embedding(tokens, self.model.embed_tokens.weight)[None]  # (1, B, T, D)
        for index, stack in enumerate(self.trunk):
            x = stack.forward(x, context, positions, cache, index, 1)
        hidden = self.heads.forward(x, context, positions, cache, len(self.trunk), heads)
        cache.advance(T)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """States (..., D) as `forward` returns them -> logits (..., V), float32 or wider."""
        return self.model.logits(self.model.norm(hidden))

    def _context(self, positions: Tensor, cache: KVCache) -> Context:
        if self.tables is None or self.tables[0].size(0) < cache.capacity:
            self.tables = self.model.rotary(torch.arange(cache.capacity, device=positions.device), self.model.dtype)
        cos, sin = (table[positions] for table in self.tables)  # (B, T, H)
        slots = torch.arange(max(cache.lengths) + positions.size(1), device=positions.device)
        visible = slots <= positions[:, :, None]  # (B, T, S)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        return Context(cos, sin, grouped_mask(visible, groups, self.model.dtype))


def _addresses(model: Model) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]
