"""JSON objects in files, and directories that appear when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foretoken.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file when it is not there or not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by name, several files at a time."""

    def of(path: Path) -> tuple[str, str]:
        with path.open("rb") as file:
            return path.name, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(of, paths))


def to_disk(folder: Path) -> None:
    """Return when all in `folder` would outlast a loss of power. Raises OSError."""
    if os.name != "posix":
        return
    for path in (*folder.rglob("*"), folder):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@contextmanager
def staged(target: Path, above: Path) -> Iterator[Path]:
    """A folder in `above` to write what becomes `target`; gone when the block ends, and OSErrors name `target`."""
    staging = above / f".{target.name}.incomplete-{os.getpid()}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory to write into, which becomes `path` by one rename when the block ends without an error.

    Raises CheckpointError where `path` exists or cannot be written; then nothing is left behind.
    """
    target = Path(path)
    if target.exists():
        raise CheckpointError(f"{target}: exists already; choose another directory")
    with staged(target, target.parent) as staging:
        yield staging
        os.rename(staging, target)
