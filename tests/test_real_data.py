"""Real corpora, where the checkout has them beside it: splits as their records say, and every byte accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest

from foretoken.bench import whole_prompts
from foretoken.config import DataConfig
from foretoken.data import prepare
from foretoken.sources import documents, split_documents
from foretoken.tokenizer import byte_tokenizer
from foretoken.windows import Windows

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the checkout")


def test_python_code_splits_by_its_field() -> None:
    config = DataConfig(source=(str(DATA / "python_code" / "*.jsonl.gz"),), split_field="split")
    splits = [split for _, split in split_documents(config)]
    assert (splits.count("train"), splits.count("validation")) == (2818, 247)


def test_children_stories_are_prepared_whole(tmp_path: Path) -> None:
    config = DataConfig(
        source=(str(DATA / "childrens_stories"),), split_field="split", domain_field="title", cache_dir=str(tmp_path)
    )
    tokenizer = byte_tokenizer()
    train, validation = prepare(config, tokenizer, "train"), prepare(config, tokenizer, "validation")
    for tokens in (train, validation):
        # bytes, and bos and eos around each document
        assert tokens.total == sum(tokens.text_bytes(i) for i in range(tokens.documents)) + 2 * tokens.documents
    assert len({train.domain(i) for i in range(train.documents)}) > 10
    batch = Windows(train, seq_len=256, n_future=4, batch_size=8, seed=0).batch(0)
    assert batch.tokens.shape == (8, 260)


def test_spec_bench_is_a_domain() -> None:
    """Prompts of several turns, as `foretoken bench decode --prompt-field turns` reads them."""
    config = DataConfig(source=(str(DATA / "spec_bench"),), text_field="turns", domain_field="category")
    found = list(documents(config, config.source))
    assert len(found) == 320
    assert {"qa", "rag", "math_reasoning"} < {document.domain for document in found}
    assert found[0].text.startswith("Compose an engaging travel blog post")
    assert "\n\nRewrite your previous response." in found[0].text
    chosen = whole_prompts([document.text for document in found], 8)
    assert len({document.domain for document in found if document.text in chosen}) > 3


def test_a_single_text_file_holds_out_its_end(tmp_path: Path) -> None:
    path = DATA / "tinyshakespeare" / "input.txt"
    config = DataConfig(source=(str(path),), validation_fraction=0.1, cache_dir=str(tmp_path))
    parts = {split: document.text for document, split in split_documents(config)}
    whole = path.read_bytes().decode()
    assert parts["train"] + parts["validation"] == whole
    assert len(parts["validation"]) == pytest.approx(0.1 * len(whole), rel=0.01)
