"""Batches: planned images with noise, at levels of noise, as the model sees them; and the weights of their losses.

Noise and levels have a generator each, from the run's seed. Which images a batch shows is `batch_plans`'.

Legend: B batch, N image tokens, C packed channels (64), S timesteps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_utils import constants
from lora_utils.config import SampleRequest, TrainConfig
from lora_utils.dataset.cache import CachedExample
from lora_utils.model import flow, memory
from lora_utils.model.controls import Controls, no_controls
from lora_utils.model.latents import Size, image_size
from lora_utils.training.batch_plans import Shown, bucket_batches, generator_for, plan_batches
from lora_utils.training.preserved import NOTHING, Preserved

# Levels of noise that images held out are measured at: evenly spaced, whatever the resolution.
VALIDATION_SIGMAS = (0.125, 0.375, 0.625, 0.875)
PROBE_SIGMA = 0.5  # of the step that tries the memory plan, before the first of the run's own


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as the model will see it, on the CPU."""

    noisy: Tensor  # [B, N, C] fp32
    target: Tensor  # [B, N, C] fp32, the velocity
    sigma: Tensor  # [B]
    captions: tuple[str, ...]
    size: Size
    names: tuple[str, ...]  # of the images
    weights: Tensor | None = None  # of the loss, [B, N, C]; None where all count alike
    is_prior: bool = False  # it holds what must stay: the target is what the base model predicts for these captions
    image_weights: Tensor | None = None  # of each image's loss, [B]; None where all count alike
    controls: tuple[Controls, ...] = ()  # the images to edit of each; empty where the base model edits none


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The batch that needs most memory: the plan is made for it, and tried out with it."""

    size: Size
    caption: str  # the one with most tokens of those that teach
    text_tokens: int  # of the longest caption that is shown, whether it teaches or holds the class
    step_size: memory.StepSize
    control_tokens: int = 0  # image tokens of what is to be edited


class BatchStream:
    """An endless stream of batches; `gradient_accumulation` of them a process make a step."""

    PURPOSES = ("noise", "sigma")

    def __init__(
        self,
        config: TrainConfig,
        examples: Sequence[CachedExample],
        schedule: flow.Schedule,
        preserved: Preserved = NOTHING,
    ):
        """Begin before the first batch of the run's seed."""
        self.config, self.schedule = config, schedule
        self.generators = {purpose: generator_for(config.seed, purpose) for purpose in self.PURPOSES}
        self.plans = plan_batches(config, examples, preserved)
        self.count = 0  # of batches so far

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        plan = next(self.plans)
        config = self.config
        examples = [each.turned(mirrored) for each, mirrored in zip(plan.examples, plan.mirrored, strict=True)]
        self.count += 1
        clean = torch.stack([example.latents for example in examples])  # [B, N, C]
        noise = torch.randn(clean.shape, generator=self.generators["noise"])
        sigma = step_sigmas(config, self.schedule, examples, self.generators["sigma"])  # [B]
        return Batch(
            flow.add_noise(clean, noise, sigma),
            flow.velocity_target(clean, noise),
            sigma,
            plan.captions,
            examples[0].size,
            tuple(example.image_name for example in examples),
            None if plan.is_prior else loss_weights(examples, config.mask_floor),
            plan.is_prior,
            image_weights(examples, config.prior_loss_weight),
            loaded_controls(examples, plan.bare),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return how many batches there were, and the generators' states."""
        states = {purpose: generator.get_state() for purpose, generator in self.generators.items()}
        return {"drawn": torch.tensor(self.count), **states}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where a stream of the same config and examples was. The order of the images is made again."""
        for _ in range(int(state["drawn"]) - self.count):
            next(self.plans)
        self.count = int(state["drawn"])
        for purpose, generator in self.generators.items():
            generator.set_state(state[purpose])


def loaded_controls(examples: Sequence[CachedExample], bare: bool = False) -> tuple[Controls, ...]:
    """Return the images to edit of each example, or no images where they are shown bare; () where there are none."""
    if not any(example.controls for example in examples):
        return ()
    return tuple(no_controls() if bare or e.controls is None else e.controls.load() for e in examples)


def image_weights(examples: Sequence[Shown], of_regularisation: float) -> Tensor | None:
    """Return what each image's loss is multiplied by, [B]; None where all count alike."""
    if not any(example.regularisation for example in examples):
        return None
    return torch.tensor([of_regularisation if example.regularisation else 1.0 for example in examples])


def loss_weights(examples: Sequence[CachedExample], floor: float) -> Tensor | None:
    """Return [B, N, C]: 1 where the mask is white, `floor` where it is black; None where no image has a mask.

    A token's C channels are its 2 x 2 latents' 16, with the latent as the faster index: see `latents.pack_latents`.
    """
    shares = [example.shares for example in examples]
    if all(share is None for share in shares):
        return None
    everywhere = torch.ones(examples[0].size.tokens, constants.PATCH**2)
    filled = torch.stack([everywhere if share is None else share for share in shares])  # [B, N, 4]
    return (floor + (1 - floor) * filled).repeat(1, 1, constants.LATENT_CHANNELS)  # [B, N, C]


# --- timesteps ------------------------------------------------------------------------------------------------------

# What `timestep_sampling` samples from, and whether it is shifted as sampling shifts an image of that size.
_DISTRIBUTIONS = {
    "resolution": ("logit_normal", True),
    "logit_normal": ("logit_normal", False),
    "uniform": ("uniform", False),
    "content": ("bell", True),
    "style": ("tails", True),
}


def step_sigmas(
    config: TrainConfig, schedule: flow.Schedule, batch: Sequence[Shown], generator: torch.Generator
) -> Tensor:
    """Sample the levels of noise [B] of a batch of images of one size."""
    distribution, as_sampling = _DISTRIBUTIONS[config.timestep_sampling]
    mu = schedule.mu(batch[0].size.tokens) if as_sampling else 0.0
    if config.timestep_shift is not None:
        mu = math.log(config.timestep_shift)
    return flow.sample_sigmas(len(batch), mu, generator, distribution)


def run_timesteps(
    config: TrainConfig, examples: Sequence[Shown], schedule: flow.Schedule, dtype: torch.dtype, processes: int = 1
) -> Tensor:
    """Return every timestep [S] that the run's steps will show the transformer, made beforehand as the stream will."""
    batches, generator = bucket_batches(examples, config.batch_size, config.seed), generator_for(config.seed, "sigma")
    sigmas = []
    for _ in range(config.steps * config.gradient_accumulation * processes):
        batch = next(batches)
        sigmas.append(step_sigmas(config, schedule, batch, generator))
    return flow.model_time(torch.cat(sigmas), dtype).unique()


def other_timesteps(
    config: TrainConfig, previews: Sequence[SampleRequest], schedule: flow.Schedule, dtype: torch.dtype
) -> Tensor:
    """Return the timesteps [S] of the probe, of validation and of the previews, each with width and height."""
    sigmas = [PROBE_SIGMA, *(VALIDATION_SIGMAS if config.validation_share else ())]
    for request in previews:
        tokens = image_size(request.width, request.height, request.aspect_ratio).tokens
        sigmas += schedule.sampling_sigmas(request.steps, tokens)[:-1]
    return flow.model_time(torch.tensor(sigmas), dtype).unique()
