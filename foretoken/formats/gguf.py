"""GGUF files for llama.cpp: the next-token path as a Llama, and beside it an EAGLE-3 drafter.

The drafter is the sequential head, or head 2 of parallel heads (see `eagle3`). llama.cpp rotates pairs of neighbouring
components where Hugging Face's layout rotates halves, so the rows of queries and keys change places.
"""

from __future__ import annotations

import json
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
from foretoken.formats.eagle3 import drafter_tensors, drafts_to_make
from foretoken.tokenizer import Tokenizer

MODEL, DRAFTER = "model.gguf", "eagle3.gguf"
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_BLOCK = {
    "input_layernorm": "attn_norm", "hidden_norm": "attn_norm_2", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "norm": "output_norm", "lm_head": "output",
        "fc": "fc"}  # fmt: skip


def export_gguf(checkpoint: str | Path, out: str | Path, dtype: str = "bf16") -> list[Path]:
    """Write model.gguf, and eagle3.gguf where there are heads to draft with, into the new directory `out`.

    dtype: f32, f16 or bf16, of the matrices; norms stay float32. Returns the files. Raises ConfigError for another type
    or without the extra, CheckpointError for what llama.cpp's Llama does not compute.
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
    if c.architecture not in ("llama", "mistral") or c.rope_scaling is not None:
        what = f"a {c.architecture} model" + (" with scaled rotary frequencies" if c.rope_scaling else "")
        raise CheckpointError(f"{folder}: {what} cannot be written yet; a llama or mistral with plain ones can")
    if c.n_future > 1 and c.num_hidden_layers < 3:
        raise CheckpointError(f"{folder}: has {c.num_hidden_layers} layers; llama.cpp gives a drafter three of them")
    words = _tokenizer_keys(tokenizer, c.vocab_size, str(folder))
    with new_directory(out) as staging:
        main = {new: p.detach() for name, p in model.named_parameters() if (new := hf.main_name(name, c))}
        _write(staging / MODEL, "llama", _shape_keys(c, c.num_hidden_layers) | words, main, c, dtype)
        if c.n_future > 1:
            keys = _shape_keys(c, 1) | {
                "target_layers": [c.num_hidden_layers - back for back in (3, 2, 1)],
                "target_hidden_size": c.hidden_size,
                "norm_before_residual": False,
                "norm_before_fc": False,
            }
            _write(staging / DRAFTER, "eagle3", keys | words, drafter_tensors(model, str(folder)), c, dtype)
    return [Path(out) / name for name in (MODEL, DRAFTER) if (Path(out) / name).exists()]


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


def _tokenizer_keys(tokenizer: Tokenizer, vocab_size: int, where: str) -> dict[str, Any]:
    """Keys `tokenizer.ggml.*` of a byte-level BPE whose splitting llama.cpp has a name for."""
    stored = json.loads(tokenizer.backend.to_str())
    model, splits = stored["model"], stored.get("pre_tokenizer") or {}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or []]
    if model.get("type") != "BPE" or splits.get("type") != "ByteLevel" or splits.get("add_prefix_space"):
        raise CheckpointError(f"{where}: only byte-level BPE tokenizers with GPT-2's splitting can be written to GGUF")
    if merges and not splits.get("use_regex", True):
        raise CheckpointError(f"{where}: this tokenizer merges across words, which llama.cpp's do not")
    added = {token["id"]: token for token in stored.get("added_tokens") or []}
    names = {token_id: name for name, token_id in model["vocab"].items()}
    names |= {token_id: token["content"] for token_id, token in added.items()}
    tokens = [names.get(i, f"<|unused{i}|>") for i in range(vocab_size)]
    control = {i for i in range(vocab_size) if i not in names or added.get(i, {}).get("special")}
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2" if merges else "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in control else 4 if i in added else 1 for i in range(vocab_size)],
        # llama.cpp does not load a list without merges; this pair never meets
        "tokenizer.ggml.merges": merges or [f"{tokens[0]} {tokens[0]}"],
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    return keys | {f"tokenizer.ggml.{role}_token_id": i for role, i in ids.items() if i is not None}


def _write(
    path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, Tensor], c: ModelConfig, dtype: str
) -> None:
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
    for name, tensor in _renamed(tensors, c):
        kind = gguf.GGMLQuantizationType[DTYPES[dtype] if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def _renamed(tensors: Mapping[str, Tensor], c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names of Hugging Face's, with queries and keys in its rotary layout."""
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem in _TOP:
            yield f"{_TOP[stem]}.weight", tensor.contiguous()
            continue
        layer, _, rest = stem.replace("midlayer.", "0.").removeprefix("model.layers.").partition(".")
        heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}.get(rest)
        if heads is not None:  # halves -> pairs
            tensor = tensor.reshape(heads, 2, c.head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        yield f"blk.{layer}.{_BLOCK[rest]}.weight", tensor.contiguous()


def serving_command(checkpoint: str | Path, files: list[str]) -> str:
    """How llama.cpp's server is started on the files that `export_gguf` wrote."""
    command = f"llama-server -m {files[0]}"
    if len(files) == 1:
        return command
    drafts = drafts_to_make(checkpoint)
    return f"{command} --spec-type draft-eagle3 -md {files[1]} --spec-draft-n-max {drafts} --spec-draft-p-min 0"
