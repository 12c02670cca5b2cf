"""From nothing to a multi-token model that decodes faster: what `foretoken demo` does, on the public pieces.

1. The Python standard library of the running interpreter is the corpus, split by file.
2. A few steps are timed, so that training takes the minutes asked for; then the shipped recipe `demo` is trained.
3. Held-out files are scored, and continued plainly and self-speculatively, prompt by prompt, in float32.
4. Text, figures and plots are written beside the checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foretoken.checkpoint import load_checkpoint
from foretoken.completion import Generation, Options, generate, token_pieces
from foretoken.config import Recipe
from foretoken.display import Display
from foretoken.errors import ConfigError
from foretoken.evaluate import evaluate, evaluation_documents
from foretoken.metrics import Record
from foretoken.model import Model
from foretoken.recipe import load_recipe
from foretoken.report import other_kind, write_report
from foretoken.tokenizer import Tokenizer
from foretoken.train import TrainResult, train

PROMPT_BYTES = 128
EVALUATED_BYTES = 200_000
SAMPLED_TEMPERATURE = 0.8
RESULT = "demo.json"


def run_demo(
    display: Display,
    out: Path,
    minutes: float,
    n_future: int,
    width: int,
    layers: int,
    *,
    head_kind: str = "parallel",
    drafts: int | None = None,
    prompt_count: int = 24,
    max_tokens: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Train, decode and report into the folder `out`; returns what `foretoken demo --json` prints.

    Raises ConfigError for a shape that cannot be and KeyboardInterrupt when training was stopped (it is saved).
    """
    recipe = _recipe(n_future, width, layers, seed, head_kind)
    drafts = n_future - 1 if drafts is None else drafts
    _check_drafts(head_kind, n_future, drafts)
    if not 0 < minutes < math.inf or prompt_count < 1 or max_tokens < 1:
        raise ConfigError("--minutes, --prompts and --max-tokens must be above 0")
    positions = recipe.train.seq_len
    if PROMPT_BYTES + 1 + max_tokens > positions:
        raise ConfigError(f"--max-tokens {max_tokens}: at most {positions - PROMPT_BYTES - 1} fit behind the prompts")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the demo's report needs: pip install 'foretoken[demo]'")
    _clear(out, display)

    trained, records = _train(display, out, recipe, minutes)
    model, tokenizer = load_checkpoint(out, "float32")
    documents = list(evaluation_documents(out))
    random.Random(0).shuffle(documents)  # in order, the first bytes would be those of a few neighbouring files
    display.say("Scoring held-out files ...")
    progress = display.count("held-out bytes scored")
    scored = evaluate(model, documents, tokenizer, max_bytes=EVALUATED_BYTES, progress=progress).to_json()
    prompts = held_out_prompts([document.text for document in documents], prompt_count)
    greedy, sampled = (
        compare(model, tokenizer, prompts, temperature, max_tokens, seed, display, (drafts,))[drafts]
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
        f"--drafts {drafts} --width {width} --layers {layers} "
        f"--prompts {prompt_count} --max-tokens {max_tokens} --seed {seed}",
        "sampled": {"temperature": SAMPLED_TEMPERATURE, **sampled.figures()},
        "evaluation": scored,
        "max_tokens": max_tokens,
        "n_future": n_future,
        "head_kind": head_kind,
        "drafts": drafts,
        "steps": trained.step,
        "machine": {"cpu": torch.cpu.get_capabilities().get("cpu_name"), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
    }
    (out / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_report(out / "report.html", records, result, sampled.drafted[:4], tokenizer)
    return result


def _train(display: Display, out: Path, recipe: Recipe, minutes: float) -> tuple[TrainResult, list[Record]]:
    display.say(f"Corpus: the Python standard library of this interpreter. Training for {minutes:g} minutes.")
    steps = _steps_in(recipe, minutes)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
    records: list[Record] = []

    def report(record: Record) -> None:
        if record["kind"] == "start":
            (out / RESULT).write_text("{}\n", encoding="utf-8")  # so that a demo begun is known as one
        records.append(record)
        display.record(record)

    trained = train(recipe, out, report=report)
    if not trained.finished:
        display.say(f"Stopped at step {trained.step}; the model so far: {trained.checkpoint}")
        raise KeyboardInterrupt
    return trained, records


@dataclass(frozen=True)
class Comparison:
    """The same prompts decoded plainly and self-speculatively, with the seconds each took."""

    temperature: float
    plain: list[Generation]
    drafted: list[Generation]
    plain_seconds: list[float]
    drafted_seconds: list[float]

    @property
    def outputs_equal(self) -> bool:
        """Whether every prompt gave the same ids both ways."""
        return all(a.ids == b.ids for a, b in zip(self.plain, self.drafted, strict=True))

    def accepted_by_position(self) -> list[float]:
        """For each drafted position, the share of steps whose drafts were accepted up to it."""
        steps = [step for generation in self.drafted for step in generation.steps]
        most = max((len(step.drafted) for step in steps), default=0)
        return [sum(step.accepted > k for step in steps) / len(steps) for k in range(most)]

    def figures(self) -> dict[str, Any]:
        """Tokens per step, step cost, speedup and what they rest on; times are of whole requests, prefill included."""
        steps = sum(len(g.steps) for g in self.drafted)
        plain_steps = sum(len(g.steps) for g in self.plain)
        plain, drafted = sum(self.plain_seconds), sum(self.drafted_seconds)
        ratios = sorted(a / b for a, b in zip(self.plain_seconds, self.drafted_seconds, strict=True))
        return {
            "tokens_per_step": sum(s.committed for g in self.drafted for s in g.steps) / max(1, steps),
            "step_cost": (drafted / max(1, steps)) / (plain / max(1, plain_steps)),
            "speedup": plain / drafted,
            "speedup_range": [ratios[0], statistics.median(ratios), ratios[-1]],
            "milliseconds_per_token": {
                "plain": 1e3 * plain / sum(len(g.ids) for g in self.plain),
                "self_speculative": 1e3 * drafted / sum(len(g.ids) for g in self.drafted),
            },
            "accepted_by_position": self.accepted_by_position(),
            "outputs_equal": self.outputs_equal,
            "distinct_8grams": distinct_ngrams([g.ids for g in self.plain], 8),
        }


def compare(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    temperature: float,
    max_tokens: int,
    seed: int,
    display: Display,
    drafts: Sequence[int],
) -> dict[int, Comparison]:
    """Decode every prompt plainly and with each number of drafts, in turn, so that all meet the same machine."""
    runs: dict[int, tuple[list[Generation], list[float]]] = {k: ([], []) for k in dict.fromkeys((0, *drafts))}
    for k in runs:  # warm up
        generate(model, tokenizer, prompts[0], max_tokens=16, temperature=temperature, drafts=k)
    for index, prompt in enumerate(prompts):
        for k, (generations, seconds) in runs.items():
            began = time.perf_counter()
            options: Options = {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed + index,
                "drafts": k,
                "ignore_eos": True,
            }
            generations.append(generate(model, tokenizer, prompt, **options))
            seconds.append(time.perf_counter() - began)
        last = index + 1 == len(prompts)
        display.progress(f"Decoding held-out prompts at temperature {temperature:g}: {index + 1}/{len(prompts)}", last)
    return {k: Comparison(temperature, runs[0][0], runs[k][0], runs[0][1], runs[k][1]) for k in drafts}


def held_out_prompts(texts: Sequence[str], count: int) -> list[str]:
    """`count` beginnings of lines with what precedes them, spread evenly over the held-out texts."""
    texts = [text for text in texts if len(text) > 4 * PROMPT_BYTES]
    prompts = []
    for index in range(count):
        text = texts[index % len(texts)]
        rounds = -(-count // len(texts))
        at = len(text) * (index // len(texts) + 1) // (rounds + 1)
        end = text.find("\n", max(at, PROMPT_BYTES)) + 1 or len(text)
        raw = text[:end].encode()[-PROMPT_BYTES:]
        prompts.append(raw.decode("utf-8", "ignore"))
    return prompts


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of the sequences' n-grams that are different ones: near 1 for varied text, small for loops."""
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _check_drafts(head_kind: str, n_future: int, drafts: int) -> None:
    most = 32 if head_kind == "sequential" and n_future > 1 else n_future - 1
    if not 0 <= drafts <= most:
        raise ConfigError(f"--drafts {drafts}: must be from 0 to {most} for {n_future} {head_kind} heads")


def _recipe(n_future: int, width: int, layers: int, seed: int, head_kind: str) -> Recipe:
    if width % 64 or width < 64:
        raise ConfigError(f"--width {width}: must be a multiple of 64")
    shape = [f"model.n_future={n_future}", f"model.hidden_size={width}", f"model.num_attention_heads={width // 32}"]
    shape += [f'model.head_kind="{head_kind}"', f"model.num_hidden_layers={layers}"]
    return load_recipe("demo", (*shape, f"train.seed={seed}"))


def _clear(out: Path, display: Display) -> None:
    """Remove an earlier demo in `out`; anything else there is left alone, with an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RESULT).is_file():
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
            f"{f['tokens_per_step']:.2f} tokens per step, a step costs {f['step_cost']:.2f} plain steps: "
            f"{ms['plain']:.2f} -> {ms['self_speculative']:.2f} ms per token, {f['speedup']:.2f}x as fast. "
            f"Outputs equal: {equal} of {count} prompts. Distinct 8-grams: {f['distinct_8grams']:.2f}"
        )
