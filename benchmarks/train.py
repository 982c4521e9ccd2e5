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
from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.lora.adapter import AdapterSettings, attach_adapter
from lora_utils.model import flops, flow, quantization, roofline
from lora_utils.model.components import Components
from lora_utils.model.controls import Controls
from lora_utils.model.device import Placement, peak_bytes
from lora_utils.model.latents import ControlLatents, Size
from lora_utils.model.loading import fill_parameters
from lora_utils.model.memory_plan import MemoryPlan
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.model.transformer import Storage, WeightStream, build_transformer
from lora_utils.placeholder.embedding import initial_embedding
from lora_utils.placeholder.tokens import Placeholders, no_placeholders
from lora_utils.training import loop
from lora_utils.training.batches import Batch, LargestBatch
from lora_utils.training.distributed import SINGLE_PROCESS
from lora_utils.training.optimizers import new_optimizers
from lora_utils.training.preserved import NOTHING
from lora_utils.training.recompute import change_plan
from lora_utils.training.state import TrainData, TrainState

SOURCE = Path("random weights")
SIGMA = 0.5
SEEN_TOKENS = 204  # of an image of 384 x 384: 14 x 14 features, its marks and its label
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
    """What is measured: a step on one batch, computed one way."""

    preset: Preset
    placement: Placement
    rank: int
    batch: int
    checkpointed: int  # blocks; the plain one knows all or none
    quantization: str = "none"  # ours alone
    compiled: bool = False  # ours alone
    lora_targets: str = "attention"  # ours alone
    edit: bool = False  # as Qwen-Image-Edit-2511, with an image to edit of the target's size

    @property
    def size(self) -> Size:
        return Size(self.preset.side_px, self.preset.side_px)

    @property
    def config(self) -> dict[str, Any]:
        """Of the transformer."""
        return {**self.preset.config, "zero_cond_t": True} if self.edit else self.preset.config

    @property
    def image_tokens(self) -> int:
        """Of the target, and of the image to edit."""
        return self.size.tokens * (2 if self.edit else 1)

    @property
    def text_tokens(self) -> int:
        """Of the caption, and of what the text encoder sees of the image to edit."""
        return self.preset.text_tokens + (SEEN_TOKENS if self.edit else 0)

    @property
    def shape(self) -> flops.Shape:
        config = self.preset.config
        width = config["attention_head_dim"] * config["num_attention_heads"]
        return flops.Shape(config["num_layers"], width, constants.PACKED_CHANNELS, config["joint_attention_dim"])

    def predicted_s(self, card: roofline.Card) -> float:
        """Seconds of a step at least, by a GPU's data sheet."""
        width = self.shape.width
        lora = self.shape.blocks * self.rank * width * 2 * len(constants.LORA_TARGETS[self.lora_targets])
        tokens = self.image_tokens, self.text_tokens
        step = roofline.Step(self.shape, *tokens, self.lora_targets, lora, self.checkpointed, self.quantization)
        return self.batch * replace(step, compiled=self.compiled).seconds(card)

    @property
    def flops(self) -> float:
        """Of a step."""
        return self.batch * flops.training_flops(self.shape, self.image_tokens, self.text_tokens, self.checkpointed)


def weights_of(config: dict[str, Any], placement: Placement) -> WeightStream:
    """Random weights, each from its own name, so that every method gets the same."""
    with init_empty_weights():
        empty = QwenImageTransformer2DModel.from_config(config)
    shapes = {name: parameter.shape for name, parameter in cast(nn.Module, empty).named_parameters()}

    def stream(rename: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
        for stored, shape in shapes.items():
            if (name := rename(stored)) is not None:
                generator = torch.Generator(placement.device).manual_seed(zlib.crc32(stored.encode()))
                matrix, norm = len(shape) > 1, "norm" in stored
                mean, std = float(norm and not matrix), shape[-1] ** -0.5 if matrix else 0.1
                made = torch.empty(shape, dtype=placement.dtype, device=placement.device)
                yield name, made.normal_(mean, std, generator=generator)

    return stream


def batch_of(job: Job) -> tuple[Batch, Tensor]:
    """One batch and its caption's states [T, D], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, job.batch, job.size.tokens, constants.PACKED_CHANNELS, generator=generator)
    text = torch.randn(job.text_tokens, job.shape.text_width, generator=generator).to(job.placement.dtype)
    sigma, controls = torch.full((job.batch,), SIGMA), ()
    if job.edit:
        shown = ControlLatents(torch.randn(*latents.shape[2:], generator=generator), (job.size,))
        controls = (Controls(shown, ()),) * job.batch
    captions = ("",) * job.batch
    return Batch(latents[0], latents[1], sigma, captions, job.size, captions, controls=controls), text


def new_run(job: Job, table: bool = True) -> TrainState:
    """Return a run as `setup` does, with an empty caption's text at hand; with a table of the modulations or not."""
    times = flow.model_time(torch.tensor([SIGMA]), job.placement.dtype) if table else None
    stream, storage = weights_of(job.config, job.placement), Storage(job.quantization, times)
    transformer = build_transformer(job.config, stream, SOURCE, job.placement, storage)
    config = TrainConfig(rank=job.rank, batch_size=job.batch, lora_targets=job.lora_targets, seed=0)
    lora = attach_adapter(transformer, AdapterSettings(config.lora_targets, job.rank), torch.Generator().manual_seed(0))
    plan = MemoryPlan(job.quantization, True, job.compiled, checkpointed_blocks=job.checkpointed)
    tokens, unused = job.text_tokens, cast(Any, None)
    run = TrainState(
        config=config,
        ranks=SINGLE_PROCESS,
        base_model="",
        init_weights="",
        data=TrainData([], [], [], NOTHING, {"": batch_of(job)[1]}, {"": tokens}),
        largest=LargestBatch(job.size, "", tokens, unused),
        components=Components(unused, flow.Schedule(), None, None, transformer, job.placement, SOURCE),
        plan=plan,
        lora=lora,
        placeholders=no_placeholders(),
        initial_embeddings=(),
        optimizers=new_optimizers(config, lora, (), 0.0),
        stream=unused,
    )
    change_plan(run, compiled=job.compiled)
    return run


def ours(job: Job) -> Callable[[], float]:
    """The package's own step, as `train` runs it."""
    run, batch = new_run(job), [batch_of(job)[0]]
    return lambda: loop.take_step(run, batch, 0).loss


def token(job: Job) -> Callable[[], float]:
    """The same with a new token in the caption: the text encoder reads it at every step, and its embedding learns."""
    run, batch = with_token(job, new_run(job))
    return lambda: loop.take_step(run, [batch], 0).loss


def with_token(job: Job, run: TrainState) -> tuple[TrainState, Batch]:
    """Let a run train a token. -> the run and a batch whose caption holds it"""
    batch = batch_of(job)[0]
    run.components.tokenizer = load_tokenizer(demo.MODEL)  # its ids are in any vocabulary
    with torch.device(job.placement.device):
        encoder: Any = cast(Any, Qwen2_5_VLTextModel)._from_config(
            Qwen2_5_VLTextConfig(**job.preset.text_encoder), dtype=job.placement.dtype
        )
    run.components.text_encoder = encoder.eval().requires_grad_(False)
    row = (
        initial_embedding(job.shape.text_width, 1e-5, torch.Generator().manual_seed(0))
        .to(job.placement.device)
        .requires_grad_()
    )
    run.placeholders = Placeholders((demo.TOKEN,), (len(run.components.tokenizer),), (row,))
    run.optimizers = new_optimizers(run.config, run.lora, run.placeholders.embeddings, 5e-4)
    caption = demo.TOKEN * (job.text_tokens - constants.TEMPLATE_SUFFIX_TOKENS)  # as long as the other methods' text
    run.data = replace(run.data, text_tokens={caption: job.text_tokens})
    return run, replace(batch, captions=(caption,) * job.batch)


def plain(job: Job) -> Callable[[], float]:
    """diffusers' train_dreambooth_lora_qwen_image.py, its step on one cached batch."""
    transformer, loss_of = plain_loss(job)
    weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def plain_loss(job: Job) -> tuple[nn.Module, Callable[[], Tensor]]:
    """-> the transformer as that example adapts it, and what computes its loss"""
    with init_empty_weights():
        transformer = cast(QwenImageTransformer2DModel, QwenImageTransformer2DModel.from_config(job.config))
    fill_parameters(transformer, weights_of(job.config, job.placement)(lambda name: name), SOURCE)
    cast(nn.Module, transformer).to(job.placement.device).requires_grad_(False)
    targets = [layer.removeprefix("attn.") for layer in constants.ATTENTION_TARGETS]
    transformer.add_adapter(
        LoraConfig(r=job.rank, lora_alpha=job.rank, init_lora_weights="gaussian", target_modules=targets)
    )
    if job.checkpointed:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    batch, text = batch_of(job)
    mixed = job.placement.dtype != torch.float32

    shown = [own.latents.tokens for own in batch.controls]
    given = torch.cat([batch.noisy, torch.stack(shown)], dim=1) if shown else batch.noisy
    shapes = [(1, *job.size.grid)] * (2 if shown else 1)

    def loss_of() -> Tensor:
        with torch.autocast(job.placement.device.type, job.placement.dtype) if mixed else contextlib.nullcontext():
            velocity = transformer(
                hidden_states=given.to(job.placement.device, job.placement.dtype),
                encoder_hidden_states=text.to(job.placement.device).expand(job.batch, -1, -1),
                encoder_hidden_states_mask=None,
                timestep=batch.sigma.to(job.placement.device),
                img_shapes=[shapes] * job.batch,
                return_dict=False,
            )[0][:, : job.size.tokens]
        return F.mse_loss(velocity.float(), batch.target.to(job.placement.device))

    return cast(nn.Module, transformer), loss_of


METHODS: dict[str, Callable[[Job], Callable[[], float]]] = {"ours": ours, "plain": plain, "token": token}


# --- measuring ------------------------------------------------------------------------------------------------------


def seconds_of(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each method's step, in turns, after one to warm up."""
    taken: dict[str, list[float]] = {method: [] for method in steps}
    for number in range(rounds + 1):
        for method, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                taken[method].append(time.perf_counter() - began)
    return {method: statistics.median(values) for method, values in taken.items()}


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
    if card := roofline.find_card(job.placement.device):
        predicted = job.predicted_s(card)
        lines.append(
            f"\nPredicted for a {card.name} by its data sheet: {predicted:.3f} s a step at least; measured "
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
