"""Safetensors files: written with their digest, read strictly. Shards beside an index read as one file.

Files are written tensor by tensor, so that none but the one being written need be in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foretoken.errors import CheckpointError

FILE = "model.safetensors"
# In the order of the library, which writes wide types first so that each tensor lies at a multiple of its width.
_TYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file or spread over processes: its type and shape, and `read`, which gives it when it is needed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.dtype.itemsize * math.prod(self.shape)


def save_tensors(path: Path, tensors: Mapping[str, Tensor | Stored]) -> str:
    """Write one file, byte for byte as the library writes it; returns its SHA-256. Raises OSError.

    Each tensor that is `Stored` is read when its turn comes, and let go of.
    """
    kinds = list(_TYPES)
    names = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(part: bytes | memoryview) -> None:
            digest.update(part)
            file.write(part)

        write(len(described).to_bytes(8, "little") + described)
        for name in names:
            write(_data(tensors[name]))
    return digest.hexdigest()


def _data(tensor: Tensor | Stored) -> memoryview:
    """A tensor's bytes, in order."""
    whole = tensor.read() if isinstance(tensor, Stored) else tensor
    assert (whole.dtype, tuple(whole.shape)) == (tensor.dtype, tuple(tensor.shape))
    return whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], digests: Mapping[str, str], ignored: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of FILE in `folder`, else of the shards that its index names: exactly those in `shapes`.

    digests: SHA-256 by file name, of the files that have one on record. ignored: endings of further names that may be
    there and are left out. tied: further names that may be there, too, as copies of others. Raises CheckpointError for
    anything missing, extra, of another shape or not as recorded, and for a copy that differs.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        tensors |= read_file(path, digests.get(path.name), ignored)
    copies = {name: tensors.pop(name) for name in tied or {} if name in tensors}
    check_tensors(folder, tensors, shapes)
    for name, copy in copies.items():
        check_tied(folder, name, copy, tensors[(tied or {})[name]])
    return tensors


def check_tied(where: Path, name: str, copy: Tensor, embedding: Tensor) -> None:
    """Raises CheckpointError where a tied unembedding is no copy of the embedding: one of the two would be lost."""
    wide = torch.promote_types(copy.dtype, embedding.dtype)
    if not torch.equal(copy.to(wide), embedding.to(wide)):
        raise CheckpointError(
            f"{where}: tensor '{name}' is not the embedding, though config.json ties them; "
            "set tie_word_embeddings = false there, or take the tensor out"
        )


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
    with _opened(path, digest) as stored:
        names = [name for name in stored.keys() if not name.endswith(ignored)]  # noqa: SIM118 - not a mapping
        return {name: stored.get_tensor(name) for name in names}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of FILE in `folder`, else of the shards that its index names, none of them read yet.

    Raises CheckpointError for a file that is missing or incomplete, and for types that are not PyTorch's own.
    """
    return {name: tensor for path in _files(folder) for name, tensor in stored_file(path).items()}


def stored_file(path: Path, digest: str | None = None) -> dict[str, Stored]:
    """All tensors of one file, none of them read yet; CheckpointError as for `stored_tensors` and `read_file`."""
    types = {name: dtype for dtype, name in _TYPES.items()}
    found: dict[str, Stored] = {}
    with _opened(path, digest) as stored:
        for name in stored.keys():  # noqa: SIM118 - not a mapping
            part = stored.get_slice(name)
            if part.get_dtype() not in types:
                raise CheckpointError(f"{path}: tensor '{name}' is of type {part.get_dtype()}")
            read = functools.partial(_read_one, path, name)
            found[name] = Stored(types[part.get_dtype()], tuple(part.get_shape()), read)
    return found


def _read_one(path: Path, name: str) -> Tensor:
    with _opened(path) as stored:  # anew each time: what has been read is then let go of
        tensor: Tensor = stored.get_tensor(name)
        return tensor


@contextmanager
def _opened(path: Path, digest: str | None = None) -> Iterator[Any]:
    """A file of the library's; CheckpointError when it is missing, incomplete, or `digest` is not its SHA-256."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        if digest is not None and digest != sha256(path):
            raise CheckpointError(f"{path}: is not the file that foretoken.json recorded (sha256 differs)")
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    index = folder / f"{FILE}.index.json"
    if (folder / FILE).exists() or not index.exists():  # FILE goes first, as in transformers
        return [folder / FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: not an index of safetensors files: it needs a weight_map") from None
