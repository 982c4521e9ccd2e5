"""The loss on pictures held out: at fixed levels of noise and in fixed noise, so that it is smooth over a run and
comparable between runs.

Owns what is measured and when; must not know what is done with the numbers. It moves nothing, and draws nothing that
the run draws.

Legend: B batch, N image tokens, C packed channels (64).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_utils import flow
from lora_utils.caching import CachedExample
from lora_utils.draws import VALIDATION_SIGMAS, Drawn, generator_for, loss_weights
from lora_utils.objective import picture_losses
from lora_utils.preparation import Run

TIMES_A_RUN = 10  # with four levels and the smallest sizes a few percent of a run's time for ten pictures


@dataclass(frozen=True, slots=True)
class Validation:
    """Mean losses: of all that was measured, and at each of VALIDATION_SIGMAS."""

    loss: float
    by_sigma: tuple[float, ...]


def is_due(run: Run, step: int) -> bool:
    """After `step` steps: before the first, TIMES_A_RUN times on the way, and after the last."""
    return bool(run.held_out) and (step % max(1, run.config.steps // TIMES_A_RUN) == 0 or step == run.config.steps)


def batches(examples: Sequence[CachedExample], batch_size: int, mask_floor: float) -> Iterator[Drawn]:
    """Every picture at every level, in noise that follows from its place among them alone."""
    for index, example in enumerate(examples):
        noise = torch.randn(example.latents.shape, generator=generator_for(0, f"validation {index}"))  # [N, C]
        for levels in torch.tensor(VALIDATION_SIGMAS).split(batch_size):
            count = len(levels)
            clean, same = (part.expand(count, -1, -1) for part in (example.latents, noise))  # [B, N, C]
            yield Drawn(
                flow.add_noise(clean, same, levels),
                flow.velocity_target(clean, same),
                levels,
                (example.caption,) * count,
                example.size,
                (example.image_name,) * count,
                loss_weights([example] * count, mask_floor),
            )


@torch.no_grad()
def validate(run: Run) -> Validation:
    """Measure what would be written now: the average of the weights, where one is kept."""
    done, losses = run.flops, []
    with run.optimizers.averaged():
        for drawn in batches(run.held_out, run.config.batch_size, run.config.mask_floor):
            losses.append(picture_losses(run, drawn))
    run.flops = done  # of training alone
    by_picture = torch.cat(losses).view(len(run.held_out), len(VALIDATION_SIGMAS))
    return Validation(float(by_picture.mean()), tuple(by_picture.mean(dim=0).tolist()))
