"""What the experiments on text share: a recipe trained by `train`, held-out text scored, and its prompts decoded."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.bench import PROMPT_BYTES, SAMPLED_TEMPERATURE, Way, compare, held_out_prompts
from foretoken.checkpoint import load_checkpoint
from foretoken.config import DataConfig, Recipe
from foretoken.data import prepare
from foretoken.display import Display
from foretoken.errors import DataError
from foretoken.evaluate import evaluate, evaluation_documents
from foretoken.files import read_json, write_json
from foretoken.lab.experiment import Figures, Settings
from foretoken.lab.head_kinds import step_seconds
from foretoken.loss import mtp_loss, targets, valid_counts
from foretoken.model import Model, Stepper
from foretoken.recipe import load_recipe
from foretoken.sources import Document, split_documents
from foretoken.tokenizer import Tokenizer, train_bpe
from foretoken.train import train
from foretoken.windows import Batch, Windows

# What makes the recipe `demo` a matter of seconds; and one for a GPU.
SMALL = [
    "model.hidden_size=32", "model.num_attention_heads=2", "train.batch_size=2", "train.seq_len=64",
    "train.eval_windows=2", "train.precision=float32", "data.validation_fraction=0.4",
    "model.max_position_embeddings=256",
]  # fmt: skip
LARGE = [
    "model.hidden_size=512", "model.num_attention_heads=8", "train.batch_size=32", "train.seq_len=1024",
    "optim.lr=1e-2", "optim.muon_lr=0.02",
]  # fmt: skip


def recipe_of(settings: Settings, overrides: Sequence[str], seed: int, steps: int, device: str) -> Recipe:
    """The shipped recipe `demo` with what the settings (`data`, `split_field`, `recipe`) and an arm change."""
    given = [f"data.source={json.dumps(settings['data'])}", *settings["recipe"], *overrides]
    if settings.get("split_field"):
        given.append(f"data.split_field={settings['split_field']}")
    given += [f"train.seed={seed}", f"train.steps={steps}", f"train.device={device}", "train.eval_every=0"]
    return load_recipe("demo", tuple(given))


def train_bpe_once(folder: Path, data: DataConfig, vocab_size: int) -> None:
    """Save a BPE of the training part of `data`, where the folder has none yet."""
    if not (folder / "tokenizer.json").exists():
        texts = (document.text for document, part in split_documents(data) if part == "train")
        train_bpe(texts, vocab_size).save(folder)


def tokens_of(folder: Path) -> list[str]:
    """The overrides of a recipe that takes the tokenizer in a folder."""
    return ["tokenizer.kind=file", f"tokenizer.path={json.dumps(str(folder))}"]


def train_or_resume(recipe: Recipe, folder: Path, report: Callable[[str], None]) -> None:
    """Train into `folder` what is not there yet. Raises KeyboardInterrupt where it is stopped (it is saved)."""
    if (folder / "config.json").exists():
        return

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            report(f"{folder.parent.name}: step {record['step']} of {recipe.train.steps}")

    if not train(recipe, folder, resume=folder.exists(), report=show).finished:
        raise KeyboardInterrupt


def steps_in(minutes: float, recipes: dict[str, Recipe], path: Path) -> dict[str, int]:
    """How many steps of each arm's recipe fit, by some timed in rounds, once: `path` keeps them."""
    seconds: dict[str, float] = read_json(path) if path.exists() else {}
    if missing := {arm: recipe for arm, recipe in recipes.items() if arm not in seconds}:
        timed: dict[str, list[float]] = {arm: [] for arm in missing}
        for _ in range(2):  # in turn, so that all meet the same machine
            for arm, recipe in missing.items():
                short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 10})})
                timed[arm] += step_seconds(short)[3:]
        seconds |= {arm: statistics.median(values) for arm, values in timed.items()}
        write_json(path, seconds)
    return {arm: max(2, round(60 * minutes / seconds[arm])) for arm in recipes}


def windows_of(recipe: Recipe, tokenizer: Tokenizer, split: Any, ahead: int, seed: int = 0) -> Windows:
    """The windows of a split as training cuts them, with `ahead` tokens behind the positions."""
    tokens = prepare(recipe.data, tokenizer, split)
    return Windows(tokens, recipe.train.seq_len, ahead, recipe.train.batch_size, seed)


@torch.no_grad()
def bits_at(model: Model, held_out: Windows, offset: int, count: int) -> float:
    """Bits per byte of head 1 for the token `offset` further on, on the first `count` windows."""
    nats, number = 0.0, 0
    for index in range(-(-min(count, held_out.windows_per_epoch) // held_out.batch_size)):
        batch = on(held_out.batch(index), model.device)
        labels = targets(batch.tokens, batch.document_ids, batch.label_mask, held_out.n_future)[offset - 1 : offset]
        hidden = model(batch.tokens, length=held_out.seq_len)[:1]
        nats += float(mtp_loss(hidden, model.lm_head.weight, labels, torch.ones(1)).sums)
        number += int(valid_counts(labels))
    return nats / number / math.log(2) * held_out.tokens.tokens_per_byte()


def on(batch: Batch, device: torch.device) -> Batch:
    """A batch where the model is."""
    return Batch(batch.tokens.to(device), batch.document_ids.to(device), batch.label_mask.to(device))


def unigram_bits(recipe: Recipe, tokenizer: Tokenizer, most: int = 4_000_000) -> float:
    """Bits per byte of held-out tokens by how often each stands in the training part."""
    counts = torch.ones(tokenizer.vocab_size)
    train_tokens = prepare(recipe.data, tokenizer, "train")
    counts += _counts(torch.from_numpy(train_tokens.read(0, min(most, train_tokens.total))), tokenizer)
    held_out = prepare(recipe.data, tokenizer, "validation")
    seen = _counts(torch.from_numpy(held_out.read(0, min(most, held_out.total))), tokenizer)
    nats = -(seen * (counts / counts.sum()).log()).sum() / seen.sum()
    return float(nats) / math.log(2) * held_out.tokens_per_byte(across_documents=True)  # of all tokens, bos too


def _counts(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    return torch.bincount(tokens, minlength=tokenizer.vocab_size).float()


def documents_of(folder: Path) -> list[Document]:
    """Held-out documents of a run in an order of their own."""
    documents = list(evaluation_documents(folder))
    random.Random(0).shuffle(documents)
    return documents


def prompts_of(folder: Path, count: int) -> list[str]:
    """Beginnings of lines in held-out documents. Raises DataError where none is long enough."""
    texts = [document.text for document in documents_of(folder)]
    if all(len(text) <= 4 * PROMPT_BYTES for text in texts):
        raise DataError(f"{folder}: no held-out document has the {4 * PROMPT_BYTES} characters that prompts need")
    return held_out_prompts(texts, count)


def scored(folder: Path, max_bytes: int) -> Figures:
    """Bits per byte of head 1 and tokens per step along held-out text."""
    model, tokenizer = load_checkpoint(folder, "float32")
    values = evaluate(model, documents_of(folder), tokenizer, max_bytes=max_bytes)
    return {"bits_per_byte": values.heads[0].bits_per_byte, "along_text": values.predicted_tokens_per_step}


def decoded(folder: Path, drafts: Sequence[int | None], settings: Settings, device: str = "cpu") -> Figures:
    """Held-out prompts continued plainly and with so many drafts (None: as many as pay), timed in turn.

    In compiled steps, unless the settings say `compiled = False`.
    By temperature, "greedy" and "sampled", and by "3 drafts" and the like. Decode with nothing beside it.
    """
    model, tokenizer = load_checkpoint(folder, settings.get("decode_dtype", "float32"), device)
    if not settings.get("compiled", True):
        model.use_stepper(Stepper(model, compiled=False))
    prompts = prompts_of(folder, settings["prompts"])
    ways = [Way(k) for k in drafts]
    found: Figures = {}
    with Display(quiet_text=True) as display:
        for name, temperature in (("greedy", 0.0), ("sampled", SAMPLED_TEMPERATURE)):
            runs = compare(model, tokenizer, prompts, temperature, settings["max_tokens"], 0, display, ways)
            found[name] = {way.name: comparison.figures() for way, comparison in runs.items()}
    return found
