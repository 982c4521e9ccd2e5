"""Collectives: what the processes of one run exchange. Alone, every exchange is nothing.

Each process makes the batches of the complete step and computes its own part of them, so a run on two GPUs is the run
of one GPU with twice the accumulation.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

T = TypeVar("T")

_TIMEOUT = timedelta(hours=24)  # while the main process encodes thousands of images; NCCL's own is ten minutes


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of a run's processes this is, and how many there are."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def shard(self, values: Sequence[T]) -> list[T]:
        """Return this process's part of a step's batches."""
        return list(values[self.rank :: self.world_size])


SINGLE_PROCESS = Ranks()


def init() -> Ranks:
    """Meet the other processes, if whoever started this one says that there are any (as `accelerate launch` does)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
    return Ranks(state.process_index, state.num_processes)


def destroy(ranks: Ranks) -> None:
    """Part from the other processes."""
    if ranks.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End a process of a run on several GPUs, once all is written, without tearing its libraries down.

    One such process was seen to abort after a complete run ("terminate called without an active exception"), which a
    thread that still runs causes at the interpreter's end. The finished run then counted as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def all_reduce_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter | Tensor]) -> None:
    """Make each parameter's gradient the sum of all processes'; none where none of them has one."""
    if ranks.world_size == 1:
        return
    device = next(parameter.device for parameter in parameters)
    has = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
    dist.all_reduce(has)
    shared = [parameter for parameter, count in zip(parameters, has.tolist(), strict=True) if count]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    flat = torch.cat([grad.to(device).flatten() for grad in grads])  # one exchange for all
    dist.all_reduce(flat)
    for parameter, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.device, copy=True)


def all_gather_losses(ranks: Ranks, losses: Tensor) -> Tensor:
    """Return every process's losses of a step [n, ...], in the order of their batches [n * world_size, ...]."""
    if ranks.world_size == 1:
        return losses
    every = [torch.empty_like(losses) for _ in range(ranks.world_size)]
    dist.all_gather(every, losses.contiguous())
    return torch.stack(every, dim=1).flatten(0, 1)


def broadcast(ranks: Ranks, value: T) -> T:
    """Return the main process's value, on all of them."""
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_min(ranks: Ranks, value: float) -> float:
    """Return the smallest of all processes' values."""
    if ranks.world_size == 1:
        return value
    every: list[float] = [0.0] * ranks.world_size
    dist.all_gather_object(every, value)
    return min(every)


@contextmanager
def main_process_first(ranks: Ranks) -> Iterator[None]:
    """Let the others wait until the main process is through: then they find in the cache what it has encoded."""
    if not ranks.is_main:
        dist.barrier()
    try:
        yield
    finally:
        if ranks.is_main and ranks.world_size > 1:
            dist.barrier()
