"""What imports from other formats share: names and shapes checked, heads looked at, weights written one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.checkpoint import Contents, write_files
from foretoken.config import ModelConfig
from foretoken.errors import CheckpointError
from foretoken.files import new_directory
from foretoken.formats.safetensors import Stored
from foretoken.model import Model
from foretoken.provenance import Provenance
from foretoken.tokenizer import Tokenizer

Progress = Callable[[str], None]


def import_tensors(
    out: str | Path, config: ModelConfig, state: Mapping[str, Stored], tokenizer: Tokenizer,
    origin: Mapping[str, Any], progress: Progress,
) -> Path:  # fmt: skip
    """Write the new checkpoint directory `out` from tensors by our names, a tensor in memory at a time.

    origin: where they come from, for foretoken.json; `origin["path"]` is named in errors. Raises CheckpointError where
    `out` exists or cannot be written, and for a head that `check_heads` refuses; then nothing is left behind.
    """
    with new_directory(out) as staging:
        check_heads(state, config, str(origin["path"]), progress)
        shown = _shown(state, progress)
        write_files(staging, Contents(config, shown, tokenizer, Provenance(imported_from=origin)))
    return Path(out)


def by_our_names(
    stored: Mapping[str, Stored], names: Callable[[str], str], config: ModelConfig, where: str, ignored: tuple[str, ...]
) -> dict[str, Stored]:
    """Tensors under our names. names: theirs for one of ours. ignored: endings of further names that may be there.

    Raises CheckpointError, naming `where`, for a tensor that is missing, too many, of another shape or no number.
    """
    with torch.device("meta"):
        parameters = dict(Model(config).named_parameters())
    theirs = {names(name): name for name in parameters}
    for name in stored:
        if name not in theirs and not name.endswith(ignored):
            raise CheckpointError(f"{where}: tensor '{name}' is not one of a model of this layout and size")
    missing = [name for name in theirs if name not in stored]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: tensor '{missing[0]}' is missing{more}")
    for name, ours in theirs.items():
        tensor, shape = stored[name], tuple(parameters[ours].shape)
        if tensor.shape != shape:
            raise CheckpointError(f"{where}: tensor '{name}' has shape {tensor.shape}, must be {shape}")
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{where}: tensor '{name}' is of type {tensor.dtype}, must be floating point")
    return {ours: stored[name] for name, ours in theirs.items()}


@torch.no_grad()
def check_heads(state: Mapping[str, Stored], config: ModelConfig, where: str, progress: Progress) -> None:
    """Raises CheckpointError for a matrix of heads 2..n that training has not touched.

    Such heads begin as copies of the last block or of each other, so a trained one equals none of them; nor does it
    hold one value everywhere.
    """
    for depth in range(1, config.n_future):
        progress(f"Comparing head {depth + 1} with those before")
        for name, stored in state.items():
            prefix = f"heads.{depth}."
            if not name.startswith(prefix) or len(stored.shape) != 2:
                continue
            tensor, rest = stored.read(), name.removeprefix(prefix)
            if (tensor == tensor[0, 0]).all():
                raise CheckpointError(f"{where}: {rest} of head {depth + 1} is {tensor[0, 0].item()} everywhere")
            for other in range(depth):
                if torch.equal(tensor, state[f"heads.{other}.{rest}"].read()):
                    raise CheckpointError(
                        f"{where}: {rest} of head {depth + 1} is that of head {other + 1}: a head that was not trained"
                    )


def _shown(state: Mapping[str, Stored], progress: Progress) -> dict[str, Stored]:
    """The same tensors, which show how far writing is when they are read."""
    total, done = sum(stored.nbytes for stored in state.values()), 0

    def shown(stored: Stored) -> Stored:
        def read() -> Tensor:
            nonlocal done
            progress(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB written")
            done += stored.nbytes
            return stored.read()

        return replace(stored, read=read)

    return {name: shown(stored) for name, stored in state.items()}
