"""A drawn world, the small model that has learned it, and the demo that teaches the model something new."""

from lora_utils.io.libraries import import_libraries

import_libraries()  # most of these are commands that import diffusers at their top
