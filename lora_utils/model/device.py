"""Where tensors live: the device and dtype of a model, its free memory, and what to do when that runs out."""

import gc
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Placement:
    """The device that a model is on, and the dtype that it computes in."""

    device: torch.device
    dtype: torch.dtype

    def on_cpu(self) -> "Placement":
        """Return the same dtype on the CPU."""
        return replace(self, device=torch.device("cpu"))


def default_placement() -> Placement:
    """Return this process's GPU, the first where nothing says which, in bf16; without a GPU the CPU in fp32."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return Placement(device, torch.bfloat16)
    return Placement(torch.device("cpu"), torch.float32)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device, without waiting for what is queued there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def freeze_on_device(part: nn.Module, placement: Placement) -> None:
    """Move a part of the model to its device, in eval mode and without gradients."""
    part.to(placement.device).eval().requires_grad_(False)


# --- memory ---------------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> float:
    """Return what a new tensor can have: the GPU's free memory with what torch holds in reserve, or the CPU's."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
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
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux


def release_memory() -> None:
    """Give back what unreferenced tensors held. The caller has dropped its references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
