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
import contextlib
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from benchmarks import RESULTS
from examples import demo
from lora_utils import blocks, flops, flow, memory, models, preparation, qwen, training
from lora_utils.adapters import attach_trainable_lora, use_blocks
from lora_utils.config import TrainConfig
from lora_utils.draws import Drawn
from lora_utils.optimizers import new_optimizers
from lora_utils.placeholder import Placeholders, fresh_row, no_placeholders
from lora_utils.quantization import WEIGHT_BYTES
from lora_utils.sizes import Size
from lora_utils.streaming import fill

SOURCE = Path("random weights")
SIGMA = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Preset:
    config: dict[str, Any]  # of the transformer
    side_px: int
    text_tokens: int
    text_encoder: dict[str, Any]  # config; `wide` has one layer of 28 for its two blocks of 60


TRUE_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
TRUE_WIDTH = {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
PRESETS = {
    "tiny": Preset(
        {
            "num_layers": 6,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "axes_dims_rope": (8, 12, 12),
        },
        64,
        16,
        json.loads((demo.MODEL / "text_encoder" / "config.json").read_text())["text_config"],
    ),
    "wide": Preset({"num_layers": 2, **TRUE_WIDTH}, 512, 64, {"num_hidden_layers": 1, **TRUE_TEXT}),
    "full": Preset({"num_layers": 60, **TRUE_WIDTH}, 1024, 128, {"num_hidden_layers": 28, **TRUE_TEXT}),
}


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: a step on one batch, of one way to do it."""

    preset: Preset
    place: models.Place
    rank: int
    batch: int
    recomputed: int  # blocks; the plain way knows all or none
    quantization: str = "none"  # ours alone
    compiled: bool = False  # ours alone

    @property
    def size(self) -> Size:
        return Size(self.preset.side_px, self.preset.side_px)

    @property
    def shape(self) -> flops.Shape:
        config = self.preset.config
        width = config["attention_head_dim"] * config["num_attention_heads"]
        return flops.Shape(config["num_layers"], width, qwen.PACKED_CHANNELS, config["joint_attention_dim"])

    @property
    def flops(self) -> float:
        """Of a step."""
        return self.batch * flops.training_flops(self.shape, self.size.tokens, self.preset.text_tokens, self.recomputed)


def weights_of(config: dict[str, Any], place: models.Place) -> models.Stream:
    """Random weights, each from its own name, so that every way of computing gets the same."""
    with init_empty_weights():
        empty = QwenImageTransformer2DModel.from_config(config)
    shapes = {name: parameter.shape for name, parameter in cast(nn.Module, empty).named_parameters()}

    def stream(rename: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
        for stored, shape in shapes.items():
            if (name := rename(stored)) is not None:
                generator = torch.Generator(place.device).manual_seed(zlib.crc32(stored.encode()))
                matrix, norm = len(shape) > 1, "norm" in stored
                mean, std = float(norm and not matrix), shape[-1] ** -0.5 if matrix else 0.1
                drawn = torch.empty(shape, dtype=place.dtype, device=place.device)
                yield name, drawn.normal_(mean, std, generator=generator)

    return stream


def batch_of(job: Job) -> tuple[Drawn, Tensor]:
    """One batch and its caption's states [T, D], on the host."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, job.batch, job.size.tokens, qwen.PACKED_CHANNELS, generator=generator)
    text = torch.randn(job.preset.text_tokens, job.shape.text_width, generator=generator).to(job.place.dtype)
    sigma = torch.full((job.batch,), SIGMA)
    return Drawn(latents[0], latents[1], sigma, ("",) * job.batch, job.size, ("",) * job.batch), text


def new_run(job: Job) -> preparation.Run:
    """As `prepare` leaves one, with an empty caption's text at hand."""
    times = flow.model_time(torch.tensor([SIGMA]), job.place.dtype)
    stream = weights_of(job.preset.config, job.place)
    transformer = models.build_transformer(job.preset.config, stream, SOURCE, job.place, times, job.quantization)
    config = TrainConfig(rank=job.rank, batch_size=job.batch, seed=0)
    lora = attach_trainable_lora(transformer, config.lora_targets, job.rank, torch.Generator().manual_seed(0))
    use_blocks(transformer, job.compiled)
    blocks.recompute_first(transformer, job.recomputed)
    return preparation.Run(
        config, job.place, flow.Schedule(), transformer, lora, [], {"": batch_of(job)[1]}, no_placeholders(), None,
        cast(Any, None), new_optimizers(config, lora, (), 0.0), (), recomputed=job.recomputed,
    )  # fmt: skip


def ours(job: Job) -> Callable[[], float]:
    """The package's own step, as `train` runs it."""
    run, drawn = new_run(job), [batch_of(job)[0]]
    return lambda: training.take_step(run, drawn, 0).loss


def token(job: Job) -> Callable[[], float]:
    """The same with a fresh token in the caption: the text encoder reads it at every step, and its row learns."""
    run, drawn = new_run(job), batch_of(job)[0]
    run.tokenizer = models.load_tokenizer(demo.MODEL)  # its ids are in any vocabulary
    with torch.device(job.place.device):
        encoder: Any = cast(Any, Qwen2_5_VLTextModel)._from_config(
            Qwen2_5_VLTextConfig(**job.preset.text_encoder), dtype=job.place.dtype
        )
    run.text_encoder = encoder.eval().requires_grad_(False)
    row = fresh_row(job.shape.text_width, 1e-5, torch.Generator().manual_seed(0)).to(job.place.device).requires_grad_()
    run.placeholders = Placeholders((demo.TOKEN,), (len(run.tokenizer),), (row,))
    run.optimizers = new_optimizers(run.config, run.lora, run.placeholders.rows, 5e-4)
    caption = demo.TOKEN * (job.preset.text_tokens - qwen.TEMPLATE_SUFFIX_TOKENS)  # as long as the other ways' text
    captioned = [replace(drawn, captions=(caption,) * job.batch)]
    return lambda: training.take_step(run, captioned, 0).loss


def plain(job: Job) -> Callable[[], float]:
    """diffusers' train_dreambooth_lora_qwen_image.py, its step on one cached batch."""
    with init_empty_weights():
        transformer = cast(QwenImageTransformer2DModel, QwenImageTransformer2DModel.from_config(job.preset.config))
    fill(transformer, weights_of(job.preset.config, job.place)(lambda name: name), SOURCE)
    cast(nn.Module, transformer).to(job.place.device).requires_grad_(False)
    targets = [layer.removeprefix("attn.") for layer in qwen.ATTENTION_TARGETS]
    transformer.add_adapter(
        LoraConfig(r=job.rank, lora_alpha=job.rank, init_lora_weights="gaussian", target_modules=targets)
    )
    if job.recomputed:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    drawn, text = batch_of(job)
    mixed = job.place.dtype != torch.float32

    def step() -> float:
        with torch.autocast(job.place.device.type, job.place.dtype) if mixed else contextlib.nullcontext():
            velocity = transformer(
                hidden_states=drawn.noisy.to(job.place.device, job.place.dtype),
                encoder_hidden_states=text.to(job.place.device).expand(job.batch, -1, -1),
                encoder_hidden_states_mask=None,
                timestep=drawn.sigma.to(job.place.device),
                img_shapes=[[(1, *job.size.grid)]] * job.batch,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), drawn.target.to(job.place.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


WAYS: dict[str, Callable[[Job], Callable[[], float]]] = {"ours": ours, "plain": plain, "token": token}


# --- measuring ------------------------------------------------------------------------------------------------------


def seconds_of(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each way's step, in turns, after one to warm up."""
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds + 1):
        for way, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                taken[way].append(time.perf_counter() - began)
    return {way: statistics.median(values) for way, values in taken.items()}


def memory_of(way: str, arguments: argparse.Namespace) -> float:
    """Peak bytes of one way, in a process of its own, beyond what the process had before the model."""
    command = [sys.executable, "-m", "benchmarks.train", "--memory-of", way]
    for name in ("preset", "dtype", "rank", "batch", "recomputed", "quantization", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--compiled"] * arguments.compiled
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_memory(way: str, job: Job) -> None:
    before = memory.peak_bytes(job.place.device)
    step = WAYS[way](job)
    step()
    step()
    print(json.dumps(memory.peak_bytes(job.place.device) - before))


def where_time_goes(step: Callable[[], float], device: torch.device) -> str:
    """Shares of a step: matrix products, attention, the rest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        step()
    shares = {"matrix products": 0.0, "attention": 0.0, "the rest": 0.0}
    for event in profiled.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.lower()
        if "attention" in name or "flash" in name or "fmha" in name:
            shares["attention"] += own
        elif name in {"aten::mm", "aten::addmm", "aten::bmm"} or "gemm" in name or "cutlass" in name:
            shares["matrix products"] += own
        else:
            shares["the rest"] += own
    total = sum(shares.values())
    return ", ".join(f"{name} {own / total:.0%}" for name, own in shares.items())


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} cores of a CPU, {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="wide")
    parser.add_argument("--against", choices=["plain", "token"], help="measure this too, in turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--recomputed", type=int, default=0, help="blocks that recompute their activations")
    parser.add_argument("--quantization", choices=["none", *WEIGHT_BYTES], default="none", help="of our base alone")
    parser.add_argument("--compiled", action="store_true", help="our blocks alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    place = models.Place(torch.device(arguments.device), DTYPES[arguments.dtype])
    job = Job(
        PRESETS[arguments.preset], place, arguments.rank, arguments.batch, arguments.recomputed, arguments.quantization,
        arguments.compiled,
    )  # fmt: skip
    if arguments.memory_of:
        print_memory(arguments.memory_of, job)
        return
    ways = ["ours", *([arguments.against] if arguments.against else [])]
    peaks = {way: memory_of(way, arguments) for way in ways}
    steps = {way: WAYS[way](job) for way in ways}
    taken = seconds_of(steps, arguments.rounds)
    floor = job.flops / flops.measured_peak(place.device, place.dtype, seconds=1.0)
    command = "python -m benchmarks.train " + " ".join(word for word in sys.argv[1:] if word != "--record")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "peft"))
    lines = [f"\n`{command}`, {datetime.date.today()}, {machine(place.device)}, {versions}\n"]
    lines += ["| | s/step | TFLOP/step | floor, s | over the floor | peak memory, GB | where the time goes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for way in ways:
        spent = where_time_goes(steps[way], place.device)
        cells = [way, f"{taken[way]:.3f}", f"{job.flops / 1e12:.3g}", f"{floor:.3f}", f"{taken[way] / floor:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{peaks[way] / 1e9:.2f}", spent]) + " |")
    if arguments.against:
        faster, smaller = taken[arguments.against] / taken["ours"], peaks["ours"] / peaks[arguments.against]
        lines.append(f"\n{faster:.2f} times the speed of {arguments.against}, {smaller:.0%} of its memory.")
    print("\n".join(lines))
    if arguments.record:
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
