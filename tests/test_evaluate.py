"""Evaluation held to a plain-loop twin, to generation itself, and to numbers written out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import recipe
from tokenizers import processors

from foretoken import evaluate as evaluation
from foretoken.completion import generate
from foretoken.config import DataConfig, ModelConfig, Unembedding
from foretoken.data import prepare
from foretoken.errors import ConfigError, DataError
from foretoken.evaluate import Evaluation, HeadScores, Scores, agreements, evaluate, evaluation_documents, walk
from foretoken.loss import IGNORE
from foretoken.model import Model
from foretoken.sources import Document
from foretoken.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from foretoken.train import train

BYTES = byte_tokenizer()
LETTERS = "abcd"


def make_model(
    n: int = 3, vocab: int = 260, positions: int = 128, seed: int = 0, unembedding: Unembedding = "shared"
) -> Model:
    """A float64 model of sharp choices that only ever picks one of LETTERS, or byte 0."""
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=positions,
        n_future=n,
        unembedding=unembedding,
    )
    model = Model(config).double()
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15)
        silent = torch.ones(vocab, dtype=torch.bool)
        silent[[ord(letter) for letter in LETTERS]] = False
        for matrix in model.unembeddings():
            matrix[silent] = 0.0
    return model.eval()


MODEL = make_model()
DOCUMENTS = [
    Document("abcabdda", "1"),
    Document("dcba" * 9, "2", prompt="once: ", domain="code"),
    Document("b", "3", domain="prose"),
    Document("aé∑b" * 5, "4", domain="prose"),
    Document("ca", "5", prompt="p"),
    Document("abcd" * 12 + "dd", "6", domain="code"),
]


def frame(document: Document) -> tuple[list[int], int]:
    """The bytes the model reads, and where the text begins."""
    before = [256, *document.prompt.encode()]
    return before + list(document.text.encode()), len(before)


def oracle(model: Model, documents: Sequence[Document], seq_len: int, stride: int) -> dict[str, Any]:
    """The definition, a token and a head at a time, each from a forward over its own context."""
    n = model.config.n_future
    nats, right, same, count = [0.0] * n, [0] * n, [0] * n, [0] * n
    covered = steps = 0
    for document in documents:
        ids, first = frame(document)
        outputs: dict[int, list[list[float]]] = {}
        for t in range(len(ids) - 1):
            start = 0
            while start + seq_len <= t:
                start += stride
            with torch.no_grad():
                states = model(torch.tensor([ids[start : t + 1]]))
                outputs[t] = [model.logits(state[0, -1], d).tolist() for d, state in enumerate(states)]
        choice: dict[tuple[int, int], int] = {}  # (head, target) -> first choice
        for p in range(first, len(ids)):
            for i in range(1, n + 1):
                if p - i < 0:
                    continue
                logits = outputs[p - i][i - 1]
                choice[i, p] = max(range(len(logits)), key=lambda v: (logits[v], -v))
                peak = max(logits)
                nats[i - 1] += peak + math.log(sum(math.exp(x - peak) for x in logits)) - logits[ids[p]]
                count[i - 1] += 1
                right[i - 1] += choice[i, p] == ids[p]
                same[i - 1] += choice[i, p] == choice[1, p]
        p = first  # the token that the prefill gave
        while p < len(ids) - 1:
            committed = 1  # the target's own token, behind the accepted drafts
            for i in range(2, n + 1):  # head i drafted, when p - 1 was the newest position, the token at p - 1 + i
                if p - 1 + i > len(ids) - 1 or choice[i, p - 1 + i] != choice[1, p - 1 + i]:
                    break
                committed += 1
            committed = min(committed, len(ids) - 1 - p)
            p, covered, steps = p + committed, covered + committed, steps + 1
    return {
        "loss": [total / k for total, k in zip(nats, count, strict=True)],
        "top1": [k / c for k, c in zip(right, count, strict=True)],
        "agreement": [k / c for k, c in zip(same, count, strict=True)],
        "count": count,
        "predicted_tokens_per_step": covered / steps,
    }


def assert_close(a: object, b: object) -> None:
    """Equal figures, whatever order they were summed in; intervals included."""
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-9) if isinstance(b, float) else b)


# ------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize(("n", "unembedding"), [(1, "shared"), (2, "shared"), (4, "shared"), (3, "per_head")])
def test_figures_are_the_definition_when_documents_fit_the_window(n: int, unembedding: Unembedding) -> None:
    model = make_model(n, seed=n, unembedding=unembedding)
    wanted = oracle(model, DOCUMENTS, seq_len=128, stride=128)
    found = evaluate(model, DOCUMENTS, BYTES, bootstrap=10)
    for key in ("loss", "top1", "agreement", "count"):
        assert [getattr(head, key) for head in found.heads] == pytest.approx(wanted[key], rel=1e-9), key
    assert found.predicted_tokens_per_step == pytest.approx(wanted["predicted_tokens_per_step"])
    assert [head.offset for head in found.heads] == [*range(1, n + 1)]
    assert found.heads[0].agreement == 1.0
    size = sum(len(d.text.encode()) for d in DOCUMENTS)
    assert (found.documents, found.bytes) == (len(DOCUMENTS), size)
    for head in found.heads:  # a byte is a token: bits per byte are bits per token
        assert head.loss is not None
        assert head.bits_per_byte == pytest.approx(head.loss / math.log(2))


@pytest.mark.parametrize(("seq_len", "stride"), [(8, 4), (8, 8), (7, 3), (12, 1), (1, 1), (16, None), (None, None)])
def test_long_documents_are_the_definition_given_each_position_its_window(
    seq_len: int | None, stride: int | None
) -> None:
    model = make_model(positions=20)
    found = evaluate(model, DOCUMENTS, BYTES, seq_len=seq_len, stride=stride, batch_size=3, bootstrap=10)
    length = seq_len or 20
    wanted = oracle(model, DOCUMENTS, length, stride or length // 2)
    for key in ("loss", "top1", "agreement", "count"):
        assert [getattr(head, key) for head in found.heads] == pytest.approx(wanted[key], rel=1e-9), key
    assert found.predicted_tokens_per_step == pytest.approx(wanted["predicted_tokens_per_step"])


@given(length=st.integers(0, 60), prompt=st.integers(0, 60), seq_len=st.integers(1, 20), data=st.data())
@settings(deadline=None, max_examples=60)
def test_every_target_is_fresh_in_one_window_with_enough_context(
    length: int, prompt: int, seq_len: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    document = Document("a" * (length + 1), "x", prompt="b" * prompt)
    (record,) = evaluation._records([document], BYTES, 3, math.inf)
    fresh = torch.zeros(len(record.tokens), dtype=torch.int64)
    for window in evaluation._windows(record, seq_len, stride):
        assert window.stop - window.start <= seq_len
        assert window.start == 0 or window.fresh - window.start >= seq_len - stride
        fresh[window.fresh : window.stop] += 1
    targets_at = (record.labels != IGNORE).any(0)
    assert (fresh[targets_at] == 1).all()
    assert (fresh <= 1).all()
    for i in range(1, 4):  # bos and the prompt stand before the text; head i needs i tokens before its target
        assert (record.labels[i - 1] != IGNORE).sum() == max(0, length + 1 - max(0, i - 1 - prompt))


def test_batch_stride_window_and_chunk_change_nothing_for_documents_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = evaluate(MODEL, DOCUMENTS, BYTES, bootstrap=50).to_json()
    for options in ({"batch_size": 1}, {"batch_size": 64}, {"stride": 128}, {"stride": 3}, {"seq_len": 70}):
        assert_close(evaluate(MODEL, DOCUMENTS, BYTES, bootstrap=50, **options).to_json(), wanted)
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", 1000)  # three positions' logits at a time
    monkeypatch.setattr(evaluation, "GROUP_BATCHES", 1)
    assert_close(evaluate(MODEL, DOCUMENTS, BYTES, bootstrap=50, batch_size=1).to_json(), wanted)


def test_documents_are_framed_as_in_training(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"q": d.prompt, "a": d.text}) + "\n" for d in DOCUMENTS))
    config = DataConfig(
        source=(str(path),),
        validation=(str(shutil.copy(path, tmp_path / "others.jsonl")),),
        prompt_field="q",
        response_field="a",
        cache_dir=str(tmp_path / "cache"),
    )
    trained = prepare(config, BYTES, "validation")
    records = [*evaluation._records(DOCUMENTS, BYTES, 2, math.inf)]
    assert len(records) == trained.documents
    for i, record in enumerate(records):
        assert [*record.tokens.tolist(), BYTES.eos_id] == trained.document(i).tolist()
        assert record.text_bytes == trained.text_bytes(i)
        may_be_target = trained.label_mask(i)[1:-1]  # the first token has nothing before it, eos is no text
        assert (record.labels[0, :-1] != IGNORE).tolist() == may_be_target.tolist()


def test_bits_per_byte_count_bytes_of_text_not_tokens() -> None:
    text = "the théâtre of the other thé. " * 3
    bpe = train_bpe([text], 280)
    model = make_model(2, vocab=bpe.vocab_size)
    found = evaluate(model, [Document(text, "x", prompt="the other prompt: ")], bpe, bootstrap=1)
    tokens, size = len(bpe.encode(text)), len(text.encode())
    assert tokens < len(text) < size == found.bytes
    for head in found.heads:
        assert head.count == tokens
        assert head.loss is not None
        assert head.bits_per_byte == pytest.approx(head.loss / math.log(2) * tokens / size)
        assert head.interval == pytest.approx([head.bits_per_byte] * 2)  # one document: every draw is the same


# ------------------------------------------------------------------------------------------------ the walk


def test_walk_worked_example() -> None:
    """One bos and seven tokens, three heads; a draft made at t by head i is held to head 1's choice at t + i - 1.

    position t        0  1  2  3  4  5  6  7
    head 1 chooses    1  2  3  4  5  6  7  -    for tokens 1..7
    head 2            2  3  0  5  0  7  -  -    right at 0, 1, 3, 5
    head 3            3  9  5  0  7  -  -  -    right at 0, 2, 4
    accepted          2  1  0  1  0  1  0       (at 2 and 4 head 3 is right behind a wrong head 2)

    The prefill gives token 1 at position 0. Step 1 accepts two drafts and covers tokens 2-4, step 2 at position 3
    accepts one and covers 5-6, step 3 at position 5 accepts one but token 7 is the last: 6 tokens in 3 steps.
    """
    none = -1
    choices = torch.tensor(
        [[1, 2, 3, 4, 5, 6, 7, none], [2, 3, 0, 5, 0, 7, none, none], [3, 9, 5, 0, 7, none, none, none]]
    )
    labels = torch.where(choices == none, IGNORE, 42)  # what the text says is of no matter
    agrees, accepted = agreements(choices, labels)
    assert accepted.tolist() == [2, 1, 0, 1, 0, 1, 0, 0]
    assert agrees.sum(1).tolist() == [7, 4, 3]
    assert walk(accepted[:7].tolist()) == (6, 3)


@pytest.mark.parametrize(
    ("accepted", "wanted"), [([], (0, 0)), ([3], (0, 0)), ([3, 0], (1, 1)), ([0, 0, 0], (2, 2)), ([9] * 5, (4, 1))]
)
def test_walk_at_the_ends(accepted: list[int], wanted: tuple[int, int]) -> None:
    assert walk(accepted) == wanted


@pytest.mark.parametrize("n", [1, 2, 4])
def test_on_its_own_greedy_text_the_prediction_is_the_generation(n: int) -> None:
    model = make_model(n, seed=7)
    prompts = ["abc", "", "b", "dddd", "hello ", "cab"]
    written = generate(model, BYTES, prompts, max_tokens=50, drafts=n - 1)
    committed = sum(step.committed for g in written for step in g.steps)
    steps = sum(len(g.steps) for g in written)
    assert n == 1 or committed / steps > 1.1  # otherwise no draft was accepted, and nothing is tested
    found = evaluate(model, [Document(g.text, "own", prompt=g.prompt) for g in written], BYTES, bootstrap=1)
    assert found.predicted_tokens_per_step == pytest.approx(committed / steps)
    assert found.heads[0].top1 == 1.0
    for head in found.heads:  # head 1 chose all of the text, so both are one question
        assert head.top1 == head.agreement


# ------------------------------------------------------------------------------------------------ intervals


def test_interval_holds_the_point_and_depends_on_the_seed_alone() -> None:
    documents = [Document(LETTERS[i % 4] * (5 + i) + "abcd", str(i)) for i in range(30)]
    first = evaluate(MODEL, documents, BYTES, seed=1)
    assert evaluate(MODEL, documents, BYTES, seed=1) == first
    other = evaluate(MODEL, documents, BYTES, seed=2)
    for head, again in zip(first.heads, other.heads, strict=True):
        assert head.interval is not None
        assert head.bits_per_byte is not None
        low, high = head.interval
        assert low < head.bits_per_byte < high
        assert head.bits_per_byte == again.bits_per_byte
        assert head.interval != again.interval


def rows(nats: np.ndarray[Any, Any]) -> list[Any]:
    """Documents of 100 tokens and bytes from nats (documents, n)."""
    return [(np.stack([row, *np.full((3, len(row)), 100.0)]), np.array([100.0, 100.0, 0, 0])) for row in nats]


def test_interval_is_paired_between_heads_and_has_the_right_width() -> None:
    bits = np.random.default_rng(0).normal(2.0, 0.5, size=400)  # per byte, of 400 documents
    nats = 100 * math.log(2) * bits
    first, double = evaluation._intervals(rows(np.stack([nats, 2 * nats], 1)), 2000, seed=0)
    assert first is not None
    assert double == pytest.approx([2 * edge for edge in first])
    error = bits.std() / math.sqrt(len(bits))
    assert first == pytest.approx([bits.mean() - 1.96 * error, bits.mean() + 1.96 * error], abs=0.15 * error)


def test_interval_of_one_document_is_a_point() -> None:
    (head, *_) = evaluate(MODEL, DOCUMENTS[:1], BYTES).heads
    assert head.interval == pytest.approx([head.bits_per_byte] * 2)


# ------------------------------------------------------------------------------------------------ domains, JSON


def test_domains_pool_back_to_the_total() -> None:
    named = [d for d in DOCUMENTS if d.domain is not None]
    found = evaluate(MODEL, named, BYTES, bootstrap=5)
    assert list(found.domains) == ["code", "prose"]
    parts = list(found.domains.values())
    assert found.documents == sum(p.documents for p in parts)
    assert found.bytes == sum(p.bytes for p in parts)
    for i, head in enumerate(found.heads):
        heads = [p.heads[i] for p in parts]
        assert head.count == sum(h.count for h in heads)
        for key in ("loss", "top1", "agreement"):
            assert sum(getattr(h, key) * h.count for h in heads) == pytest.approx(getattr(head, key) * head.count)
        assert all(h.interval is None for h in heads)
    walked = {name: sum(len(d.text.encode()) - 1 for d in named if d.domain == name) for name in found.domains}
    steps = sum(walked[name] / part.predicted_tokens_per_step for name, part in found.domains.items())
    assert found.predicted_tokens_per_step == pytest.approx(sum(walked.values()) / steps)


def test_a_domain_is_what_its_documents_alone_give() -> None:
    found = evaluate(MODEL, DOCUMENTS, BYTES, bootstrap=5)
    for name, part in found.domains.items():
        alone = evaluate(MODEL, [d for d in DOCUMENTS if d.domain == name], BYTES, bootstrap=5).to_json()
        del alone["domains"]
        for head in alone["heads"]:
            head["interval"] = None
        assert_close(plain(part), alone)
    unnamed = evaluate(MODEL, [d for d in DOCUMENTS if d.domain is None], BYTES, bootstrap=5)
    assert unnamed.domains == {}


def plain(part: Scores) -> dict[str, Any]:
    whole = Evaluation(part.documents, part.bytes, part.heads, part.predicted_tokens_per_step, {}).to_json()
    del whole["domains"]
    return whole


def test_json_shape() -> None:
    values = evaluate(MODEL, DOCUMENTS, BYTES, bootstrap=5).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    figures = ["documents", "bytes", "heads", "predicted_tokens_per_step"]
    head = ["offset", "bits_per_byte", "interval", "loss", "top1", "agreement", "count"]
    assert list(values) == [*figures, "domains"]
    assert list(values["domains"]["code"]) == figures
    for part in (values, *values["domains"].values()):
        assert len(part["heads"]) == MODEL.config.n_future
        assert all(list(h) == head for h in part["heads"])
    assert len(values["heads"][0]["interval"]) == 2


# ------------------------------------------------------------------------------------------------ edges, errors


def test_document_shorter_than_n_leaves_far_heads_without_figures() -> None:
    model = make_model(4)
    found = evaluate(model, [Document("ab", "x")], BYTES, bootstrap=20)
    assert [head.count for head in found.heads] == [2, 1, 0, 0]
    assert found.heads[3] == HeadScores(4, None, None, None, None, None, 0)
    assert found.heads[1].loss is not None
    json.dumps(found.to_json(), allow_nan=False)
    # One document has targets for head 4: draws without it are left out, and in all others the mean is that document's.
    mixed = evaluate(model, [Document("ab", "x")] * 5 + [Document("abcda", "y")], BYTES, bootstrap=20)
    assert mixed.heads[3].interval == pytest.approx([mixed.heads[3].bits_per_byte] * 2)


def test_one_token_of_text_takes_no_step() -> None:
    found = evaluate(MODEL, [Document("a", "x", prompt="some")], BYTES, bootstrap=5)
    assert [head.count for head in found.heads] == [1, 1, 1]
    assert found.predicted_tokens_per_step == 1.0


def test_max_bytes_ends_behind_the_document_that_reaches_it() -> None:
    def endless() -> Iterator[Document]:
        for i in range(3):
            yield Document("abcdabcdab", str(i))
        raise AssertionError("a fourth document was read")

    heard: list[int] = []
    found = evaluate(MODEL, endless(), BYTES, max_bytes=25, bootstrap=5, batch_size=1, progress=heard.append)
    assert (found.documents, found.bytes) == (3, 30)
    assert heard == [10, 20, 30]


def without_bos() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(BYTES.backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return Tokenizer(backend, BYTES.bos_id, BYTES.eos_id, BYTES.pad_id)


def test_without_bos_the_first_token_is_read_and_not_scored() -> None:
    found = evaluate(MODEL, [Document("abcd", "x")], without_bos(), bootstrap=5)
    assert [head.count for head in found.heads] == [3, 2, 1]
    assert found.bytes == 4
    head = found.heads[0]
    assert head.loss is not None
    assert head.bits_per_byte == pytest.approx(head.loss / math.log(2))  # the mean stands for all four


def test_nothing_to_score_is_one_line() -> None:
    for documents, tokenizer in (
        ([], BYTES),
        ([Document("", "empty", prompt="a prompt")], BYTES),
        ([Document("a", "x")], without_bos()),
    ):
        with pytest.raises(DataError, match=r"^nothing to evaluate[^\n]*$"):
            evaluate(MODEL, documents, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 129}, "seq_len = 129 must be from 1 to the model's 128 positions"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"stride": 0}, "stride = 0 must be from 1 to seq_len = 128"),
        ({"seq_len": 8, "stride": 9}, "stride = 9"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_bytes": 0}, "max_bytes = 0"),
        ({"bootstrap": 0}, "bootstrap = 0"),
    ],
)
def test_options_that_cannot_be_are_one_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(MODEL, DOCUMENTS, BYTES, **options)  # type: ignore[arg-type]


def test_tokenizer_of_another_vocabulary_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tokenizer of 260 tokens, model of 200"):
        evaluate(make_model(vocab=200), DOCUMENTS, BYTES)


def test_the_data_of_training_keeps_its_split(corpus: Path, tmp_path: Path) -> None:
    """Named again, with a split or without: never what was trained on, by the split that training used."""
    wanted = recipe(corpus, "train.steps=1")
    train(wanted, tmp_path / "run")
    held_out = [d.text for d in evaluation_documents(tmp_path / "run")]
    learnt = [d.text for d in evaluation_documents(tmp_path / "run", split="train")]
    assert held_out
    assert not {*held_out} & {*learnt}
    for split, texts in (("validation", held_out), (None, held_out), ("train", learnt)):
        assert [d.text for d in evaluation_documents(tmp_path / "run", wanted.data.source, split)] == texts
    assert len([*evaluation_documents(tmp_path / "run", wanted.data.source, "all")]) == 12
    for spelled in (f"{corpus}/text/", f"{corpus}/./text", f"{corpus}/text/*.py"):
        assert [d.text for d in evaluation_documents(tmp_path / "run", [spelled])] == held_out


def test_all_of_a_run_s_data_is_what_it_validates_on_too(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "apart.txt").write_text("An apart text of more than sixteen letters, held out. " * 4)
    train(recipe(corpus, "train.steps=1", f'data.validation=["{tmp_path}/apart.txt"]'), tmp_path / "run")
    assert len([*evaluation_documents(tmp_path / "run", split="all")]) == 13
