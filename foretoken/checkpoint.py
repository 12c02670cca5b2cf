"""Checkpoint directories: save atomically, load strictly.

DIR/config.json, model.safetensors, generation_config.json, tokenizer files: the next-token path, an ordinary Llama
DIR/mtp_heads/: heads 2..n          DIR/foretoken.json: provenance          DIR/train_state/: only while training

A directory is written under another name and renamed when complete. Weights are safetensors, nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.chat import generation_config
from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError, ConfigError
from foretoken.files import read_json, staged, to_disk, write_json
from foretoken.formats import hf
from foretoken.formats.safetensors import FILE, Stored, read_tensors, save_tensors
from foretoken.lora import merged
from foretoken.model import Model
from foretoken.parallel import ALONE, World, whole
from foretoken.provenance import Provenance, recorded_digests, write_provenance
from foretoken.tokenizer import Tokenizer
from foretoken.tokenizer import load as load_tokenizer
from foretoken.train_state import TRAIN_STATE, training_tensors, write_train_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}
STEP_PREFIX = "checkpoint-"
HEADS = "mtp_heads"


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint directory will hold: tensors, whole, or what gives them when their turn comes."""

    config: ModelConfig
    state: Mapping[str, Tensor | Stored]
    tokenizer: Tokenizer
    provenance: Provenance
    training: Mapping[str, Mapping[str, Tensor | Stored]] | None = None
    unlogged: Mapping[str, Any] | None = None


def save_checkpoint(
    directory: str | Path, model: Model, tokenizer: Tokenizer, provenance: Provenance | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (), unlogged: Mapping[str, Any] | None = None, world: World = ALONE,
) -> Path:  # fmt: skip
    """Write a checkpoint directory that appears only when it is complete; with `optimizers`, the training state too.

    `directory` may exist when it holds no checkpoint yet (a run's own folder): the files are then moved in one by one,
    config.json last, and a directory without config.json is no checkpoint. unlogged: what training has measured since
    its last record, part of the training state. Adapters are added to their matrices. world: all its processes must
    call this; the first one writes, and none holds more than one sharded tensor whole. Raises CheckpointError when it
    cannot be written, or the tokenizer has more tokens than the model; then nothing is left behind.
    """
    _check_fit(directory, tokenizer, model.config)
    parts, torn, error = list[Tensor](), False, None

    def lent(tensor: Tensor) -> Stored:
        parts.append(tensor)
        return Stored(tensor.dtype, tuple(tensor.shape), partial(read, len(parts) - 1))

    def read(place: int) -> Tensor:
        nonlocal torn
        torn = True  # the others are in an exchange: what fails here ends this process, and theirs with it
        full = whole(parts[world.told(place)])
        torn = False
        return full

    contents = _contents(model, tokenizer, provenance, optimizers, unlogged, lent if world.size > 1 else None)
    try:
        if world.first:
            write_checkpoint(Path(directory), contents)
    except Exception as caught:  # told to the others, who would wait for ever
        if torn:
            raise
        error = caught
    while (place := world.told(-1)) >= 0:  # a part of what the first process asks for
        whole(parts[place])
    world.all_raise(error)
    return Path(directory)


def gather_checkpoint(
    model: Model, tokenizer: Tokenizer, provenance: Provenance | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (), unlogged: Mapping[str, Any] | None = None, world: World = ALONE,
) -> Contents:  # fmt: skip
    """What `save_checkpoint` writes, copied tensor by tensor into the first process's main memory, where it stays what
    it is while training goes on; all processes must call this, and the others' tensors are empty."""

    def copied(tensor: Tensor) -> Tensor:
        full = whole(tensor)
        return full.to("cpu", copy=True) if world.first else torch.empty(0)

    return _contents(model, tokenizer, provenance, optimizers, unlogged, copied)


def _contents(
    model: Model, tokenizer: Tokenizer, provenance: Provenance | None, optimizers: Sequence[torch.optim.Optimizer],
    unlogged: Mapping[str, Any] | None, taken: Callable[[Tensor], Tensor | Stored] | None,
) -> Contents:  # fmt: skip
    taken = taken or (lambda tensor: tensor)
    state = {name: taken(tensor.detach()) for name, tensor in merged(model)}
    files = training_tensors(model, optimizers) if optimizers else {}
    training = {file: {name: taken(t) for name, t in tensors.items()} for file, tensors in files.items()} or None
    return Contents(model.config, state, tokenizer, provenance or Provenance(), training, unlogged)


def write_checkpoint(target: Path, contents: Contents) -> None:
    """Write contents as `save_checkpoint` says; in the first process."""
    if (target / "config.json").exists():
        raise CheckpointError(f"{target}: holds a checkpoint already; choose another directory")
    with staged(target, target if target.is_dir() else target.parent) as staging:
        write_files(staging, contents)
        if target.exists():
            for folder in (HEADS, TRAIN_STATE):  # of a save that was killed here; a folder only replaces an empty one
                shutil.rmtree(target / folder, ignore_errors=True)
            for entry in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(entry, target / entry.name)
        else:
            os.rename(staging, target)


def write_files(folder: Path, contents: Contents) -> None:
    """Write a checkpoint's files into `folder`, weights that are `Stored` one by one."""
    config, state, tokenizer = contents.config, contents.state, contents.tokenizer
    weights = state["embed_tokens.weight"].dtype
    dtype = next(name for name, kind in DTYPES.items() if kind == weights)
    main = {new: t for name, t in state.items() if (new := hf.main_name(name, config))}
    files = {FILE: save_tensors(folder / FILE, main)}
    main_config = hf.main_config(config, dtype, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    write_json(folder / "config.json", main_config)
    write_json(folder / "generation_config.json", generation_config(tokenizer))
    tokenizer.save(folder, model_max_length=config.max_position_embeddings)
    if config.n_future > 1:
        (folder / HEADS).mkdir()
        heads = {new: t for name, t in state.items() if (new := hf.heads_name(name, config))}
        heads.update(hf.heads_constants(config, weights))
        files[f"{HEADS}/{FILE}"] = save_tensors(folder / HEADS / FILE, heads)
        write_json(folder / HEADS / "config.json", hf.heads_config(config, main_config))
    if contents.training is not None:
        files |= write_train_state(folder, contents.training, contents.unlogged or {})
    write_provenance(folder, contents.provenance, files, tokenizer)
    to_disk(folder)


def load_checkpoint(
    directory: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Model, Tokenizer]:
    """Model and tokenizer of a checkpoint directory, or of a run's newest one.

    dtype: of the weights in memory, such as "bfloat16", by default as stored. device: such as "cuda". Loading is
    strict: a missing, extra or wrongly shaped tensor, a file that is cut short or is not what foretoken.json recorded
    raises CheckpointError naming it.
    """
    folder = find_checkpoint(directory)
    model = load_model(folder, dtype, device)
    tokenizer = load_tokenizer(folder)
    _check_fit(folder, tokenizer, model.config)
    path = folder / "foretoken.json"
    recorded = read_json(path).get("tokenizer_fingerprint") if path.exists() else None
    if recorded not in (None, tokenizer.fingerprint):
        raise CheckpointError(f"{folder}/tokenizer.json: is not the tokenizer that this model was saved with")
    return model, tokenizer


def _check_fit(where: str | Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    if (size := tokenizer.vocab_size) > config.vocab_size:
        raise CheckpointError(f"{where}: tokenizer of {size} tokens beside a model of {config.vocab_size}")


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
        "unembedding": config.unembedding,
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
    if recipe is not None and not (isinstance(recipe, dict) and isinstance(recipe.get("data"), dict)):
        raise CheckpointError(f"{path}: 'recipe' must be an object with a section 'data'")
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
    heads = folder / HEADS
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
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    main = {new: name for name in shapes if (new := hf.main_name(name, config))}
    # A copy of tied embeddings, or a table that old exporters stored, may lie there too.
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    tensors = _read_renamed(folder, "", main, shapes, ("rotary_emb.inv_freq",), tied)
    if config.n_future > 1:
        tensors |= _read_heads(folder, config, shapes, tensors["norm.weight"])
    kind = (DTYPES[dtype] if isinstance(dtype, str) else dtype) or tensors["embed_tokens.weight"].dtype
    tensors = {name: tensor.to(device=device, dtype=kind) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.rotary = type(model.rotary)(config).to(device)  # its table is computed, not stored
    return model.eval()


def _read_heads(
    folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], norm: Tensor
) -> dict[str, Tensor]:
    """The tensors in `folder`/mtp_heads under our names. `norm`: the model's final norm, which must lie there too."""
    names = {new: name for name in shapes if (new := hf.heads_name(name, config))}
    constants = hf.heads_constants(config, norm.dtype)
    constant_shapes = {name: tuple(tensor.shape) for name, tensor in constants.items()}
    heads = _read_renamed(
        folder, f"{HEADS}/", names | {name: name for name in constants}, {**shapes, **constant_shapes}
    )
    if not torch.equal(heads.pop("norm.weight"), norm):
        raise CheckpointError(f"{folder}/{HEADS}: norm.weight is not the model's: heads of another model")
    for name, wanted in constants.items():
        if not torch.equal(heads.pop(name), wanted):
            raise CheckpointError(
                f"{folder}/{HEADS}: {name} reads more than the trunk's output; such heads do not run here"
            )
    return heads


def _read_renamed(
    folder: Path, prefix: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
    ignored: tuple[str, ...] = (), tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors in `folder`/`prefix` under our names, which `names` maps theirs to."""
    recorded = recorded_digests(folder).items()
    digests = {name.removeprefix(prefix): digest for name, digest in recorded if name.startswith(prefix)}
    stored = read_tensors(folder / prefix, {new: shapes[name] for new, name in names.items()}, digests, ignored, tied)
    return {names[new]: tensor for new, tensor in stored.items()}
