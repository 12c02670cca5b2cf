"""GGUF files of every architecture, type and form of tokenizer, run by llama.cpp beside transformers and tokenizers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_oracle
import gguf
import pytest
import tiny_engine_model
import torch
from chat_templates import STYLES
from conftest import tiny_model
from llama_cpp import LlamaCpp, has_llama_cpp
from tokenizer_twins import LLAMA_3, QWEN_2, byte_level, sentencepiece
from tokenizers import Tokenizer as Backend
from trained_models import Trained

from foretoken.chat import chat_template
from foretoken.checkpoint import load_checkpoint, save_checkpoint
from foretoken.config import RopeScaling
from foretoken.errors import CheckpointError
from foretoken.formats.gguf import export_gguf
from foretoken.formats.gguf_tokenizer import tokenizer_keys
from foretoken.tokenizer import Tokenizer, byte_tokenizer

SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
PROMPT = [256, *b"for i in range(12):\n    read(i)\n" * 4]
TOKENS = 24


# Architectures.


@has_llama_cpp
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {"rope_scaling": SCALED.model_dump(), "head_kind": "sequential"}),
        ("mistral", {"kv_heads": 1, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True, "n_future": 1}),
        ("qwen2", {"n_future": 1, "kv_heads": 4}),
        ("qwen3", {"head_kind": "sequential"}),
        ("qwen3", {"n_future": 1, "rope_theta": 1e6}),
    ],
)
def test_llama_cpp_writes_what_transformers_writes(architecture: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Random twins in float32, plain and with the drafter, which must be the head that the model has."""
    shape = {"layers": 4, "vocab": 260, "width": 64, "dtype": torch.float32}
    folder = save_checkpoint(tmp_path / "model", tiny_model(architecture, **shape, **fields), byte_tokenizer())
    wanted = engine_oracle.greedy(folder, [PROMPT], TOKENS)[0]
    files = export_gguf(folder, tmp_path / "gguf", "f32")
    assert len(files) == 1 + (fields.get("n_future", 4) > 1)
    assert LlamaCpp(files[0]).ids(PROMPT, TOKENS)[0] == wanted
    if len(files) == 2:
        assert LlamaCpp(*files, 2).ids(PROMPT, TOKENS)[0] == wanted


@has_llama_cpp
def test_what_was_loaded_saved_and_exported_has_the_same_logits(trained: Trained, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(trained.checkpoint)
    folder = save_checkpoint(tmp_path / "once more", model, tokenizer)
    found = LlamaCpp(export_gguf(folder, tmp_path / "gguf", "f32", drafter=False)[0]).logprobs(trained.prompts[2], 20)
    ids = [token for token, _ in found]
    assert ids == trained.outputs[2][:20]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([trained.prompts[2] + ids]))[0][0])[-21:-1]
    ours = logits.log_softmax(-1)[range(20), ids]
    torch.testing.assert_close(torch.tensor([p for _, p in found]), ours, rtol=1e-3, atol=1e-4)


def test_the_drafter_can_be_left_out(tmp_path: Path) -> None:
    """Where llama.cpp could not draft with it, its next-token path runs."""
    shape = {"layers": 4, "vocab": 260, "dtype": torch.float32}
    for architecture, kind, says in (
        ("qwen3", "parallel", "parallel heads of a qwen3 model"),
        ("qwen2", "sequential", "gives no drafter the layers of a qwen2 model"),
    ):
        model = tiny_model(architecture, head_kind=kind, **shape)
        folder, out = save_checkpoint(tmp_path / kind, model, byte_tokenizer()), tmp_path / f"{kind}-gguf"
        with pytest.raises(CheckpointError, match=says):
            export_gguf(folder, out)
        assert [path.name for path in export_gguf(folder, out, drafter=False)] == ["model.gguf"]


def test_scaled_frequencies_of_a_qwen_are_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen2", n_future=1, vocab=260, dtype=torch.float32, rope_scaling=SCALED.model_dump())
    folder = save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    with pytest.raises(CheckpointError, match="does not scale the rotary frequencies of a qwen2 model"):
        export_gguf(folder, tmp_path / "gguf")


# Eight bits.


@has_llama_cpp
def test_eight_bits_run_and_draft(trained: Trained, tmp_path: Path) -> None:
    files = export_gguf(trained.checkpoint, tmp_path / "gguf", "q8_0")
    server = LlamaCpp(*files, 2)
    found = [server.ids(prompt, tiny_engine_model.TOKENS) for prompt in trained.prompts]
    wanted = [output[: tiny_engine_model.TOKENS] for output in trained.outputs]
    same = sum(a == b for (ids, _), output in zip(found, wanted, strict=True) for a, b in zip(ids, output, strict=True))
    assert same > 0.5 * len(wanted) * tiny_engine_model.TOKENS
    assert sum(accepted for _, accepted in found) > 0


def test_eight_bits_hold_the_weights_to_half_a_step(parallel: Trained, tmp_path: Path) -> None:
    exact = {t.name: t for t in gguf.GGUFReader(parallel.files[0]).tensors}
    short = gguf.GGUFReader(export_gguf(parallel.checkpoint, tmp_path / "gguf", "q8_0")[0]).tensors
    kinds = {tensor.tensor_type.name for tensor in short}
    assert kinds == {"F32", "Q8_0"}
    for tensor in short:
        wanted = torch.from_numpy(exact[tensor.name].data.copy()).float()
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view_as(wanted)
        blocks = wanted.reshape(-1, 32) if tensor.tensor_type.name == "Q8_0" else wanted.reshape(-1, 1)
        step = blocks.abs().amax(-1, keepdim=True) / 127 * (tensor.tensor_type.name == "Q8_0")
        # half a step, and the rounding of the step to half precision
        assert ((found.reshape(blocks.shape) - blocks).abs() <= (0.5 + 127 / 2**11) * step).all(), tensor.name


def test_eight_bits_need_whole_blocks(tmp_path: Path) -> None:
    model = tiny_model(vocab=260, width=48, dtype=torch.float32)
    folder = save_checkpoint(tmp_path / "model", model, byte_tokenizer())
    with pytest.raises(CheckpointError, match="hidden_size = 48; q8_0 needs a multiple of 32"):
        export_gguf(folder, tmp_path / "gguf", "q8_0")
    assert list(tmp_path.iterdir()) == [folder]


# Tokenizers.

TEXTS = (
    "def readline(self):\n    return self.lines[i]\n\n\n",
    "for  i in range(12345):  # it's é, 你好 👋\t\n",
    "  WE'LL don't I'M x=1234567.89e10\r\n\r\n  ",
    "ababa abab    a         b\n \n  \n\tx",
    " zebra zebras zeb",
    "½ ² Ⅷ ١٢٣ naïve ÅÄÖ ǅ \u00a0 \u2003 a\u0301?",
    "a",
    " ",
    "",
    "\n",
    "<s> </s> <|begin|> <0x41>",
)


def corpus() -> list[str]:
    words = "read readline lines return self for range in def class import add point value item 12 345 it's we'll don't"
    return [" ".join(words.split()[i:] + words.split()[:i]) + ":\n    x = 1\n\n" for i in range(12)] * 3


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(corpus(), 330),
    "smollm": lambda: byte_level(corpus(), 330, digits=True),
    "llama-bpe": lambda: byte_level(corpus(), 330, LLAMA_3, whole=True),
    "dbrx": lambda: byte_level(corpus(), 330, LLAMA_3),
    "qwen2": lambda: byte_level(corpus(), 330, QWEN_2),
    "default": lambda: sentencepiece(corpus(), 120),
}


@has_llama_cpp
@pytest.mark.parametrize("name", MAKERS)
def test_llama_cpp_cuts_text_alike(name: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[name]()
    model = tiny_model(vocab=tokenizer.vocab_size + 3, n_future=1, layers=1, dtype=torch.float32)
    folder = save_checkpoint(tmp_path / "model", model, tokenizer)
    path = export_gguf(folder, tmp_path / "gguf", "f32")[0]
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    server, (_, loaded) = LlamaCpp(path), load_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    letters = "ab rel dinse\n12'. ▁é你"
    random = (torch.randint(len(letters), (40,), generator=generator).tolist() for _ in range(30))
    texts = [*TEXTS, *("".join(letters[i] for i in row) for row in random)]
    if name == "qwen2":
        texts = [text for text in texts if "\u0301" not in text]  # llama.cpp does not compose characters
    for text in texts:
        wanted = loaded.encode(text, add_special_tokens=True)
        assert server.tokenize(text) == wanted, text
        assert len(wanted) <= len(text.encode()) + 2


@has_llama_cpp
def test_a_token_that_merges_do_not_lead_to_is_taken_whole(tmp_path: Path) -> None:
    """What tells llama-bpe from dbrx."""
    counts = [len(MAKERS[name]().encode(" zebra")) for name in ("llama-bpe", "dbrx")]
    assert counts[0] == 1 < counts[1]


@has_llama_cpp
@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_llama_cpp_talks_by_the_chat_template(name: str, tmp_path: Path) -> None:
    """Its chat route renders a message as here, and an answer ends with the turn."""
    backend = Backend.from_str(STYLES[name].tokenizer.backend.to_str())
    backend.post_processor = None  # as of models that take no bos of text
    tokenizer = dataclasses.replace(STYLES[name].tokenizer, backend=backend)
    template = chat_template(tokenizer)
    model = tiny_model(vocab=tokenizer.vocab_size, n_future=1, layers=1, dtype=torch.float32)
    path = export_gguf(save_checkpoint(tmp_path / "model", model, tokenizer), tmp_path / "gguf", "f32")[0]
    server = LlamaCpp(path)
    messages = [{"role": "user", "content": "the cat?"}]
    assert server.post("apply-template", {"messages": messages})["prompt"] == template.render(messages, True)
    ended = {"messages": messages, "max_tokens": 5, "logit_bias": [[template.end_id, 1e4]]}
    choice = server.post("v1/chat/completions", ended)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


def test_a_template_that_cannot_be_read_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = dataclasses.replace(MAKERS["llama-bpe"](), chat_template="{% if %}")
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size, "here")
    assert "tokenizer.chat_template" not in keys
    assert "here: left out of the file: " in caplog.text


def changed(name: str, **parts: Any) -> Tokenizer:
    made = MAKERS[name]()
    stored = json.loads(made.backend.to_str())
    for key, value in parts.items():
        if key in stored["model"]:
            stored["model"][key] = value
        else:
            stored[key] = value
    return Tokenizer(Backend.from_str(json.dumps(stored)), made.bos_id, made.eos_id, None)


SPLIT_ALL = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def test_tokenizers_that_llama_cpp_has_no_equal_of() -> None:
    merges = json.loads(MAKERS["default"]().backend.to_str())["model"]["merges"]
    first = next(i for i, (a, b) in enumerate(itertools.pairwise(merges)) if "".join(a) == "".join(b))
    apart = [*merges[:first], *merges[first + 1 :], merges[first]]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    for tokenizer, says in (
        (changed("gpt-2", pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT_ALL, BYTES]}), "no name for how"),
        (changed("gpt-2", pre_tokenizer=BYTES), "merges run across words"),
        (changed("gpt-2", ignore_merges=True), "no name for how"),
        (changed("gpt-2", normalizer={"type": "Lowercase"}), "Lowercase"),
        (changed("gpt-2", pre_tokenizer={"type": "Whitespace"}), "only byte-level BPE"),
        (changed("default", merges=merges[:-1]), "do not merge, as they would"),
        (changed("default", merges=apart), "not listed together"),
        (changed("default", normalizer=None, pre_tokenizer=metaspace), "prepares text in another way"),
    ):
        with pytest.raises(CheckpointError, match=says):
            tokenizer_keys(tokenizer, tokenizer.vocab_size, "here")
    added = MAKERS["default"]()
    added.backend.add_tokens(["xyzzy"])
    with pytest.raises(CheckpointError, match="'xyzzy' is an added token"):
        tokenizer_keys(added, 1000, "here")
