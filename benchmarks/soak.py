"""A long training that is killed every minute or so, against one that isn't: python -m benchmarks.soak --minutes 60

Both train the small model with the token, draw samples and measure on images held out, side by side on a core each.
The disturbed one keeps checkpoints, gets `kill -9` at random moments and is started again with the same command. Its
weights, its samples and its curves must be the undisturbed run's, byte for byte.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from examples import demo, shapes
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from lora_utils.tracking import contact_sheet
from lora_utils.tracking.metrics import METRICS_FILE

STEPS_PER_MINUTE = 300  # of four micro-batches of the small model on one core, about
MONITORED = {
    "sample_steps": 4,
    "validation_share": 0.2,
    "sample_prompts": "a photo of <zwx> on a cyan background|a red circle",
    "resume": "auto",
    "gradient_accumulation": 4,
}


def start(dataset: Path, folder: Path, steps: int, save_every: int) -> subprocess.Popen[bytes]:
    keeping = {"save_every": save_every, "sample_every": 5 * save_every, "run_dir": folder}
    settings = {**demo.TRAINING, **MONITORED, **keeping, "steps": steps, "lr_scheduler": "constant"}
    options = [f"--{name}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    command = [sys.executable, "-m", "lora_utils", "train", str(dataset), *options, "--train_placeholder_token"]
    command.append(f"--output={folder / 'weights.zip'}")
    environment = {**os.environ, "BASE_MODEL": str(demo.MODEL), "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def results(folder: Path) -> dict[str, str]:
    """Hashes of what a run has made: its LoRA and what meta.json says of it, its sheets, its numbers."""
    with zipfile.ZipFile(folder / "weights.zip") as packed:
        made = {LORA_MEMBER: packed.read(LORA_MEMBER)}
        meta = {**json.loads(packed.read(META_MEMBER)), "created": "at another time"}
    made[META_MEMBER] = json.dumps(meta).encode()
    made |= {
        f"{contact_sheet.SHEET_FOLDER}/{path.name}": path.read_bytes() for path in contact_sheet.list_sheets(folder)
    }
    made[METRICS_FILE] = (folder / METRICS_FILE).read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}


def left_behind(folder: Path) -> list[str]:
    """What no run should leave."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.partial")]


def main(given: list[str] | None = None) -> int:
    """-> 0 where the two runs have made the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, about, for each of the two runs")
    parser.add_argument("--kill_every_s", type=float, default=60.0, help="on average")
    parser.add_argument("--save_every", type=int, default=50, help="steps; previews are sampled a fifth as often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(given)
    steps, save_every = int(arguments.minutes * STEPS_PER_MINUTE), arguments.save_every
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as work:
        dataset, calm, killed = (Path(work) / name for name in ("dataset.zip", "calm", "killed"))
        demo.write_dataset(dataset, demo.OBJECT, shapes.Prompt(demo.TOKEN))
        for folder in (calm, killed):
            folder.mkdir()
        undisturbed, kills, began = start(dataset, calm, steps, save_every), 0, time.monotonic()
        try:
            while not (killed / "weights.zip").exists():
                process = start(dataset, killed, steps, save_every)
                try:
                    if process.wait(rng.expovariate(1 / arguments.kill_every_s) + 5):
                        print(killed.with_suffix(".log").read_text()[-2000:])
                        return 1
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
            print(f"{steps} steps, killed {kills} times, in {time.monotonic() - began:.0f} s", flush=True)
            if undisturbed.wait():
                print(calm.with_suffix(".log").read_text()[-2000:])
                return 1
        finally:
            undisturbed.kill()
        one, other, left = results(calm), results(killed), left_behind(killed)
        apart = sorted(name for name in {**one, **other} if one.get(name) != other.get(name))
        print(f"undisturbed in {time.monotonic() - began:.0f} s; compared {len(one)} files, apart: {apart or 'none'}")
        print(f"left behind: {left or 'nothing'}")
        return 1 if apart or left else 0


if __name__ == "__main__":
    sys.exit(main())
