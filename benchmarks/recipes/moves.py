"""What may make a training faster: changes to our default inputs, one at a time, for `benchmarks.recipes`.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.recipes.peers import OURS, Recipe
from benchmarks.subjects import STYLE
from examples import shapes
from lora_utils.lora.layers import LoraLinear
from lora_utils.training.state import TrainState


def base_of(subject: str) -> str:
    """Return the recipe that a move changes: a LoRA of an object acts where it is named, one of a style always."""
    return "ours" if subject == STYLE else "ours, where it is named"


@dataclass(frozen=True, slots=True)
class Move(Recipe):
    """A change of inputs, of a run that is set up, or of the images' side, in pixels."""

    source: str = "ours, but for this"
    changed: Callable[[TrainState], None] | None = None
    side_px: int = shapes.SIDE_PX


def _principal_directions(run: TrainState) -> None:
    """Start each A from the layer's own first R right singular vectors, at the norm that it had; B stays zero."""
    for module in run.components.transformer.modules():
        if isinstance(module, LoraLinear):
            _, _, vectors = torch.linalg.svd(module.base_layer.weight.float(), full_matrices=False)
            with torch.no_grad():
                norms = module.down.norm(dim=1, keepdim=True)
                module.down.copy_(vectors[: len(module.down)] * norms)


def _given(changed: Callable[[TrainState], None] | None = None, side_px: int = shapes.SIDE_PX, **inputs: Any) -> Move:
    return Move(given={**OURS, **inputs}, changed=changed, side_px=side_px)


MOVES: dict[str, Recipe] = {
    **{f"rate {rate}": _given(learning_rate=float(rate)) for rate in ("2e-4", "1e-3", "2e-3")},
    # A LoRA's output is alpha / rank * B A. AdamW's steps don't follow the gradient's size, so a larger alpha is a
    # larger rate of B alone: LoRA+ with that ratio to the default of 32 (Hayou et al. 2024, who recommend 16, which is
    # an alpha of 512). A rank-stabilised alpha, 32 divided by the root of the rank instead, is one of 128.
    **{f"lora_alpha {alpha}": _given(lora_alpha=float(alpha)) for alpha in (16, 64, 128, 512)},
    **{f"rank {rank}": _given(rank=rank) for rank in (1, 64)},
    "attention alone": _given(lora_targets="attention"),
    "logit_normal without shift": _given(timestep_sampling="logit_normal"),
    "uniform": _given(timestep_sampling="uniform"),
    "style": _given(timestep_sampling="style"),
    "shift 3": _given(timestep_shift=3.0),
    "a rate that falls to 0": _given(lr_scheduler="linear"),
    "batch of 4": _given(batch_size=4),
    "4 batches a step": _given(gradient_accumulation=4),
    "caption_dropout 0": _given(caption_dropout=0.0),
    "caption_dropout 0.2": _given(caption_dropout=0.2),
    "ema_decay 0.98": _given(ema_decay=0.98),
    "two resolutions": _given(resolution="64,96", side_px=96),  # images aren't enlarged for a resolution
    "prodigy": _given(optimizer="prodigy", learning_rate=1.0),
    "adafactor": _given(optimizer="adafactor"),
    **{f"muon, rate {rate}": _given(optimizer="muon", learning_rate=float(rate)) for rate in ("5e-4", "1e-3", "2e-3")},
    "A from the layer's own directions": _given(_principal_directions),
}
