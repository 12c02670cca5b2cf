"""Text to token ids and back: bytes, or any `tokenizer.json`, behind one class.

Both kinds are a `tokenizers.Tokenizer` inside, so a saved directory is what `transformers.AutoTokenizer` loads, with
the same ids. Text is always text: a document that spells `<|eos|>` out encodes to those characters, never to the
special token, whatever it came from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from foretoken.config import TokenizerConfig
from foretoken.errors import ConfigError, DataError
from foretoken.files import read_json

_SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
_USUAL_NAMES = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}
_LEAD = "\0"  # no token of a text begins with it
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One vocabulary. `bos_id`, `eos_id` and `pad_id` are None where it has no such token.

    further_ends: tokens that end a text beside eos, as generation_config.json or config.json lists them.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: Any = None
    further_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Published files carry these settings along; a document must neither be cut nor padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; with `add_special_tokens`, as the post-processor frames it (ours: bos in front).

        Raises DataError for text that has no UTF-8 form (a lone surrogate).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of every text, on all cores where the tokenizer is a file."""
        if self.kind == "bytes":
            start = self.backend.encode("").ids if add_special_tokens else []
            return [[*start, *utf8(text)] for text in texts]
        for text in texts:
            utf8(text)
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_behind(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of texts that each stand behind another one, so that no space is put in front of them."""
        lead = self._lead
        found = self.encode_batch([_LEAD + text for text in texts] if lead else texts)
        pairs = zip(found, texts, strict=True)
        return [ids[len(lead) :] if ids[: len(lead)] == lead else self.encode(text) for ids, text in pairs]

    @cached_property
    def _lead(self) -> list[int]:
        """Ids of _LEAD where a text alone gets a space in front, as SentencePiece has it; else none."""
        lead = self.encode(_LEAD)
        return lead if self.encode(_LEAD + "x")[len(lead) :] != self.encode("x") else []

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for ids that arrive one at a time."""
        return TextStream(self, skip_special_tokens)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, so that an embedding of this many rows has one for every token."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out when it skips special tokens."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def kind(self) -> str:
        """'bytes' when ids 0..255 are the bytes of UTF-8 and nothing is merged, else 'file'."""
        plain = self.vocab_size == 260 and _canonical(self.backend) == _canonical(_byte_backend())
        return "bytes" if plain else "file"

    @property
    def adds_bos(self) -> bool:
        """Whether `encode(text, add_special_tokens=True)` puts bos in front."""
        return self.bos_id is not None and self.backend.encode("").ids[:1] == [self.bos_id]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides an id; equal for two tokenizers that encode alike."""
        specials = f"{self.bos_id} {self.eos_id} {self.pad_id}"
        return hashlib.sha256(f"{_canonical(self.backend)}\n{specials}".encode()).hexdigest()

    def save(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer` and `load` read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is None:  # whose marks would be split, too
            values["split_special_tokens"] = True  # there as here, text that spells a special token is text
        for role, token_id in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
            values[f"{role}_token"] = None if token_id is None else self.backend.id_to_token(token_id)
        optional = {"model_max_length": model_max_length, "chat_template": self.chat_template}
        values.update({key: value for key, value in optional.items() if value is not None})
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class TextStream:
    """Ids in, one at a time; text out. All that `push` and `finish` return, joined, is `decode` of the ids.

    A step decodes a window of the newest ids, not all of them: those last given out come along, because a decoder
    may treat the first token apart (drop its leading space). A piece waits while it could still change: while it
    ends in U+FFFD, and to the end of a run of byte-fallback tokens, where one invalid byte spoils all.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._given: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id makes certain: '' while a character is incomplete."""
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        if token is None:
            return ""
        self._waiting.append(token_id)
        text = "" if _BYTE_TOKEN.fullmatch(token) else self.finish()
        if not text or text.endswith("\ufffd"):
            return ""
        self._given, self._waiting = self._waiting, []
        return text

    def finish(self) -> str:
        """What still waits, an unfinished character as U+FFFD."""
        if not self._waiting:
            return ""
        before = self._backend.decode(self._given, skip_special_tokens=False)
        after = self._backend.decode(self._given + self._waiting, skip_special_tokens=False)
        return after[len(before) :]


def byte_tokenizer() -> Tokenizer:
    """Bytes of UTF-8 as ids 0..255, then <|bos|>, <|eos|>, <|pad|> and one unused token: 260 in all."""
    return Tokenizer(_byte_backend(), bos_id=256, eos_id=257, pad_id=258)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting, learned from `texts`; every text encodes, whatever it was trained on.

    The vocabulary is smaller than `vocab_size` where the texts hold too few pairs. Raises ConfigError below 259.
    """
    least = 256 + len(_SPECIALS)
    if vocab_size < least:
        raise ConfigError(f"vocab_size = {vocab_size} is too small: 256 bytes and {len(_SPECIALS)} specials = {least}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    frame(backend, _SPECIALS[0])
    bos, eos, pad = (backend.token_to_id(name) for name in _SPECIALS)
    return Tokenizer(backend, bos, eos, pad)


def from_config(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a recipe's [tokenizer] names."""
    return byte_tokenizer() if config.path is None else load(config.path)


def load(path: str | Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, or the directory that holds one, with the JSON files beside it.

    bos, eos and pad are what tokenizer_config.json or special_tokens_map.json name, else the ids in
    generation_config.json or config.json, else the usual names. Raises DataError, and for JSON beside it
    CheckpointError, where a file is missing or damaged.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"tokenizer {file}: {error.strerror}") from None
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"tokenizer {file}: not a tokenizer.json: {error}") from None
    beside: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (path := file.with_name(name)).exists():
            beside |= read_json(path)
    bos, eos, pad = (_special_id(backend, role, beside, file) for role in ("bos", "eos", "pad"))
    template = file.with_name("chat_template.jinja")
    try:
        chat_template = template.read_text(encoding="utf-8") if template.is_file() else beside.get("chat_template")
    except UnicodeDecodeError as error:
        raise DataError(f"{template}: invalid UTF-8 at byte {error.start}") from None
    ends = beside.get("eos_token_id")
    further = tuple(i for i in ends if i != eos and _known(backend, i)) if isinstance(ends, list) else ()
    return Tokenizer(backend, bos, eos, pad, chat_template, further)


def utf8(text: str) -> bytes:
    """The UTF-8 of `text`; raises DataError where a lone surrogate leaves it without one."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"text has a lone surrogate at character {error.start}, which UTF-8 cannot hold") from None


def _byte_backend() -> tokenizers.Tokenizer:
    # GPT-2's printable stand-in for every byte: itself where printable, else the next from U+0100 on
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (*_SPECIALS, "<|unused|>")])
    frame(backend, _SPECIALS[0])
    return backend


def frame(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Have the post-processor put the token `bos` in front."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _canonical(backend: tokenizers.Tokenizer) -> str:
    return json.dumps(json.loads(backend.to_str()), sort_keys=True)


def _special_id(backend: tokenizers.Tokenizer, role: str, beside: dict[str, Any], file: Path) -> int | None:
    if f"{role}_token" in beside:
        token = beside[f"{role}_token"]
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str | None):
            raise DataError(f"tokenizer {file}: {role}_token = {name!r} in a file beside it; must be a token's text")
        return None if name is None else backend.token_to_id(name)
    ids = beside.get(f"{role}_token_id")
    for token_id in ids if isinstance(ids, list) else [ids]:
        if _known(backend, token_id):
            return token_id
    return next((i for i in map(backend.token_to_id, _USUAL_NAMES[role]) if i is not None), None)


def _known(backend: tokenizers.Tokenizer, token_id: object) -> TypeGuard[int]:
    return isinstance(token_id, int) and 0 <= token_id < 2**32 and backend.id_to_token(token_id) is not None
