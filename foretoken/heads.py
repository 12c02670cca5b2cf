"""The head kinds: how n hidden states come from the trunk's output. One small class each, one signature."""

from __future__ import annotations

from torch import Tensor, nn

from foretoken.config import ModelConfig
from foretoken.layers import Block, Context


class ParallelHeads(nn.ModuleList):
    """n transformer blocks on the same trunk output (Gloeckle et al. 2024, section 2).

    Block d predicts token t + d + 1 at position t. Block 0 is head 1, the last layer of the next-token path.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Block(config) for _ in range(config.n_future))

    def forward(self, z: Tensor, context: Context, depth: int) -> Tensor:
        """Hidden state (B, T, D) of the head at `depth` (0-based) from the trunk output z (B, T, D), not normalised."""
        return self[depth](z, context)  # type: ignore[no-any-return]
