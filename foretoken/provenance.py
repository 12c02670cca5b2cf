"""foretoken.json, which stands in every checkpoint: where it comes from, and digests of its files."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foretoken import __version__
from foretoken.errors import CheckpointError
from foretoken.files import read_json, write_json
from foretoken.tokenizer import Tokenizer


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from, written to foretoken.json."""

    recipe: Mapping[str, Any] | None = None
    data_fingerprint: str | None = None
    step: int | None = None
    metrics: Mapping[str, Any] | None = None
    imported_from: Mapping[str, Any] | None = None


def write_provenance(folder: Path, provenance: Provenance, files: Mapping[str, str], tokenizer: Tokenizer) -> None:
    """Write foretoken.json. files: SHA-256 of the weight files by name."""
    write_json(
        folder / "foretoken.json",
        {
            "foretoken_version": __version__,
            "torch_version": torch.__version__,
            "git_commit": _git_commit(),
            "step": provenance.step,
            "recipe": provenance.recipe,
            "data_fingerprint": provenance.data_fingerprint,
            "metrics": provenance.metrics,
            "imported_from": provenance.imported_from,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "sha256": files,
        },
    )


def recorded_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files by name, as foretoken.json records them; none for another program's checkpoint."""
    path = folder / "foretoken.json"
    digests = read_json(path).get("sha256", {}) if path.exists() else {}
    if not isinstance(digests, dict):
        raise CheckpointError(f"{path}: sha256 must be an object")
    return digests


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
