"""Sources to batches, in four steps.

1. Sources are read into documents, in an order that depends on names alone (sources.documents).
2. Each document goes to the train or the validation split (sources.split_documents).
3. Both splits are tokenised once into memory-mapped shards, with every document's bounds beside them, in a cache
   folder that appears by one rename when it is complete (`prepare`).
4. A batch is a pure function of (seed, step, rank, world_size) on those shards (`Windows.batch`). There is no loader
   state: to resume at a step is to ask for its batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foretoken.config import DataConfig
from foretoken.errors import ConfigError, DataError
from foretoken.files import digests
from foretoken.sources import Document, Split, documents, source_files, split_documents
from foretoken.tokenizer import Tokenizer, utf8

__all__ = ["Batch", "Document", "Split", "Tokens", "Windows", "documents", "prepare", "split_documents"]

SHARD_TOKENS = 64 * 2**20
_FORMAT = 2
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 256, 2**22
_ROW = 5  # numbers per document, see Tokens.rows


@dataclass(frozen=True, eq=False)
class Tokens:
    """The documents of a split as one long row of tokens, memory-mapped, in the order of the sources.

    A document is bos (where the tokenizer's post-processor adds one), its prompt, its text, eos (where there is one).
    `fingerprint` is the SHA-256 of the tokens and bounds, whatever machine they were prepared on.
    """

    total: int
    documents: int
    fingerprint: str
    domains: tuple[str, ...]
    # One row per document: first token, end, leading tokens that are no targets, UTF-8 bytes of the text, domain or -1.
    rows: NDArray[np.int64]
    shards: tuple[NDArray[Any], ...]
    shard_tokens: int

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
        mask: NDArray[np.bool_] = np.arange(stop - start) >= masked
        return mask

    def text_bytes(self, i: int) -> int:
        """UTF-8 bytes of document i's text, its prompt left out: what bits per byte divide by."""
        return int(self.rows[i, 3])

    @property
    def tokens_per_byte(self) -> float:
        """Tokens that are targets / UTF-8 bytes of text: turns a mean loss per token into one per byte."""
        bounds = self.rows[:, 1] - self.rows[:, 0] - self.rows[:, 2]
        return float(bounds.sum() / max(1, self.rows[:, 3].sum()))

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
    bit that differs. Raises DataError for an empty split.
    """
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
    return tokens


def _cache_root(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretoken"


def _cache_key(config: DataConfig, tokenizer: Tokenizer) -> str:
    values = [_FORMAT, SHARD_TOKENS, tokenizer.fingerprint, config.model_dump_json(exclude={"cache_dir"})]
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
        if verify and digests(folder.glob(f"{split}-*.bin")) != values["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Tokens(total, count, values["fingerprint"], tuple(values["domains"]), rows, tuple(shards), per_shard)


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
    domains: dict[str | None, int] = field(default_factory=lambda: {None: -1})
    digest: Any = field(default_factory=hashlib.sha256)


def _write(config: DataConfig, tokenizer: Tokenizer, folder: Path, progress: Callable[[int], None] | None) -> None:
    dtype = "<u1" if tokenizer.vocab_size <= 2**8 else "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    splits: dict[Split, _Written] = {"train": _Written(dtype), "validation": _Written(dtype)}
    for name in splits:
        (folder / f"{name}-documents.bin").touch()
    for chunk in _chunks(split_documents(config)):
        for split, written in splits.items():
            _append(folder, split, written, tokenizer, [document for document, its in chunk if its == split])
        if progress is not None:
            progress(sum(written.total for written in splits.values()))
    meta = {
        split: {
            "total": written.total,
            "documents": written.documents,
            "domains": list(written.domains)[1:],
            "fingerprint": written.digest.hexdigest(),
            "dtype": dtype,
            "shard_tokens": SHARD_TOKENS,
            "sha256": digests(folder.glob(f"{split}-*.bin")),
        }
        for split, written in splits.items()
    }
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
    """Add documents to a split's files: each bos + prompt + text + eos, and a row of Tokens.rows."""
    if not chunk:
        return
    bos = np.array([tokenizer.bos_id] if tokenizer.adds_bos else [], written.dtype)
    eos = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], written.dtype)
    texts = _ids(tokenizer, [document.text for document in chunk], written.dtype)
    prompts = _ids(tokenizer, [document.prompt for document in chunk], written.dtype)
    pieces, rows, end = [], [], written.total
    for document, prompt, text in zip(chunk, prompts, texts, strict=True):
        pieces += [bos, prompt, text, eos]
        start, end = end, end + len(bos) + len(prompt) + len(text) + len(eos)
        masked = len(bos) + len(prompt) if document.prompt else 0
        domain = written.domains.setdefault(document.domain, len(written.domains) - 1)
        rows += [start, end, masked, len(utf8(document.text)), domain]
    tokens, table = np.concatenate(pieces), np.array(rows, "<i8")
    written.documents += len(chunk)
    written.digest.update(tokens)
    written.digest.update(table)
    with (folder / f"{split}-documents.bin").open("ab") as file:
        file.write(table.tobytes())
    while len(tokens):
        index, used = divmod(written.total, SHARD_TOKENS)
        part, tokens = np.split(tokens, [SHARD_TOKENS - used])
        with _shard(folder, split, index).open("ab") as file:
            file.write(part.tobytes())
        written.total += len(part)


def _ids(tokenizer: Tokenizer, texts: list[str], dtype: str) -> list[NDArray[Any]]:
    if tokenizer.kind == "bytes":  # as encode_batch, without a Python integer per byte
        return [np.frombuffer(utf8(text), np.uint8).astype(dtype) for text in texts]
    return [np.array(ids, dtype) for ids in tokenizer.encode_batch(texts)]


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of T + n tokens, each (B, T + n): position t's targets are tokens t+1..t+n.

    `document_ids` tells the documents of a window apart and is -1 where the epoch has ended; there the token is 0 and
    `label_mask` false, as it is for prompts.
    """

    tokens: torch.Tensor
    document_ids: torch.Tensor
    label_mask: torch.Tensor


@dataclass(frozen=True)
class _Epoch:
    documents: NDArray[np.int64]  # in stream order
    ends: NDArray[np.int64]  # of those documents, in the stream
    windows: NDArray[np.int64]


class Windows:
    """Batches of windows, a pure function of the arguments and of (step, rank, world_size).

    An epoch is a stream of all documents in an order drawn from (seed, epoch). Windows start at multiples of T
    (`seq_len`) and carry n (`n_future`) tokens more, which the next window repeats, so every token of an epoch is the
    input of exactly one position and every target that exists is there; the last window is padded. The order of the
    windows is drawn too. With `shuffle=False` documents and windows keep their order, in every epoch.

    Raises DataError for a corpus shorter than one window.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, n_future: int, batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if tokens.total < seq_len + n_future:
            raise DataError(f"corpus has {tokens.total} tokens, one window needs {seq_len + n_future}")
        self.tokens, self.seq_len, self.n_future = tokens, seq_len, n_future
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self._epochs: dict[int, _Epoch] = {}  # the newest two: drawing an order reads all document bounds

    @property
    def windows_per_epoch(self) -> int:
        """Windows that use every token once as an input."""
        return -(-self.tokens.total // self.seq_len)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """This rank's share of step `step`: B = batch_size / world_size windows, the ranks' one after the other.

        Raises ConfigError where world_size does not divide batch_size.
        """
        if self.batch_size % world_size:
            raise ConfigError(f"batch_size = {self.batch_size} is not a multiple of the {world_size} processes")
        share = self.batch_size // world_size
        numbers = step * self.batch_size + rank * share + np.arange(share)
        epochs, windows = np.divmod(numbers, self.windows_per_epoch)
        parts = [self._read(int(epoch), windows[epochs == epoch]) for epoch in np.unique(epochs)]
        tokens, document_ids, label_mask = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)
        )
        return Batch(tokens, document_ids, label_mask)

    def _read(self, epoch: int, windows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        order = self._epoch(epoch)
        starts = order.windows[windows][:, None] * self.seq_len
        positions = starts + np.arange(self.seq_len + self.n_future)  # (B, T + n), in the stream
        exists = positions < self.tokens.total
        positions = np.minimum(positions, self.tokens.total - 1)
        slots = np.searchsorted(order.ends, positions, side="right")
        rows = self.tokens.rows[order.documents[slots]]  # (B, T + n, 5)
        offsets = positions - order.ends[slots] + rows[..., 1] - rows[..., 0]  # in the document
        tokens = np.where(exists, self.tokens.gather(rows[..., 0] + offsets), 0)
        return tokens, np.where(exists, slots, -1), exists & (offsets >= rows[..., 2])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            documents, windows = np.arange(self.tokens.documents), np.arange(self.windows_per_epoch)
            if self.shuffle:
                random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
                documents, windows = random.permutation(documents), random.permutation(windows)
            lengths = self.tokens.rows[:, 1] - self.tokens.rows[:, 0]
            self._epochs = dict([*self._epochs.items()][-1:])
            self._epochs[epoch] = _Epoch(documents, np.cumsum(lengths[documents]), windows)
        return self._epochs[epoch]
