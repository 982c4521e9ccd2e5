"""The training loop: a run that is set up -> a LoRA and, if asked for, the embedding of a placeholder token.

The loop yields; logging, saving and cancelling belong to whoever consumes it. The device is waited for only where a
number is read.

Legend: B batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from lora_utils.config import TrainConfig
from lora_utils.dataset.feature_cache import CachedControls
from lora_utils.errors import UserError
from lora_utils.model import flops, fsdp
from lora_utils.model.controls import Controls
from lora_utils.model.latents import Size
from lora_utils.model.transformer import transformer_shape
from lora_utils.training import distributed
from lora_utils.training.batch_plans import plan_batches
from lora_utils.training.batches import Batch
from lora_utils.training.loss import forward_backward
from lora_utils.training.recompute import plan_recompute, within_memory
from lora_utils.training.state import TrainState

_LOOKED_AHEAD = 2000  # batches, to tell how long a run's steps are
CHECK_EVERY = 25  # steps from one look at whether the numbers are finite to the next: each waits for the device


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. Its numbers are still on the device; reading one waits for the step to end."""

    step: int
    learning_rate: float
    image_losses: Tensor  # [batches, B], NaN behind the last image of a short batch
    sigmas: tuple[Tensor, ...]  # of each batch's images, on the CPU
    is_prior: tuple[bool, ...]  # which of the batches held what must stay, rather than teach
    grad_norm: Tensor  # of the LoRA, before clipping
    token_grad_norms: dict[str, Tensor]  # of the tokens that the step's captions held, before clipping

    @property
    def losses(self) -> Tensor:
        """The mean loss of each batch's images, [batches]; NaN if one of these is."""
        counts = [len(sigma) for sigma in self.sigmas]
        return torch.stack([own[:count].mean() for own, count in zip(self.image_losses, counts, strict=True)])

    @property
    def loss(self) -> float:
        """The mean loss of all batches."""
        return float(self.losses.mean())

    @property
    def instance_losses(self) -> Tensor:
        """The losses of the batches that taught, of which there may be none."""
        return self.losses[[index for index, is_prior in enumerate(self.is_prior) if not is_prior]]

    @property
    def prior_losses(self) -> Tensor:
        """The losses of the batches that held what must stay."""
        return self.losses[[index for index, is_prior in enumerate(self.is_prior) if is_prior]]


def train(state: TrainState) -> Iterator[StepReport]:
    """Step through a run from where it is, one report per optimizer step: `state` is then as that step left it."""
    config, ranks, unchecked = state.config, state.ranks, []
    plan_recompute(state)
    if state.step:  # of a run that is resumed: what it has learned is kept, whatever comes
        state.keep_sound()
    for step in range(state.step, config.steps):
        batches = [next(state.stream) for _ in range(config.gradient_accumulation * ranks.world_size)]
        report = take_step(state, batches, step)
        state.step = step + 1
        unchecked.append((report, batches))
        if step % CHECK_EVERY == 0 or step + 1 == config.steps:
            check_numbers(unchecked)
            unchecked = []
            state.keep_sound()
        yield report


def take_step(state: TrainState, batches: Sequence[Batch], step: int) -> StepReport:
    """Take optimizer step `step`, counted from 0, on all processes' batches."""
    # This process's losses and gradients, then all processes'.
    own, needs_base = state.ranks.shard(batches), base_needed(state, batches)
    losses = within_memory(state, own, partial(forward_backward, state, own, needs_base))
    for batch, with_base in zip(own, needs_base, strict=True):
        extra = max((control_tokens(each) for each in batch.controls), default=(0, 0))
        state.flops += batch_flops(state, batch.size, batch.captions, with_base, extra)
    image_losses = distributed.all_gather_losses(state.ranks, losses)
    distributed.all_reduce_gradients(state.ranks, [each for each in state.learned if each.requires_grad])

    # The move.
    grad_norm, token_grad_norms = clip_and_step(state, step)
    return StepReport(
        step + 1,
        state.optimizers.rate,
        image_losses,
        tuple(batch.sigma for batch in batches),
        tuple(batch.is_prior for batch in batches),
        grad_norm,
        token_grad_norms,
    )


def base_needed(state: TrainState, batches: Sequence[Batch]) -> list[bool]:
    """Return for which of this process's batches the base model runs.

    Where the base is sharded, all GPUs run the same forwards: it also runs where another process's batch needs it.
    """
    count = state.ranks.world_size
    if not fsdp.is_sharded(state.components.transformer):
        return [batch.is_prior for batch in state.ranks.shard(batches)]
    together = [batches[start : start + count] for start in range(0, len(batches), count)]
    return [any(batch.is_prior for batch in group) for group in together]


def control_tokens(controls: Controls | CachedControls) -> tuple[int, int]:
    """Return how many image tokens and how many text tokens images to edit take."""
    if isinstance(controls, CachedControls):
        return controls.tokens, controls.text_tokens
    return len(controls.latents.tokens), sum(image.rows * image.columns for image in controls.seen)


def batch_flops(
    state: TrainState, size: Size, captions: Sequence[str], with_base: bool, controls: tuple[int, int] = (0, 0)
) -> float:
    """Count the operations of one batch's forward and backward, and of the base model's forward if it runs.

    `controls` are the image and text tokens that its images to edit take.
    """
    shape = transformer_shape(state.components.transformer)
    longest = max(state.data.text_tokens[caption] for caption in captions)
    tokens = size.tokens + controls[0], longest + controls[1]
    base = flops.forward_flops(shape, *tokens) if with_base else 0.0
    return len(captions) * (base + flops.training_flops(shape, *tokens, state.plan.checkpointed_blocks))


def mean_step_flops(state: TrainState) -> float:
    """Return the mean operations of this process's part of a step, over the run's first batches."""
    config, count = state.config, state.config.gradient_accumulation
    plans = plan_batches(config, state.data.examples, state.data.preserved)
    first = list(islice(plans, min(_LOOKED_AHEAD, config.steps * count * state.ranks.world_size)))
    each = []
    for plan in first:
        extra = max((control_tokens(own.controls) for own in plan.examples if own.controls), default=(0, 0))
        each.append(batch_flops(state, plan.examples[0].size, plan.captions, plan.is_prior, extra))
    return count * sum(each) / len(each)


def rate_factor(step: int, config: TrainConfig) -> float:
    """Return what the learning rates are multiplied by at optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_scheduler == "linear" else 1.0


def clip_and_step(state: TrainState, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip the LoRA and each embedding apart, step, clear the gradients. -> their gradient norms before clipping

    Apart, because a new embedding's first gradient is some 50 times the LoRA's and would stop it from learning. An
    embedding that isn't trained, or whose token no caption of the step held, has no gradient and isn't moved.
    """
    most = state.config.max_grad_norm or math.inf
    lora_norm = nn.utils.clip_grad_norm_(state.lora, most)
    token_norms = {
        token: nn.utils.clip_grad_norm_([embedding], most)
        for token, embedding in zip(state.placeholders.tokens, state.placeholders.embeddings, strict=True)
        if embedding.grad is not None
    }
    state.optimizers.step(rate_factor(step, state.config))
    state.optimizers.zero_grad()
    return lora_norm, token_norms


# --- checks ---------------------------------------------------------------------------------------------------------


def check_numbers(reports: Sequence[tuple[StepReport, Sequence[Batch]]]) -> None:
    """Raise UserError for the first of these steps with a loss or a token's gradient that is no number.

    It waits for the device once.
    """
    if torch.stack([_is_sound(report) for report, _ in reports]).all():
        return
    for report, batches in reports:
        if not math.isfinite(report.loss):
            names = ", ".join(name for batch in batches for name in batch.names)
            levels = ", ".join(f"{level:.3f}" for batch in batches for level in batch.sigma.tolist())
            raise UserError(
                f"the loss is {report.loss} at step {report.step} (images: {names}; sigma: {levels}); "
                "lower learning_rate."
            )
        for token, norm in report.token_grad_norms.items():
            if not norm.isfinite():
                raise UserError(f"the gradient of {token} is {float(norm)} at step {report.step}; lower its rate.")


def _is_sound(report: StepReport) -> Tensor:
    """Return whether the losses and the tokens' gradients are numbers that can be: one flag, not read yet.

    An embedding may be on the CPU while the losses are on the GPU.
    """
    norms = [norm.isfinite().to(report.losses.device) for norm in report.token_grad_norms.values()]
    return torch.stack([report.losses.isfinite().all(), *norms]).all()
