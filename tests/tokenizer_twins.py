"""Small tokenizers in the forms of published ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from foretoken.tokenizer import Tokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3, QWEN_2 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}", rf"{WORDS}|\p{{N}}|{REST}"
LLAMA_2_FIRST = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WHOLE = "Ġzebra"  # a token that no merges lead to


def byte_level(
    texts: Iterable[str], size: int, regex: str = "", digits: bool = False, whole: bool = False
) -> Tokenizer:
    """A byte-level BPE split by `regex`, else by GPT-2's; digits: alone. whole: a word that is a token stays whole."""
    backend = Backend(models.BPE(ignore_merges=whole))
    if regex:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated"), last]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if regex == QWEN_2:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    stored = json.loads(backend.to_str())
    stored["model"]["vocab"][WHOLE] = len(stored["model"]["vocab"])
    return _framed(Backend.from_str(json.dumps(stored)), "<|begin|>", "<|end|>")


def sentencepiece(texts: Iterable[str], size: int) -> Tokenizer:
    """Llama 2's form: text with a space in front, whole, spaces as ▁; all merges of a token; bytes for the rest."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(backend.to_str())["model"]
    pieces = sorted((token for token in learned["vocab"] if len(token) > 1), key=learned["vocab"].__getitem__)
    letters = [token for token in learned["vocab"] if len(token) == 1]
    names = [*LLAMA_2_FIRST, *pieces, *letters]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [
        (token[:cut], token[cut:])
        for token in pieces
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return llama_2(names, merges)


def llama_2(names: Iterable[str], merges: Iterable[tuple[str, str]], chat_template: str | None = None) -> Tokenizer:
    """Llama 2's shape: spaces as U+2581 with one in front of every piece of text, bytes for what is no token.

    names: the tokens by id, of which the first are <unk>, <s> and </s>.
    """
    vocab = {name: i for i, name in enumerate(names)}
    backend = Backend(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>"])
    return replace(_framed(backend, "<s>", "</s>"), chat_template=chat_template)


def _framed(backend: Backend, bos: str, eos: str) -> Tokenizer:
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (bos, eos)])
    first = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, first)]
    )
    return Tokenizer(backend, first, backend.token_to_id(eos), None)
