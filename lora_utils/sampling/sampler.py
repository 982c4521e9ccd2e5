"""Sampling: a prompt, and maybe an image to start from -> images, by Euler steps with classifier-free guidance.

This module owns the noise, the steps and their order. Nothing outlives a call, so a cancel at any step leaves no trace.

Legend: B batch, N image tokens, C packed channels (64), T text tokens, D the text encoder's width.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from lora_utils import constants
from lora_utils.config import SampleRequest
from lora_utils.errors import UserError
from lora_utils.lora.hooks import AppliedLoras
from lora_utils.model import flow, fsdp, memory
from lora_utils.model.components import Components
from lora_utils.model.controls import Controls, text_key
from lora_utils.model.device import free_bytes, release_memory, retry_after
from lora_utils.model.latents import Size, pack_latents
from lora_utils.model.text_encoder import Prompt, TextEmbeddings, concatenate_embeddings, encode_text
from lora_utils.model.transformer import predict_velocity
from lora_utils.model.vae import decode_images
from lora_utils.placeholder.embedding import embedding_sha256
from lora_utils.placeholder.tokens import Placeholders
from lora_utils.sampling.first_block_cache import first_block_caching
from lora_utils.sampling.options import SamplingOptions

log = logging.getLogger(__name__)

# Up to so many image tokens in all, both branches of the guidance go through the transformer as one batch. Beyond it
# the device is busy with one, and the mask that prompts of unequal length then need costs more than it wins.
TOGETHER_TOKENS = 1024
PROMPTS_KEPT = 16


@dataclass(frozen=True, slots=True)
class LorasByText:
    """Which of the applied LoRAs act under the prompt, and which under the negative prompt, by their indices."""

    applied: AppliedLoras
    prompt: frozenset[int]
    negative: frozenset[int]


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """What is to be sampled: the request, the images' size, the tokens that its prompts may hold, and how.

    `controls` are the images to edit, for an editing model. Without `loras`, all that are applied act under both texts.
    """

    request: SampleRequest
    size: Size
    placeholders: Placeholders
    options: SamplingOptions = field(default_factory=SamplingOptions)
    controls: Controls | None = None
    loras: LorasByText | None = None

    @property
    def tokens(self) -> int:
        """How many image tokens one image takes in the transformer: its own, and those of the images to edit."""
        return self.size.tokens + (len(self.controls.latents.tokens) if self.controls else 0)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The encoded prompt and, where guidance is on, the negative prompt, of B images each."""

    text: TextEmbeddings
    negative: TextEmbeddings | None

    def repeated(self, count: int) -> "Conditioning":
        """Return the same for so many images."""
        return Conditioning(self.text.repeated(count), self.negative.repeated(count) if self.negative else None)


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image, the seed it was sampled from, and where its seconds went: of a batch, its share."""

    pixels: Image.Image
    seed: int
    denoise_s: float
    decode_s: float


@dataclass(slots=True)
class PromptCache:
    """The embeddings of the last prompts: the negative one is nearly always the same, and seeds are tried in turn.

    A prompt with a placeholder token is kept with what its embedding was: other weights have another one.
    """

    kept: dict[str, TextEmbeddings] = field(default_factory=dict)
    seconds: float = 0.0  # spent on encoding so far

    def encode(
        self, components: Components, prompt: str, placeholders: Placeholders, controls: Controls | None = None
    ) -> TextEmbeddings:
        """Return a prompt's embeddings, states [1, T, D]; those with images to edit are kept if these have a key."""
        used = placeholders.used_in([prompt])
        read = zip(used.tokens, used.embeddings, strict=True)
        key = text_key(prompt, controls) + "".join(f"\0{token}{embedding_sha256(each)}" for token, each in read)
        keep = controls is None or bool(controls.key) or not controls.seen
        if keep and key in self.kept:
            return self.kept[key]
        began = time.monotonic()
        given = Prompt(prompt, controls.seen if controls else ())
        encoder, tokenizer = components.need_text_encoder(), components.tokenizer
        encoded = encode_text(encoder, tokenizer, [given], used, components.variant)
        text = encoded.on(components.placement.device)  # from the CPU, where the GPU had no room for the text encoder
        self.seconds += time.monotonic() - began
        if keep:
            while len(self.kept) >= PROMPTS_KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = text
        return text


def initial_noise(size: Size, seed: int) -> Tensor:
    """Return [1, N, C] fp32, sampled on the CPU: the same image on any GPU. Laid out as the official pipeline does."""
    rows, columns = (2 * side for side in size.grid)  # latents
    generator = torch.Generator().manual_seed(seed)
    return pack_latents(torch.randn(1, constants.LATENT_CHANNELS, rows, columns, generator=generator))


def sample(
    components: Components, job: SamplingJob, on_step: Callable[[range, int], None], prompts: PromptCache | None = None
) -> list[GeneratedImage]:
    """Sample the request's images. Image i is, to within rounding, what its seed gives alone.

    `on_step(images, step)` is called after every step of the images that are sampled together, counted from 1. Out of
    memory, fewer are sampled together; raises UserError where one alone is too much.
    """
    request, prompts, images = job.request, prompts or PromptCache(), []
    with fsdp.sampling_mode(components.transformer):  # here, not at setup: Cog calls from another thread each time
        text = prompts.encode(components, request.prompt, job.placeholders, job.controls)
        negative = None
        if request.guided:  # the same images, under the negative prompt
            negative = prompts.encode(components, request.negative_prompt, job.placeholders, job.controls)
        # What the cache reuses would depend on the other images.
        together = 1 if job.options.reuse_threshold is not None else at_once(components, job.tokens)

        def next_group() -> range:
            return range(len(images), min(len(images) + together, request.num_outputs))

        def attempt() -> list[GeneratedImage]:
            return _sample_group(components, job, Conditioning(text, negative), next_group(), on_step)

        def recover(_kind: type[Exception], _reason: str) -> None:
            nonlocal together
            if len(next_group()) == 1:
                raise too_large(components, job)
            together = len(next_group()) // 2
            release_memory()
            log.warning("out of memory; from here on %d images are sampled together", together)

        while len(images) < request.num_outputs:
            images += retry_after((torch.OutOfMemoryError,), attempt, recover)
    return images


def _sample_group(
    components: Components,
    job: SamplingJob,
    conditioning: Conditioning,
    group: range,
    on_step: Callable[[range, int], None],
) -> list[GeneratedImage]:
    """Sample the images of a group, together through the transformer and one by one through the VAE."""
    began, count, request = time.monotonic(), len(group), job.request
    noise = torch.cat([initial_noise(job.size, request.seed_of(index)) for index in group])
    with ExitStack() as stack:
        if job.options.reuse_threshold is not None:
            branches = 2 if conditioning.negative is not None and not goes_together(job, count) else 1
            stack.enter_context(first_block_caching(components.transformer, job.options.reuse_threshold, branches))
        latents = denoise(components, job, noise, conditioning.repeated(count), lambda step: on_step(group, step))
    share_s, images = (time.monotonic() - began) / count, []
    for index, own in zip(group, latents.split(1), strict=True):
        denoised = time.monotonic()
        image = decode_images(components.need_vae(), own, job.size)[0]
        start = job.options.init_image
        if start is not None and start.kept is not None:
            image = start.kept.paste_into(image)
        images.append(GeneratedImage(image, request.seed_of(index), share_s, time.monotonic() - denoised))
    return images


def denoise(
    components: Components, job: SamplingJob, noise: Tensor, conditioning: Conditioning, on_step: Callable[[int], None]
) -> Tensor:
    """Turn noise [B, N, C] into clean latents [B, N, C] under B prompts. `on_step` may raise to cancel.

    From an initial image, only the rest of the schedule is run, the last `request.steps_run` steps, on the image's
    latents noised to the first of their sigmas.
    """
    request, size, start = job.request, job.size, job.options.init_image

    # The sigmas, the noise on the device and, from an initial image, what of it is repainted.
    sigmas = (job.options.schedule or components.schedule).sampling_sigmas(request.steps, size.tokens)
    sigmas = sigmas[len(sigmas) - 1 - (request.steps_run if start else request.steps) :]
    placement, count = components.placement, len(noise)
    latents = noise.to(placement.device, placement.dtype)
    clean = start.clean.to(latents) if start else latents
    own_noise = latents
    repaint = start.repaint.to(placement.device) if start and start.repaint is not None else None

    def noised(sigma: float) -> Tensor:
        """Return the initial image at this level of noise, in the images' own noise."""
        level = torch.full((count,), sigma, device=placement.device)
        return flow.add_noise(clean.float(), own_noise.float(), level).to(latents)

    if start:
        latents = noised(sigmas[0])

    # One velocity a step, of the prompt and the negative prompt together where that pays.
    negative = conditioning.negative
    controls = [job.controls.latents] * count if job.controls else []
    both = None
    if negative is not None and goes_together(job, count):
        both = concatenate_embeddings(conditioning.text, negative)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        level = torch.full((count,), sigma)
        if both is not None:
            twice = latents.repeat(2, 1, 1), level.repeat(2), both, size, controls * 2
            with acting(job.loras, of_prompt=True):
                with_prompt, without = predict_velocity(components.transformer, *twice).chunk(2)
            velocity = flow.guide(with_prompt, without, request.guidance)
        else:
            with acting(job.loras, of_prompt=True):
                velocity = predict_velocity(components.transformer, latents, level, conditioning.text, size, controls)
            if negative is not None:
                with acting(job.loras, of_prompt=False):
                    without = predict_velocity(components.transformer, latents, level, negative, size, controls)
                velocity = flow.guide(velocity, without, request.guidance)
        latents = flow.euler_step(latents, velocity, sigma, sigma_next)
        if repaint is not None:
            latents = torch.where(repaint, latents, noised(sigma_next))
        on_step(step + 1)
    return latents


def goes_together(job: SamplingJob, count: int) -> bool:
    """Return whether guidance's two branches of so many images are one batch: small ones under the same LoRAs are."""
    same = job.loras is None or job.loras.prompt == job.loras.negative
    return same and 2 * count * job.tokens <= TOGETHER_TOKENS


def acting(loras: LorasByText | None, of_prompt: bool) -> AbstractContextManager[None]:
    """Let those LoRAs act that do under the prompt, or else under the negative prompt."""
    if loras is None:
        return nullcontext()
    return loras.applied.only(loras.prompt if of_prompt else loras.negative)


def at_once(components: Components, tokens: int) -> int:
    """Return how many images of so many tokens the memory there is takes together; at least one is tried."""
    transformer, placement = components.transformer, components.placement
    needed = memory.sampling_bytes(tokens, transformer.inner_dim, placement.dtype.itemsize)
    return max(1, int((free_bytes(placement.device) - memory.SPARE_BYTES) // needed))


def too_large(components: Components, job: SamplingJob) -> UserError:
    """Return what to say of an image that doesn't fit, with one that would."""
    transformer, placement, size = components.transformer, components.placement, job.size
    release_memory()
    free, pixels = free_bytes(placement.device), size.width_px * size.height_px
    forward = memory.sampling_bytes(job.tokens, transformer.inner_dim, placement.dtype.itemsize)
    decode = memory.decode_bytes(pixels, placement.dtype.itemsize, components.need_vae().config["base_dim"])
    share = min(0.5, max(0.0, free - memory.SPARE_BYTES) / max(forward, decode))  # half, if the arithmetic is wrong
    return UserError(
        f"an image of {size} doesn't fit into the {free / 1e9:.3g} GB of memory that are free; set megapixels to "
        f"{max(0.05, share * pixels / 1e6):.2g}, or width and height to no more than that."
    )
