"""Examples -> tensors on the CPU, in one pass: what a run can compute once, it computes here.

Owns which captions can be encoded beforehand; must not know of training.

Legend: N image tokens, C packed channels (64), T text tokens, D the text encoder's width.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils.dataset import Example, load_pixels
from lora_utils.models import encode_pictures, encode_text
from lora_utils.placeholder import no_placeholders
from lora_utils.sizes import Size

log = logging.getLogger(__name__)
_LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class CachedExample:
    """One picture in one bucket, ready for training. Its text is looked up by the caption."""

    latents: Tensor  # [N, C] fp32, normalised
    caption: str
    size: Size
    image_name: str


def encode_examples(vae: AutoencoderKLQwenImage, examples: Sequence[Example]) -> list[CachedExample]:
    """Each example's latents, on the CPU."""
    cached, logged = [], time.monotonic()
    for count, example in enumerate(examples, start=1):
        latents = encode_pictures(vae, load_pixels(example).unsqueeze(0))[0].cpu()
        cached.append(CachedExample(latents, example.caption, example.size, example.image_path.name))
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            log.info("encoded %d of %d pictures", count, len(examples))
    return cached


@torch.no_grad()
def encode_fixed_captions(
    text_encoder: Qwen2_5_VLTextModel, tokenizer: Qwen2Tokenizer, captions: Iterable[str]
) -> dict[str, Tensor]:
    """Caption -> states [T, D] on the CPU. Captions with a placeholder token aren't fixed: their row is learning."""
    return {
        caption: encode_text(text_encoder, tokenizer, [caption], no_placeholders()).states[0].cpu()
        for caption in dict.fromkeys(captions)
    }
