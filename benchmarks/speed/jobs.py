"""What is measured: a step on one batch of random weights, at the small model's shape or at Qwen-Image's."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from examples import demo
from lora_utils import constants
from lora_utils.model import flops, roofline
from lora_utils.model.device import Placement
from lora_utils.model.latents import Size
from lora_utils.model.transformer import WeightStream

SOURCE = Path("random weights")
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

    def predicted_s(self, gpu: roofline.Gpu) -> float:
        """Seconds of a step at least, by a GPU's data sheet."""
        width = self.shape.width
        lora = self.shape.blocks * self.rank * width * 2 * len(constants.LORA_TARGETS[self.lora_targets])
        tokens = self.image_tokens, self.text_tokens
        step = roofline.Step(self.shape, *tokens, self.lora_targets, lora, self.checkpointed, self.quantization)
        return self.batch * replace(step, compiled=self.compiled).seconds(gpu)

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
