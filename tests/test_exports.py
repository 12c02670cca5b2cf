"""Checkpoints for other engines: llama.cpp runs them here, the files of the others are checked."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_engine_model
import torch
from conftest import run, tiny_model
from engine_oracle import Counts, EagleLayer
from llama_cpp import LlamaCpp, has_llama_cpp
from safetensors.torch import load_file, save_file
from tiny_engine_model import PROMPTS, TOKENS
from trained_models import AHEAD, DRAFTS, KINDS, Trained, exported

from foretoken import cli
from foretoken.checkpoint import load_checkpoint, save_checkpoint
from foretoken.config import RopeScaling
from foretoken.errors import CheckpointError, ConfigError
from foretoken.formats import eagle3 as eagle3_format
from foretoken.formats import hf_class
from foretoken.formats.eagle3 import export_eagle3
from foretoken.formats.engines import eagle3_commands, gguf_command, hf_commands, uses
from foretoken.formats.gguf import export_gguf
from foretoken.formats.hf_class import export_hf
from foretoken.formats.trained import require_trained_heads
from foretoken.model import Model
from foretoken.recipe import load_recipe
from foretoken.tokenizer import byte_tokenizer, train_bpe
from foretoken.train import train

ENGINES = {"foretoken", "transformers", "vllm", "llama_cpp", "sglang", "tensorrt_llm", "mlx_lm"}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_norm_2": "hidden_norm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


BPE_PROMPTS = (
    "def add_point(self", "    return self.points[i]\n\n\nclass", "for  i in range(12345):  # it's é, 你好 👋\t\n",
    "class xyzzyPoint:\n    def ", "<bos> <|unused", "import os\r\nimport sys",
)  # fmt: skip


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Tied embeddings, a tokenizer with merges and with an added token that is not special."""
    folder = tmp_path_factory.mktemp("bpe")
    tiny_engine_model.write_text(folder / "text")
    tokenizer = train_bpe((file.read_text() for file in sorted((folder / "text").iterdir())), 340)
    tokenizer.backend.add_tokens(["xyzzy"])
    tokenizer.save(folder / "tokenizer")
    overrides = (
        f'data.source=["{folder}/text"]', f"data.cache_dir={folder}/cache",
        "tokenizer.kind=file", f"tokenizer.path={folder}/tokenizer", "model.tie_word_embeddings=true",
        "model.head_kind=sequential", "model.num_hidden_layers=4", "model.hidden_size=64",
        "model.max_position_embeddings=256", "train.seq_len=96", "train.batch_size=8", "train.precision=float32",
        "train.eval_windows=8", "train.steps=60", "optim.lr=1e-2",
    )  # fmt: skip
    train(load_recipe("tiny", overrides), folder / "model")
    return exported("sequential", folder / "model", tokenizer, BPE_PROMPTS)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves an untrained byte model of four layers and returns its folder."""

    def save(architecture: str = "llama", **fields: Any) -> Path:
        model = tiny_model(
            architecture, **{"layers": 4, "vocab": 260, "dtype": torch.float32, "peaked": False, **fields}
        )
        return save_checkpoint(tmp_path / "model", model, byte_tokenizer())

    return save


def complete(server: LlamaCpp, prompts: Sequence[str | Sequence[int]]) -> tuple[list[str], Counts]:
    """Texts behind the prompts, and what the server counted on the way."""
    texts, counts = [], Counts()
    for prompt in prompts:
        answer = server.complete(prompt, TOKENS)
        assert answer["usage"]["completion_tokens"] == TOKENS
        texts.append(answer["choices"][0]["text"])
        counts.drafted += answer["timings"].get("draft_n", 0)
        counts.accepted += answer["timings"].get("draft_n_accepted", 0)
    return texts, counts


# llama.cpp.


@has_llama_cpp
def test_llama_cpp_writes_what_transformers_writes(trained: Trained) -> None:
    """From ids, and from text, in front of which it puts bos."""
    server = LlamaCpp(trained.files[0])
    assert complete(server, trained.prompts) == (trained.texts, Counts())
    assert complete(server, PROMPTS) == (trained.texts, Counts())
    for text in (*PROMPTS, "é, 你好 👋\t\r\n  x", ""):
        assert server.tokenize(text) == trained.tokenizer.encode(text, add_special_tokens=True)


@has_llama_cpp
@pytest.mark.parametrize("drafts", DRAFTS)
def test_llama_cpp_drafts_as_the_oracle_does(trained: Trained, drafts: int) -> None:
    texts, counts = complete(LlamaCpp(*trained.files, drafts), trained.prompts)
    wanted = trained.counts(drafts)[1]
    assert texts == trained.texts
    assert (counts.drafted, counts.accepted) == (wanted.drafted, wanted.accepted)
    assert 0 < counts.accepted <= counts.drafted


@has_llama_cpp
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_llama_cpp_runs_short_types(trained: Trained, dtype: str, tmp_path: Path) -> None:
    files = export_gguf(trained.checkpoint, tmp_path / "gguf", dtype)
    texts, counts = complete(LlamaCpp(*files, 2), trained.prompts)
    assert all(texts)
    assert counts.accepted > 0


@has_llama_cpp
def test_llama_cpp_reads_a_bpe_and_tied_embeddings(bpe: Trained) -> None:
    server = LlamaCpp(bpe.files[0])
    for text, ids in zip(BPE_PROMPTS, bpe.prompts, strict=True):
        assert server.tokenize(text) == ids
        assert server.complete(text, 1)["usage"]["prompt_tokens"] == len(ids)
    assert sum(map(len, bpe.prompts)) < 0.9 * sum(len(text.encode()) for text in BPE_PROMPTS)  # merges matter
    assert complete(server, BPE_PROMPTS) == (bpe.texts, Counts())
    texts, counts = complete(LlamaCpp(*bpe.files, 2), BPE_PROMPTS)
    wanted = bpe.counts(2)[1]
    assert texts == bpe.texts
    assert (counts.drafted, counts.accepted) == (wanted.drafted, wanted.accepted)
    assert counts.accepted > 0


# Our own loop.


@pytest.mark.parametrize("drafts", DRAFTS)
def test_our_loop_drafts_as_the_oracle_does(sequential: Trained, drafts: int) -> None:
    model, _ = load_checkpoint(sequential.checkpoint, "float32")
    wanted, _ = sequential.counts(drafts)
    counts = Counts(by_position=[0] * drafts)
    # So far behind what is counted that no block that begins before TOKENS is cut.
    requests = run(model, sequential.prompts, drafts, max_tokens=TOKENS + AHEAD)
    for request, output in zip(requests, sequential.outputs, strict=True):
        assert request.ids[-(TOKENS + AHEAD) :] == output
        generated = 1
        for step in request.steps:
            if generated >= TOKENS:
                break
            counts.steps += 1
            counts.drafted += len(step.drafted)
            counts.accepted += step.accepted
            counts.by_position = [n + (i < step.accepted) for i, n in enumerate(counts.by_position)]
            generated += step.committed
    assert counts == wanted
    assert counts.accepted > 0


# EAGLE-3 directories.


def test_sequential_drafter_is_mtp_heads_and_the_unembedding(sequential: Trained) -> None:
    tensors = load_file(sequential.drafter / "model.safetensors")
    wanted = load_file(sequential.checkpoint / "mtp_heads" / "model.safetensors")
    wanted["lm_head.weight"] = load_file(sequential.checkpoint / "model.safetensors")["lm_head.weight"]
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


def test_drafter_has_eagle_3_names_and_shapes(trained: Trained) -> None:
    """What SGLang and TensorRT-LLM look for; neither runs without a GPU."""
    shapes = {name: list(tensor.shape) for name, tensor in load_file(trained.drafter / "model.safetensors").items()}
    main = json.loads((trained.checkpoint / "config.json").read_text())
    H, F, V, kv = main["hidden_size"], main["intermediate_size"], main["vocab_size"], 2 * main["head_dim"]
    assert shapes == {
        "midlayer.self_attn.q_proj.weight": [H, 2 * H],
        "midlayer.self_attn.k_proj.weight": [kv, 2 * H],
        "midlayer.self_attn.v_proj.weight": [kv, 2 * H],
        "midlayer.self_attn.o_proj.weight": [H, H],
        "midlayer.mlp.gate_proj.weight": [F, H],
        "midlayer.mlp.up_proj.weight": [F, H],
        "midlayer.mlp.down_proj.weight": [H, F],
        "midlayer.input_layernorm.weight": [H],
        "midlayer.hidden_norm.weight": [H],
        "midlayer.post_attention_layernorm.weight": [H],
        "fc.weight": [H, 3 * H],
        "norm.weight": [H],
        "lm_head.weight": [V, H],
    }


def test_drafter_config_names_the_layers_both_ways(trained: Trained) -> None:
    config = json.loads((trained.drafter / "config.json").read_text())
    main = json.loads((trained.checkpoint / "config.json").read_text())
    layers = main["num_hidden_layers"]
    ran = config["eagle_aux_hidden_state_layer_ids"]
    outputs = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ran == sorted(set(ran)) == [layers - 3, layers - 2, layers - 1]
    assert outputs == [i - 1 for i in ran]
    assert outputs[0] >= 0
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["num_hidden_layers"], config["draft_vocab_size"]) == (1, main["vocab_size"])
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "vocab_size"):
        assert config[key] == main[key]
    assert "norm_before_residual" not in config


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_parallel_drafter_is_head_2_whatever_it_is_embedded_with(
    architecture: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved(architecture, kv_heads=1)
    model, _ = load_checkpoint(folder)
    trunk: list[torch.Tensor] = []
    model.trunk[-1].register_forward_hook(lambda block, inputs, output: trunk.append(output[0]))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (1, 12), generator=generator)
    wanted = model(tokens)[1][0]
    choices = model.logits(wanted).argmax(-1)
    drafter = export_eagle3(folder, tmp_path / "eagle3")
    found = []
    for scale in (0.0, 1.0, 30.0):
        embedding = scale * torch.randn(260, 32, generator=generator)
        layer = EagleLayer(drafter, embedding, model.lm_head.weight, 3)
        states = layer.read(list(trunk[0]))
        for rows in range(1, 13):
            choice, state = layer(tokens[0, :rows].tolist(), states[:rows])
            assert choice == choices[rows - 1]
            torch.testing.assert_close(layer._norm(state, "norm"), wanted[rows - 1], rtol=1e-4, atol=1e-5)
        found.append(state)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_tied_unembedding_is_written_out(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(head_kind=kind, tie_word_embeddings=True)
    drafter = export_eagle3(folder, tmp_path / "eagle3")
    main = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in main
    tensors = load_file(drafter / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], main["model.embed_tokens.weight"])
    assert json.loads((drafter / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_sequential_heads_of_other_architectures_are_eagle_3_too(
    architecture: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    drafter = export_eagle3(saved(architecture, head_kind="sequential"), tmp_path / "eagle3")
    names = load_file(drafter / "model.safetensors").keys()
    assert not [name for name in names if "bias" in name or "q_norm" in name]
    assert json.loads((drafter / "config.json").read_text())["model_type"] == "llama"


def test_commands_draft_as_many_tokens_as_the_head_can(sequential: Trained, parallel: Trained) -> None:
    for trained, drafts in ((sequential, 3), (parallel, 1)):
        commands = eagle3_commands(trained.checkpoint, trained.drafter)
        assert commands.keys() == {"vllm", "sglang", "tensorrt_llm"}
        assert f'"num_speculative_tokens": {drafts}}}' in commands["vllm"]
        assert f"--speculative-num-steps {drafts} " in commands["sglang"]
        assert f"--speculative-num-draft-tokens {drafts + 1}" in commands["sglang"]
        assert f"max_draft_len={drafts}," in commands["tensorrt_llm"]
        assert "eagle3_layers_to_capture={0, 1, 2}" in commands["tensorrt_llm"]
        files = [str(path) for path in trained.files]
        assert f"-md {files[1]} --spec-draft-n-max {drafts} " in gguf_command(trained.checkpoint, files)


# GGUF files.


def stored(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Types and values of a file's tensors."""
    return {
        t.name: (t.tensor_type.name, torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))))
        for t in gguf.GGUFReader(path).tensors
    }


def expected(tensors: dict[str, torch.Tensor], name: str, top: dict[str, str]) -> torch.Tensor:
    """The tensor of a checkpoint that lies in a GGUF file as `name`."""
    if name in top:
        return tensors[top[name]]
    _, layer, what, _ = name.split(".")
    prefix = f"model.layers.{layer}" if "model.norm.weight" in tensors else "midlayer"
    return tensors[f"{prefix}.{BLOCK[what]}.weight"]


def halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in pairs back to rows in halves."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("dtype", TORCH)
def test_gguf_holds_the_weights(trained: Trained, dtype: str, tmp_path: Path) -> None:
    tops = {"output.weight": "lm_head.weight", "token_embd.weight": "model.embed_tokens.weight"}
    for path, folder, top in zip(
        export_gguf(trained.checkpoint, tmp_path / "gguf", dtype),
        (trained.checkpoint, trained.drafter),
        (
            tops | {"output_norm.weight": "model.norm.weight"},
            {"fc.weight": "fc.weight", "output_norm.weight": "norm.weight"},
        ),
        strict=True,
    ):
        tensors, found = load_file(folder / "model.safetensors"), stored(path)
        for name, (kind, tensor) in found.items():
            wanted = expected(tensors, name, top)
            if wanted.dim() == 2:
                wanted = wanted.to(TORCH[dtype])
            heads = 4 if "attn_q" in name else 2
            if ".attn_q." in name or ".attn_k." in name:
                tensor = halves(tensor, heads)
            assert kind == (dtype.upper() if wanted.dim() == 2 else "F32")
            assert torch.equal(tensor, wanted.float()), name
        assert len(found) == len(tensors) - (folder == trained.drafter)  # the drafter's own unembedding


def test_one_head_is_one_gguf_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(n_future=1, layers=2)
    files = export_gguf(folder, tmp_path / "gguf")
    assert files == [tmp_path / "gguf" / "model.gguf"]
    assert files == list((tmp_path / "gguf").iterdir())
    assert gguf_command(folder, [str(path) for path in files]) == f"llama-server -m {files[0]}"
    kinds = {kind for kind, tensor in stored(files[0]).values() if tensor.dim() == 2}
    assert kinds == {"BF16"}


def test_added_tokens_keep_their_kind(bpe: Trained) -> None:
    for path in bpe.files:
        field = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"]
        kinds = field.contents()
        ids = {name: bpe.tokenizer.backend.token_to_id(name) for name in ("<|bos|>", "<|eos|>", "xyzzy", "a")}
        assert {name: kinds[i] for name, i in ids.items()} == {"<|bos|>": 3, "<|eos|>": 3, "xyzzy": 4, "a": 1}


# What cannot be exported.

SCALED = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
).model_dump()
EAGLE3_CANNOT: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "qwen2"}, "parallel heads of a qwen2 model"),
    ({"architecture": "qwen3"}, "parallel heads of a qwen3 model"),
    ({"layers": 3}, "has 3 layers; an EAGLE-3 drafter"),
    ({"layers": 3, "head_kind": "sequential"}, "has 3 layers; an EAGLE-3 drafter"),
    ({"n_future": 1}, "has one head, so there is nothing to draft with"),
]
GGUF_CANNOT: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "qwen2"}, "parallel heads of a qwen2 model"),
    (
        {"architecture": "qwen3", "n_future": 1, "rope_scaling": SCALED},
        "does not scale the rotary frequencies of a qwen3",
    ),
    ({"layers": 2}, "has 2 layers; llama.cpp gives a drafter three of them"),
]


@pytest.mark.parametrize(
    ("export", "fields", "says"),
    [(export_eagle3, *case) for case in EAGLE3_CANNOT] + [(export_gguf, *case) for case in GGUF_CANNOT],
)
def test_models_that_do_not_fit(
    export: Callable[..., Any], fields: dict[str, Any], says: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved(**fields)
    with pytest.raises(CheckpointError, match=says) as error:
        export(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("export", [export_eagle3, export_gguf, export_hf])
def test_a_folder_that_exists_is_left_alone(
    export: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("export", [export_eagle3, export_gguf, export_hf])
def test_a_full_disk_leaves_nothing(
    export: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*ignored: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    folder = saved()
    monkeypatch.setattr(eagle3_format, "write_json", full)
    monkeypatch.setattr(hf_class, "write_json", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written: .*No space left"):
        export(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_gguf_types_and_the_extra(saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved()
    with pytest.raises(ConfigError, match=r"--dtype q4_0: must be one of f32, f16, bf16, q8_0"):
        export_gguf(folder, tmp_path / "out", "q4_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'foretoken\[gguf\]'"):
        export_gguf(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_heads_that_nobody_trained_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    """As they were initialised, one matrix copied or lost; in every direction, and nothing is written."""

    def initial(model: Model) -> None:
        model.init_weights(3)

    def copied(model: Model) -> None:
        model.heads.start_from_head_1()

    def one_copied(model: Model) -> None:
        own, first = (model.heads.get_submodule(f"{depth}.mlp.up_proj") for depth in (1, 0))
        own.load_state_dict(first.state_dict())

    def lost(model: Model) -> None:
        model.heads.get_submodule("1.self_attn.o_proj").get_parameter("weight").data.zero_()

    def broken(model: Model) -> None:
        model.heads.get_submodule("1.mlp.gate_proj").get_parameter("weight").data[0, 0] = float("nan")

    for kind in KINDS:
        folder = saved(head_kind=kind)
        require_trained_heads(load_checkpoint(folder)[0], "here")
        for change, says in (
            (initial, "all its tensors are as they were initialised"),
            (copied, "equals head 1's"),
            (one_copied, "mlp.up_proj.weight equals head 1's"),
            (lost, "self_attn.o_proj.weight is all zero"),
            (broken, "mlp.gate_proj.weight holds values that are no numbers"),
        ):
            model, tokenizer = load_checkpoint(folder)
            change(model)
            bad = save_checkpoint(tmp_path / f"{kind}-{change.__name__}", model, tokenizer)
            for export in (export_eagle3, export_gguf, export_hf):
                with pytest.raises(CheckpointError, match=says):
                    export(bad, tmp_path / "out")
            assert not (tmp_path / "out").exists()
            assert export_gguf(bad, tmp_path / f"{bad.name}-plain", drafter=False)
        shutil.rmtree(folder)


def test_a_head_tensor_that_is_missing_or_extra_is_an_error(saved: Callable[..., Path], tmp_path: Path) -> None:
    for kind in KINDS:
        folder = saved(head_kind=kind)
        (folder / "foretoken.json").unlink()  # which would say first that the file was changed
        weights = folder / "mtp_heads" / "model.safetensors"
        tensors = load_file(weights)
        name = next(name for name in tensors if "up_proj" in name)
        for changed, says in (
            ({key: t for key, t in tensors.items() if key != name}, f"'{name}' is missing"),
            (tensors | {"extra.weight": torch.ones(3)}, "'extra.weight' is not one of this model's"),
        ):
            save_file(changed, weights)
            for export in (export_eagle3, export_gguf, export_hf):
                with pytest.raises(CheckpointError, match=says):
                    export(folder, tmp_path / "out")
        shutil.rmtree(folder)


# What an engine can do with a checkpoint.


def test_engines_of_both_kinds(sequential: Trained, parallel: Trained, tmp_path: Path) -> None:
    """Every command names what exists or what the command before it writes."""
    for trained, stock in ((sequential, 3), (parallel, 1)):
        found = {(use.engine, use.runs): use for use in uses(trained.checkpoint)}
        assert all(not use.reason and use.commands for use in found.values())
        assert {engine for engine, _ in found} == ENGINES
        every = "sequential head" if trained.kind == "sequential" else "heads 2..4"
        part = every if trained.kind == "sequential" else "head 2"
        assert found["transformers", every].drafts == found["vllm", every].drafts == 3
        assert {found[engine, part].drafts for engine in ("llama_cpp", "sglang", "tensorrt_llm")} == {stock}
        vllm = found["vllm", every].commands
        assert vllm[-1] == (
            f'vllm serve {trained.checkpoint} --speculative-config \'{{"method": "eagle3", '
            f'"model": "{trained.checkpoint}/mtp_heads", "num_speculative_tokens": 3}}\''
        )
        assert len(vllm) == (1 if trained.kind == "sequential" else 2)
        for number, use in enumerate(found.values()):
            export = use.commands[0].split()
            if export[:2] == ["foretoken", "export"]:
                out = tmp_path / f"{trained.kind}{number}"
                assert export[4] in use.commands[1]
                call([*export[1:4], str(out), *export[5:]])
                assert any(out.iterdir())


@pytest.mark.parametrize(
    ("fields", "impossible"),
    [
        ({"n_future": 1, "layers": 1}, set()),
        ({"layers": 3}, {("vllm", "head 2"), ("sglang", "head 2"), ("tensorrt_llm", "head 2")}),
        ({"layers": 2}, {(engine, "head 2") for engine in ("vllm", "sglang", "tensorrt_llm", "llama_cpp")}),
        ({"architecture": "qwen3"}, {(engine, "head 2") for engine in ("vllm", "sglang", "tensorrt_llm", "llama_cpp")}),
        ({"architecture": "qwen3", "head_kind": "sequential"}, set()),
        ({"head_kind": "sequential", "layers": 3}, {(e, "sequential head") for e in ("sglang", "tensorrt_llm")}),
        (
            {"architecture": "qwen2", "n_future": 1, "rope_scaling": SCALED},
            {("llama_cpp", "next-token path")},
        ),
    ],
)
def test_engines_say_why_they_cannot(
    fields: dict[str, Any], impossible: set[tuple[str, str]], saved: Callable[..., Path]
) -> None:
    """What is said to be impossible is what the exports refuse, in the same words."""
    folder = saved(**fields)
    found = uses(folder)
    assert {(use.engine, use.runs) for use in found if use.reason} == impossible
    for use in found:
        assert bool(use.reason) != bool(use.commands)
        if use.reason:
            with pytest.raises(CheckpointError, match=re.escape(use.reason)):
                (export_gguf if use.engine == "llama_cpp" else export_eagle3)(folder, folder.parent / "out")
    assert ("mtp_heads" in json.dumps([use.to_json() for use in found])) == (fields.get("n_future", 4) > 1)


# The commands.


@dataclass
class Done:
    code: int
    out: str
    errors: str


Command = Callable[..., Done]


def call(words: Sequence[str]) -> None:
    """Run `foretoken` with these words."""
    before = sys.argv
    sys.argv = ["foretoken", *words]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert ended.value.code == 0


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `foretoken export` in this process."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["foretoken", "export", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, errors = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out, errors)

    return call


def test_commands_print_one_json_object(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved()
    done = command("eagle3", folder, tmp_path / "a", "--json")
    assert (done.code, done.errors) == (0, "")
    assert json.loads(done.out) == {
        "drafter": str(tmp_path / "a"),
        "commands": eagle3_commands(folder, tmp_path / "a"),
    }
    done = command("gguf", folder, tmp_path / "b", "--dtype", "f16", "--json")
    assert (done.code, done.errors) == (0, "")
    files = [str(tmp_path / "b" / name) for name in ("model.gguf", "eagle3.gguf")]
    assert json.loads(done.out) == {"files": files, "commands": {"llama_server": gguf_command(folder, files)}}
    assert all(Path(file).is_file() for file in files)
    done = command("gguf", folder, tmp_path / "plain", "--no-drafter", "--json")
    assert json.loads(done.out)["files"] == [str(tmp_path / "plain" / "model.gguf")]
    done = command("hf", folder, tmp_path / "c", "--json")
    assert (done.code, done.errors) == (0, "")
    assert json.loads(done.out) == {"model": str(tmp_path / "c"), "commands": hf_commands(tmp_path / "c")}


def test_commands_print_how_to_serve(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved()
    done = command("eagle3", folder, tmp_path / "a")
    assert done.code == 0
    assert "vllm serve" in done.out
    done = command("gguf", folder, tmp_path / "b")
    assert done.code == 0
    assert "llama-server" in done.out


def test_info_prints_what_engines_can_do(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(layers=3)
    call(["info", str(folder), "--engines", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["engines"] == [use.to_json() for use in uses(folder)]
    assert values["n_future"] == 4
    call(["info", str(folder), "--engines"])
    shown = capsys.readouterr().out
    for use in uses(folder):
        assert all(command in shown for command in use.commands)
        assert use.reason in shown
    call(["info", str(folder), "--json"])
    assert "engines" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["eagle3", "gguf", "hf"])
def test_help_has_an_example(command: Command, name: str) -> None:
    done = command(name, "--help")
    assert done.code == 0
    assert f"Example: foretoken export {name} " in " ".join(done.out.split())


def test_mistakes_are_one_line(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = saved(layers=2), tmp_path / "out"
    for words, says in (
        ([], "Missing command"),
        (["onnx", folder, out], "onnx"),
        (["eagle3", folder], "Missing argument"),
        (["eagle3", folder, out], "has 2 layers"),
        (["eagle3", tmp_path / "none", out], "none"),
        (["eagle3", folder, out, "--dtype", "f16"], "--dtype"),
        (["gguf", folder, out], "has 2 layers"),
        (["gguf", tmp_path / "none", out], "none"),
        (["hf", tmp_path / "none", out], "none"),
        (["gguf", folder, out, "--dtype", "q4"], "--dtype q4: must be one of f32, f16, bf16, q8_0"),
    ):
        done = command(*words)
        assert (done.code, done.out) == (2, "")
        assert done.errors.startswith("foretoken: error: ")
        assert done.errors.count("\n") == 1
        assert says in done.errors
    assert list(tmp_path.iterdir()) == [folder]
