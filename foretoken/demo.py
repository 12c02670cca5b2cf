"""From nothing to a multi-token model that decodes faster: what `foretoken demo` does, on the public pieces.

1. The Python standard library of the running interpreter is the corpus, split by file.
2. A few steps are timed, so that training takes the minutes asked for; then the shipped recipe `demo` is trained.
3. Held-out files are scored, and continued plainly and self-speculatively, prompt by prompt.
4. Text, figures and plots are written beside the checkpoint.
"""

from __future__ import annotations

import importlib.util
import math
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from foretoken import optim
from foretoken.bench import PROMPT_BYTES, SAMPLED_TEMPERATURE, Comparison, Way, compare, held_out_prompts
from foretoken.checkpoint import load_checkpoint
from foretoken.completion import token_pieces
from foretoken.config import Recipe
from foretoken.display import Display
from foretoken.errors import ConfigError
from foretoken.evaluate import evaluate, evaluation_documents
from foretoken.files import write_json
from foretoken.kernels import library
from foretoken.lab.stored import other_kind
from foretoken.metrics import Record
from foretoken.model import Model
from foretoken.recipe import load_recipe
from foretoken.report import write_report
from foretoken.tokenizer import Tokenizer, from_config
from foretoken.train import TrainResult, train

EVALUATED_BYTES = 200_000
RESULT = "demo.json"


def run_demo(
    display: Display, out: Path, minutes: float, n_future: int, width: int, layers: int, *,
    head_kind: str = "sequential", drafts: int | None = None, prompt_count: int = 24, max_tokens: int = 200,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Train, decode and report into the folder `out`; returns what `foretoken demo --json` prints.

    Raises ConfigError for a shape that cannot be and KeyboardInterrupt when training was stopped (it is saved).
    """
    recipe = _recipe(n_future, width, layers, seed, head_kind)
    _check_drafts(drafts, head_kind, n_future)
    _check(recipe, minutes, prompt_count, max_tokens)
    _clear(out, display)

    trained, records = _train(display, out, recipe, minutes)
    dtype, compiled = _decoding()
    model, tokenizer = load_checkpoint(out, dtype)
    scored, texts = _score(display, model, tokenizer, out)
    prompts = held_out_prompts(texts, prompt_count)
    greedy, sampled = (
        compare(model, tokenizer, prompts, temperature, max_tokens, seed, display, (Way(drafts),))[Way(drafts)]
        for temperature in (0.0, SAMPLED_TEMPERATURE)
    )
    _show(display, tokenizer, greedy, sampled, n_future)
    display.result(other_kind(head_kind))

    result = {
        "bits_per_byte": scored["heads"][0]["bits_per_byte"],
        **greedy.figures(),
        "outputs_equal": greedy.outputs_equal and sampled.outputs_equal,
        "prompts": len(prompts),
        "train_seconds": trained.seconds,
        "checkpoint": str(out),
        "command": f"foretoken demo --minutes {minutes:g} --n-future {n_future} --head-kind {head_kind} "
        f"{'' if drafts is None else f'--drafts {drafts} '}--width {width} --layers {layers} "
        f"--prompts {prompt_count} --max-tokens {max_tokens} --seed {seed}",
        "sampled": {"temperature": SAMPLED_TEMPERATURE, **sampled.figures()},
        "evaluation": scored,
        "max_tokens": max_tokens,
        "n_future": n_future,
        "head_kind": head_kind,
        "drafts": drafts,
        "dtype": dtype,
        "compiled": compiled,
        "steps": trained.step,
        "machine": {"cpu": torch.cpu.get_capabilities().get("cpu_name"), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
    }
    write_json(out / RESULT, result)
    write_report(out / "report.html", records, result, sampled.drafted[:4], tokenizer)
    return result


def _check(recipe: Recipe, minutes: float, prompt_count: int, max_tokens: int) -> None:
    if not 0 < minutes < math.inf or prompt_count < 1 or max_tokens < 1:
        raise ConfigError("--minutes, --prompts and --max-tokens must be above 0")
    if recipe.train.seed >= 2**63 - prompt_count:
        raise ConfigError(f"--seed {recipe.train.seed}: that of the last prompt does not fit 64 bits")
    room = recipe.train.seq_len - PROMPT_BYTES - 1
    if max_tokens > room:
        raise ConfigError(f"--max-tokens {max_tokens}: at most {room} fit behind the prompts")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the demo's report needs: pip install 'foretoken[demo]'")


def _train(display: Display, out: Path, recipe: Recipe, minutes: float) -> tuple[TrainResult, list[Record]]:
    display.say(f"Corpus: the Python standard library of this interpreter. Training for {minutes:g} minutes.")
    steps = _steps_in(recipe, minutes)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
    records: list[Record] = []

    def report(record: Record) -> None:
        if record["kind"] == "start":
            write_json(out / RESULT, {})  # so that a demo begun is known as one
        records.append(record)
        display.record(record)

    trained = train(recipe, out, report=report)
    if not trained.finished:
        display.say(f"Stopped at step {trained.step}; the model so far: {trained.checkpoint}")
        raise KeyboardInterrupt
    if trained.seconds < 30 * minutes:
        display.say(
            f"Training took {trained.seconds:.0f} seconds of {minutes:g} minutes: the machine was busier when steps "
            "were timed. Run it again for a better model."
        )
    return trained, records


def _score(display: Display, model: Model, tokenizer: Tokenizer, out: Path) -> tuple[dict[str, Any], list[str]]:
    """How well held-out files are predicted, and their texts."""
    documents = list(evaluation_documents(out))
    random.Random(0).shuffle(documents)  # in order, the first bytes would be those of a few neighbouring files
    display.say("Scoring held-out files ...")
    progress = display.count("held-out bytes scored")
    scored = evaluate(model, documents, tokenizer, max_bytes=EVALUATED_BYTES, progress=progress).to_json()
    return scored, [document.text for document in documents]


def _decoding() -> tuple[str, bool]:
    """Type of the weights for decoding, and whether steps are compiled."""
    # Only compiled steps are exact in bfloat16, which is only faster where the processor multiplies it.
    compiled = library() is not None
    return "bfloat16" if compiled and optim.fast_bfloat16(torch.device("cpu")) else "float32", compiled


def _check_drafts(drafts: int | None, head_kind: str, n_future: int) -> None:
    most = 32 if head_kind == "sequential" and n_future > 1 else n_future - 1
    if drafts is not None and not 0 <= drafts <= most:
        raise ConfigError(f"--drafts {drafts}: must be from 0 to {most} for {n_future} {head_kind} heads")


def _recipe(n_future: int, width: int, layers: int, seed: int, head_kind: str) -> Recipe:
    if width % 64 or width < 64:
        raise ConfigError(f"--width {width}: must be a multiple of 64")
    shape = [f"model.n_future={n_future}", f"model.hidden_size={width}", f"model.num_attention_heads={width // 32}"]
    shape += [f'model.head_kind="{head_kind}"', f"model.num_hidden_layers={layers}"]
    if head_kind == "sequential" and n_future > 1:  # they learn from head 1 too and draft better: docs/head-kinds.md
        shape += ["loss.data=0.5", "loss.soft=0.5"]
    recipe = load_recipe("demo", (*shape, f"train.seed={seed}"))
    recipe.model.resolve(from_config(recipe.tokenizer).vocab_size, recipe.train.seq_len)  # a shape that cannot be
    return recipe


def _clear(out: Path, display: Display) -> None:
    """Remove an earlier demo in `out`; anything else there is left alone, with an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not all((out / name).is_file() for name in (RESULT, "metrics.jsonl")):
        raise ConfigError(f"{out}: exists and is not an earlier demo; choose another folder with --out")
    display.say(f"Replacing the earlier run in {out}")
    shutil.rmtree(out)


def _steps_in(recipe: Recipe, minutes: float) -> int:
    """Steps that fit into `minutes`, from a few that are timed: `train` itself knows steps alone, and stays exact."""
    rates: list[float] = []
    probe = recipe.train.model_copy(update={"steps": 12, "log_every": 1, "eval_windows": recipe.train.batch_size})
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            recipe.model_copy(update={"train": probe}),
            Path(folder) / "probe",
            report=lambda record: rates.append(record.get("tokens_per_second", 0.0)),
        )
    if not result.finished:
        raise KeyboardInterrupt
    rate = sorted(rates)[-3]  # near the best: a probe that something else slowed down would cut training short
    per_step = recipe.train.batch_size * recipe.train.seq_len * 1.06  # validation and checkpoints on the way take 6 %
    return max(recipe.optim.warmup_steps + 1, int(minutes * 60 * rate / per_step))


def _show(display: Display, tokenizer: Tokenizer, greedy: Comparison, sampled: Comparison, n: int) -> None:
    display.legend(n)
    for comparison in (greedy, sampled):
        display.out.print(f"\nTemperature {comparison.temperature:g}")
        for index in (0, 1):
            if index < len(comparison.drafted):
                drafted = comparison.drafted[index]
                display.side_by_side(comparison.plain[index], drafted, token_pieces(tokenizer, drafted))
        f = comparison.figures()
        ms = f["milliseconds_per_token"]
        count = len(comparison.plain)
        equal = sum(a.ids == b.ids for a, b in zip(comparison.plain, comparison.drafted, strict=True))
        display.out.print(
            f"{f['tokens_per_step']:.2f} tokens per step with {f['drafts_per_step']:.1f} drafts, "
            f"a step costs {f['step_cost']:.2f} plain steps: "
            f"{ms['plain']:.3f} -> {ms['self_speculative']:.3f} ms per token, {f['speedup']:.2f}x as fast. "
            f"Outputs equal: {equal} of {count} prompts. Distinct 8-grams: {f['distinct_8grams']:.2f}"
        )
