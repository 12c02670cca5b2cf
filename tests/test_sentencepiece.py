"""SentencePiece models: the ids of the library that wrote them, or a refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_model import sentencepiece, trained

from foretoken.errors import ForetokenError
from foretoken.formats.sentencepiece import load_sentencepiece
from foretoken.tokenizer import Tokenizer

TEXTS = [
    "", " ", "  ", "   def f(x):\n\treturn x\n\n", "The quick brown fox", " leading", "trailing ", "a  b   c    d",
    "Grüße aus Köln, naïve café", "漢字とかな", "Привет мир", "مرحبا", "👩‍👩‍👧 🇩🇪 x̂", "\x00\x01\x7f",
    "<s> </s> <unk> <0x0A>",
    "▁already▁marked", "aaaaaaaaaaaaaaa", "ababababab", "1234567890", "\n\n\n", "\ufeff\u200b", "nnnn  \t\t ▁ ▁",
    "if __name__ == '__main__':\n    raise SystemExit(main(sys.argv[1:]))",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def pair(model_file: Path) -> tuple[Any, Tokenizer]:
    """SentencePiece's own tokenizer and ours."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file)), load_sentencepiece(model_file)


def spaced(text: str) -> str:
    """What comes back: the mark of a space is a space, to the library too."""
    return text.replace("▁", " ")


def test_ids_are_sentencepieces(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    for text in [*TEXTS, Path(__file__).read_text(), Path(json.__file__).read_text()]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text, add_bos=True), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == spaced(text), text
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.vocab_size(), 1, 2, None)
    assert ours.special_ids == {i for i in range(400) if theirs.is_control(i) or theirs.is_unknown(i)}


@settings(max_examples=150)
@given(st.text(st.sampled_from("aben_ \n(1ü漢▁👩")) | st.text() | st.text(st.sampled_from(" ab"), min_size=20))
def test_ids_are_sentencepieces_for_any_text(pair: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = pair
    if "\ufffd" not in text:
        assert ours.encode(text) == theirs.encode(text)
        stream = ours.stream()
        assert "".join([stream.push(i) for i in ours.encode(text)]) + stream.finish() == spaced(text)


def test_without_the_space_in_front(tmp_path: Path) -> None:
    file = trained(tmp_path, add_dummy_prefix=False, pad_id=3)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(file)), load_sentencepiece(file)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == spaced(text)
    assert ours.pad_id == 3


def test_saved_as_tokenizer_json_it_is_the_same_everywhere(pair: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = pair
    ours.save(tmp_path)
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert reread(text)["input_ids"] == theirs.encode(text, add_bos=True)
    assert (reread.bos_token, reread.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "unigram"}, "it is no BPE"),
        ({"byte_fallback": False}, "no bytes for rare characters"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"remove_extra_whitespaces": True}, "it drops spaces"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined or unused pieces"),
        ({"treat_whitespace_as_suffix": True}, "it marks spaces behind words"),
    ],
)
def test_other_kinds_of_sentencepiece_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ForetokenError, match=re.escape(says)):
        load_sentencepiece(trained(tmp_path, **options))


def test_damaged_sentencepiece(model_file: Path, tmp_path: Path) -> None:
    raw = model_file.read_bytes()
    file = tmp_path / "tokenizer.model"
    for damaged in (b"", b"no model at all", raw[: len(raw) // 2], raw[:-9], b"\x0a\xff", b"\x08" * 9):
        file.write_bytes(damaged)
        with pytest.raises(ForetokenError, match=r"not a complete SentencePiece model|no unknown piece"):
            load_sentencepiece(file)
    with pytest.raises(ForetokenError, match="No such file"):
        load_sentencepiece(tmp_path / "none.model")
