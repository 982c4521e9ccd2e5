"""The machine's RAM: what is free of it for this process, within its container's limits, and what the process holds.

Sources: Linux' Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, and proc(5).
"""

import ctypes
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/")
_NO_LIMIT = 1 << 60  # bytes; version 1 writes "no limit" as a number near 2^63


@dataclass(frozen=True, slots=True)
class RamUsage:
    """Bytes of memory that the process has: held, which can't be taken back, and mapped from files, which can."""

    held: float
    mapped: float


@dataclass(frozen=True, slots=True)
class _Version:
    """Where a version of control groups says what is used, what may be, and what of it is only cached."""

    folder: str
    limit: str
    used: str
    cached: tuple[str, ...]


_VERSION_2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = _Version(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def free_ram_bytes(root: Path = _ROOT) -> float:
    """Return the bytes of the machine's memory that this process can still have.

    What the system keeps of files counts as free. A container's limit counts where it is nearer than the machine's end.
    """
    return min([float(psutil.virtual_memory().available), *_free_in_groups(root)])


def _free_in_groups(root: Path) -> list[float]:
    """Return the free bytes of each control group with a limit, from this process's up to the topmost."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    free = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            version = _VERSION_2
        elif "memory" in controllers.split(","):
            version = _VERSION_1
        else:
            continue
        # In a container the group's own path may not be mounted: then its folder is the topmost.
        inside = Path(path.lstrip("/"))
        folders = [root / version.folder / part for part in (inside, *inside.parents)]
        free += [left for folder in folders if (left := _free_in(folder, version)) is not None]
    return free


def _free_in(folder: Path, version: _Version) -> float | None:
    """Return what a control group's limit leaves; None without a limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in (version.limit, version.used))
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0.0, float(int(limit) - int(used) + sum(int(counts.get(name, 0)) for name in version.cached)))
    except (OSError, ValueError):
        return None


def ram_usage() -> RamUsage:
    """Return what this process holds and has mapped now; without /proc all that it ever had counts as held."""
    try:
        resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    except OSError:
        return RamUsage(peak_ram_bytes(), 0.0)
    page = os.sysconf("SC_PAGE_SIZE")
    return RamUsage(float(page * (resident - shared)), float(page * shared))


def peak_ram_bytes() -> float:
    """Return the most that this process ever had in memory, mapped files included."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux


def trim_allocator() -> None:
    """Give freed memory back to the system where the C library is glibc, whose allocator keeps much of it."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
