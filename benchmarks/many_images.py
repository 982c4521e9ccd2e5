"""Large datasets: memory and time against the number of images, with a cold and a warm cache.

    python -m benchmarks.many_images --counts 100 1000 10000

Each measurement is a process of its own, from the folder of images to the twentieth step: 256x256, each with its own
caption, on the small model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo import MODEL
from examples.shapes import draw, random_prompt, scene_of, to_image

SIDE_PX = 256


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        prompt = random_prompt(rng)
        image = to_image(draw(scene_of(prompt, rng))).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        (folder / f"{index // 1000:03d}").mkdir(exist_ok=True)
        target = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        image.save(target, quality=90)
        target.with_suffix(".txt").write_text(f"{prompt.wordings()[0]}, number {index}")


def measure(folder: Path) -> dict[str, float]:
    """In this process: seconds until the data is checked, until it is encoded, and the most memory that was held."""
    from lora_utils.config import TrainConfig  # noqa: PLC0415 (the memory of imports is measured too)
    from lora_utils.dataset import load  # noqa: PLC0415
    from lora_utils.model.device import default_placement  # noqa: PLC0415
    from lora_utils.model.memory_estimate import read_shapes  # noqa: PLC0415
    from lora_utils.model.text_encoder import load_tokenizer  # noqa: PLC0415
    from lora_utils.training import loop  # noqa: PLC0415
    from lora_utils.training.setup import TrainJob, setup  # noqa: PLC0415

    config = TrainConfig(steps=20, rank=4, batch_size=4, resolution=str(SIDE_PX), seed=0)
    before = _peak_bytes()
    began = time.monotonic()
    found = load(folder, config, load_tokenizer(MODEL))
    checked = time.monotonic()
    run = setup(TrainJob(config, found, MODEL, default_placement(), load_tokenizer(MODEL), read_shapes(MODEL)))
    ready = time.monotonic()
    for _ in loop.train(run):
        pass
    return {
        "images": len(run.data.examples),
        "check_s": checked - began,
        "setup_s": ready - checked,
        "imports_mb": before / 1e6,
        "peak_mb": _peak_bytes() / 1e6,
    }


def _peak_bytes() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    print("| images | cache | check, s | setup, s | peak, MB |\n|---|---|---|---|---|")
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as work:
            images = Path(work) / "images"
            images.mkdir()
            write_images(images, count)
            for cache, named in (("cold", "cache"), ("warm", "cache"), ("none", "")):
                environment = {**os.environ, "CACHE_DIR": str(Path(work) / named) if named else ""}
                command = [sys.executable, "-m", "benchmarks.many_images", "--measure", str(images)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {found['images']} | {cache} | {found['check_s']:.1f} | {found['setup_s']:.1f} | "
                    f"{found['peak_mb']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
