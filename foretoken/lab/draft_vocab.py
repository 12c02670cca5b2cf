"""What drafts among the first M tokens of a vocabulary lose: how much of a text these are, and tokens per step.

    python -m foretoken.lab.draft_vocab --data python_code.jsonl.gz --data novels.jsonl.gz --split-field split

A byte-pair encoding of `--vocab-size` tokens is learned from the training documents of all data. Of each one's held-out
tokens: the share with an id below M, and the same of those alone that the two tokens before them foretell, as what
followed these most often in the training documents, since drafts that are right are such tokens. With checkpoints, too:
held-out prompts are continued with n - 1 drafts among M tokens, greedy and at temperature 0.8.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.bench import SAMPLED_TEMPERATURE, held_out_prompts
from foretoken.checkpoint import load_checkpoint
from foretoken.completion import generate
from foretoken.config import DataConfig
from foretoken.display import Display
from foretoken.evaluate import evaluation_documents
from foretoken.files import write_json
from foretoken.sources import split_documents
from foretoken.tokenizer import Tokenizer, train_bpe

SIZES = (512, 1024, 2048, 4096, 8192, 16384)
PROMPTS, MAX_TOKENS = 24, 128


def encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> NDArray[np.int64]:
    """The ids of texts, one behind the other."""
    return np.concatenate([np.asarray(row, np.int64) for row in tokenizer.encode_batch(list(texts))])


def shares(ids: NDArray[np.int64], vocab_size: int) -> dict[str, float]:
    """Of ids, those below each of SIZES."""
    return {str(size): float((ids < size).mean()) for size in SIZES if size < vocab_size}


def foretold(train: NDArray[np.int64], held: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """Those of `held` that are what followed the two ids before them most often in `train`."""

    def pairs(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids[:-2] * vocab_size + ids[1:-1]

    triples, counts = np.unique(pairs(train) * vocab_size + train[2:], return_counts=True)
    triples = triples[np.argsort(counts, kind="stable")]
    order = np.argsort(triples // vocab_size, kind="stable")[::-1]  # of a pair the most frequent follower first
    known, first = np.unique(triples[order] // vocab_size, return_index=True)
    at = np.minimum(np.searchsorted(known, pairs(held)), len(known) - 1)
    right = (known[at] == pairs(held)) & (triples[order][first[at]] % vocab_size == held[2:])
    found: NDArray[np.int64] = held[2:][right]
    return found


def of_data(data: Sequence[str], split_field: str | None, vocab_size: int, display: Display) -> dict[str, Any]:
    """Shares by source, of a tokenizer that has learned from the training part of all."""
    parts: dict[str, dict[str, list[str]]] = {}
    for source in data:
        part = parts[Path(source).name] = {"train": [], "validation": []}
        for document, split in split_documents(DataConfig(source=(source,), split_field=split_field)):
            part[split].append(document.text)
    display.say(f"Learning {vocab_size} tokens")
    tokenizer = train_bpe((text for part in parts.values() for text in part["train"]), vocab_size)
    result: dict[str, Any] = {}
    for name, part in parts.items():
        train, held = encoded(tokenizer, part["train"]), encoded(tokenizer, part["validation"])
        found = foretold(train, held, vocab_size)
        result[name] = {
            "shares": shares(held, vocab_size),
            "foretold": len(found) / len(held),
            "shares_of_foretold": shares(found, vocab_size),
        }
    return result


def of_checkpoint(folder: Path, display: Display) -> dict[str, Any]:
    """Shares of the held-out documents, and tokens per step by temperature and size of the vocabulary of drafts."""
    model, tokenizer = load_checkpoint(folder)
    documents = list(evaluation_documents(folder))
    random.Random(0).shuffle(documents)
    texts = [document.text for document in documents]
    prompts, V = held_out_prompts(texts, PROMPTS), model.config.vocab_size
    drafts = model.config.n_future - 1
    result: dict[str, Any] = {
        "vocab_size": V, "head_kind": model.config.head_kind, "drafts": drafts,
        "shares": shares(encoded(tokenizer, texts), V),
    }  # fmt: skip
    for name, temperature in (("greedy", 0.0), ("sampled", SAMPLED_TEMPERATURE)):
        result[name], plain = {}, list[list[int]]()
        for size in (*(size for size in SIZES if size < V), V):
            display.say(f"{folder.name}, {name}, drafts among {size} tokens")
            found = generate(
                model, tokenizer, prompts, max_tokens=MAX_TOKENS, temperature=temperature, drafts=drafts,
                draft_vocab=size, ignore_eos=True,
            )  # fmt: skip
            plain = plain or [generation.ids for generation in found]
            assert plain == [generation.ids for generation in found], "drafts changed the output"
            steps = [step for generation in found for step in generation.steps]
            result[name][str(size)] = sum(step.committed for step in steps) / len(steps)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes = [str(size) for size in SIZES]
    lines: list[Sequence[str]] = [("", "V", *sizes, "all"), ("---",) * (len(sizes) + 3)]

    def line(name: str, V: int, values: dict[str, float], everything: float) -> None:
        shown = [f"{values[size]:.3f}" if size in values else "" for size in sizes]
        lines.append((name, str(V), *shown, f"{everything:.3f}"))

    for name, values in result["data"].items():
        line(f"{name}, share of tokens", result["vocab_size"], values["shares"], 1.0)
        line(f"{name}, share of those foretold", result["vocab_size"], values["shares_of_foretold"], 1.0)
    for name, model in result["models"].items():
        line(f"{name}, share of tokens", model["vocab_size"], model["shares"], 1.0)
        for how in ("greedy", "sampled"):
            everything = model[how][str(model["vocab_size"])]
            line(f"{name}, tokens per step, {how}", model["vocab_size"], model[how], everything)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m foretoken.lab.draft_vocab`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--split-field")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    options = parser.parse_args(arguments)
    named = [f"--data {Path(source).name}" for source in options.data]
    with Display() as display:
        result = {
            "command": " ".join(
                ["python -m foretoken.lab.draft_vocab", *map(str, options.checkpoints), *named]
                + ([f"--split-field {options.split_field}"] if options.split_field else [])
                + [f"--vocab-size {options.vocab_size}"]
            ),
            "vocab_size": options.vocab_size,
            "prompts": PROMPTS,
            "max_tokens": MAX_TOKENS,
            "data": of_data(options.data, options.split_field, options.vocab_size, display) if options.data else {},
            "models": {folder.name: of_checkpoint(folder, display) for folder in options.checkpoints},
        }
    if options.out is not None:
        write_json(options.out, result)
    print(table(result))


if __name__ == "__main__":
    main()
