"""Files that are written completely or not at all, and what a disk refuses said clearly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_utils.errors import UserError


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
    """Give a path to write to, which then replaces `path`: a file of that name is complete, or as it was."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
