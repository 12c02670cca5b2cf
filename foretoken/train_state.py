"""The training state beside a checkpoint: the optimisers' tensors, and what was measured since the last record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.errors import CheckpointError
from foretoken.files import read_json, write_json
from foretoken.formats.safetensors import read_file, save_tensors
from foretoken.model import Model
from foretoken.parallel import like

TRAIN_STATE = "train_state"


def write_train_state(folder: Path, tensors: Mapping[str, Tensor], unlogged: Mapping[str, Any]) -> dict[str, str]:
    """Write `folder`/train_state with what `optimizer_tensors` gave; returns the SHA-256 of its file by name."""
    (folder / TRAIN_STATE).mkdir()
    write_json(folder / TRAIN_STATE / "unlogged.json", unlogged)
    name = f"{TRAIN_STATE}/optimizer.safetensors"
    return {name: save_tensors(folder / name, tensors)}


def read_train_state(
    folder: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Give the optimisers, made for `model`, the state saved in `folder`/train_state; strict about names.

    digests: SHA-256 on record by file name. Returns the `unlogged` that was saved with it. Raises CheckpointError.
    """
    name = f"{TRAIN_STATE}/optimizer.safetensors"
    path = folder / name
    tensors = read_file(path, digests.get(name))
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                prefix = names[id(p)] + "/"
                keys = [key for key in tensors if key.startswith(prefix)]
                if not keys:
                    raise CheckpointError(f"{path}: no state for parameter '{names[id(p)]}'")
                for key in keys:
                    value = tensors.pop(key)
                    if value.dim() and value.shape != p.shape:
                        shapes = f"shape {tuple(value.shape)}, must be {tuple(p.shape)}"
                        raise CheckpointError(f"{path}: '{key}' has {shapes}")
                    optimizer.state[p][key.removeprefix(prefix)] = like(value, p) if value.dim() else value
    if tensors:
        raise CheckpointError(f"{path}: state '{next(iter(tensors))}' belongs to no parameter of this model")
    return read_json(folder / TRAIN_STATE / "unlogged.json")


def optimizer_tensors(model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """What the optimisers hold, by parameter and key."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{names[id(p)]}/{key}", value
