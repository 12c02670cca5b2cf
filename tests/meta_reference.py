"""Meta's layout written out: a tiny random checkpoint in it, and its forward pass as its definition reads.

Plain and without a cache; shares nothing with the package. `layers[:-1]` is the trunk; the last layer is head 1, and
`extra_heads` read the same state, which is not normalised. Neighbouring components turn together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PARAMS = {
    "dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "n_future_tokens": 3, "vocab_size": 400,
    "multiple_of": 8, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


def shapes(params: dict[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes by Meta's names."""
    D, n = params["dim"], params["n_future_tokens"]
    width = D // params["n_heads"]
    block = {
        "attention.wq": (D, D), "attention.wk": (params["n_kv_heads"] * width, D),
        "attention.wv": (params["n_kv_heads"] * width, D), "attention.wo": (D, D), "feed_forward.w1": (hidden, D),
        "feed_forward.w2": (D, hidden), "feed_forward.w3": (hidden, D), "attention_norm": (D,), "ffn_norm": (D,),
    }  # fmt: skip
    blocks = [f"layers.{i}" for i in range(params["n_layers"] - n + 1)] + [f"extra_heads.{i}" for i in range(n - 1)]
    found: dict[str, tuple[int, ...]] = {f"{b}.{part}.weight": shape for b in blocks for part, shape in block.items()}
    V = params["vocab_size"]
    return found | {"tok_embeddings.weight": (V, D), "norm.weight": (D,), "output.weight": (V, D)}


def random_weights(params: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights by Meta's names; norms are not one, so that none can be taken for another."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, shape in shapes(params, 56).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.3 * noise if len(shape) == 1 else noise * 1.5 / shape[1] ** 0.5).to(dtype)
    return weights


def write(folder: Path, weights: dict[str, Tensor], params: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    torch.save(weights, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def all_heads(weights: dict[str, Tensor], params: dict[str, Any], tokens: Tensor) -> Tensor:
    """Logits (B, T, n, V)."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    block = _block(w, params)
    h = w["tok_embeddings.weight"][tokens]
    layers = params["n_layers"] - params["n_future_tokens"] + 1
    for i in range(layers - 1):
        h = block(h, f"layers.{i}")
    states = [block(h, f"layers.{layers - 1}")]
    states += [block(h, f"extra_heads.{i}") for i in range(params["n_future_tokens"] - 1)]
    return _norm(torch.stack(states, -2), w["norm.weight"], params) @ w["output.weight"].T


def _norm(x: Tensor, weight: Tensor, params: dict[str, Any]) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight


def _rotate(x: Tensor, params: dict[str, Any]) -> Tensor:
    """x (B, T, heads, H) as H / 2 complex numbers, each turned by its position times its frequency."""
    _, T, _, H = x.shape
    frequencies = params["rope_theta"] ** (-torch.arange(0, H, 2) / H)
    angles = torch.arange(T)[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def _block(w: dict[str, Tensor], params: dict[str, Any]) -> Callable[[Tensor, str], Tensor]:
    def block(h: Tensor, name: str) -> Tensor:
        B, T, D = h.shape
        width = D // params["n_heads"]
        x = _norm(h, w[f"{name}.attention_norm.weight"], params)
        q, k, v = ((x @ w[f"{name}.attention.w{c}.weight"].T).view(B, T, -1, width) for c in "qkv")
        q, k = _rotate(q, params), _rotate(k, params)
        groups = params["n_heads"] // params["n_kv_heads"]
        k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        h = h + torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(B, T, D) @ (
            w[f"{name}.attention.wo.weight"].T
        )
        x = _norm(h, w[f"{name}.ffn_norm.weight"], params)
        gate, up = x @ w[f"{name}.feed_forward.w1.weight"].T, x @ w[f"{name}.feed_forward.w3.weight"].T
        return h + (F.silu(gate) * up) @ w[f"{name}.feed_forward.w2.weight"].T

    return block
