"""Flow matching as Qwen-Image was trained and is sampled: pure functions of numbers and tensors.

This module owns the noise schedule, the training target, guidance and the Euler step.

Legend: B batch, N image tokens, C packed channels (64). sigma is the share of noise: 1 is noise, 0 is the image;
the model is given t = sigma.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_utils import constants


@dataclass(frozen=True, slots=True)
class Schedule:
    """The numbers of a flow-matching scheduler's config. `shift_terminal` None: the last sigma isn't stretched."""

    base_image_tokens: int = constants.BASE_IMAGE_TOKENS
    max_image_tokens: int = constants.MAX_IMAGE_TOKENS
    base_shift: float = constants.BASE_SHIFT
    max_shift: float = constants.MAX_SHIFT
    shift_terminal: float | None = constants.SHIFT_TERMINAL

    def mu(self, image_tokens: int) -> float:
        """Return the log of the shift for an image of this many tokens: a line through the two base points."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_tokens - self.base_image_tokens)
        return self.base_shift + slope * (image_tokens - self.base_image_tokens)

    def sampling_sigmas(self, steps: int, image_tokens: int) -> list[float]:
        """Return `steps` + 1 sigmas from 1 down to 0, as `FlowMatchEulerDiscreteScheduler` spaces them."""
        linear = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        sigmas = shift_sigma(linear, self.mu(image_tokens))
        if self.shift_terminal is not None and steps > 1:
            sigmas = 1.0 - (1.0 - sigmas) * (1.0 - self.shift_terminal) / (1.0 - sigmas[-1])
        return [*sigmas.tolist(), 0.0]


# What the distilled "Lightning" LoRAs were made for: a fixed shift of 3, whatever the size, down to 0 (their README).
LIGHTNING = Schedule(base_shift=math.log(3), max_shift=math.log(3), shift_terminal=None)


def shift_sigma(sigma: Tensor, mu: float) -> Tensor:
    """Move sigma towards noise by exp(mu): large images need more of it (Esser et al. 2024, section 5.3.2)."""
    shift = math.exp(mu)
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


BELL_STD = 0.5  # of the logit, half of the logit-normal's: nine tenths then lie in sigma 0.31 to 0.69


def sample_sigmas(batch: int, mu: float, generator: torch.Generator, distribution: str = "logit_normal") -> Tensor:
    """Sample [B] sigmas in (0, 1) from a distribution, and shift them by exp(mu).

    logit_normal is that of Esser et al. 2024 (section 3.1); bell a narrower one, which is about the middle; tails the
    arcsine distribution, which is about both ends; uniform is what it says.
    """
    if distribution == "uniform":
        sigma = torch.rand(batch, generator=generator)
    elif distribution == "tails":
        sigma = torch.sin(torch.rand(batch, generator=generator) * (math.pi / 2)).square()
    else:
        spread = BELL_STD if distribution == "bell" else 1.0
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) * spread)
    return shift_sigma(sigma, mu)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = (1 - sigma) * clean + sigma * noise, all [B, N, C]; sigma is [B]."""
    share = sigma.view(-1, 1, 1)
    return (1.0 - share) * clean + share * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Return what the model predicts, d x_t / d sigma = noise - clean, [B, N, C]."""
    return noise - clean


def model_time(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the t that the transformer is given: sigma cast at 1000 sigma and then divided, as the pipeline does."""
    return (sigma * constants.TRAIN_TIMESTEPS).to(dtype) / constants.TRAIN_TIMESTEPS


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance, each token rescaled to the norm of its conditional prediction; all [B, N, C].

    The rescaling keeps high scales from burning colours; it is what the official pipeline does.
    """
    combined = unconditional + scale * (conditional - unconditional)
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Take one Euler step down the flow, computed in fp32, [B, N, C] -> [B, N, C]."""
    return (latents.float() + (sigma_next - sigma) * velocity.float()).to(latents.dtype)
