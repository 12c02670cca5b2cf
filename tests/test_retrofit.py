"""Heads for a model that exists, what they learn of it, and schedules: what moves, what stays, and what the loss is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import run as decoded
from conftest import tiny_model
from small_runs import recipe, retrofitted, same_weights, weights
from torch import Tensor

from foretoken import optim, retrofit
from foretoken.checkpoint import load_checkpoint, load_model, save_checkpoint
from foretoken.config import LossConfig
from foretoken.distil import distil_loss, teachable
from foretoken.errors import ConfigError, TrainingError
from foretoken.loss import IGNORE, scales, targets, valid_counts
from foretoken.model import Model
from foretoken.recipe import load_recipe
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train

KINDS = ["parallel", "sequential"]


# Distillation


def problem(seed: int, n: int = 3, V: int = 11, T: int = 7) -> tuple[list[Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (2, T + n), generator=g)
    documents = (torch.rand(tokens.shape, generator=g) < 0.2).long().cumsum(1)
    labels = targets(tokens, documents, torch.rand(tokens.shape, generator=g) < 0.8, n)
    hidden = [torch.randn(2, T, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(n)]
    return hidden, torch.randn(V, 5, generator=g, dtype=torch.float64, requires_grad=True), labels


def by_loops(
    hidden: list[Tensor], weight: Tensor | list[Tensor], labels: Tensor, head_weights: list[float], terms: LossConfig
) -> Tensor:
    """The definition, position by position."""
    matrices = [weight] * len(labels) if isinstance(weight, Tensor) else weight
    total = hidden[0].new_zeros(())
    n, B, T = labels.shape
    for d in range(1, n):
        values = []
        for b in range(B):
            for t in range(T - d):
                if labels[d, b, t] == IGNORE:
                    continue
                p = (matrices[0] @ hidden[0][b, t + d]).softmax(0).detach()
                log_q = (matrices[d] @ hidden[d][b, t]).log_softmax(0)
                known = p
                if terms.soft_top_k:
                    known = torch.where(p >= p.sort(descending=True).values[terms.soft_top_k - 1], p, 0.0)
                    known = known / known.sum()
                overlap = torch.minimum(p, log_q.exp()).sum()
                soft = -(known * log_q).sum()
                values.append(
                    terms.soft * soft + terms.total_variation * (1 - overlap) - terms.acceptance * overlap.log()
                )
        if values:
            total = total + head_weights[d] * torch.stack(values).mean()
    return total


TERMS = {
    "soft": LossConfig(soft=1.0),
    "top": LossConfig(soft=1.0, soft_top_k=3),
    "variation": LossConfig(total_variation=1.0),
    "acceptance": LossConfig(acceptance=1.0),
    "all": LossConfig(soft=0.3, total_variation=0.5, acceptance=0.7, soft_top_k=4),
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_distillation_is_its_definition(terms: LossConfig, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In value and in gradient; head 1's states get none."""
    monkeypatch.setattr("foretoken.distil.CHUNK_ELEMENTS", chunk)
    for seed in range(10):
        hidden, weight, labels = problem(seed)
        slow_hidden, slow_weight, _ = problem(seed)
        head_weights = [1.0, 0.5, 2.0]
        taught = teachable(labels)
        found = distil_loss(hidden, weight, taught, scales(head_weights, valid_counts(taught)), terms)
        wanted = by_loops(slow_hidden, slow_weight, labels, head_weights, terms)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-9)
        found.backward()
        assert hidden[0].grad is None
        if wanted.requires_grad:
            wanted.backward()
        for a, b in ((weight, slow_weight), *zip(hidden[1:], slow_hidden[1:], strict=True)):
            zero = torch.zeros_like(a)
            assert torch.allclose(zero if a.grad is None else a.grad, zero if b.grad is None else b.grad, atol=1e-9)


def test_a_head_that_is_the_teacher_has_nothing_to_learn() -> None:
    hidden, weight, labels = problem(0)
    with torch.no_grad():
        for d in (1, 2):
            hidden[d][:, : 7 - d] = hidden[0][:, d:]
    taught = teachable(labels)
    factors = scales([1.0] * 3, valid_counts(taught))
    overlap = distil_loss(hidden, weight, taught, factors, LossConfig(total_variation=1.0, acceptance=1.0))
    assert abs(overlap.item()) < 1e-12  # it is 1 everywhere
    log_p = (hidden[0] @ weight.T).log_softmax(-1).detach()
    entropy = -(log_p.exp() * log_p).sum(-1)
    entropies = sum(entropy[:, d:][taught[d, :, :-d] != IGNORE].mean() for d in (1, 2))
    soft = distil_loss(hidden, weight, taught, factors, LossConfig(soft=1.0))
    assert soft.item() == pytest.approx(float(entropies), abs=1e-12)  # the divergence is 0
    (overlap + soft).backward()
    assert max(float(h.grad.abs().max()) for h in hidden[1:] if h.grad is not None) < 1e-12


def test_the_unembedding_learns_only_where_it_may() -> None:
    hidden, weight, labels = problem(1)
    taught = teachable(labels)
    factors = scales([1.0] * 3, valid_counts(taught))
    distil_loss(hidden, weight, taught, factors, LossConfig(soft=1.0), weight_learns=False).backward()
    assert weight.grad is None
    assert hidden[1].grad is not None


# Retrofit


def test_at_first_every_head_is_head_1(plain: Path, corpus: Path) -> None:
    wanted = retrofitted(plain, corpus)
    config, _ = retrofit.starting_config(wanted.model, 32)
    model = retrofit.starting_model(wanted.model, config, 0)
    first, *others = model(torch.arange(20)[None])
    assert len(others) == 3
    assert all(torch.equal(first, other) for other in others)
    old = load_model(plain, None)
    assert torch.equal(old(torch.arange(20)[None])[0], first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_model_stays_and_its_heads_learn(kind: str, plain: Path, corpus: Path, tmp_path: Path) -> None:
    """Bit for bit, with every term of the loss; what it writes is what it wrote before."""
    wanted = retrofitted(plain, corpus, f"model.head_kind={kind}", "loss.acceptance=0.3", "loss.total_variation=0.2")
    train(wanted, tmp_path / "run")
    before, after = weights(plain), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, tokenizer = load_checkpoint(tmp_path / "run")
    assert model.config.n_future == 4
    assert tokenizer.fingerprint == byte_tokenizer().fingerprint
    old = load_model(plain, None)
    ids = [[1, 2, 3], [65, 66]]
    assert [r.ids for r in decoded(model, ids, 3)] == [r.ids for r in decoded(old, ids, 0)]


def test_a_frozen_trunk_builds_no_graph(plain: Path, corpus: Path) -> None:
    wanted = retrofitted(plain, corpus)
    config, _ = retrofit.starting_config(wanted.model, 32)
    model = retrofit.starting_model(wanted.model, config, 0)
    tokens = torch.arange(36)[None]
    assert not model.run_trunk(tokens, model.context(36)).requires_grad
    first, *others = model(tokens)
    assert not first.requires_grad
    assert all(h.requires_grad for h in others)


@pytest.mark.parametrize("kept", ["trunk", "unembedding", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_further_losses_may_train(kind: str, kept: str, plain: Path, corpus: Path) -> None:
    """With head 1's weight at zero, a part that is not named gets no gradient from any term, and one that is does."""
    from foretoken import train as training

    for trained in ([kept], []):
        wanted = retrofitted(
            plain, corpus, "model.frozen=false", f"model.head_kind={kind}", "loss.head_weights=[0, 1, 1, 1]",
            f"loss.head_gradients={trained}".replace("'", '"'), "loss.acceptance=0.3",
        )  # fmt: skip
        config, tokenizer = retrofit.starting_config(wanted.model, 32)
        model = retrofit.starting_model(wanted.model, config, 0).train()
        batch = training._windows(wanted, tokenizer, "train").batch(0)
        list(training._backward(model, batch, [0.0, 1.0, 1.0, 1.0], wanted))
        moved = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
        parts = {
            "trunk": any(name.startswith("trunk.") for name in moved),
            "unembedding": "lm_head.weight" in moved,
            "embedding": "embed_tokens.weight" in moved,
        }
        assert any(name.startswith("heads.1.") for name in moved)
        if trained == ["trunk"]:  # which the embedding feeds
            assert parts == {"trunk": True, "unembedding": False, "embedding": True}
        else:
            reached = {"unembedding": ["unembedding"], "embedding": ["embedding"] if kind == "sequential" else []}
            assert [name for name in parts if parts[name]] == (reached[kept] if trained else [])


def test_stopped_and_resumed_it_is_the_same_run(plain: Path, corpus: Path, tmp_path: Path) -> None:
    wanted = retrofitted(plain, corpus, "train.steps=4")
    train(wanted, tmp_path / "whole")
    train(wanted, tmp_path / "parts")  # its checkpoint of step 2 is what a stopped run leaves
    from foretoken import train as training

    stopped = tmp_path / "stopped"
    real = training._update
    calls = []

    def update(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    training._update = update
    try:
        with pytest.raises(KeyboardInterrupt):
            train(wanted, stopped)
    finally:
        training._update = real
    train(wanted, stopped, resume=True)
    assert same_weights(tmp_path / "whole", stopped)


def test_a_tokenizer_with_more_tokens_than_the_model(plain: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "plain")
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<|more|>"])
    (tmp_path / "plain" / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(ConfigError, match="tokenizer of 261 tokens beside a model of 260"):
        train(retrofitted(tmp_path / "plain", corpus), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_matrices_alone_learn_by_muon(plain: Path, corpus: Path, tmp_path: Path) -> None:
    """Linear heads on a frozen trunk have nothing that AdamW takes."""
    wanted = retrofitted(plain, corpus, "model.head_kind=linear", "optim.name=muon")
    assert train(wanted, tmp_path / "run").finished


@pytest.mark.parametrize("decay", [0, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_head_that_has_not_learned_is_an_error(
    optimizer: str, decay: float, plain: Path, corpus: Path, tmp_path: Path
) -> None:
    """Weight decay changes it all the same."""
    changes = ("loss.head_weights=[1, 1, 0, 1]", f"optim.weight_decay={decay}", f"optim.name={optimizer}")
    wanted = retrofitted(plain, corpus, *changes)
    with pytest.raises(TrainingError, match="head 3 has not learned"):
        train(wanted, tmp_path / "run")


def test_fewer_heads_of_a_model_that_has_them(corpus: Path, tmp_path: Path) -> None:
    """The paper's finetuning with n' < n: those that stay are taken over, the others left out."""
    four = tiny_model(n_future=4, layers=3, vocab=260, dtype=torch.float32, peaked=False)
    save_checkpoint(tmp_path / "four", four, byte_tokenizer())
    for n in (1, 2, 4, 5):
        wanted = retrofitted(tmp_path / "four", corpus, f"model.n_future={n}", "model.frozen=false", "loss.soft=0")
        config, _ = retrofit.starting_config(wanted.model, 32)
        state = retrofit.starting_model(wanted.model, config, 0).state_dict()
        given = four.state_dict()
        assert all(torch.equal(tensor, given[name]) for name, tensor in state.items() if name in given)
        for name in state.keys() - given.keys():  # head 5
            assert torch.equal(state[name], given[name.replace("heads.4.", "heads.0.")])


def test_any_program_may_have_made_it(plain: Path, corpus: Path, tmp_path: Path) -> None:
    """A directory as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save(tmp_path / "theirs", model_max_length=64)
    train(retrofitted(tmp_path / "theirs", corpus), tmp_path / "run")
    assert load_model(tmp_path / "run", None).config.n_future == 4


MISTAKES = {
    "shape": (["model.hidden_size=32"], "start_from brings the shape of its model: leave out hidden_size"),
    "nothing to train": (["model.n_future=1", "loss.soft=0"], "frozen leaves only heads to train"),
    "too long": (["train.seq_len=4096"], "train.seq_len = 4096 exceeds the 256 positions"),
    "teacher alone": (["model.n_future=1", "model.frozen=false"], "n_future = 1 has none"),
    "two schedules": (['loss.head_schedule="reverse"', "loss.head_weights=[1,1,1,1]"], "both say the weights"),
    "offsets": (["loss.offsets=[1, 3]"], "loss.offsets are for n_future = 1, not 4"),
    "falling offsets": (["loss.offsets=[3, 1]"], "must rise"),
    # keys that would do nothing
    "tokenizer": (["tokenizer.kind=bytes"], "start_from brings the tokenizer of its model: leave out tokenizer.kind"),
    "beta": (["loss.head_schedule=reverse", "loss.head_beta=0.5"], 'of head_schedule = "geometric", not "reverse"'),
    "top k": (["loss.soft=0", "loss.soft_top_k=4"], "soft_top_k = 4 is of the term soft, which has no weight"),
    "nothing to learn": (["loss.data=0", "loss.soft=0"], "data = 0 needs soft, total_variation or acceptance"),
    "gradients": (
        ["model.n_future=1", "model.frozen=false", "loss.soft=0", "loss.head_gradients=[]"],
        "loss.head_gradients is of the losses of heads 2..n, and n_future = 1 has none",
    ),
    "gradients of offsets": (
        ["model.n_future=1", "model.frozen=false", "loss.soft=0", "loss.offsets=[1, 2]", "loss.head_gradients=[]"],
        "loss.head_gradients is of the losses of heads 2..n, and n_future = 1 has none",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, plain: Path, corpus: Path, tmp_path: Path) -> None:
    sets, says = MISTAKES[name]
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        train(retrofitted(plain, corpus, *sets), tmp_path / "run")


def test_keys_that_do_something() -> None:
    """What switches a part off, or says what holds anyway, is no mistake."""
    overrides = (
        ("loss.soft=0", "loss.soft_top_k=0"),
        ("loss.head_schedule=geometric", "loss.head_beta=0.5"),
        ("loss.data=0", "loss.soft_top_k=4"),
        ("loss.data=0", "loss.soft=0", "loss.acceptance=1"),
        (
            "model.n_future=1",
            "model.frozen=false",
            "loss.soft=0",
            'loss.head_gradients=["embedding", "unembedding", "trunk"]',
        ),
    )
    for sets in overrides:
        load_recipe("retrofit", ("model.start_from=x", *sets))


# Schedules


def test_schedules_worked_example() -> None:
    def at(schedule: str, steps: list[int], n: int = 3) -> list[list[float]]:
        beta = {"head_beta": 0.5} if schedule == "geometric" else {}
        config = LossConfig.model_validate({"head_schedule": schedule, **beta})
        return [optim.head_weights(step, 90, n, config) for step in steps]

    assert at("geometric", [0, 89]) == [[1, 0.5, 0.25]] * 2
    assert at("linear_decay", [0, 45]) == [[1, 1, 1], [1, 0.5, 0.5]]
    assert at("forward", [0, 29, 30, 60, 89]) == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert at("reverse", [0, 29, 30, 60, 89]) == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert at("constant", [5]) == [[1, 1, 1]]


@pytest.mark.parametrize("offsets", [[1, 2, 3], [4], [2, 5]])
def test_offsets_score_one_state(offsets: list[int], corpus: Path, tmp_path: Path) -> None:
    """One state against several tokens, or against another than the next: a plain cross-entropy each."""
    from foretoken import train as training

    wanted = recipe(corpus, "model.n_future=1", f"loss.offsets={offsets}", "train.steps=2", "train.batch_size=2")
    tokenizer = byte_tokenizer()
    model = Model(wanted.model.resolve(260, 32))
    model.init_weights(0)
    batch = training._windows(wanted, tokenizer, "train").batch(0)
    assert batch.tokens.shape == (2, 32 + offsets[-1])
    ((_, output, counts),) = training._backward(model, batch, [1.0] * len(offsets), wanted)
    (hidden,) = model(batch.tokens[:, :32])
    logits = model.logits(hidden).flatten(0, 1)
    for index, offset in enumerate(offsets):
        here, there = batch.document_ids[:, :32], batch.document_ids[:, offset : offset + 32]
        label = batch.tokens[:, offset : offset + 32].masked_fill(here != there, -100)
        mean = F.cross_entropy(logits, label.flatten())
        assert (output.sums[index] / counts[index]).item() == pytest.approx(mean.item(), rel=1e-5)
    result = train(wanted, tmp_path / "run")
    assert len(result.last["loss"]) == len(offsets)
    assert all(math.isfinite(value) for value in result.last["loss"])
    assert load_model(tmp_path / "run", None).config.n_future == 1
