"""How many drafts are accepted, by temperature: with the target's noise, the heads' likeliest tokens, and rejection.

The rules are those of `acceptance`, which takes checkpoints that are there; here models are trained for it. That keyed
and argmax drafts leave the text as it is, is checked token for token; that rejection leaves its law, by the mean
log-probability that the model itself gives the tokens.
"""

from __future__ import annotations

from typing import Any

from foretoken.bench import distinct_ngrams
from foretoken.checkpoint import load_checkpoint
from foretoken.completion import Generation, generate
from foretoken.lab.acceptance import RULES, likeliest_drafts
from foretoken.lab.experiment import Experiment, Figures, Run, Settings
from foretoken.lab.intervals import Table, difference, mean
from foretoken.lab.text import LARGE, SMALL, prompts_of, recipe_of, train_or_resume
from foretoken.model import Model, Stepper
from foretoken.tokenizer import Tokenizer


def run(run: Run) -> Figures:
    """Train, then decode held-out prompts by each rule at each temperature."""
    s = run.settings
    recipe = recipe_of(s, ("model.n_future=4", f"model.head_kind={run.arm}"), run.seed, s["steps"], run.device)
    train_or_resume(recipe, run.folder / "model", run.report)
    model, tokenizer = load_checkpoint(run.folder / "model", "float32", run.device)
    model.use_stepper(Stepper(model, compiled=False))  # argmax drafts are not compiled: none are, then
    prompts = prompts_of(run.folder / "model", s["prompts"])
    rows = {}
    for temperature in s["temperatures"]:
        run.report(f"{run.folder.name}: temperature {temperature:g}")
        rows[f"{temperature:g}"] = at_temperature(model, tokenizer, prompts, temperature, s["max_tokens"], run.seed)
    return {"rows": rows}


def at_temperature(
    model: Model, tokenizer: Tokenizer, prompts: list[str], temperature: float, max_tokens: int, seed: int
) -> Figures:
    """Tokens per step by rule; equality of keyed and argmax with plain decoding; what the model gives the text."""

    def decode(rule: str) -> list[Generation]:
        return generate(
            model, tokenizer, prompts, max_tokens=max_tokens, temperature=temperature, ignore_eos=True,
            seed=1000 * seed,
            drafts=0 if rule == "plain" else model.config.n_future - 1,
            accept="rejection" if rule == "rejection" else "keyed",
        )  # fmt: skip

    found = {rule: decode(rule) for rule in ("plain", "keyed", "rejection")}
    with likeliest_drafts():
        found["argmax"] = decode("argmax")
    plain = [generation.ids for generation in found["plain"]]
    logprobs = {rule: [sum(g.logprobs) / len(g.logprobs) for g in some] for rule, some in found.items()}
    return {
        "tokens_per_step": {rule: _tokens_per_step(found[rule]) for rule in RULES},
        "outputs_equal": all([g.ids for g in found[rule]] == plain for rule in ("keyed", "argmax")),
        "logprobs": {rule: logprobs[rule] for rule in ("plain", "rejection")},
        "distinct_8grams": {rule: distinct_ngrams([g.ids for g in found[rule]], 8) for rule in ("plain", "rejection")},
    }


def _tokens_per_step(found: list[Generation]) -> float:
    steps = [step for generation in found for step in generation.steps]
    return sum(step.committed for step in steps) / max(1, len(steps))


def summarise(found: Figures) -> Figures:
    """Which rule accepts most at which temperature; whether texts are equal, and equal in law."""
    equal = all(row["outputs_equal"] for runs in found["runs"].values() for r in runs for row in r["rows"].values())
    best: dict[str, dict[str, str]] = {}
    apart = []
    for arm, runs in found["runs"].items():
        for temperature in runs[0]["rows"]:
            rows = [r["rows"][temperature] for r in runs]
            means = {rule: mean([row["tokens_per_step"][rule] for row in rows]).value for rule in RULES}
            best.setdefault(arm, {})[temperature] = max(means, key=lambda rule: means[rule])
            if float(temperature) > 0 and _law(rows).low * _law(rows).high > 0:
                apart.append(f"{arm} at {temperature}")
    said = "; ".join(f"{arm}: {_by_rule(by)}" for arm, by in best.items())
    tests = sum(float(t) > 0 for by in best.values() for t in by)
    return {
        "equal": equal,
        "apart": apart,
        "verdict": f"Most tokens per step: {said}. Keyed and argmax drafts gave plain decoding's text "
        f"{'everywhere' if equal else 'NOT everywhere'}. The text of rejection is told from plain text by its mean "
        f"log-probability in {len(apart)} of {tests} cases{' (' + ', '.join(apart) + ')' if apart else ''}; "
        f"{0.05 * tests:.1f} would be by chance.",
    }


def _by_rule(best: dict[str, str]) -> str:
    """The rules and the temperatures above 0 at which each is best."""
    found = {rule: [t for t, of in best.items() if of == rule and float(t) > 0] for rule in RULES}
    return ", ".join(f"{rule} at T = {', '.join(temperatures)}" for rule, temperatures in found.items() if temperatures)


def _law(rows: list[Figures]) -> Any:
    """Mean log-probability of rejection's texts less that of plain texts, prompt by prompt, over all seeds."""
    rejection = [value for row in rows for value in row["logprobs"]["rejection"]]
    return difference(rejection, [value for row in rows for value in row["logprobs"]["plain"]])


def tables(found: Figures) -> list[Table]:
    """By kind of heads and temperature."""
    lines = []
    for arm, runs in found["runs"].items():
        for temperature in runs[0]["rows"]:
            rows = [r["rows"][temperature] for r in runs]
            shown = [mean([row["tokens_per_step"][rule] for row in rows]).shown() for rule in RULES]
            grams = mean([row["distinct_8grams"]["plain"] for row in rows]).value
            equal = "yes" if all(row["outputs_equal"] for row in rows) else "NO"
            lines.append((arm, temperature, *shown, f"{grams:.2f}", equal, _law(rows).shown(3)))
    head = ("heads", "T", *RULES, "distinct 8-grams", "keyed, argmax = plain", "log-probability: rejection - plain")
    return [Table(head, lines)]


def draw(found: Figures, axes: Any) -> None:
    """Tokens per step against temperature."""
    for index, (arm, runs) in enumerate(found["runs"].items()):
        for rule, style in zip(RULES, ("-", "--", ":"), strict=True):
            points = [
                (float(t), mean([r["rows"][t]["tokens_per_step"][rule] for r in runs]).value) for t in runs[0]["rows"]
            ]
            axes.plot(*zip(*points, strict=True), style, marker=".", color=f"C{index}", label=f"{arm}, {rule}")
    axes.set(xlabel="temperature", ylabel="tokens per step, K = 3")
    axes.legend()


def _size(seeds: int, temperatures: tuple[float, ...], **more: Any) -> Settings:
    fixed = {"arms": ["parallel", "sequential"], "temperatures": list(temperatures), "data": ["stdlib"]}
    return {"seeds": seeds, **fixed, **more}


ALL = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)

EXPERIMENT = Experiment(
    name="sampling",
    rule="the most tokens per step is the highest mean over the seeds; texts are apart in law where the mean "
    "difference of log-probability, prompt by prompt, has an interval that leaves 0 out.",
    sizes={
        "smoke": _size(1, (0.0, 0.8), recipe=[*SMALL, "model.num_hidden_layers=3"], steps=3, prompts=2, max_tokens=8),
        "cpu": _size(3, ALL, recipe=[], steps=750, prompts=16, max_tokens=128),
        "gpu": _size(
            2, ALL, steps=2000, prompts=32, max_tokens=256,
            recipe=LARGE,
        ),
    },
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Student's t intervals at 95 %: over the seeds for tokens per step, over the prompts of all seeds for "
    "log-probabilities.",
    notes="""\
The shipped recipe `demo`, n = 4, K = 3. "keyed" picks a draft with the noise that the target will pick with, "argmax"
takes the head's likeliest token and accepts it where the target picks it, "rejection" draws drafts and accepts with
min(1, p / q). At temperature 0 all three are the same. Steps run in PyTorch, so these are counts and not times.""",
)  # fmt: skip
