"""Which of the engine's switches a run uses: chosen in this one place, by the memory there is, before it loads.

Owns the choice and what is said of it; must not know how a switch works. One more, how many blocks recompute their
activations, follows from what is really free once the model is there: `fitting.plan_memory`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from lora_utils import flops, memory, modulation, qwen
from lora_utils.cards import ALONE, Ranks, least
from lora_utils.config import QUANTIZATIONS, TrainConfig
from lora_utils.errors import UserError
from lora_utils.optimizers import bytes_per_weight
from lora_utils.quantization import WEIGHT_BYTES, is_quantized
from lora_utils.sizes import Size

log = logging.getLogger(__name__)

# From the exact one to the one that rounds most. int8 is as large as fp8 and as slow; it is there for who asks for it.
AUTO = ("none", "fp8", "nf4")
SHARDED = "sharded"

# On the careful side, for no card has measured them yet (`benchmarks.train --compiled` will).
COMPILE_S = 90.0  # to compile a block, forward and backward, and again for the first, whose inputs have no gradient
COMPILED_GAIN = 0.1  # of a step's time
# FLOP/s of a card that the choice is made for. A measured speed would differ from one start of a run to the next.
NOMINAL_SPEED = 4e14


@dataclass(frozen=True, slots=True)
class Plan:
    """The switches of a run. All but the quantisation leave its numbers as they are."""

    quantization: str  # of the transformer; "none" or a scheme
    text_encoder_on_card: bool  # or on the host: slower, but there
    compiled: bool = False  # the blocks' arithmetic
    sharded: bool = False  # the transformer is shared out over the cards


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes: what is free, and what each part of a run would take of it."""

    free: float
    text_encoder: float
    transformer: dict[str, float]  # by scheme, and SHARDED where there are several cards
    step: float  # with all blocks recomputed
    timesteps: int = 0  # that a table in place of the modulations holds, on the host; 0: the modulations themselves

    def needed(self, scheme: str, with_text_encoder: bool) -> float:
        text = self.text_encoder if with_text_encoder else 0.0
        return self.transformer[scheme] + self.step + text + memory.SPARE_BYTES


def schemes_for(asked: str, shard_base: str, several: bool) -> tuple[str, ...]:
    """What may be tried, in this order. Raises UserError for what excludes each other.

    Sharding comes before rounding: it costs time, and nothing of the result.
    """
    if not several or shard_base == "never":
        return AUTO if asked == "auto" else (asked,)
    if shard_base == "always":
        if asked not in ("auto", "none"):
            raise UserError(f"shard_base shares out weights as they are; set quantization to auto, not {asked}.")
        return (SHARDED,)
    return {"auto": ("none", SHARDED, *AUTO[1:]), "none": ("none", SHARDED)}.get(asked, (asked,))


def choose(asked: str, demand: Demand, live_text: bool, compiled_s: float = 0.0, shard_base: str = "never") -> Plan:
    """The first that fits, of ever smaller ones. Raises UserError if none does.

    `live_text`: the text encoder stays beside the transformer, because a token is trained. It is never quantised; where
    it has no room on the card, it runs on the host. `compiled_s`: seconds of the run that compiling would shorten.
    """
    schemes = schemes_for(asked, shard_base, SHARDED in demand.transformer)
    for stays in (True, False) if live_text else (False,):
        for scheme in schemes:
            if demand.needed(scheme, stays) <= demand.free:
                alone = demand.text_encoder + memory.SPARE_BYTES <= demand.free
                compiled = scheme == "none" and compiled_s * COMPILED_GAIN > COMPILE_S
                whole = "none" if scheme == SHARDED else scheme
                return Plan(whole, stays if live_text else alone, compiled, scheme == SHARDED)
    least = demand.needed(schemes[-1], False)
    advice = "lower resolution or batch_size, or use a larger card"
    if asked not in ("auto", "nf4"):
        advice += ", or set quantization to auto"
    raise UserError(
        f"training needs {least / 1e9:.3g} GB (the model in {_named(schemes[-1])} "
        f"{demand.transformer[schemes[-1]] / 1e9:.3g}, a step {demand.step / 1e9:.3g}, to spare "
        f"{memory.SPARE_BYTES / 1e9:.3g}), and {demand.free / 1e9:.3g} GB are free; {advice}."
    )


def _named(scheme: str) -> str:
    return {"none": "its own precision", SHARDED: "parts on several cards"}.get(scheme, scheme)


def describe(plan: Plan, asked: str, demand: Demand) -> list[str]:
    """What is said of a plan, and why it is so."""
    scheme = SHARDED if plan.sharded else plan.quantization
    lines = [
        f"memory: {demand.free / 1e9:.3g} GB free; the transformer in {_named(scheme)} takes "
        f"{demand.transformer[scheme] / 1e9:.3g}, the text encoder {demand.text_encoder / 1e9:.3g}, a step "
        f"at least {demand.step / 1e9:.3g}"
    ]
    if demand.timesteps:
        lines.append(f"a table of {demand.timesteps} timesteps stands in for the modulations")
    if plan.quantization != "none":
        why = "as asked" if asked != "auto" else "because it doesn't fit otherwise"
        lines.append(f"quantised to {plan.quantization} {why}: its weights are rounded, the LoRA isn't")
    if not plan.text_encoder_on_card:
        lines.append("the text encoder runs on the host, for want of room on the card: slower, with the same result")
    if plan.compiled:
        lines.append(
            "the blocks are compiled, which takes a minute or two, because the run is long enough to win it back"
        )
    return lines


# --- prediction -----------------------------------------------------------------------------------------------------


def choose_placement(asked: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Plan:
    """How a server holds a model: all of it on the card, else the text encoder on the host, else the rest rounded.

    `asked` is a scheme or auto. Raises UserError where no choice fits, or for a scheme that doesn't exist.
    """
    if asked not in QUANTIZATIONS:
        raise UserError(f"QUANTIZATION must be one of {', '.join(QUANTIZATIONS)}, got {asked!r}.")
    demand = sampling_demand(folder, device, dtype)
    placements = [("none", True), ("none", False), ("fp8", False), ("nf4", False)]
    if asked != "auto":
        placements = [(asked, True), (asked, False)]
    for scheme, stays in placements:
        if demand.needed(scheme, stays) <= demand.free:
            for line in describe_placement(Plan(scheme, stays), asked, demand):
                log.info(line)
            return Plan(scheme, stays)
    least = demand.needed(placements[-1][0], False)
    raise UserError(
        f"prediction needs {least / 1e9:.3g} GB with the model in {_named(placements[-1][0])}, and "
        f"{demand.free / 1e9:.3g} GB are free; use a larger card"
        + (", or set QUANTIZATION to auto." if asked != "auto" else ".")
    )


def describe_placement(placement: Plan, asked: str, demand: Demand) -> list[str]:
    """What is said of it at setup."""
    scheme, why = placement.quantization, "as QUANTIZATION asks" if asked != "auto" else "for want of room"
    where = "beside it" if placement.text_encoder_on_card else "on the host, for want of room: slower, the same result"
    lines = [
        f"memory: {demand.free / 1e9:.3g} GB free; the transformer in {_named(scheme)} takes "
        f"{demand.transformer[scheme] / 1e9:.3g}, a picture of the official size {demand.step / 1e9:.3g}; the text "
        f"encoder ({demand.text_encoder / 1e9:.3g}) runs {where}"
    ]
    if scheme != "none":
        lines.append(f"quantised to {scheme} {why}: its weights are rounded, LoRAs aren't")
    return lines


def sampling_demand(folder: Path, device: torch.device, dtype: torch.dtype) -> Demand:
    """Of a server that draws pictures of the official size, with a table for the modulations where that is smaller."""
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    text = cast(Qwen2_5_VLTextConfig, Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder").text_config)
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    timesteps = modulation.sampling_timesteps(dtype)
    table = timesteps is not None and modulation.pays(len(timesteps), width)
    size = Size(*qwen.OFFICIAL_SIZES_PX["1:1"])
    step = memory.sampling_bytes(size.tokens, width, dtype.itemsize)
    vae = json.loads((folder / "vae" / "config.json").read_text())
    decode = memory.decode_bytes(size.width_px * size.height_px, dtype.itemsize, vae["base_dim"])
    return Demand(
        memory.free_bytes(device),
        text_encoder_bytes(text, dtype.itemsize),
        transformer_bytes(transformer, dtype.itemsize, table),
        max(step, decode),
        len(timesteps) if timesteps is not None and table else 0,
    )


# --- what a run would take ------------------------------------------------------------------------------------------


def step_size(config: TrainConfig, transformer: dict[str, Any], tokens: int, element_bytes: int) -> memory.StepSize:
    """Of a step on `tokens` tokens, image and text, of the largest batch; `transformer` is its config."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    # A LoRA's matrices R x D_in and D_out x R: the attention's layers are D x D, the MLPs' D x 4 D.
    widths = {layer: 5 if layer in qwen.MLP_TARGETS else 2 for layer in qwen.LORA_TARGETS[config.lora_targets]}
    lora = transformer["num_layers"] * config.rank * width * sum(widths.values())
    return memory.StepSize(
        transformer["num_layers"], width, tokens, config.lora_targets, element_bytes, lora, bytes_per_weight(config)
    )


def transformer_bytes(config: dict[str, Any], element_bytes: int, table: bool) -> dict[str, float]:
    """What a transformer of this config holds on the device, by scheme."""
    with init_empty_weights():
        transformer = cast(nn.Module, QwenImageTransformer2DModel.from_config(config))
    quantized, others = 0, 0
    for name, parameter in transformer.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_quantized(layer):
            quantized += parameter.numel()
        elif not (table and modulation.is_modulation(name)):
            others += parameter.numel()
    weight_bytes = {"none": float(element_bytes), **WEIGHT_BYTES}
    return {scheme: quantized * size + others * element_bytes for scheme, size in weight_bytes.items()}


def text_encoder_bytes(config: Qwen2_5_VLTextConfig, element_bytes: int) -> float:
    with init_empty_weights():
        language_model = Qwen2_5_VLTextModel(config)
    return float(element_bytes * sum(parameter.numel() for parameter in language_model.parameters()))


def sharded_bytes(whole: float, blocks: int, cards: int) -> float:
    """What a card holds of a transformer that is shared out: its part, and two blocks whole, one of them on its way."""
    return whole / cards + 2 * whole / blocks


def demand_of(
    config: TrainConfig, folder: Path, device: torch.device, dtype: torch.dtype, tokens: int, timesteps: Tensor | None,
    ranks: Ranks = ALONE,
) -> Demand:  # fmt: skip
    """Of a run whose largest batch has so many tokens, and which shows the transformer these timesteps (None: any).

    On several cards, of the one with the least free memory: all of them choose alike.
    """
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    text = cast(Qwen2_5_VLTextConfig, Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder").text_config)
    size = step_size(config, transformer, tokens, dtype.itemsize)
    table = timesteps is not None and modulation.pays(len(timesteps), size.width)
    schemes = transformer_bytes(transformer, dtype.itemsize, table)
    if ranks.count > 1:
        schemes[SHARDED] = sharded_bytes(schemes["none"], size.blocks, ranks.count)
    return Demand(
        least(ranks, memory.free_bytes(device)),
        text_encoder_bytes(text, dtype.itemsize),
        schemes,
        size.needed_bytes(size.blocks) + 4.0 * size.lora_parameters,
        len(timesteps) if timesteps is not None and table else 0,
    )


def compiled_seconds(
    config: TrainConfig, folder: Path, device: torch.device, image_tokens: int, text_tokens: int
) -> float:
    """Of a run's time, what may be compiled: all of it on a card, at two thirds of the nominal speed; none on a CPU.

    There a run that goes on is the one that was never stopped, bit for bit, and compiled it wouldn't be: the code that
    the compiler makes for a shape, and how that rounds, hang on the shapes that the process has seen before.
    """
    if device.type != "cuda":
        return 0.0
    size = json.loads((folder / "transformer" / "config.json").read_text())
    width = size["num_attention_heads"] * size["attention_head_dim"]
    shape = flops.Shape(size["num_layers"], width, qwen.PACKED_CHANNELS, size["joint_attention_dim"])
    step = config.batch_size * flops.training_flops(shape, image_tokens, text_tokens, 0)
    return 1.5 * config.steps * config.gradient_accumulation * step / NOMINAL_SPEED
