"""What a person reads while a command runs: log lines, their pace, and the traceback of an unexpected error.

This module also sets up other libraries, once, for an entry point: what they log, and what Pillow opens.
"""

import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lora_utils.errors import UserError

log = logging.getLogger(__name__)
ERROR_PREFIX = "error: "  # stands in front of what a command says was wrong

# Other libraries' remarks on the base model's own files, which are right as they are: Qwen-Image's text encoder has its
# rotary settings twice in its config, and its transformer a field that nothing reads. Each is a logger with how its
# text begins, so that a remark on anything else is shown. docs/troubleshooting.md names them.
_NOISE = {
    "transformers.configuration_utils": r"Qwen2_5_VLConfig got `key=rope_scaling` in kwargs",
    "transformers.modeling_rope_utils": r"Unrecognized keys in `rope_parameters` for .*: \{'mrope_section'\}$",
    "diffusers.configuration_utils": r"The config attributes \{'pooled_projection_dim': \d+\} were passed",
}


class _Printed(logging.Handler):
    """A handler that prints at the time of logging: Cog swaps `sys.stdout` for each run to collect its log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else "warning: "
        print(level + self.format(record), flush=True)


class _WithoutNoise(logging.Filter):
    """A filter that drops the records whose text begins as a pattern says."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())


def log_to_stdout(level: int = logging.INFO) -> None:
    """Send the package's log lines of this level and above to standard output, once, however often it is called."""
    logger = logging.getLogger("lora_utils")
    logger.setLevel(level)
    if not logger.handlers:
        logger.addHandler(_Printed())
        logger.propagate = False


def configure_libraries() -> None:
    """Set what other libraries log and open in this process. Call it before diffusers is imported.

    diffusers speaks of kernels for other GPUs at its import, and progress bars of carriage returns are noise in a
    server's log. Pillow learns to open heic, and refuses what is too large for `open_image`.
    """
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it can't merge; nothing here does
    # Nothing here computes in place on what a sharded transformer returns, which is what this warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name, pattern in _NOISE.items():
        logging.getLogger(name).addFilter(_WithoutNoise(pattern))

    from diffusers.utils.logging import disable_progress_bar  # noqa: PLC0415 (heavy, and only here)
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415
    from pillow_heif import register_heif_opener  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    from lora_utils.io.images import MAX_PIXELS  # noqa: PLC0415

    disable_progress_bar()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    register_heif_opener()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS


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
def log_unexpected_errors() -> Iterator[None]:
    """Log the traceback of anything but a UserError: Cog's clients get the message alone, its log gets nothing."""
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
