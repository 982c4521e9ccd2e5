"""The rehearsal: a folder as the hub lays it out, of the true size with random weights, and this package run on it.

    python -m benchmarks.true_size /mnt/scratch/rehearsal
    python -m benchmarks.true_size /mnt/scratch/rehearsal --blocks 12 --text-layers 6      # less disk, same widths

It trains the zero-prior token and a LoRA for a few steps, generates an image with them, and prints for both what the
plan promised, the seconds of each phase, the most memory that couldn't be taken back, what was mapped from the files,
and how fast they were read, against the disk's own speed. The folder is made for it and removed at its end.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.true_size.hub_layout import HubModel, folder_bytes, resized, write_folder
from examples import demo

SPARE_DISK_BYTES = 2 * 10**9  # for the dataset, the cache of its latents and the results
SAMPLED_S = 0.1
CAPTION = f"a photo of {demo.TOKEN} on a table"
TO_EDIT = "to_edit.png"


@dataclass(slots=True)
class Watched:
    """What a process printed and when, and the most memory it had."""

    lines: list[tuple[float, str]] = field(default_factory=list)  # (seconds since the start, line)
    seconds: float = 0.0
    held: float = 0.0  # bytes that can't be taken back
    mapped: float = 0.0  # bytes of files
    reads: list[tuple[float, float]] = field(default_factory=list)  # (seconds, bytes from the disk so far)

    def at(self, pattern: str) -> float:
        """Return the seconds until the first line that matches a pattern; NaN if none does."""
        return next((at for at, line in self.lines if re.search(pattern, line)), math.nan)

    def read_until(self, seconds: float) -> float:
        """Return the bytes that were read from the disk until then."""
        return max((read for at, read in self.reads if at <= seconds), default=0.0)


def run_watched(command: Sequence[str], environment: dict[str, str]) -> Watched:
    """Run a command, print what it says, and look at its memory ten times a second. Raises if it fails."""
    watched, began = Watched(), time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(child.pid, watched, ended, began))
        watcher.start()
        assert child.stdout is not None
        for line in child.stdout:
            watched.lines.append((time.monotonic() - began, line.rstrip()))
            print(f"  {watched.lines[-1][0]:7.1f} s  {line.rstrip()}", flush=True)
        ended.set()
        watcher.join()
    watched.seconds = time.monotonic() - began
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, list(command))
    return watched


def _watch(pid: int, watched: Watched, ended: threading.Event, began: float) -> None:
    """Keep the most that a process holds and has mapped, and what it has read, until it ends."""
    while not ended.wait(SAMPLED_S):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            read = Path(f"/proc/{pid}/io").read_text()
        except OSError:
            return
        kilobytes = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
        watched.held = max(watched.held, 1024.0 * (kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0)))
        watched.mapped = max(watched.mapped, 1024.0 * kilobytes.get("RssFile", 0))
        if found := re.search(r"^read_bytes: (\d+)$", read, re.MULTILINE):
            watched.reads.append((time.monotonic() - began, float(found.group(1))))


def write_dataset(folder: Path, side_px: int, pairs: bool) -> Path:
    """Write two images with captions that hold the token, each with one to edit if `pairs`. -> the archive"""
    rng, archive = np.random.default_rng(0), folder / "dataset.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for index in range(2):
            for name in (f"{index}.png", f"{index}.control.png")[: 1 + pairs]:
                coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                image = coarse.resize((side_px, side_px), Image.Resampling.BICUBIC)
                image.save(folder / TO_EDIT)
                packed.write(folder / TO_EDIT, name)
            packed.writestr(f"{index}.txt", CAPTION)
    return archive


def forget_files(folder: Path) -> None:
    """Let the system forget what it has read of these files, so that the next start is a cold one."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path) -> float:
    """Read the largest file from the disk in one go, at most 4 GB of it. -> bytes a second"""
    largest = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    done, began = 0, time.monotonic()
    with largest.open("rb", buffering=0) as file:
        while done < 4 * 10**9 and (part := file.read(1 << 24)):
            done += len(part)
    return done / (time.monotonic() - began)


def rehearse(folder: Path, model: HubModel, steps: int, side_px: int, quantization: str) -> list[str]:
    """Train and predict on a model folder that is there. -> the lines of a table"""
    environment = {
        **os.environ,
        "BASE_MODEL": str(folder / "model"),
        "CACHE_DIR": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "QUANTIZATION": quantization,
    }
    dataset = write_dataset(folder, side_px, model.edits)
    forget_files(folder)
    own = disk_speed(folder)
    forget_files(folder)
    command, weights = [sys.executable, "-m", "lora_utils"], str(folder / "weights.zip")
    token = ["--train_placeholder_token", "--placeholder_token", demo.TOKEN, "--seed", "0"]
    size = ["--resolution", str(side_px), "--quantization", quantization, "--steps", str(steps)]
    if model.edits:
        size += ["--control_resolution", "auto"]
    trained = run_watched([*command, "train", str(dataset), "--output", weights, *token, *size], environment)
    forget_files(folder)
    what = ["--prompt", CAPTION, "--replicate_weights", weights, "--seed", "0", "--steps", "2"]
    size = ["--width", str(side_px), "--height", str(side_px)]
    if model.edits:
        size += ["--image", str(folder / TO_EDIT)]
    predicted = run_watched(
        [*command, "sample", *what, *size, "--output", str(folder / "images")],
        environment,
    )
    return describe(trained, predicted, model, own)


def describe(trained: Watched, predicted: Watched, model: HubModel, disk_bytes_per_s: float) -> list[str]:
    """Return the table of a rehearsal."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    lines = [
        f"{model.blocks} blocks, {model.text_layers} layers of the text encoder; {os.cpu_count()} cores, {memory}; the "
        f"disk alone reads {disk_bytes_per_s / 1e9:.2f} GB/s",
        "",
        "| | training | prediction |",
        "|---|---|---|",
    ]
    both = (trained, predicted)

    def row(name: str, *cells: str) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("memory that can't be taken back, at most", *(f"{each.held / 1e9:.1f} GB" for each in both))
    row("mapped from files, at most", *(f"{each.mapped / 1e9:.1f} GB" for each in both))
    ready = (trained.at("LoRA of rank"), predicted.at("^loaded "))
    row("seconds until the model is ready", *(f"{at:.0f}" for at in ready))
    read = [(each.read_until(at), at) for each, at in zip(both, ready, strict=True)]
    row("read from the disk until then", *(f"{count / 1e9:.1f} GB, {count / 1e9 / at:.2f} GB/s" for count, at in read))
    row("seconds in all", *(f"{each.seconds:.0f}" for each in both))
    row("read from the disk in all", *(f"{each.read_until(math.inf) / 1e9:.1f} GB" for each in both))
    lines.append("")
    for name, watched in (("training", trained), ("prediction", predicted)):
        lines += [
            f"{name}: {line}" for _, line in watched.lines if re.match(r"memory: |computing |at most |trained ", line)
        ]
    return lines


def main(arguments: Sequence[str] | None = None, model: HubModel | None = None) -> int:
    """Rehearse. -> 0, or 1 where the disk has no room"""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.true_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder, on a disk with room")
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--text-layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--edit", action="store_true", help="a model that edits images, and pairs to train on")
    given = parser.parse_args(arguments)
    if given.folder.exists():
        parser.error(f"{given.folder} is there already; name a new folder")
    sized = replace(resized(model or HubModel(), given.blocks, given.text_layers), edits=given.edit)
    needed = folder_bytes(sized) + SPARE_DISK_BYTES
    given.folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(given.folder).free
        print(f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free", flush=True)
        if needed > free:
            print("use another disk, or fewer --blocks and --text-layers", file=sys.stderr)
            return 1
        began = time.monotonic()
        write_folder(given.folder / "model", sized)
        print(f"written in {time.monotonic() - began:.0f} s", flush=True)
        lines = rehearse(given.folder, sized, given.steps, given.side, given.quantization)
        print("\n" + "\n".join(lines), flush=True)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    return 0
