"""Seconds and memory of an image, against what the device can do and against the stock pipeline.

    python -m benchmarks.sample --preset wide --against plain
    python -m benchmarks.sample --preset full --record         # a line in RESULTS.md

The presets' transformers are benchmarks.train's; text states are random, 6 tokens for the empty prompt. Measured is the
denoising with guidance, without the decoding: `ours` as predict.py runs it, `plain` as diffusers' pipeline does. With
`--swap` it measures how long another LoRA takes to replace the last one, against loading the transformer.
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
from benchmarks.speed.jobs import DTYPES, PRESETS, SOURCE, Job, weights_of
from benchmarks.speed.timing import machine, seconds_of, where_time_goes
from lora_utils import constants
from lora_utils.config import SampleRequest
from lora_utils.lora.formats import LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.hooks import applied_loras, move_lora
from lora_utils.lora.updates import LowRank
from lora_utils.model import flops, flow, modulation
from lora_utils.model.adapter_sizes import adapted_layers
from lora_utils.model.components import Components
from lora_utils.model.device import Placement, peak_bytes
from lora_utils.model.loading import fill_parameters
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import Storage, build_transformer, load_transformer
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.sampling import sampler
from lora_utils.sampling.sampler import Conditioning, SamplingJob

EMPTY_TOKENS = 6  # of " ", the usual negative prompt


def texts(job: Job) -> list[Tensor]:
    """States of a prompt and of the empty one, [1, T, D] each."""
    generator = torch.Generator().manual_seed(0)
    lengths = (job.preset.text_tokens, EMPTY_TOKENS)
    made = (torch.randn(1, length, job.shape.text_width, generator=generator) for length in lengths)
    return [states.to(job.placement.device, job.placement.dtype) for states in made]


def image_flops(job: Job, steps: int) -> float:
    """Of a guided image's denoising."""
    lengths = (job.preset.text_tokens, EMPTY_TOKENS)
    return steps * sum(flops.forward_flops(job.shape, job.size.tokens, length) for length in lengths)


def ours(job: Job, steps: int) -> Callable[[], Any]:
    """As predict.py samples, latents in and out."""
    stream = weights_of(job.preset.config, job.placement)
    storage = Storage(timesteps=modulation.sampling_timesteps(job.placement.dtype))
    transformer = build_transformer(job.preset.config, stream, SOURCE, job.placement, storage)
    unused = cast(Any, None)
    components = Components(unused, flow.Schedule(), None, None, transformer, job.placement, SOURCE)
    sampled = SamplingJob(SampleRequest(prompt="", steps=steps, seed=0), job.size, no_placeholders())
    text, empty = (TextEmbeddings(states, None) for states in texts(job))

    @torch.inference_mode()
    def image() -> Tensor:
        noise = sampler.initial_noise(job.size, seed=0)
        return sampler.denoise(components, sampled, noise, Conditioning(text, empty), lambda _step: None).cpu()

    return image


def plain(job: Job, steps: int) -> Callable[[], Any]:
    """The stock pipeline, from its noise to its latents."""
    with init_empty_weights():
        transformer = cast(QwenImageTransformer2DModel, QwenImageTransformer2DModel.from_config(job.preset.config))
    fill_parameters(transformer, weights_of(job.preset.config, job.placement)(lambda name: name), SOURCE)
    cast(nn.Module, transformer).to(job.placement.device).eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=constants.BASE_IMAGE_TOKENS,
        max_image_seq_len=constants.MAX_IMAGE_TOKENS,
        base_shift=constants.BASE_SHIFT,
        max_shift=constants.MAX_SHIFT,
        shift_terminal=constants.SHIFT_TERMINAL,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    unused = cast(Any, None)
    pipeline: Any = QwenImagePipeline(scheduler, unused, unused, unused, transformer)
    pipeline.set_progress_bar_config(disable=True)
    text, empty = texts(job)

    def image() -> Tensor:
        return pipeline(
            prompt_embeds=text,
            prompt_embeds_mask=torch.ones(text.shape[:2]),
            negative_prompt_embeds=empty,
            negative_prompt_embeds_mask=torch.ones(empty.shape[:2]),
            height=job.size.height_px,
            width=job.size.width_px,
            num_inference_steps=steps,
            true_cfg_scale=4.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images.cpu()

    return image


METHODS: dict[str, Callable[[Job, int], Callable[[], Any]]] = {"ours": ours, "plain": plain}


def memory_of(method: str, arguments: argparse.Namespace) -> float:
    """Peak bytes of one method, in a process of its own, beyond what the process had before the model."""
    command = [sys.executable, "-m", "benchmarks.sample", "--memory-of", method]
    for name in ("preset", "dtype", "steps", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def swap_lines(job: Job) -> list[str]:
    """Seconds to read a transformer from disk, and to read and place a rank-32 LoRA on it instead of another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "transformer").mkdir()
        stream = weights_of(job.preset.config, Placement(torch.device("cpu"), job.placement.dtype))
        save_file(dict(stream(lambda stored: stored)), folder / "transformer" / "diffusion_pytorch_model.safetensors")
        (folder / "transformer" / "config.json").write_text(
            json.dumps({"_class_name": "QwenImageTransformer2DModel", **job.preset.config})
        )
        began = time.perf_counter()
        transformer = load_transformer(
            folder, job.placement, Storage(timesteps=modulation.sampling_timesteps(job.placement.dtype))
        )
        loaded_s = time.perf_counter() - began
        layers = {}
        for layer in [
            name for block in adapted_layers("attention", len(transformer.transformer_blocks)) for name in block
        ]:
            wide = job.shape.width
            layers[layer] = LowRank(torch.randn(job.rank, wide), torch.randn(wide, job.rank), float(job.rank))
        swaps = []
        for index in range(4):
            write_lora_file(folder / f"{index}.safetensors", LoraFile(layers))
            began = time.perf_counter()
            moved = move_lora(read_lora_file(folder / f"{index}.safetensors"), transformer, job.placement)
            with applied_loras(transformer, [(moved, 1.0)]):
                swaps.append(time.perf_counter() - began)
    took = min(swaps)
    return [
        "| load the transformer, s | read and place another LoRA, s | share |",
        "| --- | --- | --- |",
        f"| {loaded_s:.2f} | {took:.3f} | {took / loaded_s:.1%} |",
    ]


def speed_lines(job: Job, arguments: argparse.Namespace) -> list[str]:
    methods = ["ours", *([arguments.against] if arguments.against else [])]
    peaks = {method: memory_of(method, arguments) for method in methods}
    images = {method: METHODS[method](job, arguments.steps) for method in methods}
    if arguments.against:
        ratio = (images["ours"]() - images["plain"]()).norm() / images["plain"]().norm()
    taken = seconds_of(images, arguments.rounds)
    work = image_flops(job, arguments.steps)
    floor = work / flops.measured_peak(job.placement.device, job.placement.dtype, seconds=1.0)
    lines = ["| | s/image | TFLOP/image | floor, s | over the floor | peak memory, GB | where the time goes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for method in methods:
        spent = where_time_goes(images[method], job.placement.device)
        cells = [method, f"{taken[method]:.3f}", f"{work / 1e12:.3g}", f"{floor:.3f}", f"{taken[method] / floor:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{peaks[method] / 1e9:.2f}", spent]) + " |")
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
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    placement = Placement(torch.device(arguments.device), DTYPES[arguments.dtype])
    job = Job(PRESETS[arguments.preset], placement, rank=32, batch=1, checkpointed=0)
    if arguments.memory_of:
        before = peak_bytes(placement.device)
        METHODS[arguments.memory_of](job, arguments.steps)()
        print(json.dumps(peak_bytes(placement.device) - before))
        return
    command = "python -m benchmarks.sample " + " ".join(word for word in sys.argv[1:] if word != "--record")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    lines = [f"\n`{command}`, {datetime.date.today()}, {machine(placement.device)}, {versions}\n"]
    lines += swap_lines(job) if arguments.swap else speed_lines(job, arguments)
    print("\n".join(lines))
    if arguments.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
