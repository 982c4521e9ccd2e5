"""Validation: the loss on images held out, at fixed levels of noise and in fixed noise.

So it is smooth over a run and comparable between runs. It moves nothing, and uses none of the run's random numbers.

Legend: B batch, N image tokens, C packed channels (64).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_utils.dataset.cache import CachedExample
from lora_utils.model import flow
from lora_utils.training.batch_plans import generator_for
from lora_utils.training.batches import VALIDATION_SIGMAS, Batch, loaded_controls, loss_weights
from lora_utils.training.loss import flow_matching_loss
from lora_utils.training.state import TrainState

TIMES_A_RUN = 10  # with four levels and the smallest sizes a few percent of a run's time for ten images


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean losses: of all that was measured, and at each of VALIDATION_SIGMAS."""

    loss: float
    by_sigma: tuple[float, ...]


def validation_due(state: TrainState, step: int) -> bool:
    """Return whether to measure after `step` steps: before the first, TIMES_A_RUN times on the way, after the last."""
    every, last = max(1, state.config.steps // TIMES_A_RUN), state.config.steps
    return bool(state.data.held_out) and (step % every == 0 or step == last)


def validation_batches(examples: Sequence[CachedExample], batch_size: int, mask_floor: float) -> Iterator[Batch]:
    """Yield every image at every level, in noise that follows from its index alone."""
    for index, example in enumerate(examples):
        noise = torch.randn(example.latents.shape, generator=generator_for(0, f"validation {index}"))  # [N, C]
        for levels in torch.tensor(VALIDATION_SIGMAS).split(batch_size):
            count = len(levels)
            clean, same = (part.expand(count, -1, -1) for part in (example.latents, noise))  # [B, N, C]
            yield Batch(
                flow.add_noise(clean, same, levels),
                flow.velocity_target(clean, same),
                levels,
                (example.caption,) * count,
                example.size,
                (example.image_name,) * count,
                loss_weights([example] * count, mask_floor),
                controls=loaded_controls([example] * count),
            )


@torch.no_grad()
def validate(state: TrainState) -> Validation:
    """Measure what would be written now: the average of the weights, where one is kept."""
    held_out, config = state.data.held_out, state.config
    with state.optimizers.averaged():
        batches = validation_batches(held_out, config.batch_size, config.mask_floor)
        losses = [flow_matching_loss(state, batch) for batch in batches]
    by_image = torch.cat(losses).view(len(held_out), len(VALIDATION_SIGMAS))
    return Validation(float(by_image.mean()), tuple(by_image.mean(dim=0).tolist()))
