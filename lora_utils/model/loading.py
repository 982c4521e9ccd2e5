"""Weights from disk to device, tensor by tensor: what is on its way is all that the CPU holds beyond what stays.

This module owns how an empty part is filled and found complete. It doesn't know what the parts compute.

On a CPU a tensor that keeps its dtype is a view of the mapped file: the system reads its pages when they are used, and
may take them back. For a GPU a thread reads ahead into pinned memory while the tensors before are uploaded.
"""

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from lora_utils.errors import UserError
from lora_utils.io.logging import format_duration
from lora_utils.io.model_folder import weight_files
from lora_utils.model.device import free_bytes

log = logging.getLogger(__name__)
T = TypeVar("T")

_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of the dtypes that a base model is stored in, by safetensors' names
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LINE_EVERY_S = 10.0
READ_AHEAD = 2  # tensors
# Larger ones are uploaded from the mapped file. Of Qwen-Image's that is the embedding matrix alone, 1.1 GB, which the
# allocator of pinned memory would round up to 2.
MOST_PINNED_BYTES = 1 << 28
PASSING_BYTES = (READ_AHEAD + 2) * MOST_PINNED_BYTES  # of pinned memory at most: those that wait, one at each end


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How a part of a model is stored: how many weights, and in which dtype most are; None for one of eight bits."""

    count: int
    dtype: torch.dtype | None


def stored_weights(folder: Path) -> StoredWeights:
    """Return how many weights a part's files hold, from their headers. Raises UserError for files that are damaged."""
    counts: Counter[str] = Counter()
    for file in weight_files(folder):
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open isn't a mapping)
                part = shard.get_slice(name)
                counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    most = max(counts, key=counts.__getitem__) if counts else ""
    return StoredWeights(counts.total(), _DTYPES.get(most))


def _opened(file: Path) -> safe_open:
    """Open a safetensors file. Raises UserError for one that was cut off or is damaged."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file} is cut off or damaged ({error}); download it again.") from error


# --- streams --------------------------------------------------------------------------------------------------------


def stream_tensors(
    folder: Path, device: torch.device, dtype: torch.dtype, rename: Callable[[str], str | None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a part's weights, straight to the device. What `rename` turns into None isn't read.

    They come in the order in which they are stored, so that the disk reads each file once from its beginning to its
    end. A line is logged every ten seconds.
    """
    files = weight_files(folder)
    total, wanted = 0, dict[Path, list[tuple[str, str]]]()
    for file in files:
        with _opened(file) as shard:
            named = [(stored, rename(stored)) for stored in shard.offset_keys()]
            wanted[file] = [(stored, name) for stored, name in named if name is not None]
            total += sum(_stored_bytes(shard, stored) for stored, _ in wanted[file])
    progress = _LoadingProgress(folder.name, total)
    with closing(_read(wanted, device)) as tensors:
        for name, tensor in tensors:
            size = tensor.nbytes
            yield name, tensor.to(device, dtype, non_blocking=tensor.is_pinned())
            progress.add(size)


def _stored_bytes(shard: safe_open, name: str) -> int:
    part = shard.get_slice(name)
    return torch.Size(part.get_shape()).numel() * _ELEMENT_BYTES.get(part.get_dtype(), 1)


def _read(wanted: dict[Path, list[tuple[str, str]]], device: torch.device) -> Generator[tuple[str, Tensor], None, None]:
    """Yield the tensors as they are stored, on the CPU: for a GPU in pinned memory, read ahead by a thread."""

    def mapped() -> Generator[tuple[str, Tensor], None, None]:
        files = [file for file, names in wanted.items() if names]
        for index, file in enumerate(files):
            read_into_cache(files[index : index + 2])
            with _opened(file) as shard:
                for stored, name in wanted[file]:
                    yield name, shard.get_tensor(stored)

    if device.type != "cuda":
        return mapped()
    return read_ahead(
        (name, tensor.pin_memory() if tensor.nbytes <= MOST_PINNED_BYTES else tensor) for name, tensor in mapped()
    )


def read_into_cache(files: list[Path]) -> None:
    """Ask the system to read these files into its page cache, if there is room, and don't wait for it.

    It reads them whole, though the text encoder's hold 2.5 GB that nothing here uses: a file has no other order.
    """
    if not hasattr(os, "posix_fadvise") or 2 * sum(file.stat().st_size for file in files) > free_bytes(
        torch.device("cpu")
    ):
        return

    def advise() -> None:
        for file in files:
            with suppress(OSError), file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=advise, name="read into cache", daemon=True).start()  # the call may wait for the disk


def read_ahead(items: Iterator[T], most: int = READ_AHEAD) -> Generator[T, None, None]:
    """Yield what an iterator yields, run by a thread that is at most so many items ahead. Its errors are raised here.

    A generator that is closed before its end stops the thread.
    """
    waiting: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(most)
    closed = threading.Event()

    def put(more: bool, item: T | BaseException | None) -> None:
        while not closed.is_set():
            try:
                waiting.put((more, item), timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in items:
                put(True, item)
                if closed.is_set():
                    return
        except BaseException as error:  # of any kind: it is raised where the items are used
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=run, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # pyright: ignore[reportReturnType] (an item while there are more)
    finally:
        closed.set()
        thread.join()


class _LoadingProgress:
    """A line every ten seconds: what share is loaded, how fast, and how long the rest takes."""

    def __init__(self, part: str, total_bytes: int):
        self.part, self.total, self.done = part, total_bytes, 0
        self.began = self.logged = time.monotonic()

    def add(self, size: int) -> None:
        """Count so many bytes as loaded."""
        self.done += size
        now = time.monotonic()
        if now - self.logged < LINE_EVERY_S:
            return
        self.logged, speed = now, self.done / (now - self.began)
        left = format_duration((self.total - self.done) / speed)
        share, total = self.done / self.total, self.total / 1e9
        log.info(
            "loading the %s: %.0f %% of %.1f GB, %.2f GB/s, ETA %s", self.part, 100 * share, total, speed / 1e9, left
        )


# --- filling --------------------------------------------------------------------------------------------------------


@contextmanager
def empty_weights() -> Iterator[None]:
    """Let modules be made without memory for their weights within it, and without the time that starting them takes."""
    with init_empty_weights(), no_init_weights():
        yield


def fill_parameters(
    module: nn.Module,
    tensors: Iterator[tuple[str, Tensor]],
    source: Path,
    store: Callable[[str, Tensor], bool] = lambda _name, _tensor: False,
) -> None:
    """Replace a module's empty parameters by these tensors, frozen. Raises UserError for one that doesn't fit.

    `store` may take one to store it another way, and says so.
    """
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        parameters = module.get_submodule(owner)._parameters if _has(module, owner) else {}
        empty = parameters.get(leaf)
        if empty is None or empty.shape != tensor.shape:
            expected = "no such weight" if empty is None else f"the shape {tuple(empty.shape)}"
            raise UserError(f"{source}: {name} {tuple(tensor.shape)} doesn't fit, the model has {expected} there.")
        if not store(name, tensor):
            parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def check_complete(module: nn.Module, source: Path) -> None:
    """Raise UserError if a parameter was never filled."""
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise UserError(f"{source} lacks {len(empty)} weights, the first is {empty[0]}; download it again.")
