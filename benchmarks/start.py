"""How long a user waits: from a start to a training's first step, and from weights.zip to a first image.

    python -m benchmarks.start
    python -m benchmarks.start --record         # lines in RESULTS.md

On the small model, through train.py and predict.py, each in a process of its own that starts with nothing imported.
"""

import argparse
import datetime
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

WAITED_FOR = {
    "train": ("imported", "LoRA of rank", "step 1/", "wrote weights.zip"),
    "predict": ("imported", "loaded", "first image", "second image"),
}
TOLD = {
    "imported": "Python's imports",
    "LoRA of rank": "the model loaded, 15 images and their captions encoded",
    "step 1/": "the first step taken",
    "wrote weights.zip": "weights.zip written, after that one step",
    "loaded": "the model loaded",
    "first image": "a LoRA with a token loaded from weights.zip, and an image of 64x64 sampled in 20 steps",
    "second image": "the same LoRA's second image",
}


def train_once(folder: Path) -> None:
    from examples import demo  # noqa: PLC0415 (the imports are part of what is timed)
    from train import train  # noqa: PLC0415

    print("imported", flush=True)
    demo.write_dataset(folder / "dataset.zip", demo.OBJECT, demo.shapes.Prompt(demo.TOKEN))
    trained = demo.call(train, dataset=folder / "dataset.zip", **{**demo.TRAINING, "steps": 1})
    Path(str(trained.weights)).rename(folder / "weights.zip")


def predict_twice(folder: Path) -> None:
    from examples import demo  # noqa: PLC0415
    from predict import Predictor  # noqa: PLC0415

    print("imported", flush=True)
    predictor = Predictor()
    predictor.setup()
    for which in ("first", "second"):
        demo.call(predictor.predict, prompt=demo.TOKEN, replicate_weights=folder / "weights.zip", **demo.SAMPLING)
        print(f"{which} image", flush=True)


CHILDREN = {"train": train_once, "predict": predict_twice}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has taken since it started."""

    seconds: float
    cpu_seconds: float
    resident_bytes: float  # mapped files included


def usage_until(process: str, folder: Path, model: Path) -> dict[str, Usage]:
    """What a process waits for -> what it has taken until it says so."""
    began, found = time.monotonic(), {}
    # As a script, not as a part of this package, which imports more than the entry points do.
    command = [sys.executable, __file__, "--child", process, str(folder)]
    environment = {**os.environ, "BASE_MODEL": str(model), "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            for mark in WAITED_FOR[process]:
                if line.startswith(mark) and mark not in found:
                    own = psutil.Process(child.pid)
                    cpu = own.cpu_times()
                    found[mark] = Usage(time.monotonic() - began, cpu.user + cpu.system, own.memory_info().rss)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return found


def table(model: Path) -> list[str]:
    lines = ["| | s since the start | s of its own | CPU s since the start | MB in memory |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        for process in CHILDREN:
            before = 0.0
            for mark, used in usage_until(process, Path(name), model).items():
                cells = f"{used.seconds:.2f} | {used.seconds - before:.2f} | {used.cpu_seconds:.2f}"
                lines.append(f"| {process}: {TOLD[mark]} | {cells} | {used.resident_bytes / 1e6:.0f} |")
                before = used.seconds
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        sys.path.pop(0)  # this folder, whose train.py isn't the one that is meant
        CHILDREN[given.child[0]](Path(given.child[1]))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    lines = [f"\n`python -m benchmarks.start`, {datetime.date.today()}, {os.cpu_count()} cores of a CPU, {versions}\n"]
    lines += table(Path(__file__).parent.parent / "examples" / "tiny_qwen_image")
    print("\n".join(lines))
    if given.record:
        from benchmarks import RESULTS  # noqa: PLC0415 (a child does without the package)

        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
