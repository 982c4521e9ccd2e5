"""The trainable adapter: put on a transformer's layers, switched off and on, filled and read out again.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from lora_utils.errors import UserError
from lora_utils.lora.layers import LAYERS, LoraLinear, TrainableLayer
from lora_utils.lora.updates import Update
from lora_utils.model import blocks
from lora_utils.model.adapter_sizes import adapted_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What is put on which layers."""

    targets: str
    rank: int
    method: str = "lora"
    alpha: float | None = None  # None: the rank


def attach_adapter(
    transformer: QwenImageTransformer2DModel, settings: AdapterSettings, generator: torch.Generator
) -> list[nn.Parameter]:
    """Wrap the target layers with fp32 weights that start as no change. -> what to train."""
    parameters, alpha = [], settings.rank if settings.alpha is None else settings.alpha
    names = [name for block in adapted_layers(settings.targets, len(transformer.transformer_blocks)) for name in block]
    for name, layer in _layers_in_order(transformer, names):
        wrapped = LAYERS[settings.method](layer, settings.rank, alpha, generator)
        transformer.set_submodule(name, wrapped)
        parameters += wrapped.weights
    blocks.install_forwards(transformer)
    for block_forward in blocks.forwards_of(transformer):
        block_forward.project = _project_together
    return parameters


def _layers_in_order(transformer: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Linear]]:
    """Return these linear layers in the order in which the transformer has them: that in which they are started."""
    wanted, modules = set(names), list(transformer.named_modules())
    found = [(name, layer) for name, layer in modules if name in wanted and isinstance(layer, nn.Linear)]
    if len(found) < len(wanted):
        raise RuntimeError(f"the transformer has {len(found)} of the {len(wanted)} layers to adapt")
    return found


def without_wrapper(layer: Any) -> Any:
    """Return the model's own linear layer of one that may be wrapped by a trainable one."""
    return layer.base_layer if isinstance(layer, TrainableLayer) else layer


def _trainable_layers(transformer: nn.Module) -> dict[str, TrainableLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, TrainableLayer)}


def _project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Compute several layers on one x [..., D_in], with a single down-projection if all have a LoRA."""
    wrapped = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if len(wrapped) < len(layers):
        return blocks.project_each(layers, x)
    downs: list[Tensor] = [layer.down for layer in wrapped]
    lows = F.linear(x, torch.cat(downs).to(x.dtype)).split([len(down) for down in downs], dim=-1)
    return [layer.add_update(x, low) for layer, low in zip(wrapped, lows, strict=True)]


def load_adapter(transformer: QwenImageTransformer2DModel, layers: Mapping[str, Update]) -> None:
    """Copy an adapter of the same method, and of no larger rank, into the trainable one.

    Raises UserError where layers, methods or shapes differ.
    """
    own = _trainable_layers(transformer)
    missing, unknown = sorted(set(own) - set(layers)), sorted(set(layers) - set(own))
    if missing or unknown:
        raise UserError(
            f"init_weights has {len(layers)} layers and lora_targets adapts {len(own)}; without a place here: "
            f"{listed(unknown)}; not in the file: {listed(missing)}. Choose the lora_targets it was trained with."
        )
    for name, layer in own.items():
        if not layer.fits(layers[name]):
            raise UserError(
                f"layer {name!r} of init_weights is of another shape or method than the run's; set adapter and rank as "
                "it was trained."
            )
    for name, layer in own.items():
        layer.load(layers[name])


@contextmanager
def without_lora(transformer: QwenImageTransformer2DModel) -> Iterator[None]:
    """Let a transformer with a trainable LoRA be the base model within it. It is for forwards without a backward."""
    layers, forwards = _trainable_layers(transformer).values(), blocks.forwards_of(transformer)
    before = [(forward.project, forward.compute, forward.checkpointed) for forward in forwards]
    try:
        for layer in layers:
            layer.enabled = False
        for forward in forwards:
            forward.project, forward.compute, forward.checkpointed = blocks.project_each, blocks.compute_block, False
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        for forward, fields in zip(forwards, before, strict=True):
            forward.project, forward.compute, forward.checkpointed = fields


def trained_layers(transformer: QwenImageTransformer2DModel) -> dict[str, Update]:
    """Return the changes that the trainable adapter has learned, by module name, on the CPU."""
    return {name: layer.update() for name, layer in _trainable_layers(transformer).items()}


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first of these names as a text."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"
