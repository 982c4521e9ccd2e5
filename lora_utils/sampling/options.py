"""Sampling options: what the inputs image, mask, strength and go_fast come to."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from lora_utils import constants
from lora_utils.config import SampleFiles, SampleRequest
from lora_utils.errors import UserError
from lora_utils.io.images import load_pixels, mask_problem, open_crop, open_image, open_mask
from lora_utils.lora.weights import Weights, is_lightning
from lora_utils.model import flow
from lora_utils.model.components import Components
from lora_utils.model.controls import Controls, aspect_problem, control_area_px, encode_controls
from lora_utils.model.latents import Size, image_size, mask_shares
from lora_utils.model.vae import encode_images
from lora_utils.model.variant import Variant
from lora_utils.model.vision import area_size

log = logging.getLogger(__name__)

LIGHTNING_STEPS = 8  # the most that a Lightning LoRA was distilled for
REUSE_THRESHOLD = (
    0.08  # by which the first block may be off what was foretold: docs/benchmarks.md has what it costs and wins
)
FEATHER_OF_SIDE = 256  # an image's shorter side by the blur of a mask's edge: 4 pixels at 1024
REPAINTED_SHARE = 0.02  # of a latent's pixels under the mask's white from which on it is generated again


@dataclass(frozen=True, slots=True)
class KeptPixels:
    """What a mask keeps of an image: its pixels themselves, for the VAE gives none back as it was."""

    original: Image.Image  # RGB
    shares: Image.Image  # L, of what is generated; 0 where the mask is black

    def paste_into(self, generated: Image.Image) -> Image.Image:
        """Return the generated image with the kept pixels in it, bit for bit."""
        return Image.composite(generated, self.original, self.shares)


@dataclass(frozen=True, slots=True)
class InitImage:
    """An image to start from, on the CPU."""

    clean: Tensor  # latents [1, N, C] fp32
    repaint: Tensor | None = None  # [1, N, C] bool: what is generated again, the rest stays; None: all of it
    kept: KeptPixels | None = None  # with a mask


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How a call samples, beyond what its request says."""

    init_image: InitImage | None = None
    schedule: flow.Schedule | None = None  # in place of the model's own
    reuse_threshold: float | None = None  # of the first-block cache; None computes every block of every step


def check_files(files: SampleFiles, variant: Variant) -> None:
    """Raise UserError for images that are missing, of no use to the base model, or no files."""
    others = [name for name in ("image_2", "image_3") if getattr(files, name) is not None]
    if files.mask is not None and files.image is None:
        raise UserError("mask says what of image is generated again, and there is no image; give both.")
    if others and not variant.edits:
        raise UserError(
            f"{others[0]} is an image to edit, and the base model makes images from text; leave it out, or set "
            f"BASE_MODEL to {constants.EDIT_MODEL}."
        )
    if variant.edits and files.image is None:
        raise UserError("the base model edits images, and there is none; give image.")
    if files.image_3 is not None and files.image_2 is None:
        raise UserError("image_3 is given without image_2; give them in order.")
    if len(others) >= variant.most_controls > 0:
        raise UserError(f"{others[0]} is one image too many: the base model edits {variant.most_controls} at once.")
    for path in (files.image, files.image_2, files.image_3, files.mask):
        if path is not None and not path.is_file():
            raise UserError(f"there is no file {str(path)!r}; give a path, a URL or a data URI of an image.")


def load_controls(
    components: Components, request: SampleRequest, files: SampleFiles, loras: Sequence[Weights]
) -> tuple[Size, Controls]:
    """Return the size of the images that are made, and the images to edit.

    The size is width and height if given, else the last image's aspect ratio in an area of 1024 x 1024, or of
    `megapixels`. The images have the area that the request says, else the first LoRA's training, else 1024 x 1024.
    """
    paths = [path for path in (files.image, files.image_2, files.image_3) if path is not None]
    images = [open_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if problem := aspect_problem(path.name, *image.size):
            raise UserError(problem)
    if request.width is not None and request.height is not None:
        size = image_size(request.width, request.height, request.aspect_ratio)
    else:
        area = request.megapixels * 1e6 if request.megapixels else constants.CONTROL_AREA_PX
        size = Size(*area_size(*images[-1].size, round(area)))
    trained = [each.meta.config.get("control_resolution") for each in loras if each.meta is not None]
    resolution = request.control_resolution or next((own for own in trained if isinstance(own, str) and own), "")
    return size, encode_controls(components, images, control_area_px(resolution, size))


def load_init_image(
    components: Components, request: SampleRequest, image: Path | None, mask: Path | None, size: Size | None = None
) -> tuple[Size, InitImage | None]:
    """Return the size of the images, this one if it is known, and what they start from.

    Raises UserError for files that can't be used.
    """
    if image is None:
        return image_size(request.width, request.height, request.aspect_ratio, request.megapixels), None
    opened = open_image(image)
    size = size or image_size(request.width, request.height, request.aspect_ratio, request.megapixels, opened.size)
    opened_mask = open_mask(mask) if mask is not None else None
    if opened_mask is not None and mask is not None and (problem := mask_problem(opened_mask, mask.name, opened.size)):
        raise UserError(problem)
    with torch.inference_mode():
        clean = encode_images(components.need_vae(), load_pixels(image, size.pixels).unsqueeze(0)).cpu()
    if opened_mask is None:
        return size, InitImage(clean)
    touched = mask_shares(opened_mask, size) > REPAINTED_SHARE  # [N, 4], a token's four latents
    fitted = ImageOps.fit(opened_mask, size.pixels, Image.Resampling.BOX)  # cropped as the image is
    kept = KeptPixels(open_crop(image, size.pixels), feathered(fitted))
    return size, InitImage(clean, touched.repeat(1, constants.LATENT_CHANNELS).unsqueeze(0), kept)  # [1, N, C]


def feathered(mask: Image.Image) -> Image.Image:
    """Return a mask whose white fades at its edges, inwards: what is black stays black."""
    radius = max(1.0, min(mask.size) / FEATHER_OF_SIDE)
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
    # At a straight edge blurred is a half, and so is the share; a thin line keeps more of its white than at 2 b - 1.
    shares = np.clip(2 * blurred - 0.5, 0, 1) * np.asarray(mask, np.float32)
    return Image.fromarray(shares.round().astype(np.uint8))


def choose_options(
    request: SampleRequest, loras: Sequence[Weights], init_image: InitImage | None
) -> tuple[SampleRequest, SamplingOptions]:
    """Choose how to go fast, if that is asked for, and log it. The number of steps stays the caller's."""
    lightning = next((each for each in loras if is_lightning(each.lora)), None) if request.lightning == "auto" else None
    if request.lightning == "yes" and loras:
        lightning = loras[-1]  # the extra LoRA, where there are two
    if not request.go_fast:
        if lightning:
            log.info("hint: %s was made for go_fast, which takes its schedule and turns guidance off", lightning.name)
        return request, SamplingOptions(init_image)
    if lightning is None:
        log.info("go_fast: steps that change little reuse earlier work; the image differs from the full run's")
        return request, SamplingOptions(init_image, reuse_threshold=REUSE_THRESHOLD)
    log.info("go_fast: %s samples without guidance, on its own schedule, in %d steps", lightning.name, request.steps)
    if request.steps > LIGHTNING_STEPS:
        log.info("hint: such LoRAs were made for 4 or 8 steps; %d take longer and gain nothing", request.steps)
    return replace(request, guidance=1.0), SamplingOptions(init_image, schedule=flow.LIGHTNING)
