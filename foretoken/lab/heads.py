"""Kinds of heads at equal parameters and equal time, on bytes and on BPE: what each gives, and what it costs.

The question of the paper's table S4, asked of drafting too: bits per byte of head 1, and tokens per step, step cost and
speed of decoding. A new kind is a line in KINDS. `head_kinds` is the comparison at equal blocks of the next-token path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretoken.bench import Way
from foretoken.config import DataConfig
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

KINDS: dict[str, tuple[str, ...]] = {
    "one": ("model.n_future=1",),
    **{
        kind: ("model.n_future=4", f"model.head_kind={kind}")
        for kind in ("parallel", "linear", "causal", "anticausal", "joint", "sequential", "deepseek")
    },
    "replicated": ("model.n_future=4", "model.unembedding=per_head"),
    "added": ("model.n_future=4", "model.head_kind=parallel"),  # beside the blocks of `one`, not instead of some
}
STEPS = "steps.json"
# MBPP and HumanEval, pass@1, @10 and @100 in %, of the paper's table S4 (7B, 200B tokens of code).
PAPER = {
    "one": ("30.0/53.8/73.7", "22.8/36.4/62.0"),
    "parallel": ("33.8/55.9/76.9", "24.0/40.1/66.1"),
    "linear": ("33.6/55.0/76.2", "21.9/38.5/63.7"),
    "causal": ("31.9/54.9/74.9", "20.9/38.1/67.3"),
    "anticausal": ("30.8/54.8/75.3", "20.9/38.4/64.5"),
}


def domains(settings: Settings) -> dict[str, str]:
    """Sources by the names their arms have."""
    return {Path(source).name.partition(".")[0].replace("-", "_"): source for source in settings["data"]}


def of_domain(settings: Settings, source: str) -> Settings:
    """The settings with one source; the standard library's files have no field that says their split."""
    return {**settings, "data": [source], "split_field": None if source == "stdlib" else settings.get("split_field")}


def arms(settings: Settings) -> list[str]:
    """Every domain, tokens and kind."""
    return [
        f"{domain}-{tokens}-{kind}"
        for domain in domains(settings)
        for tokens in settings["tokens"]
        for kind in settings["kinds"]
    ]


def recipe_for(arm: str, settings: Settings, out: Path, seed: int, steps: int, device: str) -> Any:
    """The recipe of an arm."""
    domain, tokens, kind = arm.split("-")
    blocks = settings["total_blocks"] + (3 if kind == "added" else 0)
    changes = [*KINDS[kind], f"model.total_blocks={blocks}"]
    if tokens == "bpe":
        changes += tokens_of(out / f"bpe-{domain}")
    return recipe_of(of_domain(settings, domains(settings)[domain]), changes, seed, steps, device)


def prepare(settings: Settings, out: Path, device: str) -> None:
    """A tokenizer for each domain, and how many steps of each arm fit into the minutes."""
    for domain, source in domains(settings).items():
        if "bpe" in settings["tokens"]:
            data = DataConfig(source=(source,), split_field=of_domain(settings, source)["split_field"])
            train_bpe_once(out / f"bpe-{domain}", data, settings["vocab_size"])
    if not (out / STEPS).exists():
        recipes = {arm: recipe_for(arm, settings, out, 0, 10, device) for arm in settings["arms"]}
        write_json(out / STEPS, steps_in(settings["minutes"], recipes, out / "seconds.json"))


def run(run: Run) -> Figures:
    """Train, and score held-out text."""
    out = run.folder.parent
    steps = read_json(out / STEPS)[run.arm]
    recipe = recipe_for(run.arm, run.settings, out, run.seed, steps, run.device)
    train_or_resume(recipe, run.folder / "model", run.report)
    seconds = read_json(out / "seconds.json")[run.arm]
    return {"steps": steps, "seconds_per_step": seconds, **scored(run.folder / "model", run.settings["scored_bytes"])}


def measure(run: Run) -> Figures:
    """Decode with K = n - 1 drafts, and with as many as pay."""
    if run.arm.endswith("-one"):
        return {}
    return {"decoded": decoded(run.folder / "model", (3, None), run.settings, run.device)}


def summarise(found: Figures) -> Figures:
    """Which kind is best at what, by domain and tokens."""
    verdicts = []
    texts = list(dict.fromkeys(arm.rpartition("-")[0] for arm in found["runs"]))
    summary: dict[str, Any] = {}
    for text in texts:
        kinds = {arm.rpartition("-")[2]: runs for arm, runs in found["runs"].items() if arm.startswith(f"{text}-")}
        base = [r["bits_per_byte"] for r in kinds["one"]]
        cost = {kind: difference([r["bits_per_byte"] for r in runs], base) for kind, runs in kinds.items()}
        speed = {
            kind: mean(_figures(runs, "sampled", Way(3), "speedup")) for kind, runs in kinds.items() if kind != "one"
        }
        tokens = {kind: mean(_figures(kinds[kind], "sampled", Way(3), "tokens_per_step")) for kind in speed}
        fastest, most = max(speed, key=lambda k: speed[k].value), max(tokens, key=lambda k: tokens[k].value)
        worse = [kind for kind in speed if cost[kind].low > 0]
        summary[text] = {"cost": cost, "speedup": speed, "tokens_per_step": tokens}
        verdicts.append(
            f"{text}: most tokens per step at T = 0.8 {most} ({tokens[most].shown()}), fastest {fastest} "
            f"({speed[fastest].shown()} times plain decoding); head 1 worse than with one head for "
            f"{', '.join(worse) or 'none'}."
        )
    return {"texts": summary, "verdict": " ".join(verdicts)}


def _figures(runs: list[Figures], name: str, way: Way, key: str) -> list[float]:
    return [r["decoded"][name][way.name][key] for r in runs]


def tables(found: Figures) -> list[Table]:
    """What was learnt, beside the paper's scores; and how it decodes."""
    learnt, decodes = [], []
    for arm, runs in found["runs"].items():
        kind = arm.rpartition("-")[2]
        bits, along = (mean([r[key] for r in runs]).shown() for key in ("bits_per_byte", "along_text"))
        theirs = PAPER.get(kind, ("", ""))
        ms = f"{1e3 * runs[0]['seconds_per_step']:.0f}"
        learnt.append((arm, str(runs[0]["steps"]), ms, bits, "" if kind == "one" else along, *theirs))
        for way in () if kind == "one" else (Way(3), Way(None)):
            greedy = [
                mean(_figures(runs, "greedy", way, key)) for key in ("tokens_per_step", "distinct_8grams", "speedup")
            ]
            keys = ("tokens_per_step", "step_cost", "speedup")
            sampled = [mean(_figures(runs, "sampled", way, key)).shown() for key in keys]
            equal = all(r["decoded"][name][way.name]["outputs_equal"] for r in runs for name in ("greedy", "sampled"))
            tokens = f"{greedy[0].shown()} ({greedy[1].value:.2f})"
            decodes.append((arm, way.name, tokens, greedy[2].shown(), *sampled, "yes" if equal else "NO"))
    return [
        Table(("arm", "steps", "ms a step", "bits per byte of head 1", "tokens per step along text",
               "paper, 7B: MBPP @1/@10/@100", "HumanEval"), learnt),
        Table(("arm", "drafts", "tokens per step, greedy (distinct 8-grams)", "speedup, greedy", "T = 0.8", "step cost",
               "speedup", "outputs equal"), decodes),
    ]  # fmt: skip


def draw(found: Figures, axes: Any) -> None:
    """Speedup at T = 0.8 against bits per byte, a point a run."""
    for index, (arm, runs) in enumerate(found["runs"].items()):
        speed = [1.0] * len(runs) if arm.endswith("-one") else _figures(runs, "sampled", Way(3), "speedup")
        axes.plot([r["bits_per_byte"] for r in runs], speed, "o^sv"[index % 4], label=arm)
    axes.set(xlabel="bits per byte of head 1", ylabel="speedup at T = 0.8, K = 3")
    axes.legend(fontsize=7)


def _size(seeds: int, tokens: tuple[str, ...], **more: Any) -> Settings:
    fixed = {"kinds": list(KINDS), "tokens": list(tokens), "data": ["stdlib"], "compiled": False}
    return {"arms": [], "seeds": seeds, **fixed, **more}


EXPERIMENT = Experiment(
    name="heads",
    rule="a kind is worse than one head where the difference in bits per byte, seed by seed, has an interval above 0; "
    "best is the highest mean.",
    sizes={
        "smoke": _size(
            1, ("bytes",), minutes=0.001, scored_bytes=600, prompts=2, max_tokens=8,
            recipe=SMALL, total_blocks=5,
        ),
        "cpu": _size(
            3, ("bytes", "bpe"), minutes=1.0, vocab_size=2048, scored_bytes=100_000, prompts=8, max_tokens=200,
            recipe=[], total_blocks=10,
        ),
        "gpu": _size(
            1, ("bytes", "bpe"), minutes=1.5, vocab_size=8192, scored_bytes=400_000, prompts=12, max_tokens=200,
            recipe=LARGE, total_blocks=16,
        ),
    },
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Student's t intervals at 95 % over the seeds; differences are paired by seed.",
    notes="""\
The shipped recipe `demo` at a fixed number of blocks, the heads' own included, so that all kinds have about the same
parameters; "added" has its three further heads beside all of them, "replicated" an unembedding per parallel head.
Each takes the steps that fit into the same minutes by steps timed alone. A source is a domain. BPE is a tokenizer
trained on its training part. Held-out prompts are continued one at a time, plainly and with drafts in turn; a speedup
is that of decoding behind the prompt, in PyTorch for all kinds, because compiled steps draft with two of them alone.
Along text: a draft counts where it is head 1's own choice given the true text. Greedy text of a small model falls
into loops, which any drafter predicts: read it with the share of distinct 8-grams. The paper's columns are other
tasks at another size: they say how the kinds rank there.""",
    prepare=prepare,
    measure=measure,
    arms=arms,
)  # fmt: skip
