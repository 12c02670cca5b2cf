"""A training loop for tasks whose samples are made as they are needed: a batch is a function of the step alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foretoken import optim
from foretoken.config import OptimConfig
from foretoken.decode import decode
from foretoken.errors import TrainingError
from foretoken.formats.safetensors import FILE, read_file, save_tensors
from foretoken.lab.experiment import Figures
from foretoken.loss import IGNORE, mtp_loss, scales, targets, valid_counts
from foretoken.model import Model
from foretoken.request import Request
from foretoken.sampling import Sampling
from foretoken.train_state import load_train_state, training_tensors, write_train_state

MOST_TIES = 0.03
AHEAD = 4  # processes that make batches for a GPU

# What `targets` takes: tokens, document ids and label mask of windows, each (B, T + n).
Sample = tuple[Tensor, Tensor, Tensor]


def whole_sequences(tokens: Tensor, is_target: Tensor, n: int) -> Sample:
    """Sequences (B, S), each a document, and which of their tokens are targets, as windows (B, S - 1 + n)."""
    more = n - 1
    document_ids = torch.nn.functional.pad(torch.zeros_like(tokens), (0, more), value=-1)
    return (
        torch.nn.functional.pad(tokens, (0, more)),
        document_ids,
        torch.nn.functional.pad(is_target, (0, more), value=False),
    )


@torch.no_grad()
def answered(model: Model, tokens: Tensor, is_target: Tensor) -> Tensor:
    """Of sequences (B, S), whether head 1's first choice is right at every target, given the true text before it (B,).

    That is when greedy decoding from before the first target gives them all, where they stand in a row.
    """
    keep = is_target.size(1) - 1 - int(is_target[:, 1:].any(0).int().argmax())  # from the first target on
    tokens, wanted = tokens.to(model.device), is_target[:, -keep:].to(model.device)
    choices = model.logits(model(tokens[:, :-1], keep=keep)[0]).argmax(-1)
    right: Tensor = ((choices == tokens[:, -keep:]) | ~wanted).all(1).cpu()
    return right


def answered_by_decoding(model: Model, tokens: Tensor, is_target: Tensor) -> Tensor:
    """The same by the decode loop, (B,).

    Raises TrainingError where drafts change an answer, on a CPU, where none may, or where more than a few in a hundred
    differ from `answered`, which rounds differently and may part from it at near-ties.
    """
    rows = [
        (row[: wanted.index(True)], row[wanted.index(True) :][: sum(wanted)])
        for row, wanted in zip(tokens.tolist(), is_target.tolist(), strict=True)
    ]
    found = []
    for drafts in dict.fromkeys((0, model.config.n_future - 1)):
        requests = [Request(prompt, len(answer)) for prompt, answer in rows]
        for _ in decode(model, requests, Sampling(), drafts, slots=64):
            pass
        right = [request.ids == answer for request, (_, answer) in zip(requests, rows, strict=True)]
        found.append(torch.tensor(right))
    if model.device.type == "cpu" and not torch.equal(found[0], found[-1]):
        raise TrainingError("drafts changed what decoding answers")
    if float((found[0] != answered(model, tokens, is_target)).float().mean()) > MOST_TIES:
        raise TrainingError("decoding and scoring do not give the same answers")
    return found[0]


def fit(
    model: Model,
    sample: Callable[[int], Sample],
    steps: int,
    config: OptimConfig,
    folder: Path,
    *,
    check: Callable[[int], Figures] | None = None,
    check_every: int = 250,
    enough: Callable[[Figures], bool] = lambda figures: False,
    save_every: int = 500,
) -> list[Figures]:
    """Train on windows that are a function of the step; heads count equally, as in the paper.

    check: figures after every `check_every` steps and at the end, which are returned with the step and the heads'
    losses in nats; training ends early where they are `enough`. Parameters that need no gradient stay. What is saved
    in `folder` after every `save_every` steps lets a later call go on as if never stopped.
    """
    state = folder / "state"
    optimizers = optim.make_optimizers(model, config)
    history: list[Figures] = []
    begun = 0
    if state.exists():
        model.load_state_dict(read_file(state / FILE, None))
        saved = load_train_state(state, model, optimizers)
        begun, history = saved["step"], saved["history"]
    ended = bool(history) and (enough(history[-1]) or begun == steps)
    left = range(begun, steps if not ended else begun)
    for step, window in zip(left, batches(sample, left, model.device), strict=True):
        losses = _update(model, optimizers, window, step, steps, config)
        done = step + 1
        if check is not None and (done % check_every == 0 or done == steps):
            model.eval()
            history.append({"step": done, "losses": losses(), **check(done)})
            model.train()
        ended = done == steps or (bool(history) and history[-1]["step"] == done and enough(history[-1]))
        if ended or done % save_every == 0:
            _save(state, model, optimizers, done, history)
        if ended:
            break
    return history


def batches(sample: Callable[[int], Sample], steps: range, device: torch.device) -> Iterator[Sample]:
    """The batches of steps, in order; for a GPU, which is faster than Python makes them, by processes ahead of it."""
    if device.type == "cpu" or not steps:
        return map(sample, steps)
    workers = min(AHEAD, os.cpu_count() or 1)
    return iter(DataLoader(_Steps(sample, steps), None, num_workers=workers, pin_memory=torch.cuda.is_available()))


class _Steps(Dataset[Sample]):
    def __init__(self, sample: Callable[[int], Sample], steps: range) -> None:
        self.sample, self.steps = sample, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(self.steps[index])


def _update(
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    window: Sample,
    step: int,
    steps: int,
    config: OptimConfig,
) -> Callable[[], list[float]]:
    """One step; gives the heads' mean losses when they are asked for."""
    n = model.config.n_future
    labels = targets(*window, n)
    counts, tokens, length = valid_counts(labels), window[0], labels.size(2)
    keep = length - int((labels != IGNORE).flatten(0, 1).any(0).int().argmax())  # nothing is learnt before these
    labels = labels[..., -keep:]
    if model.device.type == "cuda":  # a step is asked for while the GPU still works on the last one
        tokens, labels = (part.pin_memory().to(model.device, non_blocking=True) for part in (tokens, labels))
    optim.set_learning_rate(optimizers, optim.learning_rate_ratio(step, steps, config))
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model(tokens, length=length, keep=keep)
        output = mtp_loss(hidden, model.unembeddings(), labels, scales([1.0] * n, counts))
    output.total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], config.clip)
    for optimizer in optimizers:
        optimizer.step()
    return lambda: (output.sums.cpu() / counts.clamp(min=1)).tolist()


def _save(path: Path, model: Model, optimizers: list[torch.optim.Optimizer], step: int, history: list[Figures]) -> None:
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / FILE, model.state_dict())
    write_train_state(partial, training_tensors(model, optimizers), {"step": step, "history": history})
    shutil.rmtree(path, ignore_errors=True)  # a kill before the next line makes the run begin anew
    os.rename(partial, path)
