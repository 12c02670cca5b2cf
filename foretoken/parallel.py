"""Training on several processes: each takes its rows of every batch, and a part of every parameter (FSDP2).

`torchrun` or SLURM start the processes; one alone is a world of one, for which nothing here does anything. A sharded
parameter is a DTensor of the whole one's shape: `whole` gathers it, `like` takes this process's part.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from foretoken.errors import ConfigError, TrainingError
from foretoken.model import Model


@dataclass(frozen=True)
class World:
    """This process among `size`, where it computes, and a store of names and values that all of them see."""

    rank: int
    size: int
    device: torch.device
    store: Any = None  # torch.distributed's

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' tensors, such as each head's count."""
        if self.size == 1:
            return values
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def any(self, here: bool) -> bool:
        """Whether it holds in some process."""
        return here if self.size == 1 else bool(self.total(torch.tensor(int(here))) > 0)

    def told(self, number: int) -> int:
        """The first process's number, in all of them."""
        if self.size == 1:
            return number
        known = torch.tensor(number, device=self.device)
        dist.broadcast(known, 0)
        return int(known)

    def first_does(self, task: Callable[[], object]) -> None:
        """Do a task in the first process; the others wait. What fails there fails in all."""
        error: Exception | None = None
        if self.first:
            try:
                task()
            except Exception as caught:  # told to the others, who would wait for ever
                error = caught
        self.all_raise(error)

    def all_raise(self, error: Exception | None) -> None:
        """End all processes where the first one has an error."""
        if self.any(error is not None):
            raise error or TrainingError("the first process has failed; see its error")


def first_process() -> bool:
    """Whether this process is the first of those that were started together, or alone."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


ALONE = World(0, 1, torch.device("cpu"))


def join_world(device: str) -> World:
    """Take part in the processes that were started together; device: cpu or cuda.

    Reads what torchrun sets, or SLURM: rank, number of processes, place among those of a machine, first one's address.
    Raises ConfigError for several tasks of one srun without that address: each would train alone, all in one folder.
    """
    from_slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if "RANK" not in os.environ and "MASTER_ADDR" not in os.environ:
        if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
            raise ConfigError(f"srun starts {tasks} tasks, but MASTER_ADDR is not set; export the first node's name")
    elif "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in from_slurm.items()})
        os.environ.setdefault("MASTER_PORT", "29500")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, torch.device(device))
    here = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(here)
    store = None
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        backend, wait = "nccl" if device == "cuda" else "gloo", timedelta(minutes=30)  # while the first makes a model
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    return World(dist.get_rank(), size, here, store)


def shard(model: Model, world: World, within: int) -> None:
    """Spread a model's parameters over the processes, block by block; gradients are summed, not averaged.

    within: over so many processes, and whole copies beside each other (hybrid sharding); 0: over all of them.
    """
    if world.size == 1:
        return
    part = within or world.size
    if world.size % part:
        raise ConfigError(f"train.shard_within = {part} does not divide the {world.size} processes")
    shape, names = (
        ((world.size,), ("shard",)) if part == world.size else ((world.size // part, part), ("copy", "shard"))
    )
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    # A block that runs once for each depth would have its gradients reduced after the first of them.
    again = model.config.sequential or model.config.shared_block
    for block in (*model.trunk, *(list(model.heads)[:1] if again else model.heads)):
        fully_shard(block, mesh=mesh)
    # The rest, embedding, final norm and unembedding, stays gathered from the forward to the loss and its backward.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for way in ("run_trunk", "run_head"):
        register_fsdp_forward_method(model, way)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def hand_out(model: Model, made: list[Model], world: World) -> None:
    """Give a sharded model the weights of the one that the first process has made, which is let go of.

    Tensor by tensor: no other process ever holds more than one of them whole.
    """
    weights = dict(made.pop().named_parameters()) if made else {}
    for name, p in model.named_parameters():
        value = weights.pop(name) if world.first else torch.empty(p.shape, dtype=p.dtype, device=world.device)
        value = value.detach().to(world.device, p.dtype)
        dist.broadcast(value, 0)
        p.copy_(like(value, p))
    assert not weights, "a model of other parts was made"


@contextmanager
def head_by_head(model: Model) -> Iterator[None]:
    """Around the heads' backwards, which the trunk's follows: what the heads share stays gathered, and its gradients
    are summed over the processes once, with the trunk's; a head's own are at the end of its backward."""

    def last(value: bool) -> None:
        if isinstance(model, FSDPModule):
            model.set_is_last_backward(value)
            model.set_requires_gradient_sync(value, recurse=False)
            model.set_reshard_after_backward(value, recurse=False)

    last(False)
    try:
        yield
    finally:
        last(True)


def spread_again(model: Model) -> None:
    """Let go of what a forward without a backward gathered: parameters are those that the optimisers hold again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's all, in every process; all of them must ask. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor, which lies in every process, where `other` is sharded."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def leave_world() -> None:
    """End what `join_world` began, if anything; at once where an error is on its way, which must be told before
    the launcher ends this process for another's."""
    # A thread of gloo's lets go of a collective's tensors after the collective, for which it needs the interpreter's
    # lock; one that asks for it when the interpreter is ending aborts the process. Nothing in torch waits for these
    # threads (a group lives on in DTensor's caches), so the lock is given up here for a time far beyond what they take.
    if dist.is_available() and dist.is_initialized():
        threads = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if threads and sys.exc_info()[0] is None:
            time.sleep(0.25)
