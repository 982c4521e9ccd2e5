"""The memory plan: which of the engine's switches a training or a server uses, chosen here before the model is loaded.

This module owns the choice and what is said of it; it doesn't know how a switch works. How many blocks are
activation-checkpointed follows from what is really free once the model is there: see `training.recompute`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from lora_utils import constants
from lora_utils.config import QUANTIZATIONS, TrainConfig, choice
from lora_utils.errors import UserError
from lora_utils.model import flops, memory, modulation, quantization
from lora_utils.model.latents import Size
from lora_utils.model.text_encoder import read_text_config

log = logging.getLogger(__name__)

# From the exact one to the one that rounds most. int8 is as large as fp8 and as slow; it is there for who asks for it.
AUTO_SCHEMES = ("none", "fp8", "nf4")
SHARDED = "sharded"

# On the careful side, for no GPU has measured them yet (`benchmarks.train --compiled` will).
COMPILE_S = 90.0  # to compile a block, forward and backward, and again for the first, whose inputs have no gradient
COMPILED_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The switches that a run or a server uses. All but the quantisation leave its numbers as they are."""

    quantization: str  # of the transformer; "none" or a scheme
    text_encoder_on_device: bool  # or on the CPU: slower, with the same result
    compiled: bool = False  # the blocks' arithmetic
    sharded: bool = False  # the transformer over several GPUs
    checkpointed_blocks: int = 0  # that keep only their inputs for the backward pass


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes: what is free, and what each part of a training or a server would take of it."""

    free: float
    text_encoder: float
    transformer: dict[str, float]  # by scheme, and SHARDED where there are several GPUs
    work: float  # a step with all blocks checkpointed, or an image of the official size
    timesteps: int = 0  # that a table in place of the modulations holds, on the CPU; 0: the modulations themselves
    purpose: str = "training"
    work_name: str = "a step at least"

    def needed(self, scheme: str, with_text_encoder: bool) -> float:
        """Return the bytes that a scheme needs, with the text encoder beside the transformer or without it."""
        text = self.text_encoder if with_text_encoder else 0.0
        return self.transformer[scheme] + self.work + text + memory.SPARE_BYTES


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to hold the model: a scheme, and whether the text encoder stays beside the transformer."""

    scheme: str
    text_encoder_stays: bool


# --- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The sizes of a model's parts, read once from their configs."""

    transformer: dict[str, Any]
    text_encoder: Qwen2_5_VLTextConfig
    vae_width: int

    @property
    def blocks(self) -> int:
        """The number of transformer blocks."""
        return self.transformer["num_layers"]

    @property
    def width(self) -> int:
        """The transformer's width, D."""
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]

    @property
    def of_flops(self) -> flops.Shape:
        """The sizes that a transformer's operations follow from."""
        text_width = self.transformer["joint_attention_dim"]
        return flops.Shape(self.blocks, self.width, constants.PACKED_CHANNELS, text_width)


def read_shapes(folder: Path) -> ModelShapes:
    """Read the sizes of a model folder's parts."""
    transformer, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae"))
    return ModelShapes(transformer, read_text_config(folder), vae["base_dim"])


def transformer_bytes(config: dict[str, Any], element_bytes: int, table: bool) -> dict[str, float]:
    """Return what a transformer of this config holds on the device, by scheme; with a table of its modulations or not.

    No weight is made for it.
    """
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel.from_config(config)
    assert isinstance(transformer, nn.Module)
    quantized, others = 0, 0
    for name, parameter in transformer.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and quantization.is_quantized(layer):
            quantized += parameter.numel()
        elif not (table and modulation.is_modulation(name)):
            others += parameter.numel()
    weight_bytes = {"none": float(element_bytes), **quantization.WEIGHT_BYTES}
    return {scheme: quantized * size + others * element_bytes for scheme, size in weight_bytes.items()}


def text_encoder_bytes(config: Qwen2_5_VLTextConfig, element_bytes: int) -> float:
    """Return what a language model of this config holds. No weight is made for it."""
    with init_empty_weights():
        language_model = Qwen2_5_VLTextModel(config)
    return float(element_bytes * sum(parameter.numel() for parameter in language_model.parameters()))


def sharded_bytes(complete: float, blocks: int, world_size: int) -> float:
    """Return what a GPU holds of a sharded transformer: its part, and two complete blocks, one of them on its way."""
    return complete / world_size + 2 * complete / blocks


# --- estimates ------------------------------------------------------------------------------------------------------


def step_size(
    config: TrainConfig, transformer: dict[str, Any], tokens: int, element_bytes: int, optimizer_bytes: float = 12.0
) -> memory.StepSize:
    """Return what the memory of a step on `tokens` tokens, image and text, of the largest batch follows from.

    `transformer` is its config. `optimizer_bytes` is what gradient and optimizer hold of a LoRA's weight, AdamW's 12.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    # A LoRA's matrices are R x D_in and D_out x R: the attention's layers are D x D, the MLPs' D x 4 D.
    widths = {
        layer: 5 if layer in constants.MLP_TARGETS else 2 for layer in constants.LORA_TARGETS[config.lora_targets]
    }
    lora = transformer["num_layers"] * config.rank * width * sum(widths.values())
    return memory.StepSize(
        transformer["num_layers"], width, tokens, config.lora_targets, element_bytes, lora, optimizer_bytes
    )


def training_estimate(
    shapes: ModelShapes, step: memory.StepSize, timesteps: int | None, free: float, world_size: int = 1
) -> MemoryEstimate:
    """Estimate a training that shows the transformer so many timesteps (None: any), with `free` bytes on each GPU."""
    table = timesteps is not None and modulation.pays(timesteps, step.width)
    schemes = transformer_bytes(shapes.transformer, step.element_bytes, table)
    if world_size > 1:
        schemes[SHARDED] = sharded_bytes(schemes["none"], step.blocks, world_size)
    return MemoryEstimate(
        free,
        text_encoder_bytes(shapes.text_encoder, step.element_bytes),
        schemes,
        step.needed_bytes(step.blocks) + 4.0 * step.lora_parameters,
        timesteps if timesteps is not None and table else 0,
    )


def sampling_estimate(shapes: ModelShapes, dtype: torch.dtype, free: float) -> MemoryEstimate:
    """Estimate a server that samples images of the official size."""
    timesteps = modulation.sampling_timesteps(dtype)
    table = timesteps is not None and modulation.pays(len(timesteps), shapes.width)
    size = Size(*constants.OFFICIAL_SIZES_PX["1:1"])
    forward = memory.sampling_bytes(size.tokens, shapes.width, dtype.itemsize)
    decode = memory.decode_bytes(size.width_px * size.height_px, dtype.itemsize, shapes.vae_width)
    return MemoryEstimate(
        free,
        text_encoder_bytes(shapes.text_encoder, dtype.itemsize),
        transformer_bytes(shapes.transformer, dtype.itemsize, table),
        max(forward, decode),
        len(timesteps) if timesteps is not None and table else 0,
        "prediction",
        "an image of the official size",
    )


# --- choices --------------------------------------------------------------------------------------------------------


def choose(candidates: Sequence[Candidate], estimate: MemoryEstimate, advice: str) -> Candidate:
    """Return the first candidate that fits. Raises UserError with the numbers of the last one if none does."""
    for candidate in candidates:
        if estimate.needed(candidate.scheme, candidate.text_encoder_stays) <= estimate.free:
            return candidate
    scheme = candidates[-1].scheme
    least = estimate.needed(scheme, candidates[-1].text_encoder_stays)
    raise UserError(
        f"{estimate.purpose} needs {least / 1e9:.3g} GB (the model in {_scheme_name(scheme)} "
        f"{estimate.transformer[scheme] / 1e9:.3g}, {estimate.work_name} {estimate.work / 1e9:.3g}, to spare "
        f"{memory.SPARE_BYTES / 1e9:.3g}), and {estimate.free / 1e9:.3g} GB are free; {advice}."
    )


def choose_training_plan(
    asked: str, estimate: MemoryEstimate, live_text: bool, compiled_s: float = 0.0, shard_base: str = "never"
) -> MemoryPlan:
    """Choose how a training holds the model. Raises UserError if nothing fits.

    `live_text`: the text encoder stays beside the transformer, because a token is trained. It is never quantised; where
    it has no room on the GPU, it runs on the CPU. `compiled_s`: seconds of the run that compiling would shorten.
    """
    schemes = schemes_for(asked, shard_base, SHARDED in estimate.transformer)
    candidates = [
        Candidate(scheme, stays) for stays in ((True, False) if live_text else (False,)) for scheme in schemes
    ]
    advice = "lower resolution or batch_size, or use a larger GPU"
    if asked not in ("auto", "nf4"):
        advice += ", or set quantization to auto"
    chosen = choose(candidates, estimate, advice)
    alone = estimate.text_encoder + memory.SPARE_BYTES <= estimate.free
    return MemoryPlan(
        quantization="none" if chosen.scheme == SHARDED else chosen.scheme,
        text_encoder_on_device=chosen.text_encoder_stays if live_text else alone,
        compiled=chosen.scheme == "none" and compiled_s * COMPILED_GAIN > COMPILE_S,
        sharded=chosen.scheme == SHARDED,
    )


def schemes_for(asked: str, shard_base: str, several: bool) -> tuple[str, ...]:
    """Return what may be tried, in this order. Raises UserError for what excludes each other.

    Sharding comes before rounding: it costs time, and nothing of the result.
    """
    if not several or shard_base == "never":
        return AUTO_SCHEMES if asked == "auto" else (asked,)
    if shard_base == "always":
        if asked not in ("auto", "none"):
            raise UserError(f"shard_base shards weights as they are; set quantization to auto, not {asked}.")
        return (SHARDED,)
    return {"auto": ("none", SHARDED, *AUTO_SCHEMES[1:]), "none": ("none", SHARDED)}.get(asked, (asked,))


def choose_sampling_plan(asked: str, estimate: MemoryEstimate) -> MemoryPlan:
    """Choose how a server holds the model: all on the GPU, else the text encoder on the CPU, else the rest rounded.

    `asked` is what QUANTIZATION says. Raises UserError where nothing fits, or for a scheme that doesn't exist.
    """
    choice("QUANTIZATION", asked, QUANTIZATIONS)
    candidates = [Candidate("none", True), *(Candidate(scheme, False) for scheme in AUTO_SCHEMES)]
    advice = "use a larger GPU"
    if asked != "auto":
        candidates = [Candidate(asked, True), Candidate(asked, False)]
        advice += ", or set QUANTIZATION to auto"
    chosen = choose(candidates, estimate, advice)
    return MemoryPlan(chosen.scheme, chosen.text_encoder_stays)


# --- what is said of it ---------------------------------------------------------------------------------------------


def _scheme_name(scheme: str) -> str:
    return {"none": "its own precision", SHARDED: "parts on several GPUs"}.get(scheme, scheme)


def describe_plan(plan: MemoryPlan, asked: str, estimate: MemoryEstimate) -> list[str]:
    """Say what a plan is, and why."""
    scheme = SHARDED if plan.sharded else plan.quantization
    lines = [
        f"memory: {estimate.free / 1e9:.3g} GB free; the transformer in {_scheme_name(scheme)} takes "
        f"{estimate.transformer[scheme] / 1e9:.3g}, the text encoder {estimate.text_encoder / 1e9:.3g}, "
        f"{estimate.work_name} {estimate.work / 1e9:.3g}"
    ]
    if estimate.timesteps:
        lines.append(f"a table of {estimate.timesteps} timesteps replaces the modulations")
    if plan.quantization != "none":
        why = "as asked" if asked != "auto" else "because it doesn't fit otherwise"
        lines.append(f"quantised to {plan.quantization} {why}: its weights are rounded, LoRAs aren't")
    if not plan.text_encoder_on_device:
        lines.append("the text encoder runs on the CPU, for want of room on the GPU: slower, with the same result")
    if plan.compiled:
        lines.append(
            "the blocks are compiled, which takes a minute or two, because the run is long enough to win it back"
        )
    return lines


def log_plan(plan: MemoryPlan, asked: str, estimate: MemoryEstimate) -> None:
    """Log what a plan is, and why."""
    for line in describe_plan(plan, asked, estimate):
        log.info(line)
