"""Images to edit, as an editing model is given them: latents beside the noise, and what its text encoder sees.

Legend: M tokens of all of an example's images, C packed channels (64).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from lora_utils import constants
from lora_utils.io.images import to_pixels
from lora_utils.model.components import Components
from lora_utils.model.latents import ControlLatents, Size
from lora_utils.model.vae import encode_images
from lora_utils.model.vision import VisionFeatures, area_size, resized, see


@dataclass(frozen=True, slots=True)
class Controls:
    """The images to edit of one example or request, encoded: latents [M, C] and the text encoder's view of each.

    `key` tells them apart where texts that were encoded with them are kept; empty: none are.
    """

    latents: ControlLatents
    seen: tuple[VisionFeatures, ...]
    key: str = ""


def no_controls() -> Controls:
    """Return no images: what an editing model is shown where they are dropped."""
    return Controls(ControlLatents(torch.empty(0, constants.PACKED_CHANNELS), ()), ())


def text_key(prompt: str, controls: Controls | None) -> str:
    """Return what a prompt's embeddings are kept under: what they follow from beside the model."""
    return f"{prompt}\0{controls.key}" if controls is not None and controls.key else prompt


def control_area_px(resolution: str, like: Size) -> int:
    """Return the area in pixels that images to edit are scaled to; auto: that of the image that is made of them."""
    if resolution == "auto":
        return like.width_px * like.height_px
    return int(resolution) ** 2 if resolution else constants.CONTROL_AREA_PX


def prompt_of(key: str) -> str:
    """Return the prompt that embeddings are kept under by this key."""
    return key.partition("\0")[0]


MOST_ASPECT = 50  # of an image to edit; transformers' processor refuses 200 once it is scaled


def aspect_problem(name: str, width_px: int, height_px: int) -> str:
    """Return what is wrong with an image that is too long for its width to be edited; nothing for any other."""
    if max(width_px, height_px) <= MOST_ASPECT * min(width_px, height_px):
        return ""
    return (
        f"{name} has {width_px}x{height_px} pixels, and an image to edit may be {MOST_ASPECT} times as long as it is "
        "wide; crop it."
    )


def control_sizes(images_px: Sequence[tuple[int, int]], area_px: int) -> tuple[Size, ...]:
    """Return the sizes at which images of these widths and heights are encoded: in an area, their aspect ratio kept."""
    return tuple(Size(*area_size(*pixels, area_px)) for pixels in images_px)


@torch.inference_mode()
def encode_controls(components: Components, images: Sequence[Image.Image], area_px: int) -> Controls:
    """Encode RGB images to edit, each scaled to an area in pixels. The result is on the CPU.

    The text encoder sees them at the area that its variant says, or at this one.
    """
    sizes = control_sizes([image.size for image in images], area_px)
    scaled = [image.resize(size.pixels, Image.Resampling.LANCZOS) for image, size in zip(images, sizes, strict=True)]
    vae = components.need_vae()
    tokens = torch.cat([encode_images(vae, to_pixels(image).unsqueeze(0))[0].cpu() for image in scaled])  # [M, C]
    shown_px = components.variant.vision_area_px
    shown = scaled if shown_px is None else [resized(image, shown_px) for image in images]
    seen = [replace(image, states=image.states.cpu()) for image in see(components.need_vision(), shown)]
    return Controls(ControlLatents(tokens, sizes), tuple(seen))
