"""Path finding on star graphs: d arms of l nodes from one centre, and the way from the centre to the end of one.

A sequence is `a b c d ... / start goal = path`: the edges in random order, then the question, then the l nodes from the
centre to the goal. The second node of the path is the choice of an arm; what follows can be copied from edge to
edge. Learnt from the next token alone, copying is learnt first and the choice stays a guess, right once in d
(Bachmann and Nagarajan 2024). Samples are new at every step; a graph whose hash says so is held out.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from foretoken.config import ModelConfig, OptimConfig
from foretoken.lab.experiment import Experiment, Figures, Run, Settings
from foretoken.lab.fit import Sample, answered, answered_by_decoding, fit, whole_sequences
from foretoken.lab.intervals import Table, mean, rate
from foretoken.model import Model

# What an arm changes of a model; the next-token path has the same blocks in all of them.
ARMS: dict[str, dict[str, Any]] = {
    "n1": {"n_future": 1},
    "n2": {"n_future": 2},
    "n3": {"n_future": 3},
    "sequential": {"n_future": 3, "head_kind": "sequential"},
}
HELD_OUT = 8  # one in so many graphs
SOLVED = 0.95  # of the held-out graphs
PAPER = {  # frontier figures of the TOP paper, %: G(d,l) by objective
    "3x3": {"n1": 33.8, "n2": 100.0},
    "3x5": {"n1": 32.5, "n2": 59.0},
    "5x3": {"n1": 19.5, "n2": 19.6},
    "5x5": {"n1": 0.1, "n2": 0.1},
}


def graphs(arms: int, length: int, labels: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random problems as token sequences (count, S), and which of them are held out (count,).

    Token ids: 0..labels-1 the nodes, then `/` and `=`. The goal is the end of the first arm.
    """
    nodes = 1 + arms * (length - 1)
    names = torch.rand(count, labels, generator=generator).argsort(1)[:, :nodes]
    centre, rest = names[:, :1], names[:, 1:].view(count, arms, length - 1)
    paths = torch.cat((centre[:, None].expand(-1, arms, 1), rest), 2)  # (count, arms, length)
    edges = torch.stack((paths[:, :, :-1], paths[:, :, 1:]), -1).flatten(1, 2)
    order = torch.rand(edges.shape[:2], generator=generator).argsort(1)
    edges = edges.gather(1, order[..., None].expand_as(edges))
    signs = torch.full_like(centre, labels), torch.full_like(centre, labels + 1)
    text = torch.cat((edges.flatten(1), signs[0], centre, paths[:, 0, -1:], signs[1], paths[:, 0]), 1)
    return text, _held_out(centre, rest)


def _held_out(centre: Tensor, rest: Tensor) -> Tensor:
    """Whether a graph with its question is held out: by a hash that the order of edges and other arms leaves alone."""
    others = rest[:, 1:].gather(1, rest[:, 1:, :1].argsort(1).expand_as(rest[:, 1:]))
    mixed = torch.zeros_like(centre[:, 0])
    for node in torch.cat((centre, rest[:, 0], others.flatten(1)), 1).unbind(1):
        mixed = (mixed ^ node) * 0x2545F4914F6CDD1D + 0x5DEECE66D  # modulo 2^64
        mixed = mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)
    return (mixed >> 7) % HELD_OUT == 0


def problems(shape: Settings, count: int, seed: int, *, held_out: bool) -> Tensor:
    """`count` sequences (count, S) of one part, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    found, enough = list[Tensor](), 0
    while enough < count:
        tokens, held = graphs(shape["arms"], shape["length"], shape["labels"], 2 * count + 16, generator)
        found.append(tokens[held == held_out])
        enough += len(found[-1])
    return torch.cat(found)[:count]


def run(run: Run) -> Figures:
    """Train one model until it finds every path or its steps are over; how many of the held-out paths it finds."""
    s = run.settings
    graph, arm = run.arm.split("-")
    shape = s["graphs"][graph]
    size, length = 1 + shape["arms"] * (shape["length"] - 1), shape["length"]
    assert size <= shape["labels"]
    positions = 2 * shape["arms"] * (length - 1) + 4 + length
    config = ModelConfig(
        vocab_size=shape["labels"] + 2, hidden_size=s["width"], intermediate_size=int(s["mlp"] * s["width"]),
        num_hidden_layers=s["layers"], num_attention_heads=s["heads"], num_key_value_heads=s["heads"],
        head_dim=s["width"] // s["heads"], max_position_embeddings=positions + 4, **ARMS[arm],
    )  # fmt: skip
    model = Model(config)
    model.init_weights(run.seed)
    model.to(run.device)
    is_target = torch.arange(positions).expand(s["batch"], -1) >= positions - length
    test_targets = is_target[:1].expand(s["tested"], -1)
    test = problems(shape, s["tested"], 1_000_003 * (run.seed + 1), held_out=True)

    def sample(step: int) -> Sample:
        tokens = problems(shape, s["batch"], (run.seed + 1) * 2**40 + step, held_out=False)
        return whole_sequences(tokens, is_target, config.n_future)

    def check(step: int) -> Figures:
        found = {"solved": float(answered(model, test, test_targets).float().mean())}
        run.report(f"{run.folder.name}: step {step}, {found['solved']:.3f} of the paths")
        return found

    optimizer = OptimConfig(
        name="muon", lr=s["lr"], muon_lr=s["muon_lr"], weight_decay=0.01, warmup_steps=s["warmup"],
        final_lr_ratio=s["final_lr_ratio"],
    )  # fmt: skip
    began = time.perf_counter()
    history = fit(
        model, sample, shape["steps"], optimizer, run.folder, check=check, check_every=s["check_every"],
        enough=lambda figures: bool(figures["solved"] >= 0.999),
    )  # fmt: skip
    seconds, steps = time.perf_counter() - began, history[-1]["step"]
    model.eval()
    decoded = answered_by_decoding(model, test[: s["decoded"]], test_targets[: s["decoded"]])
    return {
        "solved": history[-1]["solved"],
        "decoded": float(decoded.float().mean()),
        "steps": steps,
        "steps_to_solve": next((h["step"] for h in history if h["solved"] >= SOLVED), None),
        "seconds_per_step": seconds / steps,  # too low where a run was stopped and went on
        "losses": history[-1]["losses"],
        "curve": [[h["step"], h["solved"]] for h in history],
    }


def summarise(found: Figures) -> Figures:
    """Success rate, mean of paths found, steps to solve, by graph and arm; which arms beat the next token alone."""
    arms: dict[str, Any] = {}
    for name, runs in found["runs"].items():
        graph = found["settings"]["graphs"][name.split("-")[0]]
        solved = [r["solved"] for r in runs]
        took = sorted(r["steps_to_solve"] for r in runs if r["steps_to_solve"] is not None)
        arms[name] = {
            "successes": len(took), "count": len(runs), "success": rate(len(took), len(runs)),
            "found": mean(solved), "guess": 1 / graph["arms"],
            "median_steps": took[len(took) // 2] if took else None,
        }  # fmt: skip
    verdicts = []
    for graph in found["settings"]["graphs"]:
        here = {arm: arms[f"{graph}-{arm}"] for arm in ARMS if f"{graph}-{arm}" in arms}
        base = here.get("n1")
        if base is None:
            continue
        better = [arm for arm, v in here.items() if arm != "n1" and v["success"].low > base["success"].high]
        rest = [arm for arm in here if arm not in (*better, "n1")]
        shown = ", ".join(f"{arm} {v['successes']} of {v['count']}" for arm, v in here.items())
        said = [f"{' and '.join(better)} above the next token alone"] if better else []
        said += [f"{' and '.join(rest)} not shown to be above it"] if rest else []
        ranked = sorted(((v["found"].value, arm) for arm, v in here.items()), reverse=True)
        said.append("by paths found " + ", ".join(f"{arm} {100 * share:.0f} %" for share, arm in ranked))
        verdicts.append(f"G({graph.replace('x', ',')}): runs that solve it {shown}; {'; '.join(said)}.")
    return {"arms": arms, "verdict": " ".join(verdicts)}


def tables(found: Figures) -> list[Table]:
    """Success by graph and arm."""
    head = ("graph", "arm", "runs that solve it", "95 %", "paths found", "a guess", "median steps to solve",
            "of at most", "ms a step", "TOP paper: paths found")  # fmt: skip
    rows = []
    for name, v in found["summary"]["arms"].items():
        graph, arm = name.split("-")
        shape, runs = found["settings"]["graphs"][graph], found["runs"][name]
        theirs = PAPER.get(graph, {}).get(arm)
        ms = 1e3 * sum(r["seconds_per_step"] for r in runs) / len(runs)
        rows.append(
            (f"G({graph.replace('x', ',')})", arm, f"{v['successes']} of {v['count']}", v["success"].percent(),
             v["found"].percent(), f"{100 * v['guess']:.0f} %",
             str(v["median_steps"] or ""), str(shape["steps"]), f"{ms:.0f}", f"{theirs:g} %" if theirs else "")
        )  # fmt: skip
    return [Table(head, rows)]


def draw(found: Figures, axes: Any) -> None:
    """Paths found by step, every run a line, of the first graph."""
    first = next(iter(found["settings"]["graphs"]))
    for index, arm in enumerate(ARMS):
        for number, values in enumerate(found["runs"].get(f"{first}-{arm}", ())):
            steps, solved = zip(*values["curve"], strict=True)
            axes.plot(steps, solved, color=f"C{index}", alpha=0.6, linewidth=1, label=None if number else arm)
    axes.axhline(1 / found["settings"]["graphs"][first]["arms"], color="grey", linestyle=":", label="a guess")
    axes.set(xlabel="step", ylabel="share of held-out paths", title=f"G({first.replace('x', ',')}), a line a seed")
    axes.legend()


def _sizes() -> dict[str, Settings]:
    def arms(graphs: dict[str, Any]) -> list[str]:
        return [f"{graph}-{arm}" for graph in graphs for arm in ARMS]

    model = {
        "width": 64, "mlp": 3, "layers": 3, "heads": 4, "batch": 64, "lr": 2e-3, "muon_lr": 0.02, "warmup": 100,
        "final_lr_ratio": 0.1,
    }  # fmt: skip
    tests = {"tested": 1000, "decoded": 200, "check_every": 250}
    cpu = {
        "3x3": {"arms": 3, "length": 3, "labels": 20, "steps": 2250},
        "3x5": {"arms": 3, "length": 5, "labels": 20, "steps": 1000},
        "5x3": {"arms": 5, "length": 3, "labels": 20, "steps": 1000},
    }
    gpu = {f"{d}x{l}": {"arms": d, "length": l, "labels": 30, "steps": 4000} for d, l in ((3, 3), (3, 5), (5, 3))}
    toy = {"2x2": {"arms": 2, "length": 2, "labels": 6, "steps": 6}}
    return {
        "smoke": {
            "arms": arms(toy), "seeds": 2, "graphs": toy, **model, "width": 16, "layers": 3, "batch": 16, "warmup": 2,
            "tested": 40, "decoded": 8, "check_every": 3,
        },
        "cpu": {
            "arms": arms(cpu), "seeds": 20, "most_seeds": {a: 3 for a in arms(cpu) if not a.startswith("3x3")},
            "graphs": cpu, **model, **tests, "mlp": 0.5, "final_lr_ratio": 0.5,
        },
        "gpu": {
            "arms": arms(gpu), "seeds": 1, "graphs": gpu, **model, **tests, "width": 256, "layers": 6, "batch": 512,
            "warmup": 400,
        },
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="star",
    rule=f"a run solves a graph when greedy decoding finds {SOLVED:.0%} of the held-out paths; an arm is above the "
    "next token alone (n1) where its interval of solving runs lies wholly above that of n1.",
    sizes=_sizes(),
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Intervals at 95 %: Wilson's for the share of runs that solve a graph, Student's t over the seeds for "
    "the share of paths found.",
    notes="""\
Sequences are `a b c d .. / start goal = path`; the loss is of the path's tokens alone, and heads count equally. The
next-token path has the same blocks in every arm, further heads are added to it: n2 and n3 are parallel heads, and
sequential is n = 3 with one block that drafts on. Muon for the blocks' matrices, AdamW for the rest. Samples are new
at each step; one graph in 8, by a hash that neither the order of the edges nor that of the other arms changes, is held
out, and tested greedily by the decode loop (with and without drafts: a run fails if they differ). A run ends early
once it finds 99.9 % of the paths. Steps to solve vary between seeds, and a schedule that is too short looks like
failure: "not solved" means within these steps. At size cpu MLPs are half as wide as the
model, since finding a path is attention's work. The figures beside ours are those of the paper on token order
prediction (TOP), models of 8 x 384 on 300,000 stored graphs.""",
)
