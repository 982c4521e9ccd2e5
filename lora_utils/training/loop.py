"""Training: a prepared run -> a LoRA and, if asked for, the row of a placeholder token.

Owns the loop; must not know Cog, archives or sampling. The loop yields; printing, saving and cancelling
belong to whoever consumes it. The device is waited for only where a number is read.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_utils import flops, fresh_token, memory
from lora_utils.cards import add_gradients, gather_losses
from lora_utils.config import TrainConfig
from lora_utils.draws import Drawn, MicroBatches
from lora_utils.errors import UserError
from lora_utils.fitting import plan_memory, within_the_plan
from lora_utils.lora_file import LoraFile
from lora_utils.objective import forward_backward
from lora_utils.placeholder import RowReport
from lora_utils.preparation import Run, learned
from lora_utils.sharding import is_sharded

CHECK_EVERY = 25  # steps from one look at whether the numbers are finite to the next: each waits for the device


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. Its numbers are still on the device; reading one waits for the step to end."""

    step: int
    learning_rate: float
    pictures: Tensor  # losses [micro-batches, batch_size], NaN behind the last picture of a short batch
    sigmas: tuple[Tensor, ...]  # of each micro-batch's pictures, on the host
    preserves: tuple[bool, ...]  # which of them held the class, rather than teach
    grad_norm: Tensor  # of the LoRA, before clipping
    row_grad_norms: dict[str, Tensor]  # of the tokens that the step's captions held, before clipping

    @property
    def losses(self) -> Tensor:
        """Of its micro-batches: the mean of each one's pictures, NaN if one of these is."""
        counts = [len(sigma) for sigma in self.sigmas]
        return torch.stack([row[:count].mean() for row, count in zip(self.pictures, counts, strict=True)])

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def taught(self) -> Tensor:
        """Losses of the micro-batches that taught, of which there may be none."""
        return self.losses[[index for index, preserves in enumerate(self.preserves) if not preserves]]

    @property
    def kept(self) -> Tensor:
        """Losses of those that held the class."""
        return self.losses[[index for index, preserves in enumerate(self.preserves) if preserves]]


def rate_factor(step: int, config: TrainConfig) -> float:
    """What the learning rates are multiplied by at optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_scheduler == "linear" else 1.0


def clip_and_step(run: Run, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip the LoRA and each row apart, step, clear the gradients. -> their gradient norms before clipping.

    Apart, because a fresh row's first gradient is some 50 times the LoRA's and would stop it from learning. A row that
    isn't trained, or whose token no caption of the step held, has no gradient and isn't moved.
    """
    most = run.config.max_grad_norm or math.inf
    lora_norm = nn.utils.clip_grad_norm_(run.lora, most)
    row_norms = {
        token: nn.utils.clip_grad_norm_([row], most)
        for token, row in zip(run.placeholders.tokens, run.placeholders.rows, strict=True)
        if row.grad is not None
    }
    run.optimizers.step(rate_factor(step, run.config))
    run.optimizers.zero_grad()
    return lora_norm, row_norms


def take_step(run: Run, drawn: Sequence[Drawn], step: int) -> StepReport:
    """Optimizer step `step`, counted from 0, on all processes' micro-batches."""
    own = run.ranks.part(drawn)
    accompany = ()
    if is_sharded(run.transformer):  # all cards run the same forwards
        together = [drawn[start : start + run.ranks.count] for start in range(0, len(drawn), run.ranks.count)]
        accompany = [any(batch.preserves for batch in batches) for batches in together]
    losses = within_the_plan(run, own, partial(forward_backward, run, own, accompany))
    pictures = gather_losses(run.ranks, losses)
    add_gradients(run.ranks, [*run.lora, *(row for row in run.placeholders.rows if row.requires_grad)])
    grad_norm, row_grad_norms = clip_and_step(run, step)
    return StepReport(
        step + 1,
        run.optimizers.rate,
        pictures,
        tuple(batch.sigma for batch in drawn),
        tuple(batch.preserves for batch in drawn),
        grad_norm,
        row_grad_norms,
    )


def _is_sound(report: StepReport) -> Tensor:
    """Whether the losses and the rows' gradients are numbers that can be: one flag, not read yet.

    A row may be on the host while the losses are on the card.
    """
    rows = [(norm.isfinite() & (norm > 0)).to(report.losses.device) for norm in report.row_grad_norms.values()]
    return torch.stack([report.losses.isfinite().all(), *rows]).all()


def check_numbers(reports: Sequence[tuple[StepReport, Sequence[Drawn]]]) -> None:
    """Raise for the first of these steps with a loss or a row's gradient that can't be. Waits for the device, once."""
    if torch.stack([_is_sound(report) for report, _ in reports]).all():
        return
    for report, drawn in reports:
        if not math.isfinite(report.loss):
            names = ", ".join(name for batch in drawn for name in batch.names)
            levels = ", ".join(f"{level:.3f}" for batch in drawn for level in batch.sigma.tolist())
            raise UserError(
                f"the loss is {report.loss} at step {report.step} (pictures: {names}; sigma: {levels}); "
                "lower learning_rate."
            )
        for token, norm in report.row_grad_norms.items():
            if norm == 0:
                raise RuntimeError(f"no gradient reaches the row of {token} at step {report.step}")
            if not norm.isfinite():
                raise UserError(f"the gradient of {token} is {float(norm)} at step {report.step}; lower its rate.")


def train(run: Run) -> Iterator[StepReport]:
    """Step through the run from where it is, one report per optimizer step: `run` is then as that step left it."""
    config, unchecked = run.config, []
    plan_memory(run)
    if run.stream is None:
        run.stream = MicroBatches(config, run.examples, run.schedule, run.preserved)
    for step in range(run.step, config.steps):
        drawn = [next(run.stream) for _ in range(config.gradient_accumulation * run.ranks.count)]
        report = take_step(run, drawn, step)
        run.step = step + 1
        unchecked.append((report, drawn))
        if step % CHECK_EVERY == 0 or step + 1 == config.steps:
            check_numbers(unchecked)
            unchecked = []
        yield report


# --- the result -----------------------------------------------------------------------------------------------------


def finish(run: Run) -> LoraFile:
    """What has been learned. Raises UserError for weights that are no numbers, RuntimeError for a row at its start."""
    for token, row, first in zip(run.placeholders.tokens, run.placeholders.rows, run.first_rows, strict=True):
        if row.requires_grad and torch.equal(row, first):
            raise RuntimeError(f"the row of {token} hasn't moved in {run.step} steps")
    lora = learned(run)
    parts = [part for layer in lora.layers.values() for part in (layer.down, layer.up)]
    if not all(part.isfinite().all() for part in (*parts, *lora.rows.values())):  # the last step's loss doesn't know
        raise UserError(f"the weights aren't finite after step {run.step}; lower learning_rate.")
    return lora


def describe_speed(run: Run) -> list[str]:
    """The run's last lines: how fast it was against what the device can do, its peak of memory, where the time went."""
    device, steps, seconds = run.place.device, run.step - run.resumed_at, run.seconds["train"]
    if steps == 0:
        return [f"no step was left: all {run.step} were taken before"]
    done, peak = run.flops / seconds, flops.measured_peak(device, run.place.dtype)
    spent = ", ".join(f"{name} {taken:.1f} s" for name, taken in run.seconds.items())
    held = "of the card's memory" if device.type == "cuda" else "of memory"
    return [
        f"trained {steps} steps, {seconds / steps:.3f} s each, at {done / 1e12:.3g} TFLOP/s: {done / peak:.0%} of the "
        f"{peak / 1e12:.3g} that a plain matrix product reaches here",
        f"at most {memory.peak_bytes(device) / 1e9:.2f} GB {held}; {spent}",
    ]


def report_rows(run: Run) -> dict[str, RowReport]:
    """How each token's row stands among the words now; empty where none is trained."""
    if run.text_encoder is None:
        return {}
    return fresh_token.report(run.placeholders, run.tokenizer, run.text_encoder)


def describe_placeholders(run: Run) -> list[dict[str, Any]]:
    """What meta.json says of each trained row; nothing in baseline mode."""
    if run.text_encoder is None:
        return []
    with run.optimizers.averaged():
        rows = fresh_token.describe(run.placeholders, run.first_rows, run.tokenizer, run.text_encoder)
    return [
        {
            **described,
            "init_std": run.config.placeholder_init_std,
            "learning_rate": run.optimizers.row_rate,
            "captions_with_token": sum(described["token"] in caption for caption in run.captions),
        }
        for described in rows
    ]
