"""Optimisers, parameter groups and schedules. Schedules are pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.config import LossConfig, OptimConfig, WeightPoint
from foretoken.model import Model
from foretoken.parallel import like, whole


def make_optimizers(model: Model, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest, adapters among them.

    Weight decay falls on matrices and embeddings, not on norms and biases. Every group remembers its peak learning
    rate as `peak_lr`. Each trainable parameter is in exactly one group.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = {name for name, _ in named if name.startswith(("trunk.", "heads.")) and ".lora_" not in name}
    in_blocks = [p for name, p in named if p.dim() == 2 and name in inside]
    other_matrices = [p for name, p in named if p.dim() == 2 and name not in inside]
    vectors = [p for _, p in named if p.dim() < 2]
    decayed = other_matrices if config.name == "muon" else [*in_blocks, *other_matrices]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay, "peak_lr": config.lr},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": config.lr},
    ]
    groups = [group for group in groups if group["params"]]
    # Not fused: that kernel ignores strides, and a parameter that has decoded is a strided view (`BlockStack`).
    optimizers = list[torch.optim.Optimizer]()
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps))
    if config.name == "muon" and in_blocks:
        muon = [{"params": in_blocks, "peak_lr": config.muon_lr}]
        optimizers.append(Muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for _, p in named), "a parameter is in no group, or in two"
    return optimizers


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), with matrices of one shape orthogonalised together.

    torch runs the Newton-Schulz iteration matrix by matrix and always in bfloat16, which a CPU without bfloat16
    products emulates: for 105 matrices of a 7M-parameter model that took twice the time of the forward and backward.
    Here the iteration runs once per shape, in bfloat16 where the hardware multiplies it fast and in float32 elsewhere.

    A matrix whose gradient is 0, such as a head's of loss weight 0, stays as it is: orthogonalised, what is left of its
    momentum would be of full size in every step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the parameters' gradients."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                learns = [whole(p.grad.any()) for p in same if p.grad is not None]
                update = torch.stack([whole(self._momentum(p, group)) * on for p, on in zip(same, learns, strict=True)])
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                tensors: list[Tensor] = list(same)
                scale = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                torch._foreach_mul_(tensors, [1 - group["lr"] * group["weight_decay"] * on for on in learns])
                changes = [like(change, p) for change, p in zip(update.to(same[0].dtype), same, strict=True)]
                torch._foreach_add_(tensors, changes, alpha=-scale)

    def _momentum(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (m, r, c) with all singular values moved near 1, by the quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if fast_bfloat16(matrices.device) else torch.float32)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32, rather than emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], ratio: float) -> None:
    """Give every group `ratio` of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * ratio


def learning_rate_ratio(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate / peak at `step` (0-based): linear warm-up, then cosine to `final_lr_ratio` at the last step."""
    # 1. warm-up
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    # 2. past the end
    if step >= total_steps:
        return config.final_lr_ratio
    # 3. cosine between
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def head_weights(step: int, total_steps: int, n: int, config: LossConfig) -> list[float]:
    """The n heads' loss weights at `step`: all 1 (the paper), or as the recipe's schedule or points say."""
    points, done = config.head_weights, step / max(1, total_steps)
    if not points:
        active = {"forward": 1 + int(done * n), "reverse": n - int(done * n)}.get(config.head_schedule, n)
        ratio = config.head_beta if config.head_schedule == "geometric" else 1.0
        further = 1 - done if config.head_schedule == "linear_decay" else 1.0
        return [(further if i else 1.0) * ratio**i if i < active else 0.0 for i in range(n)]
    if not isinstance(points[0], WeightPoint):
        return [float(w) for w in points]
    ordered = sorted((p for p in points if isinstance(p, WeightPoint)), key=lambda p: p.step)
    before = [p for p in ordered if p.step <= step] or ordered[:1]
    after = [p for p in ordered if p.step > step] or ordered[-1:]
    left, right = before[-1], after[0]
    share = (step - left.step) / (right.step - left.step) if right.step > left.step and step > left.step else 0.0
    return [a + share * (b - a) for a, b in zip(left.weights, right.weights, strict=True)]


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before.

    Where that is not finite, gradients stay as they are.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if math.isfinite(value := float(whole(norm))):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value


def not_finite(model: Model) -> str | None:
    """The first part of a model whose gradient is not finite, in a backward's order: a head, the unembedding, ...

    All processes must ask.
    """
    n, own = model.config.n_future, len(model.heads)
    names = [f"head {i}" if i == 1 or own == n else f"heads 2 to {n}" for i in range(1, own + 1)]
    parts: list[tuple[str, nn.Module]] = [
        *zip(names, model.heads, strict=True), ("the final norm", model.norm), ("the unembedding", model.lm_head),
        ("the trunk", model.trunk), ("the embedding", model.embed_tokens),
    ]  # fmt: skip
    for name, part in parts:
        if not all(whole(p.grad).isfinite().all() for p in part.parameters() if p.grad is not None):
            return name
    return None
