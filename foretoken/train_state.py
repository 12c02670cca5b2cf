"""The training state beside a checkpoint: the optimisers' tensors, adapters if there are some, and what was measured
since the last record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.errors import CheckpointError
from foretoken.files import read_json, write_json
from foretoken.formats.safetensors import Stored, check_tensors, read_file, save_tensors, stored_file
from foretoken.lora import adapters
from foretoken.model import Model
from foretoken.parallel import like
from foretoken.provenance import recorded_digests

TRAIN_STATE = "train_state"


def training_tensors(model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """The tensors of the training state by file: what optimisers hold, sharded where it is, and adapters."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = {
        f"{names[id(p)]}/{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    beside = adapters(model)
    return {"optimizer": held, "adapters": beside} if beside else {"optimizer": held}


def write_train_state(
    folder: Path, files: Mapping[str, Mapping[str, Tensor | Stored]], unlogged: Mapping[str, Any]
) -> dict[str, str]:
    """Write `folder`/train_state with what `training_tensors` gave; returns the SHA-256 of its files by name."""
    (folder / TRAIN_STATE).mkdir()
    write_json(folder / TRAIN_STATE / "unlogged.json", unlogged)
    paths = {f"{TRAIN_STATE}/{name}.safetensors": tensors for name, tensors in files.items()}
    return {path: save_tensors(folder / path, tensors) for path, tensors in paths.items()}


@torch.no_grad()
def load_adapters(folder: Path, model: Model) -> None:
    """Give the adapters of `model` the values in `folder`/train_state; strict, with the SHA-256 on record."""
    name, own = f"{TRAIN_STATE}/adapters.safetensors", adapters(model)
    tensors = read_file(folder / name, recorded_digests(folder).get(name))
    check_tensors(folder / name, tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_train_state(folder: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Give the optimisers, made for `model`, the state saved in `folder`/train_state; strict about names.

    It must have the SHA-256 on record, if any. Returns the `unlogged` that was saved with it. Raises CheckpointError.
    """
    name = f"{TRAIN_STATE}/optimizer.safetensors"
    path = folder / name
    tensors = stored_file(path, recorded_digests(folder).get(name))
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                prefix = names[id(p)] + "/"
                keys = [key for key in tensors if key.startswith(prefix)]
                if not keys:
                    raise CheckpointError(f"{path}: no state for parameter '{names[id(p)]}'")
                for key in keys:
                    stored = tensors.pop(key)
                    if stored.shape and stored.shape != p.shape:
                        raise CheckpointError(f"{path}: '{key}' has shape {stored.shape}, must be {tuple(p.shape)}")
                    value = stored.read().clone()  # and not the file's memory, of which each process would hold all
                    optimizer.state[p][key.removeprefix(prefix)] = like(value, p) if value.dim() else value
    if tensors:
        raise CheckpointError(f"{path}: state '{next(iter(tensors))}' belongs to no parameter of this model")
    return read_json(folder / TRAIN_STATE / "unlogged.json")
