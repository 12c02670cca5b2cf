"""GGUF files for llama.cpp: the next-token path as its architecture, and beside it an EAGLE-3 drafter.

The drafter is the sequential head, or head 2 of parallel heads (see `eagle3`). In a Llama, and in any drafter,
llama.cpp rotates pairs of neighbouring components where Hugging Face's layout rotates halves, so the rows of queries
and keys change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.checkpoint import find_checkpoint, load_checkpoint
from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError, ConfigError
from foretoken.files import new_directory
from foretoken.formats import hf
from foretoken.formats.eagle3 import drafter_tensors, require_drafter
from foretoken.formats.gguf_tokenizer import tokenizer_keys
from foretoken.layers import Rotary
from foretoken.tokenizer import Tokenizer

MODEL, DRAFTER = "model.gguf", "eagle3.gguf"
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
Q8_BLOCK = 32  # weights that share a scale
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_BLOCK = {
    "input_layernorm": "attn_norm", "hidden_norm": "attn_norm_2", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "norm": "output_norm", "lm_head": "output",
        "fc": "fc"}  # fmt: skip


def export_gguf(checkpoint: str | Path, out: str | Path, dtype: str = "bf16", drafter: bool = True) -> list[Path]:
    """Write model.gguf, and eagle3.gguf where there are heads to draft with, into the new directory `out`.

    dtype: f32, f16, bf16 or q8_0, of the matrices; norms and biases stay float32. drafter: False leaves the heads out.
    Returns the files. Raises ConfigError for another type or without the extra, CheckpointError for what llama.cpp does
    not compute and for heads that were never trained.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError("export gguf needs: pip install 'foretoken[gguf]'") from None
    folder = find_checkpoint(checkpoint)
    model, tokenizer = load_checkpoint(folder)
    c = model.config
    drafter = drafter and c.n_future > 1
    words = require_gguf(c, tokenizer, dtype, drafter, str(folder))
    factors = _rotary_factors(c)
    heads = drafter_tensors(model, str(folder)) if drafter else {}
    with new_directory(out) as staging:
        main = {new: p.detach() for name, p in model.named_parameters() if (new := hf.main_name(name, c))}
        arch = _ARCHITECTURES[c.architecture]
        tensors = dict(_renamed(main, c, pairs=arch == "llama")) | factors
        _write(staging / MODEL, arch, _shape_keys(c, c.num_hidden_layers) | words, tensors, dtype)
        if drafter:
            keys = _shape_keys(c, 1) | {
                "target_layers": [c.num_hidden_layers - back for back in (3, 2, 1)],
                "target_hidden_size": c.hidden_size,
                "norm_before_residual": False,
                "norm_before_fc": False,
            }
            tensors = dict(_renamed(heads, c, pairs=True)) | factors
            _write(staging / DRAFTER, "eagle3", keys | words, tensors, dtype)
    return [Path(out) / name for name in (MODEL, DRAFTER) if (Path(out) / name).exists()]


def require_gguf(c: ModelConfig, tokenizer: Tokenizer, dtype: str, drafter: bool, where: str) -> dict[str, Any]:
    """The keys of the tokenizer; raises CheckpointError, naming `where`, for what llama.cpp has no place for."""
    if c.rope_scaling is not None and _ARCHITECTURES[c.architecture] != "llama":
        raise CheckpointError(f"{where}: llama.cpp does not scale the rotary frequencies of a {c.architecture} model")
    if drafter:
        require_drafter(c, where)
        if c.architecture == "qwen2":  # its process ends at once; --no-drafter writes what runs
            raise CheckpointError(f"{where}: llama.cpp gives no drafter the layers of a qwen2 model; see --no-drafter")
        if c.num_hidden_layers < 3:
            raise CheckpointError(f"{where}: has {c.num_hidden_layers} layers; llama.cpp gives a drafter three of them")
    if dtype == "q8_0":
        widths = {
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_attention_heads x head_dim": c.num_attention_heads * c.head_dim,
        }
        for name, width in widths.items():
            if width % Q8_BLOCK:
                raise CheckpointError(f"{where}: {name} = {width}; q8_0 needs a multiple of {Q8_BLOCK}")
    return tokenizer_keys(tokenizer, c.vocab_size, where)


def _rotary_factors(c: ModelConfig) -> dict[str, Tensor]:
    """What llama.cpp divides each rotary frequency by, where they are scaled."""
    if c.rope_scaling is None:
        return {}
    plain = Rotary(c.model_copy(update={"rope_scaling": None})).inv_freq
    return {"rope_freqs.weight": plain / Rotary(c).inv_freq}


def _shape_keys(c: ModelConfig, layers: int) -> dict[str, Any]:
    """Keys below the architecture's name."""
    return {
        "block_count": layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
        "vocab_size": c.vocab_size,
    }


def _write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        name = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[DTYPES[dtype] if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def _renamed(tensors: Mapping[str, Tensor], c: ModelConfig, pairs: bool) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names of Hugging Face's. pairs: with queries and keys for a rotation of neighbours."""
    for name, tensor in tensors.items():
        stem, _, what = name.rpartition(".")  # what: weight or bias
        if stem in _TOP:
            yield f"{_TOP[stem]}.{what}", tensor.contiguous()
            continue
        layer, _, rest = stem.replace("midlayer.", "0.").removeprefix("model.layers.").partition(".")
        heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}.get(rest)
        if pairs and heads is not None:  # halves -> pairs
            tensor = tensor.reshape(heads, 2, c.head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        yield f"blk.{layer}.{_BLOCK[rest]}.{what}", tensor.contiguous()
