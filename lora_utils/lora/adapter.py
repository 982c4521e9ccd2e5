"""LoRA on the transformer: a trainable one through peft, finished ones through forward hooks.

Owns the proof that every module was covered. A finished LoRA changes no module and no weight: taking the hooks away
leaves the base bit for bit as it was, where fusing and unfusing in bf16 would not.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_utils import blocks, qwen
from lora_utils.errors import UserError
from lora_utils.lora_file import LoraFile, LowRank
from lora_utils.models import Place

_ADAPTER = "default"


def target_names(transformer: QwenImageTransformer2DModel, targets: str) -> list[str]:
    """The dotted names of the linear layers that a choice of `lora_targets` adapts."""
    blocks = range(len(transformer.transformer_blocks))
    return [f"transformer_blocks.{block}.{layer}" for block in blocks for layer in qwen.LORA_TARGETS[targets]]


def attach_trainable_lora(
    transformer: QwenImageTransformer2DModel, targets: str, rank: int, generator: torch.Generator
) -> list[nn.Parameter]:
    """Wrap the target layers with fp32 LoRA weights, alpha = rank, that start as no change. -> what is to be trained.

    A is drawn as torch draws a linear layer (peft's default too), but from `generator`; B is zero. peft wraps the
    layers, whatever their weights are stored as; the arithmetic is ours.
    """
    names = target_names(transformer, targets)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, bias="none")
    inject_adapter_in_model(config, transformer, _ADAPTER)
    layers = _trainable_layers(transformer)
    if set(layers) != set(names):
        raise RuntimeError(f"peft adapted {len(layers)} layers of the {len(names)} asked for")
    parameters = []
    for layer in layers.values():
        down, up = _weights(layer)
        bound = math.sqrt(1 / down.shape[1])  # kaiming_uniform with a = sqrt(5)
        down.data = (torch.rand(down.shape, generator=generator) * 2 - 1).mul(bound).to(down.device)
        up.data = torch.zeros(up.shape, device=up.device)
        # A method, not a partial: the compiler takes one layer's for another's, and compiles one block for all.
        cast(nn.Module, layer).forward = MethodType(_forward, layer)
        parameters += [down, up]
    use_blocks(transformer, compiled=False)
    return parameters


def use_blocks(transformer: QwenImageTransformer2DModel, compiled: bool) -> None:
    """Let the blocks of a transformer with a trainable LoRA compute plainly, or compiled."""
    compute = blocks.compiled_block() if compiled else blocks.compute_block
    blocks.install_forward(transformer, _project_together, compute)


def _weights(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, D_in] and B [D_out, R], fp32."""
    down, up = (cast(nn.Linear, cast(nn.ModuleDict, part)[_ADAPTER]) for part in (layer.lora_A, layer.lora_B))
    return cast(nn.Parameter, down.weight), cast(nn.Parameter, up.weight)


def _trainable_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def _add_update(output: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """output [..., D_out] + low [..., R] @ up^T, in one pass over the output."""
    return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.to(output.dtype).T).view_as(output)


def _forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """A wrapped layer on x [..., D_in]. The small fp32 weights are cast to x's dtype, never x to theirs.

    peft itself casts x, and scales by alpha / R in a pass of its own; here that is 1.
    """
    down, up = _weights(layer)
    return _add_update(layer.base_layer(x), F.linear(x, down.to(x.dtype)), up)


def _project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Several layers on one x, with a single down-projection if all of them are wrapped."""
    wrapped = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if len(wrapped) < len(layers):
        return blocks.project_each(layers, x)
    downs, ups = zip(*map(_weights, wrapped), strict=True)
    lows = F.linear(x, torch.cat(downs).to(x.dtype)).split([len(down) for down in downs], dim=-1)
    return [_add_update(layer.base_layer(x), low, up) for layer, low, up in zip(wrapped, lows, ups, strict=True)]


def set_trainable_lora(transformer: QwenImageTransformer2DModel, layers: dict[str, LowRank]) -> None:
    """Let the trainable LoRA be this one, of its rank. Raises UserError where its layers are others."""
    own = _trainable_layers(transformer)
    missing, unknown = sorted(set(own) - set(layers)), sorted(set(layers) - set(own))
    if missing or unknown:
        raise UserError(
            f"init_weights has {len(layers)} layers and lora_targets adapts {len(own)}; without a place here: "
            f"{_listed(unknown)}; not in the file: {_listed(missing)}. Choose the lora_targets it was trained with."
        )
    for name, layer in own.items():
        down, up = _weights(layer)
        given = layers[name].with_alpha_of_rank()
        if given.down.shape != down.shape or given.up.shape != up.shape:
            raise UserError(f"layer {name!r} of init_weights is of another shape than the model's; it is another's.")
        with torch.no_grad():
            down.copy_(given.down)
            up.copy_(given.up)


@contextmanager
def without_lora(transformer: QwenImageTransformer2DModel) -> Iterator[None]:
    """Within it, a transformer with a trainable LoRA is the base model. Not for a forward with a backward pass."""
    layers = _trainable_layers(transformer).values()
    computed = [block.forward for block in transformer.transformer_blocks]
    try:
        for layer in layers:
            cast(nn.Module, layer).forward = layer.base_layer.forward
        blocks.install_forward(transformer)
        yield
    finally:
        for layer in layers:
            cast(nn.Module, layer).forward = MethodType(_forward, layer)
        for block, forward in zip(transformer.transformer_blocks, computed, strict=True):
            block.forward = forward


def trained_lora(transformer: QwenImageTransformer2DModel) -> dict[str, LowRank]:
    """The weights of the trainable LoRA by module name, on the CPU."""
    found = {}
    for name, layer in _trainable_layers(transformer).items():
        down, up = (weight.detach().cpu().clone() for weight in _weights(layer))
        found[name] = LowRank(down, up, alpha=float(layer.lora_alpha[_ADAPTER]))
    return found


# --- finished LoRAs -------------------------------------------------------------------------------------------------


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"


def place_lora(lora: LoraFile, transformer: QwenImageTransformer2DModel, place: Place) -> LoraFile:
    """Check that every layer of the file is one of the transformer's, and move it there in the compute dtype.

    Raises UserError that says what matched and what didn't: a LoRA that applies in part isn't the one that was trained.
    """
    linears = {  # those under a trainable LoRA too, by the names that they have without it
        name.removesuffix(".base_layer"): module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and f".{_ADAPTER}" not in name
    }
    unknown = [name for name in lora.layers if name not in linears]
    if unknown:
        matched = [name for name in lora.layers if name in linears]
        raise UserError(
            f"this LoRA doesn't fit the model: {len(matched)} of its {len(lora.layers)} layers match "
            f"({_listed(matched)}), {len(unknown)} don't exist here ({_listed(unknown)}). Is it another model's?"
        )
    layers = {}
    for name, layer in lora.layers.items():
        linear = linears[name]
        wanted, got = (linear.in_features, linear.out_features), (layer.down.shape[1], layer.up.shape[0])
        if wanted != got:
            raise UserError(
                f"this LoRA doesn't fit the model: {name!r} takes and gives {wanted} values, the LoRA's {got}."
            )
        if not (torch.isfinite(layer.down).all() and torch.isfinite(layer.up).all()):
            raise UserError(f"this LoRA holds NaN or infinity in {name!r}; its training has failed.")
        layers[name] = replace(
            layer, down=layer.down.to(place.device, place.dtype), up=layer.up.to(place.device, place.dtype)
        )
    return replace(lora, layers=layers)


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
def applied(transformer: QwenImageTransformer2DModel, loras: Sequence[tuple[LoraFile, float]]) -> Iterator[None]:
    """Within it, the transformer computes with these LoRAs, placed by `place_lora`, each at its scale; 0 is none."""
    with ExitStack() as stack:
        for lora, scale in loras:
            if scale == 0:
                continue
            for name, layer in lora.layers.items():
                update = _AddUpdate(layer.down, layer.up, scale * layer.alpha / layer.rank)
                handle = transformer.get_submodule(name).register_forward_hook(update)
                stack.callback(handle.remove)
        yield
