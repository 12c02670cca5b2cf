"""Hugging Face's layout: config.json and tensor names of Llama, Mistral, Qwen2 and Qwen3, and of our heads beside it.

The next-token path has the names transformers gives it, so a checkpoint directory needs no conversion. Heads 2..n lie
in `mtp_heads/` in the form that engines draft from. Renaming happens here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretoken.config_model import Architecture, ModelConfig, RopeScaling, validated
from foretoken.errors import CheckpointError

_CLASSES: dict[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def main_name(name: str, config: ModelConfig) -> str | None:
    """Hugging Face's name of our parameter `name`, or None for one of heads 2..n or a tied unembedding."""
    if name == "lm_head.weight":
        return None if config.tie_word_embeddings else name
    if name.startswith("trunk."):
        return "model.layers." + name.removeprefix("trunk.")
    if name.startswith("own_unembeddings."):
        return None
    if name.startswith("heads."):
        depth, _, rest = name.removeprefix("heads.").partition(".")
        own = depth == "0" or config.head_kind == "anticausal"
        return f"model.layers.{config.num_hidden_layers - 1 - int(depth)}.{rest}" if own else None
    return "model." + name


def heads_name(name: str, config: ModelConfig) -> str | None:
    """Name in `mtp_heads/` of our parameter `name`: EAGLE-3's for a sequential head, else heads 2..n count from 0.

    The shared final norm goes along. Unembeddings of heads 2..n's own count from 0, whatever the kind.
    """
    if name == "norm.weight":
        return name
    if name.startswith("own_unembeddings."):
        return f"heads.{name.split('.')[1]}.lm_head.weight"
    if not name.startswith("heads."):
        return None
    depth, _, rest = name.removeprefix("heads.").partition(".")
    if depth == "0" or config.head_kind == "anticausal":
        return None
    return f"midlayer.{rest}" if config.sequential else f"heads.{int(depth) - 1}.{rest}"


def heads_constants(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in `mtp_heads/` that are no parameters of ours, as they must stand there."""
    return eagle3_constants(config, dtype) if config.sequential else {}


def eagle3_constants(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """EAGLE-3's `fc` (D, 3 D), which mixes three layers' outputs: our heads read the last of them, the trunk's."""
    width = config.hidden_size
    return {"fc.weight": torch.cat((torch.zeros(width, 2 * width), torch.eye(width)), 1).to(dtype)}


def main_config(
    config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    """config.json of the next-token path: an ordinary Llama's (or Mistral's, Qwen2's, Qwen3's)."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_theta": config.rope_theta, **config.rope_scaling.model_dump()}
    values: dict[str, Any] = {"architectures": [_CLASSES[config.architecture]], "model_type": config.architecture}
    values |= {key: getattr(config, key) for key in _COPIED}
    values |= {
        "hidden_act": "silu",
        # transformers 5 reads rope_parameters, older versions and other engines the two keys that it replaced
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else config.rope_scaling.model_dump(),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if config.architecture in ("llama", "qwen3"):
        values["attention_bias"] = False
    if config.architecture == "llama":
        values["mlp_bias"] = False
    if config.architecture == "mistral":
        values["sliding_window"] = None
    if config.architecture in ("qwen2", "qwen3"):
        values |= {"use_sliding_window": False, "sliding_window": None}
    return values


def heads_config(config: ModelConfig, main: dict[str, Any]) -> dict[str, Any]:
    """mtp_heads/config.json: what an EAGLE-3 drafter class is set up from; kind and n stand under our own key.

    Of kind `sequential` it is a stock EAGLE-3 drafter's. Of kind `parallel` it is for a class that runs all heads, with
    `hidden_size` (n - 1) times the model's, the width in which such a class carries all heads' states at once. Heads of
    other kinds are for foretoken alone.
    """
    n, layers = config.n_future, config.num_hidden_layers
    own: dict[str, Any] = {"head_kind": config.head_kind, "n_future": n, "hidden_size": config.hidden_size}
    if config.unembedding != "shared":
        own["unembedding"] = config.unembedding
    if config.sequential:
        return eagle3_config(config, main) | {"foretoken": own}
    if config.head_kind != "parallel":  # no engine has a class for it
        shared = {"shared_block": True} if config.shared_block else {}
        return {"architectures": ["ForetokenHeads"], "foretoken": own | shared}
    return main | {
        "architectures": ["MtpHeadsEagle3"],
        "model_type": "llama",
        "num_hidden_layers": n - 1,
        "hidden_size": (n - 1) * config.hidden_size,
        "head_dim": config.head_dim,
        "draft_vocab_size": config.vocab_size,
        "eagle_aux_hidden_state_layer_ids": [layers - 1],
        "foretoken": own,
    }


def aux_outputs(config: ModelConfig) -> list[int]:
    """The three layers, counted from 0, whose outputs an EAGLE-3 drafter is given: the last is the trunk's output."""
    return [config.num_hidden_layers - back for back in (4, 3, 2)]


def eagle3_config(config: ModelConfig, main: dict[str, Any]) -> dict[str, Any]:
    """config.json of a one-layer EAGLE-3 drafter that reads the trunk's output, beside a model with config `main`.

    Layer ids at top level count layers that have run (vLLM; llama.cpp: the layer whose input it is); those under
    `eagle_config` name the layer whose output it is (SGLang, TensorRT-LLM). The last is the trunk's output.
    """
    outputs = aux_outputs(config)
    return main | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "draft_vocab_size": config.vocab_size,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in outputs],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": outputs, "use_aux_hidden_state": True},
    }


def model_config(values: dict[str, Any], heads: dict[str, Any] | None, where: str) -> ModelConfig:
    """Our configuration from config.json and, when there is one, mtp_heads/config.json.

    Raises CheckpointError for an architecture or an option that our layers do not compute.
    """
    named = values.get("architectures")
    architecture = next((a for a, name in _CLASSES.items() if isinstance(named, list) and name in named), None)
    if architecture is None:
        raise CheckpointError(f"{where}: architectures = {named}; supported are {', '.join(_CLASSES.values())}")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if key not in values:
            raise CheckpointError(f"{where}: '{key}' is missing")
        if not isinstance(values[key], int) or values[key] < 1:
            raise CheckpointError(f"{where}: {key} = {values[key]!r}; must be a whole number above 0")
    _refuse_unsupported(values, architecture, where)
    fields: dict[str, Any] = {key: values[key] for key in _COPIED if values.get(key) is not None}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields.setdefault("max_position_embeddings", 2048)
    fields.setdefault("rms_norm_eps", 1e-6)
    theta, scaling = _rope(values, where)
    fields |= {"architecture": architecture, "rope_theta": theta, "rope_scaling": scaling}
    if heads is not None:
        beside = f"{where.removesuffix('config.json')}mtp_heads/config.json"
        own = heads.get("foretoken")
        if not isinstance(own, dict) or "n_future" not in own or "head_kind" not in own:
            raise CheckpointError(f"{beside}: no 'foretoken' key with head_kind and n_future")
        if own.get("hidden_size") != fields["hidden_size"]:
            widths = f"heads of width {own.get('hidden_size')} beside a model of width {fields['hidden_size']}"
            raise CheckpointError(f"{beside}: {widths}")
        keys = ("n_future", "head_kind", "shared_block", "unembedding")
        fields |= {key: own[key] for key in keys if key in own}
    return validated(ModelConfig, fields, where)


def _rope(values: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{where}: rope_parameters = {parameters!r}; must be an object")
    theta = parameters.get("rope_theta") or values.get("rope_theta") or 10_000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{where}: rope type '{kind}'; supported are default and llama3")
    fields = {key: parameters[key] for key in RopeScaling.model_fields if key in parameters}
    return theta, validated(RopeScaling, fields, f"{where}: rope")


def _refuse_unsupported(values: dict[str, Any], architecture: Architecture, where: str) -> None:
    if values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act = '{values['hidden_act']}'; supported is silu")
    if values.get("mlp_bias"):
        raise CheckpointError(f"{where}: mlp_bias = true is not supported")
    if values.get("attention_bias") and architecture in ("llama", "qwen3"):
        raise CheckpointError(f"{where}: attention_bias = true is not supported")
    # Mistral's window is on unless the key holds null (4096 without it), Qwen's only when use_sliding_window says so.
    window = values.get("sliding_window", 4096) if architecture == "mistral" else values.get("use_sliding_window")
    layers = values.get("layer_types") or []
    if not isinstance(layers, list):
        raise CheckpointError(f"{where}: layer_types = {layers!r}; must be a list of each layer's kind of attention")
    if window or any(kind != "full_attention" for kind in layers):
        raise CheckpointError(f"{where}: sliding-window attention is not supported; full attention is")
