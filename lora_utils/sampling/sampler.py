"""Sampling: a prompt, and maybe a picture to start from -> pictures, by Euler steps with classifier-free guidance.

Owns the noise, the steps and their order; must not know Cog, files or training. Nothing outlives a call, so a cancel
at any step leaves no trace.

Legend: B batch, N image tokens, C packed channels (64).
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from lora_utils import first_block, flow, memory, models, qwen
from lora_utils.config import SampleRequest
from lora_utils.errors import UserError
from lora_utils.models import Components, Text
from lora_utils.placeholder import Placeholders
from lora_utils.sharding import sampling_mode
from lora_utils.sizes import Size, pack

log = logging.getLogger(__name__)

# Up to so many image tokens in all, both branches of the guidance go through the transformer as one batch. Beyond it
# the device is busy with one, and the mask that prompts of unequal length then need costs more than it wins.
TOGETHER_TOKENS = 1024
PROMPTS_KEPT = 16


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A picture, the seed it was drawn from, and where its seconds went: of a batch, its share."""

    pixels: Image.Image
    seed: int
    denoise_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Start:
    """A picture to start from, on the host."""

    clean: Tensor  # latents [1, N, C] fp32
    repaint: Tensor | None = None  # [1, N, C] bool: what is drawn anew, the rest stays; None: all of it


@dataclass(frozen=True, slots=True)
class Ways:
    """How a call samples, beyond what it draws."""

    start: Start | None = None
    schedule: flow.Schedule | None = None  # in place of the model's own
    reuse_threshold: float | None = None  # of `first_block.reused`; None computes every block of every step


@dataclass(slots=True)
class Prompts:
    """The last prompts' encodings, those without a placeholder token: the negative one is nearly always the same."""

    kept: dict[str, Text] = field(default_factory=dict)
    seconds: float = 0.0  # spent on encoding so far

    def encode(self, components: Components, prompt: str, placeholders: Placeholders) -> Text:
        """Its states [1, T, D]."""
        used = placeholders.used_in([prompt])
        if not used.tokens and prompt in self.kept:
            return self.kept[prompt]
        began = time.monotonic()
        encoded = models.encode_text(components.text_encoder, components.tokenizer, [prompt], used)
        text = encoded.on(components.place.device)  # from the host, where the card had no room for the text encoder
        self.seconds += time.monotonic() - began
        if not used.tokens:
            while len(self.kept) >= PROMPTS_KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[prompt] = text
        return text


def initial_noise(size: Size, seed: int) -> Tensor:
    """[1, N, C] fp32, drawn on the CPU: the same picture on any card. Laid out as the official pipeline draws it."""
    rows, columns = (2 * side for side in size.grid)  # latents
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(1, qwen.LATENT_CHANNELS, rows, columns, generator=generator))


def denoise(
    components: Components, noise: Tensor, size: Size, text: Text, empty: Text | None, request: SampleRequest,
    on_step: Callable[[int], None], start: Start | None = None, schedule: flow.Schedule | None = None,
) -> Tensor:  # fmt: skip
    """Noise [B, N, C] -> clean latents [B, N, C]. `empty` None runs without guidance; `on_step` may raise to cancel.

    `text` and `empty` are of B prompts. From a start, only the rest of the schedule is run, the last
    `request.steps_run` steps, on the start's latents noised to the first of their sigmas.
    """
    sigmas = (schedule or components.schedule).sampling_sigmas(request.steps, size.tokens)
    sigmas = sigmas[len(sigmas) - 1 - (request.steps_run if start else request.steps) :]
    place, count = components.place, len(noise)
    latents = noise.to(place.device, place.dtype)
    clean = start.clean.to(latents) if start else latents
    noise_there = latents
    repaint = start.repaint.to(place.device) if start and start.repaint is not None else None

    def noised(sigma: float) -> Tensor:
        """The start at this level of noise, in the pictures' own noise."""
        return flow.add_noise(clean.float(), noise_there.float(), torch.full((count,), sigma, device=place.device)).to(
            latents
        )

    if start:
        latents = noised(sigmas[0])
    both = models.join_texts(text, empty) if empty is not None and goes_together(size, count) else None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = torch.full((count,), sigma)
        if both is not None:
            joined = models.predict_velocity(
                components.transformer, latents.repeat(2, 1, 1), level.repeat(2), both, size
            )
            velocity = flow.guide(*joined.chunk(2), request.guidance)
        else:
            velocity = models.predict_velocity(components.transformer, latents, level, text, size)
            if empty is not None:
                without = models.predict_velocity(components.transformer, latents, level, empty, size)
                velocity = flow.guide(velocity, without, request.guidance)
        latents = flow.euler_step(latents, velocity, sigma, sigma_next)
        if repaint is not None:
            latents = torch.where(repaint, latents, noised(sigma_next))
        on_step(step + 1)
    return latents


def goes_together(size: Size, count: int) -> bool:
    """Whether guidance's two branches of so many pictures are one batch."""
    return 2 * count * size.tokens <= TOGETHER_TOKENS


def at_once(components: Components, size: Size) -> int:
    """How many pictures the memory there is takes through the transformer together; at least one is tried."""
    transformer, place = components.transformer, components.place
    needed = memory.sampling_bytes(size.tokens, transformer.inner_dim, place.dtype.itemsize)
    return max(1, int((memory.free_bytes(place.device) - memory.SPARE_BYTES) // needed))


def too_large(components: Components, size: Size) -> UserError:
    """What to say of a picture that doesn't fit, with one that would."""
    transformer, place = components.transformer, components.place
    models.release_memory()
    free, pixels = memory.free_bytes(place.device), size.width_px * size.height_px
    forward = memory.sampling_bytes(size.tokens, transformer.inner_dim, place.dtype.itemsize)
    needed = max(forward, memory.decode_bytes(pixels, place.dtype.itemsize, components.vae.config["base_dim"]))
    fitting = (
        min(0.5, max(0.0, free - memory.SPARE_BYTES) / needed) * pixels / 1e6
    )  # half of it, if arithmetic is wrong
    return UserError(
        f"a picture of {size} doesn't fit into the {free / 1e9:.3g} GB of memory that are free; set megapixels to "
        f"{max(0.05, fitting):.2g}, or width and height to no more than that."
    )


def sample(
    components: Components, request: SampleRequest, size: Size, placeholders: Placeholders,
    on_step: Callable[[range, int], None], ways: Ways | None = None, prompts: Prompts | None = None,
) -> list[GeneratedImage]:  # fmt: skip
    """Draw the request's pictures. Picture i is, to within rounding, what its seed gives alone.

    `on_step(pictures, step)` is called after every step of the pictures that are drawn together, counted from 1. Out of
    memory, fewer are drawn together; raises UserError where one alone is too much.
    """
    ways, prompts, images = ways or Ways(), prompts or Prompts(), []
    with sampling_mode(components.transformer):  # here, not at setup: Cog calls from another thread each time
        text = prompts.encode(components, request.prompt, placeholders)
        empty = prompts.encode(components, request.negative_prompt, placeholders) if request.guided else None
        # What is reused would depend on the other pictures.
        together = 1 if ways.reuse_threshold is not None else at_once(components, size)
        while len(images) < request.num_outputs:
            group = range(len(images), min(len(images) + together, request.num_outputs))
            try:
                images += _draw(components, request, size, text, empty, group, on_step, ways)
            except torch.OutOfMemoryError:
                failed = True  # dealt with below, where its tensors are no longer held by the traceback
            else:
                failed = False
            if failed and len(group) == 1:
                raise too_large(components, size)
            if failed:
                together = len(group) // 2
                models.release_memory()
                log.warning("out of memory; from here on %d pictures are drawn together", together)
    return images


def _draw(
    components: Components, request: SampleRequest, size: Size, text: Text, empty: Text | None, group: range,
    on_step: Callable[[range, int], None], ways: Ways,
) -> list[GeneratedImage]:  # fmt: skip
    """The pictures of a group, together through the transformer and one by one through the VAE."""
    began, count = time.monotonic(), len(group)
    noise = torch.cat([initial_noise(size, request.seed_of(index)) for index in group])
    with ExitStack() as stack:
        if ways.reuse_threshold is not None:
            branches = 2 if empty is not None and not goes_together(size, count) else 1
            stack.enter_context(first_block.reused(components.transformer, ways.reuse_threshold, branches))
        latents = denoise(
            components, noise, size, text.repeated(count), empty.repeated(count) if empty else None, request,
            lambda step: on_step(group, step), ways.start, ways.schedule,
        )  # fmt: skip
    share_s, images = (time.monotonic() - began) / count, []
    for index, own in zip(group, latents.split(1), strict=True):
        denoised = time.monotonic()
        picture = models.decode_pictures(components.vae, own, size)[0]
        images.append(GeneratedImage(picture, request.seed_of(index), share_s, time.monotonic() - denoised))
    return images
