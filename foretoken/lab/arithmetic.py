"""Polynomial arithmetic over F_p[X]/(X^d): what an expression of m operations comes to (the paper's section 4.2).

`( ( 1 4 ) * ( - ( 2 0 ) ) ) = 5 1`: operands are their d coefficients, the constant first; operators are unary minus,
+, x and composition, all in brackets; the answer is d coefficients. Composition f(g(X)) takes representatives of degree
below d and cuts off after substitution, which is one way to define it where g has a constant term. Trained with m up to
`trained`, tested up to `tested`; pauses are tokens before `=` that say nothing.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken.config import ModelConfig, OptimConfig
from foretoken.lab.experiment import Experiment, Figures, Run, Settings
from foretoken.lab.fit import Sample, answered, answered_by_decoding, fit, whole_sequences
from foretoken.lab.intervals import Table, difference, mean
from foretoken.model import Model

Polynomial = tuple[int, ...]
OPERATORS = ("-", "+", "*", "o")
HELD_OUT = 8  # one in so many expressions

# The paper's figure 8, means of two runs in % by m = 1..8: 30M and 100M parameters, X^5, m to 5 trained.
PAPER = {
    "30M": {
        1: (88.2, 63.3, 40.8, 24.1, 13.3, 2.2, 0.5, 0.4), 2: (90.5, 68.4, 48.5, 33.3, 20.4, 9.4, 3.6, 1.0),
        4: (86.6, 66.0, 45.1, 30.9, 18.8, 8.4, 2.8, 0.6),
    },
    "100M": {
        1: (87.1, 64.8, 43.4, 26.4, 15.8, 5.7, 1.2, 0.4), 2: (93.7, 71.8, 53.0, 38.0, 24.8, 12.7, 4.3, 0.8),
        4: (92.1, 72.2, 51.9, 36.2, 23.4, 12.1, 4.5, 1.2),
    },
}  # fmt: skip


def add(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    """a + b."""
    return tuple((x + y) % p for x, y in zip(a, b, strict=True))


def times(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    """a b, cut off at X^d."""
    d = len(a)
    return tuple(sum(a[i] * b[k - i] for i in range(k + 1)) % p for k in range(d))


def composed(a: Polynomial, b: Polynomial, p: int) -> Polynomial:
    """a(b(X)) of representatives of degree below d, cut off at X^d (Horner's rule: cutting early changes nothing)."""
    found = (0,) * len(a)
    for coefficient in reversed(a):
        product = times(found, b, p)
        found = ((product[0] + coefficient) % p, *product[1:])
    return found


def expression(m: int, p: int, d: int, rng: random.Random) -> tuple[list[int | str], Polynomial]:
    """A random expression of m operations, as coefficients and signs, and its value.

    Operators are uniform, and so is the share of the other operations that goes to the left operand.
    """
    if m == 0:
        value = tuple(rng.randrange(p) for _ in range(d))
        return [*value], value
    operator = rng.choice(OPERATORS)
    if operator == "-":
        inner, value = expression(m - 1, p, d, rng)
        return ["(", "-", *inner, ")"], tuple(-x % p for x in value)
    left = rng.randrange(m)
    (a, x), (b, y) = expression(left, p, d, rng), expression(m - 1 - left, p, d, rng)
    value = {"+": add, "*": times, "o": composed}[operator](x, y, p)
    return ["(", *a, operator, *b, ")"], value


def vocabulary(p: int) -> dict[int | str, int]:
    """Ids: coefficients, operators, brackets, the pause, = and padding."""
    signs = (*range(p), *OPERATORS, "(", ")", ".", "=", "pad")
    return {sign: index for index, sign in enumerate(signs)}


def problems(operations: Sequence[int], s: Settings, seed: int, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """An expression for each number of operations, padded (B, S), and where the answers are; a function of the seed."""
    rng, ids = random.Random(seed), vocabulary(s["p"])
    rows, answers = list[list[int]](), list[int]()
    for m in operations:
        while True:
            signs, value = expression(m, s["p"], s["d"], rng)
            row = [ids[sign] for sign in signs]
            if (zlib.crc32(bytes(row)) % HELD_OUT == 0) == held_out:
                break
        row += [ids["."]] * s["pauses"] + [ids["="]]
        answers.append(len(row))
        rows.append([*row, *value])
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [ids["pad"]] * (longest - len(row)) for row in rows])
    places, starts = torch.arange(longest)[None], torch.tensor(answers)[:, None]
    return tokens, (places >= starts) & (places < starts + s["d"])


def longest(m: int, s: Settings) -> int:
    """Tokens of the longest sequence of m operations: all of them with two operands."""
    d: int = s["d"]
    pauses: int = s["pauses"]
    return (m + 1) * d + 3 * m + pauses + 1 + d


def settings_for(arm: str, settings: Settings) -> tuple[int, Settings]:
    """n, and the settings with the pauses, of an arm such as n2 or n2-pauses."""
    name, _, pauses = arm.partition("-")
    return int(name.removeprefix("n")), {**settings, "pauses": settings["pauses"] if pauses else 0}


def run(run: Run) -> Figures:
    """Train one model; its answers by number of operations."""
    n, s = settings_for(run.arm, run.settings)
    config = ModelConfig(
        vocab_size=len(vocabulary(s["p"])), hidden_size=s["width"], intermediate_size=-(-8 * s["width"] // 192) * 64,
        num_hidden_layers=s["blocks"] - n + 1, num_attention_heads=s["heads"], num_key_value_heads=s["heads"],
        head_dim=s["width"] // s["heads"], max_position_embeddings=longest(s["tested"], s) + 8, n_future=n,
    )  # fmt: skip
    model = Model(config)
    model.init_weights(run.seed)
    model.to(run.device)

    def sample(step: int) -> Sample:
        seed = (run.seed + 1) * 2**40 + step
        rng = random.Random(seed ^ 0x5EED)
        operations = [rng.randint(1, s["trained"]) for _ in range(s["batch"])]
        return whole_sequences(*problems(operations, s, seed, held_out=False), n)

    tests = {m: problems([m] * s["problems"], s, 1_000_003 * m, held_out=True) for m in range(1, s["tested"] + 1)}

    def right(m: int) -> float:
        tokens, is_target = tests[m]
        parts = zip(torch.split(tokens, 256), torch.split(is_target, 256), strict=True)
        return float(torch.cat([answered(model, *part) for part in parts]).float().mean())

    def check(step: int) -> Figures:
        found = {"right": {str(m): right(m) for m in range(1, s["trained"] + 1)}}
        run.report(f"{run.folder.name}: step {step}, right {found['right']}")
        return found

    optimizer = OptimConfig(
        name=s["optimizer"], lr=s["lr"], muon_lr=s["muon_lr"], warmup_steps=s["warmup"], final_lr_ratio=0.03
    )
    history = fit(model, sample, s["steps"], optimizer, run.folder, check=check, check_every=s["check_every"])
    model.eval()
    answered_by_decoding(model, *(part[:20] for part in tests[1]))
    return {
        "right": {str(m): right(m) for m in tests},
        "losses": history[-1]["losses"],
        "curve": [[h["step"], h["right"][str(s["trained"])]] for h in history],
    }


def summarise(found: Figures) -> Figures:
    """By arm and number of operations the share that is right, and differences to n = 1 with the same pauses."""
    trained, tested = found["settings"]["trained"], found["settings"]["tested"]
    arms: dict[str, Any] = {}
    verdicts = []
    for arm, runs in found["runs"].items():
        base = found["runs"]["-".join(["n1", *arm.split("-")[1:]])]
        parts = {"in domain": range(1, trained + 1), "out of domain": range(trained + 1, tested + 1)}
        gains = {part: difference(_over(runs, ms), _over(base, ms)) for part, ms in parts.items()}
        arms[arm] = {"right": {m: mean([r["right"][m] for r in runs]) for m in runs[0]["right"]}, "gain": gains}
        if not arm.startswith("n1"):
            said = "; ".join(
                f"{part} {100 * gain.value:+.1f} points [{100 * gain.low:+.1f} to {100 * gain.high:+.1f}], "
                f"{'better' if gain.low > 0 else 'worse' if gain.high < 0 else 'no difference shown'}"
                for part, gain in gains.items()
            )
            verdicts.append(f"{arm} against n = 1: {said}.")
    return {"arms": arms, "verdict": " ".join(verdicts)}


def _over(runs: list[Figures], ms: Sequence[int]) -> list[float]:
    return [sum(r["right"][str(m)] for m in ms) / len(ms) for r in runs]


def tables(found: Figures) -> list[Table]:
    """Right answers in % by number of operations; every run, since they may fall into two camps; the paper's."""
    ms = [str(m) for m in range(1, found["settings"]["tested"] + 1)]
    means = [(arm, *(mean([r["right"][m] for r in runs]).percent() for m in ms)) for arm, runs in found["runs"].items()]
    single = [
        (arm, str(r["seed"]), *(f"{100 * r['right'][m]:.1f}" for m in ms))
        for arm, runs in found["runs"].items()
        for r in runs
    ]
    theirs = [
        (f"{size}, n = {n}", *(f"{value:g}" for value in values))
        for size, by_n in PAPER.items()
        for n, values in by_n.items()
    ]
    return [
        Table(("right answers by m", *ms), means),
        Table(("arm", "seed", *(f"m = {m}" for m in ms)), single),
        Table(("the paper's means, X^5, %", *(f"m = {m}" for m in range(1, 9))), theirs),
    ]


def draw(found: Figures, axes: Any) -> None:
    """Right answers by number of operations, a line a run."""
    for index, (arm, runs) in enumerate(found["runs"].items()):
        for number, values in enumerate(runs):
            axes.plot(
                [int(m) for m in values["right"]], [100 * v for v in values["right"].values()], ".-", color=f"C{index}",
                alpha=0.7, label=None if number else arm,
            )  # fmt: skip
    axes.axvline(found["settings"]["trained"] + 0.5, color="grey", linestyle=":")
    axes.set(xlabel="operations; trained up to the dotted line", ylabel="right answers, %")
    axes.legend()


def _size(seeds: int, **more: Any) -> Settings:
    arms = ["n1", "n2", "n4", "n1-pauses", "n2-pauses", "n4-pauses"]
    return {"arms": arms, "seeds": seeds, "p": 7, "pauses": 5, **more}


EXPERIMENT = Experiment(
    name="arithmetic",
    rule="an arm is better than n = 1 with the same pauses where the difference of right answers, meaned over m and "
    "paired by seed, has an interval above 0.",
    sizes={
        "smoke": {
            **_size(1, d=2, trained=1, tested=2, problems=10, width=32, blocks=4, heads=2, batch=8, steps=3),
            "arms": ["n1", "n2"], "optimizer": "adamw", "lr": 1e-3, "muon_lr": 0.02, "warmup": 1, "check_every": 2,
        },
        "cpu": _size(
            3, d=2, trained=2, tested=4, problems=500, width=128, blocks=6, heads=4, batch=64, steps=1500,
            optimizer="muon", lr=5e-3, muon_lr=0.02, warmup=100, check_every=500,
        ),
        "gpu": {
            **_size(1, d=5, trained=5, tested=10, problems=2000, width=512, blocks=10, heads=8, batch=512, steps=2500),
            "arms": ["n1", "n2", "n4"], "optimizer": "muon", "lr": 5e-3, "muon_lr": 0.02, "warmup": 200,
            "check_every": 500,
        },
    },
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Student's t intervals at 95 % over the seeds; differences are paired by seed.",
    notes="""\
What the paper leaves open is chosen so: every operation in brackets; operators uniform, the other operations split
uniformly between two operands; coefficients are tokens, the constant first; composition takes representatives of degree
below d and cuts off after substitution; the loss is of the answer's tokens alone, a sequence a row, and no head reads
across sequences; equal total blocks; one expression in 8, by a hash, is held out and all tests are of those. Answers
are greedy and right where all coefficients are. The CPU size takes d = 2 and at most two operations in training.""",
)  # fmt: skip
