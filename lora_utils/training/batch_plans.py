"""Batch plans: which images a run shows in which order, under which captions: all that is known before encoding.

Each purpose has a generator of its own, so that one more random number here doesn't shift those there.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Generic, Protocol, TypeVar

import torch

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import caption_choices, shown_caption
from lora_utils.model.latents import Size
from lora_utils.training.preserved import NOTHING, Preserved


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """Return a generator that follows from the run's seed and what it is for."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Shown(Protocol):
    """An image in its bucket, encoded or not."""

    @property
    def size(self) -> Size:
        """The bucket's size."""
        ...

    @property
    def layout(self) -> tuple[Size, ...]:
        """The sizes of all images that the transformer is given: the bucket's, and those of the images to edit."""
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
    """Yield endless batches, each of one bucket and one layout. An epoch shows every example `repeats` times.

    So a batch is one forward, and several GPUs take part in as many. Of regularisation images an epoch shows as many as
    of the others, in turns. A bucket's last batch may be short.
    """
    rng = random.Random(seed)
    repeated = [example for example in examples if not example.regularisation for _ in range(example.repeats)]
    regularisation = _in_turns([e for e in examples if e.regularisation for _ in range(e.repeats)], seed)
    by_layout = _by_layout(repeated)
    while True:
        epoch = []
        for group in _by_layout([*repeated, *islice(regularisation, len(repeated))]) if regularisation else by_layout:
            rng.shuffle(group)
            epoch += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
        rng.shuffle(epoch)
        yield from epoch


def _by_layout(examples: Sequence[_Shown]) -> list[list[_Shown]]:
    return [list(group) for _, group in groupby(sorted(examples, key=lambda e: e.layout), key=lambda e: e.layout)]


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
    is_prior: bool  # it holds what must stay
    mirrored: tuple[bool, ...]  # by example
    bare: bool  # shown without the images to edit


def is_holding(index: int, share: float) -> bool:
    """Return whether batch `index`, counted from 0, is one of the share that holds what must stay.

    They are spread evenly, so that of the first n batches floor(n * share) do, whatever n is: the first one teaches.
    """
    return math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)


def plan_batches(
    config: TrainConfig, examples: Sequence[_Shown], preserved: Preserved = NOTHING
) -> Iterator[BatchPlan[_Shown]]:
    """Yield the endless plans of a run's batches, as its seed has them.

    With something to preserve, a share of the batches (`preservation_weight`) holds it. They do so for every caption:
    one that names nothing of what is taught is held as it is.
    """
    dropout, share = generator_for(config.seed, "dropout"), config.preservation_weight if preserved else 0.0
    chosen, sides = generator_for(config.seed, "caption"), generator_for(config.seed, "flip")
    bared, held = generator_for(config.seed, "control"), generator_for(config.seed, "preserve")
    for index, batch in enumerate(bucket_batches(examples, config.batch_size, config.seed)):
        dropped = torch.rand(len(batch), generator=dropout) < config.caption_dropout
        is_prior = is_holding(index, share)
        texts = [shown_caption(each.caption, config, chosen) for each in batch]
        captions = (
            preserved.in_place_of(texts, held)
            if is_prior
            else [constants.EMPTY_PROMPT if drop else text for drop, text in zip(dropped, texts, strict=True)]
        )
        mirrored = (torch.rand(len(batch), generator=sides) < 0.5).tolist()
        bare = bool(torch.rand(1, generator=bared) < config.control_dropout)
        turned = tuple(m and e.flip for m, e in zip(mirrored, batch, strict=True))
        yield BatchPlan(batch, tuple(captions), is_prior, turned, bare)


def captions_by_example(config: TrainConfig, examples: Sequence[Shown], batches: int) -> list[list[str]]:
    """Return the captions that so many batches will show of each example, made as the stream will; its own first."""
    captions = [caption_choices(example.caption, config) for example in examples]
    if config.caption_shuffle is not None:
        own = {id(example): texts for example, texts in zip(examples, captions, strict=True)}
        for plan in islice(plan_batches(replace(config, caption_dropout=0.0), examples), batches):
            for example, caption in zip(plan.examples, plan.captions, strict=True):
                own[id(example)].append(caption)
    return [list(dict.fromkeys(texts)) for texts in captions]


def shown_captions(config: TrainConfig, examples: Sequence[Shown], batches: int) -> list[str]:
    """Return all captions that so many batches will show, made as the stream will; the images' own come first."""
    captions = [choice for example in examples for choice in caption_choices(example.caption, config)]
    if config.caption_shuffle is not None:
        plans = plan_batches(replace(config, caption_dropout=0.0), examples)
        captions += [caption for plan in islice(plans, batches) for caption in plan.captions]
    return list(dict.fromkeys(captions))


def first_shown(
    config: TrainConfig, examples: Sequence[Shown], preserved: Preserved, most: int
) -> dict[str, int | None]:
    """Return in which batch, counted from 0, each token is first shown; None for none of the first `most`."""
    found: dict[str, int | None] = dict.fromkeys(config.tokens)
    for index, plan in zip(range(most), plan_batches(config, examples, preserved), strict=False):
        for token in [token for token, at in found.items() if at is None]:
            if any(token in caption for caption in plan.captions):
                found[token] = index
        if None not in found.values():
            break
    return found
