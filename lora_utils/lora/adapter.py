"""The trainable LoRA: attached to the transformer through peft, computed by our own arithmetic, and read out again.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.lora.formats import LoraFile, LowRank
from lora_utils.model import blocks
from lora_utils.placeholder.tokens import Placeholders

log = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name of the one adapter


def target_names(transformer: QwenImageTransformer2DModel, targets: str) -> list[str]:
    """Return the dotted names of the linear layers that a choice of `lora_targets` adapts."""
    count, layers = len(transformer.transformer_blocks), constants.LORA_TARGETS[targets]
    return [f"transformer_blocks.{block}.{layer}" for block in range(count) for layer in layers]


def attach_trainable_lora(
    transformer: QwenImageTransformer2DModel, targets: str, rank: int, generator: torch.Generator
) -> list[nn.Parameter]:
    """Wrap the target layers with fp32 LoRA weights, alpha = rank, that start as no change. -> what is to be trained.

    A starts as torch starts a linear layer (peft's default too), but from `generator`; B is zero. peft wraps the
    layers, whatever their weights are stored as; the arithmetic is ours.
    """
    names = target_names(transformer, targets)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, bias="none")
    inject_adapter_in_model(config, transformer, ADAPTER)
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
    blocks.install_forwards(transformer)
    for block_forward in blocks.forwards_of(transformer):
        block_forward.project = _project_together
    return parameters


def _weights(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [R, D_in] and B [D_out, R], fp32."""
    down, up = (cast(nn.Linear, cast(nn.ModuleDict, part)[ADAPTER]) for part in (layer.lora_A, layer.lora_B))
    return cast(nn.Parameter, down.weight), cast(nn.Parameter, up.weight)


def _trainable_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def _add_update(output: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """Return output [..., D_out] + low [..., R] @ up^T, in one pass over the output."""
    return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.to(output.dtype).T).view_as(output)


def _forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """Compute a wrapped layer on x [..., D_in]. The small fp32 weights are cast to x's dtype, never x to theirs.

    peft itself casts x, and scales by alpha / R in a pass of its own; here that is 1.
    """
    down, up = _weights(layer)
    return _add_update(layer.base_layer(x), F.linear(x, down.to(x.dtype)), up)


def _project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Compute several layers on one x [..., D_in], with a single down-projection if all of them are wrapped."""
    wrapped = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if len(wrapped) < len(layers):
        return blocks.project_each(layers, x)
    downs, ups = zip(*map(_weights, wrapped), strict=True)
    lows = F.linear(x, torch.cat(downs).to(x.dtype)).split([len(down) for down in downs], dim=-1)
    return [_add_update(layer.base_layer(x), low, up) for layer, low, up in zip(wrapped, lows, ups, strict=True)]


def load_trainable_lora(transformer: QwenImageTransformer2DModel, layers: dict[str, LowRank]) -> None:
    """Copy a LoRA of the same rank into the trainable one. Raises UserError where their layers differ."""
    own = _trainable_layers(transformer)
    missing, unknown = sorted(set(own) - set(layers)), sorted(set(layers) - set(own))
    if missing or unknown:
        raise UserError(
            f"init_weights has {len(layers)} layers and lora_targets adapts {len(own)}; without a place here: "
            f"{listed(unknown)}; not in the file: {listed(missing)}. Choose the lora_targets it was trained with."
        )
    for name, layer in own.items():
        down, up = _weights(layer)
        given = layers[name].with_alpha_of_rank()
        if given.down.shape != down.shape or given.up.shape != up.shape:
            raise UserError(f"layer {name!r} of init_weights is of another shape than the model's; it is another's.")
        with torch.no_grad():
            down.copy_(given.down)
            up.copy_(given.up)


def start_from_weights(transformer: QwenImageTransformer2DModel, placeholders: Placeholders, lora: LoraFile) -> None:
    """Copy a LoRA and the embeddings of its tokens into what is trained. Raises UserError for another model's."""
    load_trainable_lora(transformer, lora.layers)
    for token, embedding in zip(placeholders.tokens, placeholders.embeddings, strict=True):
        if token in lora.embeddings:
            if lora.embeddings[token].numel() != embedding.numel():
                raise UserError(f"the embedding of {token} in init_weights is of another width than the model's.")
            with torch.no_grad():
                embedding.copy_(lora.embeddings[token].view(-1))
    log.info("continuing from init_weights: %d layers, %d embeddings", len(lora.layers), len(lora.embeddings))


@contextmanager
def without_lora(transformer: QwenImageTransformer2DModel) -> Iterator[None]:
    """Let a transformer with a trainable LoRA be the base model within it. It is for forwards without a backward."""
    layers, forwards = _trainable_layers(transformer).values(), blocks.forwards_of(transformer)
    before = [(forward.project, forward.compute, forward.checkpointed) for forward in forwards]
    try:
        for layer in layers:
            cast(nn.Module, layer).forward = layer.base_layer.forward
        for forward in forwards:
            forward.project, forward.compute, forward.checkpointed = blocks.project_each, blocks.compute_block, False
        yield
    finally:
        for layer in layers:
            cast(nn.Module, layer).forward = MethodType(_forward, layer)
        for forward, fields in zip(forwards, before, strict=True):
            forward.project, forward.compute, forward.checkpointed = fields


def trained_lora(transformer: QwenImageTransformer2DModel) -> dict[str, LowRank]:
    """Return the weights of the trainable LoRA by module name, on the CPU."""
    found = {}
    for name, layer in _trainable_layers(transformer).items():
        down, up = (weight.detach().cpu().clone() for weight in _weights(layer))
        found[name] = LowRank(down, up, alpha=float(layer.lora_alpha[ADAPTER]))
    return found


# --- finished LoRAs -------------------------------------------------------------------------------------------------


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first of these names as a text."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"
