"""How a call samples, beyond what it draws: from a picture that it starts with, and fast where that is asked for.

Owns what the inputs image, mask, strength and go_fast come to; must not know Cog, nor how steps are taken.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_utils import flow, models, qwen
from lora_utils.config import SampleRequest
from lora_utils.dataset import Example, load_pixels
from lora_utils.errors import UserError
from lora_utils.masks import load_mask, open_mask, problem_of
from lora_utils.pictures import open_picture
from lora_utils.sampling import Start, Ways
from lora_utils.sizes import Size, picture_size
from lora_utils.weights import Weights, is_lightning

log = logging.getLogger(__name__)

LIGHTNING_STEPS = 8  # the most that a Lightning LoRA was distilled for
REUSE_THRESHOLD = 0.1  # by which the first block may move: see README for what it costs and wins
REPAINTED_SHARE = 0.02  # of a latent's pixels under the mask's white that make it one to be drawn anew


def starting_point(
    components: models.Components, request: SampleRequest, image: Path | None, mask: Path | None
) -> tuple[Size, Start | None]:
    """The size of the pictures, and what they start from."""
    if image is None:
        if mask is not None:
            raise UserError("mask says what of image is drawn anew, and there is no image; give both.")
        return picture_size(request.width, request.height, request.aspect_ratio, request.megapixels), None
    for path in (image, mask):
        if path is not None and not path.is_file():
            raise UserError(f"there is no file {str(path)!r}; give a path, a URL or a data URI of a picture.")
    opened = open_picture(image)
    size = picture_size(request.width, request.height, request.aspect_ratio, request.megapixels, opened.size)
    if mask is not None and (problem := problem_of(open_mask(mask), mask.name, opened.size)):
        raise UserError(problem)
    with torch.inference_mode():
        clean = models.encode_pictures(components.vae, load_pixels(Example(image, "", size)).unsqueeze(0)).cpu()
    if mask is None:
        return size, Start(clean)
    touched = load_mask(image, mask, size) > REPAINTED_SHARE  # [N, 4], a token's four latents
    return size, Start(clean, touched.repeat(1, qwen.LATENT_CHANNELS).unsqueeze(0))


def fast_ways(request: SampleRequest, loras: Sequence[Weights], start: Start | None) -> tuple[SampleRequest, Ways]:
    """How to go fast, if that is asked for, and what is said of it. The number of steps is the caller's."""
    lightning = next((weights for weights in loras if is_lightning(weights)), None)
    if not request.go_fast:
        if lightning:
            log.info("hint: %s was made for go_fast, which takes its schedule and turns guidance off", lightning.name)
        return request, Ways(start)
    if lightning is None:
        log.info("go_fast: steps that change little reuse earlier work; the picture differs from the full run's")
        return request, Ways(start, reuse_threshold=REUSE_THRESHOLD)
    log.info("go_fast: %s draws without guidance, on its own schedule, in %d steps", lightning.name, request.steps)
    if request.steps > LIGHTNING_STEPS:
        log.info("hint: such LoRAs were made for 4 or 8 steps; %d take longer and gain nothing", request.steps)
    return replace(request, guidance=1.0), Ways(start, schedule=flow.LIGHTNING)
