"""Safetensors files: written with their digest, read strictly. A set of shards beside an index reads as one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foretoken.errors import CheckpointError

FILE = "model.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one file, with the permissions of any new file; returns its SHA-256. Raises OSError, SafetensorError."""
    path.touch()
    mode = path.stat().st_mode  # the library writes a private temporary file and renames it
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)
    return sha256(path)


def read_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], digests: Mapping[str, str], ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of FILE in `folder`, or of the shards that its index names: exactly those in `shapes`.

    digests: SHA-256 by file name, of the files that have one on record. ignored: endings of further names that may be
    there and are left out. Raises CheckpointError for anything missing, extra, of another shape or not as recorded.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        tensors |= read_file(path, digests.get(path.name), ignored)
    check_tensors(folder, tensors, shapes)
    return tensors


def check_tensors(where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for a tensor that is missing, extra, of another shape or not of floating point."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise CheckpointError(f"{where}: tensor '{name}' is not one of this model's")
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{where}: tensor '{name}' has shape {tuple(tensor.shape)}, must be {shapes[name]}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: tensor '{name}' is of type {tensor.dtype}, must be floating point")
    if missing := sorted(shapes.keys() - tensors.keys()):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor '{missing[0]}' is missing{more}")


def read_file(path: Path, digest: str | None, ignored: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors of one file whose names do not end in one of `ignored`; CheckpointError if it is not as recorded."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        if digest is not None and digest != sha256(path):
            raise CheckpointError(f"{path}: is not the file that foretoken.json recorded (sha256 differs)")
        with safe_open(path, framework="pt") as stored:
            names = [name for name in stored.keys() if not name.endswith(ignored)]  # noqa: SIM118 - not a mapping
            return {name: stored.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    index = folder / f"{FILE}.index.json"
    if not index.exists():
        return [folder / FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: not an index of safetensors files: it needs a weight_map") from None
