"""A drawn world, the small model that has learned it, and the demo that teaches the model something new."""

from lora_utils.io.libraries import configure_libraries, import_libraries

import_libraries()  # most of these are commands that import diffusers at their top
configure_libraries()
