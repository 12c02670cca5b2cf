"""Sources to batches, in four steps.

1. Sources are read into documents, in an order that depends on names alone (sources.documents).
2. Each document goes to the train or the validation split (sources.split_documents).
3. Both splits are tokenised once into memory-mapped shards, with every document's bounds beside them, in a cache
   folder that appears by one rename when it is complete (`prepare`).
4. A batch is a pure function of (seed, step, rank, world_size) on those shards (windows.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.chat import chat_template
from foretoken.config import DataConfig
from foretoken.errors import DataError
from foretoken.files import digests
from foretoken.framing import framed
from foretoken.sources import Document, Split, documents, require_records, source_files, split_documents
from foretoken.tokenizer import Tokenizer

__all__ = ["Document", "Split", "Tokens", "documents", "prepare", "split_documents"]

SHARD_TOKENS = 64 * 2**20
_FORMAT = 4
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 256, 2**22
_ROW = 5  # numbers per document, see Tokens.rows


@dataclass(frozen=True, eq=False)
class Tokens:
    """The documents of a split as one long row of tokens, memory-mapped, in the order of the sources.

    A document is bos (where the tokenizer's post-processor adds one), its prompt, its text, eos (where there is one); a
    conversation is as the chat template has it. `fingerprint` is the SHA-256 of tokens and bounds, on every machine.
    """

    total: int
    documents: int
    fingerprint: str
    domains: tuple[str, ...]
    # One row per document: first token, end, leading tokens that are no targets, UTF-8 bytes of the text, domain or -1.
    rows: NDArray[np.int64]
    shards: tuple[NDArray[Any], ...]
    shard_tokens: int
    # Starts and ends, in order, of further tokens that are no targets: what others say between an assistant's turns.
    gaps: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    bos: bool = False  # whether each document begins with one of framing's

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start..stop-1, int64."""
        return self.gather(np.arange(start, stop))

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at `positions`, in their shape, int64."""
        shard, offset = np.divmod(positions, self.shard_tokens)
        tokens = np.empty(positions.shape, np.int64)
        for index in np.unique(shard):
            here = shard == index
            tokens[here] = self.shards[index][offset[here]]
        return tokens

    def document(self, i: int) -> NDArray[np.int64]:
        """Tokens of document i, int64."""
        return self.read(int(self.rows[i, 0]), int(self.rows[i, 1]))

    def label_mask(self, i: int) -> NDArray[np.bool_]:
        """For each token of document i, whether it may be a target: false for a prompt and the bos before it."""
        start, stop, masked = self.rows[i, :3]
        places = np.arange(start, stop)
        return (places >= start + masked) & ~self.in_gap(places)  # type: ignore[no-any-return]

    def in_gap(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the tokens at `positions` lie in one of the gaps."""
        return np.searchsorted(self.gaps, positions, side="right") % 2 == 1  # type: ignore[no-any-return]

    def text_bytes(self, i: int) -> int:
        """UTF-8 bytes of document i's text, without its prompt and what others say: what bits per byte divide by."""
        return int(self.rows[i, 3])

    def tokens_per_byte(self, across_documents: bool = False) -> float:
        """Tokens that are targets / UTF-8 bytes of text: turns a mean loss per token into one per byte.

        bos is a target only of the document before it, where targets lie across documents. A text's first token counts
        without one, too: the mean stands for it.
        """
        first, stop, masked, text_bytes = self.rows[:, :4].sum(0)
        bos = np.count_nonzero(self.rows[:, 2] == 0) if self.bos and not across_documents else 0
        return float((stop - first - masked - bos - np.diff(self.gaps)[::2].sum()) / max(1, text_bytes))

    def domain(self, i: int) -> str | None:
        """The domain of document i, if its record named one."""
        return self.domains[self.rows[i, 4]] if self.rows[i, 4] >= 0 else None


def prepare(
    config: DataConfig, tokenizer: Tokenizer, split: Split, progress: Callable[[int], None] | None = None,
    verify: bool = True,
) -> Tokens:  # fmt: skip
    """The tokens of a split, from the cache or, the first time, from the sources.

    Both splits are written in one pass that holds one chunk of documents in memory; `progress` hears how many tokens
    there are so far. A changed source, option or tokenizer makes a new cache folder; `hf:` data is taken as unchanged.
    A folder that is not as its meta.json says is made anew; `verify` reads all files for their digests, and finds every
    bit that differs. Raises DataError for an empty split, and ConfigError where fields of prompts, responses or
    conversations are named and all the sources hold is text.
    """
    told = {name: getattr(config, name) for name in ("messages_field", "prompt_field", "response_field")}
    require_records(config, {f"data.{name}": value for name, value in told.items() if value is not None})
    if config.messages_field is not None:
        chat_template(tokenizer)  # fails at once
    root = _cache_root(config)
    folder = root / _cache_key(config, tokenizer)
    tokens = _open(folder, split, verify)
    if tokens is None:
        building = root / f".{folder.name}-{uuid.uuid4().hex}"
        try:
            building.mkdir(parents=True)
            _write(config, tokenizer, building, progress)
            tokens = _install(building, folder, split)
        except OSError as error:
            hint = "set data.cache_dir to a folder with room, that you may write to"
            raise DataError(f"token cache {root}: {error.strerror or error}; {hint}") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
    if tokens.documents == 0:
        where = ", ".join(config.source if split == "train" else config.validation or config.source)
        raise DataError(f"no document for the {split} split in {where}: it is empty, or no record says so")
    return replace(tokens, bos=tokenizer.adds_bos and config.messages_field is None)


def _cache_root(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretoken"


def _cache_key(config: DataConfig, tokenizer: Tokenizer) -> str:
    chat = tokenizer.chat_template if config.messages_field else None
    values = [_FORMAT, SHARD_TOKENS, tokenizer.fingerprint, chat, config.model_dump_json(exclude={"cache_dir"})]
    digest = hashlib.sha256(json.dumps(values).encode())
    for source in config.source + config.validation:
        for path in [] if source.startswith("hf:") else source_files(source):
            stat = path.stat()
            digest.update(json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()[:32]


def _install(building: Path, folder: Path, split: Split) -> Tokens:
    """Rename a finished folder into place, unless another process was first, and open it."""
    if folder.exists() and _open(folder, split) is None:
        damaged = folder.rename(folder.with_name(f"{building.name}-damaged"))
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    tokens = _open(folder, split)
    if tokens is None:
        raise DataError(f"token cache {folder} changed while it was written; run again")
    return tokens


def _open(folder: Path, split: Split, verify: bool = True) -> Tokens | None:
    """The tokens in a cache folder; None where it is missing or a file is not as meta.json says."""
    try:
        values = json.loads((folder / "meta.json").read_text(encoding="utf-8"))[split]
        total, count, per_shard = values["total"], values["documents"], values["shard_tokens"]
        lengths = [min(per_shard, total - start) for start in range(0, total, per_shard)]
        shards = [_map(_shard(folder, split, i), values["dtype"], n) for i, n in enumerate(lengths)]
        rows = _map(folder / f"{split}-documents.bin", "<i8", count * _ROW).reshape(count, _ROW)
        gaps = _map(folder / f"{split}-gaps.bin", "<i8", values["gaps"])
        if verify and digests(folder.glob(f"{split}-*.bin")) != values["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Tokens(total, count, values["fingerprint"], tuple(values["domains"]), rows, tuple(shards), per_shard, gaps)


def _map(path: Path, dtype: str, count: int) -> NDArray[Any]:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is not {count} x {dtype}")
    return np.asarray(np.memmap(path, dtype, "r")) if count else np.empty(0, dtype)


def _shard(folder: Path, split: Split, index: int) -> Path:
    return folder / f"{split}-tokens-{index:05d}.bin"


@dataclass
class _Written:
    """What a split's files hold so far."""

    dtype: str
    total: int = 0
    documents: int = 0
    gaps: int = 0
    domains: dict[str | None, int] = field(default_factory=lambda: {None: -1})
    digest: Any = field(default_factory=hashlib.sha256)


def _write(config: DataConfig, tokenizer: Tokenizer, folder: Path, progress: Callable[[int], None] | None) -> None:
    dtype = "<u1" if tokenizer.vocab_size <= 2**8 else "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    splits: dict[Split, _Written] = {"train": _Written(dtype), "validation": _Written(dtype)}
    for name in splits:
        (folder / f"{name}-documents.bin").touch()
        (folder / f"{name}-gaps.bin").touch()
    for chunk in _chunks(split_documents(config)):
        for split, written in splits.items():
            _append(folder, split, written, tokenizer, [document for document, its in chunk if its == split])
        if progress is not None:
            progress(sum(written.total for written in splits.values()))
    meta = {
        split: {
            "total": written.total, "documents": written.documents, "gaps": written.gaps,
            "domains": list(written.domains)[1:], "fingerprint": written.digest.hexdigest(), "dtype": dtype,
            "shard_tokens": SHARD_TOKENS, "sha256": digests(folder.glob(f"{split}-*.bin")),
        }
        for split, written in splits.items()
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _chunks(pairs: Iterable[tuple[Document, Split]]) -> Iterator[list[tuple[Document, Split]]]:
    chunk: list[tuple[Document, Split]] = []
    characters = 0
    for document, split in pairs:
        chunk.append((document, split))
        characters += len(document.prompt) + len(document.text)
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _append(folder: Path, split: Split, written: _Written, tokenizer: Tokenizer, chunk: list[Document]) -> None:
    """Add documents to a split's files: their tokens, a row of Tokens.rows each, and the gaps in what is learned."""
    if not chunk:
        return
    pieces, rows, gaps, end = [], list[int](), list[int](), written.total
    for document, its in zip(chunk, framed(tokenizer, chunk, written.dtype), strict=True):
        pieces.append(its.ids)
        start, end = end, end + len(its.ids)
        domain = written.domains.setdefault(document.domain, len(written.domains) - 1)
        rows += [start, end, its.masked, its.text_bytes, domain]
        gaps += [start + bound for bound in its.gaps]
    tokens = np.concatenate(pieces)
    written.documents += len(chunk)
    written.gaps += len(gaps)
    written.digest.update(tokens)
    for name, part in (("documents", np.array(rows, "<i8")), ("gaps", np.array(gaps, "<i8"))):
        written.digest.update(part)
        with (folder / f"{split}-{name}.bin").open("ab") as file:
            file.write(part.tobytes())
    while len(tokens):
        index, used = divmod(written.total, SHARD_TOKENS)
        part, tokens = np.split(tokens, [SHARD_TOKENS - used])
        with _shard(folder, split, index).open("ab") as file:
            file.write(part.tobytes())
        written.total += len(part)
