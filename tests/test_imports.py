"""Imports of Meta's released layout and of Fast-LLM's: what comes in is what was there, or nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fast_llm_reference
import meta_reference
import pytest
import sentencepiece_model
import torch
from meta_reference import PARAMS
from safetensors.torch import load_file
from small_runs import content
from torch import Tensor

from foretoken import cli
from foretoken.checkpoint import load_checkpoint, save_checkpoint
from foretoken.completion import generate
from foretoken.display import Display
from foretoken.errors import CheckpointError, ForetokenError
from foretoken.formats import fast_llm, importing, meta
from foretoken.formats.fast_llm import import_fast_llm
from foretoken.formats.meta import import_meta
from foretoken.formats.sentencepiece import load_sentencepiece
from foretoken.model import Model

TOKENS = torch.randint(0, 260, (2, 17), generator=torch.Generator().manual_seed(3))


# Meta's layout.


@torch.no_grad()
def logits(model: Model, tokens: Tensor = TOKENS) -> Tensor:
    """(B, T, n, V)"""
    return torch.stack([model.logits(hidden) for hidden in model(tokens)], 2)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model.trained(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture
def released(tmp_path: Path, model_file: Path) -> Callable[..., Path]:
    """A folder as it was released, 7B_x/ below the tokenizer, from changed weights and parameters."""

    def make(weights: dict[str, Tensor] | None = None, name: str = "7B", **changes: Any) -> Path:
        params = PARAMS | changes
        kept = {key: value for key, value in params.items() if value is not ...}
        shutil.copy(model_file, tmp_path / "tokenizer.model")
        return meta_reference.write(
            tmp_path / name, meta_reference.random_weights(params) if weights is None else weights, kept
        )

    return make


@pytest.mark.parametrize("n_future", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_heads_logits_are_the_references(
    released: Callable[..., Path], tmp_path: Path, n_future: int, dtype: torch.dtype
) -> None:
    params = PARAMS | {"n_future_tokens": n_future, "rope_theta": 500.0}
    weights = meta_reference.random_weights(params, dtype=dtype)
    folder = released(weights | {"rope.freqs": torch.zeros(4)}, n_future_tokens=n_future, rope_theta=500.0)
    out = import_meta(folder, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    model, tokenizer = load_checkpoint(out, "float32")
    config = model.config
    assert (config.n_future, config.num_hidden_layers) == (n_future, 6 - n_future)
    assert (config.intermediate_size, config.num_key_value_heads, config.max_position_embeddings) == (56, 2, 4096)
    wanted = meta_reference.all_heads(weights, params, TOKENS)
    assert wanted.std() > 1
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-5)
    assert tokenizer.encode("def", add_special_tokens=True)[0] == 1
    foreign = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(foreign(TOKENS).logits, wanted[:, :, 0], atol=2e-5, rtol=1e-5)


def test_import_save_load_is_the_same(released: Callable[..., Path], tmp_path: Path) -> None:
    folder = released()
    out = import_meta(folder, tmp_path / "out")
    model, tokenizer = load_checkpoint(out)
    again, words = load_checkpoint(save_checkpoint(tmp_path / "again", model, tokenizer))
    assert torch.equal(logits(model), logits(again))
    assert words.fingerprint == tokenizer.fingerprint
    origin = json.loads((out / "foretoken.json").read_text())["imported_from"]
    size = (folder / "consolidated.pth").stat().st_size
    assert origin == {"format": "meta", "path": str(folder), "files": {"consolidated.pth": size}}
    texts = [generate(model, tokenizer, "def read(", max_tokens=20, drafts=k).ids for k in (0, 2)]
    assert texts[0] == texts[1]


SEEDED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def seeded(bug: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    SEEDED[bug.__name__] = bug
    return bug


@seeded
def rows_of_extra_heads_in_their_order(patch: pytest.MonkeyPatch) -> None:
    right = meta._in_halves
    patch.setattr(meta, "_in_halves", lambda name, t, c: t if name.startswith("heads.1.") else right(name, t, c))


@seeded
def rows_of_keys_in_their_order(patch: pytest.MonkeyPatch) -> None:
    right = meta._in_halves
    patch.setattr(meta, "_in_halves", lambda name, t, c: t if "k_proj" in name else right(name, t, c))


@seeded
def extra_heads_in_reverse(patch: pytest.MonkeyPatch) -> None:
    right = meta._theirs
    swap = {"1": "2", "2": "1"}
    patch.setattr(
        meta, "_theirs", lambda name, c: right(re.sub(r"heads\.([12])", lambda m: f"heads.{swap[m[1]]}", name), c)
    )


@seeded
def gate_and_up_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(meta, "_NAMES", meta._NAMES | {"mlp.gate_proj": "feed_forward.w3", "mlp.up_proj": "feed_forward.w1"})


@pytest.mark.parametrize("bug", SEEDED)
def test_reference_tells_wrong_imports(
    released: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    folder = released()
    SEEDED[bug](monkeypatch)
    model, _ = load_checkpoint(import_meta(folder, tmp_path / "out"))
    wanted = meta_reference.all_heads(torch.load(folder / "consolidated.pth"), PARAMS, TOKENS)
    assert (logits(model) - wanted).abs().max() > 0.1


def test_tokenizer_by_name(released: Callable[..., Path], tmp_path: Path, model_file: Path) -> None:
    folder = released()
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model there or in the folder above; name one with --tok"):
        import_meta(folder, tmp_path / "out")
    import_meta(folder, tmp_path / "out", model_file)
    load_sentencepiece(model_file).save(tmp_path / "words")
    for given in (tmp_path / "words", tmp_path / "words" / "tokenizer.json"):
        shutil.rmtree(tmp_path / "out")
        import_meta(folder, tmp_path / "out", given)


# What is wrong is named, and nothing is left behind.

QUERIES = "extra_heads.0.attention.wq.weight"
Change = Callable[[dict[str, Tensor]], Any]
WEIGHTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda w: w.pop("norm.weight"), "tensor 'norm.weight' is missing"),
    "head missing": (lambda w: w.pop(QUERIES), f"consolidated.pth: tensor '{QUERIES}' is missing"),
    "whole head missing": (
        lambda w: [w.pop(name) for name in list(w) if "extra_heads.1" in name],
        "tensor 'extra_heads.1.attention.wq.weight' is missing (and 8 more)",
    ),
    "too many": (lambda w: w.update(extra=torch.ones(2)), "tensor 'extra' is not one of a model of this layout"),
    "head too many": (
        lambda w: w.update({"extra_heads.2.ffn_norm.weight": torch.ones(32)}),
        "tensor 'extra_heads.2.ffn_norm.weight' is not one of a model of this layout and size",
    ),
    "shape": (lambda w: w.update({QUERIES: torch.ones(32, 31)}), "has shape (32, 31), must be (32, 32)"),
    "type": (lambda w: w.update({QUERIES: torch.ones(32, 32).int()}), "is of type torch.int32, must be floating"),
    "head that is head 1": (
        lambda w: w.update({QUERIES: w["layers.2.attention.wq.weight"].clone()}),
        "self_attn.q_proj.weight of head 2 is that of head 1: a head that was not trained",
    ),
    "heads that are one": (
        lambda w: w.update({k: w[k.replace("heads.1", "heads.0")] for k in w if "extra_heads.1" in k}),
        "of head 3 is that of head 2",
    ),
    "head of zeros": (
        lambda w: w["extra_heads.1.feed_forward.w2.weight"].zero_(),
        "mlp.down_proj.weight of head 3 is 0.0 everywhere",
    ),
    "no embedding": (lambda w: w.pop("tok_embeddings.weight"), "tensor 'tok_embeddings.weight' is missing"),
    "vocabulary of another": (
        lambda w: w.update({k: w[k][:390] for k in ("tok_embeddings.weight", "output.weight")}),
        "vocab_size = 400, but tok_embeddings.weight has 390 rows",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_wrong_weights(released: Callable[..., Path], tmp_path: Path, case: str) -> None:
    change, says = WEIGHTS[case]
    weights = meta_reference.random_weights(PARAMS)
    change(weights)
    refused(lambda: import_meta(folder, tmp_path / "out"), folder := released(weights), says)


def refused(act: Callable[[], object], folder: Path, says: str) -> None:
    """One line that names the folder; everything beside it stays as it was."""
    before = content(folder.parent)
    with pytest.raises(ForetokenError, match=re.escape(says)) as error:
        act()
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert content(folder.parent) == before
    assert not [path for path in folder.parent.iterdir() if path.name.startswith((".", "out"))]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": ...}, "params.json: 'dim' is missing"),
        ({"dim": "wide"}, "params.json: dim: "),
        ({"n_heads": 5}, "dim = 32 is not a multiple of n_heads = 5"),
        ({"n_kv_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
        ({"n_layers": 2}, "n_layers = 2 counts all heads, so it is at least n_future_tokens = 3"),
        ({"n_layers": 6}, "tensor 'layers.3.attention.wq.weight' is missing (and 8 more)"),
        ({"n_future_tokens": 2}, "'extra_heads.1.attention.wq.weight' is not one of"),
        ({"n_future_tokens": 0}, "params.json: n_future_tokens"),
        ({"use_scaled_rope": True}, "use_scaled_rope = true is not supported"),
        ({"qk_norm": True}, "unknown key 'qk_norm'"),
        ({"vocab_size": 32000}, "vocab_size = 32000, but tok_embeddings.weight has 400 rows"),
    ],
)
def test_wrong_parameters(released: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = released(meta_reference.random_weights(PARAMS), **changes)
    refused(lambda: import_meta(folder, tmp_path / "out"), folder, says)


def test_vocabulary_of_the_tokenizer(released: Callable[..., Path], tmp_path: Path) -> None:
    folder = released(vocab_size=401)
    refused(lambda: import_meta(folder, tmp_path / "out"), folder, "tokenizer of 400 tokens beside a model of 401")
    folder = released(meta_reference.random_weights(PARAMS), "other", vocab_size=-1)
    import_meta(folder, tmp_path / "out")


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('ran what the file says')",)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / "consolidated.pth").unlink(), "holds no consolidated.pth"),
    "no parameters": (lambda f: (f / "params.json").unlink(), "params.json: No such file"),
    "parameters cut": (lambda f: (f / "params.json").write_text('{"dim": 32'), "params.json: not JSON"),
    "cut short": (
        lambda f: (f / "consolidated.pth").write_bytes((f / "consolidated.pth").read_bytes()[:-2000]),
        "consolidated.pth: not a complete file of tensors",
    ),
    "empty": (lambda f: (f / "consolidated.pth").write_bytes(b""), "consolidated.pth: not a complete file of tensors"),
    "a program": (lambda f: torch.save(Evil(), f / "consolidated.pth"), "not a complete file of tensors"),
    "a list": (lambda f: torch.save([torch.ones(2)], f / "consolidated.pth"), "must hold tensors by name"),
    "nested": (lambda f: torch.save({"model": {}}, f / "consolidated.pth"), "must hold tensors by name"),
    "slices": (
        lambda f: (
            [shutil.copy(f / "consolidated.pth", f / f"consolidated.0{i}.pth") for i in (0, 1)]
            and (f / "consolidated.pth").unlink()
        ),
        "holds 2 weight files, consolidated.00.pth and on, each a slice of every tensor",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_files(released: Callable[..., Path], tmp_path: Path, case: str) -> None:
    folder = released()
    change, says = FILES[case]
    change(folder)
    refused(lambda: import_meta(folder, tmp_path / "out"), folder, says)


def test_what_is_there_stays(released: Callable[..., Path], tmp_path: Path) -> None:
    folder = released()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="mine: exists already"):
        import_meta(folder, tmp_path / "mine")
    with pytest.raises(CheckpointError, match="none: no such directory"):
        import_meta(tmp_path / "none", tmp_path / "out")
    assert content(tmp_path / "mine") == {"notes": b"mine"}
    assert not (tmp_path / "out").exists()


def test_full_disk_and_interrupt_leave_nothing(
    released: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = released()
    written: list[str] = []

    def stop(text: str) -> None:
        written.append(text)
        if "written" in text and len(written) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_meta(folder, tmp_path / "out", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"7B", "tokenizer.model"}

    def full(*ignored: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importing, "write_files", full)
    refused_text = r"out: cannot be written: .*No space left"
    with pytest.raises(CheckpointError, match=refused_text):
        import_meta(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"7B", "tokenizer.model"}


# Fast-LLM.


@pytest.mark.parametrize(("n", "shards", "tied"), [(1, 1, False), (3, 1, False), (3, 4, False), (3, 1, True)])
def test_fast_llm_heads(tmp_path: Path, n: int, shards: int, tied: bool) -> None:
    weights, config = fast_llm_reference.random_weights(n, tied)
    folder = fast_llm_reference.write(tmp_path / "model", weights, config, shards, tied)
    out = import_fast_llm(folder, tmp_path / "out")
    model, tokenizer = load_checkpoint(out)
    assert (model.config.n_future, model.config.num_hidden_layers, tokenizer.kind) == (n, 3, "bytes")
    torch.testing.assert_close(
        logits(model), fast_llm_reference.all_heads(weights, config, TOKENS), atol=2e-5, rtol=1e-5
    )
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "again", model, tokenizer))
    assert torch.equal(logits(model), logits(again))
    origin = json.loads((out / "foretoken.json").read_text())["imported_from"]
    assert origin == {"format": "fast-llm", "path": str(folder)}


FAST_LLM: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "norms that differ": (
        lambda w, c: w["model.mtp_norms.2.weight"].add_(0.1),
        "'model.mtp_norms.2.weight' is not 'model.mtp_norms.0.weight': heads with norms of their own cannot be",
    ),
    "no norm": (lambda w, c: w.pop("model.mtp_norms.1.weight"), "tensor 'model.mtp_norms.1.weight' is missing"),
    "a norm more": (
        lambda w, c: w.update({"model.mtp_norms.3.weight": torch.ones(32)}),
        "tensor 'model.mtp_norms.3.weight' is not one of a model of this layout and size",
    ),
    "a plain model's norm": (
        lambda w, c: w.update({"model.norm.weight": torch.ones(32)}),
        "'model.norm.weight' is not",
    ),
    "no head": (lambda w, c: c.update(prediction_heads=2), "tensor 'model.mtp_heads.1."),
    "a head more": (lambda w, c: c.update(prediction_heads=4), "tensor 'model.mtp_norms.3.weight' is missing"),
    "head that is head 1": (
        lambda w, c: w.update(
            {k: w[k.replace("mtp_heads.0", "layers.2")].clone() for k in w if k.startswith("model.mtp_heads.0")}
        ),
        "of head 2 is that of head 1: a head that was not trained",
    ),
    "prediction heads": (lambda w, c: c.update(prediction_heads="many"), "n_future: "),
    "another class": (
        lambda w, c: c.update(architectures=["LlamaForCausalLM"]),
        "architectures = ['LlamaForCausalLM'], must be ['MTPLlamaForCausalLM']",
    ),
    "biases": (lambda w, c: c.update(attention_bias=True), "attention_bias = true is not supported"),
    "vocabulary": (
        lambda w, c: (
            c.update(vocab_size=250),
            w.update({k: w[k][:250].clone() for k in ("lm_head.weight", "model.embed_tokens.weight")}),
        ),
        "tokenizer of 260 tokens beside a model of 250",
    ),
    "type": (
        lambda w, c: w.update({"lm_head.weight": torch.ones(260, 32).to(torch.float8_e4m3fn)}),
        "tensor 'lm_head.weight' is of type F8_E4M3",
    ),
}


def test_a_tied_fast_llm_with_another_unembedding(tmp_path: Path) -> None:
    weights, config = fast_llm_reference.random_weights(2, True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    folder = fast_llm_reference.write(tmp_path / "model", weights, config)
    refused(lambda: import_fast_llm(folder, tmp_path / "out"), folder, "'lm_head.weight' is not the embedding, though")


@pytest.mark.parametrize("case", FAST_LLM)
def test_wrong_fast_llm(tmp_path: Path, case: str) -> None:
    weights, config = fast_llm_reference.random_weights(3)
    change, says = FAST_LLM[case]
    change(weights, config)
    folder = fast_llm_reference.write(tmp_path / "model", weights, config)
    refused(lambda: import_fast_llm(folder, tmp_path / "out"), folder, says)


def test_fast_llm_files(tmp_path: Path, model_file: Path) -> None:
    weights, config = fast_llm_reference.random_weights(2)
    folder = fast_llm_reference.write(tmp_path / "model", weights, config)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-10])
    refused(lambda: import_fast_llm(folder, tmp_path / "out"), folder, "not a complete safetensors file")
    file.unlink()
    refused(lambda: import_fast_llm(folder, tmp_path / "out"), folder, "model.safetensors: missing")
    file.write_bytes(raw)
    (folder / "tokenizer.json").unlink()
    refused(lambda: import_fast_llm(folder, tmp_path / "out"), folder, "tokenizer.model: No such file")
    shutil.copy(model_file, folder)  # the one that lies there
    refused(lambda: import_fast_llm(folder, tmp_path / "out"), folder, "tokenizer of 400 tokens beside a model of 260")
    with pytest.raises(CheckpointError, match="none: no such directory"):
        import_fast_llm(tmp_path / "none", tmp_path / "out")


def test_heads_in_reverse_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, config = fast_llm_reference.random_weights(3)
    right, swap = fast_llm._theirs, {"1": "2", "2": "1"}
    monkeypatch.setattr(
        fast_llm, "_theirs", lambda name, c: right(re.sub(r"heads\.([12])", lambda m: f"heads.{swap[m[1]]}", name), c)
    )
    folder = fast_llm_reference.write(tmp_path / "model", weights, config)
    model, _ = load_checkpoint(import_fast_llm(folder, tmp_path / "out"))
    assert (logits(model) - fast_llm_reference.all_heads(weights, config, TOKENS)).abs().max() > 0.1


# Memory.

MEASURE = """
import sys
from foretoken.formats.{layout} import import_{layout} as run

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

run(sys.argv[1], sys.argv[1] + "-out")  # a small one, for what is imported on first use
before = peak()
run(sys.argv[2], sys.argv[2] + "-out")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process")
@pytest.mark.parametrize("layout", ["meta", "fast_llm"])
def test_memory_is_that_of_a_few_tensors(released: Callable[..., Path], tmp_path: Path, layout: str) -> None:
    """75 MB, whose largest tensor has 6, pass through 30 MB."""
    params = PARAMS | {"dim": 1024, "n_layers": 3, "n_heads": 8, "n_kv_heads": 8, "n_future_tokens": 2}
    generator = torch.Generator().manual_seed(0)
    weights = {  # any bits of a finite number do
        name: torch.randint(0, 15_000, shape, dtype=torch.int16, generator=generator).view(torch.float16)
        for name, shape in meta_reference.shapes(params, 2752).items()
    }
    assert sum(t.nbytes for t in weights.values()) > 75e6
    if layout == "meta":
        small, large = released(), released(weights, "large", **params)
    else:
        theirs, config = fast_llm_reference.random_weights(2)
        small = fast_llm_reference.write(tmp_path / "small", theirs, config)
        config |= {"hidden_size": 1024, "intermediate_size": 2752, "vocab_size": 400, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 8, "num_key_value_heads": 8}
        large = fast_llm_reference.write(tmp_path / "large", fast_llm_reference.from_meta(weights, 2), config)
    program = [sys.executable, "-c", MEASURE.format(layout=layout), small, large]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6


# The commands.

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `foretoken import` in this process: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foretoken", "import", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, errors = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, errors

    return call


def test_commands(command: Command, released: Callable[..., Path], tmp_path: Path) -> None:
    code, out, errors = command("meta", released(), tmp_path / "a", "--json")
    assert code == 0, errors
    values = json.loads(out)
    assert (values["checkpoint"], values["n_future"], values["next_token_layers"]) == (str(tmp_path / "a"), 3, 3)
    assert "head 2" in errors  # that it goes on
    weights, config = fast_llm_reference.random_weights(2)
    folder = fast_llm_reference.write(tmp_path / "model", weights, config)
    code, out, errors = command("fast-llm", folder, tmp_path / "b")
    assert code == 0, errors
    assert "n future" in out
    load_checkpoint(tmp_path / "b")


@pytest.mark.parametrize("name", ["meta", "fast-llm"])
def test_help_has_an_example(command: Command, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"Example: foretoken import {name} " in " ".join(out.split())
    assert "--json" in out


def test_mistakes_are_one_line(command: Command, released: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = released(), tmp_path / "out"
    before = content(tmp_path)
    for words, says in (
        ([], "Missing command"),
        (["onnx", folder, out], "onnx"),
        (["meta", folder], "Missing argument"),
        (["meta", tmp_path / "none", out], "none: no such directory"),
        (["meta", folder, folder], "7B: exists already; choose another directory"),
        (["meta", folder, out, "--tokenizer", tmp_path / "no.model"], "no.model: No such file"),
        (["fast-llm", folder, out], "config.json: No such file"),
    ):
        code, printed, errors = command(*words)
        assert (code, printed) == (2, "")
        assert errors.startswith("foretoken: error: ")
        assert errors.count("\n") == 1
        assert says in errors
    assert content(tmp_path) == before


def test_interrupt(
    command: Command, released: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(display: Display, text: str, last: bool = False) -> None:
        if "written" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "progress", stop)
    code, out, errors = command("meta", released(), tmp_path / "out")
    assert (code, out) == (130, "")
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"7B", "tokenizer.model"}
