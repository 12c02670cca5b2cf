"""Unembeddings of heads 2..n's own: the loss, drafting, training, checkpoints and exports with a matrix per head."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_engine_model
import torch
from conftest import run, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import (
    Batch,
    Violation,
    close,
    drafts_are_the_heads,
    logprobs_are_targets,
    same_output,
    sampling_law,
    speculative_is_plain,
)
from llama_cpp import LlamaCpp, has_llama_cpp
from safetensors.torch import load_file, save_file
from small_runs import finish, recipe, retrofitted, same_weights, weights
from test_graphs import decoded, eager, same_steps, with_graphs
from test_loss import BATCHES
from test_retrofit import by_loops, problem
from torch import Tensor
from trained_models import Trained, exported

from foretoken import loss, retrofit
from foretoken.checkpoint import describe, load_checkpoint, load_model, save_checkpoint, step_checkpoints
from foretoken.config import LossConfig, ModelConfig, OptimConfig
from foretoken.distil import distil_loss, teachable
from foretoken.errors import CheckpointError, ConfigError, TrainingError
from foretoken.formats.eagle3 import export_eagle3
from foretoken.formats.engines import drafts_to_make, uses
from foretoken.formats.gguf import export_gguf
from foretoken.formats.hf_class import export_hf
from foretoken.formats.trained import require_trained_heads
from foretoken.model import Model, Stepper
from foretoken.optim import make_optimizers
from foretoken.recipe import load_recipe
from foretoken.sampling import Sampling
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train

KINDS = ["parallel", "sequential"]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
SAMPLINGS = {"greedy": Sampling(), "soft": Sampling(0.8), "top-p": Sampling(0.9, top_k=8, top_p=0.9)}
OWN = re.compile(r"own_unembeddings\.")


def per_head(kind: str = "parallel", **fields: Any) -> Model:
    return tiny_model(**{"head_kind": kind, "unembedding": "per_head", **fields})


def saved(folder: Path, kind: str = "parallel", **fields: Any) -> Path:
    shape = {"layers": 4, "vocab": 260, "dtype": torch.float32, "peaked": False}
    return save_checkpoint(folder, per_head(kind, **{**shape, **fields}), byte_tokenizer())


# The model


@pytest.mark.parametrize("kind", KINDS)
def test_heads_have_their_own_and_head_1_is_untouched(kind: str) -> None:
    shared, own = (tiny_model(head_kind=kind, unembedding=u) for u in ("shared", "per_head"))
    state, more = shared.state_dict(), own.state_dict()
    assert all(torch.equal(tensor, more[name]) for name, tensor in state.items())  # from the same seed
    assert sorted(more.keys() - state.keys()) == [f"own_unembeddings.{d}.weight" for d in range(3)]
    assert len({id(w) for w in shared.unembeddings()}) == 1
    assert len({id(w) for w in own.unembeddings()}) == 4
    hidden = own(torch.tensor([PROMPTS[1]]))
    for d, (states, matrix) in enumerate(zip(hidden, own.unembeddings(), strict=True)):
        close(own.logits(states, d), states @ matrix.T, f"head {d + 1}")
    assert torch.equal(own.logits(hidden[0]), shared.logits(hidden[0]))
    one = ModelConfig.model_validate(tiny_config(n_future=1).model_dump() | {"unembedding": "per_head"})
    assert [name for name, _ in Model(one).named_parameters() if OWN.match(name)] == []


def test_optimisers_take_them_as_they_take_the_unembedding() -> None:
    model = per_head()
    adamw, _ = make_optimizers(model, OptimConfig(name="muon"))
    group = next(g for g in adamw.param_groups if any(p is model.lm_head.weight for p in g["params"]))
    assert {id(w) for w in model.unembeddings()} <= {id(p) for p in group["params"]}


# The loss


@settings(max_examples=60)
@given(BATCHES, st.data(), st.sampled_from([14, 50, 1 << 20]))
def test_loss_equals_oracle(batch: Batch, data: st.DataObject, chunk: int) -> None:
    """Any of some matrices for each head: value, and the gradient of every state and matrix; head 1's may be held."""
    which = [data.draw(st.integers(0, d)) for d in range(batch.n)]
    learns_from = data.draw(st.sampled_from([None, 1]))
    labels = batch.labels()
    scales = loss.scales(batch.weights, loss.valid_counts(labels))

    def leaves() -> tuple[list[Tensor], list[Tensor]]:
        g = torch.Generator().manual_seed(1)
        matrices = [torch.randn(7, 5, generator=g, dtype=torch.float64).requires_grad_() for _ in range(batch.n)]
        return batch.leaves()[0], matrices

    hidden, matrices = leaves()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk)
        each = [matrices[place] for place in which]
        fast = loss.mtp_loss(hidden, each, labels, scales, weight_learns_from=learns_from)
    fast.total.backward()
    slow_hidden, slow_matrices = leaves()
    each = [slow_matrices[place] for place in which]
    if learns_from:
        each[1:] = [w.detach() if place == which[0] else w for w, place in zip(each[1:], which[1:], strict=True)]
    slow = loss.oracle_loss(
        slow_hidden, each, batch.tokens, batch.document_ids, batch.label_mask, batch.weights,
        across_documents=batch.across,
    )  # fmt: skip
    close(fast.total, slow, "loss")
    if slow.requires_grad:
        slow.backward()
    for name, a, b in zip("h" * batch.n + "w" * batch.n, hidden + matrices, slow_hidden + slow_matrices, strict=True):
        zero = torch.zeros_like(a)
        close(zero if a.grad is None else a.grad, zero if b.grad is None else b.grad, f"gradient of {name}")


def test_a_matrix_for_each_head_or_one() -> None:
    with pytest.raises(AssertionError, match="2 unembeddings for 3 heads"):
        loss.per_head([torch.zeros(2, 2)] * 2, 3)


@pytest.mark.parametrize("learns", [True, False])
def test_distillation_is_its_definition(learns: bool) -> None:
    """Head 1's matrix teaches; the others' gradients are those of the definition, and it has none."""
    terms = LossConfig(soft=0.3, total_variation=0.5, acceptance=0.7, soft_top_k=4)
    head_weights = [1.0, 0.5, 2.0]
    for seed in range(5):
        hidden, first, labels = problem(seed)
        slow_hidden, slow_first, _ = problem(seed)
        own, slow_own = ([torch.full_like(first, d).add(first.detach().roll(d, 0)).requires_grad_() for d in (1, 2)]
                         for _ in range(2))  # fmt: skip
        taught = teachable(labels)
        factors = loss.scales(head_weights, loss.valid_counts(taught))
        found = distil_loss(hidden, [first, *own], taught, factors, terms, weight_learns=learns)
        wanted = by_loops(slow_hidden, [slow_first, *slow_own], labels, head_weights, terms)
        close(found, wanted, "loss")
        found.backward()
        assert first.grad is None
        if wanted.requires_grad:
            wanted.backward()
        for a, b in zip([*hidden[1:], *own], [*slow_hidden[1:], *slow_own], strict=True):
            zero = torch.zeros_like(a)
            close(zero if a.grad is None else a.grad, zero if b.grad is None else b.grad, "gradient")


# Drafting


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_speculative_equals_plain(kind: str, sampling: Sampling) -> None:
    accepted = 0
    for model in (per_head(kind), per_head(kind, peaked=False, seed=1)):
        for drafts, draft_vocab in ((1, None), (3, None), (3, 9)):
            for request in speculative_is_plain(model, PROMPTS, drafts, sampling, (24, 1, 17), draft_vocab=draft_vocab):
                logprobs_are_targets(model, request)
                drafts_are_the_heads(model, request, sampling, draft_vocab)
                accepted += sum(step.accepted for step in request.steps)
    assert accepted > (10 if sampling.temperature else 0)


@pytest.mark.parametrize("sampling", [SAMPLINGS["greedy"], SAMPLINGS["soft"]], ids=["greedy", "soft"])
@pytest.mark.parametrize("kind", KINDS)
def test_trees(kind: str, sampling: Sampling) -> None:
    model = per_head(kind, peaked=False, seed=1)
    plain = decoded(model, 0, sampling)
    for drafts, nodes in ((2, 5), (3, 16), (None, None)):
        for a, b in zip(decoded(model, drafts, sampling, nodes), plain, strict=True):
            same_output(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_law_of_rejection(kind: str) -> None:
    model = per_head(kind, layers=3, width=8, vocab=5, peaked=False, seed=3)
    with torch.no_grad():
        for matrix in model.unembeddings():
            matrix.mul_(25)
    requests = sampling_law(model, [1, 2, 3], 2, Sampling(0.8, accept="rejection"), 1000, 3)
    assert {0, 1, 2} == {step.accepted for request in requests for step in request.steps}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_verify_and_do_not_draft(kind: str) -> None:
    """In float32, where plain steps run compiled; and with a step for GPUs, which is for plain decoding alone, too."""
    model = per_head(kind, dtype=torch.float32, peaked=False, seed=1)
    for request in speculative_is_plain(model, PROMPTS, 3, Sampling(0.8), (16,), tolerance=1e-3):
        drafts_are_the_heads(model, request, Sampling(0.8))
    model = per_head(kind, peaked=False, seed=2)
    for drafts in (0, 3):
        wanted = decoded(eager(model), drafts, Sampling(0.8))
        same_steps(decoded(with_graphs(model), drafts, Sampling(0.8)), wanted, 1e-9)


def test_a_draft_model_drafts_with_its_first_matrix() -> None:
    model = per_head()
    for request in run(model, PROMPTS, 3, source=model):
        assert all(step.accepted == len(step.drafted) for step in request.steps[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_behind_the_last_matrix_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="drafts = 4, but a model with 4 heads drafts 0 to 3 tokens per step"):
        run(per_head(kind), PROMPTS, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_with_another_matrix_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output does not show it: what a head drafts does."""
    real, model = Stepper.logits, per_head(kind)
    monkeypatch.setattr(Stepper, "logits", lambda own, hidden, vocab=None, depth=0: real(own, hidden, vocab))
    requests = speculative_is_plain(model, PROMPTS, 3)
    with pytest.raises(Violation, match="drafted"):
        drafts_are_the_heads(model, requests[0], Sampling())


# Training

PER_HEAD = "model.unembedding=per_head"


def steps(*more: str) -> tuple[str, ...]:
    return (PER_HEAD, "train.steps=4", "train.batch_size=4", "train.save_every=2", *more)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("parallel", ()),
        ("sequential", ("model.num_hidden_layers=3",)),
        ("parallel", ("loss.method=sequential",)),
        ("parallel", ("model.tie_word_embeddings=true", "optim.name=muon", 'loss.head_gradients=["trunk"]')),
        ("parallel", ("loss.acceptance=0.3", "loss.soft=0.5")),
    ],
)
def test_it_trains_and_every_matrix_learns(kind: str, more: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, *steps(f"model.head_kind={kind}", *more))
    train(wanted, tmp_path / "run")
    model, _ = load_checkpoint(tmp_path / "run")
    begun = Model(model.config)
    begun.init_weights(wanted.train.seed)
    for before, after in zip(begun.unembeddings(), model.unembeddings(), strict=True):
        assert not torch.equal(before, after)
    require_trained_heads(model, "here")
    speculative_is_plain(model, [[65, 66]], model.config.n_future - 1, tolerance=1e-3)


def test_stopped_and_resumed_is_never_stopped(corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, *steps())
    train(wanted, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 3:
            raise Stop

    logged = recipe(corpus, *steps("train.log_every=1"))
    with pytest.raises(Stop):
        train(logged, tmp_path / "parts", report=stop)
    finish(logged, tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_the_two_ways_of_training_give_the_same(corpus: Path, tmp_path: Path) -> None:
    for method in ("chunked", "sequential"):
        train(recipe(corpus, *steps(f"loss.method={method}")), tmp_path / method)
    for name, tensor in weights(tmp_path / "chunked").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "sequential")[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_they_begin_as_copies_on_a_model_that_exists(kind: str, plain: Path, corpus: Path, tmp_path: Path) -> None:
    """Frozen, it stays as it is, and all that is its heads' learns."""
    wanted = retrofitted(plain, corpus, PER_HEAD, f"model.head_kind={kind}", "loss.acceptance=0.3")
    config, _ = retrofit.starting_config(wanted.model, 32)
    model = retrofit.starting_model(wanted.model, config, 0)
    assert all(torch.equal(matrix, model.lm_head.weight) for matrix in model.unembeddings())
    train(wanted, tmp_path / "run")
    before, after = weights(plain), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(after[f"own_unembeddings.{d}.weight"], before["lm_head.weight"]) for d in range(3))
    further = retrofitted(tmp_path / "run", corpus, PER_HEAD, f"model.head_kind={kind}")
    again = retrofit.starting_model(further.model, config, 0)
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.named_parameters())


def test_one_that_has_not_learned_is_an_error(plain: Path, corpus: Path, tmp_path: Path) -> None:
    wanted = retrofitted(plain, corpus, PER_HEAD)
    config, _ = retrofit.starting_config(wanted.model, 32)
    model = retrofit.starting_model(wanted.model, config, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("own_unembeddings.1."):
                p.add_(0.01 * p.requires_grad)
    with pytest.raises(TrainingError, match="head 3's unembedding has not learned"):
        retrofit.check_trained(tmp_path, model, wanted.model, 0)


def test_beside_adapters_they_are_read_back(plain: Path, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    wanted = retrofitted(
        plain, corpus, PER_HEAD, "model.frozen=false", "model.lora_rank=4", "train.log_every=1", "train.steps=4"
    )

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "run", report=stop)
    (left,) = step_checkpoints(tmp_path / "run")
    config, _ = retrofit.starting_config(wanted.model, 32)
    stored, model = load_model(left, None), retrofit.resumed_model(left, wanted.model, config, wanted.train.seed)
    for a, b in zip(model.unembeddings(), stored.unembeddings(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.unembeddings()[1], model.lm_head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    from test_attach import theirs

    import foretoken

    model = foretoken.attach_heads(theirs("llama tied"), 3, kind, "per_head")  # type: ignore[arg-type]
    first, *own = model.unembedding
    assert all(torch.equal(first, matrix) for matrix in own)
    windows = torch.randint(0, 260, (2, 19), generator=torch.Generator().manual_seed(0))
    labels = loss.targets(windows, torch.zeros_like(windows), torch.ones_like(windows, dtype=torch.bool), 3)
    factors = loss.scales([1.0] * 3, loss.valid_counts(labels))
    loss.mtp_loss(model(windows, 16), model.unembedding, labels, factors).total.backward()
    with torch.no_grad():
        for matrix in own:
            assert matrix.grad.abs().max() > 0
            matrix.sub_(matrix.grad)
    model.save(tmp_path / "saved", byte_tokenizer())
    stored = load_model(tmp_path / "saved", None)
    for a, b in zip([first, *own], stored.unembeddings(), strict=True):
        assert torch.equal(a, b)


# Checkpoints


def test_recipe_and_config() -> None:
    with pytest.raises(ConfigError, match=r"model\.unembedding: Input should be 'shared' or 'per_head'"):
        load_recipe("tiny", ("model.unembedding=own",))
    assert load_recipe("tiny", ("model.unembedding=per_head",)).model.resolve(17, 32).own_unembeddings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_model_has_the_same_logits_of_all_heads(kind: str, tied: bool, tmp_path: Path) -> None:
    model = per_head(kind, vocab=260, dtype=torch.float32, tie_word_embeddings=tied)
    folder = save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    again, _ = load_checkpoint(folder)
    tokens = torch.tensor([[256, *b"def add(x, y)"]])
    for d, (a, b) in enumerate(zip(model(tokens), again(tokens), strict=True)):
        assert torch.equal(model.logits(a, d), again.logits(b, d))
    assert describe(folder)["unembedding"] == "per_head"
    shared = tiny_model(head_kind=kind, vocab=260, dtype=torch.float32, tie_word_embeddings=tied)
    plain = save_checkpoint(tmp_path / "shared", shared, byte_tokenizer())
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    stored = load_file(folder / "mtp_heads" / "model.safetensors")
    for d in range(1, 4):
        assert torch.equal(stored[f"heads.{d - 1}.lm_head.weight"], model.unembeddings()[d])
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.logits(model(tokens)[0]), atol=2e-4, rtol=1e-4)


def test_a_shared_one_leaves_no_trace(tmp_path: Path) -> None:
    for number, fields in enumerate(({}, {"n_future": 1, "unembedding": "per_head"})):
        folder = saved(tmp_path / str(number), **{"unembedding": "shared", **fields})
        heads = folder / "mtp_heads"
        if heads.exists():
            own = json.loads((heads / "config.json").read_text())["foretoken"]
            assert own == {"head_kind": "parallel", "n_future": 4, "hidden_size": 32}
            assert not [name for name in load_file(heads / "model.safetensors") if "lm_head" in name]
        assert load_model(folder, None).config.unembedding == "shared"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_extra_one_is_named(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", kind)
    (folder / "foretoken.json").unlink()
    path = folder / "mtp_heads" / "model.safetensors"
    tensors, name = load_file(path), "heads.1.lm_head.weight"
    for wrong, says in (
        ({k: v for k, v in tensors.items() if k != name}, f"tensor '{name}' is missing"),
        (tensors | {"heads.3.lm_head.weight": tensors[name].clone()}, "tensor 'heads.3.lm_head.weight' is not one of"),
        (tensors | {name: tensors[name][:7].clone()}, f"'{name}' has shape (7, 32), must be (260, 32)"),
    ):
        save_file(wrong, path)
        with pytest.raises(CheckpointError, match=re.escape(says)):
            load_checkpoint(folder)


# Other programs


@has_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_drafts_with_the_matrix_of_head_2(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As many drafts are right as the oracle says, which reads it; with the model's own they would be others."""
    shared: Trained = request.getfixturevalue(kind)
    model, tokenizer = load_checkpoint(shared.checkpoint)
    own = Model(model.config.model_copy(update={"unembedding": "per_head"}))
    g = torch.Generator().manual_seed(0)
    first = model.lm_head.weight.detach()
    for matrix in own.unembeddings()[1:]:  # others, but not so far away that no draft would be right
        matrix.data.copy_(first + 0.5 * first.std() * torch.randn(first.shape, generator=g))
    own.load_state_dict(own.state_dict() | model.state_dict())
    folder = save_checkpoint(tmp_path / "model", own, tokenizer)
    trained = exported(kind, folder, tokenizer, tiny_engine_model.PROMPTS[:3])
    assert drafts_to_make(folder) == 1
    held = load_file(trained.drafter / "model.safetensors")["lm_head.weight"]
    assert torch.equal(held, own.unembeddings()[1])
    server, counted = LlamaCpp(*trained.files, 1), [0, 0]
    for prompt, text in zip(trained.prompts, trained.texts, strict=True):
        answer = server.complete(prompt, tiny_engine_model.TOKENS)
        assert answer["choices"][0]["text"] == text
        counted = [
            a + answer["timings"].get(b, 0) for a, b in zip(counted, ("draft_n", "draft_n_accepted"), strict=True)
        ]
    wanted = trained.counts(1)[1]
    assert counted == [wanted.drafted, wanted.accepted]
    trained.drafter = shared.drafter
    assert 0 < counted[1] != trained.counts(1)[1].accepted


def test_info_promises_what_works(tmp_path: Path) -> None:
    for kind, every in (("parallel", "heads 2..4"), ("sequential", "sequential head")):
        folder = saved(tmp_path / kind, kind)
        found = {(use.engine, use.runs): use for use in uses(folder)}
        refused = {key for key, use in found.items() if use.reason}
        assert refused == {("vllm", every)}
        assert "unembeddings of their own" in found["vllm", every].reason
        assert {found[engine, "head 2"].drafts for engine in ("vllm", "sglang", "tensorrt_llm", "llama_cpp")} == {1}
        assert found["foretoken", every].drafts == found["transformers", every].drafts == 3
        assert "mtp_heads" not in str(found["vllm", "head 2"].commands)


def test_matrices_that_nobody_trained_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")

    def copied(model: Model) -> None:
        model.unembeddings()[2].data.copy_(model.lm_head.weight)

    def broken(model: Model) -> None:
        model.unembeddings()[2].data[0, 0] = float("inf")

    for change, says in ((copied, "unembedding equals head 1's"), (broken, "unembedding holds values that are no num")):
        model, tokenizer = load_checkpoint(folder)
        change(model)
        bad: Path = save_checkpoint(tmp_path / change.__name__, model, tokenizer)
        exports: tuple[Callable[[Path, Path], object], ...] = (export_eagle3, export_gguf, export_hf)
        for export in exports:
            with pytest.raises(CheckpointError, match=f"head 3: its {says}"):
                export(bad, tmp_path / "out")
