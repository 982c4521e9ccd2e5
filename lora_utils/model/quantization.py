"""Quantised bases: the transformer's large matrices stored in 8 or 4 bits, multiplied in the compute dtype.

This module owns which layers are stored so, by torchao's or bitsandbytes' rounding, and what such a layer computes. It
doesn't know of LoRAs. Activations are never quantised: only the weights' rounding is lost.

Both libraries are heavy to import, so a run with an exact base never does.
"""

import re
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

# Bytes per weight. A byte, with a fp32 scale per row of Qwen-Image's 3072; nf4: half a byte, a byte of scale per 64
# weights, and a fp32 scale of those scales per 256 of them (double quantisation, Dettmers et al. 2023, QLoRA).
WEIGHT_BYTES = {"fp8": 1.0 + 4 / 3072, "int8": 1.0 + 4 / 3072, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}

# In each block attention and the MLPs, but not the image MLP's second layer. That, the modulations and all that stands
# outside of the blocks stay in the compute dtype, as fp8 versions of Qwen-Image keep them.
_QUANTIZED = re.compile(r"transformer_blocks\.\d+\.(attn\..*|img_mlp\.net\.0\.proj|txt_mlp\..*)")


def is_quantized(layer: str) -> bool:
    """Return whether a linear layer, by its dotted name in the transformer, is one that every scheme quantises."""
    return _QUANTIZED.fullmatch(layer) is not None


class Quantizer:
    """It stores the weights of an empty transformer one by one, as they come from the disk."""

    def __init__(self, transformer: QwenImageTransformer2DModel, scheme: str):
        linears = {name: each for name, each in transformer.named_modules() if isinstance(each, nn.Linear)}
        self.layers = {name: layer for name, layer in linears.items() if is_quantized(name)}
        self.scheme = scheme
        for layer in self.layers.values():
            cast(Any, layer).forward = partial(_forward, layer)

    def store(self, name: str, tensor: Tensor) -> bool:
        """Quantise a weight and put it in its place; False, and nothing done, if it is one that stays as it is."""
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in self.layers:
            return False
        layer = self.layers[owner]
        layer.weight = nn.Parameter(tensor, requires_grad=False)
        _quantize(layer, self.scheme)
        return True


def _quantize(layer: nn.Linear, scheme: str) -> None:
    """Put a quantised weight in a layer's place of the exact one, on the same device."""
    if scheme == "nf4":
        from bitsandbytes.nn import Params4bit  # noqa: PLC0415

        exact, nf4 = layer.weight.data, {"quant_type": "nf4", "compress_statistics": True}
        layer.weight = cast(Any, Params4bit)(exact, requires_grad=False, **nf4).to(exact.device)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # noqa: PLC0415

        rounding = {"fp8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[scheme]
        quantize_(layer, rounding(set_inductor_config=False))


def dense(weight: Tensor) -> Tensor:
    """Return a stored weight [D_out, D_in] as the compute dtype's numbers; a sharded one from all processes."""
    if gather := getattr(weight, "full_tensor", None):
        return gather()
    if state := getattr(weight, "quant_state", None):
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415

        return dequantize_4bit(weight.data, state)
    return weight if is_exact(weight) else cast(Any, weight).dequantize()


def is_exact(weight: Tensor) -> bool:
    """Return whether a weight is stored as plain numbers of the compute dtype."""
    return type(weight) in (Tensor, nn.Parameter)


class _FrozenLinear(torch.autograd.Function):
    """A layer by a stored weight, x [..., D_in] -> [..., D_out], which the backward pass makes dense a second time.

    Left to autograd, torchao's layers keep the dense matrix from the forward to the backward: all that was saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dense(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ dense(ctx.weight), None, None


def _forward(layer: Any, x: Tensor) -> Tensor:
    return cast(Tensor, _FrozenLinear.apply(x, layer.weight, layer.bias))
