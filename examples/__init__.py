"""A drawn world, the small model that has learned it, and the demo that teaches the model something new."""

from lora_utils.io.logging import configure_libraries

configure_libraries()  # most of these are commands that import diffusers at their top
