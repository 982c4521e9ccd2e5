"""What a person reads while a command runs: log lines, their pace, and the traceback of an unexpected error."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lora_utils.errors import UserError

log = logging.getLogger(__name__)
ERROR_PREFIX = "error: "  # stands in front of what a command says was wrong


class _Printed(logging.Handler):
    """A handler that prints at the time of logging: Cog swaps `sys.stdout` for each run to collect its log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else "warning: "
        print(level + self.format(record), flush=True)


def log_to_stdout(level: int = logging.INFO) -> None:
    """Send the package's log lines of this level and above to standard output, once, however often it is called."""
    logger = logging.getLogger("lora_utils")
    logger.setLevel(level)
    if not logger.handlers:
        logger.addHandler(_Printed())
        logger.propagate = False


def format_duration(seconds: float) -> str:
    """Return 95 as '1:35', 3700 as '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_pace(seconds_per_step: float, seconds_left: float) -> str:
    """Return how long a step takes and the time that is left."""
    return f"{seconds_per_step:.2f} s/step, ETA {format_duration(seconds_left)}"


@dataclass(slots=True)
class Progress:
    """When to log a line about a loop of `total` steps: the first, the last, and one every few seconds."""

    total: int
    every_s: float = 5.0
    began: float = field(default_factory=time.monotonic)
    logged: float = field(default=-1e9)

    def should_log(self, step: int) -> bool:
        """Return whether `step` deserves a line, and take it as logged if so."""
        now = time.monotonic()
        if step not in (1, self.total) and now - self.logged < self.every_s:
            return False
        self.logged = now
        return True

    def elapsed_s(self) -> float:
        """Return the seconds since the loop began."""
        return time.monotonic() - self.began

    def pace(self, step: int) -> str:
        """Return the seconds per step so far and the time that is left."""
        per_step = self.elapsed_s() / step
        return format_pace(per_step, per_step * (self.total - step))


@contextmanager
def logged_to_stdout() -> Iterator[None]:
    """Log to standard output, and there the traceback of anything but a UserError within it.

    Cog gives its clients the error's message alone, and its own log nothing.
    """
    log_to_stdout()
    try:
        yield
    except UserError:
        raise
    except Exception:
        log.exception("an unexpected error; please report it with this traceback")
        raise


@contextmanager
def by_product(what: str) -> Iterator[None]:
    """Warn of whatever fails within it, and go on: what was learned in hours isn't lost for a curve or an image.

    Cancels, and all else that isn't an error, go through.
    """
    try:
        yield
    except UserError as error:
        log.warning("%s failed: %s", what, error)
    except Exception as error:  # of any kind: by-products run other people's code, on disks and networks
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("%s failed: %s: %s", what, type(error).__name__, first_line)


def log_uncaught_to_stderr(error: UserError) -> None:
    """Print a UserError as a command's last words. A process that started this one finds them by their prefix."""
    print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
