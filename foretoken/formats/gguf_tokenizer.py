"""A tokenizer as GGUF keys: llama.cpp knows some ways of splitting text by name, and others not at all.

A tokenizer is written when llama.cpp computes the same ids from text; any other is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from foretoken.chat import chat_template, end_ids
from foretoken.errors import CheckpointError, DataError
from foretoken.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, ADDED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's kinds of tokens

# How published tokenizers cut text into words, as llama.cpp calls it. The expressions are their tokenizer.json's.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS, _ONE_DIGIT = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", rf"{_WORDS}|\p{{N}}|{_REST}"
# (what splits, whether a word that is a token is taken whole) -> name
_NAMES = {
    ("gpt2", False): "gpt-2",
    ("digits + gpt2", False): "smollm",
    (_THREE_DIGITS, True): "llama-bpe",  # Llama 3
    (_THREE_DIGITS, False): "dbrx",
    (_ONE_DIGIT, False): "qwen2",
}
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def tokenizer_keys(tokenizer: Tokenizer, vocab_size: int, where: str) -> dict[str, Any]:
    """Keys `tokenizer.ggml.*` of a byte-level or a SentencePiece-style BPE, padded to `vocab_size` tokens.

    Raises CheckpointError, naming `where`, for a tokenizer that llama.cpp has no equal of.
    """
    stored = json.loads(tokenizer.backend.to_str())
    if stored["model"].get("type") != "BPE":
        raise CheckpointError(f"{where}: a {stored['model'].get('type')} tokenizer cannot be written to GGUF; BPE can")
    if tokenizer.encode("", add_special_tokens=True) != ([tokenizer.bos_id] if tokenizer.adds_bos else []):
        raise CheckpointError(f"{where}: this tokenizer puts more than bos around text, which llama.cpp's do not")
    added = {token["id"]: token for token in stored.get("added_tokens") or []}
    names = {token_id: name for name, token_id in stored["model"]["vocab"].items()}
    names |= {token_id: token["content"] for token_id, token in added.items()}
    tokens = [names.get(i, f"<|unused{i}|>") for i in range(vocab_size)]
    control = {i for i in range(vocab_size) if i not in names or added.get(i, {}).get("special")}
    kinds = [CONTROL if i in control else ADDED if i in added else NORMAL for i in range(vocab_size)]
    form = _sentencepiece if stored["model"].get("byte_fallback") else _byte_level
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
    }
    keys |= form(stored, tokens, kinds, where)
    if tokenizer.chat_template is not None:
        try:
            keys["tokenizer.chat_template"] = chat_template(tokenizer).source
        except DataError as error:
            _log.warning("%s: left out of the file: %s", where, error)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids["eot"] = next((i for i in end_ids(tokenizer) if i != tokenizer.eos_id), None)  # the one more that it knows
    return keys | {f"tokenizer.ggml.{role}_token_id": i for role, i in ids.items() if i is not None}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model.get("merges") or [])
    return [(left, right) for left, right in pairs]


def _byte_level(stored: Mapping[str, Any], tokens: list[str], kinds: list[int], where: str) -> dict[str, Any]:
    model = stored["model"]
    merges = [f"{left} {right}" for left, right in _merges(model)]
    splits = _splits(stored, where)
    name = _NAMES.get((splits, bool(model.get("ignore_merges"))))
    if name is None and merges:
        raise CheckpointError(f"{where}: llama.cpp has no name for how this tokenizer splits text: {splits}")
    if (stored.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise CheckpointError(f"{where}: this tokenizer changes text ({stored['normalizer']['type']}) before it splits")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name if merges else "default",
        # llama.cpp does not load a list without merges; this pair never meets
        "tokenizer.ggml.merges": merges or [f"{tokens[0]} {tokens[0]}"],
    }


def _splits(stored: Mapping[str, Any], where: str) -> str:
    """The first half of a key of `_NAMES`, or a description of another splitting."""
    splits = stored.get("pre_tokenizer") or {}
    steps = splits["pretokenizers"] if splits.get("type") == "Sequence" else [splits]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise CheckpointError(f"{where}: only byte-level BPE tokenizers, or SentencePiece's, can be written to GGUF")
    regex = last.get("use_regex", True)
    match steps[:-1]:
        case []:
            return "gpt2" if regex else "merges run across words"
        case [{"type": "Digits", "individual_digits": True}] if regex:
            return "digits + gpt2"
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}] if not regex:
            return str(pattern)
    return json.dumps(steps[:-1])


def _sentencepiece(stored: Mapping[str, Any], tokens: list[str], kinds: list[int], where: str) -> dict[str, Any]:
    """SentencePiece's BPE (Llama 2): llama.cpp merges any neighbours that together are a token, by its score.

    That is what a list of merges says when it has every way to make a token, one token after the other.
    """
    model = stored["model"]
    prefix = _space_prefix(stored, where)
    vocab, merges = model["vocab"], _merges(model)
    order: dict[str, int] = {}
    for position, (left, right) in enumerate(merges):
        joined = left + right
        if joined in order and merges[position - 1][0] + merges[position - 1][1] != joined:
            raise CheckpointError(f"{where}: merges that make '{joined}' are not listed together, as by SentencePiece")
        order.setdefault(joined, len(order))
    listed, known = set(merges), set(tokens)
    for token in tokens:
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token))):
            if left in known and right in known and (left, right) not in listed:
                raise CheckpointError(f"{where}: '{left}' and '{right}' do not merge, as they would in llama.cpp")
    if ADDED in kinds:
        raise CheckpointError(f"{where}: '{tokens[kinds.index(ADDED)]}' is an added token that is not special")
    found = {}
    for i, token in enumerate(tokens):
        if match := _BYTE.fullmatch(token):
            kinds[i], found[match[1]] = BYTE, i
    if len(found) != 256:
        raise CheckpointError(f"{where}: has {len(found)} of the 256 tokens for single bytes")
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(order.get(token, len(order))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    if (unknown := vocab.get(model.get("unk_token"))) is not None:
        kinds[unknown] = UNKNOWN
        keys["tokenizer.ggml.unknown_token_id"] = unknown
    return keys


def _space_prefix(stored: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put in front of text; spaces must become the mark of SentencePiece and words not be split."""
    normalizer, splits = stored.get("normalizer") or {}, stored.get("pre_tokenizer") or {}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = normalizer.get("normalizers", [normalizer])
    if not splits and steps == [{"type": "Prepend", "prepend": _SPACE}, replace]:
        return True
    if not splits and steps == [replace]:
        return False
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never", "split": False}
    if not normalizer and splits == metaspace:
        return False
    raise CheckpointError(f"{where}: this tokenizer prepares text in another way than SentencePiece's BPE")
