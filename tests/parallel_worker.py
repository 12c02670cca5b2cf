"""One of several processes that train together, for test_parallel: python parallel_worker.py TASK ..."""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from small_runs import recipe
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from foretoken import checkpoint
from foretoken import train as training
from foretoken.checkpoint import newest_step
from foretoken.config import ModelConfig, OptimConfig
from foretoken.loss import mtp_loss, scales, sequential_backward, targets, valid_counts
from foretoken.metrics import Meter
from foretoken.model import Model
from foretoken.optim import clip_gradients, make_optimizers, not_finite
from foretoken.parallel import World, head_by_head, join_world, leave_world, shard, whole
from foretoken.retrofit import freeze
from foretoken.train import train


def gradients(within: int, kind: str, unembedding: str = "shared", method: str = "chunked", frozen: str = "") -> None:
    """Each process's loss, gradients and updates beside those of one process on the whole batch."""
    world = join_world("cpu")
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 17, (8, 16), generator=g)
    documents = (torch.rand(8, 16, generator=g) < 0.15).long().cumsum(1)  # so that counts differ between processes
    mask = torch.rand(8, 16, generator=g) < 0.7

    def run(model: Model, rows: slice, group: World | None) -> dict[str, torch.Tensor]:
        labels = targets(tokens, documents, mask, 4)[:, rows]
        counts = valid_counts(labels)
        factors = scales([1.0, 0.5, 0.25, 2.0], counts if group is None else group.total(counts))
        if method == "sequential":
            total = torch.zeros((), dtype=torch.float64)
            for half in (slice(0, len(labels[0]) // 2), slice(len(labels[0]) // 2, None)):  # as micro-batches
                context = model.context(12)
                heads = [partial(model.run_head, context=context, depth=depth) for depth in range(4)]
                z = model.run_trunk(tokens[rows][half, :12], context)
                weights, some = model.unembeddings(), labels[:, half]
                around = head_by_head(model) if z.requires_grad else None
                total += sequential_backward(z, heads, weights, some, factors, around).total
        else:
            total = mtp_loss(model(tokens[rows], length=12), model.unembeddings(), labels, factors).total
            total.backward()
        total = total.detach() if group is None else group.total(total.detach())
        found = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        return {**found, "loss": total}

    fields: dict[str, Any] = {
        "head_kind": kind,
        "unembedding": unembedding,
        "dtype": torch.float64,
        "peaked": False,
    }
    alone, model = (tiny_model(**fields) for _ in range(2))
    if frozen:
        freeze(alone)
        freeze(model)
    wanted = run(alone, slice(0, 8), None)
    shard(model, world, within)
    share = 8 // world.size
    found = run(model, slice(world.rank * share, (world.rank + 1) * share), world)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-12), f"{name}: {float((found[name] - value).abs().max())}"
    assert clip_gradients(model, 0.1) == pytest.approx(clip_gradients(alone, 0.1))
    for one in (alone, model):  # Muon for matrices in blocks, AdamW for the rest
        for optimizer in make_optimizers(one, OptimConfig(name="muon")):
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(whole(p), q, atol=1e-6), f"{name} after a step"
    assert not_finite(model) is None
    for grad in (p.grad for part in (model.trunk, model.heads[1]) for p in part.parameters()):
        if world.rank % (within or world.size) == 1 and isinstance(grad, DTensor):  # in one part alone
            grad.to_local().fill_(float("nan"))
    assert not_finite(model) == ("head 2" if kind == "parallel" else "heads 2 to 4")


def start(corpus: str) -> None:
    """The memory that the beginning of a run takes: a whole model in the first process alone."""
    world = join_world("cpu")

    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    def begun(config: ModelConfig) -> Model:
        return training._begin(None, recipe(Path(corpus)), config, world, Meter(4, 1.0, True, world.total))[0]

    def check(model: Model) -> None:
        wanted = Model(model.config)
        wanted.init_weights(recipe(Path(corpus)).train.seed)
        for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(whole(p), q), name

    kinds: dict[str, Any] = {"head_kind": "deepseek", "shared_block": True}
    for fields in ({"tie_word_embeddings": True}, {"unembedding": "per_head"}, {"head_kind": "sequential"}, kinds):
        model = begun(tiny_config(**fields))
        assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tie_word_embeddings
        check(model)
    config, before = tiny_config(width=768, layers=6), memory("VmRSS:")
    model = begun(config)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert size > 150e6
    took, part = (memory("VmHWM:") - before) / size, 1 / world.size
    assert took > 1 if world.first else part < took < part + 0.2, f"process {world.rank}: {took:.2f} models of {size}"
    check(model)


def one_at_a_time() -> None:
    """Fail where a checkpoint's next tensor is gathered while the one before it is still held."""
    real, held = checkpoint.whole, list[StorageWeakRef]()

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        end = time.monotonic() + 5.0
        while held and not held[-1].expired():  # a thread of gloo's may still let go of it
            assert time.monotonic() < end, "another tensor is held whole"
            time.sleep(0.001)
        full = real(tensor)
        if isinstance(tensor, DTensor):
            held.append(StorageWeakRef(full.untyped_storage()))
        return full

    checkpoint.whole = gathered
    atexit.register(lambda: print(f"{len(held)} gathered", file=sys.stderr))


def no_room(tensor: torch.Tensor) -> torch.Tensor:
    raise MemoryError


def run(corpus: str, out: str, resume: str, stop: str, more: list[str]) -> None:
    """A training run; stop: "" or, as "interrupt 3", what happens after so many steps of this process's.

    interrupt: in all; kill, term, nan, memory (torch's own error in the next forward): to the second; full: no file of
    the first may grow beyond 20,000 bytes any more; lost: the first has no memory for a tensor that the others wait to
    give; gathered: each tensor of a checkpoint is let go of before the next.
    """
    how, _, after = stop.partition(" ")
    real, steps = training._update, []

    def update(*args: Any) -> float:
        norm = real(*args)
        steps.append(norm)
        if how and len(steps) == int(after):
            if how == "interrupt":
                raise KeyboardInterrupt
            if how == "kill" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "term" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            if how == "nan" and os.environ["RANK"] == "1":
                with torch.no_grad():
                    args[0].norm.weight.mul_(float("nan"))
            if how == "memory" and os.environ["RANK"] == "1":
                while newest_step(Path(out)) is None:  # which the first one is writing
                    time.sleep(0.01)
                training.mtp_loss = lambda *arguments, **options: torch.empty(2**60)
            if how == "lost" and os.environ["RANK"] == "0":
                checkpoint.whole = no_room
            if how == "full" and os.environ["RANK"] == "0":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return norm

    if how == "gathered":
        one_at_a_time()
    training._update = update
    try:
        result = train(recipe(Path(corpus), *more), out, resume=resume == "resume")
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"finished": result.finished, "step": result.step, "last": result.last}))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        if sys.argv[1] == "gradients":
            gradients(int(sys.argv[2]), *sys.argv[3].split())
        elif sys.argv[1] == "start":
            start(sys.argv[2])
        else:
            run(*sys.argv[2:6], sys.argv[6:])
    finally:
        leave_world()
