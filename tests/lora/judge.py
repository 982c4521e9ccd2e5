"""The judge of an applied LoRA: a stock diffusers transformer with W + delta merged by hand in fp32."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from lora_utils.lora.formats import LoraFile
from lora_utils.lora.hooks import applied_loras
from lora_utils.model.components import Components
from lora_utils.model.latents import Size
from lora_utils.model.quantization import dense, is_quantized
from lora_utils.model.text_encoder import TextEmbeddings
from lora_utils.model.transformer import predict_velocity

SIGMA, SIZE = 0.5, Size(64, 64)
LoraPairs = dict[str, tuple[Tensor, Tensor]]  # by layer: A [R, D_in] and B [D_out, R]


def given() -> tuple[Tensor, Tensor]:
    """Text states [1, T, D] and noisy latents [1, N, C]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, 9, 128, generator=generator), torch.randn(1, 16, 64, generator=generator)


def stock(folder: Path) -> QwenImageTransformer2DModel:
    loaded = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    return loaded.eval().requires_grad_(False)


@torch.inference_mode()
def truth(transformer: QwenImageTransformer2DModel) -> Tensor:
    states, latents = (each.to(transformer.dtype) for each in given())
    return transformer(
        hidden_states=latents,
        timestep=torch.tensor([SIGMA]),
        encoder_hidden_states=states,
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0].float()


def merged(
    folder: Path,
    deltas: Mapping[str, Tensor],
    base: Components | None = None,
    biases: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The stock transformer's velocity with these deltas merged in fp32 and rounded to `dtype`.

    The weights are those that a quantised `base` stores, or else the folder's.
    """
    transformer = stock(folder)
    for name, module in transformer.named_modules():
        if base is not None and isinstance(module, torch.nn.Linear) and is_quantized(name):
            module.weight.copy_(stored_weight(base, folder, name))
    for name, delta in deltas.items():
        transformer.get_submodule(name).weight.add_(delta)
    for name, delta in (biases or {}).items():
        transformer.get_submodule(name).bias.add_(delta)
    return truth(torch.nn.Module.to(transformer, dtype))  # diffusers' own `to` warns, whatever the dtype


def stored_weight(base: Components, folder: Path, name: str) -> Tensor:
    """The weight of a layer as a base stores it, in fp32; of one that a table replaces, the file's."""
    if is_quantized(name):
        return dense(base.transformer.get_submodule(name).weight).float()
    return stock(folder).get_submodule(name).weight


@torch.inference_mode()
def ours(components: Components, *loras: LoraFile | tuple[LoraFile, float], scale: float = 1.0) -> Tensor:
    """Our velocity with these LoRAs, at `scale` or each at its own."""
    states, latents = given()
    dtype = components.placement.dtype
    scaled = [each if isinstance(each, tuple) else (each, scale) for each in loras]
    with applied_loras(components.transformer, scaled):
        text = TextEmbeddings(states.to(dtype), None)
        level = torch.full((1,), SIGMA)
        return predict_velocity(components.transformer, latents.to(dtype), level, text, SIZE).float()


def linear_layers(folder: Path) -> list[str]:
    return [name for name, module in stock(folder).named_modules() if isinstance(module, torch.nn.Linear)]


def pairs(folder: Path, names: list[str], rank: int = 4) -> LoraPairs:
    transformer, generator = stock(folder), torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(rank, transformer.get_submodule(name).in_features, generator=generator) * 0.15,
            torch.randn(transformer.get_submodule(name).out_features, rank, generator=generator) * 0.15,
        )
        for name in names
    }


def tensors(
    lora: LoraPairs, key: str = "transformer.{}", down: str = ".lora_A.weight", up: str = ".lora_B.weight"
) -> dict[str, Tensor]:
    return {
        name: part.clone()
        for layer, (a, b) in lora.items()
        for name, part in ((key.format(layer) + down, a), (key.format(layer) + up, b))
    }


def error(got: Tensor, want: Tensor, base: Tensor) -> float:
    """How far a result is off, as a share of the LoRA's effect."""
    return float((got - want).norm() / (want - base).norm())
