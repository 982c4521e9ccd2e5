"""A prepared run's steps into the memory there is: how many blocks recompute, tried out, and less when that fails.

Owns the plan while the run is on; which switches it starts with is plan.py's choice. Must not know optimizers.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

from lora_utils import blocks, memory, models, plan
from lora_utils.adapters import use_blocks
from lora_utils.draws import Drawn, generator_for
from lora_utils.errors import UserError
from lora_utils.objective import forward_backward
from lora_utils.preparation import PROBE_SIGMA, Run
from lora_utils.sharding import is_sharded

log = logging.getLogger(__name__)
T = TypeVar("T")


def plan_memory(run: Run) -> None:
    """Choose how many blocks recompute their activations, by arithmetic, then by a step on the largest batch."""
    largest = max(run.examples, key=lambda example: example.size.tokens)
    longest = max(len(models.prompt_ids(run.tokenizer, example.caption, run.placeholders)) for example in run.examples)
    tokens = run.config.batch_size * (largest.size.tokens + longest)
    size = plan.step_size(run.config, dict(run.transformer.config), tokens, run.place.dtype.itemsize)
    free = memory.free_bytes(run.place.device)
    run.recomputed = memory.blocks_to_recompute(size, free)
    use_compiled(run, run.compiled)
    log.info(
        "memory: a step of %d tokens needs %.1f of %.1f GB free; %d of %d blocks recompute their activations",
        size.tokens, size.needed_bytes(run.recomputed) / 1e9, free / 1e9, run.recomputed, size.blocks,
    )  # fmt: skip
    began = time.monotonic()
    probe = Drawn(
        torch.randn(run.config.batch_size, *largest.latents.shape, generator=generator_for(0, "probe")),
        torch.zeros(run.config.batch_size, *largest.latents.shape),
        torch.full((run.config.batch_size,), PROBE_SIGMA),
        (max((example.caption for example in run.examples), key=len),) * run.config.batch_size,
        largest.size,
        (largest.image_name,),
    )

    def step() -> None:
        forward_backward(run, [probe])
        run.optimizers.try_out()

    within_the_plan(run, [probe], step)
    run.optimizers.zero_grad()
    run.flops = 0.0
    run.seconds["probe"] = time.monotonic() - began


def use_plan(run: Run, recomputed: int) -> None:
    run.recomputed = recomputed
    blocks.recompute_first(run.transformer, recomputed)


def use_compiled(run: Run, compiled: bool) -> None:
    run.compiled = compiled
    use_blocks(run.transformer, compiled)
    use_plan(run, run.recomputed)


def compute_plainly(run: Run, reason: str) -> None:
    """After blocks couldn't be compiled: drop what the step left, and go on without."""
    log.warning("the blocks can't be compiled here (%s); going on without", reason)
    run.optimizers.zero_grad()
    use_compiled(run, compiled=False)


def step_down(run: Run, drawn: Sequence[Drawn]) -> None:
    """After a step that ran out of memory: drop what it left and recompute more. Raises UserError if all do.

    Or if the blocks are shared out: a step can't be redone where other cards wait for this one's parts.
    """
    run.optimizers.zero_grad()
    models.release_memory()
    blocks_there = len(run.transformer.transformer_blocks)
    if run.recomputed == blocks_there or is_sharded(run.transformer):
        size = max((batch.size for batch in drawn), key=lambda size: size.tokens)
        raise UserError(
            f"a step on {len(drawn[0].sigma)} pictures of {size.width_px}x{size.height_px} doesn't fit into memory, "
            f"with {run.recomputed} of {blocks_there} blocks recomputed; lower resolution, batch_size or rank, or use "
            "a larger card."
        )
    use_plan(run, memory.more_blocks(run.recomputed, blocks_there))
    log.warning("out of memory; from here on %d of %d blocks recompute", run.recomputed, blocks_there)


def within_the_plan(run: Run, drawn: Sequence[Drawn], step: Callable[[], T]) -> T:
    """Compute gradients of these micro-batches. Out of memory, the plan steps down and all of them are redone.

    Nothing that can't be redone may be part of `step`: no exchange with other processes, and no move of a weight.
    """
    while True:
        flops_before = run.flops
        try:
            return step()
        except torch.OutOfMemoryError:
            reason = None  # dealt with below, where the failed step's tensors are no longer held by its traceback
        except TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        run.flops = flops_before
        if reason is None:
            step_down(run, drawn)
        else:
            compute_plainly(run, reason)
