"""Head kinds beside `parallel` and `sequential`: the same invariants, and what is each one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import (
    cached_is_full,
    close,
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
from small_runs import finish, recipe, retrofitted
from test_decode import PROMPTS, SAMPLINGS
from test_model import BACK, SELECT, WRITE
from test_sequential import fast_total, gradients, labelled
from transformers import AutoModelForCausalLM

from foretoken.checkpoint import load_checkpoint, load_model, save_checkpoint
from foretoken.config import ModelRecipe
from foretoken.decode import decode
from foretoken.errors import CheckpointError, ConfigError
from foretoken.formats.eagle3 import export_eagle3
from foretoken.formats.engines import uses
from foretoken.formats.gguf import export_gguf
from foretoken.formats.hf_class import export_hf
from foretoken.heads import DeepSeekHeads, JointBlock
from foretoken.model import ALL_SHARED, Model
from foretoken.request import Request
from foretoken.retrofit import starting_config, starting_model, with_its_heads
from foretoken.sampling import Sampling
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train

KINDS = ("linear", "causal", "anticausal", "joint", "deepseek", "deepseek-shared")


def make(kind: str, layers: int = 5, **fields: object) -> Model:
    name, _, shared = kind.partition("-")
    return tiny_model(layers=layers, head_kind=name, shared_block=bool(shared), **fields)  # type: ignore[arg-type]


CONFIDENT = {kind: make(kind) for kind in KINDS}
VAGUE = {kind: make(kind, peaked=False, seed=1) for kind in KINDS}


# Definitions


@torch.no_grad()
def test_states_are_those_of_the_definition() -> None:
    tokens = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
    for kind, model in CONFIDENT.items():
        T, heads = 6, model.heads
        found = model(tokens, length=T)
        context = model.context(T)
        z = model.run_trunk(tokens[:, :T], context)
        embedded = [model.embed_tokens(tokens[:, d : d + T]) for d in range(4)]
        if kind == "anticausal":
            states = [heads[3](z, context)]
            for d in (2, 1, 0):
                states.insert(0, heads[d](states[0], context))
        else:
            states = [heads[0](z, context)]
        for d in range(1, 4):
            if kind == "linear":
                states.append(states[0] + states[0] @ heads[d].weight.T)
            elif kind == "causal":
                states.append(heads[d](states[-1], context))
            elif kind == "joint":
                block = heads[d]
                states.append(block(z, context) + embedded[d] @ block.before.weight.T)
            elif kind.startswith("deepseek"):
                block = heads[1 if kind.endswith("shared") else d]
                both = torch.cat((block.enorm(embedded[d]), block.hnorm(states[-1])), -1) @ block.eh_proj.weight.T
                both = both + block.self_attn(block.input_layernorm(both), context)
                states.append(both + block.mlp(block.post_attention_layernorm(both)))
        for d, (ours, state) in enumerate(zip(found, states, strict=True)):
            close(ours, model.norm(state), f"{kind}: head {d + 1}")


@pytest.mark.parametrize("kind", KINDS)
def test_no_head_sees_further_than_it_reads(kind: str) -> None:
    tokens = torch.randint(0, 17, (2, 12), generator=torch.Generator().manual_seed(0))
    for at in (4, 7):  # not at the end, where a head whose tokens are missing reads token 0
        no_peeking(CONFIDENT[kind], tokens, at)


@settings(max_examples=15)
@given(st.sampled_from(KINDS), st.lists(WRITE | BACK | SELECT, min_size=2, max_size=9), st.integers(0, 99))
def test_cached_stepping_equals_full_forward(kind: str, moves: list[tuple[str, list[int]]], seed: int) -> None:
    cached_is_full(CONFIDENT[kind], [*possible(moves), ("write", [2])], seed)


# Drafting


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[5]], ids=["greedy", "plain", "all"])
@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_speculative_equals_plain(kind: str, drafts: int, sampling: Sampling) -> None:
    accepted = 0
    for model in (CONFIDENT[kind], VAGUE[kind]):
        for prompts in ([PROMPTS[1]], PROMPTS):
            for request in speculative_is_plain(model, prompts, drafts, sampling, (24, 1, 17)):
                logprobs_are_targets(model, request)
                drafts_are_the_heads(model, request, sampling)
                accepted += sum(step.accepted for step in request.steps)
    assert accepted > 0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
def test_speculative_equals_plain_in_other_architectures(kind: str, architecture: str) -> None:
    model = make(kind, architecture=architecture, kv_heads=1, seed=4)
    for request in speculative_is_plain(model, PROMPTS, 3, SAMPLINGS[5]):
        logprobs_are_targets(model, request)
        drafts_are_the_heads(model, request, SAMPLINGS[5])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_plain_in_float32(kind: str) -> None:
    """Verification runs in the compiled form, where there is one; the heads on top of each other do too."""
    model = make(kind, dtype=torch.float32)
    for request in speculative_is_plain(model, PROMPTS, 3, None, (16,), tolerance=1e-3):
        greedy_is_argmax(model, request, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_trees_and_chosen_numbers_of_drafts_change_nothing(kind: str) -> None:
    for sampling in (Sampling(), Sampling(0.8)):
        plain = run(VAGUE[kind], PROMPTS, 0, sampling)
        for drafts, nodes in ((3, 6), (2, 8), (None, None)):
            requests = [Request(list(prompt), 24, i) for i, prompt in enumerate(PROMPTS)]
            for _ in decode(VAGUE[kind], requests, sampling, drafts, slots=3, nodes=nodes):
                pass
            for request, wanted in zip(requests, plain, strict=True):
                same_output(request, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_among_a_part_of_the_vocabulary(kind: str) -> None:
    for request in speculative_is_plain(CONFIDENT[kind], PROMPTS, 3, Sampling(0.7), draft_vocab=9):
        drafts_are_the_heads(CONFIDENT[kind], request, Sampling(0.7), 9)


@pytest.mark.parametrize("kind", KINDS)
def test_with_unembeddings_of_their_own(kind: str, tmp_path: Path) -> None:
    model = make(kind, vocab=260, dtype=torch.float32, unembedding="per_head")
    save_checkpoint(tmp_path / "c", model, byte_tokenizer())
    loaded, _ = load_checkpoint(tmp_path / "c", "float32")
    assert loaded.config == model.config
    for request in speculative_is_plain(loaded, PROMPTS, 3, Sampling(0.7), (16,), tolerance=1e-3):
        drafts_are_the_heads(model, request, Sampling(0.7))


@pytest.mark.parametrize("accept", ["keyed", "rejection"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sampling_law_is_the_targets(kind: str, accept: str) -> None:
    model = make(kind, vocab=5, peaked=False, seed=3)
    sampling_law(model, [1, 2, 3], 2, Sampling(1.0, accept=accept), 5000)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_more_drafts_than_heads_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="drafts = 4, but a model with 4 heads drafts 0 to 3 tokens per step"):
        run(CONFIDENT[kind], PROMPTS, 4)


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_what_further_heads_train_can_be_switched(kind: str) -> None:
    model, batch, further = make(kind, width=16, peaked=False), labelled(1), [0.0, 1.0, 1.0, 1.0]
    every = gradients(model, fast_total(model, batch, further))
    assert every["trunk.0.mlp.up_proj.weight"].any()
    assert every["lm_head.weight"].any()
    if kind == "anticausal":
        with pytest.raises(AssertionError, match="further heads are what head 1 reads"):
            fast_total(model, batch, further, ["embedding"])
        return
    alone = gradients(model, fast_total(model, batch, further, []))
    for name, gradient in alone.items():
        own = name.startswith("heads.") and not name.startswith("heads.0.")
        assert gradient.any() == own, name
    assert set(ALL_SHARED) == {"trunk", "embedding", "unembedding"}


@pytest.mark.parametrize("kind", ["linear", "causal", "joint"])
def test_heads_begin_with_what_head_1_predicts(kind: str) -> None:
    model = make(kind)
    model.heads.start_from_head_1()
    states = model(torch.tensor([PROMPTS[1]]))
    for state in states[1:]:
        close(state, states[0], kind)


def test_deepseek_blocks_begin_as_head_1_on_the_hidden_state() -> None:
    model = make("deepseek")
    model.heads.start_from_head_1()
    assert isinstance(model.heads, DeepSeekHeads)
    hidden, embedded = torch.randn(2, 1, 4, 32, dtype=torch.float64)
    for depth in (1, 2, 3):
        block = model.heads.at(depth)
        close(block.join(embedded, hidden), block.hnorm(hidden), "joined")
        assert torch.equal(block.mlp.up_proj.weight, model.heads[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("linear", 8), ("causal", 5), ("anticausal", 8), ("joint", 5), ("deepseek", 5), ("deepseek-shared", 7)],
)
def test_total_blocks_are_split(kind: str, layers: int) -> None:
    name, _, shared = kind.partition("-")
    fields = {"hidden_size": 32, "num_attention_heads": 4, "total_blocks": 8}
    asked = ModelRecipe.model_validate({**fields, "head_kind": name, "shared_block": bool(shared)})
    config = asked.resolve(17, 32)
    assert config.num_hidden_layers == layers
    model = Model(config)
    blocks = {name.partition(".self_attn")[0] for name, _ in model.named_parameters() if ".self_attn." in name}
    assert len(blocks) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_saves_and_decodes(kind: str, corpus: Path, tmp_path: Path) -> None:
    name, _, shared = kind.partition("-")
    asked = recipe(
        corpus, f"model.head_kind={name}", f"model.shared_block={str(bool(shared)).lower()}",
        "model.num_hidden_layers=4", "model.n_future=3",
    )  # fmt: skip
    finish(asked, tmp_path / "run")
    loaded, tokenizer = load_checkpoint(tmp_path / "run", "float32")
    assert (loaded.config.head_kind, loaded.config.shared_block) == (name, bool(shared))
    for request in speculative_is_plain(loaded, [tokenizer.encode("def f")], 2, None, (12,), tolerance=1e-3):
        assert request.ids


@pytest.mark.parametrize(
    ("old", "new"), [("anticausal", "parallel"), ("joint", "joint"), ("deepseek-shared", "deepseek")]
)
def test_a_checkpoint_gets_heads_of_another_kind(old: str, new: str, tmp_path: Path) -> None:
    """Its next-token path stays, wherever its blocks stand; heads of the same kind stay, too."""
    model = make(old, vocab=260, dtype=torch.float32)
    save_checkpoint(tmp_path / "c", model, byte_tokenizer())
    asked = ModelRecipe.model_validate({"start_from": str(tmp_path / "c"), "n_future": 3, "head_kind": new})
    config, _ = starting_config(asked, 32)
    started = starting_model(asked, config, 0).eval()
    assert (started.config.head_kind, started.config.n_future) == (new, 3)
    tokens = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        ours, theirs = started(tokens), model(tokens)
    for i in range(3 if old == new else 1):
        close(ours[i], theirs[i], f"head {i + 1}", 0)


ALL_LEARN = ("model.frozen=false", "loss.soft=0")


@pytest.mark.parametrize("kind", [*KINDS, "sequential"])
@pytest.mark.parametrize("unembedding", ["shared", "per_head"])
def test_heads_that_exist_go_on(kind: str, unembedding: str, corpus: Path, tmp_path: Path) -> None:
    """A run from a checkpoint has its heads, where nobody says otherwise, and changes nothing before its first step."""
    model = make(kind, vocab=260, dtype=torch.float32, unembedding=unembedding, max_position_embeddings=64)
    save_checkpoint(tmp_path / "c", model, byte_tokenizer())
    said = retrofitted(tmp_path / "c", corpus, f"model.n_future={model.config.n_future}", "model.frozen=false")
    asked = with_its_heads(said)
    config, _ = starting_config(asked.model, 32)
    assert config == model.config
    for name, tensor in starting_model(asked.model, config, 0).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    train(said, tmp_path / "run")
    assert load_model(tmp_path / "run", None).config == model.config


@pytest.mark.parametrize("kind", [*KINDS, "sequential", "parallel"])
@pytest.mark.parametrize("unembedding", ["shared", "per_head"])
@pytest.mark.parametrize("n", [1, 2])
def test_some_of_the_heads_go_on(kind: str, unembedding: str, n: int, corpus: Path, tmp_path: Path) -> None:
    model = make(kind, vocab=260, dtype=torch.float32, unembedding=unembedding, max_position_embeddings=64)
    save_checkpoint(tmp_path / "c", model, byte_tokenizer())
    asked = with_its_heads(retrofitted(tmp_path / "c", corpus, f"model.n_future={n}", *ALL_LEARN)).model
    started = starting_model(asked, starting_config(asked, 32)[0], 0).eval()
    tokens = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        ours, theirs = started(tokens), model(tokens)
    assert len(ours) == n
    for i in range(n):
        close(ours[i], theirs[i], f"head {i + 1}", 0)
        assert torch.equal(started.unembeddings()[i], model.unembeddings()[i])


def test_heads_that_exist_are_not_what_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", make("anticausal", vocab=260, dtype=torch.float32), byte_tokenizer())
    with pytest.raises(ConfigError, match=r"heads of .*/c: model: .*none is a copy, or learns alone"):
        train(retrofitted(tmp_path / "c", corpus), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"c: anticausal heads are blocks .*: none is added to its 4"):
        train(retrofitted(tmp_path / "c", corpus, *ALL_LEARN, "model.n_future=5"), tmp_path / "run")
    other = with_its_heads(retrofitted(tmp_path / "c", corpus, "model.head_kind=joint"))
    assert (other.model.head_kind, other.model.unembedding) == ("joint", "shared")


# Checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(kind: str, tied: bool, tmp_path: Path) -> None:
    model = make(kind, vocab=260, dtype=torch.float32, tie_word_embeddings=tied)
    save_checkpoint(tmp_path / "c", model, byte_tokenizer())
    loaded, _ = load_checkpoint(tmp_path / "c", "float32")
    assert loaded.config == model.config
    tokens = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(loaded.eval()(tokens), model(tokens), strict=True):
            assert torch.equal(ours, theirs)
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
        close(twin(tokens).logits, model.logits(model(tokens)[0]), "transformers", 2e-4)
    own = load_file(tmp_path / "c" / "mtp_heads" / "model.safetensors")
    beside = [name for name in own if name != "norm.weight"]
    assert (beside == []) == (kind == "anticausal")
    values = json.loads((tmp_path / "c" / "mtp_heads" / "config.json").read_text(encoding="utf-8"))
    assert values["architectures"] == ["ForetokenHeads"]  # which no engine takes for something else
    for name in beside[:1]:
        missing = {key: tensor for key, tensor in own.items() if key != name}
        (tmp_path / "c" / "foretoken.json").unlink()  # with the digests
        save_file(missing, tmp_path / "c" / "mtp_heads" / "model.safetensors")
        with pytest.raises(CheckpointError, match=name.split(".")[-2]):
            load_checkpoint(tmp_path / "c", "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_engines_are_not_given_what_they_would_misread(kind: str, tmp_path: Path) -> None:
    model = make(kind, vocab=260, dtype=torch.float32)
    save_checkpoint(tmp_path / "c", model, byte_tokenizer())
    name = kind.partition("-")[0]
    for export in (export_eagle3, export_gguf, export_hf):
        with pytest.raises(CheckpointError, match=f"{name}"):
            export(tmp_path / "c", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export_gguf(tmp_path / "c", tmp_path / "plain", drafter=False)
    drafting = {use.engine: use.reason for use in uses(tmp_path / "c") if use.drafts}
    assert drafting.pop("foretoken") == ""
    assert drafting.keys() == {"transformers", "vllm", "llama_cpp", "sglang", "tensorrt_llm"}
    assert all(f"{name} heads are for foretoken alone" in reason for reason in drafting.values())


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 anticausal heads are the last 4 blocks"):
        tiny_config(layers=3, head_kind="anticausal")
    with pytest.raises(ValueError, match='shared_block is of head_kind = "deepseek", not "joint"'):
        tiny_config(head_kind="joint", shared_block=True)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "total_blocks": 8}
    for fields in ({"start_from": "x", "frozen": True}, {**shape, "head_init": "last_block"}):
        with pytest.raises(ValueError, match="anticausal heads are blocks of the next-token path: none is a copy"):
            ModelRecipe.model_validate({**fields, "head_kind": "anticausal"})


def test_one_head_is_the_same_of_every_kind() -> None:
    plain = tiny_model(n_future=1)
    tokens = torch.tensor([PROMPTS[1]])
    for kind in ("linear", "causal", "anticausal", "joint", "deepseek"):
        other = tiny_model(n_future=1, head_kind=kind)
        assert torch.equal(other(tokens)[0], plain(tokens)[0])


def test_joint_blocks_are_told_of_the_token_before() -> None:
    block = CONFIDENT["joint"].heads[1]
    assert isinstance(block, JointBlock)
    assert block.before.weight.any()
