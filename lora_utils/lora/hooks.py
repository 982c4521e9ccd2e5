"""Finished LoRAs, applied through forward hooks.

This module owns the proof that every layer of a file was applied. A finished LoRA changes no module and no weight:
taking the hooks away leaves the base bit for bit as it was, where fusing and unfusing in bf16 would not.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.lora.adapter import listed
from lora_utils.lora.formats import LoraFile
from lora_utils.model import modulation
from lora_utils.model.device import Placement


def move_lora(lora: LoraFile, transformer: QwenImageTransformer2DModel, placement: Placement) -> LoraFile:
    """Check that every layer of the file is one of the transformer's, and move it there in the compute dtype.

    Raises UserError that says what matched and what didn't: a LoRA that applies in part isn't the one that was trained.
    """
    # Every layer has its counterpart.
    shapes = layer_shapes(transformer)
    unknown = [name for name in lora.layers if name not in shapes]
    if unknown:
        matched = [name for name in lora.layers if name in shapes]
        raise UserError(
            f"this LoRA doesn't fit the model: {len(matched)} of its {len(lora.layers)} layers match "
            f"({listed(matched)}), {len(unknown)} don't exist here ({listed(unknown)}). Is it another model's?"
        )

    # Each fits it, and is moved.
    layers = {}
    for name, layer in lora.layers.items():
        wanted, got = shapes[name], (layer.down.shape[1], layer.up.shape[0])
        if wanted != got:
            raise UserError(
                f"this LoRA doesn't fit the model: {name!r} takes and gives {wanted} values, the LoRA's {got}."
            )
        layers[name] = replace(
            layer,
            down=layer.down.to(placement.device, placement.dtype),
            up=layer.up.to(placement.device, placement.dtype),
        )
    return replace(lora, layers=layers)


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
    return any(map(modulation.table_depends_on, lora.layers))


@dataclass(frozen=True, slots=True)
class _AddUpdate:
    """A forward hook: strength * up @ down @ input is added to the layer's output in place, in no pass of its own."""

    down: Tensor  # [R, D_in]
    up: Tensor  # [D_out, R]
    strength: float  # scale * alpha / R

    def __call__(self, _layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = F.linear(arguments[0], self.down).flatten(0, -2)  # [..., R]
        output.view(-1, output.shape[-1]).addmm_(low, self.up.T, alpha=self.strength)
        return output


@contextmanager
def applied_loras(transformer: QwenImageTransformer2DModel, loras: Sequence[tuple[LoraFile, float]]) -> Iterator[None]:
    """Let the transformer compute with these LoRAs, moved by `move_lora`, within it, each at its scale; 0 is none.

    One that adapts what the modulation table follows from switches the table off; its layers must have been loaded.
    """
    with ExitStack() as stack:
        if any(scale != 0 and adapts_the_table(lora) for lora, scale in loras):
            stack.enter_context(modulation.without_table(transformer))
        for lora, scale in loras:
            if scale == 0:
                continue
            for name, layer in lora.layers.items():
                update = _AddUpdate(layer.down, layer.up, scale * layer.alpha / layer.rank)
                handle = transformer.get_submodule(name).register_forward_hook(update)
                stack.callback(handle.remove)
        yield
