"""The sequential head: trained unrolled as it drafts, and changing nothing but the speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, tiny_config, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from invariants import (
    Violation,
    close,
    drafting_is_unrolled,
    drafts_are_the_heads,
    greedy_is_argmax,
    logprobs_are_targets,
    no_peeking,
    possible,
    same_output,
    sampling_law,
    speculative_is_plain,
)
from safetensors.torch import load_file, save_file
from small_runs import finish, recipe, records, same_weights, weights
from test_decode import NAMES, PROMPTS, SAMPLINGS
from test_model import BACK, SELECT, WRITE
from torch import Tensor

from foretoken import loss, unrolled
from foretoken.cache import KVCache
from foretoken.checkpoint import describe, load_checkpoint, save_checkpoint
from foretoken.config import ModelConfig, ModelRecipe, Shared
from foretoken.errors import CheckpointError, ConfigError
from foretoken.evaluate import evaluate
from foretoken.layers import Rotary
from foretoken.model import ALL_SHARED, Model, Stepper
from foretoken.sampling import Sampling
from foretoken.saver import Saver
from foretoken.sources import Document
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train


def sequential(architecture: str = "llama", **fields: Any) -> Model:
    return tiny_model(architecture, **{"head_kind": "sequential", **fields})


CONFIDENT = sequential()
VAGUE = sequential(peaked=False, seed=1)
KINDS = {"llama": sequential(), "qwen2": sequential("qwen2", kv_heads=1), "qwen3": sequential("qwen3", kv_heads=4)}
MOVES = [("write", [4]), ("back", [2, 0, 3]), ("write", [3]), ("select", [2, 0]), ("write", [1])]


# Drafting


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
@pytest.mark.parametrize("drafts", [1, 2, 3, 6])
def test_speculative_equals_plain(drafts: int, sampling: Sampling) -> None:
    """Also for more drafts than the head was trained for."""
    accepted = 0
    for model in (CONFIDENT, VAGUE):
        for prompts in ([PROMPTS[1]], PROMPTS):
            for request in speculative_is_plain(model, prompts, drafts, sampling, (24, 1, 17)):
                logprobs_are_targets(model, request)
                drafts_are_the_heads(model, request, sampling)
                if sampling.temperature == 0:
                    greedy_is_argmax(model, request)
                accepted += sum(step.accepted for step in request.steps)
    assert accepted > 10  # drafts were verified, not only refused


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral"])
def test_speculative_equals_plain_in_other_architectures(architecture: str) -> None:
    model = sequential(architecture, kv_heads=1, seed=4)
    for request in speculative_is_plain(model, PROMPTS, 3, SAMPLINGS[5]):
        logprobs_are_targets(model, request)
        drafts_are_the_heads(model, request, SAMPLINGS[5])


def test_speculative_equals_plain_in_float32() -> None:
    for request in speculative_is_plain(sequential(dtype=torch.float32), PROMPTS, 3, None, (16,), tolerance=1e-3):
        greedy_is_argmax(sequential(dtype=torch.float32), request, 1e-3)


@settings(max_examples=25)
@given(st.sampled_from(list(KINDS)), st.lists(WRITE | BACK | SELECT, min_size=2, max_size=9), st.integers(0, 99))
@example("llama", [("write", [3]), ("back", [0, 3, 1]), ("write", [2]), ("back", [1, 0, 4]), ("write", [1])], 0)
@example("qwen3", [("write", [4]), ("back", [1, 2, 0]), ("select", [2, 0]), ("write", [2]), ("write", [1])], 1)
def test_stepping_equals_the_training_forward(kind: str, moves: list[tuple[str, list[int]]], seed: int) -> None:
    drafting_is_unrolled(KINDS[kind], [*possible(moves), ("write", [2])], seed)


@pytest.mark.parametrize("kind", KINDS)
def test_no_depth_sees_further_than_it_reads(kind: str) -> None:
    tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
    for at in range(9):
        no_peeking(KINDS[kind], tokens, at)


def test_law_of_the_samples() -> None:
    model = sequential(layers=3, width=8, vocab=5, peaked=False, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "lm_head.weight":
                p.mul_(12)
    requests = sampling_law(model, [1, 2, 3], 2, Sampling(1.0), 5000)
    assert {0, 1, 2} == {step.accepted for request in requests for step in request.steps}


@pytest.mark.parametrize(("drafts", "says"), [(-1, "drafts = -1, but a model of"), (256, "drafts = 256, but")])
def test_drafts_that_cannot_be(drafts: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(CONFIDENT, PROMPTS, drafts)


def test_one_head_is_a_plain_model() -> None:
    model = sequential(n_future=1, layers=1)
    assert not model.config.sequential
    assert [name for name, _ in model.named_parameters() if name.startswith("heads.1")] == []
    for a, b in zip(run(model, PROMPTS, 0), run(tiny_model(n_future=1, layers=1), PROMPTS, 0), strict=True):
        same_output(a, b)


# Bugs that the checks above must see


def stale_drafts_stay(patch: pytest.MonkeyPatch) -> None:
    """The keys of refused drafts are taken for those of committed tokens."""
    real = KVCache.roll_back

    def roll_back(cache: KVCache, lengths: Sequence[int]) -> None:
        if cache.keys.size(0) > 1:
            real(cache, lengths)

    patch.setattr(KVCache, "roll_back", roll_back)


def states_of_another_position(patch: pytest.MonkeyPatch) -> None:
    real = Stepper.draft
    patch.setattr(
        Stepper, "draft", lambda s, tokens, hidden, cache, **how: real(s, tokens, hidden.roll(1, 1), cache, **how)
    )


def token_before(patch: pytest.MonkeyPatch) -> None:
    """A position is read with its own token instead of the one that follows."""
    real = Stepper.draft
    patch.setattr(
        Stepper, "draft", lambda s, tokens, hidden, cache, **how: real(s, tokens.roll(1, 1), hidden, cache, **how)
    )


def own_keys_everywhere(patch: pytest.MonkeyPatch) -> None:
    """In training, later depths see the keys of other positions' drafts."""

    def own(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        T = q.size(1)
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        k, v = torch.cat(list(keys), 1), torch.cat(list(values), 1)
        return unrolled.attention(q, k, v, mask.repeat(1, 1, 1, len(keys)))

    patch.setattr(unrolled, "merged_attention", own)


def rotary_of_the_first_depth(patch: pytest.MonkeyPatch) -> None:
    real = Rotary.forward
    patch.setattr(Rotary, "forward", lambda rotary, positions: real(rotary, positions - positions[..., :1]))


def decoding() -> None:
    for request in run(CONFIDENT, PROMPTS, 3):
        drafts_are_the_heads(CONFIDENT, request, Sampling())


def stepping() -> None:
    drafting_is_unrolled(KINDS["llama"], MOVES)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = [
    (states_of_another_position, decoding),
    (token_before, decoding),
    (own_keys_everywhere, decoding),
    (rotary_of_the_first_depth, decoding),
    (states_of_another_position, stepping),
    (token_before, stepping),
    (own_keys_everywhere, stepping),
    (rotary_of_the_first_depth, stepping),
]


@pytest.mark.parametrize(("bug", "check"), BUGS, ids=[f"{bug.__name__}-{check.__name__}" for bug, check in BUGS])
def test_bug_is_caught(
    bug: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    bug(monkeypatch)
    with pytest.raises(Violation):
        check()


def test_keys_of_drafts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stale_drafts_stay(monkeypatch)
    with pytest.raises(AssertionError):
        decoding()


def test_a_drafter_of_one_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """K drafts take K passes of the block and no more."""
    passes = []
    real = Stepper.draft

    def draft(stepper: Stepper, tokens: Tensor, hidden: Tensor, cache: KVCache, last: bool = False) -> Tensor:
        passes.append(tokens.size(1))
        return real(stepper, tokens, hidden, cache, last)

    monkeypatch.setattr(Stepper, "draft", draft)
    for drafts in (1, 3):
        passes.clear()
        (request,) = run(VAGUE, [PROMPTS[0]], drafts, max_tokens=6)
        assert len(passes) == drafts * (1 + len(request.steps))
        assert passes[0] == len(PROMPTS[0])  # the whole prompt once


# Loss


def labelled(seed: int, n: int = 4, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 17, (2, length + n), generator=g)
    documents = (torch.rand(2, length + n, generator=g) < 0.2).long().cumsum(1)
    return tokens, documents, torch.rand(2, length + n, generator=g) < 0.9


def gradients(model: Model, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def fast_total(
    model: Model, batch: tuple[Tensor, Tensor, Tensor], weights: list[float], trained: Sequence[Shared] = ALL_SHARED
) -> Tensor:
    n = model.config.n_future
    tokens, documents, mask = batch
    labels = loss.targets(tokens, documents, mask, n)
    hidden = model(tokens, documents, tokens.size(1) - n, trained)
    scales = loss.scales(weights, loss.valid_counts(labels))
    learned = n if "unembedding" in trained else 1
    return loss.mtp_loss(hidden, model.lm_head.weight, labels, scales, weight_learns_from=learned).total


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_every_gradient_are_the_oracles(tied: bool) -> None:
    model = sequential(width=16, peaked=False, tie_word_embeddings=tied)
    weights = [1.0, 0.5, 2.0, 0.25]
    for seed in range(3):
        tokens, documents, mask = labelled(seed)
        fast = fast_total(model, (tokens, documents, mask), weights)
        hidden = model(tokens, documents, 9)
        slow = loss.oracle_loss(hidden, model.lm_head.weight, tokens, documents, mask, weights)
        close(fast, slow, "loss")
        wanted = gradients(model, slow)
        for name, found in gradients(model, fast_total(model, (tokens, documents, mask), weights)).items():
            close(found, wanted[name], name)
        assert all(value.abs().max() > 0 for value in wanted.values())  # every parameter learns


PARTS: dict[Shared, tuple[str, ...]] = {
    "trunk": ("trunk.",),
    "embedding": ("embed_tokens.",),
    "unembedding": ("lm_head.", "norm."),
}


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
@pytest.mark.parametrize("part", PARTS)
def test_what_further_heads_train_can_be_switched(part: Shared, kind: str) -> None:
    """Without a part the further heads' losses give it nothing; what head 1 gives it stays, no other part changes."""
    model = tiny_model(width=16, peaked=False, head_kind=kind)
    batch, further = labelled(1), [0.0, 1.0, 1.0, 1.0]
    without: list[Shared] = [name for name in ALL_SHARED if name != part]
    given, kept = (gradients(model, fast_total(model, batch, further, names)) for names in (ALL_SHARED, without))
    for name in given:
        if name.startswith(PARTS[part]) and part != "embedding":
            assert given[name].any(), name
            assert not kept[name].any(), name
        elif name != "embed_tokens.weight":  # reached through the trunk too: see the next test
            close(kept[name], given[name], name)
    first, both = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    alone = gradients(model, fast_total(model, batch, first, without))
    together = gradients(model, fast_total(model, batch, both, without))
    for name in alone:
        close(together[name], alone[name] + kept[name], name)


def test_embedding_is_reached_directly_and_through_the_trunk() -> None:
    model = sequential(width=16, peaked=False)
    batch, further = labelled(2), [0.0, 1.0, 1.0, 1.0]

    def reached(*trained: Shared) -> bool:
        return bool(gradients(model, fast_total(model, batch, further, trained))["embed_tokens.weight"].any())

    assert reached("trunk", "embedding")
    assert reached("embedding")  # what the head reads
    assert reached("trunk")  # what the trunk reads
    assert not reached("unembedding")


def test_weight_of_the_head_scales_what_it_trains() -> None:
    model, batch = sequential(width=16, peaked=False), labelled(3)
    one, half, none = (
        gradients(model, fast_total(model, batch, [1.0, w, w, w]))["heads.1.mlp.up_proj.weight"] for w in (1.0, 0.5, 0)
    )
    close(half, one / 2, "half the weight")
    assert not none.any()
    assert one.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("depths", [2, 4])
def test_merged_attention_is_the_masked_one(dtype: torch.dtype, kv_heads: int, depths: int) -> None:
    g = torch.Generator().manual_seed(depths)

    def leaf(heads: int) -> Tensor:
        return torch.randn(2, 11, heads, 8, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    q, keys, values = leaf(4), [leaf(kv_heads) for _ in range(depths)], [leaf(kv_heads) for _ in range(depths)]
    upstream = torch.randn(2, 11, 4, 8, generator=g, dtype=torch.float64).to(dtype)
    found = []
    for form in (partial(unrolled.masked_attention, mask=None), unrolled.merged_attention):
        y = form(q, keys, values)
        found.append([y, *torch.autograd.grad(y, [q, *keys, *values], upstream)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for masked, merged in zip(*found, strict=True):
        assert merged.dtype == dtype
        close(merged.double(), masked.double(), "merged", tolerance)


def test_documents_are_kept_apart_at_every_depth() -> None:
    """Packed documents read as each would alone, where what a depth is fed belongs to the document."""
    model = sequential(peaked=False)
    tokens = torch.randint(0, 17, (1, 10), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        packed = model(tokens, documents)
        for start in (0, 5):
            alone = model(tokens[:, start : start + 5])
            for d in range(4):
                rows = slice(start, start + 5 - d)
                close(packed[d][:, rows], alone[d][:, : 5 - d], f"depth {d}, document at {start}", 1e-5)


# Start and shape


def test_start_from_the_last_block_takes_what_fits() -> None:
    model = sequential("qwen2", peaked=False)
    before = {name: p.clone() for name, p in model.heads[1].named_parameters()}
    model.heads.start_from_head_1()
    head, drafter = dict(model.heads[0].named_parameters()), dict(model.heads[1].named_parameters())
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "self_attn.o_proj.weight",
                 "post_attention_layernorm.weight"):  # fmt: skip
        assert torch.equal(drafter[name], head[name]), name
    assert torch.equal(drafter["hidden_norm.weight"], head["input_layernorm.weight"])
    assert torch.equal(drafter["input_layernorm.weight"], before["input_layernorm.weight"])  # of the embedding
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = drafter[f"self_attn.{name}.weight"]
        assert torch.equal(weight[:, 32:], head[f"self_attn.{name}.weight"])
        assert torch.equal(weight[:, :32], before[f"self_attn.{name}.weight"][:, :32])


def test_start_from_the_last_block_without_the_embedding_is_head_1() -> None:
    model = sequential(peaked=False)
    model.heads.start_from_head_1()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.heads[1].self_attn, name).weight[:, :32] = 0
        first, second, *_ = model(torch.tensor([[3, 1, 4, 1, 5]]))
    close(second, first, "depth 1")


def test_start_of_parallel_heads() -> None:
    model = tiny_model(peaked=False)
    model.heads.start_from_head_1()
    with torch.no_grad():
        first, *rest = model(torch.tensor([[3, 1, 4, 1, 5]]))
    for hidden in rest:
        close(hidden, first, "a head")


@pytest.mark.parametrize(("kind", "layers"), [("parallel", 5), ("sequential", 7)])
def test_total_blocks(kind: str, layers: int) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "total_blocks": 8, "n_future": 4, "head_kind": kind}
    assert ModelRecipe.model_validate(shape).resolve(260, 64).num_hidden_layers == layers


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model.num_hidden_layers": "2"}, "num_hidden_layers = 2, but head_kind"),
        ({"model.total_blocks": "1"}, "total_blocks must be at least 2"),
        ({"loss.method": "sequential"}, "goes head by head through parallel heads"),
        ({"model.head_kind": "chain"}, "model.head_kind"),
        ({"model.head_init": "copy"}, "model.head_init"),
        ({"loss.head_gradients": '["all"]'}, "loss.head_gradients"),
    ],
)
def test_recipes_that_cannot_be(fields: dict[str, str], says: str, corpus: Path, tmp_path: Path) -> None:
    wanted = {"model.head_kind": "sequential", "model.num_hidden_layers": "3", **fields}
    with pytest.raises(ConfigError, match=says) as error:
        train(recipe(corpus, *(f"{key}={value}" for key, value in wanted.items())), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# Checkpoints


def small(**fields: Any) -> Model:
    return sequential(**{"vocab": 260, "dtype": torch.float32, "peaked": False, **fields})


def test_heads_are_an_eagle3_directory(tmp_path: Path) -> None:
    model = small(layers=4, n_future=3)
    folder = save_checkpoint(tmp_path / "model", model, byte_tokenizer()) / "mtp_heads"
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "fc.weight": (32, 96),
        "norm.weight": (32,),
        "midlayer.hidden_norm.weight": (32,),
        "midlayer.input_layernorm.weight": (32,),
        "midlayer.post_attention_layernorm.weight": (32,),
        "midlayer.self_attn.q_proj.weight": (32, 64),
        "midlayer.self_attn.k_proj.weight": (16, 64),
        "midlayer.self_attn.v_proj.weight": (16, 64),
        "midlayer.self_attn.o_proj.weight": (32, 32),
        "midlayer.mlp.gate_proj.weight": (64, 32),
        "midlayer.mlp.up_proj.weight": (64, 32),
        "midlayer.mlp.down_proj.weight": (32, 64),
    }
    assert torch.equal(tensors["fc.weight"], torch.cat((torch.zeros(32, 64), torch.eye(32)), 1))
    config = json.loads((folder / "config.json").read_text())
    for key, value in {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32,
        "vocab_size": 260, "draft_vocab_size": 260, "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
        "foretoken": {"head_kind": "sequential", "n_future": 3, "hidden_size": 32},
    }.items():  # fmt: skip
        assert config[key] == value, key
    main = load_file(tmp_path / "model" / "model.safetensors")
    assert not [name for name in main if "midlayer" in name or name.startswith("fc")]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_is_the_same(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = small(architecture=architecture, tie_word_embeddings=tied)
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
    wanted = model(tokens)
    save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    loaded, _ = load_checkpoint(tmp_path / "model")
    assert loaded.config == model.config
    for a, b in zip(wanted, loaded(tokens), strict=True):
        assert torch.equal(a, b)
    assert describe(tmp_path / "model")["head_kind"] == "sequential"


def test_fc_that_reads_other_layers_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", small(), byte_tokenizer()) / "mtp_heads" / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.weight"][0, 0] = 1
    save_file(tensors, path)
    provenance = tmp_path / "model" / "foretoken.json"
    values = json.loads(provenance.read_text())
    provenance.write_text(json.dumps({**values, "sha256": {}}))
    with pytest.raises(CheckpointError, match=r"fc\.weight reads more than the trunk's output"):
        load_checkpoint(tmp_path / "model")


# Training and evaluation

SEQUENTIAL = ("model.head_kind=sequential", "model.num_hidden_layers=3")


def test_it_trains(corpus: Path, tmp_path: Path) -> None:
    result = train(recipe(corpus, *SEQUENTIAL), tmp_path / "run")
    log = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert all(last < first - 0.5 for first, last in zip(log[0]["loss"], log[-1]["loss"], strict=True))
    assert len(result.last["agreement"]) == 3


def test_stopped_and_resumed_is_never_stopped(corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, *SEQUENTIAL, "train.steps=6", "train.save_every=2", "train.keep_checkpoints=9",
                    "model.head_init=last_block", 'loss.head_gradients=["unembedding"]')  # fmt: skip
    train(wanted, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", stop_after(4))
        with pytest.raises(KeyboardInterrupt):
            train(wanted, tmp_path / "run")
    assert finish(wanted, tmp_path / "run").finished
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert records(tmp_path / "whole") == records(tmp_path / "run")


def stop_after(last: int) -> Callable[..., Path]:
    real = Saver.save

    def save(saver: Saver, step: int, *rest: Any) -> Path:
        saved = real(saver, step, *rest)
        if step == last:
            raise KeyboardInterrupt
        return saved

    return save


def test_detached_heads_leave_the_next_token_path_alone(corpus: Path, tmp_path: Path) -> None:
    """With nothing shared trained, head 1 learns as if the further heads had no weight."""
    common = (*SEQUENTIAL, "train.steps=4", "optim.clip=1e9")
    train(recipe(corpus, *common, "loss.head_gradients=[]"), tmp_path / "apart")
    train(recipe(corpus, *common, "loss.head_weights=[1.0, 0.0, 0.0]"), tmp_path / "alone")
    apart, alone = weights(tmp_path / "apart"), weights(tmp_path / "alone")
    for name, value in apart.items():
        assert torch.allclose(value, alone[name], atol=1e-6) != name.startswith("heads.1."), name


@pytest.mark.parametrize("length", [3, 40])
def test_windows_read_on_behind_their_end(length: int) -> None:
    """A window's last positions are scored with the document's tokens behind them, not with padding."""
    model, tokenizer = small(), byte_tokenizer()
    document = Document("abcdefghij" * 12, "letters")
    whole = evaluate(model, [document], tokenizer, seq_len=128)
    with torch.no_grad():
        tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(document.text)]])
        logits = [model.logits(hidden)[0] for hidden in model(tokens)]
    for d, head in enumerate(whole.heads):
        rows = logits[d][: tokens.size(1) - d - 1]
        nll = torch.nn.functional.cross_entropy(rows, tokens[0, d + 1 :])
        assert head.loss == pytest.approx(nll.item(), rel=1e-5)
    # One position a window: each reads nothing before it, and what the definition says behind it.
    single = evaluate(model, [document], tokenizer, seq_len=1, stride=1)
    assert single.heads[2].loss is not None
    with torch.no_grad():
        t = length
        states = model(tokens[:, t : t + 4], length=1)
        again = model(tokens[:, t : t + 2], length=1)
    close(states[1], again[1], "depth 1 reads one token further")
    assert not torch.equal(states[3], again[3])


def test_config_of_a_checkpoint_names_the_kind() -> None:
    config = tiny_config(head_kind="sequential")
    assert config.sequential
    assert ModelConfig.model_validate(config.model_dump()) == config
