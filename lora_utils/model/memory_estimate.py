"""The memory estimate: what a training or a server would take of a GPU and of RAM, counted before a model is loaded.

No weight is made or read for it, but for the headers of the files.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.model import flops, memory, modulation, quantization
from lora_utils.model.adapter_sizes import adapted_layers, count_adapter_weights, layer_in_block
from lora_utils.model.device import Placement, free_bytes, local_processes
from lora_utils.model.latents import Size
from lora_utils.model.loading import PASSING_BYTES, empty_weights, stored_weights
from lora_utils.model.ram import free_ram_bytes
from lora_utils.model.text_encoder import read_text_config
from lora_utils.model.variant import read_variant
from lora_utils.model.vision import count_vision_weights

SHARDED = "sharded"  # stands beside the schemes where there are several GPUs


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to hold the model: a scheme, and whether the text encoder stays beside the transformer."""

    scheme: str
    text_encoder_stays: bool  # on the device
    text_encoder_on_cpu: bool = False  # for good, because a token is trained or a server encodes prompts


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes: what is free, and what each part of a training or a server would take of it.

    On a CPU there is one memory, and `ram_free` is None. Beside a GPU the RAM holds the table, the text encoder where
    the GPU has no room for it, and what passes through at loading.
    """

    free: float  # on the device
    text_encoder: float
    transformer: dict[str, float]  # by scheme, and SHARDED where there are several GPUs
    work: float  # a step with all blocks checkpointed, or an image of the official size
    timesteps: int = 0  # that a table in place of the modulations holds, on the CPU; 0: the modulations themselves
    purpose: str = "training"
    work_name: str = "a step at least"
    table: float = 0.0  # that holds these timesteps
    ram_free: float | None = None
    processes: int = 1  # of this run on this machine, each with a table of its own
    mapped_text: bool = False  # on a CPU the text encoder is a view of its files
    mapped: dict[str, float] = field(default_factory=dict)  # of the transformer on a CPU, by scheme

    def needed(self, scheme: str, with_text_encoder: bool) -> float:
        """Return the bytes that a scheme needs, with the text encoder beside the transformer or without it."""
        text = self.text_encoder if with_text_encoder else 0.0
        table = self.table if self.ram_free is None else 0.0
        return self.transformer[scheme] + self.work + text + table + memory.SPARE_BYTES

    def mapped_bytes(self, scheme: str, with_text_encoder: bool) -> float:
        """Return what of that is a view of the weights' files: the system may take it back and read it again."""
        return self.mapped.get(scheme, 0.0) + (self.text_encoder if with_text_encoder and self.mapped_text else 0.0)

    def ram_needed(self, text_encoder_on_cpu: bool) -> float:
        """Return the bytes that a run on GPUs needs of the machine's RAM, a mapped text encoder's included."""
        each = self.table + PASSING_BYTES
        text = self.text_encoder if text_encoder_on_cpu else 0.0
        shared = text if self.mapped_text else text * self.processes  # files are mapped once for all processes
        return each * self.processes + shared + memory.SPARE_BYTES

    def text_encoder_on_cpu(self, candidate: "Candidate") -> bool:
        """Return whether the text encoder runs beside the GPU: for good, or for want of room even alone on it."""
        alone = self.text_encoder + memory.SPARE_BYTES > self.free
        return not candidate.text_encoder_stays and (candidate.text_encoder_on_cpu or alone)

    def shortage(self, candidate: "Candidate") -> "Shortage":
        """Return what a way to hold the model lacks."""
        stays, scheme = candidate.text_encoder_stays, candidate.scheme
        device = self.needed(scheme, stays) - self.free
        if self.ram_free is None:
            mapped = self.mapped_bytes(scheme, stays)
            # Without a token the text encoder is alone before the transformer comes.
            alone = 0.0 if stays or self.mapped_text else self.text_encoder + memory.SPARE_BYTES - self.free
            return Shortage(max(0.0, device - mapped, alone), 0.0, max(0.0, min(device, mapped)))
        text_on_cpu = self.text_encoder_on_cpu(candidate)
        ram = self.ram_needed(text_on_cpu) - self.ram_free
        mapped = self.text_encoder if text_on_cpu and self.mapped_text else 0.0
        return Shortage(max(0.0, device), max(0.0, ram - mapped), max(0.0, min(ram, mapped)))


@dataclass(frozen=True, slots=True)
class Shortage:
    """Bytes that are missing on the device and in RAM, and bytes of mapped weights that would be read again."""

    device: float
    ram: float
    read_again: float

    @property
    def fits(self) -> bool:
        """Whether it can run at all."""
        return self.device == 0 and self.ram == 0


# --- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The sizes of a model's parts, read once from their configs."""

    transformer: dict[str, Any]
    text_encoder: Qwen2_5_VLTextConfig
    vae_width: int
    # In which dtypes they are stored; None for one that nothing computes in.
    stored_transformer: torch.dtype | None = None
    stored_text_encoder: torch.dtype | None = None
    weights: int = 0  # of transformer and text encoder
    vae_weights: int = 0
    vision_weights: int = 0  # of the vision tower, where images are to be edited

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
    stored = {part: stored_weights(folder / part) for part in ("transformer", "text_encoder", "vae")}
    return ModelShapes(
        transformer,
        read_text_config(folder),
        vae["base_dim"],
        stored["transformer"].dtype,
        stored["text_encoder"].dtype,
        stored["transformer"].count + stored["text_encoder"].count,
        stored["vae"].count,
        count_vision_weights(folder) if read_variant(folder).edits else 0,
    )


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """How many weights a transformer has: those that a scheme quantises, those that a table replaces, and the rest."""

    quantized: int
    modulations: int
    others: int


def count_weights(config: dict[str, Any]) -> WeightCounts:
    """Count the weights of a transformer of this config. No weight is made for it."""
    with empty_weights():
        transformer = QwenImageTransformer2DModel.from_config(config)
    assert isinstance(transformer, nn.Module)
    quantized, modulations, others = 0, 0, 0
    for name, parameter in transformer.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and quantization.is_quantized(layer):
            quantized += parameter.numel()
        elif modulation.is_modulation(name):
            modulations += parameter.numel()
        else:
            others += parameter.numel()
    return WeightCounts(quantized, modulations, others)


def transformer_bytes(counts: WeightCounts, element_bytes: int, table: bool) -> dict[str, float]:
    """Return what a transformer holds on the device, by scheme; with a table of its modulations or not."""
    others = counts.others + (0 if table else counts.modulations)
    weight_bytes = {"none": float(element_bytes), **quantization.WEIGHT_BYTES}
    return {scheme: counts.quantized * size + others * element_bytes for scheme, size in weight_bytes.items()}


def mapped_bytes(counts: WeightCounts, element_bytes: int, table: bool) -> dict[str, float]:
    """Return what of that are views of the files on a CPU, by scheme, where the files have the compute dtype."""
    others = float(element_bytes * (counts.others + (0 if table else counts.modulations)))
    return {"none": others + element_bytes * counts.quantized, **dict.fromkeys(quantization.WEIGHT_BYTES, others)}


def table_bytes(timesteps: int, config: dict[str, Any], element_bytes: int) -> float:
    """Return what a table of so many timesteps holds: 6 D for each of the two streams of a block."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return float(timesteps * config["num_layers"] * len(modulation.STREAMS) * 6 * width * element_bytes)


def text_encoder_bytes(config: Qwen2_5_VLTextConfig, element_bytes: int) -> float:
    """Return what a language model of this config holds. No weight is made for it."""
    with empty_weights():
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
    Raises UserError for `lora_targets` that this model hasn't.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers = adapted_layers(config.lora_targets, transformer["num_layers"])
    kept = tuple(memory.kept_widths(map(layer_in_block, names), config.adapter) for names in layers)
    weights = count_adapter_weights(config.adapter, config.rank, layers, width)
    return memory.StepSize(width, tokens, kept, element_bytes, weights, optimizer_bytes)


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that there is, for a model in a placement's dtype on its device."""

    placement: Placement
    free: float  # bytes on the device
    ram_free: float | None = None  # bytes beside a GPU; None where the device is the CPU
    processes: int = 1  # of this run on this machine


def measure_room(placement: Placement) -> Room:
    """Measure what is free now. Processes of one machine share its RAM."""
    processes, free = local_processes(), free_bytes(placement.device)
    if placement.device.type == "cuda":
        return Room(placement, free, free_ram_bytes(), processes)
    return Room(placement, free / processes, None, processes)


def training_estimate(
    shapes: ModelShapes, step: memory.StepSize, timesteps: int | None, room: Room, world_size: int = 1
) -> MemoryEstimate:
    """Estimate a training that shows the transformer so many timesteps; None: any."""
    estimate = _estimate(shapes, timesteps, room, step.needed_bytes(step.blocks) + 4.0 * step.lora_parameters)
    if world_size > 1:
        estimate.transformer[SHARDED] = sharded_bytes(estimate.transformer["none"], step.blocks, world_size)
    return estimate


def sampling_estimate(shapes: ModelShapes, room: Room) -> MemoryEstimate:
    """Estimate a server that samples images of the official size, from one image to edit where it edits."""
    dtype, size = room.placement.dtype, Size(*constants.OFFICIAL_SIZES_PX["1:1"])
    timesteps = modulation.sampling_timesteps(dtype)
    edited = constants.CONTROL_AREA_PX // constants.PIXELS_PER_TOKEN**2 if shapes.vision_weights else 0
    forward = memory.sampling_bytes(size.tokens + edited, shapes.width, dtype.itemsize)
    decode = memory.decode_bytes(size.width_px * size.height_px, dtype.itemsize, shapes.vae_width)
    work = max(forward, decode) + shapes.vae_weights * dtype.itemsize
    found = _estimate(shapes, None if timesteps is None else len(timesteps), room, work)
    text_encoder = found.text_encoder + shapes.vision_weights * dtype.itemsize  # which see images together
    return replace(found, text_encoder=text_encoder, purpose="prediction", work_name="an image of the official size")


def _estimate(shapes: ModelShapes, timesteps: int | None, room: Room, work: float) -> MemoryEstimate:
    """Estimate a model that is shown so many timesteps (None: any), with so many bytes of work beside its weights."""
    dtype, counts = room.placement.dtype, count_weights(shapes.transformer)
    table = timesteps if timesteps is not None and modulation.pays(timesteps, shapes.width) else 0
    on_cpu, size = room.ram_free is None, dtype.itemsize
    maps_transformer = on_cpu and shapes.stored_transformer == dtype
    return MemoryEstimate(
        room.free,
        text_encoder_bytes(shapes.text_encoder, size),
        transformer_bytes(counts, size, bool(table)),
        work,
        table,
        table=table_bytes(table, shapes.transformer, size),
        ram_free=room.ram_free,
        processes=room.processes,
        mapped_text=shapes.stored_text_encoder == dtype,
        mapped=mapped_bytes(counts, size, bool(table)) if maps_transformer else {},
    )
