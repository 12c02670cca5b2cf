"""Checkpoints: what is saved is what loads, here and in transformers, and nothing else loads."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from small_runs import content
from torch import Tensor

import foretoken
from foretoken import checkpoint as checkpoints
from foretoken.checkpoint import describe, find_checkpoint, load_checkpoint, load_model, prune, save_checkpoint
from foretoken.errors import CheckpointError, ForetokenError
from foretoken.formats import safetensors as files
from foretoken.model import Model
from foretoken.provenance import Provenance
from foretoken.tokenizer import Tokenizer, byte_tokenizer, train_bpe

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))


def small(architecture: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Model:
    """A model of bytes whose norms and biases are random too."""
    return tiny_model(architecture, **{"vocab": 260, "dtype": dtype, "peaked": False, **fields})


@torch.no_grad()
def logits(model: Model) -> list[Tensor]:
    return [model.logits(hidden) for hidden in model(TOKENS)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", small(n_future=3, layers=2), byte_tokenizer())


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; ... removes one."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))


# Save and load.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decoded", [False, True])
def test_loaded_model_has_the_same_logits(architecture: str, tied: bool, decoded: bool, tmp_path: Path) -> None:
    """Those of every head, bit for bit; also when decoding has laid the weights out anew."""
    model = small(architecture, tie_word_embeddings=tied, rope_scaling=LLAMA3)
    before = logits(model)
    if decoded:
        model.stepper()
    save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    loaded, _ = load_checkpoint(tmp_path / "model")
    assert loaded.config == model.config
    for a, b in zip(before, logits(loaded), strict=True):
        torch.testing.assert_close(a, b, atol=0 if not decoded else 1e-6, rtol=0)
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
        assert b.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_type_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", small(dtype=dtype), byte_tokenizer())
    assert load_checkpoint(tmp_path / "model")[0].dtype == dtype
    assert load_checkpoint(tmp_path / "model", "bfloat16")[0].dtype == torch.bfloat16
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_one_head_is_a_plain_directory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", small(n_future=1), byte_tokenizer())
    assert not (tmp_path / "model" / "mtp_heads").exists()
    assert load_checkpoint(tmp_path / "model")[0].config.n_future == 1


def test_public_names_save_and_load(tmp_path: Path) -> None:
    model = small()
    foretoken.save(tmp_path / "model", model, byte_tokenizer())
    loaded, tokenizer = foretoken.load(tmp_path / "model")
    assert tokenizer.encode("a") == [97]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_what_lies_where(saved: Path) -> None:
    assert sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()) == [
        "config.json",
        "foretoken.json",
        "generation_config.json",
        "model.safetensors",
        "mtp_heads/config.json",
        "mtp_heads/model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    main, heads = load_file(saved / "model.safetensors"), load_file(saved / "mtp_heads" / "model.safetensors")
    block = {
        "self_attn.q_proj.weight": (32, 32), "self_attn.k_proj.weight": (16, 32), "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32), "mlp.gate_proj.weight": (64, 32), "mlp.up_proj.weight": (64, 32),
        "mlp.down_proj.weight": (32, 64), "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,),
    }  # fmt: skip
    whole = {"model.embed_tokens.weight": (260, 32), "model.norm.weight": (32,), "lm_head.weight": (260, 32)}
    whole |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert {name: tuple(t.shape) for name, t in main.items()} == whole
    beside = {"norm.weight": (32,)} | {f"heads.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert {name: tuple(t.shape) for name, t in heads.items()} == beside


def test_tensors_are_those_of_the_heads(tmp_path: Path) -> None:
    model = small(n_future=3, layers=2)
    save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    main = load_file(tmp_path / "model" / "model.safetensors")
    heads = load_file(tmp_path / "model" / "mtp_heads" / "model.safetensors")
    down = "mlp.down_proj.weight"
    assert torch.equal(main[f"model.layers.0.{down}"], model.trunk[0].mlp.down_proj.weight)
    assert torch.equal(main[f"model.layers.1.{down}"], model.heads[0].mlp.down_proj.weight)
    assert torch.equal(heads[f"heads.0.{down}"], model.heads[1].mlp.down_proj.weight)
    assert torch.equal(heads[f"heads.1.{down}"], model.heads[2].mlp.down_proj.weight)
    assert torch.equal(heads["norm.weight"], main["model.norm.weight"])


def test_tied_unembedding_is_stored_once(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", small(tie_word_embeddings=True), byte_tokenizer())
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_a_tied_unembedding_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    for name, change, says in (("copy", 0.0, None), ("other", 1.0, "'lm_head.weight' is not the embedding, though")):
        file = save_checkpoint(tmp_path / name, small(tie_word_embeddings=True), byte_tokenizer()) / "model.safetensors"
        (tmp_path / name / "foretoken.json").unlink()
        weights = load_file(file)
        save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + change}, file)
        with nullcontext() if says is None else pytest.raises(CheckpointError, match=says):
            load_model(tmp_path / name, None)


def test_config_of_the_heads_is_a_drafters(saved: Path) -> None:
    main = json.loads((saved / "config.json").read_text())
    heads = json.loads((saved / "mtp_heads" / "config.json").read_text())
    changed = {
        "architectures": ["MtpHeadsEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "head_dim": 8,
        "draft_vocab_size": 260,
        "eagle_aux_hidden_state_layer_ids": [1],
    }
    assert {key: heads[key] for key in changed} == changed
    assert heads["foretoken"] == {"head_kind": "parallel", "n_future": 3, "hidden_size": 32}
    others = changed.keys() | {"foretoken"}
    assert {k: v for k, v in heads.items() if k not in others} == {k: v for k, v in main.items() if k not in others}
    assert main["architectures"] == ["LlamaForCausalLM"]
    assert main["model_type"] == "llama"
    assert "foretoken" not in main


def test_provenance(tmp_path: Path) -> None:
    provenance = Provenance({"model": {}}, "abc", 7, {"loss": [1.0]})
    save_checkpoint(tmp_path / "model", small(), byte_tokenizer(), provenance)
    stored = json.loads((tmp_path / "model" / "foretoken.json").read_text())
    assert stored["foretoken_version"] == foretoken.__version__
    assert (stored["recipe"], stored["data_fingerprint"]) == ({"model": {}}, "abc")
    assert (stored["step"], stored["metrics"]) == (7, {"loss": [1.0]})
    assert stored["sha256"].keys() == {"model.safetensors", "mtp_heads/model.safetensors"}


def test_permissions_are_a_new_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_checkpoint(tmp_path / "model", small(), byte_tokenizer(), optimizers=[stepped(small())])
    finally:
        os.umask(before)
    for path in (tmp_path / "model").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def stepped(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def test_description(saved: Path) -> None:
    values = describe(saved)
    stored = [*load_file(saved / "model.safetensors").values()]
    heads = load_file(saved / "mtp_heads" / "model.safetensors")
    heads.pop("norm.weight")
    assert values["next_token_parameters"] == sum(t.numel() for t in stored)
    assert values["parameters"] == sum(t.numel() for t in [*stored, *heads.values()])
    assert (values["next_token_layers"], values["n_future"], values["head_kind"]) == (2, 3, "parallel")
    assert (values["vocab_size"], values["tokenizer"]) == (260, "bytes")


# transformers.


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


def foreign_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 50_000.0}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("mistral", {}),
        ("qwen2", {"rope_theta": 1e6}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_transformers_computes_the_same(
    transformers: Any, tmp_path: Path, architecture: str, fields: dict[str, Any]
) -> None:
    model = small(architecture, **fields)
    save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    foreign, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(foreign).__name__.lower() == f"{architecture}forcausallm"
    assert not any(told.values()), told
    torch.testing.assert_close(foreign_logits(foreign), logits(model)[0], atol=1e-5, rtol=1e-5)


def test_transformers_tokenizer_gives_the_same_ids(transformers: Any, tmp_path: Path) -> None:
    text = "Grüße, def f(x): return '<|eos|>' 漢字 \n\t\x00"
    tokenizers = {"bytes": byte_tokenizer(), "bpe": train_bpe(["def f(x): return x\n"] * 9, 300)}
    for name, tokenizer in tokenizers.items():
        save_checkpoint(tmp_path / name, small(vocab=tokenizer.vocab_size), tokenizer)
        foreign = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert foreign(text)["input_ids"] == tokenizer.encode(text, add_special_tokens=True)
        assert foreign.decode(tokenizer.encode(text)) == text
        assert (foreign.bos_token_id, foreign.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shards", [False, True])
def test_directory_that_transformers_saved(transformers: Any, tmp_path: Path, architecture: str, shards: bool) -> None:
    """Its own files, config and all, one of each architecture; sharded, with tied embeddings and Llama 3's rope."""
    fields = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": shards,
    }  # fmt: skip
    if shards:
        fields["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    if architecture == "mistral":
        fields["sliding_window"] = None
    config = transformers.AutoConfig.for_model(architecture, **fields)
    torch.manual_seed(0)
    foreign = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in foreign.parameters():
        torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0, 0.2)
    foreign.save_pretrained(tmp_path / "model", max_shard_size="20KB" if shards else "1GB")
    byte_tokenizer().save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == shards
    model, _ = load_checkpoint(tmp_path / "model")
    assert model.config.n_future == 1
    torch.testing.assert_close(logits(model)[0], foreign_logits(foreign), atol=1e-5, rtol=1e-5)
    if shards:
        first = sorted((tmp_path / "model").glob("model-*.safetensors"))[0]
        first.unlink()
        with pytest.raises(CheckpointError, match=f"{first.name}: missing"):
            load_checkpoint(tmp_path / "model")


def test_a_tokenizer_of_more_tokens_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model: tokenizer of 260 tokens beside a model of 250"):
        save_checkpoint(tmp_path / "model", small(vocab=250), byte_tokenizer())
    assert not (tmp_path / "model").exists()


def test_a_single_file_goes_before_an_index(saved: Path) -> None:
    """As in transformers, where the shards were merged and the index was left."""
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    load_model(saved, None)


def test_larger_embedding_than_tokenizer_is_anothers_right(transformers: Any, tmp_path: Path) -> None:
    """Published models pad their vocabulary: saved by us they load again, but not with another tokenizer."""
    save_checkpoint(tmp_path / "model", small(vocab=320), byte_tokenizer())
    assert load_checkpoint(tmp_path / "model")[0].config.vocab_size == 320
    train_bpe(["def f(x): return x"], 261).save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is not the tokenizer that this model was saved with"):
        load_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "foretoken.json").unlink()
    assert load_checkpoint(tmp_path / "model")[1].vocab_size <= 261


# Strictness: what is wrong is named, in one line.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 64
    path.write_bytes(raw)


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def keys(**changes: object) -> Callable[[Path], object]:
    return lambda path: edit(path, **changes)


def heads(**fields: object) -> Callable[[Path], object]:
    return keys(foretoken={"head_kind": "parallel", "n_future": 3, "hidden_size": 32, **fields})


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Change the tensors of a file, and take the digests off the record."""

    def act(path: Path) -> None:
        values = load_file(path)
        change(values)
        save_file(values, path)
        edit(path.parents[path.parent.name == "mtp_heads"] / "foretoken.json", sha256={})

    return act


def put(**values: Tensor) -> Callable[[Path], object]:
    return tensors(lambda t: t.update({name.replace("__", "."): value for name, value in values.items()}))


def drop(part: str) -> Callable[[Path], object]:
    return tensors(lambda t: [t.pop(name) for name in [*t] if part in name])


def no_digest_and_cut(path: Path) -> None:
    cut(path)
    edit(path.with_name("foretoken.json"), sha256={})


MAIN, CONFIG, OWN, TOKENIZER = "model.safetensors", "config.json", "foretoken.json", "tokenizer.json"
HEADS, HEADS_CONFIG = "mtp_heads/model.safetensors", "mtp_heads/config.json"
DIFFERS = "safetensors: is not the file that foretoken.json recorded (sha256 differs)"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut short": (MAIN, cut, DIFFERS),
    "cut short, no digest": (MAIN, no_digest_and_cut, "model.safetensors: not a complete safetensors file"),
    "empty": (MAIN, write(""), DIFFERS),
    "byte flipped": (MAIN, flip, DIFFERS),
    "byte of heads flipped": (HEADS, flip, "mtp_heads/model." + DIFFERS),
    "file missing": (MAIN, Path.unlink, "model.safetensors: missing"),
    "heads' file missing": (HEADS, Path.unlink, "mtp_heads/model.safetensors: missing"),
    "heads' config missing": (HEADS_CONFIG, Path.unlink, "mtp_heads/config.json: missing"),
    "tensor missing": (MAIN, drop("model.norm"), "tensor 'model.norm.weight' is missing"),
    "tensors missing": (MAIN, drop("layers.0"), "'model.layers.0.input_layernorm.weight' is missing (and 8 more)"),
    "head's tensor missing": (
        HEADS,
        drop("heads.1.mlp.up"),
        "mtp_heads: tensor 'heads.1.mlp.up_proj.weight' is missing",
    ),
    "tensor too many": (MAIN, put(extra=torch.zeros(2)), "tensor 'extra' is not one of this model's"),
    "head in the main file": (MAIN, put(heads__0__x=torch.zeros(2)), "tensor 'heads.0.x' is not one of this model's"),
    "unembedding in heads": (
        HEADS,
        put(lm_head__weight=torch.ones(1)),
        "mtp_heads: tensor 'lm_head.weight' is not one",
    ),
    "wrong shape": (MAIN, put(lm_head__weight=torch.ones(260, 31)), "has shape (260, 31), must be (260, 32)"),
    "whole numbers": (
        MAIN,
        put(model__norm__weight=torch.ones(32).int()),
        "'model.norm.weight' is of type torch.int32",
    ),
    "heads of another model": (HEADS, tensors(lambda t: t["norm.weight"].add_(1)), "heads of another model"),
    "heads of another width": (HEADS_CONFIG, heads(hidden_size=64), "heads of width 64 beside a model of width 32"),
    "heads of nobody": (HEADS_CONFIG, keys(foretoken=...), "no 'foretoken' key with head_kind and n_future"),
    "unknown head kind": (HEADS_CONFIG, heads(head_kind="odd"), "head_kind"),
    "n_future = 0": (HEADS_CONFIG, heads(n_future=0), "n_future"),
    "one head more": (HEADS_CONFIG, heads(n_future=4), "tensor 'heads.2.input_layernorm.weight' is missing"),
    "one layer more": (CONFIG, keys(num_hidden_layers=3), "'model.layers.2.input_layernorm.weight' is missing"),
    "another's tokenizer": (
        TOKENIZER,
        lambda p: train_bpe(["def f"], 263).save(p.parent),
        "tokenizer",
    ),
    "no tokenizer": (TOKENIZER, Path.unlink, "tokenizer.json: No such file"),
    "no JSON": (CONFIG, write("{oh"), "config.json: not JSON"),
    "a list": (CONFIG, write("[]"), "config.json: must hold a JSON object"),
    "no text": (CONFIG, lambda path: path.write_bytes(b"\xff\xfe"), "config.json: not JSON"),
    "no size": (CONFIG, keys(hidden_size=...), "'hidden_size' is missing"),
    "size that is a word": (CONFIG, keys(hidden_size="big"), "hidden_size = 'big'"),
    "size of zero": (CONFIG, keys(num_attention_heads=0), "num_attention_heads = 0"),
    "size beyond all": (CONFIG, keys(intermediate_size=10**30), "intermediate_size: Input should be less than"),
    "vocabulary beyond all": (CONFIG, keys(vocab_size=2**31 - 1), "'lm_head.weight' has shape"),
    "layers beyond all": (CONFIG, keys(num_hidden_layers=10**30), "num_hidden_layers: Input should be less than"),
    "heads beyond all": (HEADS_CONFIG, heads(n_future=10**30), "n_future"),
    "heads that do not divide": (CONFIG, keys(num_key_value_heads=3), "must be a multiple of num_key_value_heads = 3"),
    "other architecture": (
        CONFIG,
        keys(architectures=["X"]),
        "architectures = ['X']; supported are LlamaForCausalLM, Mi",
    ),
    "no architecture": (CONFIG, keys(architectures=7), "architectures = 7; supported are"),
    "activation": (CONFIG, keys(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "biases of the MLP": (CONFIG, keys(mlp_bias=True), "mlp_bias"),
    "biases of attention": (CONFIG, keys(attention_bias=True), "attention_bias"),
    "window": (
        CONFIG,
        keys(architectures=["MistralForCausalLM"], sliding_window=64),
        "sliding-window attention is not",
    ),
    "Qwen's window": (CONFIG, keys(architectures=["Qwen3ForCausalLM"], use_sliding_window=True), "sliding-window"),
    "rope": (CONFIG, keys(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn'; supported are default and llama3"),
    "older rope": (CONFIG, keys(rope_parameters=..., rope_scaling={"type": "linear"}), "rope type 'linear'; supported"),
    "rope without its factor": (CONFIG, keys(rope_parameters={"rope_type": "llama3"}), "rope: 'factor' is missing"),
    "rope that is a list": (CONFIG, keys(rope_parameters=[1]), "rope_parameters = [1]; must be an object"),
    "layers that are no list": (CONFIG, keys(layer_types=3), "layer_types = 3; must be a list"),
    "layers that are a word": (CONFIG, keys(layer_types="full_attention"), "must be a list"),
    "nested": (CONFIG, write("[" * 100_000), "config.json: not JSON"),
    "theta that is a word": (CONFIG, keys(rope_parameters=..., rope_theta="many"), "rope_theta"),
    "index without a map": (
        "model.safetensors.index.json",
        lambda path: (path.write_text("{}"), path.with_name(MAIN).unlink()),
        "index.json: not an index of safetensors files",
    ),
    "provenance": (OWN, write("?"), "foretoken.json: not JSON"),
    "digests": (OWN, keys(sha256=[]), "foretoken.json: sha256 must be an object"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(saved: Path, case: str) -> None:
    name, damage, message = DAMAGE[case]
    damage(saved / name)
    with pytest.raises(ForetokenError, match=re.escape(message)) as error:
        load_checkpoint(saved)
    assert isinstance(error.value, CheckpointError) or case == "no tokenizer"
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such directory"):
        load_checkpoint(tmp_path / "none")


def test_runs_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        save_checkpoint(tmp_path / f"checkpoint-{step}", small(), byte_tokenizer())
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / ".checkpoint-11.incomplete-1").mkdir()
    assert find_checkpoint(tmp_path).name == "checkpoint-10"
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9", "checkpoint-old"]
    prune(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-old"]


# Writing: all or nothing.


def test_checkpoint_is_never_overwritten(saved: Path) -> None:
    before = content(saved)
    with pytest.raises(CheckpointError, match="holds a checkpoint already; choose another directory"):
        save_checkpoint(saved, small(), byte_tokenizer())
    assert content(saved) == before


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("writer", ["save_tensors", "write_json", "write_train_state", "Tokenizer.save"])
def test_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, writer: str
) -> None:
    if exists:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    before = content(tmp_path)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if writer == "Tokenizer.save":
        monkeypatch.setattr(Tokenizer, "save", full)
    else:
        monkeypatch.setattr(checkpoints, writer, full)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/run: cannot be written: .*No space left on device"):
        save_checkpoint(tmp_path / "run", small(), byte_tokenizer(), optimizers=[stepped(small())])
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["run"] if exists else [])


def test_file_too_large_is_an_error_of_ours(tmp_path: Path) -> None:
    """While the weights are written, by a limit of the system's."""
    resource = pytest.importorskip("resource")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"run: cannot be written: .*File too large"):
            save_checkpoint(tmp_path / "run", small(), byte_tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", [False, True])
def test_file_is_byte_for_byte_the_librarys(tmp_path: Path, stored: bool) -> None:
    """Of all types, shapes and names; the same of tensors that are read when their turn comes."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16)
    tensors = {
        f"{name}.{kind}": (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(kind)
        for kind in (*kinds, torch.int8, torch.uint8, torch.bool)
        for name, shape in {'é"\\b': (3, 5), "a": (7,), "scalar": (), "empty": (0, 2)}.items()
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return tensors[name]

    given = {name: files.Stored(t.dtype, tuple(t.shape), partial(read, name)) for name, t in tensors.items()}
    digest = files.save_tensors(tmp_path / "ours", given if stored else tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == files.sha256(tmp_path / "ours")
    assert sorted(reads) == (sorted(tensors) if stored else [])
    files.save_tensors(tmp_path / "strided", {"t": torch.arange(12.0).view(3, 4).T})
    assert torch.equal(load_file(tmp_path / "strided")["t"], torch.arange(12.0).view(3, 4).T)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written"):
            save_checkpoint(tmp_path / name, small(), byte_tokenizer())
    assert content(tmp_path) == {"file": b"mine"}


def test_save_into_what_a_killed_save_left(tmp_path: Path) -> None:
    """A run's folder in which all but config.json had been moved in."""
    save_checkpoint(tmp_path / "run", small(), byte_tokenizer())
    (tmp_path / "run" / "config.json").unlink()
    model = small(seed=5)
    save_checkpoint(tmp_path / "run", model, byte_tokenizer())
    assert torch.equal(
        load_checkpoint(tmp_path / "run")[0].heads[2].mlp.up_proj.weight, model.heads[2].mlp.up_proj.weight
    )


def test_moved_directory_loads(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    load_checkpoint(tmp_path / "elsewhere")


def test_nothing_is_unpickled() -> None:
    """What PyTorch wrote is read as tensors and nothing else, in the one format that has such files."""
    allowed = {"meta.py": ['torch.load(file, map_location="cpu", mmap=True, weights_only=True)']}
    for path in Path(foretoken.__file__).parent.rglob("*.py"):
        found = re.findall(
            r"torch\.load\b[^\n]*|\bpickle\b|\bjoblib\b|allow_pickle=True|\bmarshal\b|torch\.save\b", path.read_text()
        )
        assert found == allowed.get(path.name, []), f"{path.name}: {found}"
