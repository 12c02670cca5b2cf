"""Sources, splits, the cache, and windows held to a plain-loop twin and to numbers written out."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken import data, sources
from foretoken.config import DataConfig
from foretoken.data import Tokens, prepare
from foretoken.errors import ConfigError, DataError
from foretoken.loss import IGNORE, targets
from foretoken.sources import Document, documents, split_documents
from foretoken.tokenizer import byte_tokenizer, train_bpe
from foretoken.windows import Windows

BYTES = byte_tokenizer()


def config(tmp_path: Path, *source: object, **fields: Any) -> DataConfig:
    return DataConfig(source=tuple(map(str, source)), cache_dir=str(tmp_path / "cache"), **fields)


def write_lines(path: Path, records: Sequence[object]) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def many(tmp_path: Path, count: int = 60) -> Path:
    return write_lines(tmp_path / "many.jsonl", [{"text": f"document number {i}"} for i in range(count)])


def texts(tokens: Tokens) -> list[str]:
    return [BYTES.decode(tokens.document(i).tolist()) for i in range(tokens.documents)]


def read(tmp_path: Path, source: object, **fields: Any) -> list[Document]:
    settings_ = config(tmp_path, source, **fields)
    return [*documents(settings_, settings_.source)]


# ------------------------------------------------------------------------------------------------ sources


def test_folder_is_read_recursively_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a.md", "a/.hidden/x.txt", ".secret.txt", "image.png", "empty.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("" if name == "empty.txt" else name)
    write_lines(tmp_path / "in" / "c.jsonl", [{"text": "first"}, {"text": ""}, {"text": "second"}])
    assert [d.text for d in read(tmp_path, tmp_path / "in")] == ["a.md", "a/z.py", "b.txt", "first", "second"]
    assert [d.text for d in read(tmp_path, tmp_path / "in" / "*.[mt]*")] == ["a.md", "b.txt"]
    assert [d.text for d in read(tmp_path, tmp_path / "in" / "**" / "*.py")] == ["a/z.py"]
    assert read(tmp_path, tmp_path / "in" / "image.png")[0].text == "image.png"  # a file is taken as it is named


def test_newlines_are_not_translated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read(tmp_path, tmp_path / "a.txt")[0].text == "one\r\ntwo\rthree\n"


def test_same_records_from_every_format(tmp_path: Path) -> None:
    records = [{"text": f"Grüße {i}\r\n", "kind": "ab"[i % 2], "part": "train", "more": i} for i in range(3)]
    wanted = [(r["text"], r["kind"], r["part"], "") for r in records]
    paths = [write_lines(tmp_path / "r.jsonl", records), write_lines(tmp_path / "r.jsonl.gz", records)]
    try:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        pass
    else:
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
        paths.append(tmp_path / "r.parquet")
    for path in paths:
        found = read(tmp_path, path, domain_field="kind", split_field="part")
        assert [(d.text, d.domain, d.split, d.prompt) for d in found] == wanted
        assert [d.name for d in found] == [f"{path}:{i}" for i in (1, 2, 3)]


def test_a_list_of_texts_is_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "turns.jsonl", [{"turns": ["Why?", "And then?"]}, {"turns": ["x"]}, {"turns": "y"}])
    found = documents(DataConfig(source=(str(path),), text_field="turns"), [str(path)])
    assert [document.text for document in found] == ["Why?\n\nAnd then?", "x", "y"]


def test_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [(d.text, d.name) for d in read(tmp_path, "hf:a/b:en")] == [("one", "hf:a/b:en:1"), ("two", "hf:a/b:en:2")]
    assert calls == [(("a/b", "en"), {"split": "train", "streaming": True})]

    def not_found(*args: object, **options: object) -> None:
        raise FileNotFoundError("Dataset 'a/c' doesn't exist\non the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=not_found))
    with pytest.raises(DataError, match=r"^hf:a/c: Dataset 'a/c' doesn't exist$"):
        read(tmp_path, "hf:a/c")


def test_stdlib_is_library_code_only() -> None:
    files = sources.source_files("stdlib")
    folders = {part for file in files for part in file.relative_to(Path(os.__file__).parent).parts}
    assert {"os.py", "json", "asyncio"} <= folders
    assert not {"test", "tests", "idle_test", "site-packages", "_vendor", "encodings", "__pycache__"} & folders
    assert not any(name.startswith("test_") for name in folders)


def test_stdlib_alone_skips_invalid_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib" / "test").mkdir(parents=True)
    (tmp_path / "lib" / "latin.py").write_bytes(b"\xe9")
    (tmp_path / "lib" / "good.py").write_text("x = 1")
    (tmp_path / "lib" / "test" / "other.py").write_text("x = 2")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert [d.text for d in read(tmp_path, "stdlib")] == ["x = 1"]
    with pytest.raises(DataError, match=r"latin\.py: invalid UTF-8 at byte 0"):
        read(tmp_path, tmp_path / "lib")


def test_errors_replace(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}')
    found = read(tmp_path, tmp_path / "[ab].*", errors="replace")
    assert [d.text for d in found] == ["a\ufffdb", "a\ufffdb", "a\ufffd", "🙂"]


BAD = {
    "utf8.txt": (b"ab\n\xff", {}, r'utf8\.txt: invalid UTF-8 at byte 3; .* data\.errors = "replace"'),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', {}, r"utf8\.jsonl: invalid UTF-8 at byte 24; "),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', {}, r"bad\.jsonl:2: not JSON: Expecting value"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, {}, r"deep\.jsonl:1: not JSON"),
    "list.jsonl": (b"\n[1]", {}, r"list\.jsonl:2: a record must be an object"),
    "null.jsonl": (b"null", {}, r"null\.jsonl:1: a record must be an object"),
    "miss.jsonl": (b'{"b": 1, "a": 2}', {}, r"miss\.jsonl:1: no field 'text'; the record has a, b$"),
    "domain.jsonl": (b'{"text": "x"}', {"domain_field": "d"}, r"domain\.jsonl:1: no field 'd'; the record has text$"),
    "type.jsonl": (b'{"text": [1, 2]}', {}, r"type\.jsonl:1: field 'text' is \[1, 2\], not a text$"),
    "mixed.jsonl": (b'{"text": ["a", 2]}', {}, r"mixed\.jsonl:1: field 'text' is \[\"a\", 2\], not a text$"),
    "empty.jsonl": (b'{"text": []}', {}, r"empty\.jsonl:1: field 'text' is \[\], not a text$"),
    "half.jsonl": (b'{"text": "a\\ud83d"}', {}, r"half\.jsonl:1: text has a lone surrogate at character 1"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 9)[:-9], {}, r"cut\.jsonl\.gz: truncated or damaged gzip"),
    "no.jsonl.gz": (b'{"text": "a"}', {}, r"no\.jsonl\.gz: truncated or damaged gzip"),
    "bad.parquet": (b"PAR1 but not really", {}, r"bad\.parquet: not readable as Parquet: "),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_file_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    content, fields, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as info:
        read(tmp_path, tmp_path / name, **fields)
    assert "\n" not in str(info.value)


def test_parquet_error_names_all_columns(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": ["a"], "y": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:1: no field 'text'; the record has x, y$"):
        read(tmp_path, tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("source", "module", "extra"), [("hf:a", "datasets", "hf"), ("a.parquet", "pyarrow", "parquet")]
)
def test_missing_extra_is_named(
    source: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    with pytest.raises(DataError, match=rf"needs {module}: pip install 'foretoken\[{extra}\]'"):
        read(tmp_path, source)


def test_source_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source '.*nothing\*' matches no file; give"):
        prepare(config(tmp_path, tmp_path / "nothing*"), BYTES, "train")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").touch()
    with pytest.raises(DataError, match=r"folder' holds no file with a known text suffix"):
        prepare(config(tmp_path, tmp_path / "folder"), BYTES, "train")


# ------------------------------------------------------------------------------------------------ splits


def splits(settings_: DataConfig) -> tuple[list[str], list[str]]:
    pairs = [*split_documents(settings_)]
    return [d.text for d, s in pairs if s == "train"], [d.text for d, s in pairs if s == "validation"]


def test_split_field(tmp_path: Path) -> None:
    names = ["train", "valid", "test", "validation", "train", None]
    path = write_lines(tmp_path / "a.jsonl", [{"text": str(i), "split": name} for i, name in enumerate(names)])
    assert splits(config(tmp_path, path, split_field="split")) == (["0", "4", "5"], ["1", "2", "3"])


def test_validation_sources(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert splits(config(tmp_path, tmp_path / "a", validation=(str(tmp_path / "b"),))) == (["a"], ["b"])
    with pytest.raises(ConfigError, match=r"data.validation: .* is in data.source, too"):
        splits(config(tmp_path, tmp_path / "[ab]", validation=(str(tmp_path / "b"),)))


def test_hash_split_keeps_equal_documents_together(tmp_path: Path) -> None:
    lines = [f"text {i % 100}" for i in range(300)]
    train, validation = splits(config(tmp_path, write_lines(tmp_path / "a.jsonl", [{"text": t} for t in lines])))
    assert sorted(train + validation) == sorted(lines)
    assert 0 < len(validation) < 60
    assert len(validation) % 3 == 0
    assert not set(train) & set(validation)
    shuffled = write_lines(tmp_path / "b.jsonl", [{"text": t} for t in reversed(lines)])
    assert set(splits(config(tmp_path, shuffled))[1]) == set(validation)  # a document's split is its own affair


def test_hash_split_is_never_empty(tmp_path: Path) -> None:
    for count in range(20, 26):
        lines = [f"{i}" for i in range(count)] * 2
        path = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in lines])
        train, validation = splits(config(tmp_path, path, validation_fraction=1e-9))
        assert (len(train), len(validation), len(set(validation))) == (2 * count - 2, 2, 1)
        assert not set(train) & set(validation)


def test_few_documents_are_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i:03d}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    train, validation = splits(config(tmp_path, tmp_path / "a.txt", validation_fraction=0.055))
    assert (train[0] + validation[0], validation[0]) == (text, text[94 * 9 :])
    (tmp_path / "a.txt").write_text("a\n" + "b" * 98)  # no line's end is near
    assert splits(config(tmp_path, tmp_path / "a.txt", validation_fraction=0.1)) == (["a\n" + "b" * 88], ["b" * 10])
    (tmp_path / "a.txt").write_text("b" * 100)
    assert splits(config(tmp_path, tmp_path / "a.txt", validation_fraction=0.6)) == (["b" * 40], ["b" * 60])
    assert len(splits(config(tmp_path, many(tmp_path, 19)))[0]) == 19  # 19 are cut, 20 are told apart by hash
    assert len(splits(config(tmp_path, many(tmp_path, 20)))[0]) < 20


def test_a_cut_teaches_no_end_and_a_response_is_never_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("b" * 100)
    few = config(tmp_path, tmp_path / "a.txt", validation_fraction=0.1)
    ends = [prepare(few, BYTES, split).document(0)[-1] for split in ("train", "validation")]
    assert ends == [ord("b"), BYTES.eos_id]
    path = write_lines(tmp_path / "a.jsonl", [{"p": f"{i}", "r": f"{i}" * 100} for i in range(9)])
    train, validation = splits(config(tmp_path, path, prompt_field="p", response_field="r"))
    assert sorted(train + validation) == [f"{i}" * 100 for i in range(9)]
    assert train
    assert validation


# ------------------------------------------------------------------------------------------------ shards


def test_prepared_documents(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"p": "q?", "r": "é", "d": "x"},
        {"p": "", "r": "no", "d": None},
        {"p": "a", "r": "b", "d": "y"},
    ]
    path = write_lines(tmp_path / "a.jsonl", [{**r, "s": "train"} for r in records])
    settings_ = config(tmp_path, path, prompt_field="p", response_field="r", domain_field="d", split_field="s")
    tokens = prepare(settings_, BYTES, "train")
    assert [tokens.document(i).tolist() for i in range(3)] == [
        [256, *b"q?", 195, 169, 257],
        [256, *b"no", 257],
        [256, *b"ab", 257],
    ]
    assert tokens.label_mask(0).tolist() == [False, False, False, True, True, True]
    assert tokens.label_mask(1).tolist() == [True, True, True, True]
    assert tokens.label_mask(2).tolist() == [False, False, True, True]
    assert [tokens.text_bytes(i) for i in range(3)] == [2, 2, 1]  # of the response
    assert [tokens.domain(i) for i in range(3)] == ["x", None, "y"]
    assert (tokens.total, tokens.documents, tokens.domains) == (14, 3, ("x", "y"))
    assert tokens.read(4, 8).tolist() == [169, 257, 256, 110]
    assert tokens.read(0, 14).dtype == np.int64
    with pytest.raises(DataError, match=r"no document for the validation split in .*a\.jsonl"):
        prepare(settings_, BYTES, "validation")


def test_what_a_limit_cut_has_no_end(tmp_path: Path) -> None:
    """A record whose finish_reason says so, whatever the format; others end as ever."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{"text": f"{i}", "finish_reason": ("length", "stop", None)[i % 3]} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for path in (write_lines(tmp_path / "a.jsonl", records), tmp_path / "a.parquet"):
        tokens = prepare(config(tmp_path, path), BYTES, "train")
        for document in map(tokens.document, range(tokens.documents)):
            number = int(BYTES.decode(document.tolist()))
            assert (document[-1] == BYTES.eos_id) == (number % 3 > 0)


def test_text_with_special_names_and_merges(tmp_path: Path) -> None:
    text = "the cat<|eos|> sat on the mat " * 4
    tokenizer = train_bpe([text], 280)
    path = write_lines(tmp_path / "a.jsonl", [{"text": text, "s": "train"}])
    tokens = prepare(config(tmp_path, path, split_field="s"), tokenizer, "train")
    assert tokens.document(0).tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert tokens.document(0).tolist().count(tokenizer.eos_id or -1) == 1


def test_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    settings_ = config(tmp_path, many(tmp_path), validation_fraction=0.2)
    train, validation = (texts(prepare(settings_, BYTES, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(f"document number {i}" for i in range(60))
    assert len(validation) > 1


def test_shards_and_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config(tmp_path, many(tmp_path)), BYTES, "train")
    monkeypatch.setattr(data, "SHARD_TOKENS", 7)
    monkeypatch.setattr(data, "_CHUNK_DOCUMENTS", 3)
    pieces = prepare(config(tmp_path, many(tmp_path)), BYTES, "train")
    assert (len(whole.shards), len(pieces.shards)) == (1, -(-whole.total // 7))
    assert texts(pieces) == texts(whole)
    assert (pieces.read(5, 16) == whole.read(5, 16)).all()
    assert (pieces.rows == whole.rows).all()


def test_documents_are_not_gathered_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CHUNK_DOCUMENTS", 4)
    read_so_far = 0
    written: list[tuple[int, int]] = []

    def counted(settings_: DataConfig) -> Any:
        nonlocal read_so_far
        for pair in split_documents(settings_):
            read_so_far += 1
            yield pair

    monkeypatch.setattr(data, "split_documents", counted)
    tokens = prepare(config(tmp_path, many(tmp_path)), BYTES, "train", lambda n: written.append((read_so_far, n)))
    assert [count for count, _ in written][:3] == [4, 8, 12]
    assert written[0][1] == 4 * len("<document number 0>")
    assert written[-1][1] > tokens.total


def test_cache_is_used_and_follows_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_ = config(tmp_path, many(tmp_path))
    first = prepare(settings_, BYTES, "train")
    with monkeypatch.context() as patched:
        patched.setattr(data, "split_documents", lambda _: pytest.fail("the cache was not used"))
        assert texts(prepare(settings_, BYTES, "train")) == texts(first)
        prepare(settings_, BYTES, "validation")
    moved = prepare(DataConfig(source=settings_.source, cache_dir=str(tmp_path / "other")), BYTES, "train")
    assert moved.fingerprint == first.fingerprint
    many(tmp_path, 61)
    changed = prepare(settings_, BYTES, "train")
    assert changed.documents + prepare(settings_, BYTES, "validation").documents == 61
    assert changed.fingerprint != first.fingerprint
    assert prepare(config(tmp_path, *settings_.source, validation_fraction=0.5), BYTES, "train").documents < 50


def test_cache_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(DataConfig(source=(str(many(tmp_path)),)), BYTES, "train")
    assert len([*(tmp_path / "xdg" / "foretoken").iterdir()]) == 1


class Stop(BaseException):
    pass


def test_interrupted_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CHUNK_DOCUMENTS", 8)
    settings_ = config(tmp_path, many(tmp_path))

    def stop(tokens: int) -> None:
        if tokens > 300:
            raise Stop

    with pytest.raises(Stop):
        prepare(settings_, BYTES, "train", stop)
    assert [*(tmp_path / "cache").iterdir()] == []
    assert texts(prepare(settings_, BYTES, "train")) == splits(settings_)[0]


def test_killed_preparation_leaves_nothing_half_valid(tmp_path: Path) -> None:
    settings_ = config(tmp_path, many(tmp_path))
    code = (
        "import os; from foretoken import data; from foretoken.config import DataConfig;"
        "from foretoken.tokenizer import byte_tokenizer; data._CHUNK_DOCUMENTS = 8;"
        f"data.prepare(DataConfig.model_validate_json({settings_.model_dump_json()!r}), byte_tokenizer(), 'train',"
        "lambda tokens: os._exit(9) if tokens > 300 else None)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (left,) = (tmp_path / "cache").iterdir()
    assert [file.name for file in left.iterdir() if "tokens" in file.name]  # it was in the middle
    assert texts(prepare(settings_, BYTES, "train")) == splits(settings_)[0]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "train-tokens-00000.bin": shorten,
    "train-documents.bin": shorten,
    "meta.json": shorten,
    "train-tokens-00000.bin, longer": lambda path: path.write_bytes(path.read_bytes() + b"xx"),
    "train-documents.bin, gone": Path.unlink,
    "train-tokens-00000.bin, a bit": flip,
    "train-documents.bin, a bit": flip,
    "meta.json, gone": Path.unlink,
    "meta.json, other": lambda path: path.write_text('{"train": {}}'),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_tampered_cache_is_made_anew(name: str, tmp_path: Path) -> None:
    settings_ = config(tmp_path, many(tmp_path))
    prepare(settings_, BYTES, "train")
    (folder,) = (tmp_path / "cache").iterdir()
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    DAMAGE[name](folder / name.partition(",")[0])
    assert texts(prepare(settings_, BYTES, "train")) == splits(settings_)[0]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert [*(tmp_path / "cache").iterdir()] == [folder]


def test_one_of_several_processes_reads_all_for_its_digests(tmp_path: Path) -> None:
    """The others take the files as they are, where they have the right length."""
    settings_ = config(tmp_path, many(tmp_path))
    whole = texts(prepare(settings_, BYTES, "train"))
    (folder,) = (tmp_path / "cache").iterdir()
    flip(folder / "train-tokens-00000.bin")
    assert texts(prepare(settings_, BYTES, "train", verify=False)) != whole
    assert texts(prepare(settings_, BYTES, "train")) == whole


def test_two_that_prepare_at_once(tmp_path: Path) -> None:
    settings_ = config(tmp_path, many(tmp_path))
    barrier = threading.Barrier(2, timeout=10)
    found: list[list[str]] = []

    def meet(tokens: int) -> None:
        barrier.wait()

    def work() -> None:
        found.append(texts(prepare(settings_, BYTES, "train", meet)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [splits(settings_)[0]] * 2
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(DataError, match=r"token cache .*cache: .*; set data\.cache_dir"):
        prepare(config(tmp_path, many(tmp_path)), BYTES, "train")


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"no document for the train split in .*empty\.txt"):
        prepare(config(tmp_path, tmp_path / "empty.txt"), BYTES, "train")


# ------------------------------------------------------------------------------------------------ windows


def tokens_of(
    contents: Sequence[Sequence[int]], masked: Sequence[int] = (), shard_tokens: int = 4, gaps: Sequence[int] = ()
) -> Tokens:
    """Tokens in memory, in shards of a few."""
    flat = np.array([token for content in contents for token in content], np.uint16)
    ends = np.cumsum([len(content) for content in contents])
    starts = ends - [len(content) for content in contents]
    rest = np.zeros_like(ends)
    rows = np.stack([starts, ends, np.array(masked) if masked else rest, rest, rest - 1], axis=1)
    shards = tuple(flat[i : i + shard_tokens] for i in range(0, len(flat), shard_tokens))
    return Tokens(len(flat), len(contents), "", (), rows, shards, shard_tokens, np.array(gaps, np.int64))


def test_windows_worked_example() -> None:
    windows = Windows(tokens_of([[1, 2, 3, 4], [5, 6, 7]], masked=[2, 0]), 3, 2, batch_size=3, seed=0, shuffle=False)
    batch = windows.batch(0)
    assert windows.windows_per_epoch == 3
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 0], [7, 0, 0, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, -1], [1, -1, -1, -1, -1]]
    assert batch.label_mask.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert (batch.tokens.dtype, batch.document_ids.dtype, batch.label_mask.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    assert windows.batch(7).tokens.tolist() == batch.tokens.tolist()  # every epoch is in order without shuffle


def twin(tokens: Tokens, seq_len: int, n: int, order: Sequence[int], window: int) -> list[tuple[int, int, bool]]:
    """What a window holds, by plain loops: (token, document id, label) at each position."""
    stream = [
        (token, slot, label)
        for slot, i in enumerate(order)
        for token, label in zip(tokens.document(i).tolist(), tokens.label_mask(i).tolist(), strict=True)
    ]
    start = window * seq_len
    cut = stream[start : start + seq_len + n]
    return cut + [(0, -1, False)] * (seq_len + n - len(cut))


contents_and_masks = st.lists(
    st.lists(st.integers(1, 99), max_size=6).flatmap(lambda c: st.tuples(st.just(c), st.integers(0, len(c)))),
    min_size=1,
    max_size=8,
).filter(lambda pairs: sum(len(content) for content, _ in pairs) >= 7)


bounds = st.lists(st.integers(0, 40), unique=True, max_size=6).map(lambda found: sorted(found)[: len(found) // 2 * 2])


@given(contents_and_masks, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(1, 5), bounds)
@settings(max_examples=150, deadline=None)
def test_windows_equal_plain_loops(
    pairs: list[tuple[list[int], int]], seq_len: int, n: int, shuffle: bool, batch_size: int, gaps: list[int]
) -> None:
    tokens = tokens_of([content for content, _ in pairs], [masked for _, masked in pairs], gaps=gaps)
    for i, (start, stop, masked) in enumerate(tokens.rows[:, :3].tolist()):
        between = [any(a <= at < b for a, b in zip(gaps[::2], gaps[1::2], strict=True)) for at in range(start, stop)]
        assert tokens.label_mask(i).tolist() == [at >= masked and not gap for at, gap in enumerate(between)]
    windows = Windows(tokens, seq_len, n, batch_size, seed=5, shuffle=shuffle)
    per_epoch = windows.windows_per_epoch
    found: list[list[tuple[int, int, bool]]] = []
    for step in range(-(-2 * per_epoch // batch_size)):
        batch = windows.batch(step)
        arrays = (batch.tokens.tolist(), batch.document_ids.tolist(), batch.label_mask.tolist())
        found += [[*zip(*row, strict=True)] for row in zip(*arrays, strict=True)]
    for epoch in range(2):
        order = windows._epoch(epoch).documents.tolist()
        assert sorted(order) == [*range(len(pairs))]
        of_epoch = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        wanted = [twin(tokens, seq_len, n, order, window) for window in range(per_epoch)]
        assert sorted(of_epoch) == sorted(wanted)
        if not shuffle:
            assert (of_epoch, order) == (wanted, [*range(len(pairs))])


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_every_token_is_an_input_once_an_epoch_over_all_ranks(world_size: int) -> None:
    tokens = tokens_of([[*range(i, i + 10)] for i in range(1, 301, 10)])  # 300 tokens, all different
    windows = Windows(tokens, 5, 3, batch_size=6, seed=1)
    batches = [windows.batch(step, rank, world_size) for step in range(10) for rank in range(world_size)]
    assert sorted(token for b in batches for token in b.tokens[:, :5].flatten().tolist()) == [*range(1, 301)]
    assert all(len(b.tokens) == 6 // world_size for b in batches)


@given(st.integers(0, 10**6), st.sampled_from([2, 4]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_union_of_ranks_is_the_batch(step: int, world_size: int, shuffle: bool) -> None:
    windows = Windows(tokens_of([[*range(1, 8)], [*range(8, 30)], [40]]), 4, 2, 12, seed=3, shuffle=shuffle)
    whole = windows.batch(step)
    shares = [windows.batch(step, rank, world_size) for rank in range(world_size)]
    for field in ("tokens", "document_ids", "label_mask"):
        assert torch.cat([getattr(share, field) for share in shares]).equal(getattr(whole, field))


def test_batch_is_pure_and_depends_on_seed_and_epoch() -> None:
    tokens = tokens_of([[*range(i, i + 10)] for i in range(1, 301, 10)])
    windows = Windows(tokens, 5, 3, 6, seed=1)
    forward = [windows.batch(step).tokens for step in range(40)]
    for step in (39, 0, 25, 3):  # back and forth, and from a fresh object, as a resumed run asks
        assert windows.batch(step).tokens.equal(forward[step])
        assert Windows(tokens, 5, 3, 6, seed=1).batch(step).tokens.equal(forward[step])
    assert not Windows(tokens, 5, 3, 6, seed=2).batch(0).tokens.equal(forward[0])
    first, second = (torch.cat(forward[i : i + 10]) for i in (0, 10))
    assert not first.equal(second)
    one_document = Windows(tokens_of([range(1, 101)]), 5, 3, 20, seed=1).batch(0).tokens[:, 0].tolist()
    assert sorted(one_document) == [*range(1, 101, 5)] != one_document  # windows are in an order drawn, too


def test_windows_refuse_what_cannot_be(tmp_path: Path) -> None:
    tokens = tokens_of([[1, 2, 3, 4]])
    assert Windows(tokens, 3, 1, 1, 0).windows_per_epoch == 2
    with pytest.raises(DataError, match=r"^corpus has 4 tokens, one window needs 5$"):
        Windows(tokens, 3, 2, 1, 0)
    with pytest.raises(ConfigError, match=r"batch_size = 3 is not a multiple of the 2 processes"):
        Windows(tokens, 1, 1, 3, 0).batch(0, 0, 2)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
def test_tokens_per_byte_count_what_head_1_predicts(prompts: bool, across: bool, tmp_path: Path) -> None:
    """A document's bos is predicted only where targets lie across documents, and there behind another one."""
    records = [{"text": f"document {i}" * (i % 3 + 1), "ask": "ask" if i % 2 else ""} for i in range(60)]
    fields = {"prompt_field": "ask", "response_field": "text"} if prompts else {}
    tokens = prepare(config(tmp_path, write_lines(tmp_path / "a.jsonl", records), **fields), BYTES, "train")
    windows = Windows(tokens, 16, 2, batch_size=4, seed=0)
    batches = [windows.batch(step) for step in range(-(-windows.windows_per_epoch // 4))]
    parts = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "document_ids", "label_mask"))
    tokens_, documents_, mask = (part[: windows.windows_per_epoch] for part in parts)
    labels = targets(tokens_, documents_, mask, 2, across_documents=across)[0]
    assert (labels == BYTES.bos_id).any() == across
    first_is_bos = int(across and not tokens.rows[windows._epoch(0).documents[0], 2])  # which nothing predicts
    size = sum(tokens.text_bytes(i) for i in range(tokens.documents))
    assert tokens.tokens_per_byte(across) * size == pytest.approx(int((labels != IGNORE).sum()) + first_is_bos)


def test_prompts_reach_the_batch_as_no_labels(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"p": "ab", "r": "c", "s": "train"}])
    settings_ = config(tmp_path, path, prompt_field="p", response_field="r", split_field="s")
    batch = Windows(prepare(settings_, BYTES, "train"), 3, 2, 1, 0, shuffle=False).batch(0)
    assert batch.tokens.tolist() == [[256, *b"abc", 257]]
    assert batch.label_mask.tolist() == [[False, False, False, True, True]]
