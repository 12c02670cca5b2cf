"""Heads on somebody else's model, in somebody else's loop: the same heads as in ours, and a checkpoint at the end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run

import foretoken
from foretoken import attach_heads, mtp_loss, scales, targets, valid_counts
from foretoken.checkpoint import load_checkpoint, load_model
from foretoken.errors import CheckpointError, ConfigError
from foretoken.tokenizer import byte_tokenizer

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS = ["parallel", "sequential"]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5e4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def theirs(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, **fields,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_heads_are_ours(name: str, kind: str, tmp_path: Path) -> None:
    """What it saves, loaded and run by our model, gives all states that the attached one gives; and their logits."""
    model = attach_heads(theirs(name), 4, kind)
    for number, parameter in enumerate(model.heads.parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    tokens = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(0))
    found = model(tokens, 16)
    model.save(tmp_path / "saved", byte_tokenizer())
    own = load_model(tmp_path / "saved", None)
    for a, b in zip(found, own(tokens, length=16), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    assert torch.allclose(model.model(tokens).logits, own.logits(own(tokens)[0]), atol=2e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(again(tokens).logits, model.model(tokens).logits, atol=2e-5)


def test_at_first_parallel_heads_are_head_1() -> None:
    first, *others = attach_heads(theirs("qwen2"), 3)(torch.arange(12)[None])
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_learns(kind: str) -> None:
    model = attach_heads(theirs("llama"), 3, kind)
    windows = torch.randint(0, 260, (2, 19), generator=torch.Generator().manual_seed(0))
    labels = targets(windows, torch.zeros_like(windows), torch.ones_like(windows, dtype=torch.bool), 3)
    factors = scales([1.0] * 3, valid_counts(labels))
    mtp_loss(model(windows, 16), model.unembedding, labels, factors).total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert still == []


@pytest.mark.parametrize("name", ["plain_loop", "transformers_trainer"])
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train, and what they save is decoded with its heads, as without them."""
    if name == "transformers_trainer":
        pytest.importorskip("accelerate")
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "out")])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    model, tokenizer = load_checkpoint(tmp_path / "out")
    plain, drafted = (
        foretoken.generate(model, tokenizer, "import ", max_tokens=40, drafts=drafts) for drafts in (0, 3)
    )
    assert plain.ids == drafted.ids
    assert drafted.tokens_per_step > 1.2
    assert run(model, [[1, 2]], 3)[0].ids


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="n_future = 1 adds no head"):
        attach_heads(theirs("llama"), 1)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        attach_heads(transformers.GPT2LMHeadModel(config), 2)


def test_adapters_are_to_be_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = attach_heads(theirs("llama"), 2)
    model.model.add_adapter(adapters)
    for refused in (lambda: model.save(tmp_path / "saved", byte_tokenizer()), lambda: attach_heads(model.model, 2)):
        with pytest.raises(ConfigError, match="the model holds adapters of peft; merge them into its weights first"):
            refused()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for on in (False, True):
        model = attach_heads(theirs("llama"), 2).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sum(state.sum() for state in model(torch.arange(12)[None])).backward()
        assert model.model.is_gradient_checkpointing == on
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 20
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.model.is_gradient_checkpointing


def test_tokenizers_of_any_kind(tmp_path: Path) -> None:
    model = attach_heads(theirs("llama"), 2)
    byte_tokenizer().save(tmp_path / "bytes", model_max_length=128)
    given = [byte_tokenizer(), tmp_path / "bytes", transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")]
    for number, tokenizer in enumerate(given):
        saved = model.save(tmp_path / str(number), tokenizer)
        assert load_checkpoint(saved)[1].encode("a b") == byte_tokenizer().encode("a b")
