"""Measurements of the package on the small model: each module is a command, each writes a page beside itself."""

from pathlib import Path

import lora_utils  # noqa: F401 (first, so that what diffusers would say of other GPUs' kernels isn't said)

RESULTS = Path(__file__).parent / "RESULTS.md"
