"""Seconds and memory of an image, against what the device can do and against the stock pipeline.

    python -m benchmarks.sample --preset wide --against plain
    python -m benchmarks.sample --preset full --record         # a line in RESULTS.md

The presets' transformers are benchmarks.train's; text states are random, 6 tokens for the empty prompt. Measured is the
denoising with guidance, without the decoding: `ours` as predict.py runs it, `plain` as diffusers' pipeline does. With
`--swap` it measures how long another LoRA takes to be put in place of the last one, against loading the transformer.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.train import DTYPES, PRESETS, SOURCE, Job, machine, seconds_of, weights_of, where_time_goes
from lora_utils import flops, flow, memory, models, modulation, qwen, sampling
from lora_utils.adapters import applied, place_lora, target_names
from lora_utils.config import SampleRequest
from lora_utils.lora_file import LoraFile, LowRank, read_lora_file, write_lora_file
from lora_utils.streaming import fill

EMPTY_TOKENS = 6  # of " ", the usual negative prompt


def texts(job: Job) -> list[Tensor]:
    """States of a prompt and of the empty one, [1, T, D] each."""
    generator = torch.Generator().manual_seed(0)
    lengths = (job.preset.text_tokens, EMPTY_TOKENS)
    drawn = (torch.randn(1, length, job.shape.text_width, generator=generator) for length in lengths)
    return [states.to(job.place.device, job.place.dtype) for states in drawn]


def image_flops(job: Job, steps: int) -> float:
    """Of a guided image's denoising."""
    lengths = (job.preset.text_tokens, EMPTY_TOKENS)
    return steps * sum(flops.forward_flops(job.shape, job.size.tokens, length) for length in lengths)


def ours(job: Job, steps: int) -> Callable[[], Any]:
    """As predict.py samples, latents in and out."""
    stream = weights_of(job.preset.config, job.place)
    timesteps = modulation.sampling_timesteps(job.place.dtype)
    transformer = models.build_transformer(job.preset.config, stream, SOURCE, job.place, timesteps, "none")
    unused = cast(Any, None)
    components = models.Components(unused, flow.Schedule(), unused, unused, transformer, job.place, SOURCE)
    request = SampleRequest(prompt="", steps=steps, seed=0)
    text, empty = (models.Text(states, None) for states in texts(job))

    @torch.inference_mode()
    def image() -> Tensor:
        noise = sampling.initial_noise(job.size, seed=0)
        return sampling.denoise(components, noise, job.size, text, empty, request, lambda _step: None).cpu()

    return image


def plain(job: Job, steps: int) -> Callable[[], Any]:
    """The stock pipeline, from its noise to its latents."""
    with init_empty_weights():
        transformer = cast(QwenImageTransformer2DModel, QwenImageTransformer2DModel.from_config(job.preset.config))
    fill(transformer, weights_of(job.preset.config, job.place)(lambda name: name), SOURCE)
    cast(nn.Module, transformer).to(job.place.device).eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=qwen.BASE_IMAGE_TOKENS, max_image_seq_len=qwen.MAX_IMAGE_TOKENS, base_shift=qwen.BASE_SHIFT,
        max_shift=qwen.MAX_SHIFT, shift_terminal=qwen.SHIFT_TERMINAL, use_dynamic_shifting=True,
        time_shift_type="exponential",
    )  # fmt: skip
    unused = cast(Any, None)
    pipeline: Any = QwenImagePipeline(scheduler, unused, unused, unused, transformer)
    pipeline.set_progress_bar_config(disable=True)
    text, empty = texts(job)

    def image() -> Tensor:
        return pipeline(
            prompt_embeds=text, prompt_embeds_mask=torch.ones(text.shape[:2]), negative_prompt_embeds=empty,
            negative_prompt_embeds_mask=torch.ones(empty.shape[:2]), height=job.size.height_px, width=job.size.width_px,
            num_inference_steps=steps, true_cfg_scale=4.0, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images.cpu()  # fmt: skip

    return image


WAYS: dict[str, Callable[[Job, int], Callable[[], Any]]] = {"ours": ours, "plain": plain}


def memory_of(way: str, arguments: argparse.Namespace) -> float:
    """Peak bytes of one way, in a process of its own, beyond what the process had before the model."""
    command = [sys.executable, "-m", "benchmarks.sample", "--memory-of", way]
    for name in ("preset", "dtype", "steps", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def swap_lines(job: Job) -> list[str]:
    """Seconds to read a transformer from disk, and to read and place a rank-32 LoRA on it instead of another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "transformer").mkdir()
        stream = weights_of(job.preset.config, models.Place(torch.device("cpu"), job.place.dtype))
        save_file(dict(stream(lambda stored: stored)), folder / "transformer" / "diffusion_pytorch_model.safetensors")
        (folder / "transformer" / "config.json").write_text(
            json.dumps({"_class_name": "QwenImageTransformer2DModel", **job.preset.config})
        )
        began = time.perf_counter()
        transformer = models.load_transformer(folder, job.place, modulation.sampling_timesteps(job.place.dtype))
        loaded_s = time.perf_counter() - began
        layers = {}
        for layer in target_names(transformer, "attention"):
            wide = job.shape.width
            layers[layer] = LowRank(torch.randn(job.rank, wide), torch.randn(wide, job.rank), float(job.rank))
        swaps = []
        for index in range(4):
            write_lora_file(folder / f"{index}.safetensors", LoraFile(layers))
            began = time.perf_counter()
            placed = place_lora(read_lora_file(folder / f"{index}.safetensors"), transformer, job.place)
            with applied(transformer, [(placed, 1.0)]):
                swaps.append(time.perf_counter() - began)
    took = min(swaps)
    return [
        "| load the transformer, s | read and place another LoRA, s | share |",
        "| --- | --- | --- |",
        f"| {loaded_s:.2f} | {took:.3f} | {took / loaded_s:.1%} |",
    ]


def speed_lines(job: Job, arguments: argparse.Namespace) -> list[str]:
    ways = ["ours", *([arguments.against] if arguments.against else [])]
    peaks = {way: memory_of(way, arguments) for way in ways}
    images = {way: WAYS[way](job, arguments.steps) for way in ways}
    if arguments.against:
        ratio = (images["ours"]() - images["plain"]()).norm() / images["plain"]().norm()
    taken = seconds_of(images, arguments.rounds)
    work = image_flops(job, arguments.steps)
    floor = work / flops.measured_peak(job.place.device, job.place.dtype, seconds=1.0)
    lines = ["| | s/image | TFLOP/image | floor, s | over the floor | peak memory, GB | where the time goes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for way in ways:
        spent = where_time_goes(images[way], job.place.device)
        cells = [way, f"{taken[way]:.3f}", f"{work / 1e12:.3g}", f"{floor:.3f}", f"{taken[way] / floor:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{peaks[way] / 1e9:.2f}", spent]) + " |")
    if arguments.against:
        faster, smaller = taken[arguments.against] / taken["ours"], peaks["ours"] / peaks[arguments.against]
        lines.append(
            f"\n{faster:.2f} times plain's speed, {smaller:.0%} of its memory; the latents differ by {ratio:.1e}."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="wide")
    parser.add_argument("--against", choices=["plain"], help="measure this too, in turns")
    parser.add_argument("--swap", action="store_true", help="measure a LoRA's swap instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    place = models.Place(torch.device(arguments.device), DTYPES[arguments.dtype])
    job = Job(PRESETS[arguments.preset], place, rank=32, batch=1, recomputed=0)
    if arguments.memory_of:
        before = memory.peak_bytes(place.device)
        WAYS[arguments.memory_of](job, arguments.steps)()
        print(json.dumps(memory.peak_bytes(place.device) - before))
        return
    command = "python -m benchmarks.sample " + " ".join(word for word in sys.argv[1:] if word != "--record")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    lines = [f"\n`{command}`, {datetime.date.today()}, {machine(place.device)}, {versions}\n"]
    lines += swap_lines(job) if arguments.swap else speed_lines(job, arguments)
    print("\n".join(lines))
    if arguments.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
