"""The training loop, visible from top to bottom.

A run has one folder: metrics.jsonl, checkpoint-STEP/ while it goes on, and at its end the checkpoint itself.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from foretoken import metrics, optim, retrofit
from foretoken.checkpoint import STEP_PREFIX, newest_step, prune
from foretoken.config import ModelConfig, Recipe, TrainConfig
from foretoken.data import Split, Tokens, prepare
from foretoken.distil import distil_loss, teachable
from foretoken.errors import ConfigError, DataError, TrainingError
from foretoken.failure import explained
from foretoken.files import read_json
from foretoken.lora import check_lora
from foretoken.loss import LossOutput, mtp_loss, scales, sequential_backward, targets, valid_counts
from foretoken.metrics import Meter, MetricsLog, Record
from foretoken.model import Model
from foretoken.packing import restarted_positions
from foretoken.parallel import ALONE, World, hand_out, head_by_head, join_world, shard, spread_again
from foretoken.provenance import Provenance
from foretoken.run_folder import check_folder, check_same_run, offering_older
from foretoken.saver import Saver
from foretoken.tokenizer import Tokenizer, from_config
from foretoken.train_state import load_train_state
from foretoken.windows import Batch, Windows


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

    Started by torchrun or SLURM in several processes, they train it together, and the first one writes and reports.
    SIGINT and SIGTERM finish the step, save and return with `finished` false. `resume` continues from the newest
    checkpoint in `out`, on a CPU bit for bit as if never stopped. Raises ConfigError, DataError, CheckpointError, and
    TrainingError when a loss or a gradient is not a number, naming the head and the step; what was saved before stays.
    """
    run, config = Path(out), recipe.train
    check_folder(run, resume)
    recipe = retrofit.with_its_heads(recipe)
    world = _join(recipe)
    report = report if world.first else lambda record: None
    model_config, tokenizer = _shape(recipe)
    report({"kind": "prepare"})
    batches, held_out = _data(recipe, tokenizer, world)
    start = newest_step(run) if resume else None
    meter = _meter(recipe, batches.tokens, world)
    with offering_older(start):
        if start is not None:
            check_same_run(start, recipe, batches.tokens)
        model, optimizers, step, last = _begin(start, recipe, model_config, world, meter)
    world.first_does(lambda: _make_folder(run, config))
    provenance = partial(Provenance, recipe.model_dump(mode="json"), batches.tokens.fingerprint)
    size = sum(p.numel() for p in model.parameters())
    report({"kind": "start", "step": step, "steps": config.steps, "parameters": size})
    began, first, spent, marked_step = time.perf_counter(), step, 0.0, step  # spent: in updates, since the last record
    log, saver = MetricsLog(run, step, recipe, report, not world.first), Saver(run, config, tokenizer, world)
    with explained(run, config, world), log, _stop_signals() as stop, saver:
        while True:
            before = time.perf_counter()
            norm = _update(model, optimizers, batches, step, recipe, meter, world)
            step, spent = step + 1, spent + time.perf_counter() - before
            finished, stopped = step == config.steps, world.any(bool(stop) or saver.failed)
            if finished or step % config.log_every == 0:
                now, per_step = time.perf_counter(), config.batch_size * config.seq_len
                last = meter.take("train", step) | {
                    "learning_rate": optim.learning_rate_ratio(step - 1, config.steps, recipe.optim) * recipe.optim.lr,
                    "gradient_norm": norm,
                    "tokens_per_second": (step - marked_step) * per_step / spent,
                    "seconds": now - began,
                    "seconds_left": (config.steps - step) * (now - began) / (step - first),
                }
                log.write(last)
                spent, marked_step = 0.0, step
            if finished or (config.eval_every and step % config.eval_every == 0):
                validation = _validate(model, held_out, recipe, step)
                log.write(validation)
            if finished:
                saver.finish(model, provenance(step, validation))
                retrofit.check_trained(run, model, recipe.model, config.seed, world)
                world.first_does(lambda: prune(run, config.keep_checkpoints - 1))
                return TrainResult(run, step, True, time.perf_counter() - began, validation)
            if stopped or step % config.save_every == 0:
                path = saver.save(step, model, provenance(step, last), optimizers, meter.state())
            if stopped:
                saver.wait()
                return TrainResult(path, step, False, time.perf_counter() - began, last)


def _join(recipe: Recipe) -> World:
    """The processes that train together, where what the recipe asks for is there."""
    metrics.check_extras(recipe.train)
    world = join_world(_device(recipe.train).type)
    if recipe.train.batch_size % world.size:
        raise ConfigError(f"batch_size = {recipe.train.batch_size} is not a multiple of the {world.size} processes")
    check_lora(recipe.model)
    return world


def _shape(recipe: Recipe) -> tuple[ModelConfig, Tokenizer]:
    """The model's shape and the tokenizer, from the recipe or from the checkpoint that it starts from."""
    if recipe.model.start_from is not None:
        return retrofit.starting_config(recipe.model, recipe.train.seq_len)
    tokenizer = from_config(recipe.tokenizer)
    return recipe.model.resolve(tokenizer.vocab_size, recipe.train.seq_len), tokenizer


def _begin(
    start: Path | None, recipe: Recipe, config: ModelConfig, world: World, meter: Meter
) -> tuple[Model, list[torch.optim.Optimizer], int, Record]:
    """Model, optimisers, step and last record: new, or as the checkpoint `start` holds them, with the meter's sums."""
    made = list[Model]()
    world.first_does(lambda: made.append(retrofit.make_model(start, recipe.model, config, recipe.train.seed)))
    model = made[0] if world.size == 1 else retrofit.outline(recipe.model, config, recipe.train.seed)
    _spread(model, recipe.train, world)
    if world.size > 1:
        hand_out(model, made, world)
    optimizers = optim.make_optimizers(model, recipe.optim)
    if start is None:
        return model, optimizers, 0, {}
    measured = load_train_state(start, model, optimizers)
    if world.first:  # it is the sum over all
        meter.restore(measured)
    last = read_json(start / "foretoken.json").get("metrics") or {}
    return model, optimizers, int(start.name.removeprefix(STEP_PREFIX)), last


def _spread(model: Model, config: TrainConfig, world: World) -> None:
    """Bring a model to where it is trained, compiled and shared among the processes as the recipe says."""
    if world.size == 1:  # sharding moves block by block: no process's device holds all of a model
        model.to(world.device)
    if config.compile == "on" or (config.compile == "auto" and world.device.type == "cuda"):
        model.compile_blocks()
    shard(model, world, config.shard_within)


def _make_folder(run: Path, config: TrainConfig) -> None:
    run.mkdir(parents=True, exist_ok=True)
    prune(run, config.keep_checkpoints)


def _data(recipe: Recipe, tokenizer: Tokenizer, world: World) -> tuple[Windows, Windows]:
    """The windows of both parts; the first process makes the tokens, the others read them."""
    found: list[Windows] = []

    def read() -> None:
        found[:] = (_windows(recipe, tokenizer, split, world.first) for split in ("train", "validation"))

    world.first_does(read)
    if not world.first:
        read()
    return found[0], found[1]


def _update(
    model: Model, optimizers: list[torch.optim.Optimizer], batches: Windows, step: int, recipe: Recipe, meter: Meter,
    world: World,
) -> float:  # fmt: skip
    """One step of training; returns the gradient's norm before clipping. A loss that is no number updates nothing."""
    batch = _to(batches.batch(step, world.rank, world.size), world.device)
    optim.set_learning_rate(optimizers, optim.learning_rate_ratio(step, recipe.train.steps, recipe.optim))
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    weights = optim.head_weights(step, recipe.train.steps, len(recipe.offsets), recipe.loss)
    with _autocast(model, recipe.train):
        for part, output, counts in _backward(model, batch, weights, recipe, world):
            meter.add(output, counts, part.document_ids)
    for depth, value in enumerate(world.total(meter.sums["loss"]).tolist()):
        if not math.isfinite(value):
            raise TrainingError(f"step {step + 1}: the loss of head {depth + 1} is {value}")
    norm = optim.clip_gradients(model, recipe.optim.clip)
    if not math.isfinite(norm):
        where = f", first in {place}" if (place := optim.not_finite(model)) else ""
        raise TrainingError(f"step {step + 1}: the gradient's norm is {norm}{where}")
    for optimizer in optimizers:
        optimizer.step()
    return norm


def _backward(
    model: Model, batch: Batch, weights: list[float], recipe: Recipe, world: World = ALONE
) -> Iterator[tuple[Batch, LossOutput, torch.Tensor]]:
    """Forward and backward of every micro-batch; each head's mean is over its targets in the whole batch."""
    n, T, terms = model.config.n_future, recipe.train.seq_len, recipe.loss
    labels = _targets(batch, recipe)
    # Heads 2..n learn from the data by its share; head 1 learns from nothing else.
    factors = scales([w * (terms.data if d else 1.0) for d, w in enumerate(weights)], world.total(valid_counts(labels)))
    taught = teachable(labels) if terms.distils else labels
    distil_factors = scales(weights, world.total(valid_counts(taught)))
    size = recipe.train.micro_batch_size or batch.tokens.size(0)
    for start in range(0, batch.tokens.size(0), size):
        rows = slice(start, start + size)
        part = Batch(batch.tokens[rows], batch.document_ids[rows], batch.label_mask[rows])
        (documents, positions), part_labels = _packed(part, recipe.train), labels[:, rows]
        if recipe.loss.method == "chunked":
            trained = recipe.loss.head_gradients
            hidden = model(part.tokens, documents, T, trained, positions) * (len(labels) // n)
            matrices = model.unembeddings() * (len(labels) // n)
            heads_learned = len(labels) if "unembedding" in trained else 1
            output = mtp_loss(hidden, matrices, part_labels, factors, weight_learns_from=heads_learned)
            total = output.total
            if terms.distils:
                total = total + distil_loss(
                    hidden, matrices, taught[:, rows], distil_factors, terms, weight_learns="unembedding" in trained
                )
            total.backward()  # type: ignore[no-untyped-call]
        else:
            context = model.context(T, documents, positions)
            heads = [partial(model.run_head, context=context, depth=d) for d in range(n)]
            z = model.run_trunk(part.tokens[:, :T], context)
            around = head_by_head(model) if z.requires_grad else None  # else no backward follows the heads'
            output = sequential_backward(z, heads, model.unembeddings(), part_labels, factors, around)
        yield part, output, valid_counts(part_labels)


def _targets(batch: Batch, recipe: Recipe) -> torch.Tensor:
    """Labels (heads or offsets, B, T)."""
    across, offsets = recipe.loss.targets_across_documents, recipe.offsets
    labels = targets(batch.tokens, batch.document_ids, batch.label_mask, offsets[-1], across_documents=across)
    return labels[[offset - 1 for offset in offsets]]


def _meter(recipe: Recipe, tokens: Tokens, world: World = ALONE) -> Meter:
    offsets, ratio = recipe.offsets, tokens.tokens_per_byte(recipe.loss.targets_across_documents)
    return Meter(len(offsets), ratio, offsets[-1] == len(offsets), world.total)


def _packed(batch: Batch, config: TrainConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Documents (B, T) inside which positions attend, and position ids (B, T); None for a window as one document."""
    documents = batch.document_ids[:, : config.seq_len]
    positions = restarted_positions(documents) if config.reset_position_ids else None
    return None if config.attention_across_documents else documents, positions


@torch.no_grad()
def _validate(model: Model, held_out: Windows, recipe: Recipe, step: int) -> Record:
    """Losses on the first `eval_windows` validation windows, always the same; whole documents are `evaluate`'s."""
    meter, wanted = _meter(recipe, held_out.tokens), min(recipe.train.eval_windows, held_out.windows_per_epoch)
    model.eval()
    for first in range(0, wanted, held_out.batch_size):
        batch, left = held_out.batch(first // held_out.batch_size), wanted - first
        batch = Batch(batch.tokens[:left], batch.document_ids[:left], batch.label_mask[:left])
        batch = _to(batch, model.device)
        labels = _targets(batch, recipe)
        documents, positions = _packed(batch, recipe.train)
        with _autocast(model, recipe.train):
            hidden = model(batch.tokens, documents, recipe.train.seq_len, position_ids=positions)
            times = len(labels) // len(hidden)
            output = mtp_loss(hidden * times, model.unembeddings() * times, labels, torch.ones(len(labels)))
        meter.add(output, valid_counts(labels), batch.document_ids)
    spread_again(model)
    model.train()
    return meter.take("validation", step)


def _windows(recipe: Recipe, tokenizer: Tokenizer, split: Split, verify: bool = True) -> Windows:
    """The windows of a split; those of validation come in an order that is no part of the run's seed."""
    config, n = recipe.train, recipe.offsets[-1]
    tokens = prepare(recipe.data, tokenizer, split, verify=verify)
    try:
        if split == "train":
            return Windows(tokens, config.seq_len, n, config.batch_size, config.seed)
        return Windows(tokens, config.seq_len, n, config.micro_batch_size or config.batch_size, seed=0)
    except DataError as error:
        raise DataError(f"{split} split: {error}; give more text or lower train.seq_len") from None


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


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but this machine has no usable GPU; set train.device=cpu or auto")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _autocast(model: Model, config: TrainConfig) -> torch.autocast:
    """bfloat16 where the recipe asks for it or, with 'auto', where the hardware multiplies it fast."""
    wanted = config.precision == "bfloat16" or (config.precision == "auto" and optim.fast_bfloat16(model.device))
    return torch.autocast(model.device.type, torch.bfloat16, enabled=wanted)


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    parts = (batch.tokens, batch.document_ids, batch.label_mask)
    return Batch(*(part.pin_memory().to(device, non_blocking=True) for part in parts))
