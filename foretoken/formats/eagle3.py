"""EAGLE-3 drafter directories: what vLLM, SGLang and TensorRT-LLM load beside the model (Li et al. 2025).

A sequential head is such a drafter. Head 2 of parallel heads becomes one whose embedding half is zero: an EAGLE-3 layer
reads [norm(embedding of token t+1), norm(hidden state t)] and predicts token t+2, which is head 2's place.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from foretoken.checkpoint import HEADS, find_checkpoint, load_model
from foretoken.errors import CheckpointError
from foretoken.files import new_directory, read_json, write_json
from foretoken.formats import hf
from foretoken.formats.safetensors import FILE, save_tensors
from foretoken.model import Model

LEAST_LAYERS = 4  # SGLang names layers by their output, so the first of three ids must be at least 1


def export_eagle3(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the drafter of `checkpoint` to the new directory `out`; returns `out`.

    Unlike `mtp_heads/` it holds a copy of the unembedding, without which SGLang does not start. Raises CheckpointError
    for a model that has no head such a drafter could be made of.
    """
    folder = find_checkpoint(checkpoint)
    model = load_model(folder, None)
    if model.config.num_hidden_layers < LEAST_LAYERS:
        raise CheckpointError(
            f"{folder}: has {model.config.num_hidden_layers} layers; an EAGLE-3 drafter for SGLang and TensorRT-LLM "
            f"reads three of them behind the first, which takes at least {LEAST_LAYERS}"
        )
    tensors = drafter_tensors(model, str(folder)) | {"lm_head.weight": model.lm_head.weight.detach()}
    config = hf.eagle3_config(model.config, read_json(folder / "config.json"))
    with new_directory(out) as staging:
        save_tensors(staging / FILE, tensors)
        write_json(staging / "config.json", config)
    return Path(out)


@torch.no_grad()
def drafter_tensors(model: Model, where: str) -> dict[str, Tensor]:
    """EAGLE-3's tensors by name, less embedding and unembedding, which are the model's own.

    Raises CheckpointError, naming `where`, for a model without further heads and for heads with biases or with a norm
    of queries and keys, which the format has no place for.
    """
    config = model.config
    if config.n_future == 1:
        raise CheckpointError(f"{where}: has one head, so there is nothing to draft with")
    if not config.sequential and (config.qkv_bias or config.qk_norm):
        raise CheckpointError(f"{where}: parallel heads of a {config.architecture} model do not fit an EAGLE-3 layer")
    head = model.heads.get_submodule("1")
    tensors = {f"midlayer.{name}": p.detach() for name, p in head.named_parameters()}
    if not config.sequential:
        tensors["midlayer.hidden_norm.weight"] = tensors["midlayer.input_layernorm.weight"]
        tensors["midlayer.input_layernorm.weight"] = torch.ones_like(tensors["midlayer.hidden_norm.weight"])
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = tensors[f"midlayer.self_attn.{name}.weight"]
            tensors[f"midlayer.self_attn.{name}.weight"] = torch.cat((torch.zeros_like(weight), weight), 1)
    return tensors | {"norm.weight": model.norm.weight.detach()} | hf.eagle3_constants(config, model.dtype)


def drafts_to_make(checkpoint: str | Path) -> int:
    """Drafts per step that engines do well with: a head that is no sequential one drafts one token well, not more."""
    own = read_json(find_checkpoint(checkpoint) / HEADS / "config.json")["foretoken"]
    return int(own["n_future"]) - 1 if own["head_kind"] == "sequential" else 1


def serving_commands(checkpoint: str | Path, drafter: Path) -> dict[str, str]:
    """How each engine is told of the drafter."""
    folder, drafts = find_checkpoint(checkpoint), drafts_to_make(checkpoint)
    layers = read_json(drafter / "config.json")["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    speculative = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": drafts}
    return {
        "vllm": f"vllm serve {folder} --speculative-config '{json.dumps(speculative)}'",
        "sglang": f"python -m sglang.launch_server --model-path {folder} --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {drafter} --speculative-num-steps {drafts} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {drafts + 1}",
        "tensorrt_llm": f'Eagle3DecodingConfig(max_draft_len={drafts}, speculative_model="{drafter}", '
        f"eagle3_layers_to_capture={{{', '.join(map(str, layers))}}})",
    }
