"""What a model is worth on text: bits per byte, the heads' losses and agreement, predicted tokens per step, by domain.

1. A document is framed as in training: bos, prompt, text. Its text tokens are the targets; eos predicts nothing here.
   Of a conversation the targets are what the assistant says.
2. Long documents are read in overlapping windows; a position counts in the first window that holds it.
3. One pass gives every head's loss and first choice at every position, a chunk of logits at a time (`_score`).
4. Each document is summed on its own (`_tally`); figures pool the sums, intervals resample documents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from foretoken.checkpoint import recorded_recipe
from foretoken.config import DataConfig, validated
from foretoken.errors import CheckpointError, ConfigError, DataError
from foretoken.framing import scored
from foretoken.loss import CHUNK_ELEMENTS, IGNORE, targets
from foretoken.model import Model
from foretoken.sources import Document, require_records, same_files, split_documents
from foretoken.sources import documents as read_documents
from foretoken.tokenizer import Tokenizer

# A document's sums. Per head (4, n): nats, targets, correct and agreeing first choices. Whole (4,): tokens and bytes
# of its text, tokens covered and steps taken by the walk.
_Row = tuple[NDArray[np.float64], NDArray[np.float64]]
GROUP_BATCHES = 8  # batches' worth of windows that are sorted by length, so that those in a batch need little padding


@dataclass(frozen=True)
class HeadScores:
    """One head's figures, token-weighted over all documents; all but `count` are None for a head with no target.

    offset: i of head i, which predicts i tokens ahead. loss: nats per token. bits_per_byte: the loss in bits x text
    tokens / UTF-8 bytes of text; head i cannot predict the first i - 1 tokens of a text with no prompt, so its mean
    over those it can predict stands for all. interval: 95 % of bits_per_byte when documents are drawn again; None for
    a domain. top1: the first choice is the text. agreement: it is head 1's own first choice for that token, given the
    true text up to it. count: targets scored.
    """

    offset: int
    bits_per_byte: float | None
    interval: tuple[float, float] | None
    loss: float | None
    top1: float | None
    agreement: float | None
    count: int


@dataclass(frozen=True)
class Scores:
    """Figures of a set of documents; `bytes` are those of their texts alone.

    predicted_tokens_per_step walks through each text as greedy decoding does: where a step stands, the drafts of heads
    2, 3, ... count as accepted up to the first that is not head 1's choice there, and the next step stands behind
    them and one token more. On text that the model wrote greedily this is the generation's own tokens per step. On
    other text it is usually lower: head 1 reads the text where the drafts went on from the model's own choices, and
    the model's own text is the easier one to foresee. A sequential head reads the text too. 1.0 where no text has two
    tokens.
    """

    documents: int
    bytes: int
    heads: tuple[HeadScores, ...]
    predicted_tokens_per_step: float


@dataclass(frozen=True)
class Evaluation(Scores):
    """All documents, and each domain that their records name."""

    domains: dict[str, Scores]

    def to_json(self) -> dict[str, Any]:
        """The fields under their names, as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def evaluation_documents(
    checkpoint: str | Path, sources: Sequence[str] = (), split: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Iterator[Document]:  # fmt: skip
    """The documents to score a checkpoint on.

    Without `sources`, or with those that it was trained on, spelled as they may be: what its training held out, or what
    else `split` names. Other sources: the part `split` names, by default all. fields: of records, as `DataConfig` names
    them. Raises DataError, and ConfigError, too, where there are fields and no records.
    """
    if split not in (None, "all", "train", "validation"):
        raise ConfigError(f"--split {split}: must be all, train or validation")
    recipe = recorded_recipe(checkpoint)
    trained_on = dict(recipe["data"]) if recipe else None
    if trained_on and (not sources or (split != "all" and same_files(sources, trained_on.get("source", ())))):
        config = validated(DataConfig, trained_on | dict(fields or {}), "foretoken.json and options: data")
        split = split or "validation"
    elif sources:
        config = validated(DataConfig, {"source": list(sources), **(fields or {})}, "options")
    else:
        raise DataError(f"{checkpoint}: does not record what it was trained on; name the data to evaluate on")
    require_records(config, fields or {})
    if split in (None, "all"):
        yield from read_documents(config, (*config.source, *config.validation))
    else:
        yield from (document for document, part in split_documents(config) if part == split)


def evaluate(
    model: Model, documents: Iterable[Document], tokenizer: Tokenizer, *, seq_len: int | None = None,
    stride: int | None = None, batch_size: int = 8, max_bytes: int | None = None, bootstrap: int = 1000,
    seed: int = 0, progress: Callable[[int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Score `documents` (their text, prompt and domain) with every head of `model`, in the model's own type.

    seq_len: tokens per window, by default all the model's positions. stride: positions from a window to the next, by
    default half of it; a position that has them sees at least seq_len - stride tokens before it. batch_size: windows
    at a time. max_bytes: no document is begun after that many bytes of text. bootstrap: draws behind each interval,
    the same documents for every head. `progress` hears about how many bytes of text are scored.

    Raises ConfigError for a window the model cannot run, DataError where there is nothing to score, CheckpointError for
    a loss that is no number.
    """
    seq_len = model.config.max_position_embeddings if seq_len is None else seq_len
    stride = max(1, seq_len // 2) if stride is None else stride
    budget = math.inf if max_bytes is None else max_bytes
    _check(model, tokenizer, seq_len, stride, batch_size=batch_size, max_bytes=budget, bootstrap=bootstrap)
    rows, domains, done = list[_Row](), list[str | None](), 0.0
    records = _records(documents, tokenizer, model.config.n_future, budget)
    for group, windows in _groups(records, seq_len, stride, GROUP_BATCHES * batch_size):
        windows.sort(key=lambda window: window.stop - window.start, reverse=True)
        for start in range(0, len(windows), batch_size):
            done += _run(model, windows[start : start + batch_size])
            if progress is not None:
                progress(round(done))
        rows += [_tally(record) for record in group]
        domains += [record.domain for record in group]
    if not done:
        raise DataError("nothing to evaluate: there is no document, or none whose text has a token with one before it")
    total = _scores(rows, _intervals(rows, bootstrap, seed))
    names = dict.fromkeys(name for name in domains if name is not None)
    by_domain = {name: _scores([row for row, its in zip(rows, domains, strict=True) if its == name]) for name in names}
    return Evaluation(total.documents, total.bytes, total.heads, total.predicted_tokens_per_step, by_domain)


def _check(model: Model, tokenizer: Tokenizer, seq_len: int, stride: int, **others: float) -> None:
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    if tokenizer.vocab_size > vocab:
        raise ConfigError(f"tokenizer of {tokenizer.vocab_size} tokens, model of {vocab}; use the model's own")
    if not 1 <= seq_len <= limit:
        raise ConfigError(f"seq_len = {seq_len} must be from 1 to the model's {limit} positions")
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"stride = {stride} must be from 1 to seq_len = {seq_len}")
    for name, value in others.items():
        if value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")


@dataclass(eq=False)
class _Record:
    """A document of L tokens on its way: tokens (L,), and by head and position (n, L) labels, losses, first choices."""

    tokens: Tensor
    labels: Tensor
    nll: Tensor
    choices: Tensor
    text_tokens: int
    text_bytes: int
    domain: str | None


class _Window(NamedTuple):
    """Positions start..stop-1 of a record; those before `fresh` are context and counted in an earlier window."""

    record: _Record
    start: int
    fresh: int
    stop: int


def _records(documents: Iterable[Document], tokenizer: Tokenizer, n: int, max_bytes: float) -> Iterator[_Record]:
    total = 0
    for document in documents:
        ids, is_text, size = scored(tokenizer, document)
        if not any(is_text):
            continue
        tokens = torch.tensor(ids)
        labels = _aligned(tokens, torch.tensor(is_text), n)
        nll, choices = torch.zeros(labels.shape, dtype=torch.float64), torch.full_like(labels, -1)
        yield _Record(tokens, labels, nll, choices, sum(is_text), size, document.domain)
        total += size
        if total >= max_bytes:
            return


def _aligned(tokens: Tensor, is_target: Tensor, n: int) -> Tensor:
    """`targets` of one whole document, tokens (L,) -> (n, L)."""
    padded = F.pad(torch.stack([tokens, torch.zeros_like(tokens), is_target.long()]), (0, n))
    padded[1, len(tokens) :] = -1
    return targets(padded[:1], padded[1:2], padded[2:].bool(), n)[:, 0]


def _groups(
    records: Iterable[_Record], seq_len: int, stride: int, size: int
) -> Iterator[tuple[list[_Record], list[_Window]]]:
    """Whole documents with their windows, about `size` windows at a time."""
    group, windows = list[_Record](), list[_Window]()
    for record in records:
        group.append(record)
        windows += _windows(record, seq_len, stride)
        if len(windows) >= size:
            yield group, windows
            group, windows = [], []
    if group:
        yield group, windows


def _windows(record: _Record, seq_len: int, stride: int) -> Iterator[_Window]:
    """Windows in which every position is fresh once; one without a fresh target is left out."""
    length, fresh, start = len(record.tokens), 0, 0
    while fresh < length:
        stop = min(start + seq_len, length)
        if (record.labels[:, fresh:stop] != IGNORE).any():
            yield _Window(record, start, fresh, stop)
        fresh, start = stop, start + stride


@torch.inference_mode()
def _run(model: Model, batch: Sequence[_Window]) -> float:
    """Fill in the records' losses and choices at the fresh positions of these windows; returns their bytes of text."""
    B, T = len(batch), max(window.stop - window.start for window in batch)
    n = model.config.n_future
    tokens = torch.zeros(B, T + n - 1, dtype=torch.int64)  # padding stands behind all that counts
    labels = torch.full((n, B, T), IGNORE)
    for row, w in enumerate(batch):
        read = w.record.tokens[w.start : w.stop + n - 1]  # a sequential head is fed what stands behind the window
        tokens[row, : len(read)] = read
        labels[:, row, w.fresh - w.start : w.stop - w.start] = w.record.labels[:, w.fresh : w.stop]
    hidden = model(tokens.to(model.device), length=T)
    nll, choices = (part.cpu() for part in _score(model, hidden, labels.to(model.device)))
    for depth, total in enumerate(nll.sum((1, 2)).tolist()):
        if not math.isfinite(total):
            raise CheckpointError(f"the loss of head {depth + 1} is {total}: weights are no numbers, or overflow")
    size = 0.0
    for row, w in enumerate(batch):
        inside = slice(w.fresh - w.start, w.stop - w.start)
        w.record.nll[:, w.fresh : w.stop] = nll[:, row, inside]
        w.record.choices[:, w.fresh : w.stop] = choices[:, row, inside]
        size += int((labels[0, row] != IGNORE).sum()) * w.record.text_bytes / w.record.text_tokens
    return size


def _score(model: Model, hidden: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats (n, B, T) float64 and first choice (n, B, T) at every target; 0 and -1 where there is none.

    hidden: n normalised states (B, T, D); labels (n, B, T) from `targets`. Logits are held for one chunk of positions.
    """
    nll = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device).flatten(1)
    choices = torch.full_like(labels, -1).flatten(1)
    rows = max(1, CHUNK_ELEMENTS // 4 // model.config.vocab_size)
    for d, (states, wanted) in enumerate(zip(hidden, labels.flatten(1), strict=True)):
        for part in (wanted != IGNORE).nonzero()[:, 0].split(rows):
            logits = model.logits(states.flatten(0, 1)[part], d)  # (rows, V)
            nll[d, part] = F.cross_entropy(logits, wanted[part], reduction="none").double()
            choices[d, part] = logits.argmax(-1)
    return nll.view(labels.shape), choices.view(labels.shape)


def _tally(record: _Record) -> _Row:
    counted = record.labels != IGNORE
    agrees, accepted = agreements(record.choices, record.labels)
    sums = (record.nll, counted, record.choices == record.labels, agrees)
    per_head = np.stack([part.sum(1).double().numpy() for part in sums])
    positions = counted[0].nonzero()[:, 0]
    turns = accepted[positions].tensor_split((positions.diff() > 1).nonzero()[:, 0] + 1)  # an assistant's, or one text
    walked = np.sum([walk(turn.tolist()) for turn in turns], axis=0)
    return per_head, np.array([record.text_tokens, record.text_bytes, *walked], dtype=np.float64)


def agreements(choices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a document's heads choose as head 1 does, from choices and labels (n, L) by head and position.

    Returns agrees (n, L), false where there is no target, and how many drafts made at each position are accepted (L,).
    """
    n, L = labels.shape
    # Head 1's choice at position t stands at t + 1: as a token sequence, `targets` aligns it with every head.
    chosen, is_target = F.pad(choices[0], (1, 0)), F.pad(labels[0] != IGNORE, (1, 0))
    agrees = choices == _aligned(chosen, is_target, n)[:, :L]
    return agrees, agrees[1:].int().cumprod(0).sum(0)


def walk(accepted: Sequence[int]) -> tuple[int, int]:
    """Tokens covered and steps taken, from how many drafts are accepted at the position of each token's head 1.

    As in decoding, the first token comes from the prefill, which is no step, and the end of the text cuts the last.
    """
    position, last, covered, steps = 0, len(accepted) - 1, 0, 0
    while position < last:
        advance = min(accepted[position] + 1, last - position)
        position, covered, steps = position + advance, covered + advance, steps + 1
    return covered, steps


def _scores(rows: Sequence[_Row], intervals: Sequence[tuple[float, float] | None] | None = None) -> Scores:
    tokens, size, covered, steps = np.sum([whole for _, whole in rows], axis=0).tolist()
    heads = []
    for d, (nats, count, correct, agreed) in enumerate(np.sum([per_head for per_head, _ in rows], axis=0).T.tolist()):
        if count == 0:
            heads.append(HeadScores(d + 1, None, None, None, None, None, 0))
            continue
        loss, interval = nats / count, intervals[d] if intervals else None
        bits = loss / math.log(2) * tokens / size
        heads.append(HeadScores(d + 1, bits, interval, loss, correct / count, agreed / count, int(count)))
    return Scores(len(rows), int(size), tuple(heads), covered / steps if steps else 1.0)


def _intervals(rows: Sequence[_Row], draws: int, seed: int) -> list[tuple[float, float] | None]:
    """95 % percentile interval of each head's bits per byte over draws of as many documents, with replacement."""
    table = np.stack([np.concatenate((per_head[0], per_head[1], whole[:2])) for per_head, whole in rows])
    random, documents = np.random.Generator(np.random.PCG64(seed)), len(rows)
    drawn = np.empty((draws, table.shape[1]))
    for sums in drawn:  # one draw at a time: all at once would be draws x documents numbers
        sums[:] = np.bincount(random.integers(documents, size=documents), minlength=documents) @ table
    nats, counts = np.split(drawn[:, :-2], 2, axis=1)  # (draws, n) each
    intervals: list[tuple[float, float] | None] = []
    for total, count in zip(nats.T, counts.T, strict=True):
        some = count > 0  # a draw may miss the few documents that have targets for this head
        bits = total[some] / count[some] / math.log(2) * drawn[some, -2] / drawn[some, -1]
        intervals.append((float(np.quantile(bits, 0.025)), float(np.quantile(bits, 0.975))) if some.any() else None)
    return intervals
