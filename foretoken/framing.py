"""Documents to tokens: how a text is framed, which of its tokens are targets, and how many bytes these stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretoken.chat import chat_template
from foretoken.sources import Document
from foretoken.tokenizer import Tokenizer, utf8


class Framed(NamedTuple):
    """A document as training reads it.

    masked: leading tokens that are no targets; gaps: starts and ends of further ones, in order. text_bytes: UTF-8 bytes
    of the text that the targets stand for.
    """

    ids: NDArray[Any]
    masked: int
    gaps: list[int]
    text_bytes: int


def framed(tokenizer: Tokenizer, documents: Sequence[Document], dtype: str) -> list[Framed]:
    """Each document as bos, prompt, text, eos if not cut, or by the chat template, which may raise DataError."""
    bos = np.array([tokenizer.bos_id] if tokenizer.adds_bos else [], dtype)
    eos = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype)
    plain = [document for document in documents if not document.messages]
    alone = iter(_ids(tokenizer, [document.text for document in plain if not document.prompt], dtype))
    behind = iter(_ids(tokenizer, [document.text for document in plain if document.prompt], dtype, behind=True))
    prompts = iter(_ids(tokenizer, [document.prompt for document in plain], dtype))
    talks = [(document.name, document.messages) for document in documents if document.messages]
    chats = iter(chat_template(tokenizer).encode(talks) if talks else [])
    found = []
    for document in documents:
        if document.messages:
            chat = next(chats)
            found.append(Framed(chat.ids.astype(dtype), *_without(chat.targets), chat.text_bytes))
        else:
            prompt, text = next(prompts), next(behind if document.prompt else alone)
            masked = len(bos) + len(prompt) if document.prompt else 0
            ids = np.concatenate([bos, prompt, text, eos[:0] if document.cut else eos])
            found.append(Framed(ids, masked, [], len(utf8(document.text))))
    return found


def scored(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[bool], int]:
    """A document as evaluation reads it: its tokens, whether each is a target, and the UTF-8 bytes of these.

    Text alone is a target, neither eos nor what ends an assistant's turn.
    """
    if document.messages:
        (chat,) = chat_template(tokenizer).encode([(document.name, document.messages)])
        is_text = chat.targets & ~np.isin(chat.ids, [*tokenizer.special_ids])
        return chat.ids.tolist(), is_text.tolist(), chat.text_bytes
    before = [tokenizer.bos_id] if tokenizer.bos_id is not None and tokenizer.adds_bos else []
    before += tokenizer.encode(document.prompt)
    (text,) = (tokenizer.encode_behind if document.prompt else tokenizer.encode_batch)([document.text])
    return before + text, [False] * len(before) + [True] * len(text), len(utf8(document.text))


def _without(targets: NDArray[np.bool_]) -> tuple[int, list[int]]:
    """Where no targets are: how many tokens lead, and starts and ends of the gaps behind them."""
    masked, *gaps = [*np.flatnonzero(np.diff(targets, prepend=False)).tolist(), len(targets)]
    return masked, gaps[: len(gaps) // 2 * 2]  # without the end where it is a target


def _ids(tokenizer: Tokenizer, texts: list[str], dtype: str, behind: bool = False) -> list[NDArray[Any]]:
    if tokenizer.kind == "bytes":  # as encode_batch, without a Python integer per byte
        return [np.frombuffer(utf8(text), np.uint8).astype(dtype) for text in texts]
    return [np.array(ids, dtype) for ids in (tokenizer.encode_behind if behind else tokenizer.encode_batch)(texts)]
