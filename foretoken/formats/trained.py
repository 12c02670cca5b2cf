"""Heads that nobody trained: found before they are written for an engine, which would serve them without a word."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foretoken.errors import CheckpointError
from foretoken.model import Model


@torch.no_grad()
def require_trained_heads(model: Model, where: str) -> None:
    """Raise CheckpointError, naming `where` and a tensor, for a further head that is as it was initialised.

    That is: a matrix that equals head 1's or another head's, as copies of the last block begin, or is all zero; or a
    head whose norms are all exactly 1 and whose matrices have the deviation 0.02 of random ones. Values that are no
    numbers are refused too, and unembeddings of heads' own that are equal.
    """
    blocks = [dict(head.named_parameters()) for head in model.heads]
    for depth, block in enumerate(blocks[1:], 1):
        what = f"{where}: head {depth + 1}" if not model.config.sequential else f"{where}: the sequential head"
        for name, p in block.items():
            if not torch.isfinite(p).all():
                raise CheckpointError(f"{what}: {name} holds values that are no numbers")
            if p.dim() == 2 and not p.any():
                raise CheckpointError(f"{what}: {name} is all zero: it was never trained")
            for other, earlier in enumerate(blocks[:depth]):
                if p.dim() == 2 and _same(p, earlier[name]):
                    raise CheckpointError(f"{what}: {name} equals head {other + 1}'s: it was copied and never trained")
        if all(_initial(name, p) for name, p in block.items()):
            raise CheckpointError(f"{what}: all its tensors are as they were initialised: it was never trained")
    matrices = model.unembeddings() if model.config.own_unembeddings else []
    for depth, matrix in enumerate(matrices):
        what = f"{where}: head {depth + 1}: its unembedding"
        if not torch.isfinite(matrix).all():
            raise CheckpointError(f"{what} holds values that are no numbers")
        for other, before in enumerate(matrices[:depth]):
            if torch.equal(matrix, before):
                raise CheckpointError(f"{what} equals head {other + 1}'s: it was copied and never trained")


def _same(p: Tensor, other: Tensor) -> bool:
    """Whether two matrices are equal; of a wider one the last columns, which a copy of head 1 goes to."""
    return torch.equal(p[:, -other.size(1) :], other)


def _initial(name: str, p: Tensor) -> bool:
    """Whether a parameter may be one of `Model.init_weights`: norms 1, biases 0, matrices of deviation 0.02."""
    if p.dim() == 1:
        return torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return True  # these depend on the depth
    five_standard_errors = 5 * 0.02 / math.sqrt(2 * p.numel())
    return abs(float(p.float().std()) - 0.02) < five_standard_errors
