"""Files that are written completely or not at all, and what a disk refuses said clearly."""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_utils.errors import UserError

log = logging.getLogger(__name__)

_PREFIX = "qwen-image-lora-"  # of this package's folders among the machine's temporary ones


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(what: str, remedy: str) -> Iterator[None]:
    """Raise what a disk refuses within it as a UserError: "`what` (why); `remedy`"."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has errors of its own for a full disk
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{what} ({why}); {remedy}") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to, which then replaces `path`: a file or folder of that name is complete, or as it was."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path, what: str) -> Iterator[None]:
    """Keep a folder to this caller within it. The lock is the folder's own, leaves no file, and ends with the process.

    Raises UserError where another one has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{what} is in use by another run; wait for it to end, or name another folder.") from error
        except OSError as error:  # a file system without locks
            log.warning("%s can't be locked (%s); see to it that no other run uses it", what, error.strerror)
        yield
    finally:
        os.close(descriptor)


def new_process_folder(purpose: str) -> Path:
    """Return an empty folder of this process for what it keeps between calls. What dead processes left is removed."""
    _remove_stale(purpose)
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{purpose}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Give an empty folder that is gone after it. What processes that were killed within it left is removed."""
    _remove_stale(purpose)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{purpose}-{os.getpid()}-") as folder:
        yield Path(folder)


def _remove_stale(purpose: str) -> None:
    """Remove the folders of processes that are dead, whose numbers are in their names."""
    prefix = f"{_PREFIX}{purpose}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        number = left.name.removeprefix(prefix).partition("-")[0]
        if number.isdecimal() and not _is_alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process has
        return False
    except PermissionError:  # it is another user's
        return True
    return True
