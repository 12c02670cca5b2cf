"""Fast-LLM's layout written out: a tiny random checkpoint in it, and its forward pass as its definition reads.

Plain and without a cache; shares nothing with the package. `layers[:-1]` is the trunk; the last layer is head 1, and
`mtp_heads` read the same state. Each head has a final norm in `mtp_norms`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import meta_reference
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from foretoken.tokenizer import byte_tokenizer

NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def from_meta(weights: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The same numbers under this layout's names, with n equal norms. As functions the two differ."""
    found = {}
    for name, tensor in weights.items():
        block, _, rest = name.removesuffix(".weight").partition(".")
        if block in ("layers", "extra_heads"):
            index, _, part = rest.partition(".")
            prefix = "model.layers" if block == "layers" else "model.mtp_heads"
            found[f"{prefix}.{index}.{NAMES[part]}.weight"] = tensor
        elif block == "norm":
            found |= {f"model.mtp_norms.{i}.weight": tensor.clone() for i in range(n)}
        else:
            found["lm_head.weight" if block == "output" else "model.embed_tokens.weight"] = tensor
    return found


def random_weights(n: int, tied: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a model with n heads."""
    params = meta_reference.PARAMS | {"n_future_tokens": n, "n_layers": 2 + n, "vocab_size": 260}
    weights = from_meta(meta_reference.random_weights(params), n)
    config = {
        "architectures": ["MTPLlamaForCausalLM"], "model_type": "mtp_llama", "vocab_size": 260, "hidden_size": 32,
        "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 700.0, "rope_scaling": None, "max_position_embeddings": 128,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": tied, "prediction_heads": n,
    }  # fmt: skip
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return weights, config


def write(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], shards: int = 1, tied: bool = False
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(folder)
    stored = {k: v for k, v in weights.items() if not (tied and k == "lm_head.weight")}
    parts = [dict(list(stored.items())[i::shards]) for i in range(shards)]
    names = [f"model-{i}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    if shards > 1:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def all_heads(weights: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """Logits (B, T, n, V), as the layout's definition reads: plain, without a cache, nothing of the package."""
    N, groups, eps = config["num_attention_heads"], 2, config["rms_norm_eps"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        half = x.size(-1) // 2
        angles = torch.arange(x.size(1))[:, None] * config["rope_theta"] ** (-torch.arange(half) / half)
        cos, sin, a, b = angles.cos()[:, None], angles.sin()[:, None], x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def layer(h: Tensor, name: str) -> Tensor:
        B, T, D = h.shape
        x = norm(h, f"{name}.input_layernorm")
        q, k, v = ((x @ weights[f"{name}.self_attn.{c}_proj.weight"].T).view(B, T, -1, D // N) for c in "qkv")
        q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.repeat_interleave(groups, 2).transpose(1, 2),
            v.repeat_interleave(groups, 2).transpose(1, 2), is_causal=True,
        )  # fmt: skip
        h = h + y.transpose(1, 2).reshape(B, T, D) @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(h, f"{name}.post_attention_layernorm")
        gate, up = (x @ weights[f"{name}.mlp.{c}_proj.weight"].T for c in ("gate", "up"))
        return h + (F.silu(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T

    h = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"] - 1):
        h = layer(h, f"model.layers.{i}")
    blocks = [f"model.layers.{config['num_hidden_layers'] - 1}"]
    blocks += [f"model.mtp_heads.{i}" for i in range(config["prediction_heads"] - 1)]
    states = [norm(layer(h, block), f"model.mtp_norms.{i}") for i, block in enumerate(blocks)]
    return torch.stack(states, -2) @ weights["lm_head.weight"].T
