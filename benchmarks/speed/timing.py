"""How long methods take, in turns, and where the time goes."""

import platform
import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each method's step, in turns, after one to warm up."""
    taken: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(rounds + 1):
        for method, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                taken[method].append(time.perf_counter() - began)
    return {method: statistics.median(values) for method, values in taken.items()}


def where_time_goes(step: Callable[[], float], device: torch.device) -> str:
    """Shares of a step: matrix products, attention, the rest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        step()
    shares = {"matrix products": 0.0, "attention": 0.0, "the rest": 0.0}
    for event in profiled.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.lower()
        if "attention" in name or "flash" in name or "fmha" in name:
            shares["attention"] += own
        elif name in {"aten::mm", "aten::addmm", "aten::bmm"} or "gemm" in name or "cutlass" in name:
            shares["matrix products"] += own
        else:
            shares["the rest"] += own
    total = sum(shares.values())
    return ", ".join(f"{name} {own / total:.0%}" for name, own in shares.items())


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} cores of a CPU, {platform.machine()}"
