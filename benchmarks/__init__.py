"""Measurements of the package on the small model: each module is a command, and writes a page or prints a table."""

from pathlib import Path

from lora_utils.io.libraries import configure_libraries

PAGES = Path(__file__).parent
RESULTS = PAGES / "RESULTS.md"
configure_libraries()  # all of these are commands, and each imports diffusers at its top
