"""Sources to documents, each with its split: what is read, how, and what is left out.

A text file is one document; a record of .jsonl, .jsonl.gz, .parquet or a Hugging Face data set is one. The order is
that of the sources and, inside one, of the file names, so it is the same on every machine.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from foretoken.chat import each_text
from foretoken.config import DataConfig
from foretoken.errors import ConfigError, DataError
from foretoken.tokenizer import utf8

Split = Literal["train", "validation"]

# What a folder is searched for. A file or a glob names what it wants, whatever the suffix.
_PROSE = ".txt .text .md .rst .tex .html .xml .csv .json .yaml .yml .toml .ini .cfg .ipynb"
_CODE = (
    ".py .pyi .c .h .cc .cpp .hpp .cu .cs .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .css .rb .php .pl .lua .r "
    ".jl .hs .ml .lean .sh .sql"
)
TEXT_SUFFIXES = (*_PROSE.split(), *_CODE.split())
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
FEW_DOCUMENTS = 20
_TESTS = ("test", "tests", "idle_test")
_NOT_LIBRARY = ("encodings", "site-packages", "dist-packages", "_vendor", "ensurepip", "lib2to3", "pydoc_data")
_LEFT_OUT = (*_TESTS, *_NOT_LIBRARY, "turtledemo", "__pycache__")


@dataclass(frozen=True)
class Document:
    """One text. `prompt` is read by the model but is no target; `split` is what the record's split field says.

    messages: of a conversation, whose `text` is what the assistant says. cut: it ends where a limit cut it, so that
    no eos stands behind it; as a record's finish_reason "length" says.
    """

    text: str
    name: str
    prompt: str = ""
    domain: str | None = None
    split: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    cut: bool = False


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


def require_records(config: DataConfig, fields: Mapping[str, str]) -> None:
    """Raise ConfigError where the configuration names fields of records, and all its sources hold is text files."""
    sources = (*config.source, *config.validation)
    if fields and not any(
        source.startswith("hf:") or any(path.name.lower().endswith(RECORD_SUFFIXES) for path in source_files(source))
        for source in sources
    ):
        given = " and ".join(f"{name} = {value}" for name, value in fields.items())
        rule = "text alone, which has no fields; leave that out, or name records"
        raise ConfigError(f"{given}: {' '.join(sources)} holds {rule}")


def source_files(source: str) -> list[Path]:
    """The files of a source, sorted by name. Raises DataError where there is none."""
    path = Path(source).expanduser()
    if source == "stdlib":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(library, (".py",), lambda name: name in _LEFT_OUT or name.startswith(("test_", "config-")))
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
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not JSON: {error}") from None
                if isinstance(record, dict):
                    yield f"{path}:{number}", record
                elif text.strip():
                    raise DataError(f'{path}:{number}: a record must be an object like {{"text": ...}}')
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
            wanted = {field for field in _fields(config) if field is not None} | {"finish_reason"} & names
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
    text = config.messages_field or config.response_field or config.text_field
    return config.prompt_field, text, config.domain_field, config.split_field


def _record_documents(config: DataConfig, records: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Document]:
    for where, record in records:
        values: list[str | None] = []
        messages: tuple[Mapping[str, Any], ...] = ()
        for field, is_text in zip(_fields(config), (True, True, False, False), strict=True):
            if field is not None and field not in record:
                raise DataError(f"{where}: no field '{field}'; the record has {', '.join(sorted(record)) or 'none'}")
            value = None if field is None else record[field]
            if field is not None and field == config.messages_field:
                messages = _messages(value, f"{where}: field '{field}'", config.errors)
                value = "\n".join(
                    message.get("content") or "" for message in messages if message["role"] == "assistant"
                )
            elif is_text and field is not None:
                if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
                    value = "\n\n".join(value)
                if not isinstance(value, str):
                    raise DataError(f"{where}: field '{field}' is {_shown(value)}, not a text")
                value = _without_surrogates(value, where, config.errors)
            values.append(None if value is None else str(value))
        prompt, text, domain, split = values
        if text or messages:
            yield Document(
                text or "", where, prompt or "", domain, split, messages, record.get("finish_reason") == "length"
            )


def _messages(value: object, where: str, errors: str) -> tuple[Mapping[str, Any], ...]:
    """A record's conversation; raises DataError where it is none, or has nothing that could be learned."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {_shown(value)}, not a list of messages with role and content")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {number} is {_shown(message)}, not an object with role and content")
        calls = message.get("role") == "assistant" and message.get("tool_calls")
        for key in ("role", "content"):
            if calls and message.get(key) is None:
                continue
            if key not in message:
                has = ", ".join(sorted(message)) or "nothing"
                raise DataError(f"{where}: message {number} has no '{key}'; it has {has}")
            if not isinstance(message[key], str):
                raise DataError(f"{where}: message {number}: '{key}' is {_shown(message[key])}, not a text")
        if message["role"] == "assistant" and not (calls or message["content"].strip()):
            raise DataError(f"{where}: message {number}: the assistant says nothing; leave the turn out")
    if all(message["role"] != "assistant" for message in value):
        roles = ", ".join(dict.fromkeys(message["role"] for message in value))
        raise DataError(f"{where}: no message has the role assistant, so there is nothing to learn; roles are {roles}")
    try:
        return tuple(each_text(value, lambda text: _without_surrogates(text, where, errors)))
    except RecursionError:
        raise DataError(f"{where}: a message is nested too deeply to be read") from None


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:40]


def _without_surrogates(text: str, where: str, errors: str) -> str:
    if errors == "replace":  # JSON can spell half a character, \ud83d
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        utf8(text)
    except DataError as error:
        raise DataError(f'{where}: {error}; set data.errors = "replace" to read U+FFFD there') from None
    return text


def split_documents(config: DataConfig) -> Iterator[tuple[Document, Split]]:
    """Every document with its split, by the first rule that applies.

    split_field: records that say "train" train, all others validate (a text file says nothing and trains).
    validation: its sources validate. Fewer than 20 texts without prompts: the last `validation_fraction` of each
    validates, cut at a line's end where one is near. Else, conversations among them, by SHA-256 of the text, so equal
    documents share a split; should none fall to validation, the one with the lowest hash does.
    """
    source = documents(config, config.source)
    if config.split_field is not None:
        yield from ((d, "train" if d.split in ("train", None) else "validation") for d in source)
    elif config.validation:
        _require_apart(config.source, config.validation)
        yield from ((d, "train") for d in source)
        yield from ((d, "validation") for d in documents(config, config.validation))
    else:
        first = list(itertools.islice(source, FEW_DOCUMENTS))
        if len(first) < FEW_DOCUMENTS and config.messages_field is config.prompt_field is None:
            yield from (part for d in first for part in _cut(d, config.validation_fraction))
        else:
            yield from _by_hash(itertools.chain(first, source), config.validation_fraction)


def _files_of(sources: Sequence[str]) -> set[str]:
    """The files of sources, resolved, and the names of data sets. Raises DataError for one without a file."""
    files = (str(file.resolve()) for name in sources if not name.startswith("hf:") for file in source_files(name))
    return {*files, *(name for name in sources if name.startswith("hf:"))}


def same_files(sources: Sequence[str], others: Sequence[str]) -> bool:
    """Whether both hold the same files and data sets; not where one of them is there no more."""
    try:
        return _files_of(sources) == _files_of(others)
    except DataError:
        return False


def _require_apart(source: Sequence[str], validation: Sequence[str]) -> None:
    """Raises ConfigError where a source to validate on is one to train on, too."""
    if both := sorted(_files_of(source) & _files_of(validation)):
        raise ConfigError(
            f"data.validation: {both[0]} is in data.source, too; name there what is to be trained on alone"
        )


def _cut(document: Document, fraction: float) -> Iterator[tuple[Document, Split]]:
    text = document.text
    cut = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, cut) + 1
    if line and len(text) - line <= 2 * (len(text) - cut):
        cut = line
    if cut > 0:
        yield replace(document, text=text[:cut], cut=document.cut or cut < len(text)), "train"
    if cut < len(text):
        yield replace(document, text=text[cut:]), "validation"


def _by_hash(source: Iterable[Document], fraction: float) -> Iterator[tuple[Document, Split]]:
    lowest, held, found = 2.0, list[Document](), False  # held: the documents with the lowest hash, while none is found
    for document in source:
        said = json.dumps(document.messages) if document.messages else ""
        digest = hashlib.sha256(utf8(document.prompt + document.text + said)).digest()
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
