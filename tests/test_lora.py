"""Adapters on the next-token path: what learns, that their sum is what is saved, and that a run goes on exactly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from small_runs import overrides, records, same_weights, weights

from foretoken import optim, retrofit
from foretoken import train as training
from foretoken.checkpoint import load_checkpoint, load_model, save_checkpoint
from foretoken.errors import CheckpointError, ConfigError, TrainingError
from foretoken.lora import adapters, merged
from foretoken.model import Model
from foretoken.recipe import load_recipe
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without heads, whose projections have biases."""
    model = tiny_model("qwen2", n_future=1, layers=3, vocab=260, dtype=torch.float32, peaked=False)
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "model", model, byte_tokenizer())


def sets(plain: Path, corpus: Path, *more: str) -> tuple[str, ...]:
    common = [text for text in overrides(corpus) if not text.startswith("train.seq_len")]
    steps = ("train.steps=4", "train.batch_size=4", "train.save_every=2", "train.seq_len=32", "optim.warmup_steps=0")
    lora = ("model.frozen=false", "model.lora_rank=4", "train.log_every=1")
    return f"model.start_from={plain}", *common, *steps, *lora, *more


def adapted(plain: Path, corpus: Path, *more: str) -> Any:
    return load_recipe("retrofit", sets(plain, corpus, *more))


def started(wanted: Any, moved: bool = False) -> Model:
    """What a run begins with; `moved`: with adapters that do something."""
    config, _ = retrofit.starting_config(wanted.model, 32)
    model = retrofit.starting_model(wanted.model, config, wanted.train.seed)
    if moved:
        generator = torch.Generator().manual_seed(1)
        for name, matrix in adapters(model).items():
            if ".lora_B." in name:
                matrix.normal_(0, 0.02, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_adapters_and_heads_learn_and_nothing_else(kind: str, plain: Path, corpus: Path) -> None:
    wanted = adapted(plain, corpus, f"model.head_kind={kind}", "model.n_future=3")
    model = started(wanted, moved=True).train()
    _, tokenizer = retrofit.starting_config(wanted.model, 32)
    batch = training._windows(wanted, tokenizer, "train").batch(0)
    list(training._backward(model, batch, [1.0] * 3, wanted))
    found = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    further = {name for name, _ in model.named_parameters() if name.startswith("heads.") and name[6] != "0"}
    matrices = {f"{part}.{name}_proj" for part, names in (("self_attn", "qkvo"), ("mlp", ())) for name in names}
    matrices |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    places = [f"{block}.{matrix}" for block in ("trunk.0", "trunk.1", "heads.0") for matrix in matrices]
    assert found == further | {f"{place}.lora_{side}.default.weight" for place in places for side in "AB"}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in found)


def test_at_first_nothing_changes(plain: Path, corpus: Path) -> None:
    wanted, tokens = adapted(plain, corpus), torch.arange(20)[None]
    model, old = started(wanted), load_model(plain, None)
    assert all(torch.equal(state, old(tokens)[0]) for state in model(tokens))  # heads are copies of the last block
    torch.manual_seed(99)  # the process's own generator has no part in it
    again, other = started(wanted), started(adapted(plain, corpus, "train.seed=1"))
    for name, matrix in adapters(model).items():
        assert torch.equal(matrix, adapters(again)[name])
        assert torch.equal(matrix, adapters(other)[name]) == (".lora_B." in name)


def test_what_is_saved_is_the_sum(plain: Path, corpus: Path, tmp_path: Path) -> None:
    """An ordinary checkpoint with the model's states; only the named matrices differ, by alpha / rank times B A."""
    wanted = adapted(plain, corpus, "model.lora_alpha=12", 'model.lora_target_modules=["q_proj", "down_proj"]')
    model, old = started(wanted, moved=True), load_model(plain, None)
    save_checkpoint(tmp_path / "saved", model, byte_tokenizer())
    saved = load_model(tmp_path / "saved", None)
    tokens = torch.arange(30)[None]
    for a, b in zip(model(tokens), saved(tokens), strict=True):
        torch.testing.assert_close(model.logits(a), saved.logits(b), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(model(tokens)[0], old(tokens)[0], atol=1e-3)
    now, pairs = dict(saved.named_parameters()), adapters(model)
    for name, weight in old.named_parameters():
        place = name.removesuffix(".weight")
        if f"{place}.lora_A.default.weight" in pairs:
            a, b = (pairs[f"{place}.lora_{side}.default.weight"] for side in "AB")
            torch.testing.assert_close(now[name], weight + 3 * b @ a, atol=1e-7, rtol=1e-6)
            assert not torch.equal(now[name], weight)
        else:
            assert torch.equal(now[name], weight)
    assert len(pairs) == 2 * 2 * 3


@pytest.mark.parametrize(
    "more", [("model.head_kind=sequential",), ("model.n_future=1", "loss.soft=0", "optim.name=muon")]
)
def test_stopped_and_resumed_it_is_the_same_run(
    more: tuple[str, ...], plain: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through the check at the end; the base is untouched and the sum is what was saved."""
    wanted = adapted(plain, corpus, *more)
    train(wanted, tmp_path / "whole")
    real, calls, models = training._update, list[int](), list[Model]()

    def update(model: Model, *args: Any) -> float:
        models.append(model)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(model, *args)

    monkeypatch.setattr(training, "_update", update)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-2" / "train_state" / "adapters.safetensors").is_file()
    load_checkpoint(tmp_path / "run")
    train(wanted, tmp_path / "run", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert records(tmp_path / "whole") == records(tmp_path / "run")
    assert not (tmp_path / "run" / "train_state").exists()
    before = dict(load_model(plain, None).named_parameters())
    for name, p in models[-1].named_parameters():
        if ".lora_" not in name and not (name.startswith("heads.") and name[6] != "0"):
            assert torch.equal(p, before[name.replace(".base_layer.", ".")])
    after = dict(merged(models[-1]))
    assert all(torch.equal(p, after[name]) for name, p in load_model(tmp_path / "run", None).named_parameters())
    assert not torch.equal(after["trunk.0.mlp.up_proj.weight"], before["trunk.0.mlp.up_proj.weight"])


def test_muon_leaves_adapters_to_adamw(plain: Path, corpus: Path) -> None:
    wanted = adapted(plain, corpus, "optim.name=muon")
    model = started(wanted)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in optim.make_optimizers(model, wanted.optim)
    )
    assert adapters(model).keys() <= adamw
    further = {name: p for name, p in model.named_parameters() if name.startswith("heads.") and name[6] != "0"}
    assert muon == {name for name, p in further.items() if p.dim() > 1}


def test_adapters_that_have_not_learned_are_an_error(plain: Path, corpus: Path, tmp_path: Path) -> None:
    wanted = adapted(plain, corpus, "loss.head_weights=[0, 1, 1, 1]", "loss.head_gradients=[]")
    with pytest.raises(TrainingError, match="the adapters have not learned"):
        train(wanted, tmp_path / "run")


def test_what_a_run_cannot_go_on_from(
    plain: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model where the base was, or other adapters than were saved."""
    base = shutil.copytree(plain, tmp_path / "base")
    wanted = adapted(base, corpus, "train.steps=3")
    real = training._update

    def update(model: Model, optimizers: Any, batches: Any, step: int, *rest: Any) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return real(model, optimizers, batches, step, *rest)

    monkeypatch.setattr(training, "_update", update)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "run")
    monkeypatch.undo()
    state = tmp_path / "run" / "checkpoint-2" / "train_state" / "adapters.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors: is not the file that foretoken\.json recorded"):
        train(wanted, tmp_path / "run", resume=True)
    state.write_bytes(whole)
    shutil.rmtree(base)
    other = tiny_model("qwen2", n_future=1, layers=3, vocab=260, dtype=torch.float32, peaked=False, seed=5)
    save_checkpoint(base, other, byte_tokenizer())
    with pytest.raises(CheckpointError, match=r"is not of .*base with adapters: it has changed"):
        train(wanted, tmp_path / "run", resume=True)


MISTAKES = {
    "frozen": (["model.frozen=true"], "needs start_from, without frozen"),
    "matrix": (['model.lora_target_modules=["qkv"]'], "lora_target_modules.0: Input should be 'q_proj'"),
    "nothing": (["model.lora_target_modules=[]"], "lora_target_modules: .*at least 1"),
    "rank": (["model.lora_rank=0"], "lora_rank: .*greater than or equal to 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, plain: Path, corpus: Path) -> None:
    given, says = MISTAKES[name]
    with pytest.raises(ConfigError, match=says):
        adapted(plain, corpus, *given)


def test_two_processes_and_one(plain: Path, corpus: Path, tmp_path: Path) -> None:
    """Adapters are sharded as the blocks are, and their sum is saved whole; one process goes on with it."""
    kept = ("train.keep_checkpoints=2",)
    train(adapted(plain, corpus, *kept), tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "foretoken", "train", "retrofit", "--out", str(tmp_path / "two")]
    command += [part for change in sets(plain, corpus, *kept) for part in ("--set", change)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(training.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    train(adapted(plain, corpus, *kept), tmp_path / "half", resume=True)
    for run in ("two", "half"):
        found, wanted = weights(tmp_path / run), weights(tmp_path / "one")
        assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


def test_more_mistakes(plain: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs start_from, without frozen"):
        load_recipe("tiny", ("model.lora_rank=4",))
    with pytest.raises(ConfigError, match="lora_alpha and lora_target_modules need lora_rank"):
        load_recipe("retrofit", (f"model.start_from={plain}", "model.lora_alpha=4"))
    wanted = adapted(plain, corpus)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model\.lora_rank needs: pip install 'foretoken\[lora\]'"):
        train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
