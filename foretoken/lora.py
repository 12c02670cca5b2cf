"""LoRA (Hu et al. 2021) on the next-token path, through peft: adapters beside the matrices of the trunk and of head 1.

A matrix then is W + (alpha / rank) B A, of which A and B alone learn; heads 2..n learn whole, all else stays as it is.
What is saved is the sum, under the matrix's own name; A and B by themselves are part of the training state.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foretoken.config import ModelRecipe
from foretoken.errors import ConfigError
from foretoken.model import Model

_ADAPTER, _BASE = ".lora_", ".base_layer."  # in names that peft gives to parameters


def check_lora(recipe: ModelRecipe) -> None:
    """Raises ConfigError where a recipe asks for adapters and peft is not there."""
    if recipe.lora_rank is not None:
        _peft()


def add_adapters(model: Model, recipe: ModelRecipe, seed: int) -> None:
    """Put adapters into the trunk and head 1, whose own weights no longer learn; they change nothing yet.

    A is drawn from `seed`, B is zero.
    """
    assert recipe.lora_rank is not None
    peft = _peft()
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
        target_modules=list(recipe.lora_target_modules),
    )
    with torch.random.fork_rng():  # peft draws from the process's own
        torch.manual_seed(seed)
        for block in (*model.trunk, model.heads[0]):
            peft.inject_adapter_in_model(config, block)  # nothing else in the block learns from here on


def adapters(model: Model) -> dict[str, Tensor]:
    """The adapters' matrices by parameter name; empty for a model without."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if _ADAPTER in name}


def merged(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by the name it has without adapters, and its value, to which they are added."""
    for name, parameter in model.named_parameters():
        if _ADAPTER in name:
            continue
        value = parameter.detach()
        if name.endswith(f"{_BASE}weight"):
            layer: Any = model.get_submodule(name.removesuffix(f"{_BASE}weight"))
            value = value + layer.get_delta_weight("default").detach()
        yield name.replace(_BASE, "."), value


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ConfigError("model.lora_rank needs: pip install 'foretoken[lora]'") from None
