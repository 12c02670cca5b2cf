"""Meta's layout, of the multi-token models that came with the paper and of the first Llamas: params.json beside
consolidated.pth, and a SentencePiece tokenizer.

`n_layers` there counts the trunk and all heads: `layers` holds n_layers - n + 1 blocks, of which the last is head 1,
and `extra_heads` holds heads 2..n, which read what that last block reads. Pairs of neighbouring components turn
together, where halves do in Hugging Face's layout, so rows of queries and keys change places, in every head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from foretoken.config_model import ModelConfig, Section, validated
from foretoken.errors import CheckpointError, ConfigError
from foretoken.files import read_json
from foretoken.formats.importing import Progress, by_our_names, import_tensors
from foretoken.formats.safetensors import Stored
from foretoken.formats.sentencepiece import load_sentencepiece
from foretoken.tokenizer import Tokenizer
from foretoken.tokenizer import load as load_tokenizer

_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
}  # fmt: skip
_COMPUTED = ("rope.freqs",)  # a table that some exporters stored


class Params(Section):
    """params.json. max_seq_len: stands there seldom; 4096 is what the paper trained the released models with."""

    dim: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    n_future_tokens: int = Field(default=1, ge=1)
    vocab_size: int = -1  # -1 is the tokenizer's
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_seq_len: int = Field(default=4096, ge=1)
    multiple_of: int | None = None  # these two decide w1's width, which is read off w1
    ffn_dim_multiplier: float | None = None
    max_batch_size: int | None = None
    use_scaled_rope: bool = False


def import_meta(
    directory: str | Path, out: str | Path, tokenizer: str | Path | None = None, progress: Progress = lambda text: None
) -> Path:
    """Write the model in `directory` as the new checkpoint directory `out`; returns `out`.

    tokenizer: a tokenizer.model, or a tokenizer.json; by default tokenizer.model there or in the folder above. Weights
    stay in their type and pass through memory one by one. Raises CheckpointError for what is missing, damaged or not
    of this layout; then nothing is left behind.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    where = str(folder / "params.json")
    try:
        params = validated(Params, read_json(folder / "params.json"), where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if params.use_scaled_rope:
        raise CheckpointError(f"{where}: use_scaled_rope = true is not supported: its factors do not stand there")
    file = _weights_file(folder)
    stored = _stored(file)
    config = _config(params, stored, where, str(file))
    words = _tokenizer(folder, tokenizer)
    if words.vocab_size != config.vocab_size:
        raise CheckpointError(f"{folder}: tokenizer of {words.vocab_size} tokens beside a model of {config.vocab_size}")
    named = by_our_names(stored, lambda name: _theirs(name, config), config, str(file), _COMPUTED)
    state = {name: _in_halves(name, tensor, config) for name, tensor in named.items()}
    origin = {"format": "meta", "path": str(folder), "files": {file.name: file.stat().st_size}}
    return import_tensors(out, config, state, words, origin, progress)


def _config(params: Params, stored: Mapping[str, Stored], where: str, file: str) -> ModelConfig:
    embedding, gate = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"
    for name in (embedding, gate):
        if name not in stored:
            raise CheckpointError(f"{file}: tensor '{name}' is missing")
    vocab_size = stored[embedding].shape[0]
    if params.vocab_size not in (-1, vocab_size):
        raise CheckpointError(f"{where}: vocab_size = {params.vocab_size}, but {embedding} has {vocab_size} rows")
    if params.n_layers < params.n_future_tokens:
        raise CheckpointError(
            f"{where}: n_layers = {params.n_layers} counts all heads, so it is at least n_future_tokens = "
            f"{params.n_future_tokens}"
        )
    if params.dim % params.n_heads:
        raise CheckpointError(f"{where}: dim = {params.dim} is not a multiple of n_heads = {params.n_heads}")
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": params.dim,
        "intermediate_size": stored[gate].shape[0],
        "num_hidden_layers": params.n_layers - params.n_future_tokens + 1,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "head_dim": params.dim // params.n_heads,
        "max_position_embeddings": params.max_seq_len,
        "rope_theta": params.rope_theta,
        "rms_norm_eps": params.norm_eps,
        "n_future": params.n_future_tokens,
    }
    try:
        return validated(ModelConfig, fields, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _theirs(name: str, config: ModelConfig) -> str:
    """Meta's name of our parameter `name`."""
    kind, _, rest = name.partition(".")
    if kind not in ("trunk", "heads"):
        return f"{_NAMES[kind]}.weight"
    index, _, part = rest.removesuffix(".weight").partition(".")
    if kind == "trunk":
        block = f"layers.{index}"
    else:
        block = f"layers.{config.num_hidden_layers - 1}" if index == "0" else f"extra_heads.{int(index) - 1}"
    return f"{block}.{_NAMES[part]}.weight"


def _in_halves(name: str, stored: Stored, config: ModelConfig) -> Stored:
    """Queries and keys (N H, D) with the rows of each head in Hugging Face's rotary order; others as they are."""
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads

    def read() -> Tensor:
        pairs = stored.read().reshape(heads, config.head_dim // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(stored.shape)

    return Stored(stored.dtype, stored.shape, read) if ".q_proj." in name or ".k_proj." in name else stored


def _weights_file(folder: Path) -> Path:
    files = sorted(folder.glob("consolidated*.pth"))
    if not files:
        raise CheckpointError(f"{folder}: holds no consolidated.pth")
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} weight files, {files[0].name} and on, each a slice of every tensor; "
            f"one consolidated.pth can be imported"
        )
    return files[0]


def _stored(file: Path) -> dict[str, Stored]:
    return {
        name: Stored(tensor.dtype, tuple(tensor.shape), functools.partial(_read_one, file, name))
        for name, tensor in _mapped(file).items()
    }


def _read_one(file: Path, name: str) -> Tensor:
    return _mapped(file)[name]  # mapped anew each time: what has been read is then let go of


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, of which only what is touched is read from the disk."""
    try:
        tensors: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the library raises nothing narrower
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: not a complete file of tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file}: must hold tensors by name and nothing else")
    return tensors


def _tokenizer(folder: Path, given: str | Path | None) -> Tokenizer:
    if given is not None:
        return load_sentencepiece(Path(given)) if Path(given).suffix == ".model" else load_tokenizer(given)
    for path in (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"):
        if path.is_file():
            return load_sentencepiece(path)
    raise CheckpointError(f"{folder}: no tokenizer.model there or in the folder above; name one with --tokenizer")
