"""Heads added to a frozen model beside heads trained with it from the start, at the same total time of training.

    python -m foretoken.lab.retrofit --data python_code.jsonl.gz --out runs/retrofit --minutes 3 2 --seeds 0 1 2

1. base: a next-token model, for the first number of minutes.
2. data, soft, own: three heads on that model, frozen, for the second number: from the data's tokens, from head 1's
   distribution, and from head 1's distribution and the chance of acceptance on text that the model wrote itself.
3. pretrained: a model with four heads, for the sum of both.
Minutes are turned into steps by some timed ones of each arm at the beginning, in rounds: leave the machine alone until
then. Writing its own text takes the model minutes that are not counted. Figures: bits per byte of head 1 on held-out
documents, and tokens per step of three drafts behind held-out prompts, greedy and at temperature 0.8. Finished runs are
kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretoken.bench import SAMPLED_TEMPERATURE, Way, compare, held_out_prompts
from foretoken.bench_decode import machine
from foretoken.checkpoint import load_checkpoint
from foretoken.config import Recipe
from foretoken.display import Display
from foretoken.distil_data import distil_data
from foretoken.evaluate import evaluate, evaluation_documents
from foretoken.files import read_json, write_json
from foretoken.lab.head_kinds import seconds_in_rounds
from foretoken.recipe import load_recipe
from foretoken.train import train

ARMS = {
    "base": ("model.n_future=1",),
    "data": ("loss.data=1", "loss.soft=0"),
    "soft": ("loss.data=0", "loss.soft=1"),
    "own": ("loss.data=0", "loss.soft=1", "loss.acceptance=0.5"),
    "pretrained": ("model.n_future=4",),
}
ADDED = ("data", "soft", "own")
DRAFTS, PROMPTS, MAX_TOKENS, SCORED_BYTES = 3, 16, 200, 100_000
PROBE, ROUNDS, TIMED, SAMPLES_TIMED = "probe.json", 5, 12, 48
RESPONSE = 240  # tokens of the own samples, which with their prompt fit the demo's windows


class Experiment:
    """One seed's runs in a folder."""

    def __init__(self, out: Path, data: str, split_field: str | None, minutes: Sequence[float], seed: int) -> None:
        self.out, self.data, self.split_field, self.minutes, self.seed = out, data, split_field, minutes, seed

    def folder(self, arm: str) -> Path:
        """Of a run."""
        return self.out / f"{arm}-seed{self.seed}"

    @property
    def samples(self) -> Path:
        """The text that the base model wrote itself."""
        return self.out / f"own-seed{self.seed}.jsonl"

    def recipe(self, arm: str, steps: int) -> Recipe:
        """The demo's, but for what an arm changes; nothing is evaluated or saved on the way."""
        sets = [*ARMS[arm], f"train.seed={self.seed}", f"train.steps={steps}", f"train.save_every={steps + 1}"]
        if arm == "own":
            sets += [f'data.source=["{self.samples}"]', "data.prompt_field=prompt", "data.response_field=response"]
        else:
            sets += [f'data.source=["{self.data}"]']
            sets += [f"data.split_field={self.split_field}"] if self.split_field else []
        if arm not in ADDED:
            return load_recipe("demo", (*sets, "train.eval_every=0"))
        like_the_demo = ("optim.name=muon", "optim.lr=2e-2", "optim.muon_lr=0.05", "optim.final_lr_ratio=0.02")
        start = f"model.start_from={self.folder('base')}"
        return load_recipe("retrofit", (*sets, start, *like_the_demo, "train.batch_size=3", "train.seq_len=384"))

    def steps(self, arm: str) -> int:
        """As many as an arm's minutes hold."""
        first, second = self.minutes
        minutes = {"base": first, "pretrained": first + second}.get(arm, second)
        return max(2, round(60 * minutes / float(read_json(self.out / PROBE)["seconds_per_step"][arm])))

    def write_samples(self, records: int, display: Display) -> None:
        """Let the base model write as many as are not there yet."""
        model, tokenizer = load_checkpoint(self.folder("base"), "bfloat16")
        texts = [document.text for document in evaluation_documents(self.folder("base"), split="train")]
        distil_data(
            model, tokenizer, texts, self.samples, records=records, max_tokens=RESPONSE, temperature=1.0,
            seed=1000 * self.seed, batch_size=16, display=display,
        )  # fmt: skip

    def stand_in_samples(self) -> None:
        """Text in their place, for timing: a model that has not learned writes little that is any."""
        texts = [document.text for document in evaluation_documents(self.folder("base"), split="train")]
        pieces = iter(held_out_prompts(texts, 4 * SAMPLES_TIMED))
        records = ({"prompt": prompt, "response": "".join(rest)} for prompt, *rest in zip(*[pieces] * 4, strict=True))
        self.samples.write_text("".join(json.dumps(record) + "\n" for record in records))

    def run(self, arm: str, records: int, display: Display) -> None:
        """Train an arm, if it is not there yet."""
        folder = self.folder(arm)
        if (folder / "config.json").exists():
            return
        if arm == "own":
            self.write_samples(records, display)
        steps = self.steps(arm)
        display.say(f"{folder.name}: {steps} steps")
        if not train(self.recipe(arm, steps), folder, resume=folder.exists(), report=display.record).finished:
            raise KeyboardInterrupt

    def measure(self, arm: str, display: Display) -> dict[str, Any]:
        """Figures of a run, kept in its folder."""
        path = self.folder(arm) / "measured.json"
        if path.exists():
            return read_json(path)
        model, tokenizer = load_checkpoint(self.folder(arm), "float32")
        documents = list(evaluation_documents(self.folder("base")))
        scored = evaluate(model, documents, tokenizer, max_bytes=SCORED_BYTES)
        result: dict[str, Any] = {"bits_per_byte": scored.to_json()["heads"][0]["bits_per_byte"]}
        if arm != "base":
            result["along_text"] = scored.predicted_tokens_per_step
            prompts = held_out_prompts([document.text for document in documents], PROMPTS)
            way = Way(DRAFTS)
            for name, temperature in (("greedy", 0.0), ("sampled", SAMPLED_TEMPERATURE)):
                found = compare(model, tokenizer, prompts, temperature, MAX_TOKENS, 0, display, [way])[way].figures()
                result[name] = {key: found[key] for key in ("tokens_per_step", "accepted_by_position", "outputs_equal")}
        write_json(path, result)
        return result


def probe(experiment: Experiment, display: Display) -> None:
    """Time a few steps of every arm, in rounds, so that all meet the same machine, and keep the lower quartile: what
    disturbs a step makes it longer."""
    path = experiment.out / PROBE
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        trial = Experiment(Path(folder), experiment.data, experiment.split_field, experiment.minutes, experiment.seed)
        train(trial.recipe("base", 2), trial.folder("base"))
        trial.stand_in_samples()
        seconds = seconds_in_rounds({arm: trial.recipe(arm, TIMED) for arm in ARMS}, ROUNDS, display)
    experiment.out.mkdir(parents=True, exist_ok=True)
    kept = {arm: statistics.quantiles(values)[0] for arm, values in seconds.items()}
    write_json(path, {"seconds_per_step": kept, "all": seconds, "machine": machine()})


def report(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the seeds with the lowest and the highest, by arm."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}

    arms: dict[str, Any] = {}
    for arm, runs in found.items():
        arms[arm] = {"bits_per_byte": spread([run["bits_per_byte"] for run in runs])}
        if arm != "base":
            arms[arm]["along_text"] = spread([run["along_text"] for run in runs])
            for name in ("greedy", "sampled"):
                arms[arm][name] = spread([run[name]["tokens_per_step"] for run in runs])
            arms[arm]["outputs_equal"] = all(
                run[name]["outputs_equal"] for run in runs for name in ("greedy", "sampled")
            )
    return arms


def table(arms: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines: list[tuple[str, ...]] = [
        ("heads", "bits per byte", "tokens per step, greedy", "at T = 0.8", "along text"),
        ("---",) * 5,
    ]
    for arm, values in arms.items():
        cells = [values.get(key) for key in ("bits_per_byte", "greedy", "sampled", "along_text")]
        shown = ["" if c is None else f"{c['mean']:.2f} [{c['min']:.2f} - {c['max']:.2f}]" for c in cells]
        lines.append((arm, *shown))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--split-field")
    parser.add_argument("--out", type=Path, default=Path("runs/retrofit"))
    parser.add_argument("--minutes", type=float, nargs=2, default=[3.0, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with Display() as display:
        probe(Experiment(options.out, options.data, options.split_field, options.minutes, 0), display)
        for seed in options.seeds:
            experiment = Experiment(options.out, options.data, options.split_field, options.minutes, seed)
            for arm in ARMS:
                experiment.run(arm, options.records, display)
                found[arm].append(experiment.measure(arm, display))
        arms = report(found)
        command = ["python -m foretoken.lab.retrofit --data", Path(options.data).name]
        command += ["--split-field", options.split_field] if options.split_field else []
        command += ["--minutes", *(f"{m:g}" for m in options.minutes), "--seeds", *map(str, options.seeds)]
        result = {
            "command": " ".join(command),
            "machine": read_json(options.out / PROBE)["machine"],
            "seeds": options.seeds,
            "steps": {arm: Experiment(options.out, "", None, options.minutes, 0).steps(arm) for arm in ARMS},
            "arms": arms,
        }
        if options.result is not None:
            write_json(options.result, result)
        display.result(table(arms))


if __name__ == "__main__":
    main()
