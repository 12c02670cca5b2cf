"""EAGLE-3 drafter directories: what vLLM, SGLang and TensorRT-LLM load beside the model (Li et al. 2025).

A sequential head is such a drafter. Head 2 of parallel heads becomes one whose embedding half is zero: an EAGLE-3 layer
reads [norm(embedding of token t+1), norm(hidden state t)] and predicts token t+2, which is head 2's place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from foretoken.checkpoint import find_checkpoint, load_model
from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError
from foretoken.files import new_directory, read_json, write_json
from foretoken.formats import hf
from foretoken.formats.safetensors import FILE, save_tensors
from foretoken.formats.trained import require_trained_heads
from foretoken.model import Model

LEAST_LAYERS = 4  # SGLang names layers by their output, so the first of three ids must be at least 1


def export_eagle3(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the drafter of `checkpoint` to the new directory `out`; returns `out`.

    Unlike `mtp_heads/` it holds a copy of the unembedding, without which SGLang does not start. Raises CheckpointError
    for a model that has no head such a drafter could be made of, or whose heads were never trained.
    """
    folder = find_checkpoint(checkpoint)
    model = load_model(folder, None)
    require_eagle3(model.config, str(folder))
    tensors = drafter_tensors(model, str(folder)) | {"lm_head.weight": model.unembeddings()[1].detach()}
    config = hf.eagle3_config(model.config, read_json(folder / "config.json"))
    with new_directory(out) as staging:
        save_tensors(staging / FILE, tensors)
        write_json(staging / "config.json", config)
    return Path(out)


def require_eagle3(config: ModelConfig, where: str) -> None:
    """Raise CheckpointError, naming `where`, for a model that SGLang and TensorRT-LLM can have no drafter of."""
    require_drafter(config, where)
    if config.num_hidden_layers < LEAST_LAYERS:
        raise CheckpointError(
            f"{where}: has {config.num_hidden_layers} layers; an EAGLE-3 drafter for SGLang and TensorRT-LLM "
            f"reads three of them behind the first, which takes at least {LEAST_LAYERS}"
        )


def require_drafter(config: ModelConfig, where: str) -> None:
    """Raise CheckpointError, naming `where`, for a model without further heads and for heads with biases or with a norm
    of queries and keys, which the format has no place for.
    """
    if config.n_future == 1:
        raise CheckpointError(f"{where}: has one head, so there is nothing to draft with")
    if not config.portable:
        raise CheckpointError(f"{where}: {config.head_kind} heads are for foretoken alone; no engine drafts with them")
    if not config.sequential and (config.qkv_bias or config.qk_norm):
        raise CheckpointError(f"{where}: parallel heads of a {config.architecture} model do not fit an EAGLE-3 layer")


@torch.no_grad()
def drafter_tensors(model: Model, where: str) -> dict[str, Tensor]:
    """EAGLE-3's tensors by name, less embedding and unembedding where these are the model's own.

    Raises CheckpointError, naming `where`, for heads that do not fit (`require_drafter`) or were never trained.
    """
    config = model.config
    require_drafter(config, where)
    require_trained_heads(model, where)
    head = model.heads.get_submodule("1")
    tensors = {f"midlayer.{name}": p.detach() for name, p in head.named_parameters()}
    if not config.sequential:
        tensors["midlayer.hidden_norm.weight"] = tensors["midlayer.input_layernorm.weight"]
        tensors["midlayer.input_layernorm.weight"] = torch.ones_like(tensors["midlayer.hidden_norm.weight"])
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = tensors[f"midlayer.self_attn.{name}.weight"]
            tensors[f"midlayer.self_attn.{name}.weight"] = torch.cat((torch.zeros_like(weight), weight), 1)
    if config.own_unembeddings:
        tensors["lm_head.weight"] = model.unembeddings()[1].detach()
    return tensors | {"norm.weight": model.norm.weight.detach()} | hf.eagle3_constants(config, model.dtype)
