"""A long training that is killed every minute or so, against one that isn't: python -m benchmarks.soak --minutes 60

Both train the small model with the token; the disturbed one keeps checkpoints, gets `kill -9` at random moments and is
started again with the same command. Its weights must be the undisturbed run's, byte for byte.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from examples import demo, shapes
from lora_utils.bundle import LORA_MEMBER

STEPS_PER_MINUTE = 1200  # of the small model on one core, about
SAVE_EVERY = 50


def start(folder: Path, steps: int, *given: str) -> subprocess.Popen[bytes]:
    settings = {**demo.TRAINING, "steps": steps, "lr_scheduler": "constant"}
    options = [f"--{name}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    command = [sys.executable, "-m", "lora_utils", "train", str(folder / "dataset.zip"), *options, *given]
    environment = {**os.environ, "BASE_MODEL": str(demo.MODEL), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, "--train_placeholder_token"], env=environment, stdout=log, stderr=log)


def digest(path: Path) -> str:
    with zipfile.ZipFile(path) as packed:
        return hashlib.sha256(packed.read(LORA_MEMBER)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, about, for each of the two runs")
    parser.add_argument("--kill_every_s", type=float, default=60.0, help="on average")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    steps, rng = max(2 * SAVE_EVERY, int(arguments.minutes * STEPS_PER_MINUTE)), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        demo.write_dataset(folder / "dataset.zip", demo.OBJECT, shapes.Prompt(demo.TOKEN))
        began = time.monotonic()
        calm = start(folder, steps, f"--output={folder / 'calm.zip'}")
        if calm.wait():
            print((folder / "log.txt").read_text()[-2000:])
            return 1
        print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        keeping = [f"--run_dir={folder / 'run'}", f"--save_every={SAVE_EVERY}", "--resume=auto"]
        kills, began = 0, time.monotonic()
        while not (folder / "killed.zip").exists():
            process = start(folder, steps, f"--output={folder / 'killed.zip'}", *keeping)
            try:
                if process.wait(rng.expovariate(1 / arguments.kill_every_s) + 5):
                    print((folder / "log.txt").read_text()[-2000:])
                    return 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        same = digest(folder / "calm.zip") == digest(folder / "killed.zip")
        left = [path.name for path in (folder / "run").iterdir() if not path.name.startswith("step-")]
        print(
            f"killed {kills} times in {time.monotonic() - began:.0f} s: the weights are {'equal' if same else 'OTHERS'}"
        )
        return 0 if same and not left else 1


if __name__ == "__main__":
    sys.exit(main())
