"""SentencePiece's tokenizer.model, of the kind that Llama 1 and 2 have: byte pairs by score, bytes for what is rare.

The file is a protobuf message (sentencepiece_model.proto, Kudo and Richardson 2018), read here without its library.
Other kinds are refused, since they would not give the same ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from foretoken.errors import DataError
from foretoken.tokenizer import Tokenizer, frame

_BPE = 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.type
_SPACE = "▁"

Message = dict[int, list[int | bytes]]  # values by the number of their field


def load_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.model: for any text the ids that SentencePiece gives.

    Raises DataError for a file that is missing, damaged, or of a kind that gives other ids in this form.
    """
    where = f"tokenizer {path}"
    try:
        message = _message(path.read_bytes())
        pieces = [_piece(raw) for raw in message.get(1, [])]
        trainer, normalizer = (_message(_bytes(message, number)) for number in (2, 3))
    except OSError as error:
        raise DataError(f"{where}: {error.strerror}") from None
    except (ValueError, KeyError):
        raise DataError(f"{where}: not a complete SentencePiece model") from None
    _refuse_other_kinds(pieces, trainer, normalizer, where)
    prefixed = bool(_number(normalizer, 3, 1))  # add_dummy_prefix
    unknown = next(piece for piece, _, kind in pieces if kind == _UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, (piece, _, _) in enumerate(pieces)}, merges=_merges(pieces), unk_token=unknown,
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    specials = [piece for piece, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in specials])
    ids = [_number(trainer, field, default) for field, default in ((41, 1), (42, 2), (43, -1))]
    bos, eos, pad = (i if 0 <= i < len(pieces) else None for i in ids)
    if bos is not None:
        frame(backend, pieces[bos][0])
    return Tokenizer(backend, bos, eos, pad)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best score first."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == _NORMAL}
    found: list[tuple[float, int, int, int]] = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-pieces[i][1], i, left, right))
    return [(pieces[left][0], pieces[right][0]) for _, _, left, right in sorted(found)]


def _refuse_other_kinds(
    pieces: list[tuple[str, float, int]], trainer: Message, normalizer: Message, where: str
) -> None:
    kinds = {kind for _, _, kind in pieces}
    reasons = {
        "it has no unknown piece": _UNKNOWN not in kinds,
        "it is no BPE": _number(trainer, 3, 1) != _BPE,
        "it has no bytes for rare characters (byte_fallback)": _BYTE not in kinds,
        "it has user-defined or unused pieces": bool(kinds - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}),
        "it normalises text": any(normalizer.get(2, [])) or any(normalizer.get(6, [])),
        "it drops spaces (remove_extra_whitespaces)": bool(_number(normalizer, 4, 1)),
        "it does not mark spaces (escape_whitespaces)": not _number(normalizer, 5, 1),
        "it marks spaces behind words": bool(_number(trainer, 24, 0)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise DataError(f"{where}: {reason}; only models like those of Llama 1 and 2 can be read")


def _piece(raw: int | bytes) -> tuple[str, float, int]:
    """Text, score and type of a piece."""
    if isinstance(raw, int):
        raise ValueError
    message = _message(raw)
    score: float = struct.unpack("<f", _bytes(message, 2))[0] if 2 in message else 0.0
    return _bytes(message, 1).decode("utf-8"), score, _number(message, 3, _NORMAL)


def _number(message: Message, field: int, default: int) -> int:
    value = message.get(field, [default])[-1]
    if isinstance(value, bytes):
        raise ValueError
    return value - (1 << 64) if value >> 63 else value


def _bytes(message: Message, field: int) -> bytes:
    value = message[field][-1]
    if isinstance(value, int):
        raise ValueError
    return value


def _message(data: bytes) -> Message:
    fields: Message = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message in order: a whole number, or bytes, each with its number."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if at + size > len(data):
            raise ValueError
        yield number, data[at : at + size]
        at += size
