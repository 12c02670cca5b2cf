"""Round trips, equality with the tokenizers library and transformers, worked examples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_twins import LLAMA_2_FIRST, llama_2
from tokenizers import models

from foretoken import tokenizer as tk
from foretoken.config import TokenizerConfig
from foretoken.errors import CheckpointError, ConfigError, DataError

CORPUS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, "Grüße, 你好 🙂\n" * 20]
SPECIAL_WORDS = st.sampled_from(["<|bos|>", "<|eos|>", "<|pad|>", "<|unused|>", "</s>"])
TEXTS = st.lists(st.text(max_size=8) | SPECIAL_WORDS, max_size=6).map("".join)


BYTES = tk.byte_tokenizer()
BPE = tk.train_bpe(CORPUS, 300)
SENTENCEPIECE = llama_2([*LLAMA_2_FIRST, "\u2581", "a", "b", "\u2581a", "é"], [("\u2581", "a")])
ALL = {"bytes": BYTES, "bpe": BPE, "sentencepiece": SENTENCEPIECE}


def test_bytes_worked_example() -> None:
    assert BYTES.encode("hé") == [104, 195, 169]
    assert BYTES.encode("hé", add_special_tokens=True) == [256, 104, 195, 169]
    assert BYTES.encode_batch(["a", "", "b"]) == [[97], [], [98]]
    assert BYTES.decode([256, 104, 195, 169, 257]) == "hé"
    assert BYTES.decode([104, 257], skip_special_tokens=False) == "h<|eos|>"
    assert BYTES.decode([104, 195]) == "h\ufffd"
    assert (BYTES.vocab_size, BYTES.bos_id, BYTES.eos_id, BYTES.pad_id, BYTES.kind) == (260, 256, 257, 258, "bytes")


def test_special_names_in_text_are_text() -> None:
    assert BYTES.encode("<|eos|>") == [*b"<|eos|>"]
    assert BPE.eos_id not in BPE.encode("a<|eos|>b")
    assert SENTENCEPIECE.eos_id not in SENTENCEPIECE.encode("a</s>b")


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_bytes_fast_path_equals_library(text: str) -> None:
    assert BYTES.encode(text) == BYTES.backend.encode(text, add_special_tokens=False).ids == [*text.encode()]
    assert BYTES.encode(text, add_special_tokens=True) == BYTES.backend.encode(text).ids


@given(TEXTS)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_round_trip(name: str, text: str) -> None:
    assert ALL[name].decode(ALL[name].encode(text)) == text
    assert ALL[name].decode(ALL[name].encode(text, add_special_tokens=True)) == text


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("name", list(ALL))
def test_stream_equals_decode_for_any_ids(name: str, data: Any, skip: bool) -> None:
    tokenizer = ALL[name]
    # text with characters cut in two, specials in between, and ids outside the vocabulary
    of_text = st.text(max_size=4).map(tokenizer.encode)
    ids = [i for part in data.draw(st.lists(of_text | st.lists(st.integers(0, 310), max_size=3))) for i in part]
    stream = tokenizer.stream(skip_special_tokens=skip)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_stream_gives_text_as_soon_as_it_is_whole() -> None:
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert (stream.push(0xE4), stream.finish()) == ("", "\ufffd")
    words = SENTENCEPIECE.stream()
    assert [words.push(i) for i in SENTENCEPIECE.encode("a ab", add_special_tokens=True)] == ["", "a", " a", "b"]


@pytest.mark.parametrize("name", list(ALL))
def test_saved_directory_is_the_same_tokenizer_everywhere(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = ALL[name]
    tokenizer.save(tmp_path, model_max_length=128)
    ours, theirs = tk.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.kind == tokenizer.kind
    assert ours.fingerprint == tokenizer.fingerprint
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == ids
    assert theirs.model_max_length == 128
    assert len(theirs) == ours.vocab_size
    for text in ["", "a b  c\n", "Grüße, 你好 🙂", " 'll don't , end ."]:
        plain, framed = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text) == plain
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True) == framed
        assert framed == [tokenizer.bos_id, *plain]
        assert theirs.decode(framed, skip_special_tokens=True) == ours.decode(framed)


def test_saving_needs_no_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from foretoken.tokenizer import byte_tokenizer, load;"
        f"byte_tokenizer().save({str(tmp_path)!r}); print(load({str(tmp_path)!r}).encode('hi'));"
        "assert not {'transformers', 'torch', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[104, 105]\n", "")


def test_chat_template_survives(tmp_path: Path) -> None:
    tk.Tokenizer(BPE.backend, 0, 1, 2, chat_template="{{ messages }}").save(tmp_path)
    assert tk.load(tmp_path).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ newer }}")
    assert tk.load(tmp_path).chat_template == "{{ newer }}"


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, (1, 2, None)),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": {"content": "<unk>"}}}, (None, 0, None)),
        ({"special_tokens_map.json": {"pad_token": "<unk>"}}, (1, 2, 0)),
        ({"generation_config.json": {"eos_token_id": [0, 2], "pad_token_id": None}}, (1, 0, None)),
        ({"config.json": {"bos_token_id": 2}, "tokenizer_config.json": {"bos_token": "<s>"}}, (1, 2, None)),
        ({"config.json": {"bos_token_id": 999_999}}, (1, 2, None)),
        ({"config.json": {"bos_token_id": 2**40, "pad_token_id": -1}}, (1, 2, None)),
    ],
)
def test_special_tokens_are_found_beside_the_file(
    files: dict[str, object], ids: tuple[int | None, ...], tmp_path: Path
) -> None:
    SENTENCEPIECE.backend.save(str(tmp_path / "tokenizer.json"))
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    tokenizer = tk.load(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids


def test_further_tokens_that_end_a_text(tmp_path: Path) -> None:
    """Published chat models list several; one that is no token of this vocabulary is not taken."""
    SENTENCEPIECE.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    for listed, further in (([1, 2, 7, 999_999, "x", -1], (1, 7)), ([2], ()), (2, ()), (None, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        tokenizer = tk.load(tmp_path)
        assert (tokenizer.eos_id, tokenizer.further_ends) == (2, further)


def test_truncation_and_padding_of_a_file_are_not_applied(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one text that is longer than four tokens"
    assert tk.load(tmp_path).encode(text) == BPE.encode(text)
    assert tk.load(tmp_path).encode("") == []


def test_vocab_size_covers_the_largest_id() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a"))
    assert tk.Tokenizer(backend, None, None, None).vocab_size == 10


def test_train_bpe() -> None:
    assert BPE.vocab_size == 300
    assert (BPE.bos_id, BPE.eos_id, BPE.pad_id, BPE.kind) == (0, 1, 2, "file")
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert BPE.encode(CORPUS[0], add_special_tokens=True)[0] == BPE.bos_id
    assert tk.train_bpe(CORPUS, 300).fingerprint == BPE.fingerprint
    assert tk.train_bpe(CORPUS, 299).fingerprint != BPE.fingerprint
    assert tk.train_bpe([], 259).decode(tk.train_bpe([], 259).encode("any ŧext")) == "any ŧext"
    with pytest.raises(ConfigError, match=r"vocab_size = 258 .* = 259"):
        tk.train_bpe(CORPUS, 258)


def test_fingerprint_tells_specials_apart() -> None:
    other_eos = tk.Tokenizer(BPE.backend, 0, 2, 2)
    assert other_eos.fingerprint != BPE.fingerprint
    assert BYTES.fingerprint == tk.byte_tokenizer().fingerprint


def test_from_config(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    assert tk.from_config(TokenizerConfig()).kind == "bytes"
    loaded = tk.from_config(TokenizerConfig(kind="file", path=str(tmp_path)))
    assert loaded.fingerprint == BPE.fingerprint


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer.json: No such file") as missing:
        tk.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json") as damaged:
        tk.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not JSON") as beside:
        tk.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: not JSON"):
        tk.load(tmp_path)
    for token in (5, ["<|eos|>"], {"content": 5}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        with pytest.raises(DataError, match=r"tokenizer .*tokenizer.json: eos_token = .* must be a token's text"):
            tk.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(DataError, match=r"chat_template.jinja: invalid UTF-8 at byte 4"):
        tk.load(tmp_path)
    assert not any("\n" in str(info.value) for info in (missing, damaged, beside))
    for tokenizer in (BYTES, BPE):
        with pytest.raises(DataError, match="lone surrogate at character 1"):
            tokenizer.encode("a\ud800")
