"""A byte model that engines load, trained in seconds: `python tests/tiny_engine_model.py OUT`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from foretoken.recipe import load_recipe
from foretoken.tokenizer import byte_tokenizer
from foretoken.train import train

PROMPTS = ("def add", "import ", "class Point:\n    def ", "for i in range(", "    return self.", "if x == ")
TOKENS = 64


def write_text(folder: Path) -> None:
    """Code that is easy to learn and does not loop at once."""
    folder.mkdir(parents=True)
    verbs, nouns = ("add", "read", "find", "sort", "move"), ("point", "line", "name", "index", "value", "item")
    for i in range(24):
        parts = ["import os\nimport sys\n"]
        for j in range(10):
            verb, noun = verbs[(i + j) % 5], nouns[(i * 3 + j) % 6]
            parts.append(
                f"def {verb}_{noun}(self, {noun}):\n    for i in range({(i + j) % 9}):\n        if x == {j}:\n"
                f"            return self.{noun}s[i] + {noun}\n    return {noun}\n"
            )
            parts.append(f"class {noun.title()}:\n    def __init__(self, {noun}):\n        self.{noun} = {noun}\n")
        (folder / f"{i}.py").write_text("\n".join(parts))


def make(out: Path, head_kind: str, steps: int = 150, more: Sequence[str] = ()) -> Path:
    """Train into `out`, with `more` overrides of the recipe, and return it."""
    with tempfile.TemporaryDirectory() as scratch:
        write_text(Path(scratch) / "text")
        overrides = (
            f'data.source=["{scratch}/text"]', f"data.cache_dir={scratch}/cache", f"model.head_kind={head_kind}",
            "model.hidden_size=64", "model.num_attention_heads=4", "model.num_key_value_heads=2",
            "model.num_hidden_layers=4", "model.n_future=4", "model.max_position_embeddings=256",
            "train.seq_len=96", "train.batch_size=8", f"train.steps={steps}", "train.precision=float32",
            "train.log_every=50", "train.save_every=100000", "train.eval_windows=8", "optim.lr=6e-3", *more,
        )  # fmt: skip
        train(load_recipe("tiny", overrides), out)
    return out


def prompt_ids() -> list[list[int]]:
    """The prompts, each behind <|bos|>."""
    return [byte_tokenizer().encode(prompt, add_special_tokens=True) for prompt in PROMPTS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head-kind", default="sequential", choices=("parallel", "sequential"))
    options = parser.parse_args()
    make(options.out, options.head_kind)
