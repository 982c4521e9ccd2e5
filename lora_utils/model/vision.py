"""What the text encoder of an editing model sees: its vision tower, an image's features and their positions.

Legend: P patches of 14 x 14 pixels, V features (a patch of 2 x 2 patches each), D the text encoder's width.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_utils.errors import UserError
from lora_utils.model.device import Placement, freeze_on_device
from lora_utils.model.loading import check_complete, empty_weights, fill_parameters, stream_tensors

SIDE_MULTIPLE_PX = 32  # of an image to edit (diffusers, `calculate_dimensions`)


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the language model is shown of an image: features [V, D] in rows of a grid."""

    states: Tensor
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower, and the processor that cuts an image into its patches."""

    tower: Qwen2_5_VisionTransformerPretrainedModel
    processor: Qwen2VLImageProcessorPil


def _empty_tower(folder: Path) -> Qwen2_5_VisionTransformerPretrainedModel:
    config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder").vision_config
    with empty_weights():
        return Qwen2_5_VisionTransformerPretrainedModel(cast(Any, config))


def count_vision_weights(folder: Path) -> int:
    """Return how many weights a model folder's vision tower has, by its config."""
    return sum(parameter.numel() for parameter in _empty_tower(folder).parameters())


def load_vision(folder: Path, placement: Placement) -> Vision:
    """Load the vision tower of a model folder, and its processor's settings."""
    source, tower = folder / "text_encoder", _empty_tower(folder)
    weights = stream_tensors(source, placement.device, placement.dtype, _vision_name)
    fill_parameters(tower, weights, source)
    check_complete(tower, source)
    freeze_on_device(tower, placement)
    return Vision(tower, load_processor(folder))


def _vision_name(stored: str) -> str | None:
    """Return a weight's name within the vision tower; None for the language model's and the head's."""
    _, found, name = stored.rpartition("visual.")
    return name if found else None


def load_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """Read the settings of a model folder's image processor. Pillow resizes, so torchvision isn't needed.

    Raises UserError for a file that isn't JSON.
    """
    path = folder / "processor" / "preprocessor_config.json"
    try:
        settings = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}); download the model again.") from error
    known = ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    size = settings.get("size") or {}
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    given = {name: settings[name] for name in known if settings.get(name) is not None}
    if least and most:
        given |= {"min_pixels": least, "max_pixels": most}
    return Qwen2VLImageProcessorPil(**given)


def feature_count(processor: Qwen2VLImageProcessorPil, width_px: int, height_px: int) -> int:
    """Return how many features an image of this size becomes, V."""
    return processor.get_number_of_image_patches(height_px, width_px) // processor.merge_size**2


def area_size(width_px: int, height_px: int, area_px: int) -> tuple[int, int]:
    """Return the width and height in pixels of an image scaled to an area, in multiples of 32.

    It is diffusers' `calculate_dimensions`, but for a side of 0.
    """
    width = math.sqrt(area_px * width_px / height_px)
    height = width * height_px / width_px
    sides = (max(1, round(side / SIDE_MULTIPLE_PX)) * SIDE_MULTIPLE_PX for side in (width, height))
    wide, high = sides
    return wide, high


def resized(image: Image.Image, area_px: int) -> Image.Image:
    """Scale an image to an area, as diffusers' VaeImageProcessor does: by Lanczos."""
    return image.resize(area_size(*image.size, area_px), Image.Resampling.LANCZOS)


@torch.no_grad()
def see(vision: Vision, images: Sequence[Image.Image]) -> list[VisionFeatures]:
    """Return what the language model is shown of RGB images, each scaled beforehand to what the variant says."""
    cut = vision.processor(images=list(images), return_tensors="pt")
    return features(vision.tower, cut["pixel_values"], cut["image_grid_thw"])


def features(tower: Qwen2_5_VisionTransformerPretrainedModel, patches: Tensor, grids: Tensor) -> list[VisionFeatures]:
    """Return the features of images cut into patches [P, 3 * 2 * 14 * 14]; grids [I, 3] are 1, rows and columns."""
    like = next(tower.parameters())
    states = tower(patches.to(like), grid_thw=grids.to(like.device)).pooler_output  # [V, D], of all images
    merge = tower.spatial_merge_size
    sizes = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in grids.tolist()]
    parts = states.split([rows * columns for rows, columns in sizes])
    return [VisionFeatures(part, *size) for part, size in zip(parts, sizes, strict=True)]


def positions(ids: Sequence[int], image_id: int, images: Sequence[VisionFeatures]) -> Tensor:
    """Return M-RoPE's positions [3, T] (frame, row, column) of a prompt with the images' marks in it.

    A text token has the same position on all axes. An image's features lie in a grid whose frame is where the text had
    come to, and the text after it goes on behind the grid's longer side (Qwen2-VL, section 2.1; transformers'
    `get_rope_index`). diffusers 0.42 with transformers 5 leaves them out (diffusers' issue 14194).
    """
    parts, at, next_image, token = [], 0, iter(images), 0
    while token < len(ids):
        if ids[token] != image_id:
            parts.append(torch.tensor([[at]] * 3))
            at, token = at + 1, token + 1
            continue
        image = next(next_image)
        row, column = torch.meshgrid(torch.arange(image.rows), torch.arange(image.columns), indexing="ij")
        parts.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1) + at)  # [3, V]
        at, token = at + max(image.rows, image.columns), token + image.rows * image.columns
    return torch.cat(parts, dim=1)  # [3, T]
