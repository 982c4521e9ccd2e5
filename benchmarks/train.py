"""Seconds and memory of a training step, against what the device can do and against the straightforward way.

    python -m benchmarks.train --preset wide --against plain
    python -m benchmarks.train --preset full --record          # a line in RESULTS.md

`tiny` is the small model's shape, `wide` Qwen-Image's true width with two blocks, `full` all sixty. Weights are random
and made on the device. `plain` is peft on diffusers' modules, as diffusers' own dreambooth example trains them: LoRA in
fp32 under autocast, AdamW, latents and captions encoded beforehand. `token` is ours with a placeholder token in the
caption, which then passes through the text encoder at every step. Speed is measured with both in one process, in
turns; memory with each in a process of its own.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks import RESULTS
from benchmarks.speed.jobs import DTYPES, PRESETS, Job
from benchmarks.speed.methods import METHODS
from benchmarks.speed.timing import machine, seconds_of, where_time_goes
from lora_utils.model import flops, quantization, roofline
from lora_utils.model.device import Placement, peak_bytes


def memory_of(method: str, arguments: argparse.Namespace) -> float:
    """Peak bytes of one method, in a process of its own, beyond what the process had before the model."""
    command = [sys.executable, "-m", "benchmarks.train", "--memory-of", method]
    for name in ("preset", "dtype", "rank", "batch", "checkpointed", "quantization", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--compiled"] * arguments.compiled + ["--edit"] * arguments.edit
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_memory(method: str, job: Job) -> None:
    before = peak_bytes(job.placement.device)
    step = METHODS[method](job)
    step()
    step()
    print(json.dumps(peak_bytes(job.placement.device) - before))


def describe(
    job: Job,
    against: str | None,
    steps: dict[str, Callable[[], float]],
    taken: dict[str, float],
    peaks: dict[str, float],
) -> list[str]:
    """Return a table of what each method's step took."""
    floor = job.flops / flops.measured_peak(job.placement.device, job.placement.dtype, seconds=1.0)
    command = "python -m benchmarks.train " + " ".join(word for word in sys.argv[1:] if word != "--record")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "peft"))
    lines = [f"\n`{command}`, {datetime.date.today()}, {machine(job.placement.device)}, {versions}\n"]
    lines += ["| | s/step | TFLOP/step | floor, s | over the floor | peak memory, GB | where the time goes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for method, step in steps.items():
        spent = where_time_goes(step, job.placement.device)
        cells = [
            method,
            f"{taken[method]:.3f}",
            f"{job.flops / 1e12:.3g}",
            f"{floor:.3f}",
            f"{taken[method] / floor:.2f}x",
        ]
        lines.append("| " + " | ".join([*cells, f"{peaks[method] / 1e9:.2f}", spent]) + " |")
    if against:
        faster, smaller = taken[against] / taken["ours"], peaks["ours"] / peaks[against]
        lines.append(f"\n{faster:.2f} times the speed of {against}, {smaller:.0%} of its memory.")
    if gpu := roofline.find_gpu(job.placement.device):
        predicted = job.predicted_s(gpu)
        lines.append(
            f"\nPredicted for a {gpu.name} by its data sheet: {predicted:.3f} s a step at least; measured "
            f"{taken['ours'] / predicted:.2f} times that."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="wide")
    parser.add_argument("--against", choices=["plain", "token"], help="measure this too, in turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointed", type=int, default=0, help="blocks that are activation-checkpointed")
    parser.add_argument(
        "--quantization", choices=["none", *quantization.WEIGHT_BYTES], default="none", help="of our base alone"
    )
    parser.add_argument("--compiled", action="store_true", help="our blocks alone")
    parser.add_argument("--edit", action="store_true", help="Qwen-Image-Edit-2511, with an image of the target's size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    placement = Placement(torch.device(arguments.device), DTYPES[arguments.dtype])
    job = Job(
        PRESETS[arguments.preset],
        placement,
        arguments.rank,
        arguments.batch,
        arguments.checkpointed,
        arguments.quantization,
        arguments.compiled,
        edit=arguments.edit,
    )
    if arguments.memory_of:
        print_memory(arguments.memory_of, job)
        return
    methods = ["ours", *([arguments.against] if arguments.against else [])]
    peaks = {method: memory_of(method, arguments) for method in methods}
    steps = {method: METHODS[method](job) for method in methods}
    taken = seconds_of(steps, arguments.rounds)
    lines = describe(job, arguments.against, steps, taken, peaks)
    print("\n".join(lines))
    if arguments.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
