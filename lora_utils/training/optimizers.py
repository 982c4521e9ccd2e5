"""Optimizers: how gradients move the LoRA and the embeddings, and the average of where the weights have been.

This module owns which library's optimizer is which, and what of their state a checkpoint needs. The embeddings have an
AdamW of their own in full precision, whatever the LoRA has: their rate and first size were measured with it, and 8 bits
or a rank-one estimate save nothing on a single vector.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer

from lora_utils.config import TrainConfig
from lora_utils.training.muon import Muon

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

# What gradient and optimizer hold per weight of the LoRA, fp32: the gradient's 4 bytes, and two moments (adamw), one
# (muon), two of a byte each (adamw8bit), a row's and a column's mean (adafactor), or four values (prodigy compares with
# the start).
BYTES_PER_WEIGHT = {"adamw": 12.0, "adamw8bit": 6.1, "adafactor": 4.1, "muon": 8.0, "prodigy": 20.0}
AVERAGE_BYTES_PER_WEIGHT = 4.0


def bytes_per_weight(config: TrainConfig) -> float:
    """Return what gradient, optimizer and average hold per weight of the LoRA, beyond the weight itself."""
    return BYTES_PER_WEIGHT[config.optimizer] + (AVERAGE_BYTES_PER_WEIGHT if config.ema_decay else 0.0)


def _of_the_lora(config: TrainConfig, lora: list[nn.Parameter]) -> Optimizer:
    rate, decay, betas = config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
    match config.optimizer:
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit  # noqa: PLC0415 (heavy)

            return AdamW8bit(lora, lr=rate, betas=betas, weight_decay=decay)
        case "adafactor":
            # Its rate is relative to a weight's rms, which is 0 in a fresh B. A floor of 1 under that rms makes the
            # rate what it is elsewhere: the size of a step, for the update itself is clipped to an rms of 1.
            return Adafactor(lora, lr=rate, weight_decay=decay, eps=(None, 1.0))
        case "muon":
            return Muon(lora, lr=rate, weight_decay=decay)
        case "prodigy":
            from prodigyopt import Prodigy  # noqa: PLC0415

            # As its authors advise for diffusion models; the guard keeps a warm-up's small rates out of the estimate.
            return Prodigy(
                lora,
                lr=rate,
                betas=betas,
                weight_decay=cast(int, decay),
                use_bias_correction=True,
                safeguard_warmup=config.warmup_steps > 0,
            )
        case _:
            return AdamW(lora, lr=rate, betas=betas, weight_decay=decay, fused=True)


@dataclass(slots=True)
class Optimizers:
    """A run's optimizers: of the LoRA, of the embeddings (None: none is trained), and the average (None: none)."""

    lora: Optimizer
    embeddings: AdamW | None
    average: "EMAModel | None"
    learned: list[Tensor]  # what moves: the LoRA's weights and all trained embeddings
    lora_rate: float  # as given, before the schedule
    embedding_learning_rate: float

    def step(self, factor: float) -> None:
        """Move all that has a gradient, at the given rates times `factor`."""
        for optimizer, rate in self._with_rates():
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        if self.average is not None:
            self.average.step(cast(Any, self.learned))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer, _ in self._with_rates():
            optimizer.zero_grad(set_to_none=True)

    def try_out(self) -> None:
        """Allocate all of their state by a step of no size, and forget it: nothing has moved afterwards.

        An optimizer that has its state already, from a checkpoint, is left alone.
        """
        for optimizer in (each for each, _ in self._with_rates() if not each.state):
            before = [{**group} for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for gradient in (each.grad for each in group["params"] if each.grad is not None):
                    gradient.zero_()  # one that isn't finite would move a weight even so
            optimizer.step()
            optimizer.state.clear()
            for group, values in zip(optimizer.param_groups, before, strict=True):
                group.update(values)

    @property
    def rate(self) -> float:
        """The LoRA's learning rate at the last step. Prodigy's is the one that it has found."""
        group = self.lora.param_groups[0]
        return group["lr"] * group.get("d", 1.0)  # "d" is Prodigy's own

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let weights and embeddings be their averages within it, if averages are kept."""
        if self.average is None or not self.average.optimization_step:
            yield
            return
        weights = cast(Any, self.learned)
        self.average.store(weights)
        self.average.copy_to(weights)
        try:
            yield
        finally:
            self.average.restore(weights)

    def _with_rates(self) -> list[tuple[Optimizer, float]]:
        with_rates: list[tuple[Optimizer, float]] = [(self.lora, self.lora_rate)]
        return with_rates + ([(self.embeddings, self.embedding_learning_rate)] if self.embeddings else [])

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that their next step follows from: tensors, and numbers that JSON keeps exactly."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for which, (optimizer, _) in enumerate(self._with_rates()):
            (group,) = optimizer.param_groups
            numbers |= {f"{which}.group.{name}": value for name, value in group.items() if _is_number(value)}
            for index, parameter in enumerate(group["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    (tensors if isinstance(value, Tensor) else numbers)[f"{which}.{index}.{name}"] = value
        if self.average is not None:
            numbers["average.steps"] = self.average.optimization_step
            tensors |= {f"average.{index}": value for index, value in enumerate(self.average.shadow_params)}
        return tensors, numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from the state of optimizers of the same config."""
        for which, (optimizer, _) in enumerate(self._with_rates()):
            (group,) = optimizer.param_groups
            prefix = f"{which}.group."
            group.update({name.removeprefix(prefix): v for name, v in numbers.items() if name.startswith(prefix)})
            for index, parameter in enumerate(group["params"]):
                prefix = f"{which}.{index}."
                kept = {
                    name.removeprefix(prefix): value.to(parameter.device) if isinstance(value, Tensor) else value
                    for name, value in {**tensors, **numbers}.items()
                    if name.startswith(prefix)
                }
                if kept:
                    optimizer.state[parameter] = kept
        if self.average is not None:
            self.average.optimization_step = numbers["average.steps"]
            for index, shadow in enumerate(self.average.shadow_params):
                shadow.copy_(tensors[f"average.{index}"])


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)


def new_optimizers(
    config: TrainConfig, lora: list[nn.Parameter], embeddings: tuple[Tensor, ...], embedding_learning_rate: float
) -> Optimizers:
    """Return the optimizers of these weights and embeddings; embeddings that require no gradient aren't trained."""
    trained = [embedding for embedding in embeddings if embedding.requires_grad]
    learned: list[Tensor] = [*lora, *trained]
    average = None
    if config.ema_decay:
        from diffusers.training_utils import EMAModel  # noqa: PLC0415 (heavy)

        average = EMAModel(cast(Any, learned), decay=config.ema_decay, foreach=True)
    return Optimizers(
        _of_the_lora(config, lora),
        AdamW(trained, lr=embedding_learning_rate, weight_decay=0.0, fused=True) if trained else None,
        average,
        learned,
        config.learning_rate,
        embedding_learning_rate,
    )
