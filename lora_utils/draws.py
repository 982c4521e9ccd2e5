"""What a training run draws at random: the order of its pictures, noise, sigmas, dropped captions, from one seed.

Owns the streams, one for each purpose, so that one more draw here doesn't shift what is drawn there.

Legend: B batch, N image tokens, C packed channels (64).
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lora_utils import flow
from lora_utils.caching import CachedExample
from lora_utils.config import TrainConfig
from lora_utils.sizes import Size

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


def micro_batches(config: TrainConfig, examples: Sequence[CachedExample], schedule: flow.Schedule) -> Iterator[Drawn]:
    """Endless; `gradient_accumulation` of them make a step."""
    noises, sigmas, dropout = (generator_for(config.seed, purpose) for purpose in ("noise", "sigma", "dropout"))
    for batch in batches(examples, config.batch_size, config.seed):
        clean = torch.stack([example.latents for example in batch])  # [B, N, C]
        noise = torch.randn(clean.shape, generator=noises)
        sigma = flow.draw_sigmas(len(batch), schedule.mu(clean.shape[1]), sigmas)  # [B]
        dropped = torch.rand(len(batch), generator=dropout) < config.caption_dropout
        yield Drawn(
            flow.add_noise(clean, noise, sigma),
            flow.velocity_target(clean, noise),
            sigma,
            tuple(EMPTY_CAPTION if drop else example.caption for drop, example in zip(dropped, batch, strict=True)),
            batch[0].size,
            tuple(example.image_name for example in batch),
        )


def run_timesteps(
    config: TrainConfig, examples: Sequence[Sized], schedule: flow.Schedule, dtype: torch.dtype
) -> Tensor:
    """Every timestep [S] that the run will show the transformer, drawn beforehand just as the loop will draw them."""
    stream, generator = batches(examples, config.batch_size, config.seed), generator_for(config.seed, "sigma")
    drawn = []
    for _ in range(config.steps * config.gradient_accumulation):
        batch = next(stream)
        drawn.append(flow.draw_sigmas(len(batch), schedule.mu(batch[0].size.tokens), generator))
    return flow.model_time(torch.cat(drawn), dtype).unique()
