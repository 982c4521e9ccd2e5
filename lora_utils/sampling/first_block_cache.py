"""Steps that reuse an earlier one's work: where the first block hardly changes, the others are taken to add the same.

The first block's output tells how far the rest would move (the first-block cache of ParaAttention and diffusers).
Lossy, and off unless asked for. Owns the rule and the blocks' forwards while it is on; must not know sampling.

Legend: B batch, N image tokens, T text tokens, D the transformer's width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from diffusers import QwenImageTransformer2DModel
from torch import Tensor

Streams = tuple[Tensor, Tensor]  # text [B, T, D] and image [B, N, D]


@dataclass(slots=True)
class _Branch:
    """What one prompt's last whole forward left behind."""

    change: Tensor | None = None  # that the first block made to the image, [B, N, D]
    rest: Tensor | None = None  # that the other blocks made


@dataclass(slots=True)
class Reuse:
    """The state while it is on: how it decides, and how many of the forwards computed one block alone."""

    threshold: float
    branches: list[_Branch]  # forwards take turns: with guidance the prompt's, then the negative prompt's
    forwards: int = 0
    skipped: int = 0
    skips: bool = False
    after_first: Tensor | None = field(default=None, repr=False)

    def decide(self, before: Tensor, after: Tensor) -> None:
        """On a forward whose first block made `after` of the image. Waits for the device."""
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
        """The image after the last block: as it was computed, or as the first block and the kept rest make it."""
        branch, first = self.branches[(self.forwards - 1) % len(self.branches)], cast(Tensor, self.after_first)
        if self.skips:
            return first + cast(Tensor, branch.rest)
        branch.rest = after - first
        return after


Forward = Callable[..., Streams]


def _first(reuse: Reuse, forward: Forward, hidden_states: Tensor, **rest: Any) -> Streams:
    text, image = forward(hidden_states=hidden_states, **rest)
    reuse.decide(hidden_states, image)
    return text, image


def _other(
    reuse: Reuse, forward: Forward, last: bool, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any
) -> Streams:
    text, image = encoder_hidden_states, hidden_states
    if not reuse.skips:
        text, image = forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **rest)
    return text, reuse.finish(image) if last else image


@contextmanager
def reused(transformer: QwenImageTransformer2DModel, threshold: float, branches: int) -> Iterator[Reuse]:
    """Within it, a forward whose first block changed by less than this share since the last whole one stops there."""
    blocks, reuse = transformer.transformer_blocks, Reuse(threshold, [_Branch() for _ in range(branches)])
    computed = [cast(Any, block).forward for block in blocks]
    try:
        for index, (block, forward) in enumerate(zip(blocks, computed, strict=True)):
            if index == 0:
                block.forward = partial(_first, reuse, forward)
            else:
                block.forward = partial(_other, reuse, forward, index == len(blocks) - 1)
        yield reuse
    finally:
        for block, forward in zip(blocks, computed, strict=True):
            block.forward = forward
