"""What a person reads while a run is on: log lines, an ETA, the traceback of the unexpected."""

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lora_utils.errors import UserError


class _Printed(logging.Handler):
    """Print at the time of logging: Cog swaps `sys.stdout` for each run to collect its log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else "warning: "
        print(level + self.format(record), flush=True)


def log_to_stdout() -> None:
    """Send the library's log lines to standard output, once, however often it is called."""
    logger = logging.getLogger("lora_utils")
    if not logger.handlers:
        logger.addHandler(_Printed())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def clock(seconds: float) -> str:
    """95 -> '1:35', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(slots=True)
class Progress:
    """When to print a line about a loop of `total` steps: the first, the last, and one every few seconds."""

    total: int
    every_s: float = 5.0
    began: float = field(default_factory=time.monotonic)
    printed: float = field(default=-1e9)

    def is_due(self, step: int) -> bool:
        now = time.monotonic()
        if step not in (1, self.total) and now - self.printed < self.every_s:
            return False
        self.printed = now
        return True

    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def pace(self, step: int) -> str:
        """Seconds per step so far and the time that is left."""
        per_step = self.elapsed_s() / step
        return f"{per_step:.2f} s/step, ETA {clock(per_step * (self.total - step))}"


@contextmanager
def unexpected_errors_printed() -> Iterator[None]:
    """Print the traceback of anything but a UserError: Cog's clients get the message alone, its log gets nothing."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        traceback.print_exc(file=sys.stdout)
        raise
