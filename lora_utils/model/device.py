"""Where tensors live: the device and dtype of a model, its free memory, and what to do when that runs out."""

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_utils.model.ram import free_ram_bytes, peak_ram_bytes, trim_allocator

log = logging.getLogger(__name__)
T = TypeVar("T")

SMALL_WEIGHTS = 500_000_000  # up to so many a model computes in fp32 on any CPU: it takes 2 GB at most


@dataclass(frozen=True, slots=True)
class Placement:
    """The device that a model is on, and the dtype that it computes in."""

    device: torch.device
    dtype: torch.dtype

    def on_cpu(self) -> "Placement":
        """Return the same dtype on the CPU."""
        return replace(self, device=torch.device("cpu"))


def default_placement(weights: int = 0) -> Placement:
    """Return this process's GPU, the first where nothing says which, in bf16; without a GPU the CPU.

    There a model of so many weights computes in fp32 if it is small. A large one computes in bf16 where the processor
    has instructions for it, or where its weights have no room in fp32; a line says so.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return Placement(device, torch.bfloat16)
    cpu = torch.device("cpu")
    if weights <= SMALL_WEIGHTS:
        return Placement(cpu, torch.float32)
    if multiplies_bf16_fast():
        log.info("computing on the CPU in bf16, for which it has instructions")
    elif torch.float32.itemsize * weights > free_bytes(cpu):
        log.info("computing on the CPU in bf16, though slowly: there is no room for the weights in fp32")
    else:
        log.info("computing on the CPU in fp32: it has no instructions for bf16")
        return Placement(cpu, torch.float32)
    return Placement(cpu, torch.bfloat16)


def multiplies_bf16_fast() -> bool:
    """Return whether this processor has instructions for products of bf16: AVX-512 BF16, AMX, or Arm's."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device, without waiting for what is queued there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def freeze_on_device(part: nn.Module, placement: Placement) -> None:
    """Move a part of the model to its device, in eval mode and without gradients."""
    part.to(placement.device).eval().requires_grad_(False)


def local_processes() -> int:
    """Return how many processes of this run share this machine, as its launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# --- memory ---------------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> float:
    """Return what a new tensor can have: the GPU's free memory with what torch holds in reserve, or the CPU's."""
    if device.type != "cuda":
        return free_ram_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def reset_peak(device: torch.device) -> None:
    """Count the GPU's peak from here on; the CPU's is the process's and can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> float:
    """Return the most that was held: on the GPU since `reset_peak`, or of the CPU's memory by this process ever."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return peak_ram_bytes()


def release_memory() -> None:
    """Give back what unreferenced tensors held. The caller has dropped its references."""
    gc.collect()
    trim_allocator()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # the pinned memory that weights have come through


def retry_after(
    errors: tuple[type[Exception], ...], attempt: Callable[[], T], recover: Callable[[type[Exception], str], None]
) -> T:
    """Call `attempt` until it returns. After one of these errors `recover` makes the next call easier, or raises.

    `recover` receives the error's type and the first line of its text. It runs outside of the handler, where the
    traceback no longer holds the failed attempt's tensors.
    """
    while True:
        try:
            return attempt()
        except errors as error:
            kind, reason = type(error), (str(error).strip() or type(error).__name__).splitlines()[0]
        recover(kind, reason)
