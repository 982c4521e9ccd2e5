"""python -m lora_utils.dataset DATASET: what a training would find, alone."""

import sys

from lora_utils.preflight import main

if __name__ == "__main__":
    sys.exit(main())
