"""Captions for images that have none: the text encoder is a vision-language model, and describes them itself.

This module owns the question that the model is asked and how its answer becomes a caption. The vision tower and the
head are loaded for this alone, and freed before anything else is.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import with_trigger
from lora_utils.dataset.examples import Dataset
from lora_utils.errors import UserError
from lora_utils.model import memory
from lora_utils.model.device import Placement, free_bytes, freeze_on_device, release_memory
from lora_utils.model.loading import check_complete, empty_weights, fill_parameters, stored_weights, stream_tensors
from lora_utils.model.ram import free_ram_bytes

log = logging.getLogger(__name__)

QUESTION = (
    "Describe this picture in one or two sentences, as a caption: its subject, what is around it, the light, and how "
    "it is made. Say only what can be seen."
)
MAX_NEW_TOKENS = 120
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 640 * 640  # the latter is 522 tokens of 28 x 28 pixels
_IMAGE = "<|image_pad|>"


def write_captions(
    dataset: Dataset, config: TrainConfig, folder: Path, tokenizer: Qwen2Tokenizer, placement: Placement
) -> Dataset:
    """Return the dataset with captions for its images without one, and log each of them."""
    pending = {example.image_path: example for example in dataset.examples if example.image_path in dataset.uncaptioned}
    written = {}
    with _vision_language_model(folder, placement) as model:
        for path, example in pending.items():
            said = describe_image(model, tokenizer, example.crop())
            caption = f"{config.autocaption_prefix}{said}{config.autocaption_suffix}".strip()
            written[path] = with_trigger(caption, config.trigger_word, config.tokens)
            log.info("caption of %s: %s", path.relative_to(dataset.folder), written[path])
    return dataset.with_captions(written)


def _name(stored: str) -> str:
    """Return a weight's name within the complete model; files of before and after transformers 4.52 differ."""
    if stored == "lm_head.weight":
        return stored
    if "visual." in stored:
        return "model.visual." + stored.split("visual.", 1)[1]
    return "model.language_model." + stored.removeprefix("model.").removeprefix("language_model.")


@contextmanager
def _vision_language_model(folder: Path, placement: Placement) -> Iterator[Qwen2_5_VLForConditionalGeneration]:
    """Give the complete text encoder, on the device or, where that has no room, on the CPU. It is freed at the end."""
    source = folder / "text_encoder"
    with empty_weights():
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(source))
    needed = placement.dtype.itemsize * sum(parameter.numel() for parameter in model.parameters()) + memory.SPARE_BYTES
    if needed > free_bytes(placement.device):
        log.info("describing images on the CPU: the complete text encoder needs %.1f GB", needed / 1e9)
        placement = placement.on_cpu()
    if placement.device.type == "cpu" and stored_weights(source).dtype != placement.dtype:
        _check_ram(needed)
    fill_parameters(model, stream_tensors(source, placement.device, placement.dtype, _name), source)
    check_complete(model, source)
    freeze_on_device(cast(nn.Module, model), placement)
    try:
        yield model
    finally:
        del model
        release_memory()


def _check_ram(needed: float) -> None:
    """Raise UserError where the complete text encoder, converted to another dtype, has no room in memory."""
    free = free_ram_bytes()
    if needed > free:
        raise UserError(
            f"autocaption needs {needed / 1e9:.3g} GB of memory for the complete text encoder, and {free / 1e9:.3g} GB "
            "are free; write the captions yourself, or use a machine with more memory."
        )


@torch.inference_mode()
def describe_image(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, image: Image.Image) -> str:
    """Return what the model says of an image, on one line. It says the same each time."""
    # The image, as the vision tower sees it.
    vision = cast(Any, model.config).vision_config
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    seen = processor(images=[image], return_tensors="pt")
    tokens = int(seen["image_grid_thw"].prod()) // vision.spatial_merge_size**2

    # The question about it.
    shown = f"<|vision_start|>{_IMAGE * tokens}<|vision_end|>"
    asked = f"<|im_start|>user\n{shown}{QUESTION}{constants.TEMPLATE_SUFFIX}"
    ids = torch.tensor([tokenizer(asked).input_ids])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.eq(ids, _token_id(tokenizer, _IMAGE)).int(),
        "pixel_values": seen["pixel_values"].to(model.dtype),
        "image_grid_thw": seen["image_grid_thw"],
    }

    # The answer: the likeliest token each time.
    end = _token_id(tokenizer, "<|im_end|>")
    settings = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
    answer = cast(Any, model).generate(
        **{name: value.to(model.device) for name, value in given.items()}, generation_config=settings
    )
    said = str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    return " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())


def _token_id(tokenizer: Qwen2Tokenizer, token: str) -> int:
    """Return the id of one of the tokenizer's own tokens."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found
