"""One run on several cards: a process for each, which share the micro-batches of a step and add up their gradients.

Owns the processes, what they exchange, and their common end; must not know losses or models. Each process draws the
whole step and computes its own part of it, so a run on two cards is the run of one card with twice the accumulation.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from lora_utils.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

_POLL_S = 0.05
_PATIENCE = timedelta(hours=24)  # while the first process encodes thousands of pictures; NCCL's own are ten minutes
ERROR_MARK = "error: "  # in front of what a command says was wrong


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of the processes this is. Alone, every exchange is nothing."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, values: Sequence[T]) -> list[T]:
        """This process's of a step's micro-batches."""
        return list(values[self.rank :: self.count])


ALONE = Ranks()


def join() -> Ranks:
    """Meet the other processes, if whoever started this one says that there are any (as `accelerate launch` does)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return Ranks(state.process_index, state.num_processes)


def leave(ranks: Ranks) -> None:
    if ranks.count > 1 and dist.is_initialized():
        dist.destroy_process_group()


def add_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter | Tensor]) -> None:
    """Let each parameter's gradient be the sum of all processes'; none where none of them has one."""
    if ranks.count == 1:
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


def gather_losses(ranks: Ranks, losses: Tensor) -> Tensor:
    """Every process's losses of a step [n, ...], in the order of their micro-batches [n * count, ...]."""
    if ranks.count == 1:
        return losses
    every = [torch.empty_like(losses) for _ in range(ranks.count)]
    dist.all_gather(every, losses.contiguous())
    return torch.stack(every, dim=1).flatten(0, 1)


def agree(ranks: Ranks, value: T) -> T:
    """The first process's value, on all of them."""
    if ranks.count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def least(ranks: Ranks, value: float) -> float:
    """The smallest of all processes' values."""
    if ranks.count == 1:
        return value
    every: list[float] = [0.0] * ranks.count
    dist.all_gather_object(every, value)
    return min(every)


@contextmanager
def first_goes_first(ranks: Ranks) -> Iterator[None]:
    """The others wait until the first process is through: then they find in the cache what it has encoded."""
    if not ranks.first:
        dist.barrier()
    try:
        yield
    finally:
        if ranks.first and ranks.count > 1:
            dist.barrier()


# --- processes ------------------------------------------------------------------------------------------------------


def launch(
    command: Sequence[str], count: int, root: Path, secrets: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Run a command line of Python's modules below `root` in `count` processes, and relay what they print.

    All are ended when one ends badly, by a cancel, or any other exception here. `secrets` go into their environment;
    once `stopped` is true they are asked to end by themselves, with SIGTERM. Raises UserError with the last words of
    the one that failed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes, said = [], [[] for _ in range(count)]
    try:
        for rank in range(count):
            found_first = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
            environment = {
                **os.environ, "PYTHONPATH": found_first,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1", **(secrets or {}),
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            processes.append(process)
            threading.Thread(target=_collect, args=(process, said[rank]), daemon=True).start()
        _wait(processes, said, stopped)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    for line in process.stdout or ():
        lines.append(line.rstrip())


def _wait(processes: list[subprocess.Popen[str]], said: list[list[str]], stopped: Callable[[], bool]) -> None:
    """Until all are done; prints what they say, from here, for a thread's prints aren't in a run's log."""
    printed, asked = [0] * len(processes), False
    while True:
        if stopped() and not asked:
            asked = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        codes = [process.poll() for process in processes]
        if any(codes):
            time.sleep(0.2)  # their last words are on their way
        for rank, lines in enumerate(said):
            for line in lines[printed[rank] :]:
                print(line if rank == 0 else f"card {rank}: {line}", flush=True)
            printed[rank] = len(lines)
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise UserError(_last_words(said[failed[0]]) or f"card {failed[0]} ended with {codes[failed[0]]}")
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_S)


def _last_words(lines: list[str]) -> str:
    """What a process said was wrong, which may be several lines; else its last one."""
    for index in reversed(range(len(lines))):
        if lines[index].startswith(ERROR_MARK):
            return "\n".join(lines[index:]).removeprefix(ERROR_MARK)
    return next((line for line in reversed(lines) if line.strip()), "")


def several() -> int:
    """How many cards this process may use; 1 where it is one of several already."""
    if "RANK" in os.environ:
        return 1
    return max(1, torch.cuda.device_count())


def silence(ranks: Ranks) -> None:
    """Let only the first process speak; errors still come through."""
    if not ranks.first:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (for as long as the process lives)
