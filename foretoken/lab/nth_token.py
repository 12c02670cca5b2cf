"""A model trained on the k-th next token alone: its loss there, and what its trunk has learnt.

1. Train an ordinary model whose one loss is of the token k further on (`loss.offsets = [k]`).
2. Freeze its embedding and trunk, begin head 1, the final norm and the unembedding anew, and train those on the next
   token. What they reach says how much of the next token the trunk has kept; an untrained trunk is the floor.
"""

from __future__ import annotations

from typing import Any

from foretoken.checkpoint import load_checkpoint
from foretoken.lab.experiment import Experiment, Figures, Run, Settings
from foretoken.lab.fit import Sample, fit
from foretoken.lab.intervals import Table, difference, mean
from foretoken.lab.text import LARGE, SMALL, bits_at, recipe_of, train_or_resume, unigram_bits, windows_of
from foretoken.model import Model
from foretoken.tokenizer import from_config

UNTRAINED = "untrained"


def offset_of(arm: str) -> int:
    """k of an arm's name, such as k4; the untrained trunk's is the next token."""
    return 1 if arm == UNTRAINED else int(arm.removeprefix("k"))


def run(run: Run) -> Figures:
    """Train on token k, then head 1 on the frozen trunk."""
    s, k = run.settings, offset_of(run.arm)
    recipe = recipe_of(s, ("model.n_future=1", f"loss.offsets=[{k}]"), run.seed, s["steps"], run.device)
    tokenizer = from_config(recipe.tokenizer)
    model = Model(recipe.model.resolve(tokenizer.vocab_size, recipe.train.seq_len))
    model.init_weights(run.seed)
    model.to(run.device)
    if run.arm != UNTRAINED:
        train_or_resume(recipe, run.folder / "model", run.report)
        model = load_checkpoint(run.folder / "model", "float32", run.device)[0]
    held_out = windows_of(recipe, tokenizer, "validation", k)
    figures: Figures = {"offset": k, "unigram": unigram_bits(recipe, tokenizer)}
    if run.arm != UNTRAINED:
        figures["bits_at_k"] = bits_at(model, held_out, k, s["windows"])
    forget_head_1(model, run.seed + 1)
    batches = windows_of(recipe, tokenizer, "train", 1, seed=run.seed + 1)

    def sample(step: int) -> Sample:
        batch = batches.batch(step)
        return batch.tokens, batch.document_ids, batch.label_mask

    fit(model.train(), sample, s["probe_steps"], recipe.optim, run.folder)
    figures["probe"] = bits_at(model.eval(), windows_of(recipe, tokenizer, "validation", 1), 1, s["windows"])
    return figures


def forget_head_1(model: Model, seed: int) -> None:
    """Begin head 1, the norm and the unembedding anew, and let nothing else learn."""
    fresh = Model(model.config)
    fresh.init_weights(seed)
    state = fresh.state_dict()
    for name, parameter in model.named_parameters():
        of_head = name.startswith(("heads.", "norm.", "lm_head."))
        parameter.requires_grad_(of_head)
        if of_head:
            parameter.data.copy_(state[name])


def summarise(found: Figures) -> Figures:
    """Means over the seeds; where the loss at k meets the unigram's, and which trunks beat the untrained one."""
    arms: dict[str, Any] = {}
    floor = [r["probe"] for r in found["runs"][UNTRAINED]]
    for arm, runs in found["runs"].items():
        probe = [r["probe"] for r in runs]
        arms[arm] = {
            "probe": mean(probe),
            "bits_at_k": None if arm == UNTRAINED else mean([r["bits_at_k"] for r in runs]),
            "unigram": mean([r["unigram"] for r in runs]),
            "gain": None if arm == UNTRAINED else difference(floor, probe),
        }
    helped = [arm for arm, v in arms.items() if v["gain"] and v["gain"].low > 0]
    beyond = [arm for arm, v in arms.items() if v["bits_at_k"] and v["bits_at_k"].high < v["unigram"].value]
    trained = [arm for arm in arms if arm != UNTRAINED]
    best = min(trained, key=lambda arm: arms[arm]["probe"].value)
    return {
        "arms": arms,
        "verdict": f"Head 1 on a frozen trunk does better than on an untrained one for {_list(helped)}; the best trunk "
        f"for the next token is that of {best} ({arms[best]['probe'].shown()} bits per byte, untrained "
        f"{arms[UNTRAINED]['probe'].shown()}). The token k further on is predicted better than by its frequency for "
        f"{_list(beyond)} of {_list(trained)}.",
    }


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def tables(found: Figures) -> list[Table]:
    """By k."""
    rows = []
    for arm, v in found["summary"]["arms"].items():
        at_k, gain = v["bits_at_k"], v["gain"]
        rows.append(
            (arm, at_k.shown() if at_k else "", f"{v['unigram'].value:.2f}", v["probe"].shown(),
             gain.shown() if gain else "")
        )  # fmt: skip
    head = ("trained on", "bits per byte at k", "by frequency alone", "head 1 on the frozen trunk: bits per byte",
            "better than on an untrained trunk by")  # fmt: skip
    return [Table(head, rows)]


def draw(found: Figures, axes: Any) -> None:
    """Bits per byte against k."""
    arms = {arm: runs for arm, runs in found["runs"].items() if arm != UNTRAINED}
    places = range(len(arms))
    for key, label in (("bits_at_k", "at k"), ("probe", "next token, head 1 on the frozen trunk")):
        for seed in range(max(len(runs) for runs in arms.values())):
            values = [runs[seed][key] for runs in arms.values()]
            axes.plot(places, values, "o-", color="C0" if key == "probe" else "C1", label=None if seed else label)
    floor = found["runs"][UNTRAINED]
    axes.axhline(floor[0]["unigram"], color="grey", linestyle=":", label="by frequency alone")
    axes.axhline(sum(r["probe"] for r in floor) / len(floor), color="C0", linestyle=":", label="on an untrained trunk")
    axes.set_xticks(list(places), [arm.removeprefix("k") for arm in arms])
    axes.set(xlabel="k", ylabel="bits per byte")
    axes.legend()


def _size(offsets: tuple[int, ...], seeds: int, **more: Any) -> Settings:
    return {"arms": [*(f"k{k}" for k in offsets), UNTRAINED], "seeds": seeds, "data": ["stdlib"], **more}


EXPERIMENT = Experiment(
    name="nth-token",
    rule="a trunk helps where its gain over the untrained one, seed by seed, has an interval above 0; a token is "
    "foreseen where the interval of its bits per byte lies below those by frequency alone.",
    sizes={
        "smoke": _size((1, 4), 1, recipe=[*SMALL, "model.num_hidden_layers=3"], steps=3, probe_steps=2, windows=2),
        "cpu": _size((1, 2, 4, 8, 16, 128), 3, recipe=[], steps=600, probe_steps=300, windows=64),
        "gpu": _size(
            (1, 2, 4, 8, 16, 128), 2, steps=2000, probe_steps=1000, windows=256,
            recipe=LARGE,
        ),
    },
    run=run,
    summarise=summarise,
    tables=tables,
    draw=draw,
    intervals="Student's t intervals at 95 % over the seeds; gains are paired by seed.",
    notes="""\
The shipped recipe `demo` with one head and `loss.offsets = [k]`: the state at position t is scored against token t + k
alone. Then the embedding and the trunk (all blocks but the last) are frozen, and the last block, the final norm and the
unembedding begin anew and learn the next token with the same optimiser. `untrained` does the same on a trunk with its
first weights. All figures are of the same held-out windows.""",
)  # fmt: skip
