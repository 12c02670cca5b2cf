"""Fast-LLM's MTPLlamaForCausalLM: a Hugging Face directory whose main files hold parallel heads too.

`model.layers` ends with head 1, `model.mtp_heads` holds heads 2..n, which read what that last layer reads, and
`model.mtp_norms` one final norm per head. Here all heads share a norm, so theirs must be equal.
"""

from __future__ import annotations

from pathlib import Path

import torch

from foretoken.config_model import ModelConfig, validated
from foretoken.errors import CheckpointError, ConfigError
from foretoken.files import read_json
from foretoken.formats import hf
from foretoken.formats.importing import Progress, by_our_names, import_tensors
from foretoken.formats.safetensors import Stored, check_tied, stored_tensors
from foretoken.formats.sentencepiece import load_sentencepiece
from foretoken.tokenizer import load as load_tokenizer

ARCHITECTURE = "MTPLlamaForCausalLM"
_NORM = "model.mtp_norms.{}.weight"


def import_fast_llm(directory: str | Path, out: str | Path, progress: Progress = lambda text: None) -> Path:
    """Write the model in `directory` as the new checkpoint directory `out`; returns `out`.

    Weights stay in their type and pass through memory one by one. Raises CheckpointError for what is missing, damaged
    or not of this layout, and for heads whose norms differ; then nothing is left behind.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    config = _config(folder)
    stored = stored_tensors(folder)
    for depth in range(1, config.n_future):
        _check_norm(stored, depth, folder)
        del stored[_NORM.format(depth)]
    is_file = (folder / "tokenizer.json").exists()
    words = load_tokenizer(folder) if is_file else load_sentencepiece(folder / "tokenizer.model")
    if words.vocab_size > config.vocab_size:
        raise CheckpointError(f"{folder}: tokenizer of {words.vocab_size} tokens beside a model of {config.vocab_size}")
    ignored = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_word_embeddings else []))
    state = by_our_names(stored, lambda name: _theirs(name, config), config, str(folder), ignored)
    if config.tie_word_embeddings and (copy := stored.get("lm_head.weight")):
        check_tied(folder, "lm_head.weight", copy.read(), state["embed_tokens.weight"].read())
    origin = {"format": "fast-llm", "path": str(folder)}
    return import_tensors(out, config, state, words, origin, progress)


def _config(folder: Path) -> ModelConfig:
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    if values.get("architectures") != [ARCHITECTURE]:
        raise CheckpointError(f"{where}: architectures = {values.get('architectures')}, must be ['{ARCHITECTURE}']")
    try:
        plain = hf.model_config(values | {"architectures": ["LlamaForCausalLM"]}, None, where)
        fields = plain.model_dump() | {"n_future": values.get("prediction_heads", 1)}
        return validated(ModelConfig, fields, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _check_norm(stored: dict[str, Stored], depth: int, folder: Path) -> None:
    first, own = (_NORM.format(index) for index in (0, depth))
    for name in (first, own):
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor '{name}' is missing")
    if not torch.equal(stored[first].read(), stored[own].read()):
        raise CheckpointError(
            f"{folder}: '{own}' is not '{first}': heads with norms of their own cannot be imported, "
            f"because here all heads share one"
        )


def _theirs(name: str, config: ModelConfig) -> str:
    """Fast-LLM's name of our parameter `name`: Hugging Face's, but for the further heads and the final norm."""
    if name == "norm.weight":
        return _NORM.format(0)
    if (main := hf.main_name(name, config)) is not None:
        return main
    return "model.mtp_" + (hf.heads_name(name, config) or name)
