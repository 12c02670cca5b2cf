"""Entropies of the next two tokens, and how much the loss of n heads weighs the tokens around choice points.

X is the next token, Y the one after, all given the prefix. The paper's account of why a second head helps:
H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X), so that the loss of two heads pays twice for what X says about Y. Here by two
routes: cross-entropies on held-out text, where Y's law is head 2's, and whole tables p(x, y) of
some prefixes, by head 1 behind each x that may follow, from which every entropy is computed by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foretoken.checkpoint import load_checkpoint
from foretoken.lab.experiment import Experiment, Figures, Run, Settings
from foretoken.lab.intervals import Table, mean
from foretoken.lab.text import LARGE, SMALL, on, recipe_of, train_or_resume, windows_of
from foretoken.loss import targets
from foretoken.model import Model
from foretoken.windows import Windows

BEFORE, BEHIND = 4, 8  # tokens around a choice point


def run(run: Run) -> Figures:
    """Train, and measure on held-out windows."""
    s, n = run.settings, int(run.arm.removeprefix("n"))
    recipe = recipe_of(s, (f"model.n_future={n}",), run.seed, s["steps"], run.device)
    train_or_resume(recipe, run.folder / "model", run.report)
    model, tokenizer = load_checkpoint(run.folder / "model", "float32", run.device)
    held_out = windows_of(recipe, tokenizer, "validation", n + 1)
    nats, entropy = losses(model, held_out, s["windows"])
    figures: Figures = {"n": n, "choice": choice_points(nats, entropy, s["choice_share"])}
    if n == 2:
        figures |= {"on_text": on_text(nats), "tables": by_tables(model, held_out, s["prefixes"], s["context"])}
    return figures


@torch.no_grad()
def losses(model: Model, held_out: Windows, count: int) -> tuple[Tensor, Tensor]:
    """Nats (windows, n, T) of head i for token t + i at each position t, nan without a target; head 1's entropy."""
    n, nats, entropies = model.config.n_future, list[Tensor](), list[Tensor]()
    for index in range(-(-count // held_out.batch_size)):
        batch = on(held_out.batch(index), model.device)
        labels = targets(batch.tokens, batch.document_ids, batch.label_mask, held_out.n_future)[:n]
        hidden = model(batch.tokens, length=held_out.seq_len)
        heads = []
        for depth, (states, wanted) in enumerate(zip(hidden, labels, strict=True)):
            laws = model.logits(states, depth).log_softmax(-1)
            found = -laws.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
            heads.append(found.masked_fill(wanted < 0, math.nan))
            if len(heads) == 1:
                entropies.append(-(laws.exp() * laws).sum(-1).masked_fill(wanted < 0, math.nan))
        nats.append(torch.stack(heads, 1))
    return torch.cat(nats).cpu(), torch.cat(entropies).cpu()


def on_text(nats: Tensor) -> Figures:
    """Cross-entropies in bits on text: X by head 1, Y by head 2 from the same prefix, Y given X by head 1 one later."""
    x, y, y_given_x = nats[:, 0, :-1], nats[:, 1, :-1], nats[:, 0, 1:]
    there = (x + y + y_given_x).isfinite()
    x, y, y_given_x = (part[there].double() / math.log(2) for part in (x, y, y_given_x))
    information = y - y_given_x  # mean of log q(x, y) / (q(x) q(y)): the paper's relative mutual information
    return {
        "H(X)": float(x.mean()), "H(Y)": float(y.mean()), "H(Y|X)": float(y_given_x.mean()),
        "H(X|Y)": float((x - information).mean()), "I(X;Y)": float(information.mean()), "tokens": int(there.sum()),
    }  # fmt: skip


@torch.inference_mode()
def by_tables(model: Model, held_out: Windows, count: int, context: int) -> Figures:
    """Means in bits over `count` prefixes of `context` tokens, each entropy from the table p(x, y) by itself.

    head_2: cross-entropy of head 2 with the table's p(y), which is at least H(Y); the difference is what head 2 lacks.
    """
    rows = []
    for index in range(count):
        batch = held_out.batch(index)
        prefix = batch.tokens[:1, :context].to(model.device)
        joint, head_2 = table_of(model, prefix)
        p_x, p_y = joint.sum(1), joint.sum(0)
        given_y = joint / p_y.clamp(min=1e-300)
        given_x = joint / p_x[:, None].clamp(min=1e-300)
        rows.append(
            [_entropy(p_x), _entropy(p_y), -_expected(joint, given_x), -_expected(joint, given_y),
             _expected(joint, joint / (p_x[:, None] * p_y).clamp(min=1e-300)), -_expected(p_y, head_2)]
        )  # fmt: skip
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    names = ("H(X)", "H(Y)", "H(Y|X)", "H(X|Y)", "I(X;Y)", "head 2 on p(y)")
    return {**dict(zip(names, means, strict=True)), "prefixes": count}


def table_of(model: Model, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """p(x, y) (V, V) of the two tokens behind a prefix (1, T), by head 1; and head 2's law (V,) of the second."""
    vocab = model.config.vocab_size
    hidden = model(prefix)
    first, second = (model.logits(hidden[d][0, -1], d).double().softmax(-1) for d in range(2))
    followed = torch.cat((prefix.expand(vocab, -1), torch.arange(vocab, device=prefix.device)[:, None]), 1)
    laws = [
        model.logits(model.run_head(model.run_trunk(part, context), context, 0)[:, -1])
        for part in torch.split(followed, 64)
        for context in [model.context(followed.size(1))]
    ]
    return first[:, None] * torch.cat(laws).double().softmax(-1), second


def _entropy(p: Tensor) -> float:
    return -_expected(p, p)


def _expected(p: Tensor, q: Tensor) -> float:
    """Sum of p log2 q."""
    return float(torch.where(p > 0, p * q.clamp(min=1e-300).log2(), 0.0).sum())


def choice_points(nats: Tensor, entropy: Tensor, share: float) -> Figures:
    """How the loss of all heads lies around the tokens of which head 1 is least sure.

    profile: at each place from BEFORE tokens before a choice point to BEHIND after it, the summed loss of a token over
    the heads that predict it, beside that of all tokens. crossing: share of all loss in the terms that predict across a
    choice point from before it (of n heads 1 + 2 + .. + n terms a point); terms: their share in number; and the same
    for the tokens of which head 1 is surest.
    """
    n = nats.size(1)
    by_token = torch.stack([_shifted(nats[:, i], i) for i in range(n)], 1)  # (windows, n, T): of token t + 1, by head
    known = by_token.isfinite().all(1) & entropy.isfinite()
    order = entropy[known].sort().values
    number = max(1, round(share * len(order)))
    high, low = known & (entropy >= order[-number]), known & (entropy <= order[number - 1])
    whole = by_token.sum(1)
    average = float(whole[known].mean())
    profile = []
    for place in range(-BEFORE, BEHIND + 1):
        values = _shifted(whole, -place)[high]
        profile.append(float(values[values.isfinite()].mean()) / average)
    crossing = {name: _crossing(by_token, known, points) for name, points in (("high", high), ("low", low))}
    return {"profile": profile, "crossing": crossing, "average_bits": average / math.log(2)}


def _crossing(by_token: Tensor, known: Tensor, points: Tensor) -> Figures:
    """Share of loss, and of terms, in heads that read before a point and predict at it or behind it."""
    n = by_token.size(1)
    crosses = torch.zeros_like(by_token, dtype=torch.bool)
    for behind in range(n):  # a token so far behind a point is predicted across it by heads behind + 1 .. n
        at = _shifted(points.float(), behind).nan_to_num() > 0
        crosses[:, behind:] |= at[:, None]
    counted = known[:, None].expand_as(by_token) & by_token.isfinite()
    return {
        "loss": float(by_token[crosses & counted].sum() / by_token[counted].sum()),
        "terms": float((crosses & counted).sum() / counted.sum()),
    }


def _shifted(values: Tensor, places: int) -> Tensor:
    """values (windows, T) moved so many places to the right, nan where nothing comes in."""
    moved = torch.full_like(values, math.nan)
    T = values.size(1)
    if places >= 0:
        moved[:, places:] = values[:, : T - places]
    else:
        moved[:, :places] = values[:, -places:]
    return moved


def summarise(found: Figures) -> Figures:
    """The identity by both routes, and the weight of choice points by n."""
    pairs = found["runs"]["n2"]
    sides: dict[str, Any] = {}
    for route in ("on_text", "tables"):
        left = [r[route]["H(X)"] + r[route]["H(Y)"] for r in pairs]
        right = [r[route]["H(X|Y)"] + 2 * r[route]["I(X;Y)"] + r[route]["H(Y|X)"] for r in pairs]
        sides[route] = {
            "left": mean(left), "right": mean(right),
            "apart": max(abs(a - b) for a, b in zip(left, right, strict=True)),
            "information": mean([r[route]["I(X;Y)"] for r in pairs]),
        }  # fmt: skip
    weight = {arm: _weight(runs, found["runs"]["n1"]) for arm, runs in found["runs"].items()}
    text, tables = sides["on_text"], sides["tables"]
    heavier = [arm for arm, v in weight.items() if arm != "n1" and v.low > 1]
    shown = ", ".join(f"{arm} {v.shown()} (claimed {(int(arm[1:]) + 1) / 2:g})" for arm, v in weight.items())
    return {
        "sides": sides,
        "weight": weight,
        "verdict": f"H(X) + H(Y) = {tables['left'].shown(3)} bits and H(X|Y) + 2 I(X;Y) + H(Y|X) = "
        f"{tables['right'].shown(3)} bits from whole tables, {tables['apart']:.1e} apart; on text "
        f"{text['left'].shown(3)} and {text['right'].shown(3)}. I(X;Y) is {tables['information'].shown(3)} bits by "
        f"tables and {text['information'].shown(3)} by head 2 on text. Loss across choice points, beside its share "
        f"with one head: {shown}; choice points weigh more with {' and '.join(heavier) or 'no arm'}.",
    }


def _weight(runs: list[Figures], base: list[Figures]) -> Any:
    return mean(
        [
            r["choice"]["crossing"]["high"]["loss"] / b["choice"]["crossing"]["high"]["loss"]
            for r, b in zip(runs, base, strict=True)
        ]
    )


def tables(found: Figures) -> list[Table]:
    """Entropies by both routes; weights by n."""
    pairs = found["runs"]["n2"]
    names = ("H(X)", "H(Y)", "H(Y|X)", "H(X|Y)", "I(X;Y)")
    rows = [
        (name, mean([r["tables"][name] for r in pairs]).shown(3), mean([r["on_text"][name] for r in pairs]).shown(3))
        for name in names
    ]
    rows.append(("head 2 on the table's p(y)", mean([r["tables"]["head 2 on p(y)"] for r in pairs]).shown(3), ""))
    weights = []
    for arm, runs in found["runs"].items():
        high, low = ([r["choice"]["crossing"][side] for r in runs] for side in ("high", "low"))
        shares = [
            100 * mean([values[key] for values in side]).value for side in (high, low) for key in ("terms", "loss")
        ]
        claimed = f"{(int(arm[1:]) + 1) / 2:g}"
        weights.append((arm, *(f"{share:.1f} %" for share in shares), found["summary"]["weight"][arm].shown(), claimed))
    return [
        Table(("bits", "from tables p(x, y)", "cross-entropies on text"), rows),
        Table(
            ("arm", "choice points: share of terms", "of loss", "surest tokens: share of terms", "of loss",
             "choice points' share of loss beside n1's", "the paper's (n + 1) / 2"), weights,
        ),
    ]  # fmt: skip


def draw(found: Figures, axes: Any) -> None:
    """Loss around choice points."""
    places = range(-BEFORE, BEHIND + 1)
    for index, (arm, runs) in enumerate(found["runs"].items()):
        for number, values in enumerate(runs):
            axes.plot(places, values["choice"]["profile"], color=f"C{index}", label=None if number else arm)
    axes.set(xlabel="tokens behind a choice point", ylabel="loss of a token over all heads / average")
    axes.legend()


def _size(ns: tuple[int, ...], seeds: int, **more: Any) -> Settings:
    return {"arms": [f"n{n}" for n in ns], "seeds": seeds, "data": ["stdlib"], "choice_share": 0.05, **more}


EXPERIMENT = Experiment(
    name="information",
    rule="choice points weigh more with n heads where the share of the loss that predicts across them, divided by the "
    "same share with one head, seed by seed, has an interval above 1.",
    sizes={
        "smoke": _size((1, 2), 1, recipe=[*SMALL, "model.total_blocks=3"], steps=3, windows=2, prefixes=2, context=8),
        "cpu": _size((1, 2, 4), 3, recipe=["model.total_blocks=8"], steps=800, windows=96, prefixes=40, context=96),
        "gpu": _size(
            (1, 2, 4), 3, steps=3000, windows=512, prefixes=500, context=256,
            recipe=[*LARGE, "model.total_blocks=12"],
        ),
    },
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Student's t intervals at 95 % over the seeds. The paper gives no numbers for this, but (n + 1) / 2.",
    notes="""\
Bytes, the shipped recipe `demo` with parallel heads at equal total blocks. Tables: for some held-out prefixes head 1
gives p(x), and head 1 behind each x gives p(y|x); every entropy is computed from p(x, y) by its own definition, so both
sides of the identity meet only if all are right. On text: mean cross-entropies, Y's law being head 2's; there I(X;Y)
is the paper's relative mutual information, H(Y) - H(Y|X), the identity holds by construction, and what matters is how
far the values lie from those of the tables. Choice points are the 5 % of tokens of which the arm's own head 1 is least
sure. A term of the loss crosses a point when its head reads before the point and predicts the point's token or one
behind it: n (n + 1) / 2 terms of n heads, against n for a transition that nothing else depends on, which gives the
paper's (n + 1) / 2 where all tokens in these terms depend on the choice alone.""",
)  # fmt: skip
