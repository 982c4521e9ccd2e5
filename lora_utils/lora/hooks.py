"""Finished adapters of any method, applied through forward hooks.

This module owns the proof that every layer of a file was applied. A finished LoRA changes no module and no weight:
taking the hooks away leaves the base bit for bit as it was, where fusing and unfusing in bf16 would not.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.lora.adapter import listed, without_wrapper
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.updates import Decomposed, Update, with_tensors
from lora_utils.model import modulation
from lora_utils.model.device import Placement
from lora_utils.model.quantization import dense


def check_lora(lora: LoraFile, transformer: QwenImageTransformer2DModel) -> None:
    """Check that every layer of the file is one of the transformer's, and fits it.

    Raises UserError that says what matched and what didn't: a LoRA that applies in part isn't the one that was trained.
    """
    # Every layer has its counterpart.
    shapes = layer_shapes(transformer)
    unknown = [name for name in lora.names if name not in shapes]
    if unknown:
        matched = [name for name in lora.names if name in shapes]
        raise UserError(
            f"this LoRA doesn't fit the model: {len(matched)} of its {len(lora.names)} layers match "
            f"({listed(matched)}), {len(unknown)} don't exist here ({listed(unknown)}). Is it another model's?"
        )

    # Each fits it.
    for name, layer in lora.layers.items():
        wanted, got = shapes[name], (layer.shape[1], layer.shape[0])
        if wanted != got:
            raise UserError(
                f"this LoRA doesn't fit the model: {name!r} takes and gives {wanted} values, the LoRA's {got}."
            )
    for name, bias in lora.biases.items():
        if shapes[name][1] != len(bias):
            raise UserError(
                f"this LoRA doesn't fit the model: {name!r} gives {shapes[name][1]} values, the LoRA's {len(bias)}."
            )


def move_lora(lora: LoraFile, transformer: QwenImageTransformer2DModel, placement: Placement) -> LoraFile:
    """Move a LoRA that `check_lora` has checked to the device, in the compute dtype.

    A DoRA's gain follows from the weights that it changes, in fp32: what of them the modulation table stands for must
    have been loaded.
    """

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(placement.device, placement.dtype)

    layers: dict[str, Update] = {}
    for name, layer in lora.layers.items():
        layers[name] = with_tensors(layer, moved)
        if isinstance(layer, Decomposed):
            exact = with_tensors(layer, lambda tensor: tensor.to(placement.device, torch.float32))
            layers[name] = replace(layers[name], gain=exact.on_model(_weight(transformer, name)).gain)
    return replace(lora, layers=layers, biases={name: moved(bias) for name, bias in lora.biases.items()})


def _weight(transformer: QwenImageTransformer2DModel, name: str) -> Tensor:
    """Return a layer's weight [D_out, D_in], however it is stored."""
    return dense(without_wrapper(transformer.get_submodule(name)).weight)


def layer_shapes(transformer: QwenImageTransformer2DModel) -> dict[str, tuple[int, int]]:
    """Return D_in and D_out of each linear layer: those under a trainable LoRA and those of the table, too."""
    shapes = {
        name.removesuffix(".base_layer"): (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }
    for block in range(len(transformer.transformer_blocks)):
        for name in constants.MODULATION_TARGETS:
            shapes[f"transformer_blocks.{block}.{name}"] = (transformer.inner_dim, 6 * transformer.inner_dim)
    return shapes


def adapts_the_table(lora: LoraFile) -> bool:
    """Return whether a LoRA adapts a layer that the modulation table follows from."""
    return any(map(modulation.table_depends_on, lora.names))


@dataclass(slots=True)
class AppliedLoras:
    """The LoRAs that a transformer computes with, by their index in what was applied: all of them, until some rest."""

    acting: frozenset[int]

    @contextmanager
    def only(self, which: frozenset[int]) -> Iterator[None]:
        """Let only these act within it."""
        before, self.acting = self.acting, which
        try:
            yield
        finally:
            self.acting = before


@dataclass(frozen=True, slots=True)
class _AddUpdates:
    """A forward hook on a linear layer: what all acting LoRAs change of it is added to its output, in place."""

    updates: Sequence[tuple[int, Update, float]]  # each of a LoRA by its index, with its scale
    biases: Sequence[tuple[int, Tensor, float]]  # [D_out]
    applied: AppliedLoras

    def __call__(self, layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add to output [..., D_out] for the input [..., D_in]."""
        x, base, own = arguments[0], output, without_wrapper(layer)
        updates = [(update, scale) for index, update, scale in self.updates if index in self.applied.acting]
        if any(isinstance(update, Decomposed) for update, _ in updates):  # these change what W alone gives
            base = output.clone() if own.bias is None else output - own.bias
        for update, scale in updates:
            if isinstance(update, Decomposed):
                per_input = update.magnitude.shape[1] != 1
                update.add_to(output, x, scale, base, dense(own.weight) if per_input else None)
            else:
                update.add_to(output, x, scale)
        for index, bias, scale in self.biases:
            if index in self.applied.acting:
                output.add_(bias, alpha=scale)
        return output


@contextmanager
def applied_loras(
    transformer: QwenImageTransformer2DModel, loras: Sequence[tuple[LoraFile, float]]
) -> Iterator[AppliedLoras]:
    """Let the transformer compute with these LoRAs, moved by `move_lora`, within it, each at its scale; 0 is none.

    One that adapts what the modulation table follows from switches the table off; its layers must have been loaded.
    """
    applied = AppliedLoras(frozenset(range(len(loras))))
    with ExitStack() as stack:
        if any(scale != 0 and adapts_the_table(lora) for lora, scale in loras):
            stack.enter_context(modulation.without_table(transformer))
        used = [(index, lora, scale) for index, (lora, scale) in enumerate(loras) if scale != 0]
        for name in dict.fromkeys(name for _, lora, _ in used for name in lora.names):
            updates = [(index, lora.layers[name], scale) for index, lora, scale in used if name in lora.layers]
            biases = [(index, lora.biases[name], scale) for index, lora, scale in used if name in lora.biases]
            handle = transformer.get_submodule(name).register_forward_hook(_AddUpdates(updates, biases, applied))
            stack.callback(handle.remove)
        yield applied
