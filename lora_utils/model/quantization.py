"""Quantised bases: the transformer's large matrices stored in 8 or 4 bits, multiplied in the compute dtype.

This module owns which layers are stored so, through diffusers' own configs and quantizers, and what such a layer
computes. It doesn't know of LoRAs. Activations are never quantised: only the weights' rounding is lost.
"""

import re
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from diffusers import BitsAndBytesConfig, QwenImageTransformer2DModel, TorchAoConfig
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

# Bytes per weight. A byte, with a fp32 scale per row of Qwen-Image's 3072; nf4: half a byte, a byte of scale per 64
# weights, and a fp32 scale of those scales per 256 of them (double quantisation, Dettmers et al. 2023, QLoRA).
WEIGHT_BYTES = {"fp8": 1.0 + 4 / 3072, "int8": 1.0 + 4 / 3072, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}

# In each block attention and the MLPs, but not the image MLP's second layer. That, the modulations and all that stands
# outside of the blocks stay in the compute dtype, as fp8 versions of Qwen-Image keep them.
_QUANTIZED = re.compile(r"transformer_blocks\.\d+\.(attn\..*|img_mlp\.net\.0\.proj|txt_mlp\..*)")


def is_quantized(layer: str) -> bool:
    """Return whether a linear layer, by its dotted name in the transformer, is one that every scheme quantises."""
    return _QUANTIZED.fullmatch(layer) is not None


def _config(scheme: str, dtype: torch.dtype, kept: list[str]) -> TorchAoConfig | BitsAndBytesConfig:
    if scheme == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    rounding = {"fp8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[scheme]
    return TorchAoConfig(rounding(set_inductor_config=False), modules_to_not_convert=kept)


class Quantizer:
    """It stores the weights of an empty transformer one by one, as they come from the disk."""

    def __init__(self, transformer: QwenImageTransformer2DModel, scheme: str, device: torch.device, dtype: torch.dtype):
        linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        kept = [name for name in linears if not is_quantized(name)]
        config = _config(scheme, dtype, kept)
        self.quantizer = cast(Any, DiffusersAutoQuantizer.from_config(config, pre_quantized=False))
        self.quantizer.preprocess_model(transformer, device_map=None, keep_in_fp32_modules=[])
        self.transformer, self.device = transformer, device
        for name in linears:
            if is_quantized(name):
                layer = transformer.get_submodule(name)
                cast(Any, layer).forward = partial(_forward, layer)

    def store(self, name: str, tensor: Tensor) -> bool:
        """Quantise a weight and put it in its place; False, and nothing done, if it is one that stays as it is."""
        if not self.quantizer.check_if_quantized_param(self.transformer, tensor, name, {}):
            return False
        self.quantizer.create_quantized_param(self.transformer, tensor, name, self.device, {}, [])
        return True


def dense(weight: Tensor) -> Tensor:
    """Return a stored weight [D_out, D_in] as the compute dtype's numbers."""
    if state := getattr(weight, "quant_state", None):
        return dequantize_4bit(weight.data, state)
    return cast(Any, weight).dequantize()


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
