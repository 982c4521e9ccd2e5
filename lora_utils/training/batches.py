"""What a training run draws at random: the order of its pictures, noise, sigmas, dropped captions, from one seed.

Owns the streams, one for each purpose, so that one more draw here doesn't shift what is drawn there.

Legend: B batch, N image tokens, C packed channels (64).
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lora_utils import flow, qwen
from lora_utils.caching import CachedExample
from lora_utils.config import TrainConfig
from lora_utils.sizes import Size

# Levels of noise that pictures held out are measured at: evenly spaced, whatever the resolution.
VALIDATION_SIGMAS = (0.125, 0.375, 0.625, 0.875)
EMPTY_CAPTION = " "  # what a dropped caption becomes: the sampler's default negative prompt


def generator_for(seed: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One micro-batch as the model will see it, on the host."""

    noisy: Tensor  # [B, N, C] fp32
    target: Tensor  # [B, N, C] fp32, the velocity
    sigma: Tensor  # [B]
    captions: tuple[str, ...]
    size: Size
    names: tuple[str, ...]  # of the pictures
    weights: Tensor | None = None  # of the loss, [B, N, C]; None where all count alike
    preserves: bool = False  # the class: the target is what the base model predicts for these captions


class Sized(Protocol):
    """A picture in its bucket, encoded or not."""

    @property
    def size(self) -> Size: ...


_Picture = TypeVar("_Picture", bound=Sized)


def batches(examples: Sequence[_Picture], batch_size: int, seed: int) -> Iterator[list[_Picture]]:
    """Endless batches, each of one bucket. An epoch shows every example once; the last of a bucket may be short."""
    rng = random.Random(seed)
    by_size = [list(group) for _, group in groupby(sorted(examples, key=lambda e: e.size), key=lambda e: e.size)]
    while True:
        epoch = []
        for group in by_size:
            rng.shuffle(group)
            epoch += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
        rng.shuffle(epoch)
        yield from epoch


class MicroBatches:
    """Endless; `gradient_accumulation` of them a card make a step. Its place can be written down, and returned to.

    With `preserved`, captions by the class's, a share of them (`preservation_weight`) holds the class.
    """

    PURPOSES = ("noise", "sigma", "dropout", "preservation")

    def __init__(
        self, config: TrainConfig, examples: Sequence[CachedExample], schedule: flow.Schedule,
        preserved: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.config, self.schedule, self.preserved = config, schedule, preserved or {}
        self.generators = {purpose: generator_for(config.seed, purpose) for purpose in self.PURPOSES}
        self.batches = batches(examples, config.batch_size, config.seed)
        self.drawn = 0

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> Drawn:
        batch, config = next(self.batches), self.config
        self.drawn += 1
        clean = torch.stack([example.latents for example in batch])  # [B, N, C]
        noise = torch.randn(clean.shape, generator=self.generators["noise"])
        sigma = flow.draw_sigmas(len(batch), self.schedule.mu(clean.shape[1]), self.generators["sigma"])  # [B]
        dropped = torch.rand(len(batch), generator=self.generators["dropout"]) < config.caption_dropout
        captions = [EMPTY_CAPTION if drop else e.caption for drop, e in zip(dropped, batch, strict=True)]
        preserves = float(torch.rand((), generator=self.generators["preservation"])) < config.preservation_weight
        held = [self.preserved[example.caption] for example in batch if example.caption in self.preserved]
        if preserves := preserves and len(held) == len(batch):
            captions = held
        return Drawn(
            flow.add_noise(clean, noise, sigma),
            flow.velocity_target(clean, noise),
            sigma,
            tuple(captions),
            batch[0].size,
            tuple(example.image_name for example in batch),
            None if preserves else loss_weights(batch, config.mask_floor),
            preserves,
        )

    def place(self) -> dict[str, Tensor]:
        """Where it is: how many were drawn, and the generators' states."""
        states = {purpose: generator.get_state() for purpose, generator in self.generators.items()}
        return {"drawn": torch.tensor(self.drawn), **states}

    def return_to(self, place: Mapping[str, Tensor]) -> None:
        """Be where another one, of the same config and examples, was. The order of the pictures is drawn again."""
        for _ in range(int(place["drawn"]) - self.drawn):
            next(self.batches)
        self.drawn = int(place["drawn"])
        for purpose, generator in self.generators.items():
            generator.set_state(place[purpose])


def loss_weights(batch: Sequence[CachedExample], floor: float) -> Tensor | None:
    """[B, N, C]: 1 where the mask is white, `floor` where it is black; None where no picture has a mask.

    A token's C channels are its 2 x 2 latents' 16, with the latent as the faster index: see `sizes.pack`.
    """
    shares = [example.shares for example in batch]
    if all(share is None for share in shares):
        return None
    whole = torch.ones(batch[0].size.tokens, qwen.PATCH**2)
    filled = torch.stack([whole if share is None else share for share in shares])  # [B, N, 4]
    return (floor + (1 - floor) * filled).repeat(1, 1, qwen.LATENT_CHANNELS)  # [B, N, C]


def run_timesteps(
    config: TrainConfig, examples: Sequence[Sized], schedule: flow.Schedule, dtype: torch.dtype, processes: int = 1
) -> Tensor:
    """Every timestep [S] that the run will show a transformer, drawn beforehand just as the loop will draw them."""
    stream, generator = batches(examples, config.batch_size, config.seed), generator_for(config.seed, "sigma")
    drawn = []
    for _ in range(config.steps * config.gradient_accumulation * processes):
        batch = next(stream)
        drawn.append(flow.draw_sigmas(len(batch), schedule.mu(batch[0].size.tokens), generator))
    return flow.model_time(torch.cat(drawn), dtype).unique()
