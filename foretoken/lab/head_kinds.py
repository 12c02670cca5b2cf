"""Parallel heads, sequential ones (taught by head 1 too, or not) and none: what each gives and costs in the same time.

    python -m foretoken.lab.head_kinds all --out runs/head-kinds --minutes 3 10 --seeds 0 1 2

1. probe: a few steps of each arm, one after the other in rounds, so that all meet the same machine. Their median gives
   the steps that fit into the minutes; an arm whose steps cost more takes fewer.
2. train: the shipped recipe `demo`, an arm, a seed and a number of steps at a time. Finished runs are kept.
3. report, first part: held-out files scored by every head; held-out prompts continued plainly and in each of WAYS, with
   compiled steps and with steps in PyTorch.
4. report, second part: writes one JSON of all figures and prints the table in the docs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foretoken.bench import SAMPLED_TEMPERATURE, Way, compare, held_out_prompts
from foretoken.checkpoint import load_checkpoint
from foretoken.config import Recipe
from foretoken.display import Display
from foretoken.evaluate import evaluate, evaluation_documents
from foretoken.files import read_json, write_json
from foretoken.metrics import Record
from foretoken.model import Model, Stepper
from foretoken.recipe import load_recipe
from foretoken.train import train

ARMS = {
    "one": ("model.n_future=1",),
    "parallel": ("model.n_future=4", "model.head_kind=parallel"),
    "sequential": ("model.n_future=4", "model.head_kind=sequential"),
    # Its further depths learn from head 1 too.
    "distilled": ("model.n_future=4", "model.head_kind=sequential", "loss.data=0.5", "loss.soft=0.5"),
}
_SEQUENTIAL = (*(Way(k) for k in (3, 4, 5)), Way(4, nodes=8), *(Way(k, "rejection") for k in (3, 4)), Way(None))
# How drafts are made and accepted; None is as many as pay. Greedy decoding knows no difference between the rules.
WAYS = {
    "one": (),
    "parallel": (Way(3), Way(3, "rejection"), Way(None)),
    "sequential": _SEQUENTIAL,
    "distilled": _SEQUENTIAL,
}
# How steps run: in C++ with weights in bfloat16, and in PyTorch in float32, launched operation by operation.
MODES = {"compiled": "bfloat16", "pytorch": "float32"}
PROBE_ROUNDS, PROBE_STEPS = 4, 15
SCORED_BYTES, PROMPTS, MAX_TOKENS = 100_000, 12, 200
RESULT = "head_kinds.json"


def arm_recipe(arm: str, seed: int, steps: int) -> Recipe:
    """The demo's recipe for an arm; nothing is evaluated or saved on the way."""
    quiet = ("train.eval_every=0", f"train.save_every={steps + 1}")
    return load_recipe("demo", (*ARMS[arm], f"train.seed={seed}", f"train.steps={steps}", *quiet))


def probe(out: Path, arms: Sequence[str], display: Display) -> dict[str, float]:
    """Median seconds of a training step of each arm, measured once and kept in `out`/probe.json."""
    path = out / "probe.json"
    if path.exists():
        return read_json(path)["seconds_per_step"]  # type: ignore[no-any-return]
    seconds = seconds_in_rounds({arm: arm_recipe(arm, 0, PROBE_STEPS) for arm in arms}, PROBE_ROUNDS, display)
    out.mkdir(parents=True, exist_ok=True)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    write_json(path, {"seconds_per_step": medians, "all": seconds, "machine": machine()})
    return medians


def seconds_in_rounds(recipes: Mapping[str, Recipe], rounds: int, display: Display) -> dict[str, list[float]]:
    """Seconds of training steps of every arm, one after the other in rounds, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {arm: [] for arm in recipes}
    for number in range(rounds):
        for arm, recipe in recipes.items():
            display.say(f"Timing steps: round {number + 1} of {rounds}, {arm}")
            seconds[arm] += step_seconds(recipe)[3:]  # the first ones warm up
    return seconds


def step_seconds(recipe: Recipe) -> list[float]:
    """Of each step of a run that is thrown away."""
    records: list[Record] = []
    timed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_every": 1, "eval_windows": 3})})
    with tempfile.TemporaryDirectory() as folder:
        train(timed, Path(folder) / "probe", report=records.append)
    per_step = recipe.train.batch_size * recipe.train.seq_len
    return [per_step / record["tokens_per_second"] for record in records if record["kind"] == "train"]


def machine() -> dict[str, Any]:
    """Where figures were measured."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name"),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def runs(out: Path, arms: Sequence[str], minutes: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Every (arm, minutes, seed, folder), short runs first."""
    for length in minutes:
        for seed in seeds:
            for arm in arms:
                yield arm, length, seed, out / f"{arm}-{length:g}min-seed{seed}"


def train_all(out: Path, arms: Sequence[str], minutes: Sequence[float], seeds: Sequence[int], display: Display) -> None:
    """Train what is not trained yet."""
    seconds = probe(out, arms, display)
    for arm, length, seed, folder in runs(out, arms, minutes, seeds):
        if (folder / "config.json").exists():
            continue
        steps = round(length * 60 / seconds[arm])
        display.say(f"{folder.name}: {steps} steps")
        if not train(arm_recipe(arm, seed, steps), folder, resume=folder.exists(), report=display.record).finished:
            raise KeyboardInterrupt


def measure(folder: Path, arm: str, display: Display) -> dict[str, Any]:
    """Figures of one trained run, kept in its folder/measured.json."""
    path = folder / "measured.json"
    if path.exists():
        return read_json(path)
    display.say(f"Measuring {folder.name}")
    model, tokenizer = load_checkpoint(folder, "float32")
    documents = list(evaluation_documents(folder))
    random.Random(0).shuffle(documents)
    scored = evaluate(model, documents, tokenizer, max_bytes=SCORED_BYTES).to_json()
    along = {model.config.n_future - 1: scored["predicted_tokens_per_step"]}
    for drafts in {way.drafts for way in WAYS[arm] if way.drafts is not None}:
        if drafts not in along:
            deeper = evaluate(unrolled(model, drafts + 1), documents, tokenizer, max_bytes=SCORED_BYTES)
            along[drafts] = deeper.predicted_tokens_per_step
    prompts = held_out_prompts([document.text for document in documents], PROMPTS)
    decoded = {mode: _decode(folder, mode, arm, prompts, display) for mode in MODES} if WAYS[arm] else {}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "bits_per_byte": scored["heads"][0]["bits_per_byte"],
        "heads": scored["heads"],
        "along_text": {str(k): value for k, value in along.items()},
        "steps": max(record["step"] for record in steps),
        "decoded": decoded,
    }
    write_json(path, result)
    return result


def _decode(folder: Path, mode: str, arm: str, prompts: Sequence[str], display: Display) -> dict[str, Any]:
    model, tokenizer = load_checkpoint(folder, MODES[mode])
    model.use_stepper(Stepper(model, compiled=mode == "compiled"))
    decoded = {}
    for name, temperature in (("greedy", 0.0), ("sampled", SAMPLED_TEMPERATURE)):
        ways = [way for way in WAYS[arm] if temperature > 0 or way.accept == "keyed"]
        found = compare(model, tokenizer, prompts, temperature, MAX_TOKENS, 0, display, ways)
        decoded[name] = {way.name: comparison.figures() for way, comparison in found.items()}
    return decoded


def unrolled(model: Model, n: int) -> Model:
    """The same weights with the sequential head unrolled to n - 1 depths."""
    deeper = Model(model.config.model_copy(update={"n_future": n}))
    deeper.load_state_dict(model.state_dict())
    return deeper.eval()


def report(out: Path, minutes: Sequence[float], seeds: Sequence[int], display: Display) -> dict[str, Any]:
    """All figures, as RESULT beside this file holds them; runs that are not there are left out."""
    budgets: dict[str, Any] = {}
    for arm, length, seed, folder in runs(out, tuple(ARMS), minutes, seeds):
        if (folder / "config.json").exists():
            found = budgets.setdefault(f"{length:g}", {}).setdefault(arm, {"seeds": [], "runs": []})
            found["seeds"].append(seed)
            found["runs"].append(measure(folder, arm, display))
    for arms in budgets.values():
        for arm, values in arms.items():
            measured = values.pop("runs")
            values["steps"] = measured[0]["steps"]
            values["bits_per_byte"] = _spread([run["bits_per_byte"] for run in measured])
            values["along_text"] = {
                k: _spread([run["along_text"][k] for run in measured]) for k in measured[0]["along_text"]
            }
            for mode in MODES if WAYS[arm] else ():
                values[mode] = _merged([run["decoded"][mode] for run in measured])
    probed = read_json(out / "probe.json")
    return {
        "command": f"python -m foretoken.lab.head_kinds all --minutes {' '.join(f'{m:g}' for m in minutes)} "
        f"--seeds {' '.join(map(str, seeds))}",
        "machine": probed["machine"],
        "decoded_on": machine(),
        "seconds_per_step": probed["seconds_per_step"],
        "seeds": list(seeds),
        "temperature": SAMPLED_TEMPERATURE,
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "scored_bytes": SCORED_BYTES,
        "budgets": budgets,
    }


FIGURES = ("tokens_per_step", "drafts_per_step", "step_cost", "speedup", "distinct_8grams")


def _merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One mode's figures over the seeds; also which way was fastest, and at what figures."""
    merged: dict[str, Any] = {}
    for name in ("greedy", "sampled"):
        ways = {way: _decoded([run[name][way] for run in runs]) for way in runs[0][name]}
        best = max(ways, key=lambda way: ways[way]["speedup"]["mean"])
        merged[name] = {**ways, "best": {"way": best, **ways[best]}}
    return merged


def _decoded(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{name: _spread([f[name] for f in figures]) for name in FIGURES},
        "milliseconds_per_token": {
            key: _spread([f["milliseconds_per_token"][key] for f in figures]) for key in ("plain", "self_speculative")
        },
        "outputs_equal": all(f["outputs_equal"] for f in figures),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "values": list(values)}


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown, what was learnt and then how it decodes: means over the seeds, and their range."""
    learnt = [("minutes", "heads", "seeds", "steps", "bits per byte of head 1", "tokens per step along text, by K")]
    columns = (
        "minutes", "heads", "steps run", "drafts", "tokens per step, greedy (distinct 8-grams)", "T = 0.8",
        "step cost, T = 0.8", "ms per token, T = 0.8: plain, with drafts", "speedup, greedy", "T = 0.8", "equal",
    )  # fmt: skip
    decoded: list[tuple[str, ...]] = [columns]
    for minutes, arms in result["budgets"].items():
        for arm, values in arms.items():
            along = "; ".join(f"{k}: {_shown(value)}" for k, value in values["along_text"].items() if int(k))
            learnt.append(
                (minutes, arm, str(len(values["seeds"])), str(values["steps"]), _shown(values["bits_per_byte"]), along)
            )
            for mode in MODES if WAYS[arm] else ():
                names = [way.name for way in WAYS[arm] if way.name in values[mode]["sampled"]]
                decoded += [_row(minutes, arm, mode, name, values[mode]) for name in names]
    return "\n\n".join(
        "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))
        for rows in (learnt, decoded)
    )


def _row(minutes: str, arm: str, mode: str, way: str, values: dict[str, Any]) -> tuple[str, ...]:
    greedy, sampled = values["greedy"].get(way), values["sampled"][way]
    ms = sampled["milliseconds_per_token"]
    equal = sampled["outputs_equal"] and (greedy is None or greedy["outputs_equal"])
    return (
        minutes,
        arm,
        mode,
        way,
        f"{_shown(greedy['tokens_per_step'])} ({greedy['distinct_8grams']['mean']:.2f})" if greedy else "",
        _shown(sampled["tokens_per_step"]),
        _shown(sampled["step_cost"]),
        f"{ms['plain']['mean']:.3f}, {ms['self_speculative']['mean']:.3f}",
        _shown(greedy["speedup"]) if greedy else "",
        _shown(sampled["speedup"]),
        "in law" if "rejection" in way else "yes" if equal else "NO",
    )


def _shown(spread: dict[str, Any]) -> str:
    low, high = min(spread["values"]), max(spread["values"])
    return f"{spread['mean']:.2f} [{low:.2f} - {high:.2f}]"


def main() -> None:
    """Entry point of `python -m foretoken.lab.head_kinds`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("probe", "train", "report", "all"))
    parser.add_argument("--out", type=Path, default=Path("runs") / "head-kinds")
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="arms to train")
    options = parser.parse_args()
    with Display() as display:
        if options.stage != "report":
            probe(options.out, tuple(ARMS), display)
        if options.stage in ("train", "all"):
            train_all(options.out, options.arms, options.minutes, options.seeds, display)
        if options.stage in ("report", "all"):
            result = report(options.out, options.minutes, options.seeds, display)
            write_json(options.out / RESULT, result)
            print(tables(result))


if __name__ == "__main__":
    main()
