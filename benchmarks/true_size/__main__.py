"""python -m benchmarks.true_size FOLDER: see `rehearsal`."""

import sys

from benchmarks.true_size.rehearsal import main

if __name__ == "__main__":
    sys.exit(main())
