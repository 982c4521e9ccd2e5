"""The first-block cache: where the first block hardly changes, the other blocks are taken to add what they last added.

The first block's output tells how far the rest would move (as in ParaAttention and diffusers). It is lossy, and off
unless asked for. This module owns the rule; `model.blocks` asks it at each block while it is on.

Legend: B batch, N image tokens, T text tokens, D the transformer's width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from lora_utils.model import blocks
from lora_utils.model.blocks import Streams


@dataclass(slots=True)
class _Branch:
    """What one prompt's last complete forward left behind."""

    change: Tensor | None = None  # that the first block made to the image, [B, N, D]
    rest: Tensor | None = None  # that the other blocks made


@dataclass(slots=True)
class FirstBlockCache:
    """The cache's state while it is on, and how many of the forwards computed one block alone."""

    threshold: float
    branches: list[_Branch]  # forwards take turns: with guidance the prompt's, then the negative prompt's
    forwards: int = 0
    skipped: int = 0
    skips: bool = False
    after_first: Tensor | None = field(default=None, repr=False)

    def decide(self, before: Tensor, after: Tensor) -> None:
        """Decide on a forward whose first block made `after` of the image. It waits for the device."""
        branch, change = self.branches[self.forwards % len(self.branches)], after - before
        self.forwards += 1
        self.after_first, self.skips = after, False
        if branch.change is not None:
            self.skips = bool((change - branch.change).abs().mean() < self.threshold * branch.change.abs().mean())
        if self.skips:
            self.skipped += 1
        else:
            branch.change = change

    def finish(self, after: Tensor) -> Tensor:
        """Return the image after the last block: as computed, or as the first block and the cached rest make it."""
        branch = self.branches[(self.forwards - 1) % len(self.branches)]
        assert self.after_first is not None, "the first block has run"
        if self.skips:
            assert branch.rest is not None, "nothing is skipped before a full forward"
            return self.after_first + branch.rest
        branch.rest = after - self.after_first
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
    transformer: QwenImageTransformer2DModel, threshold: float, branches: int
) -> Iterator[FirstBlockCache]:
    """Let a forward whose first block moved by less than this share since the last complete one stop there."""
    forwards, cache = blocks.forwards_of(transformer), FirstBlockCache(threshold, [_Branch() for _ in range(branches)])
    try:
        for index, forward in enumerate(forwards):
            forward.cache = _OtherBlock(cache, index == len(forwards) - 1) if index else _FirstBlock(cache)
        yield cache
    finally:
        for forward in forwards:
            forward.cache = None
