"""Measurements of the package: its commands print a table or write a page of this folder.

Folders are experiments of several modules, but for `speed`, which the measurements of a step and of an image share.
`experiment`, `subjects` and `teaching` are shared by the others.
"""

from pathlib import Path

from lora_utils.io.libraries import configure_libraries

PAGES = Path(__file__).parent
RESULTS = PAGES / "RESULTS.md"
configure_libraries()  # all of these are commands, and each imports diffusers at its top
