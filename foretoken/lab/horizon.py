"""How many heads: n = 1, 2, 4, 8 and, of bytes, 16 at equal total blocks, after the same minutes and the same steps.

Further heads take their blocks from the trunk, as in the paper. Bits per byte of head 1 is the price, tokens per step
the gain, and the cost of a step what is paid for it in time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretoken.bench import Way
from foretoken.config import DataConfig, Recipe
from foretoken.files import read_json, write_json
from foretoken.lab.experiment import Experiment, Figures, Run, Settings
from foretoken.lab.intervals import Table, difference, mean
from foretoken.lab.text import (
    LARGE,
    SMALL,
    decoded,
    recipe_of,
    scored,
    steps_in,
    tokens_of,
    train_bpe_once,
    train_or_resume,
)

STEPS, SAME, BPE = "steps.json", "-same-steps", "bpe-"


def n_of(arm: str) -> int:
    """n of an arm's name, such as n4, n4-same-steps or bpe-n4."""
    return int(arm.removeprefix(BPE).partition("-")[0].removeprefix("n"))


def base_of(arm: str) -> str:
    """The arm with one head and the same tokens."""
    return f"{BPE if arm.startswith(BPE) else ''}n1"


def recipe_for(arm: str, settings: Settings, out: Path, seed: int, steps: int, device: str) -> Recipe:
    """The recipe of an arm."""
    changes = [f"model.n_future={n_of(arm)}"]
    if arm.startswith(BPE):
        changes += tokens_of(out / "bpe")
    return recipe_of(settings, changes, seed, steps, device)


def prepare(settings: Settings, out: Path, device: str) -> None:
    """A tokenizer, and how many steps of each arm fit into the minutes."""
    if (out / STEPS).exists():
        return
    alone = [arm for arm in settings["arms"] if not arm.endswith(SAME)]
    if any(arm.startswith(BPE) for arm in alone):
        data = DataConfig(source=tuple(settings["data"]), split_field=settings.get("split_field"))
        train_bpe_once(out / "bpe", data, settings["vocab_size"])
    recipes = {arm: recipe_for(arm, settings, out, 0, 10, device) for arm in alone}
    steps = steps_in(settings["minutes"], recipes, out / "seconds.json")
    steps |= {arm: steps[base_of(arm)] for arm in settings["arms"] if arm.endswith(SAME)}
    write_json(out / STEPS, steps)


def run(run: Run) -> Figures:
    """Train, and score held-out text."""
    s, n, out = run.settings, n_of(run.arm), run.folder.parent
    steps = read_json(out / STEPS)[run.arm]
    recipe = recipe_for(run.arm, s, out, run.seed, steps, run.device)
    train_or_resume(recipe, run.folder / "model", run.report)
    seconds = read_json(out / "seconds.json")[run.arm.removesuffix(SAME)]
    return {"n": n, "steps": steps, "seconds_per_step": seconds, **scored(run.folder / "model", s["scored_bytes"])}


def measure(run: Run) -> Figures:
    """Decode with all heads, and with as many drafts as pay."""
    n = n_of(run.arm)
    if n == 1 or run.arm.endswith(SAME):
        return {}
    return {"decoded": decoded(run.folder / "model", (n - 1, None), run.settings, run.device)}


def summarise(found: Figures) -> Figures:
    """What each n costs head 1 and gains in decoding."""
    arms: dict[str, Any] = {}
    for arm, runs in found["runs"].items():
        bits, n = [r["bits_per_byte"] for r in runs], n_of(arm)
        base = [r["bits_per_byte"] for r in found["runs"][base_of(arm)]]
        values: dict[str, Any] = {
            "bits_per_byte": mean(bits), "cost": difference(bits, base),
            "along_text": mean([r["along_text"] for r in runs]),
            "steps": runs[0]["steps"], "ms_per_step": 1e3 * runs[0]["seconds_per_step"],
        }  # fmt: skip
        if "decoded" in runs[0]:
            for name in ("greedy", "sampled"):
                way = [r["decoded"][name][Way(n - 1).name] for r in runs]
                as_pays = [r["decoded"][name][Way(None).name] for r in runs]
                values[name] = {
                    **{key: mean([w[key] for w in way]) for key in ("tokens_per_step", "step_cost", "speedup")},
                    "paced_speedup": mean([w["speedup"] for w in as_pays]),
                    "outputs_equal": all(w["outputs_equal"] for w in (*way, *as_pays)),
                }
        arms[arm] = values
    said = [_verdict({arm: v for arm, v in arms.items() if base_of(arm) == base}, base) for base in ("n1", f"{BPE}n1")]
    return {"arms": arms, "verdict": " ".join(said).strip()}


def _verdict(arms: dict[str, Any], base: str) -> str:
    """What the arms of one kind of tokens come to, or nothing where there are none."""
    timed = {arm: v for arm, v in arms.items() if "sampled" in v}
    if not timed:
        return ""
    fastest = max(timed, key=lambda arm: timed[arm]["sampled"]["speedup"].value)
    paced = max(timed, key=lambda arm: timed[arm]["sampled"]["paced_speedup"].value)
    costs = [f"{arm} {v['cost'].shown()}" for arm, v in arms.items() if arm != base]
    worse = [arm for arm, v in arms.items() if v["cost"].low > 0]
    best = timed[paced]["sampled"]["paced_speedup"]
    return (
        f"Head 1 is worse than that of {base}, in bits per byte, for {', '.join(worse) or 'none'} "
        f"({'; '.join(costs)}). At T = 0.8 decoding is fastest with {fastest} where all heads draft "
        f"({timed[fastest]['sampled']['speedup'].shown()} times plain decoding), and with {paced} where as many drafts "
        f"are made as pay ({best.shown()})."
    )


def tables(found: Figures) -> list[Table]:
    """What was learnt, and how it decodes."""
    learnt, decodes = [], []
    for arm, runs in found["runs"].items():
        v, n = found["summary"]["arms"][arm], n_of(arm)
        cost = "" if arm == base_of(arm) else v["cost"].shown()
        along = v["along_text"].shown() if n > 1 else ""
        learnt.append((arm, str(v["steps"]), f"{v['ms_per_step']:.0f}", v["bits_per_byte"].shown(), cost, along))
        for name in ("greedy", "sampled") if "sampled" in v else ():
            ways = [Way(n - 1).name, Way(None).name]
            for way in ways:
                figures = [r["decoded"][name][way] for r in runs]
                shown = [mean([f[key] for f in figures]).shown() for key in ("tokens_per_step", "step_cost", "speedup")]
                grams = mean([f["distinct_8grams"] for f in figures]).value
                equal = "yes" if all(f["outputs_equal"] for f in figures) else "NO"
                decodes.append((arm, name, way, *shown, f"{grams:.2f}", equal))
    return [
        Table(("arm", "steps", "ms a step", "bits per byte of head 1", "more than n = 1", "tokens per step along text"),
              learnt),
        Table(("arm", "text", "drafts", "tokens per step", "step cost", "speedup", "distinct 8-grams", "outputs equal"),
              decodes),
    ]  # fmt: skip


def draw(found: Figures, axes: Any) -> None:
    """The cost in bits per byte against tokens per step at T = 0.8."""
    for arm, runs in found["runs"].items():
        if "decoded" in runs[0]:
            x = [r["decoded"]["sampled"][Way(n_of(arm) - 1).name]["tokens_per_step"] for r in runs]
        elif arm == base_of(arm):
            x = [1.0] * len(runs)
        else:
            continue
        axes.plot(x, [r["bits_per_byte"] for r in runs], "o", label=arm)
    axes.set(xlabel="tokens per step at T = 0.8, all heads drafting", ylabel="bits per byte of head 1")
    axes.legend()


def _size(ns: tuple[int, ...], bpe: tuple[int, ...], seeds: int, **more: Any) -> Settings:
    """`ns` of bytes, and `bpe` of BPE tokens."""
    arms = [
        f"{tokens}n{n}{suffix}"
        for tokens, numbers in (("", ns), (BPE, bpe))
        for suffix in ("", SAME)
        for n in numbers
        if n > 1 or not suffix
    ]
    return {"arms": arms, "seeds": seeds, "data": ["stdlib"], "decode_dtype": "float32", **more}


EXPERIMENT = Experiment(
    name="horizon",
    rule="an n is worse where its difference to n1 in bits per byte of head 1, seed by seed, has an interval above 0.",
    sizes={
        "smoke": _size(
            (1, 2), (1, 2), 1, minutes=0.001, vocab_size=400, scored_bytes=600, prompts=2, max_tokens=8,
            recipe=[*SMALL, "model.total_blocks=3"],
        ),
        "cpu": _size(
            (1, 2, 4, 8, 16), (1, 2, 4, 8), 3, minutes=3.0, vocab_size=2048, scored_bytes=100_000, prompts=12,
            max_tokens=200, recipe=["model.hidden_size=96", "model.num_attention_heads=3", "model.total_blocks=18"],
        ),
        "gpu": _size(
            (1, 2, 4, 8, 16), (1, 2, 4, 8), 1, minutes=0.7, vocab_size=8192, scored_bytes=400_000, prompts=12,
            max_tokens=200, decode_dtype="bfloat16", recipe=[*LARGE, "model.total_blocks=24"],
        ),
    },
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Student's t intervals at 95 % over the seeds; differences are paired by seed.",
    notes="""\
The shipped recipe `demo` with parallel heads at a fixed number of blocks: n - 1 of them are further heads. Tokens are
bytes or, in the arms that begin with `bpe`, those of a tokenizer trained on the training part. Arms without a suffix
take the steps that fit into the same minutes by steps timed alone; those with `-same-steps` take the number of n = 1.
Tokens per step and step cost are those of held-out prompts, one at a time, each continued plainly and with drafts in
turn. Along text: a draft counts where it is head 1's own choice given the true text.""",
    prepare=prepare,
    measure=measure,
)  # fmt: skip
