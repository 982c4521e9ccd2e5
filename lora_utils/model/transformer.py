"""The frozen transformer: built empty, filled weight by weight as it is to be stored, and one velocity from it.

Legend: B batch, N image tokens, C packed channels (64), S timesteps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from lora_utils.errors import UserError
from lora_utils.model import blocks, flops, flow, fsdp, modulation
from lora_utils.model.device import Placement, free_bytes, freeze_on_device, release_memory, to_device
from lora_utils.model.latents import ControlLatents, Size
from lora_utils.model.loading import check_complete, empty_weights, fill_parameters, stream_tensors
from lora_utils.model.quantization import Quantizer
from lora_utils.model.ram import trim_allocator
from lora_utils.model.text_encoder import TextEmbeddings

_OTHER_MODELS_OPTIONS = ("use_additional_t_cond", "use_layer3d_rope")  # Qwen-Image-Layered's

# A source of weights. It renames each one by a function, and doesn't read those whose new name is None.
WeightStream = Callable[[Callable[[str], str | None]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a frozen transformer's weights are held. None of it but the quantisation changes what it computes."""

    quantization: str = "none"  # or a scheme of `quantization.WEIGHT_BYTES`
    timesteps: Tensor | None = None  # [S], the only ones it will be shown: a table may replace the modulations
    shards: int = 1  # processes, of which this is one, that the blocks are sharded over


def load_transformer(folder: Path, placement: Placement, storage: Storage | None = None) -> QwenImageTransformer2DModel:
    """Load the transformer of a model folder. Raises UserError for a layered model, or missing weights."""
    source = folder / "transformer"
    config = cast(dict[str, Any], QwenImageTransformer2DModel.load_config(source))
    if other := [name for name in _OTHER_MODELS_OPTIONS if config.get(name)]:
        raise UserError(
            f"{folder} isn't a Qwen-Image that this package knows: its transformer has {other[0]}, as layered models "
            "do. Set BASE_MODEL to Qwen/Qwen-Image, Qwen/Qwen-Image-2512, Qwen/Qwen-Image-Edit, -2509 or -2511."
        )
    stream = partial(stream_tensors, source, placement.device, placement.dtype)
    return build_transformer(config, stream, source, placement, storage or Storage())


def build_transformer(
    config: dict[str, Any], stream: WeightStream, source: Path, placement: Placement, storage: Storage
) -> QwenImageTransformer2DModel:
    """Build a transformer from its config and weights that are read one by one; `source` is what errors speak of."""
    # Build it empty, and decide where a weight goes.
    with empty_weights():
        transformer = QwenImageTransformer2DModel.from_config(config)
    assert isinstance(transformer, QwenImageTransformer2DModel)
    fill = partial(fill_parameters, transformer, source=source)
    if storage.quantization != "none":
        quantizer = Quantizer(transformer, storage.quantization)
        fill = partial(fill, store=quantizer.store)
    if storage.timesteps is not None and not modulation.pays(len(storage.timesteps), transformer.inner_dim):
        storage = replace(storage, timesteps=None)

    # What stands outside of the blocks comes first: the table is computed with it.
    fill(stream(lambda name: None if fsdp.in_a_block(name) else name))
    builder = modulation.install_table(transformer, storage.timesteps) if storage.timesteps is not None else None

    # Then the blocks in one pass over the files, each process's part of them if they are sharded.
    if storage.shards > 1:
        fsdp.shard(transformer, placement.device, storage.shards)
        fill = partial(fill, store=partial(fsdp.store, transformer))
    weights = stream(lambda name: name if fsdp.in_a_block(name) else None)
    fill(weights if builder is None else builder.take(weights))
    check_complete(transformer, source)
    blocks.install_forwards(transformer)
    freeze_on_device(transformer, placement)
    trim_allocator()  # of what quantising has left: on a CPU a sixth of the weights
    return transformer


def load_modulations(transformer: QwenImageTransformer2DModel, folder: Path, placement: Placement) -> None:
    """Load the layers that the table stands for, because a LoRA adapts them. They stay beside it.

    Nothing is changed where that fails. Raises UserError where they don't fit into memory.
    """
    table, source = modulation.table_of(transformer), folder / "transformer"
    if table is None or table.layers is not None:
        return
    rename = lambda name: name if modulation.is_modulation(name) else None  # noqa: E731 (one line of a stream)
    stream = stream_tensors(source, placement.device, placement.dtype, rename)
    with suppress(torch.OutOfMemoryError):  # its traceback holds what was loaded, so the error is made outside
        table.layers = modulation.build_layers(transformer, stream, source)
    if table.layers is None:
        release_memory()
        weights = modulation.weight_count(transformer) * placement.dtype.itemsize
        raise UserError(
            f"the LoRA adapts the layers of the timestep, whose {weights / 1e9:.3g} GB of weights don't fit into the "
            f"{free_bytes(placement.device) / 1e9:.3g} GB of memory that are free; use a LoRA without img_mod, txt_mod "
            "and time_text_embed, or a smaller QUANTIZATION."
        )


def transformer_shape(transformer: QwenImageTransformer2DModel) -> flops.Shape:
    """Return the sizes that a transformer's operations follow from."""
    return flops.Shape(
        len(transformer.transformer_blocks),
        transformer.inner_dim,
        transformer.img_in.in_features,
        transformer.txt_in.in_features,
    )


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    latents: Tensor,
    sigma: Tensor,
    text: TextEmbeddings,
    size: Size,
    controls: Sequence[ControlLatents] = (),
) -> Tensor:
    """Predict the velocity [B, N, C] of noisy latents [B, N, C] at sigma [B], which is on the CPU, under the text.

    An editing model is given each example's images to edit, [M, C]. Examples whose images differ in size or number are
    computed one group after the other, for the model knows one layout at a time; the result is that of each alone.
    """
    if not controls:
        return _velocity(transformer, latents, sigma, text, (size,))
    groups: dict[tuple[Size, ...], list[int]] = {}
    for index, own in enumerate(controls):
        groups.setdefault(own.sizes, []).append(index)
    parts = dict[int, Tensor]()
    for sizes, members in groups.items():
        given = torch.stack([controls[index].tokens for index in members]).to(latents)  # [b, M, C]
        everyone = len(members) == len(latents)
        noisy = latents if everyone else latents[members]
        own_text, level = (text, sigma) if everyone else (text.rows(members), sigma[members])
        joined = torch.cat([noisy, given], dim=1)  # [b, N + M, C]
        velocity = _velocity(transformer, joined, level, own_text, (size, *sizes))[:, : size.tokens]
        if everyone:
            return velocity
        parts |= dict(zip(members, velocity, strict=True))
    return torch.stack([parts[index] for index in range(len(latents))])


def _velocity(
    transformer: QwenImageTransformer2DModel,
    tokens: Tensor,
    sigma: Tensor,
    text: TextEmbeddings,
    sizes: tuple[Size, ...],
) -> Tensor:
    """Return the transformer's output [B, N + M, C] for images of these sizes, the first of which is noisy."""
    time = flow.model_time(sigma, tokens.dtype)
    return transformer(
        hidden_states=tokens,
        timestep=time if modulation.has_table(transformer) else to_device(time, tokens.device),
        encoder_hidden_states=text.states,
        encoder_hidden_states_mask=text.mask,
        img_shapes=[[(1, *size.grid) for size in sizes]] * len(tokens),
        return_dict=False,
    )[0]
