"""Training: it learns, it can be stopped anywhere, it counts exactly, and it never spoils what it has saved."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch
from conftest import tiny_model
from small_runs import (
    check_loads,
    close_weights,
    content,
    finish,
    recipe,
    records,
    same_weights,
    weights,
    write_corpus,
)

from foretoken import optim
from foretoken import train as training
from foretoken.checkpoint import load_checkpoint, step_checkpoints
from foretoken.config import LossConfig, OptimConfig
from foretoken.data import prepare
from foretoken.display import Display, _training_table
from foretoken.errors import CheckpointError, ConfigError, DataError, TrainingError
from foretoken.model import Model
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train

MUON = ("optim.name=muon",)
MICRO = ("train.micro_batch_size=2",)


@contextmanager
def at_step(step: int, act: Callable[[Model], object]) -> Iterator[None]:
    """Inside, `act` is called with the model when the step after `step` finished ones begins."""
    begin, set_rate = training._begin, optim.set_learning_rate
    models: list[Model] = []
    calls = [0]

    def noting(*arguments: object) -> object:
        begun = begin(*arguments)  # type: ignore[arg-type]
        models.append(begun[0])
        calls[0] = begun[2]
        return begun

    def acting(optimizers: list[torch.optim.Optimizer], ratio: float) -> None:
        if calls[0] == step:
            act(models[0])
        calls[0] += 1
        set_rate(optimizers, ratio)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_begin", noting)
        patch.setattr(optim, "set_learning_rate", acting)
        yield


def interrupt(model: Model) -> None:
    raise KeyboardInterrupt


def stopped(corpus: Path, run: Path, after: int, *more: str) -> None:
    """A run that a signal stops as soon as `after` steps are done."""
    with at_step(after - 1, lambda model: signal.raise_signal(signal.SIGTERM)):
        result = finish(recipe(corpus, *more), run)
    assert (result.finished, result.step, result.checkpoint) == (False, after, run / f"checkpoint-{after}")


# It learns.


@pytest.mark.parametrize("more", [(), MUON, ("model.n_future=1",)])
def test_loss_of_every_head_goes_down(corpus: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    train(recipe(corpus, "train.steps=60", *more), tmp_path / "run")
    first, last = (r for r in records(tmp_path / "run") if r["kind"] == "train" and r["step"] in (10, 60))
    for depth, (before, after) in enumerate(zip(first["loss"], last["loss"], strict=True)):
        assert after < 0.8 * before, f"head {depth + 1}"
    for name in ("bits_per_byte", "top1", "agreement", "count"):
        assert len(last[name]) == len(last["loss"])


def test_every_head_and_the_trunk_change_after_a_step(corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, "train.steps=1", "optim.warmup_steps=0")
    train(wanted, tmp_path / "run")
    new = Model(wanted.model.resolve(260, 32))
    new.init_weights(0)
    after = weights(tmp_path / "run")
    for name, before in new.named_parameters():
        assert not torch.equal(before, after[name]), name


def test_bits_per_byte_are_the_loss_in_bits_for_the_bytes_of_text(corpus: Path, tmp_path: Path) -> None:
    """A document of b bytes is b + 2 tokens, bos and eos (none where it is cut, as the training part is here); the mean
    loss is of all that have one before them."""
    train(recipe(corpus, "train.steps=2"), tmp_path / "run")
    for record, split in zip(records(tmp_path / "run"), ("train", "validation"), strict=True):
        tokens = prepare(recipe(corpus).data, byte_tokenizer(), split)
        ratio = (tokens.total - tokens.documents) / sum(tokens.text_bytes(i) for i in range(tokens.documents))
        assert ratio == 1 if split == "train" else 1 < ratio < 1.2
        for loss, bits in zip(record["loss"], record["bits_per_byte"], strict=True):
            assert bits == pytest.approx(loss / math.log(2) * ratio)


def test_tokens_per_second_are_of_training_alone(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes 2 seconds, an evaluation 10."""
    clock = [0.0]

    def timed(real: Callable[..., Any], takes: float, *given: Any) -> Any:
        clock[0] += takes
        return real(*given)

    monkeypatch.setattr(training, "_update", partial(timed, training._update, 2.0))
    monkeypatch.setattr(training, "_validate", partial(timed, training._validate, 10.0))
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    lines: list[dict[str, Any]] = []
    wanted = recipe(corpus, "train.steps=4", "train.log_every=2", "train.eval_every=1")
    train(wanted, tmp_path / "run", report=lines.append)
    per_step = wanted.train.batch_size * wanted.train.seq_len
    assert [line["tokens_per_second"] for line in lines if line["kind"] == "train"] == [per_step / 2] * 2


def test_a_head_without_targets_has_no_figures(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where texts are shorter than it looks ahead; shown as a dash."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{chr(97 + i)}"}}\n' for i in range(26)))
    wanted = recipe(corpus, "train.steps=1", "train.seq_len=8", f'data.source=["{tmp_path}/a.jsonl"]')
    with Display() as display:
        train(wanted, tmp_path / "run", report=display.record)
    step, held_out = records(tmp_path / "run")
    for record in (step, held_out):
        assert record["count"][2] == 0 < record["count"][1]
        assert [record[name][2] for name in ("loss", "bits_per_byte", "top1", "agreement")] == [None] * 4
    assert " - bits per byte" in capsys.readouterr().err
    display.out.print(_training_table(step | {"seconds_left": 0, "tokens_per_second": 1}, 1))
    assert ["t+3", "-", "-", "-"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_logged_losses_are_means_over_the_steps_since_the_last_record(corpus: Path, tmp_path: Path) -> None:
    train(recipe(corpus, "train.steps=6", "train.log_every=3"), tmp_path / "a")
    train(recipe(corpus, "train.steps=6", "train.log_every=1"), tmp_path / "b")
    three, one = records(tmp_path / "a"), records(tmp_path / "b")
    for head in range(3):
        mean = sum(r["loss"][head] * r["count"][head] for r in one[:3]) / sum(r["count"][head] for r in one[:3])
        assert three[0]["loss"][head] == pytest.approx(mean, rel=1e-12)


def test_bfloat16_runs_on_a_cpu(corpus: Path, tmp_path: Path) -> None:
    train(recipe(corpus, "train.steps=3", "train.precision=bfloat16", *MUON), tmp_path / "run")
    assert all(math.isfinite(loss) for record in records(tmp_path / "run") for loss in record["loss"])
    kept = weights(tmp_path / "run")
    assert {p.dtype for p in kept.values()} == {torch.float32}
    assert all(p.isfinite().all() for p in kept.values())


# Forms of a step that must be one.


def test_sequential_backward_trains_the_same_model(corpus: Path, tmp_path: Path) -> None:
    for method in ("chunked", "sequential"):
        train(recipe(corpus, "train.steps=6", f"loss.method={method}"), tmp_path / method)
    close_weights(tmp_path / "chunked", tmp_path / "sequential", 2e-5)


@pytest.mark.parametrize("more", [(), ("train.attention_across_documents=false",), ("loss.method=sequential",)])
def test_micro_batches_train_the_same_model(corpus: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    train(recipe(corpus, "train.steps=6", *more), tmp_path / "whole")
    train(recipe(corpus, "train.steps=6", *more, *MICRO), tmp_path / "micro")
    close_weights(tmp_path / "whole", tmp_path / "micro", 2e-5)
    for a, b in zip(records(tmp_path / "whole")[:-1], records(tmp_path / "micro")[:-1], strict=True):
        assert a["count"] == b["count"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("option", ["train.attention_across_documents=false", "loss.targets_across_documents=true"])
def test_document_options_change_what_is_learned(corpus: Path, tmp_path: Path, option: str) -> None:
    train(recipe(corpus, "train.steps=4"), tmp_path / "a")
    train(recipe(corpus, "train.steps=4", option), tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "b")


# Stop and resume.


@pytest.mark.parametrize("more", [(), MUON, MICRO, ("loss.method=sequential", *MUON, *MICRO)], ids=str)
def test_stopped_and_resumed_is_never_stopped(corpus: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Weights and records, bit for bit; stopped between two records, so that what they count is resumed too."""
    more = ("train.steps=14", "train.log_every=4", "train.eval_every=7", "train.save_every=5", *more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe(corpus, *more), whole)
    stopped(corpus, parts, 3, *more)
    stopped(corpus, parts, 9, *more)
    assert finish(recipe(corpus, *more), parts).finished
    assert same_weights(whole, parts)
    assert records(whole) == records(parts)


def test_resume_repeats_the_records_after_its_checkpoint(corpus: Path, tmp_path: Path) -> None:
    more = ("train.steps=8", "train.log_every=1", "train.save_every=3")
    train(recipe(corpus, *more), tmp_path / "whole")
    with at_step(5, interrupt), pytest.raises(KeyboardInterrupt):
        train(recipe(corpus, *more), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')  # cut short
    finish(recipe(corpus, *more), tmp_path / "run")
    assert records(tmp_path / "whole") == records(tmp_path / "run")


def test_second_interrupt_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    twice = at_step(2, lambda model: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with twice, pytest.raises(KeyboardInterrupt):
        train(recipe(corpus, "train.save_every=1"), tmp_path / "run")
    assert [path.name for path in step_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


# Killed at any moment: see killed_runs.py.


@pytest.fixture(scope="module")
def killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs that got signals, and what killed_runs.py says of them."""
    folder = tmp_path_factory.mktemp("killed")
    program = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run([sys.executable, program, corpus, folder], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def ends_like_the_whole(corpus: Path, runs: list[Path], more: tuple[str, ...], whole: Path) -> None:
    train(recipe(corpus, *more), whole)
    for run in runs:
        check_loads(run)
        if not (run / "config.json").exists():
            assert finish(recipe(corpus, *more), run).finished
        assert same_weights(whole, run), run
        assert records(whole) == records(run), run


def test_killed_before_any_change_of_the_folder(
    corpus: Path, tmp_path: Path, killed: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = killed
    assert result["changes"] > 25, "two checkpoints and a removal change more than this"
    runs = [folder / "changes" / str(i + 1) for i in range(result["changes"])]
    ends_like_the_whole(corpus, runs, killed_runs.CHANGES, tmp_path / "whole")


def test_killed_at_random_moments(corpus: Path, tmp_path: Path, killed: tuple[Path, dict[str, Any]]) -> None:
    folder, result = killed
    assert result["moments"] == 6
    ends_like_the_whole(corpus, [folder / "moments" / "run"], killed_runs.MOMENTS, tmp_path / "whole")
    assert not list((folder / "moments" / "run").glob(".*")), "what kills left is cleared away"


def test_signal_to_the_command_saves_and_exits_130(
    corpus: Path, tmp_path: Path, killed: tuple[Path, dict[str, Any]]
) -> None:
    folder, result = killed
    assert result["signals"] == [130, 130]
    runs = [folder / "signals" / name for name in ("SIGINT", "SIGTERM")]
    for run in runs:
        (saved,) = step_checkpoints(run)
        steps = int(saved.name.removeprefix("checkpoint-"))
        assert 0 < steps < 60
        assert len(records(run)) == steps, "the step it was in is finished and recorded"
        out, errors = ((run.parent / f"{name}-{run.name}").read_text() for name in ("out", "errors"))
        assert out == f"Stopped at step {steps}, saved as {saved}; --resume goes on from there\n"
        assert "Traceback" not in errors
    ends_like_the_whole(corpus, runs, killed_runs.SIGNALS, tmp_path / "whole")


# What goes wrong is said, and nothing that was saved is touched.


@pytest.mark.parametrize("head", [1, 2, 3])
def test_nan_names_the_head_and_keeps_the_last_checkpoint(corpus: Path, tmp_path: Path, head: int) -> None:
    run = tmp_path / "run"
    kept: dict[str, bytes] = {}

    def poison(model: Model) -> None:
        kept.update(content(run))
        model.heads[head - 1].mlp.down_proj.weight.data[0, 0] = math.nan

    wanted = recipe(corpus, "train.save_every=2", "train.log_every=1", "train.async_save=false")
    with at_step(3, poison), pytest.raises(TrainingError) as error:
        train(wanted, run)
    assert str(error.value) == f"step 4: the loss of head {head} is nan; the last good checkpoint is {run}/checkpoint-2"
    assert content(run) == kept
    check_loads(run)
    assert finish(wanted, run).finished


@pytest.mark.parametrize(
    ("kind", "part", "named"),
    [
        ("parallel", "heads.0", "head 1"),
        ("parallel", "heads.2", "head 3"),
        ("sequential", "heads.1", "heads 2 to 3"),
        ("parallel", "lm_head", "the unembedding"),
        ("parallel", "trunk.0", "the trunk"),
        ("parallel", "embed_tokens", "the embedding"),
    ],
)
def test_a_gradient_that_becomes_nan_names_where(
    corpus: Path, tmp_path: Path, kind: str, part: str, named: str
) -> None:
    """It becomes so in the backward of a part, behind finite losses, and goes on into all that lies before."""
    run, wanted = tmp_path / "run", recipe(corpus, f"model.head_kind={kind}", "model.num_hidden_layers=3")
    lost = math.nan if part != "heads.2" else math.inf

    def poison(model: Model) -> None:
        def hooked(module: torch.nn.Module, inputs: object, y: torch.Tensor) -> None:
            y.register_hook(lambda gradient: gradient * lost)

        if part == "lm_head":
            model.lm_head.weight.register_hook(lambda gradient: gradient * lost)
        else:
            model.get_submodule(part).register_forward_hook(hooked)

    with at_step(1, poison), pytest.raises(TrainingError) as error:
        train(wanted, run)
    left = "no checkpoint had been saved yet"
    assert re.fullmatch(rf"step 2: the gradient's norm is (nan|inf), first in {named}; {left}", str(error.value))


def test_gradients_that_are_no_numbers_stay_as_they_are() -> None:
    """Scaled by their norm, all of them would be NaN."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([math.nan])
    assert math.isnan(optim.clip_gradients(layer, 1.0))
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]


def test_gradient_that_is_no_number_stops_too(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "clip_gradients", lambda model, limit: math.inf)
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is inf; no checkpoint had been saved yet"):
        train(recipe(corpus), tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    ["optim.lr=1e-3", "train.steps=41", "model.hidden_size=64", "loss.method=sequential", "data.errors=replace",
     "train.eval_every=3"],
)  # fmt: skip
def test_resume_with_another_recipe_names_the_key(corpus: Path, tmp_path: Path, change: str) -> None:
    stopped(corpus, tmp_path / "run", 2)
    before = content(tmp_path / "run")
    key, _, value = change.partition("=")
    with pytest.raises(ConfigError, match=f"was trained with {key} = .*, the recipe says {float(value)}" if "lr" in key
                       else f"was trained with {key} = .*, the recipe says {value}; "):  # fmt: skip
        train(recipe(corpus, change), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


def test_resume_may_change_how_often_is_saved(corpus: Path, tmp_path: Path) -> None:
    train(recipe(corpus, "train.steps=6"), tmp_path / "whole")
    stopped(corpus, tmp_path / "run", 2, "train.steps=6")
    more = ("train.save_every=1", "train.log_every=1", "train.async_save=false")
    finish(recipe(corpus, "train.steps=6", *more), tmp_path / "run")
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "mine")
    stopped(corpus, tmp_path / "run", 2)
    (corpus / "text" / "0.py").write_text("something else\n" * 40)
    with pytest.raises(ConfigError, match="data have changed"):
        train(recipe(corpus), tmp_path / "run", resume=True)


def test_resume_of_a_damaged_state_is_refused(corpus: Path, tmp_path: Path) -> None:
    stopped(corpus, tmp_path / "run", 2)
    path = tmp_path / "run" / "checkpoint-2" / "train_state" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: is not the file that"):
        train(recipe(corpus), tmp_path / "run", resume=True)
    shutil.rmtree(path.parent)
    with pytest.raises(CheckpointError, match="no train_state"):
        train(recipe(corpus), tmp_path / "run", resume=True)


def test_folders_that_cannot_be_the_runs(corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, "train.steps=1")
    with pytest.raises(ConfigError, match="no run that could be resumed"):
        train(wanted, tmp_path / "new", resume=True)
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(ConfigError, match="file"):
            train(wanted, tmp_path / path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        train(wanted, tmp_path / "full")
    train(wanted, tmp_path / "run")
    with pytest.raises(ConfigError, match="finished"):
        train(wanted, tmp_path / "run", resume=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("option", "where"), [("train.seq_len=4000", "train"), ("train.seq_len=600", "validation")])
def test_corpus_shorter_than_a_window_is_found_before_training(
    corpus: Path, tmp_path: Path, option: str, where: str
) -> None:
    with pytest.raises(DataError, match=f"{where} split: corpus has .* tokens, one window needs"):
        train(recipe(corpus, option), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_are_removed(corpus: Path, tmp_path: Path) -> None:
    run, seen = tmp_path / "run", []
    more = ("train.save_every=1", "train.keep_checkpoints=2", "train.log_every=1", "train.async_save=false")
    wanted = recipe(corpus, "train.steps=6", *more)
    train(wanted, run, report=lambda record: seen.append([path.name for path in step_checkpoints(run)]))
    assert seen[2:] == [
        [],
        ["checkpoint-1"],
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
        ["checkpoint-3", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-5"],
        ["checkpoint-4", "checkpoint-5"],  # the validation record
    ]
    # the finished run's own is one of the two
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-5", "mtp_heads"]


def test_finished_run_says_where_it_comes_from(corpus: Path, tmp_path: Path) -> None:
    result = train(recipe(corpus, "train.steps=2"), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "foretoken.json").read_text())
    assert (result.step, result.finished, result.checkpoint) == (2, True, tmp_path / "run")
    assert stored["step"] == 2
    assert stored["metrics"] == result.last
    assert stored["recipe"] == recipe(corpus, "train.steps=2").model_dump(mode="json")
    model, tokenizer = load_checkpoint(tmp_path / "run")
    assert (model.config.n_future, tokenizer.kind) == (3, "bytes")


# Schedules and optimisers.


def test_learning_rate_worked_example() -> None:
    """4 steps of warm-up and 5 of cosine, at 0, 1/4, 1/2, 3/4 and all of the half period, down to 0.2."""
    config = OptimConfig(warmup_steps=4, final_lr_ratio=0.2)
    ratios = [optim.learning_rate_ratio(step, 9, config) for step in range(11)]
    cosine = [0.2 + 0.8 * share for share in (1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0)]
    assert ratios == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine, 0.2, 0.2])


def test_head_weights_worked_example() -> None:
    points = ({"step": 10, "weights": [1, 0]}, {"step": 20, "weights": [1, 1]}, {"step": 40, "weights": [1, 0.5]})
    config = LossConfig.model_validate({"head_weights": points})
    at = {step: optim.head_weights(step, 100, 2, config) for step in (0, 10, 15, 20, 30, 40, 99)}
    assert [weights[1] for weights in at.values()] == pytest.approx([0, 0, 0.5, 1, 0.75, 0.5, 0.5])
    assert all(weights[0] == 1 for weights in at.values())
    assert optim.head_weights(7, 100, 3, LossConfig()) == [1, 1, 1]
    assert optim.head_weights(7, 100, 2, LossConfig(head_weights=(1, 0.3))) == [1, 0.3]


def test_head_of_weight_zero_learns_nothing(corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(corpus, "train.steps=2", "loss.head_weights=[1, 0, 1]", "optim.weight_decay=0")
    train(wanted, tmp_path / "run")
    new = Model(wanted.model.resolve(260, 32))
    new.init_weights(0)
    after = weights(tmp_path / "run")
    for name, before in new.named_parameters():
        assert torch.equal(before, after[name]) == name.startswith("heads.1."), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(architecture: str, tied: bool, name: str) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    optimizers = optim.make_optimizers(model, OptimConfig.model_validate({"name": name}))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() == 2), names[id(p)]
    muon = [names[id(p)] for o in optimizers if isinstance(o, optim.Muon) for g in o.param_groups for p in g["params"]]
    blocks = [n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith(("trunk.", "heads."))]
    assert sorted(muon) == (sorted(blocks) if name == "muon" else [])
    optim.set_learning_rate(optimizers, 0.25)
    assert {group["lr"] for group in groups} == {0.25 * rate for rate in ([3e-4, 0.02] if muon else [3e-4])}


@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_is_torchs(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square, tall and wide matrices, two of a shape, over steps; torch's iteration is in bfloat16."""
    monkeypatch.setattr(optim, "fast_bfloat16", lambda device: bfloat16)
    shapes = [(24, 24), (24, 24), (48, 16), (16, 48)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        optim.Muon([{"params": ours, "peak_lr": 0.02}], lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1),
    ]
    for _ in range(5):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert moved > 0.1
        assert (a - b).norm() < 0.02 * moved


def test_muon_leaves_what_has_no_gradient() -> None:
    """Of two matrices of a shape, one with momentum from before: a head whose loss weight has become 0."""
    both = [torch.nn.Parameter(torch.eye(8)) for _ in range(2)]
    muon = optim.Muon([{"params": both, "peak_lr": 0.02}], lr=0.02, weight_decay=0.1)
    for p in both:
        p.grad = torch.ones(8, 8)
    muon.step()
    before = [p.detach().clone() for p in both]
    both[1].grad = torch.zeros(8, 8)
    muon.step()
    assert [torch.equal(p, q) for p, q in zip(both, before, strict=True)] == [False, True]


@pytest.mark.parametrize("shape", [(3, 20, 8), (2, 8, 20), (1, 12, 12)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonalize(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_clipping_returns_the_norm_before() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert optim.clip_gradients(layer, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert optim.clip_gradients(layer, 2.0) == pytest.approx(1.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_tensorboard_and_wandb_name_their_extra(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option, extra in (("train.tensorboard=true", "tensorboard"), ("train.wandb_project=p", "wandb")):
        with pytest.raises(ConfigError, match=rf"pip install 'foretoken\[{extra}\]'"):
            train(recipe(corpus, option), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []
