"""What a disk refuses, said clearly: full, read-only, not there. Must not know what was to be written."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from lora_utils.errors import UserError


@contextmanager
def refusals_named(what: str, remedy: str) -> Iterator[None]:
    """Raise what a disk refuses within it as a UserError: "`what` (why); `remedy`"."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has errors of its own for a full disk
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{what} ({why}); {remedy}") from error
