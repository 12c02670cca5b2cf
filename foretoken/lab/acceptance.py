"""How many drafts three rules accept, at several temperatures: keyed noise, the heads' most likely tokens, rejection.

    python -m foretoken.lab.acceptance runs/head-kinds/parallel-3min-seed0 runs/head-kinds/sequential-3min-seed0

Held-out prompts of each checkpoint are continued at K = n - 1. "keyed" picks drafts with the noise of the target,
"argmax" takes each head's most likely token and accepts it where it is the target's own pick, "rejection" draws drafts
and accepts with min(1, p / q). Figures are tokens per step; the first two give plain decoding's text.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.bench import held_out_prompts
from foretoken.checkpoint import load_checkpoint
from foretoken.completion import Options, generate
from foretoken.display import Display
from foretoken.evaluate import evaluation_documents
from foretoken.files import write_json
from foretoken.model import Model, Stepper
from foretoken.sampling import Keys
from foretoken.tokenizer import Tokenizer

TEMPERATURES = (0.6, 0.8, 1.0)
RULES = ("keyed", "argmax", "rejection")
PROMPTS, MAX_TOKENS = 12, 200


@contextmanager
def likeliest_drafts() -> Iterator[None]:
    """Drafts are their heads' most likely tokens."""
    real = Keys.choose_drafts

    def choose(keys: Keys, logits: Tensor, first: int = 0, ranks: int = 1) -> Tensor:
        return logits.argmax(-1, keepdim=True)

    Keys.choose_drafts = choose  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Keys.choose_drafts = real  # type: ignore[method-assign]


def tokens_per_step(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], temperature: float, rule: str
) -> tuple[float, list[list[int]]]:
    """Committed tokens / steps over all prompts, and their ids."""
    options: Options = {
        "max_tokens": MAX_TOKENS, "temperature": temperature, "ignore_eos": True, "drafts": model.config.n_future - 1,
        "accept": "rejection" if rule == "rejection" else "keyed",
    }  # fmt: skip
    if rule == "argmax":
        with likeliest_drafts():
            found = generate(model, tokenizer, list(prompts), **options)
    else:
        found = generate(model, tokenizer, list(prompts), **options)
    steps = [step for generation in found for step in generation.steps]
    return sum(step.committed for step in steps) / len(steps), [generation.ids for generation in found]


def compare(folders: Sequence[Path], display: Display) -> dict[str, Any]:
    """All figures, as docs/results/acceptance.json holds them."""
    models: dict[str, Any] = {}
    for folder in folders:
        model, tokenizer = load_checkpoint(folder, "float32")
        model.use_stepper(Stepper(model, compiled=False))  # one way of drafting is not compiled: none is, then
        documents = list(evaluation_documents(folder))
        random.Random(0).shuffle(documents)
        prompts = held_out_prompts([document.text for document in documents], PROMPTS)
        rows: dict[str, Any] = {}
        for temperature in TEMPERATURES:
            display.say(f"{folder.name}, temperature {temperature:g}")
            found = {rule: tokens_per_step(model, tokenizer, prompts, temperature, rule) for rule in RULES}
            rows[f"{temperature:g}"] = {
                **{rule: figure for rule, (figure, _) in found.items()},
                "outputs_equal": found["keyed"][1] == found["argmax"][1],
            }
        models[folder.name] = {"head_kind": model.config.head_kind, "drafts": model.config.n_future - 1, "rows": rows}
    return {
        "command": f"python -m foretoken.lab.acceptance {' '.join(map(str, folders))}",
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "torch": torch.__version__,
        "models": models,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [f"| model | heads | K | T | {' | '.join(RULES)} |", f"| {' | '.join(['---'] * (4 + len(RULES)))} |"]
    for name, values in result["models"].items():
        for temperature, row in values["rows"].items():
            figures = " | ".join(f"{row[rule]:.2f}" for rule in RULES)
            lines.append(f"| {name} | {values['head_kind']} | {values['drafts']} | {temperature} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point of `python -m foretoken.lab.acceptance`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON")
    options = parser.parse_args()
    with Display() as display:
        result = compare(options.checkpoints, display)
    if options.out is not None:
        write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
