"""Sampling: a prompt -> pictures, by Euler steps down the flow with true classifier-free guidance.

Owns the noise, the steps and their order; must not know Cog, files or training. Nothing outlives a call, so a cancel
at any step leaves no trace.

Legend: B batch, N image tokens, C packed channels (64).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from lora_utils import flow, models, qwen
from lora_utils.config import SampleRequest
from lora_utils.models import Components, Text
from lora_utils.placeholder import Placeholders
from lora_utils.sizes import Size, pack, picture_size


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A picture, the seed it was drawn from, and where its seconds went."""

    pixels: Image.Image
    seed: int
    denoise_s: float
    decode_s: float


def initial_noise(size: Size, seed: int) -> Tensor:
    """[1, N, C] fp32, drawn on the CPU: the same picture on any card. Laid out as the official pipeline draws it."""
    rows, columns = (2 * side for side in size.grid)  # latents
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(1, qwen.LATENT_CHANNELS, rows, columns, generator=generator))


def denoise(
    components: Components, noise: Tensor, size: Size, text: Text, empty: Text | None, request: SampleRequest,
    on_step: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """Noise [B, N, C] -> clean latents [B, N, C]. `empty` None runs without guidance; `on_step` may raise to cancel."""
    sigmas = components.schedule.sampling_sigmas(request.steps, size.tokens)
    latents = noise.to(components.place.device, components.place.dtype)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = torch.full((len(latents),), sigma)
        velocity = models.predict_velocity(components.transformer, latents, level, text, size)
        if empty is not None:
            without = models.predict_velocity(components.transformer, latents, level, empty, size)
            velocity = flow.guide(velocity, without, request.guidance)
        latents = flow.euler_step(latents, velocity, sigma, sigma_next)
        on_step(step + 1)
    return latents


def sample(
    components: Components, request: SampleRequest, placeholders: Placeholders, on_step: Callable[[int, int], None]
) -> list[GeneratedImage]:
    """Draw the request's pictures, each by itself, so that one doesn't depend on how many others were asked for.

    `on_step(picture, step)` is called after every step, both counted from 0 and 1.
    """
    size = picture_size(request.width, request.height, request.aspect_ratio)
    images = []
    with torch.inference_mode():  # here, not at setup: Cog calls from another thread each time
        text = models.encode_text(components.text_encoder, components.tokenizer, [request.prompt], placeholders)
        empty = None
        if request.guided:
            empty = models.encode_text(
                components.text_encoder, components.tokenizer, [request.negative_prompt], placeholders
            )
        for index in range(request.num_outputs):
            began = time.monotonic()
            noise = initial_noise(size, request.seed_of(index))
            latents = denoise(components, noise, size, text, empty, request, lambda step, i=index: on_step(i, step))
            denoised = time.monotonic()
            picture = models.decode_pictures(components.vae, latents, size)[0]
            decoded = time.monotonic()
            images.append(GeneratedImage(picture, request.seed_of(index), denoised - began, decoded - denoised))
    return images
