"""Batches: what a run shows at random from one seed: the order of its images, noise, sigmas, dropped captions.

Each purpose has a generator of its own, so that one more random number here doesn't shift those there.

Legend: B batch, N image tokens, C packed channels (64), S timesteps.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lora_utils import constants
from lora_utils.config import SampleRequest, TrainConfig
from lora_utils.dataset.cache import CachedExample
from lora_utils.dataset.captions import caption_choices, shown_caption
from lora_utils.model import flow, memory
from lora_utils.model.latents import Size, image_size

# Levels of noise that images held out are measured at: evenly spaced, whatever the resolution.
VALIDATION_SIGMAS = (0.125, 0.375, 0.625, 0.875)
PROBE_SIGMA = 0.5  # of the step that tries the memory plan, before the first of the run's own


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """Return a generator that follows from the run's seed and what it is for."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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
    is_prior: bool = False  # it holds the class: the target is what the base model predicts for these captions
    image_weights: Tensor | None = None  # of each image's loss, [B]; None where all count alike


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The batch that needs most memory: the plan is made for it, and tried out with it."""

    size: Size
    caption: str  # the one with most tokens of those that teach
    text_tokens: int  # of the longest caption that is shown, whether it teaches or holds the class
    step_size: memory.StepSize


class Shown(Protocol):
    """An image in its bucket, encoded or not."""

    @property
    def size(self) -> Size:
        """The bucket's size."""
        ...

    @property
    def caption(self) -> str:
        """The image's caption."""
        ...

    @property
    def repeats(self) -> int:
        """How often an epoch shows it."""
        ...

    @property
    def flip(self) -> bool:
        """Whether it may be shown mirrored."""
        ...

    @property
    def regularisation(self) -> bool:
        """Whether it shows the class, not what is taught."""
        ...


_Shown = TypeVar("_Shown", bound=Shown)


def bucket_batches(examples: Sequence[_Shown], batch_size: int, seed: int) -> Iterator[list[_Shown]]:
    """Yield endless batches, each of one bucket. An epoch shows every example `repeats` times.

    Of regularisation images it shows as many as of the others, in turns. A bucket's last batch may be short.
    """
    rng = random.Random(seed)
    repeated = [example for example in examples if not example.regularisation for _ in range(example.repeats)]
    regularisation = _in_turns([e for e in examples if e.regularisation for _ in range(e.repeats)], seed)
    by_size = _by_size(repeated)
    while True:
        epoch = []
        for group in _by_size([*repeated, *islice(regularisation, len(repeated))]) if regularisation else by_size:
            rng.shuffle(group)
            epoch += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
        rng.shuffle(epoch)
        yield from epoch


def _by_size(examples: Sequence[_Shown]) -> list[list[_Shown]]:
    return [list(group) for _, group in groupby(sorted(examples, key=lambda e: e.size), key=lambda e: e.size)]


def _in_turns(examples: list[_Shown], seed: int) -> Iterator[_Shown] | None:
    """Return an endless iterator that shows each example once before any a second time; None without examples."""
    if not examples:
        return None
    rng = random.Random(f"{seed} regularisation")

    def turns() -> Iterator[_Shown]:
        while True:
            rng.shuffle(examples)
            yield from examples

    return turns()


@dataclass(frozen=True, slots=True)
class BatchPlan(Generic[_Shown]):
    """Which images a batch shows under which captions: all that is known of it before anything is encoded."""

    examples: list[_Shown]
    captions: tuple[str, ...]
    is_prior: bool  # it holds the class
    mirrored: tuple[bool, ...]  # by example


def holds_class(index: int, share: float) -> bool:
    """Return whether batch `index`, counted from 0, is one of the share that holds the class.

    They are spread evenly, so that of the first n batches floor(n * share) do, whatever n is: the first one teaches.
    """
    return math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)


def plan_batches(
    config: TrainConfig, examples: Sequence[_Shown], prior_captions: Mapping[str, str]
) -> Iterator[BatchPlan[_Shown]]:
    """Yield the endless plans of a run's batches, as its seed has them.

    With prior captions, one for each caption that is shown, a share of the batches (`preservation_weight`) holds the
    class. They do so for every caption: one that names nothing of what is taught is held as it is.
    """
    dropout, share = generator_for(config.seed, "dropout"), config.preservation_weight if prior_captions else 0.0
    chosen, sides = generator_for(config.seed, "caption"), generator_for(config.seed, "flip")
    for index, batch in enumerate(bucket_batches(examples, config.batch_size, config.seed)):
        dropped = torch.rand(len(batch), generator=dropout) < config.caption_dropout
        is_prior = holds_class(index, share)
        texts = [shown_caption(each.caption, config, chosen) for each in batch]
        captions = (
            [prior_captions[text] for text in texts]
            if is_prior
            else [constants.EMPTY_PROMPT if drop else text for drop, text in zip(dropped, texts, strict=True)]
        )
        mirrored = (torch.rand(len(batch), generator=sides) < 0.5).tolist()
        yield BatchPlan(
            batch, tuple(captions), is_prior, tuple(m and e.flip for m, e in zip(mirrored, batch, strict=True))
        )


def shown_captions(config: TrainConfig, examples: Sequence[Shown], batches: int) -> list[str]:
    """Return all captions that so many batches will show, made as the stream will; the images' own come first."""
    captions = [choice for example in examples for choice in caption_choices(example.caption, config)]
    if config.caption_shuffle is not None:
        plans = plan_batches(replace(config, caption_dropout=0.0), examples, {})
        captions += [caption for plan in islice(plans, batches) for caption in plan.captions]
    return list(dict.fromkeys(captions))


def first_shown(
    config: TrainConfig, examples: Sequence[Shown], prior_captions: Mapping[str, str], most: int
) -> dict[str, int | None]:
    """Return in which batch, counted from 0, each token is first shown; None for none of the first `most`."""
    found: dict[str, int | None] = dict.fromkeys(config.tokens)
    for index, plan in zip(range(most), plan_batches(config, examples, prior_captions), strict=False):
        for token in [token for token, at in found.items() if at is None]:
            if any(token in caption for caption in plan.captions):
                found[token] = index
        if None not in found.values():
            break
    return found


class BatchStream:
    """An endless stream of batches; `gradient_accumulation` of them a process make a step."""

    PURPOSES = ("noise", "sigma")

    def __init__(
        self,
        config: TrainConfig,
        examples: Sequence[CachedExample],
        schedule: flow.Schedule,
        prior_captions: Mapping[str, str] | None = None,
    ):
        """Begin before the first batch of the run's seed."""
        self.config, self.schedule = config, schedule
        self.generators = {purpose: generator_for(config.seed, purpose) for purpose in self.PURPOSES}
        self.plans = plan_batches(config, examples, prior_captions or {})
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
