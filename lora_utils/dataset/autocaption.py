"""Captions for pictures that have none: the text encoder is a vision-language model, and describes them itself.

Owns the question that it is asked and how its answer becomes a caption. Its vision tower and head are loaded for this
alone and freed before anything else is.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import nn
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_utils import memory, models, qwen, streaming
from lora_utils.captions import with_trigger
from lora_utils.config import TrainConfig
from lora_utils.dataset import Dataset, load_crop

log = logging.getLogger(__name__)

QUESTION = (
    "Describe this picture in one or two sentences, as a caption: its subject, what is around it, the light, and how "
    "it is made. Say only what can be seen."
)
MAX_NEW_TOKENS = 120
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 640 * 640  # the latter is 522 tokens of 28 x 28 pixels
_IMAGE = "<|image_pad|>"


def write_captions(
    dataset: Dataset, config: TrainConfig, folder: Path, tokenizer: Qwen2Tokenizer, place: models.Place
) -> Dataset:
    """The dataset with captions for its pictures without one, each of them logged."""
    pending = {example.image_path: example for example in dataset.examples if example.image_path in dataset.uncaptioned}
    written = {}
    with _describer(folder, place) as model:
        for path, example in pending.items():
            said = describe(model, tokenizer, load_crop(example))
            caption = f"{config.autocaption_prefix}{said}{config.autocaption_suffix}".strip()
            written[path] = with_trigger(caption, config.trigger_word, config.tokens)
            log.info("caption of %s: %s", path.relative_to(dataset.folder), written[path])
    return dataset.with_captions(written)


def _name(stored: str) -> str:
    """A weight's name within the whole model, from the file's, written before or after transformers 4.52."""
    if stored == "lm_head.weight":
        return stored
    if "visual." in stored:
        return "model.visual." + stored.split("visual.", 1)[1]
    return "model.language_model." + stored.removeprefix("model.").removeprefix("language_model.")


@contextmanager
def _describer(folder: Path, place: models.Place) -> Iterator[Qwen2_5_VLForConditionalGeneration]:
    """The whole text encoder, on the device or, where that has no room, on the host; freed at the end."""
    source = folder / "text_encoder"
    with init_empty_weights():
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(source))
    needed = place.dtype.itemsize * sum(parameter.numel() for parameter in model.parameters()) + memory.SPARE_BYTES
    if needed > memory.free_bytes(place.device):
        log.info("describing pictures on the host: the whole text encoder needs %.1f GB", needed / 1e9)
        place = replace(place, device=torch.device("cpu"))
    streaming.fill(model, streaming.stream_tensors(source, place.device, place.dtype, _name), source)
    streaming.check_whole(model, source)
    cast(nn.Module, model).to(place.device).eval().requires_grad_(False)
    try:
        yield model
    finally:
        del model
        models.release_memory()


@torch.inference_mode()
def describe(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, picture: Image.Image) -> str:
    """What the model says of a picture, always the same; on one line."""
    vision = cast(Any, model.config).vision_config
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    seen = processor(images=[picture], return_tensors="pt")
    tokens = int(seen["image_grid_thw"].prod()) // vision.spatial_merge_size**2
    shown = f"<|vision_start|>{_IMAGE * tokens}<|vision_end|>"
    asked = f"<|im_start|>user\n{shown}{QUESTION}{qwen.TEMPLATE_SUFFIX}"
    ids = torch.tensor([tokenizer(asked).input_ids])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.eq(ids, cast(int, tokenizer.convert_tokens_to_ids(_IMAGE))).int(),
        "pixel_values": seen["pixel_values"].to(model.dtype),
        "image_grid_thw": seen["image_grid_thw"],
    }
    end = cast(int, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    settings = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
    answer = cast(Any, model).generate(
        **{name: value.to(model.device) for name, value in given.items()}, generation_config=settings
    )
    said = cast(str, tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    return " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())
