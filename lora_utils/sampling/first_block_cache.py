"""The first-block cache: where the first block changes as foretold, the others are taken to do so too.

The first block's output tells how far the rest would move (as in ParaAttention and diffusers). What both add is
foretold from the last complete forwards along a line (as TaylorSeer does, Liu et al. 2025, arXiv 2503.06923). It is
lossy, and off unless asked for. This module owns the rule; `model.blocks` asks it at each block while it is on.

Legend: B batch, N image tokens, T text tokens, D the transformer's width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from lora_utils.model import blocks
from lora_utils.model.blocks import Streams

ORDER = 1  # of the polynomial: docs/benchmarks.md has what each wins


@dataclass(slots=True)
class _Branch:
    """What one prompt's last complete forwards left behind, the last one first: by when, and what blocks changed."""

    forwards: int = 0
    at: list[int] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)  # that the first block made to the image, [B, N, D]
    rests: list[Tensor] = field(default_factory=list)  # that the other blocks made

    def keep(self, change: Tensor, order: int) -> None:
        """Remember a complete forward's first block; `rests` follows at its end."""
        self.at, self.changes = [self.forwards, *self.at][: order + 1], [change, *self.changes][: order + 1]


def extrapolate(at: Sequence[int], values: Sequence[Tensor], now: int) -> Tensor:
    """Return what values that were measured at these times come to now, by the polynomial through them (Lagrange)."""
    if len(values) == 1:
        return values[0]
    total = torch.zeros_like(values[0])
    for own, value in zip(at, values, strict=True):
        weight = math.prod((now - other) / (own - other) for other in at if other != own)
        total = total.add_(value, alpha=weight)
    return total


@dataclass(slots=True)
class FirstBlockCache:
    """The cache's state while it is on, and how many of the forwards computed one block alone."""

    threshold: float
    branches: list[_Branch]  # forwards take turns: with guidance the prompt's, then the negative prompt's
    order: int = 0  # of the polynomial that foretells: 0 takes what was last, 1 goes on along a line
    forwards: int = 0
    skipped: int = 0
    skips: bool = False
    after_first: Tensor | None = field(default=None, repr=False)

    def decide(self, before: Tensor, after: Tensor) -> None:
        """Decide on a forward whose first block made `after` of the image. It waits for the device."""
        branch, change = self.branches[self.forwards % len(self.branches)], after - before
        self.forwards += 1
        branch.forwards += 1
        self.after_first, self.skips = after, False
        if branch.changes:
            foretold = extrapolate(branch.at, branch.changes, branch.forwards)
            self.skips = bool((change - foretold).abs().mean() < self.threshold * foretold.abs().mean())
        if self.skips:
            self.skipped += 1
        else:
            branch.keep(change, self.order)

    def finish(self, after: Tensor) -> Tensor:
        """Return the image after the last block: as computed, or as the first block and the cached rest make it."""
        branch = self.branches[(self.forwards - 1) % len(self.branches)]
        assert self.after_first is not None, "the first block has run"
        if self.skips:
            assert branch.rests, "nothing is skipped before a full forward"
            return self.after_first + extrapolate(branch.at, branch.rests, branch.forwards)
        branch.rests = [after - self.after_first, *branch.rests][: self.order + 1]
        return after


@dataclass(frozen=True, slots=True)
class _FirstBlock:
    """The cache at the first block, which is always computed."""

    cache: FirstBlockCache

    def __call__(self, forward: Callable[[], Streams], hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
        text, image = forward()
        self.cache.decide(hidden_states, image)
        return text, image


@dataclass(frozen=True, slots=True)
class _OtherBlock:
    """The cache at another block, which is skipped where the first one said so."""

    cache: FirstBlockCache
    is_last: bool

    def __call__(self, forward: Callable[[], Streams], hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
        text, image = (encoder_hidden_states, hidden_states) if self.cache.skips else forward()
        return text, self.cache.finish(image) if self.is_last else image


@contextmanager
def first_block_caching(
    transformer: QwenImageTransformer2DModel, threshold: float, branches: int, order: int = ORDER
) -> Iterator[FirstBlockCache]:
    """Let a forward whose first block is within this share of what was foretold stop there."""
    forwards = blocks.forwards_of(transformer)
    cache = FirstBlockCache(threshold, [_Branch() for _ in range(branches)], order)
    try:
        for index, forward in enumerate(forwards):
            forward.cache = _OtherBlock(cache, index == len(forwards) - 1) if index else _FirstBlock(cache)
        yield cache
    finally:
        for forward in forwards:
            forward.cache = None
