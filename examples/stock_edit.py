"""diffusers' own editing pipelines, on a folder like the small editing model's: what ours are compared with.

Two things are put right that the versions used here get wrong. transformers' processor can't be made without
torchvision, though no image needs it. diffusers 0.42 doesn't pass on which tokens are image tokens, so transformers 5
gives those a text's positions (diffusers' issue 14194).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import Qwen2VLProcessor

from lora_utils import constants
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.model.variant import EDIT, read_variant
from lora_utils.model.vision import load_processor


class _ImageProcessor(Qwen2VLProcessor):
    """transformers' processor without one for videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def load_pipeline(folder: Path, image_positions: bool = True) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """Load the pipeline of a folder. Without `image_positions` image tokens have a text's positions, as released."""
    processor = _ImageProcessor(image_processor=load_processor(folder), tokenizer=load_tokenizer(folder))
    kind = QwenImageEditPipeline if read_variant(folder) is EDIT else QwenImageEditPlusPipeline
    pipeline = kind.from_pretrained(folder, processor=processor, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if image_positions:
        mark = pipeline.tokenizer.convert_tokens_to_ids(constants.IMAGE_PAD)
        encoder = pipeline.text_encoder
        forward = encoder.forward
        encoder.forward = lambda **given: forward(**given, mm_token_type_ids=(given["input_ids"] == mark).int())
    return pipeline


def area_of(area_px: int, image: Image.Image) -> tuple[int, int]:
    """Return the width and height to which the pipelines scale an image."""
    return pipeline_qwenimage_edit_plus.calculate_dimensions(area_px, image.width / image.height)


@contextmanager
def image_area(pixels: int) -> Iterator[None]:
    """Let images to edit have this area in pixels within it: the pipelines have 1024 x 1024 as constants."""
    edit, plus = cast(Any, pipeline_qwenimage_edit), cast(Any, pipeline_qwenimage_edit_plus)
    kept_area, kept = plus.VAE_IMAGE_SIZE, edit.calculate_dimensions
    plus.VAE_IMAGE_SIZE = pixels
    edit.calculate_dimensions = lambda _area, ratio: kept(pixels, ratio)
    try:
        yield
    finally:
        plus.VAE_IMAGE_SIZE, edit.calculate_dimensions = kept_area, kept
