"""What may make a training faster: changes to our default, one at a time, for `benchmarks.recipes`.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.muon import Muon
from benchmarks.peers import Recipe
from lora_utils.lora.layers import LoraLinear
from lora_utils.presets import PRESETS
from lora_utils.training.state import TrainState

RANK = PRESETS["none"].rank


@dataclass(frozen=True, slots=True)
class Move(Recipe):
    """A change of inputs, or of a run that is set up."""

    source: str = "lora_utils/config.py, but for this"
    changed: Callable[[TrainState], None] | None = None


def _principal_directions(run: TrainState) -> None:
    """Start each A from the layer's own first R right singular vectors, at the norm that it had; B stays zero."""
    for module in run.components.transformer.modules():
        if isinstance(module, LoraLinear):
            _, _, vectors = torch.linalg.svd(module.base_layer.weight.float(), full_matrices=False)
            with torch.no_grad():
                norms = module.down.norm(dim=1, keepdim=True)
                module.down.copy_(vectors[: len(module.down)] * norms)


def _muon(run: TrainState) -> None:
    """Let Muon move the LoRA: each update is made orthogonal."""
    run.optimizers.lora = Muon(run.lora, lr=run.config.learning_rate)


def _given(**inputs: Any) -> Move:
    return Move(given=inputs)


def _rates(*rates: float) -> Mapping[str, Move]:
    return {f"rate {rate:g}": _given(learning_rate=rate) for rate in rates}


MOVES: dict[str, Recipe] = {
    "our default": Move(),
    "a token": Move(given={"train_placeholder_token": True}),
    **_rates(2e-4, 5e-4, 1e-3, 2e-3),
    **{
        f"rate 5e-4, B {ratio} times as fast": _given(learning_rate=5e-4, lora_alpha=float(ratio * RANK))
        for ratio in (4, 16)
    },
    # A LoRA's output is alpha / rank * B A. AdamW's steps don't follow the gradient's size, so a larger alpha is a
    # larger rate of B alone: LoRA+ with that ratio (Hayou et al. 2024). Rank-stabilised alphas are such ones too.
    **{f"B {ratio} times as fast (LoRA+)": _given(lora_alpha=float(ratio * RANK)) for ratio in (4, 16)},
    "rank 8": _given(rank=8),
    "rank 64": _given(rank=64),
    "attention and MLPs": _given(lora_targets="attention_mlp"),
    "logit_normal without shift": _given(timestep_sampling="logit_normal"),
    "uniform": _given(timestep_sampling="uniform"),
    "shift 3": _given(timestep_shift=3.0),
    "warm-up of 100 steps": _given(warmup_steps=100),
    "beta2 0.99": _given(beta2=0.99),
    "no clipping": _given(max_grad_norm=0.0),
    "batch of 4": _given(batch_size=4),
    "4 batches a step": _given(gradient_accumulation=4),
    "caption_dropout 0": _given(caption_dropout=0.0),
    "caption_dropout 0.2": _given(caption_dropout=0.2),
    "ema_decay 0.98": _given(ema_decay=0.98),
    "two resolutions": _given(resolution="64,96"),
    "prodigy": _given(optimizer="prodigy", learning_rate=1.0),
    "adafactor": _given(optimizer="adafactor"),
    "Muon, rate 1e-3": Move(given={"learning_rate": 1e-3}, changed=_muon),
    "Muon, rate 5e-3": Move(given={"learning_rate": 5e-3}, changed=_muon),
    "A from the layer's own directions": Move(changed=_principal_directions),
}
