"""Sources to batches, in four steps.

1. Sources are read into documents, in an order that depends on names alone (`documents`).
2. Each document goes to the train or the validation split (`split_documents`).
3. Both splits are tokenised once into memory-mapped shards, with every document's bounds beside them, in a cache
   folder that appears by one rename when it is complete (`prepare`).
4. A batch is a pure function of (seed, step, rank, world_size) on those shards (`Windows.batch`). There is no loader
   state: to resume at a step is to ask for its batch.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import itertools
import json
import os
import shutil
import sysconfig
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from foretoken.config import DataConfig
from foretoken.errors import ConfigError, DataError
from foretoken.tokenizer import Tokenizer, utf8

Split = Literal["train", "validation"]

# What a folder is searched for, beside records. A file or a glob is taken whatever its suffix.
TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .xml .csv .json .yaml .yml .toml .ini .cfg .sh .sql .py .pyi .ipynb .c .h .cc .cpp "
    ".hpp .cu .cs .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .css .rb .php .pl .lua .r .jl .hs .ml .lean".split()
)
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
FEW_DOCUMENTS = 20
SHARD_TOKENS = 64 * 2**20
_FORMAT = 1
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 256, 2**22
_NOT_LIBRARY = set(
    "test tests idle_test encodings site-packages dist-packages _vendor ensurepip lib2to3 pydoc_data turtledemo "
    "__pycache__".split()
)


@dataclass(frozen=True)
class Document:
    """One text. `prompt` is read by the model but is no target; `split` is what the record's split field says."""

    text: str
    name: str
    prompt: str = ""
    domain: str | None = None
    split: str | None = None


# ------------------------------------------------------------------------------------------------ 1. sources


def documents(config: DataConfig, sources: Sequence[str]) -> Iterator[Document]:
    """Every document of `sources`, in order; empty texts are left out.

    Newlines stay as they are. Raises DataError with file and place for whatever cannot be read.
    """
    for source in sources:
        if source.startswith("hf:"):
            yield from _record_documents(config, _hf_records(source))
            continue
        for path in source_files(source):
            name = path.name.lower()
            if name.endswith((".jsonl", ".jsonl.gz")):
                found = _record_documents(config, _json_records(path, config.errors))
            elif name.endswith(".parquet"):
                found = _record_documents(config, _parquet_records(config, path))
            else:
                found = _text_document(path, config.errors, skip_invalid=source == "stdlib")
            yield from found


def source_files(source: str) -> list[Path]:
    """The files of a source, sorted by name. Raises DataError where there is none."""
    path = Path(source).expanduser()
    if source == "stdlib":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(library, (".py",), lambda name: name in _NOT_LIBRARY or name.startswith(("test_", "config-")))
    elif path.is_dir():
        files = _walk(path, TEXT_SUFFIXES + RECORD_SUFFIXES, lambda name: name.startswith("."))
    else:
        names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
        files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        what = "holds no file with a known text suffix" if path.is_dir() else "matches no file"
        raise DataError(f"source '{source}' {what}; give a file, a folder, a glob, stdlib or hf:NAME")
    return sorted(files, key=lambda file: file.as_posix())


def _walk(root: Path, suffixes: tuple[str, ...], skipped: Callable[[str], bool]) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not skipped(name)]
        files += [Path(folder, name) for name in names if name.lower().endswith(suffixes) and not skipped(name)]
    return files


def _text_document(path: Path, errors: str, skip_invalid: bool) -> Iterator[Document]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8", errors)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if skip_invalid:
            return
        raise _invalid_utf8(path, error.start) from None
    if text:
        yield Document(text, str(path))


def _invalid_utf8(path: Path, offset: int) -> DataError:
    rule = 'save it as UTF-8, or set data.errors = "replace" to read U+FFFD there'
    return DataError(f"{path}: invalid UTF-8 at byte {offset}; {rule}")


def _json_records(path: Path, errors: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    offset = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(cast(BinaryIO, file), 1):
                try:
                    text = line.decode("utf-8", errors)
                    record = json.loads(text) if text.strip() else None
                except UnicodeDecodeError as error:
                    raise _invalid_utf8(path, offset + error.start) from None
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON: {error}") from None
                if isinstance(record, dict):
                    yield f"{path}:{number}", record
                elif text.strip():
                    raise DataError(f"{path}:{number}: a record must be an object like {{\"text\": ...}}")
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged gzip: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _parquet_records(config: DataConfig, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    arrow, parquet = _extra("pyarrow", "parquet"), _extra("pyarrow.parquet", "parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            wanted = {field for field in _fields(config) if field is not None}
            # Without one of them every column is read, so that the error can name those there are.
            for batch in file.iter_batches(batch_size=1024, columns=sorted(wanted) if wanted <= names else None):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet: {_first_line(error)}") from None


def _hf_records(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, _, config_name = source.removeprefix("hf:").partition(":")
    datasets = _extra("datasets", "hf")
    try:
        rows = datasets.load_dataset(name, config_name or None, split="train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield f"{source}:{number}", record
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {_first_line(error)}") from None


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"this source needs {module}: pip install 'foretoken[{extra}]'") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fields(config: DataConfig) -> tuple[str | None, str, str | None, str | None]:
    """Names of the prompt, text, domain and split fields."""
    return config.prompt_field, config.response_field or config.text_field, config.domain_field, config.split_field


def _record_documents(config: DataConfig, records: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Document]:
    for where, record in records:
        values: list[str | None] = []
        for field, is_text in zip(_fields(config), (True, True, False, False), strict=True):
            if field is not None and field not in record:
                raise DataError(f"{where}: no field '{field}'; the record has {', '.join(sorted(record)) or 'none'}")
            value = None if field is None else record[field]
            if is_text and field is not None:
                if not isinstance(value, str):
                    raise DataError(f"{where}: field '{field}' is {json.dumps(value, default=str)[:40]}, not a text")
                value = _without_surrogates(value, where, config.errors)
            values.append(None if value is None else str(value))
        prompt, text, domain, split = values
        if text:
            yield Document(text, where, prompt or "", domain, split)


def _without_surrogates(text: str, where: str, errors: str) -> str:
    if errors == "replace":  # JSON can spell half a character, \ud83d
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        utf8(text)
    except DataError as error:
        raise DataError(f'{where}: {error}; set data.errors = "replace" to read U+FFFD there') from None
    return text


# ------------------------------------------------------------------------------------------------ 2. splits


def split_documents(config: DataConfig) -> Iterator[tuple[Document, Split]]:
    """Every document with its split, by the first rule that applies.

    split_field: records that say "train" train, all others validate (a text file says nothing and trains).
    validation: its sources validate. Fewer than 20 documents: the last `validation_fraction` of each validates, cut
    at a line's end where one is near. Else by SHA-256 of the text, so equal documents share a split; should none
    fall to validation, the one with the lowest hash does.
    """
    source = documents(config, config.source)
    if config.split_field is not None:
        yield from ((d, "train" if d.split in ("train", None) else "validation") for d in source)
    elif config.validation:
        yield from ((d, "train") for d in source)
        yield from ((d, "validation") for d in documents(config, config.validation))
    else:
        first = list(itertools.islice(source, FEW_DOCUMENTS))
        if len(first) < FEW_DOCUMENTS:
            yield from (part for d in first for part in _cut(d, config.validation_fraction))
        else:
            yield from _by_hash(itertools.chain(first, source), config.validation_fraction)


def _cut(document: Document, fraction: float) -> Iterator[tuple[Document, Split]]:
    text = document.text
    cut = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, cut) + 1
    if len(text) - line <= 2 * (len(text) - cut):
        cut = line
    if cut > 0:
        yield replace(document, text=text[:cut]), "train"
    if cut < len(text):
        yield replace(document, text=text[cut:], prompt="" if cut > 0 else document.prompt), "validation"


def _by_hash(source: Iterable[Document], fraction: float) -> Iterator[tuple[Document, Split]]:
    lowest, held, found = 2.0, list[Document](), False  # held: the documents with the lowest hash, while none is found
    for document in source:
        digest = hashlib.sha256(utf8(document.prompt + document.text)).digest()
        value = int.from_bytes(digest[:8], "big") / 2**64
        if value < fraction:
            found = True
            yield document, "validation"
        elif found or value > lowest:
            yield document, "train"
        else:
            if value < lowest:
                yield from ((d, "train") for d in held)
                lowest, held = value, []
            held.append(document)
    yield from ((d, "train" if found else "validation") for d in held)


# ------------------------------------------------------------------------------------------------ 3. shards


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
        return np.arange(stop - start) >= masked

    def text_bytes(self, i: int) -> int:
        """UTF-8 bytes of document i's text, its prompt left out: what bits per byte divide by."""
        return int(self.rows[i, 3])

    def domain(self, i: int) -> str | None:
        """The domain of document i, if its record named one."""
        return self.domains[self.rows[i, 4]] if self.rows[i, 4] >= 0 else None


def prepare(
    config: DataConfig, tokenizer: Tokenizer, split: Split, progress: Callable[[int], None] | None = None
) -> Tokens:
    """The tokens of a split, from the cache or, the first time, from the sources.

    Both splits are written in one pass that holds one chunk of documents in memory; `progress` hears how many tokens
    there are so far. A changed source, option or tokenizer makes a new cache folder; `hf:` data is taken as unchanged.
    A folder that is not as its meta.json says is made anew. Raises DataError for an empty split.
    """
    root = _cache_root(config)
    folder = root / _cache_key(config, tokenizer)
    tokens = _open(folder, split)
    if tokens is None:
        building = root / f".{folder.name}-{uuid.uuid4().hex}"
        try:
            building.mkdir(parents=True)
            _write(config, tokenizer, building, progress)
            if folder.exists() and _open(folder, split) is None:
                folder.rename(root / f"{building.name}-damaged")
            if not folder.exists():
                building.rename(folder)
        except OSError as error:
            # A folder that appeared meanwhile is another process's, complete, and as good as ours.
            if not folder.exists():
                hint = "set data.cache_dir to a folder with room that you may write"
                raise DataError(f"token cache {root}: {error.strerror}; {hint}") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(root / f"{building.name}-damaged", ignore_errors=True)
        tokens = _open(folder, split)
    if tokens is None:
        raise DataError(f"token cache {folder} changed while it was written; run again")
    if tokens.documents == 0:
        raise DataError(f"the {split} split of {', '.join(config.source)} is empty; check data.source and its split")
    return tokens
