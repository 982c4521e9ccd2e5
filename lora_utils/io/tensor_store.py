"""Tensors on disk that one run has computed and the next one needn't, by the hash of all that they follow from.

This module owns their layout, their reading as they are needed, and the size of the folder. It does not know what the
tensors are. An entry is a safetensors file, written under another name and then renamed, so a run that is killed
leaves complete entries only. Entries are read when they are asked for and not held: memory stays flat however many
images there are, and what is read often stays in the system's page cache.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

MAX_BYTES = 50 * 10**9
LEAST_FREE_BYTES = 2 * 10**9  # that is left to the disk
IN_USE_S = 24 * 3600.0  # an entry that was used since may be another run's
_SAMPLES, _SAMPLE_BYTES = 64, 4096
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _OnDisk(Mapping[str, Tensor]):
    """An entry's tensors, which are read each time they are asked for."""

    path: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(slots=True)
class TensorStore:
    """Tensors by key, in a folder, or in memory where there is none."""

    folder: Path | None
    used: set[str] = field(default_factory=set)
    held: dict[str, Tensors] = field(default_factory=dict)

    def get(self, key: str) -> Tensors | None:
        """Return the tensors under a key; None where there are none, or they can't be read any more."""
        if key in self.held or self.folder is None:
            return self.held.get(key)
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as opened:
                names = tuple(opened.keys())
            os.utime(path)
        except (OSError, SafetensorError):  # not there, or damaged: it is written again over what is there
            return None
        self.used.add(key)
        return _OnDisk(path, names)

    def put(self, key: str, tensors: dict[str, Tensor]) -> Tensors:
        """Write tensors under a key. A disk that is full costs the next run time, and this one memory, no more."""
        if self.folder is not None and not self.held:
            try:
                self._write(self._path(key), tensors)
            except (OSError, SafetensorError) as error:
                log.warning("the cache %s can't be written (%s); what follows is kept in memory", self.folder, error)
            else:
                self.used.add(key)
                return _OnDisk(self._path(key), tuple(tensors))
        self.held[key] = tensors
        return tensors

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if shutil.disk_usage(path.parent).free < LEAST_FREE_BYTES:
            raise OSError(f"less than {LEAST_FREE_BYTES / 1e9:g} GB are free")
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove the entries that were used longest ago, and are no run's now, until the rest is small enough."""
        if self.folder is None:
            return
        entries = []
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another run trims too
                continue
            entries.append((status.st_mtime, status.st_size, path))
        excess, now = sum(size for _, size, _ in entries) - MAX_BYTES, time.time()
        for used_at, size, path in sorted(entries):
            if excess <= 0 or now - used_at < IN_USE_S:
                break
            if path.stem not in self.used:
                path.unlink(missing_ok=True)
                excess -= size


def open_tensor_store() -> TensorStore:
    """Open the store in the folder that `CACHE_DIR` names, else in a temporary one; in memory if it names nothing."""
    named = os.environ.get("CACHE_DIR")
    if named == "":
        return TensorStore(None)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"qwen-image-cache-{os.getuid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        foreign = folder.stat().st_uid != os.getuid() and not named
    except OSError as error:
        log.warning("the cache %s can't be made (%s); it is kept in memory", folder, error.strerror)
        return TensorStore(None)
    if foreign:
        log.warning("the cache %s belongs to another user; it is kept in memory", folder)
        return TensorStore(None)
    return TensorStore(folder)


def content_key(**follows_from: object) -> str:
    """Return a key for what follows from these values alone, which JSON can write."""
    return hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Return the hash of a part of a model: of its files' names, sizes and samples of their content.

    The hash of all its 16 GB would take a while.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
