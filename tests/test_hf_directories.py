"""Directories of Hugging Face's layout are checkpoints as they are: the same logits as transformers', or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.checkpoint import load_checkpoint, save_checkpoint
from foretoken.errors import CheckpointError
from foretoken.model import Model
from foretoken.tokenizer import byte_tokenizer

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


Twin = Callable[..., tuple[Path, Any]]


@pytest.fixture
def twin(transformers: Any, tmp_path: Path) -> Twin:
    """The directory of a tiny random model that transformers saved, in shards or one file, and what it loads there."""

    def make(architecture: str, sharded: bool = False, dtype: str = "float32", **fields: Any) -> tuple[Path, Any]:
        shape = {
            "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        shape |= {"sliding_window": None} if architecture == "mistral" else {}
        config = transformers.AutoConfig.for_model(architecture, **{**shape, **fields})
        foreign = transformers.AutoModelForCausalLM.from_config(config).eval()
        torch.manual_seed(0)
        for p in foreign.parameters():
            torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0, 0.2)
        foreign.to(getattr(torch, dtype))
        folder = tmp_path / "model"
        foreign.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
        assert (folder / "model.safetensors.index.json").exists() == sharded
        byte_tokenizer().save(folder)
        return folder, transformers.AutoModelForCausalLM.from_pretrained(folder)

    return make


@torch.no_grad()
def whole(model: Model) -> Tensor:
    return model.logits(model(TOKENS)[0])


def stepped(model: Model) -> Tensor:
    """Left to right, token by token, with the cache, as decoding runs it."""
    stepper = model.stepper()
    cache = stepper.new_cache(*TOKENS.shape, 1)
    steps = [stepper.logits(stepper.forward(token, cache, 1)[0][0]) for token in TOKENS.split(1, 1)]
    return torch.cat(steps, 1)


@torch.no_grad()
def foreign_logits(foreign: Any) -> tuple[Tensor, Tensor]:
    """transformers' at once, and token by token with its cache."""
    cache, steps = None, []
    for token in TOKENS.split(1, 1):
        output = foreign(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits.float())
    return foreign(TOKENS).logits.float(), torch.cat(steps, 1)


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"sharded": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "tied and sharded": {
        "sharded": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
    },
    "wide heads": {"head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_transformers(twin: Twin, architecture: str, variant: str) -> None:
    """At once and stepping, against transformers at once and stepping."""
    if architecture == "qwen2" and variant == "wide heads":
        pytest.skip("Qwen2 has no head_dim")
    folder, foreign = twin(architecture, **VARIANTS[variant])
    model, _ = load_checkpoint(folder)
    assert (model.config.architecture, model.config.n_future) == (architecture, 1)
    theirs, steps = foreign_logits(foreign)
    for ours in (whole(model), stepped(model)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, steps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_within_its_rounding(twin: Twin, transformers: Any, architecture: str) -> None:
    """As far from the same weights in float32 as transformers in bfloat16 is."""
    folder, foreign = twin(architecture, dtype="bfloat16")
    model, _ = load_checkpoint(folder)
    assert model.dtype == torch.bfloat16
    theirs, _ = foreign_logits(foreign)
    exact, _ = foreign_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    allowed = 2 * (theirs - exact).abs().max()
    assert 0 < allowed < 0.2 * exact.abs().max()
    for ours in (whole(model), stepped(model)):
        assert (ours - exact).abs().max() < allowed
    torch.testing.assert_close(whole(load_checkpoint(folder, "float32")[0]), exact, atol=1e-5, rtol=1e-5)


def older(rope_scaling: dict[str, Any] | None, theta: float) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        del values["rope_parameters"]
        values |= {"rope_theta": theta, "rope_scaling": rope_scaling}
        values["torch_dtype"] = values.pop("dtype")

    return change


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scaled", [False, True])
def test_config_of_transformers_4(twin: Twin, architecture: str, scaled: bool) -> None:
    """rope_theta and rope_scaling at the top, as versions before 5 wrote them, mean what rope_parameters does."""
    rope = {"rope_theta": 5e4, **(LLAMA3 if scaled else {"rope_type": "default"})}
    folder, foreign = twin(architecture, rope_parameters=rope)
    change_config(folder, older(LLAMA3 if scaled else None, 5e4))
    model, _ = load_checkpoint(folder)
    assert (model.config.rope_theta, model.config.rope_scaling is not None) == (5e4, scaled)
    torch.testing.assert_close(whole(model), foreign_logits(foreign)[0], atol=1e-5, rtol=1e-5)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("architecture", "fields", "says"),
    [
        ("mistral", {"sliding_window": 8}, "sliding-window attention is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
        ("llama", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias = true is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias = true is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'linear'"),
    ],
)
def test_what_is_not_computed_is_refused(twin: Twin, architecture: str, fields: dict[str, Any], says: str) -> None:
    folder, _ = twin(architecture, **fields)
    with pytest.raises(CheckpointError, match=says) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("mistral", lambda values: values.pop("sliding_window")),  # transformers then takes 4096
        ("qwen2", lambda values: values.update(layer_types=["full_attention", "sliding_attention", "full_attention"])),
    ],
)
def test_windows_that_only_transformers_knows_of(twin: Twin, architecture: str, change: Callable[..., Any]) -> None:
    folder, _ = twin(architecture)
    load_checkpoint(folder)
    change_config(folder, change)
    with pytest.raises(CheckpointError, match="sliding-window attention is not supported"):
        load_checkpoint(folder)


def test_shards_are_read_strictly(twin: Twin) -> None:
    folder, _ = twin("llama", sharded=True)
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    shard = sorted(set(named["weight_map"].values()))[2]
    lost = sorted(name for name, file in named["weight_map"].items() if file == shard)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in named["weight_map"].items() if v != shard}}))
    with pytest.raises(CheckpointError, match=f"tensor '{lost[0]}' is missing"):
        load_checkpoint(folder)
    index.write_text(json.dumps(named))
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{shard}: not a complete safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_again_it_is_the_same_to_both(twin: Twin, transformers: Any, architecture: str, tmp_path: Path) -> None:
    folder, foreign = twin(architecture, sharded=True, tie_word_embeddings=True)
    model, tokenizer = load_checkpoint(folder)
    again = save_checkpoint(tmp_path / "again", model, tokenizer)
    assert torch.equal(whole(load_checkpoint(again)[0]), whole(model))
    reread = transformers.AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(foreign_logits(reread)[0], foreign_logits(foreign)[0])
