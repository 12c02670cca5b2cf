"""A small tokenizer.model of the kind that Llama 2 has."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

sentencepiece = pytest.importorskip("sentencepiece")


def trained(folder: Path, vocab_size: int = 400, **options: Any) -> Path:
    """A tokenizer.model of the kind Llama 2 has, learned from the standard library."""
    text = [line for name in (io, shutil, re, subprocess) for line in Path(name.__file__).read_text().splitlines()]
    text += ["Grüße aus Köln, naïve café", "aaaa  aaaa", "ababab"] * 20
    written = io.BytesIO()
    likes_llama = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "character_coverage": 0.9995,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=vocab_size, minloglevel=2, num_threads=1,
        **(likes_llama | options),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder / "tokenizer.model"
