"""The training loop, visible from top to bottom.

A run has one folder: metrics.jsonl, checkpoint-STEP/ while it goes on, and at its end the checkpoint itself.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foretoken import optim
from foretoken.checkpoint import (
    STEP_PREFIX,
    Provenance,
    load_model,
    load_train_state,
    newest_step,
    prune,
    read_json,
    save_checkpoint,
)
from foretoken.config import Recipe, TrainConfig
from foretoken.data import Batch, Tokens, Windows, prepare
from foretoken.errors import CheckpointError, ConfigError, TrainingError
from foretoken.loss import (
    LossOutput,
    agreement,
    mtp_loss,
    predicted_tokens_per_step,
    scales,
    sequential_backward,
    targets,
    valid_counts,
)
from foretoken.model import Model
from foretoken.tokenizer import Tokenizer, from_config

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. checkpoint: the finished run's folder, or the newest checkpoint of one that was stopped."""

    checkpoint: Path
    step: int
    finished: bool
    seconds: float
    last: Record


def train(
    recipe: Recipe, out: str | Path, *, resume: bool = False, report: Callable[[Record], None] = lambda record: None
) -> TrainResult:
    """Train as `recipe` says into the folder `out`; every metrics record also goes to `report`.

    SIGINT and SIGTERM finish the step, save and return with `finished` false. `resume` continues from the newest
    checkpoint in `out`, on a CPU bit for bit as if never stopped. Raises ConfigError, DataError, CheckpointError, and
    TrainingError when a loss is not a number, naming the head and the step; what was saved before stays.
    """
    run, config = Path(out), recipe.train
    _check_folder(run, resume)
    device, autocast = _device(config), _autocast_dtype(config)
    tokenizer = from_config(recipe.tokenizer)
    model_config = recipe.model.resolve(tokenizer.vocab_size, config.seq_len)
    report({"kind": "prepare"})
    train_tokens, valid_tokens = (prepare(recipe.data, tokenizer, split) for split in ("train", "validation"))
    n = model_config.n_future
    batches = Windows(train_tokens, config.seq_len, n, config.batch_size, config.seed)
    run.mkdir(parents=True, exist_ok=True)
    prune(run, config.keep_checkpoints)

    start = newest_step(run) if resume else None
    if start is not None:
        _check_same_run(start, recipe, train_tokens)
        model = load_model(start, None, device).train()
    else:
        model = Model(model_config)
        model.init_weights(config.seed)
        model.to(device)
    optimizers = optim.make_optimizers(model, recipe.optim)
    step = 0
    if start is not None:
        load_train_state(start, model, optimizers)
        step = int(start.name.removeprefix(STEP_PREFIX))
    provenance = partial(Provenance, recipe.model_dump(mode="json"), train_tokens.fingerprint)
    report({"kind": "start", "step": step, "steps": config.steps, "parameters": sum(p.numel() for p in model.parameters())})

    log = _MetricsLog(run, step, recipe, report)
    tokens_per_byte = train_tokens.tokens_per_byte
    began, window_began, window_tokens = time.perf_counter(), time.perf_counter(), 0
    meter = _Meter(n, tokens_per_byte)
    first, last = step, Record()
    with _stop_signals() as stop:
        while step < config.steps and not stop:
            batch = _to(batches.batch(step), device)
            ratio = optim.learning_rate_ratio(step, config.steps, recipe.optim)
            optim.set_learning_rate(optimizers, ratio)
            weights = optim.head_weights(step, n, recipe.loss)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                for part, output, counts in _backward(model, batch, weights, recipe):
                    meter.add(part, output, counts)
            _check_finite(meter, step, run)
            norm = optim.clip_gradients(model, recipe.optim.clip)
            if not math.isfinite(norm):
                raise TrainingError(f"step {step}: the gradient's norm is {norm}; {_what_is_left(run)}")
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            window_tokens += batch.tokens.size(0) * config.seq_len

            if step % config.log_every == 0 or step == config.steps:
                now = time.perf_counter()
                rate = window_tokens / (now - window_began)
                left = (config.steps - step) * (now - began) / (step - first)
                timing = {"learning_rate": ratio * recipe.optim.lr, "gradient_norm": norm, "tokens_per_second": rate}
                last = meter.take("train", step) | timing | {"seconds": now - began, "seconds_left": left}
                log.write(last)
                window_began, window_tokens = time.perf_counter(), 0
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                last_validation = _validate(model, valid_tokens, recipe, autocast, step)
                log.write(last_validation)
            if step % config.save_every == 0 and step < config.steps:
                save_checkpoint(run / f"{STEP_PREFIX}{step}", model, tokenizer, provenance(step, last), optimizers)
                prune(run, config.keep_checkpoints)
    log.close()
    seconds = time.perf_counter() - began
    if step < config.steps:
        path = run / f"{STEP_PREFIX}{step}"
        if step > first and not path.exists():
            save_checkpoint(path, model, tokenizer, provenance(step, last), optimizers)
            prune(run, config.keep_checkpoints)
        return TrainResult(path, step, False, seconds, last)
    save_checkpoint(run, model, tokenizer, provenance(step, last_validation))
    prune(run, config.keep_checkpoints - 1)
    return TrainResult(run, step, True, seconds, last_validation)


def _backward(
    model: Model, batch: Batch, weights: list[float], recipe: Recipe
) -> Iterator[tuple[Batch, LossOutput, torch.Tensor]]:
    """Forward and backward of every micro-batch; each head's mean is over its targets in the whole batch."""
    n, T = model.config.n_future, recipe.train.seq_len
    across = recipe.loss.targets_across_documents
    labels = targets(batch.tokens, batch.document_ids, batch.label_mask, n, across_documents=across)
    factors = scales(weights, valid_counts(labels))
    size = recipe.train.micro_batch_size or batch.tokens.size(0)
    for start in range(0, batch.tokens.size(0), size):
        rows = slice(start, start + size)
        part = Batch(batch.tokens[rows], batch.document_ids[rows], batch.label_mask[rows])
        tokens = part.tokens[:, :T]
        documents = None if recipe.train.attention_across_documents else part.document_ids[:, :T]
        part_labels = labels[:, rows]
        if recipe.loss.method == "chunked":
            output = mtp_loss(model(tokens, documents), model.lm_head.weight, part_labels, factors)
            output.total.backward()  # type: ignore[no-untyped-call]
        else:
            context = model.context(T, documents)
            heads = [partial(model.run_head, context=context, depth=d) for d in range(n)]
            z = model.run_trunk(tokens, context)
            output = sequential_backward(z, heads, model.lm_head.weight, part_labels, factors)
        yield part, output, valid_counts(part_labels)


class _Meter:
    """Sums of what the loss passes report, until `take` makes a record of them."""

    def __init__(self, n: int, tokens_per_byte: float) -> None:
        self.n, self.tokens_per_byte = n, tokens_per_byte
        self.sums = {key: torch.zeros(n, dtype=torch.float64) for key in ("loss", "count", "correct", "agreed", "pairs")}
        self.accepted, self.positions = torch.zeros(n - 1), 0

    def add(self, batch: Batch, output: LossOutput, counts: torch.Tensor) -> None:
        agreed = agreement(output.predictions, batch.document_ids)
        new = {"loss": output.sums, "count": counts, "correct": output.correct, "agreed": agreed.agreed, "pairs": agreed.count}
        for key, value in new.items():
            self.sums[key] += value.cpu()
        self.accepted += agreed.accepted.cpu()
        self.positions += int(agreed.positions)

    def take(self, kind: str, step: int) -> Record:
        count, pairs = self.sums["count"].clamp(min=1), self.sums["pairs"].clamp(min=1)
        loss = self.sums["loss"] / count
        record = {
            "kind": kind,
            "step": step,
            "loss": loss.tolist(),
            "bits_per_byte": (loss / math.log(2) * self.tokens_per_byte).tolist(),
            "top1": (self.sums["correct"] / count).tolist(),
            "agreement": (self.sums["agreed"] / pairs).tolist(),
            "count": self.sums["count"].long().tolist(),
            "predicted_tokens_per_step": predicted_tokens_per_step(self.accepted, torch.tensor(self.positions)),
        }
        self.__init__(self.n, self.tokens_per_byte)  # type: ignore[misc]
        return record


@torch.no_grad()
def _validate(
    model: Model, tokens: Tokens, recipe: Recipe, autocast: torch.dtype | None, step: int
) -> Record:
    """Losses on the first `eval_windows` validation windows in a fixed order; the documents' whole text is `evaluate`'s."""
    n, config = model.config.n_future, recipe.train
    size = config.micro_batch_size or config.batch_size
    windows = Windows(tokens, config.seq_len, n, size, seed=0)
    meter = _Meter(n, tokens.tokens_per_byte)
    model.eval()
    for index in range(-(-min(config.eval_windows, windows.windows_per_epoch) // size)):
        batch = _to(windows.batch(index), model.device)
        labels = targets(batch.tokens, batch.document_ids, batch.label_mask, n, across_documents=recipe.loss.targets_across_documents)
        documents = None if config.attention_across_documents else batch.document_ids[:, : config.seq_len]
        with torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            hidden = model(batch.tokens[:, : config.seq_len], documents)
            output = mtp_loss(hidden, model.lm_head.weight, labels, torch.ones(n))
        meter.add(batch, output, valid_counts(labels))
    model.train()
    return meter.take("validation", step)


class _MetricsLog:
    """metrics.jsonl, and TensorBoard and Weights & Biases when the recipe asks for them."""

    def __init__(self, run: Path, step: int, recipe: Recipe, report: Callable[[Record], None]) -> None:
        path = run / "metrics.jsonl"
        if path.exists():  # a resumed run repeats the steps after its checkpoint
            kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")
        self.writers = [report, *_extra_writers(run, recipe)]

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for writer in self.writers:
            writer(record)

    def close(self) -> None:
        self.file.close()


def _extra_writers(run: Path, recipe: Recipe) -> list[Callable[[Record], None]]:
    writers: list[Callable[[Record], None]] = []
    if recipe.train.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("train.tensorboard needs: pip install 'foretoken[tensorboard]'") from None
        board = SummaryWriter(str(run))  # type: ignore[no-untyped-call]
        writers.append(lambda r: [board.add_scalar(k, v, r["step"]) for k, v in _flat(r).items()] and None)  # type: ignore[no-untyped-call, func-returns-value]
    if recipe.train.wandb_project:
        try:
            import wandb
        except ImportError:
            raise ConfigError("train.wandb_project needs: pip install 'foretoken[wandb]'") from None
        session = wandb.init(project=recipe.train.wandb_project, dir=str(run), config=recipe.model_dump(mode="json"))
        writers.append(lambda r: session.log(_flat(r), step=r["step"]))
    return writers


def _flat(record: Record) -> dict[str, float]:
    """Numbers of a record by name, a list's as name/head_1, name/head_2 and so on."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat |= {f"{record['kind']}/{key}/head_{i + 1}": v for i, v in enumerate(value)}
        elif isinstance(value, int | float) and key != "step":
            flat[f"{record['kind']}/{key}"] = value
    return flat


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that becomes non-empty on SIGINT or SIGTERM; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's business
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_folder(run: Path, resume: bool) -> None:
    if (run / "config.json").exists() and resume:
        raise ConfigError(f"{run}: this run is finished; nothing to resume")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run}: is a file; the run needs a folder")
    if not resume and run.is_dir() and any(run.iterdir()):
        raise ConfigError(f"{run}: is not empty; continue that run with --resume or choose another folder")


def _check_same_run(checkpoint: Path, recipe: Recipe, tokens: Tokens) -> None:
    stored = read_json(checkpoint / "foretoken.json")
    if not (checkpoint / "train_state").is_dir():
        raise CheckpointError(f"{checkpoint}: has no train_state, so training cannot continue from it")
    wanted = recipe.model_dump(mode="json")
    for section in ("model", "tokenizer", "data", "loss", "optim", "train"):
        old, new = (stored.get("recipe") or {}).get(section, {}), wanted[section]
        for key in new:
            if old.get(key) != new[key] and key not in ("cache_dir", "log_every", "save_every", "keep_checkpoints", "device"):
                raise ConfigError(
                    f"{checkpoint}: was trained with {section}.{key} = {old.get(key)}, the recipe says {new[key]}; "
                    f"resume with the same recipe"
                )
    if stored.get("data_fingerprint") != tokens.fingerprint:
        raise ConfigError(f"{checkpoint}: the data have changed since; resume needs the same documents")


def _check_finite(meter: _Meter, step: int, run: Path) -> None:
    for depth, value in enumerate(meter.sums["loss"].tolist()):
        if not math.isfinite(value):
            raise TrainingError(f"step {step}: the loss of head {depth + 1} is {value}; {_what_is_left(run)}")


def _what_is_left(run: Path) -> str:
    newest = newest_step(run)
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint had been saved yet"


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but this machine has no usable GPU; set train.device=cpu or auto")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """bfloat16 where the recipe asks for it or, with 'auto', where the hardware multiplies it fast."""
    if config.precision == "auto":
        return torch.bfloat16 if optim.fast_bfloat16(_device(config)) else None
    return torch.bfloat16 if config.precision == "bfloat16" else None


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in (batch.tokens, batch.document_ids, batch.label_mask)))
