"""A run's steps within the memory there is: how many blocks are checkpointed, tried out, and more when that fails."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from lora_utils import constants
from lora_utils.dataset.caption_texts import caption_choices
from lora_utils.errors import UserError
from lora_utils.model import blocks, fsdp, memory
from lora_utils.model.device import free_bytes, release_memory, retry_after
from lora_utils.training.batch_plans import generator_for
from lora_utils.training.batches import PROBE_SIGMA, Batch, loaded_controls
from lora_utils.training.loss import forward_backward
from lora_utils.training.state import TrainState

log = logging.getLogger(__name__)
T = TypeVar("T")


def plan_recompute(state: TrainState) -> None:
    """Choose how many blocks are checkpointed, by arithmetic, then by a step on the largest batch.

    A resumed run checkpoints at least as many as before: it is exact, so more of them change nothing but the time.
    """
    size = state.largest.step_size
    # Mapped weights are used at every step, though the system counts their memory as free. Where they don't fit anyway,
    # each step reads them again, whatever else is held.
    mapped = 0.0 if state.plan.read_again_bytes else state.plan.mapped_bytes
    free = free_bytes(state.components.placement.device) - mapped
    count = max(state.plan.checkpointed_blocks, memory.blocks_to_checkpoint(size, free))
    change_plan(state, checkpointed_blocks=count)
    log.info(
        "memory: a step of %d tokens needs %.1f of %.1f GB free; %d of %d blocks are activation-checkpointed",
        size.tokens,
        size.needed_bytes(count) / 1e9,
        free / 1e9,
        count,
        size.blocks,
    )
    began, probe = time.monotonic(), probe_batch(state)

    def step() -> None:
        forward_backward(state, [probe], [False])
        state.optimizers.try_out()

    within_memory(state, [probe], step)
    state.optimizers.zero_grad()
    first_s = state.seconds["probe"] = time.monotonic() - began

    # The same step again, whose blocks are compiled already, tells how long the compiler took.
    if state.plan.compiled:
        within_memory(state, [probe], step)
        state.optimizers.zero_grad()
        state.seconds["probe"] = 2 * (time.monotonic() - began - first_s)
        state.seconds["compile"] = max(0.0, time.monotonic() - began - state.seconds["probe"])


def probe_batch(state: TrainState) -> Batch:
    """Return a batch as large as the run's largest: with images to edit, of the example that has most tokens."""
    largest, count = state.largest, state.config.batch_size
    size, caption, controls = largest.size, largest.caption, ()
    if largest.control_tokens:
        widest = max(state.data.examples, key=lambda e: e.size.tokens + (e.controls.tokens if e.controls else 0))
        size, caption = widest.size, caption_choices(widest.caption, state.config)[0]
        controls = loaded_controls([widest]) * count
    shape = (count, size.tokens, constants.PACKED_CHANNELS)
    return Batch(
        torch.randn(*shape, generator=generator_for(0, "probe")),
        torch.zeros(*shape),
        torch.full((count,), PROBE_SIGMA),
        (caption,) * count,
        size,
        ("the largest batch",),
        controls=controls,
    )


def change_plan(state: TrainState, **changes: bool | int) -> None:
    """Change the plan's `compiled` or `checkpointed_blocks`, and let the blocks follow it."""
    state.plan = replace(state.plan, **changes)
    transformer = state.components.transformer
    if "compiled" in changes or state.plan.compiled:
        blocks.set_compute(transformer, blocks.compiled_block() if state.plan.compiled else blocks.compute_block)
    blocks.set_checkpointed(transformer, state.plan.checkpointed_blocks)


def within_memory(state: TrainState, batches: Sequence[Batch], step: Callable[[], T]) -> T:
    """Compute gradients of these batches. Out of memory, more blocks are checkpointed and all of them are redone.

    Nothing that can't be redone may be part of `step`: no exchange with other processes, and no move of a weight.
    """

    def recover(kind: type[Exception], reason: str) -> None:
        state.optimizers.zero_grad()
        if not issubclass(kind, torch.OutOfMemoryError):
            log.warning("the blocks can't be compiled here (%s); continuing without", reason)
            change_plan(state, compiled=False)
        else:
            checkpoint_more(state, batches)

    kinds = (torch.OutOfMemoryError, blocks.compile_error()) if state.plan.compiled else (torch.OutOfMemoryError,)
    return retry_after(kinds, step, recover)


def checkpoint_more(state: TrainState, batches: Sequence[Batch]) -> None:
    """Checkpoint more blocks. Raises UserError if all of them are, or if the blocks are sharded.

    A sharded step can't be redone, because other GPUs wait for this one's parts.
    """
    release_memory()
    transformer, checkpointed = state.components.transformer, state.plan.checkpointed_blocks
    count = len(transformer.transformer_blocks)
    if checkpointed == count or fsdp.is_sharded(transformer):
        size = max((batch.size for batch in batches), key=lambda size: size.tokens)
        raise UserError(
            f"a step on {len(batches[0].sigma)} images of {size} doesn't fit into memory, with {checkpointed} of "
            f"{count} blocks activation-checkpointed; lower resolution, batch_size or rank, or use a larger GPU."
        )
    change_plan(state, checkpointed_blocks=memory.more_blocks(checkpointed, count))
    log.warning(
        "out of memory; from here on %d of %d blocks are activation-checkpointed", state.plan.checkpointed_blocks, count
    )
