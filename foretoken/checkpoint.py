"""Checkpoint directories: save atomically, load strictly.

DIR/config.json, model.safetensors, generation_config.json, tokenizer files: the next-token path, an ordinary Llama
DIR/mtp_heads/: heads 2..n          DIR/foretoken.json: provenance          DIR/train_state/: only while training

A directory is written under another name and renamed when complete. Weights are safetensors, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError, ConfigError
from foretoken.formats import hf
from foretoken.model import Model
from foretoken.tokenizer import Tokenizer
from foretoken.tokenizer import load as load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}
STEP_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from, written to foretoken.json."""

    recipe: Mapping[str, Any] | None = None
    data_fingerprint: str | None = None
    step: int | None = None
    metrics: Mapping[str, Any] | None = None


def save_checkpoint(
    directory: str | Path,
    model: Model,
    tokenizer: Tokenizer,
    provenance: Provenance | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Path:
    """Write a checkpoint directory that appears only when it is complete; with `optimizers`, the training state too.

    `directory` may exist when it holds no checkpoint yet (a run's own folder): the files are then moved in one by one,
    config.json last, and a directory without config.json is no checkpoint. Raises CheckpointError when it cannot be
    written; then nothing is left behind.
    """
    target = Path(directory)
    if (target / "config.json").exists():
        raise CheckpointError(f"{target}: holds a checkpoint already; choose another directory")
    name = f".{target.name}.incomplete-{os.getpid()}"
    staging = target / name if target.is_dir() else target.parent / name
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _write(staging, model, tokenizer, provenance or Provenance())
        if optimizers:
            _write_train_state(staging / "train_state", model, optimizers)
        if target.exists():
            for entry in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(entry, target / entry.name)
        else:
            os.rename(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _write(folder: Path, model: Model, tokenizer: Tokenizer, provenance: Provenance) -> None:
    config, dtype = model.config, next(name for name, kind in DTYPES.items() if kind == model.dtype)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    main = {new: t for name, t in state.items() if (new := hf.main_name(name, config))}
    files = {"model.safetensors": _save_tensors(folder / "model.safetensors", main)}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    main_config = hf.main_config(config, dtype, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    _write_json(folder / "config.json", main_config)
    _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    tokenizer.save(folder, model_max_length=config.max_position_embeddings)
    if config.n_future > 1:
        (folder / "mtp_heads").mkdir()
        heads = {new: t for name, t in state.items() if (new := hf.heads_name(name))}
        path = "mtp_heads/model.safetensors"
        files[path] = _save_tensors(folder / path, heads)
        _write_json(folder / "mtp_heads" / "config.json", hf.heads_config(config, main_config))
    _write_json(
        folder / "foretoken.json",
        {
            "foretoken_version": _version(),
            "torch_version": torch.__version__,
            "git_commit": _git_commit(),
            "step": provenance.step,
            "recipe": provenance.recipe,
            "data_fingerprint": provenance.data_fingerprint,
            "metrics": provenance.metrics,
            "sha256": files,
        },
    )


def load_checkpoint(
    directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a checkpoint directory, or of a run's newest one.

    dtype: of the weights in memory, by default as stored. Loading is strict: a missing, extra or wrongly shaped tensor,
    a file that is cut short or is not what foretoken.json recorded raises CheckpointError naming it.
    """
    folder = find_checkpoint(directory)
    model = load_model(folder, dtype, device)
    tokenizer = load_tokenizer(folder)
    own, size = (folder / "foretoken.json").exists(), model.config.vocab_size
    if tokenizer.vocab_size > size or (own and tokenizer.vocab_size != size):
        raise CheckpointError(
            f"{folder}: tokenizer of {tokenizer.vocab_size} tokens beside a model of {size}; they must be of one run"
        )
    return model, tokenizer


def describe(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, without loading its weights: shape, size, tokenizer and where it comes from."""
    folder = find_checkpoint(directory)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    main = sum(p.numel() for name, p in model.named_parameters() if hf.main_name(name, config))
    tokenizer = load_tokenizer(folder)
    own = read_json(folder / "foretoken.json") if (folder / "foretoken.json").exists() else {}
    return {
        "checkpoint": str(folder),
        "architecture": config.architecture,
        "next_token_layers": config.num_hidden_layers,
        "n_future": config.n_future,
        "head_kind": config.head_kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "next_token_parameters": main,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tokenizer": tokenizer.kind,
        "max_position_embeddings": config.max_position_embeddings,
        "step": own.get("step"),
        "foretoken_version": own.get("foretoken_version"),
    }


def recorded_recipe(directory: str | Path) -> dict[str, Any] | None:
    """The recipe that foretoken.json records, None for a checkpoint that another program made."""
    path = find_checkpoint(directory) / "foretoken.json"
    recipe: dict[str, Any] | None = read_json(path).get("recipe") if path.exists() else None
    return recipe


def find_checkpoint(directory: str | Path) -> Path:
    """`directory` itself when it is a checkpoint, else the newest complete one of a run; CheckpointError if none."""
    folder = Path(directory)
    if (folder / "config.json").is_file():
        return folder
    if newest := newest_step(folder):
        return newest
    what = "has no config.json: not a checkpoint, and no run with one" if folder.is_dir() else "no such directory"
    raise CheckpointError(f"{folder}: {what}")


def step_checkpoints(run: Path) -> list[Path]:
    """A run's complete intermediate checkpoints, oldest first."""
    found = [p for p in run.glob(f"{STEP_PREFIX}*") if p.name.removeprefix(STEP_PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(STEP_PREFIX)))


def newest_step(run: Path) -> Path | None:
    """A run's newest complete intermediate checkpoint."""
    return next(reversed(step_checkpoints(run)), None)


def prune(run: Path, keep: int) -> None:
    """Remove a run's intermediate checkpoints but the newest `keep`, and what interrupted writes left behind."""
    for path in step_checkpoints(run)[: -keep or None]:
        removing = run / f".{path.name}.removing"
        os.rename(path, removing)  # so that a kill leaves no half of a checkpoint under its name
    for pattern in (".*.incomplete-*", ".*.removing"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in `folder`, heads included."""
    heads = folder / "mtp_heads"
    if heads.is_dir() and not (heads / "config.json").is_file():
        raise CheckpointError(f"{heads}/config.json: missing, though the directory is there")
    beside = read_json(heads / "config.json") if heads.is_dir() else None
    try:
        return hf.model_config(read_json(folder / "config.json"), beside, f"{folder}/config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def load_model(folder: Path, dtype: str | torch.dtype | None, device: str | torch.device = "cpu") -> Model:
    """The model of the checkpoint in `folder`; see `load_checkpoint`."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    wanted = dict(model.named_parameters())
    recorded = read_json(folder / "foretoken.json").get("sha256", {}) if (folder / "foretoken.json").exists() else {}
    main = {new: name for name in wanted if (new := hf.main_name(name, config))}
    tensors = _read_tensors(folder, main, wanted, recorded, "")
    if config.n_future > 1:
        beside = {new: name for name in wanted if (new := hf.heads_name(name))}
        heads = _read_tensors(folder / "mtp_heads", beside, wanted, recorded, "mtp_heads/")
        if not torch.equal(heads.pop("norm.weight"), tensors["norm.weight"]):
            raise CheckpointError(f"{folder}/mtp_heads: norm.weight is not the model's: heads of another model")
        tensors |= heads
    kind = (DTYPES[dtype] if isinstance(dtype, str) else dtype) or tensors["embed_tokens.weight"].dtype
    tensors = {name: tensor.to(device=device, dtype=kind) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.rotary = type(model.rotary)(config).to(device)  # its table is computed, not stored
    return model.eval()


def _read_tensors(
    folder: Path, names: Mapping[str, str], wanted: Mapping[str, Tensor], recorded: Mapping[str, str], prefix: str
) -> dict[str, Tensor]:
    """Tensors of one safetensors file or of a sharded set, under our names; strict about names, shapes and digests."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if (digest := recorded.get(prefix + file)) and digest != _sha256(path):
            raise CheckpointError(f"{path}: is not the file that foretoken.json recorded (sha256 differs)")
        try:
            with safe_open(path, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - not a mapping
                    if key not in names:
                        if key == "lm_head.weight" or key.endswith("rotary_emb.inv_freq"):
                            continue  # a tied copy, or a table that old exporters stored
                        raise CheckpointError(f"{path}: tensor '{key}' is not one of this model's")
                    tensor, shape = stored.get_tensor(key), tuple(wanted[names[key]].shape)
                    if tuple(tensor.shape) != shape:
                        raise CheckpointError(f"{path}: tensor '{key}' has shape {tuple(tensor.shape)}, must be {shape}")
                    tensors[names[key]] = tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None
    if missing := sorted(key for key, name in names.items() if name not in tensors):
        raise CheckpointError(f"{folder}: tensor '{missing[0]}' is missing" + f" (and {len(missing) - 1} more)" * (len(missing) > 1))
    return tensors


def _write_train_state(folder: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    folder.mkdir()
    tensors = {name: value.detach() for name, value in _optimizer_tensors(model, optimizers)}
    _save_tensors(folder / "optimizer.safetensors", tensors)


def load_train_state(folder: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give the optimisers, made for `model`, the state saved in `folder`/train_state; strict about names."""
    path = folder / "train_state" / "optimizer.safetensors"
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete training state: {error}") from None
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
                        raise CheckpointError(f"{path}: '{key}' has shape {tuple(value.shape)}, must be {tuple(p.shape)}")
                    optimizer.state[p][key.removeprefix(prefix)] = value.to(p.device) if value.dim() else value
    if tensors:
        raise CheckpointError(f"{path}: state '{next(iter(tensors))}' belongs to no parameter of this model")


def _optimizer_tensors(model: Model, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{names[id(p)]}/{key}", value


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file when it is not there or not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _version() -> str:
    from foretoken import __version__

    return __version__


def _git_commit() -> str | None:
    """Commit of the source tree this package runs from, None for an installed one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
