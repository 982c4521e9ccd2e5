"""The trainable LoRA: layers that wrap the transformer's, what they compute, and how they are read out again.

peft's layers hold the same weights and compute the same numbers (tests/model/test_blocks.py). These cast their weights
rather than their input, keep less for the backward pass, and come without peft's quantizers and other methods.

Legend: R rank, D_in and D_out the widths of a linear layer.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.lora.formats import LoraFile, LowRank
from lora_utils.model import blocks
from lora_utils.placeholder.tokens import Placeholders

log = logging.getLogger(__name__)


class LoraLinear(nn.Module):
    """A linear layer with a trainable update of rank R beside it: base_layer(x) + up @ down @ x, both fp32.

    The strength alpha / R is 1.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, generator: torch.Generator):
        """Start as no change: down as torch starts a linear layer (peft's default too), from `generator`, up zero."""
        super().__init__()
        self.base_layer = base_layer  # whatever its weights are stored as
        device, bound = base_layer.weight.device, math.sqrt(1 / base_layer.in_features)  # kaiming_uniform, a = sqrt(5)
        down = (torch.rand(rank, base_layer.in_features, generator=generator) * 2 - 1).mul(bound)
        self.down = nn.Parameter(down.to(device))  # [R, D_in]
        self.up = nn.Parameter(torch.zeros(base_layer.out_features, rank, device=device))  # [D_out, R]
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on x [..., D_in] -> [..., D_out]. The small weights are cast to x's dtype, never x."""
        if not self.enabled:
            return self.base_layer(x)
        return self.add_update(x, F.linear(x, self.down.to(x.dtype)))

    def add_update(self, x: Tensor, low: Tensor) -> Tensor:
        """Return base_layer(x) [..., D_out] + low [..., R] @ up^T, in one pass over the output."""
        output = self.base_layer(x)
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self.up.to(output.dtype).T).view_as(output)


def target_names(transformer: QwenImageTransformer2DModel, targets: str) -> list[str]:
    """Return the dotted names of the linear layers that a choice of `lora_targets` adapts."""
    count, layers = len(transformer.transformer_blocks), constants.LORA_TARGETS[targets]
    return [f"transformer_blocks.{block}.{layer}" for block in range(count) for layer in layers]


def attach_trainable_lora(
    transformer: QwenImageTransformer2DModel, targets: str, rank: int, generator: torch.Generator
) -> list[nn.Parameter]:
    """Wrap the target layers with fp32 LoRA weights, alpha = rank, that start as no change. -> what to train."""
    parameters = []
    for name, layer in _layers_in_order(transformer, target_names(transformer, targets)):
        wrapped = LoraLinear(layer, rank, generator)
        transformer.set_submodule(name, wrapped)
        parameters += [wrapped.down, wrapped.up]
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


def _trainable_layers(transformer: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLinear)}


def _project_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Compute several layers on one x [..., D_in], with a single down-projection if all of them are wrapped."""
    wrapped = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if len(wrapped) < len(layers):
        return blocks.project_each(layers, x)
    downs: list[Tensor] = [layer.down for layer in wrapped]
    lows = F.linear(x, torch.cat(downs).to(x.dtype)).split([len(down) for down in downs], dim=-1)
    return [layer.add_update(x, low) for layer, low in zip(wrapped, lows, strict=True)]


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
        given = layers[name].with_alpha_of_rank()
        if given.down.shape != layer.down.shape or given.up.shape != layer.up.shape:
            raise UserError(f"layer {name!r} of init_weights is of another shape than the model's; it is another's.")
        with torch.no_grad():
            layer.down.copy_(given.down)
            layer.up.copy_(given.up)


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
            layer.enabled = False
        for forward in forwards:
            forward.project, forward.compute, forward.checkpointed = blocks.project_each, blocks.compute_block, False
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        for forward, fields in zip(forwards, before, strict=True):
            forward.project, forward.compute, forward.checkpointed = fields


def trained_lora(transformer: QwenImageTransformer2DModel) -> dict[str, LowRank]:
    """Return the weights of the trainable LoRA by module name, on the CPU."""
    found = {}
    for name, layer in _trainable_layers(transformer).items():
        down, up = (weight.detach().cpu().clone() for weight in (layer.down, layer.up))
        found[name] = LowRank(down, up, alpha=float(len(down)))
    return found


# --- finished LoRAs -------------------------------------------------------------------------------------------------


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first of these names as a text."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"
