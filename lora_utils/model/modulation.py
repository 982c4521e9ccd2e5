"""The modulation table: what `img_mod` and `txt_mod` would give, for the timesteps that a run will use.

These layers are a third of Qwen-Image's parameters (6.8 of 20.4 billion) and see nothing but the timestep. Frozen,
they are a table: 4.4 MB per timestep in bf16 in place of 13.6 GB of weights.

Legend: S timesteps, L blocks, D the transformer's width, B batch.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.model.device import to_device
from lora_utils.model.loading import check_complete, empty_weights, fill_parameters

STREAMS = ("img_mod", "txt_mod")
_AT_ONCE = 64  # timesteps: always so many, for a product of another shape may round a row another way
_NAME = re.compile(r"transformer_blocks\.(\d+)\.(img_mod|txt_mod)\.1\.(weight|bias)")


def is_modulation(name: str) -> bool:
    """Return whether a weight, by its dotted name in the transformer, is one that a table replaces."""
    return _NAME.fullmatch(name) is not None


def is_modulation_layer(name: str) -> bool:
    """Return whether a layer, by its dotted name, is one that a table replaces."""
    return is_modulation(f"{name}.weight")


def table_depends_on(name: str) -> bool:
    """Return whether a table's rows follow from a layer: the modulations, and the time embedding in front of them."""
    return is_modulation_layer(name) or name.startswith("time_text_embed.")


def pays(timesteps: int, width: int) -> bool:
    """Return whether a table of so many timesteps is smaller than the weights: each takes a row, they have `width`."""
    return timesteps <= width


def weight_count(transformer: QwenImageTransformer2DModel) -> int:
    """Return how many weights and biases the modulations have: 6 D of width D, in two streams of each block."""
    width = transformer.inner_dim
    return len(transformer.transformer_blocks) * len(STREAMS) * 6 * width * (width + 1)


def sampling_timesteps(dtype: torch.dtype) -> Tensor | None:
    """Return every timestep that sampling can show in bf16, [763]; None for another dtype, where they are too many.

    Model time is 1000 sigma rounded to bf16, and the least sigma is 0.02 (`qwen.SHIFT_TERMINAL`), or above 0.016 for
    100 steps without it: what bf16 can hold from 16 to 1000, each number's bits being the integer after the one before.
    """
    if dtype != torch.bfloat16:
        return None
    least, most = (torch.tensor(value, dtype=dtype).view(torch.int16).item() for value in (16.0, 1000.0))
    levels = torch.arange(int(least), int(most) + 1, dtype=torch.int16).view(dtype)
    return levels / constants.TRAIN_TIMESTEPS  # in bf16, as `flow.model_time` divides


@dataclass(slots=True)
class ModulationTable:
    """A table with a row for each known timestep, on the CPU; the current forward's rows are on the device."""

    timesteps: Tensor  # [S] fp32 on the CPU, ascending, as `flow.model_time` gives them
    rows: Tensor  # [S, L, 2, 6D] on the CPU
    device: torch.device
    current: Tensor | None = None  # [B, L, 2, 6D]
    shown: tuple[float, ...] = ()
    hook: RemovableHandle | None = None  # that shows it each forward's timesteps
    layers: nn.Module | None = None  # the layers that it stands for, where a LoRA has needed them

    def show(self, time: Tensor) -> None:
        """Make the rows of these timesteps [B], on the CPU, the current ones. Raises KeyError for an unknown one."""
        wanted = time.float()
        values = tuple(wanted.tolist())
        if values == self.shown:
            return
        index = torch.searchsorted(self.timesteps, wanted).clamp_max(len(self.timesteps) - 1)
        if not torch.equal(self.timesteps[index], wanted):
            raise KeyError(f"the modulation table has no timestep {values}")
        with torch.inference_mode(False):  # rows shown while sampling may serve a training step next
            self.current, self.shown = to_device(self.rows[index], self.device), values


class _FromTable(nn.Module):
    """A module that replaces a modulation, and gives its output without its weights."""

    def __init__(self, table: ModulationTable, block: int, stream: int):
        super().__init__()
        self.table, self.block, self.stream = table, block, stream

    def forward(self, temb: Tensor) -> Tensor:
        assert self.table.current is not None, "a timestep was shown"
        return self.table.current[: len(temb), self.block, self.stream]  # [B, 6D]


@torch.no_grad()
def install_table(transformer: QwenImageTransformer2DModel, timesteps: Tensor) -> "TableBuilder":
    """Replace the modulations by a table for these timesteps. -> the builder that is to compute its rows

    The transformer's time embedding must be loaded; its modulations need not. From then on every forward looks its
    timestep up. It had better be given on the CPU: reading it from the GPU would wait for all that is queued there.
    """
    shown = timesteps.float()
    if transformer.zero_cond_t:
        shown = torch.cat([shown, torch.zeros(1)])  # the level of images to edit
    known = shown.unique()  # ascending
    embedder = cast(Any, transformer.time_text_embed)
    like = next(embedder.parameters())
    filled = F.pad(known, (0, -len(known) % _AT_ONCE))
    tembs = [F.silu(embedder(part.to(like), like)) for part in filled.split(_AT_ONCE)]  # [_AT_ONCE, D] each

    blocks, width = len(transformer.transformer_blocks), tembs[0].shape[1]
    rows = torch.empty(len(known), blocks, len(STREAMS), 6 * width, dtype=like.dtype)
    table = ModulationTable(known, rows, like.device)
    for index, block in enumerate(transformer.transformer_blocks):
        for stream, name in enumerate(STREAMS):
            setattr(block, name, _FromTable(table, index, stream))
    _show_timesteps(transformer, table)
    return TableBuilder(table, tembs)


class TableBuilder:
    """It computes a table's rows while the modulations' weights stream by, and keeps none of these."""

    def __init__(self, table: ModulationTable, tembs: list[Tensor]):
        self.table, self.tembs = table, tembs  # the time embeddings, [_AT_ONCE, D] each
        self.halves: dict[tuple[str, str], dict[str, Tensor]] = {}  # a layer's weight or bias that waits for the other

    @torch.no_grad()
    def take(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Compute with the modulations among these weights, and yield the others.

        Raises UserError for one of another shape than the model's, and where some never came.
        """
        computed, rows = 0, self.table.rows
        for name, tensor in weights:
            parsed = _NAME.fullmatch(name)
            if parsed is None:
                yield name, tensor
                continue
            block, stream, part = parsed.groups()
            expected = (rows.shape[3], rows.shape[3] // 6) if part == "weight" else (rows.shape[3],)
            if tensor.shape != expected or int(block) >= rows.shape[1]:
                raise UserError(f"{name} {tuple(tensor.shape)} doesn't fit; the model has {expected} there.")
            layer = self.halves.setdefault((block, stream), {})
            layer[part] = tensor
            if len(layer) == 2:
                outputs = [F.linear(temb, layer["weight"], layer["bias"]) for temb in self.tembs]  # [_AT_ONCE, 6 D]
                rows[:, int(block), STREAMS.index(stream)] = torch.cat(outputs)[: len(rows)].cpu()
                del self.halves[block, stream]
                computed += 1
        missing = rows.shape[1] * rows.shape[2] - computed
        if missing:
            raise UserError(f"the transformer's files lack {missing} modulations; download them again.")


def _show_timesteps(transformer: QwenImageTransformer2DModel, table: ModulationTable) -> None:
    """Show the table the timesteps of each forward, before it."""

    def show(_module: nn.Module, positional: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        time = named["timestep"].cpu()
        table.show(torch.cat([time, torch.zeros_like(time)]) if transformer.zero_cond_t else time)
        return positional, {**named, "timestep": named["timestep"].to(table.device)}

    table.hook = transformer.register_forward_pre_hook(show, with_kwargs=True)


def build_layers(
    transformer: QwenImageTransformer2DModel, weights: Iterator[tuple[str, Tensor]], source: Path
) -> nn.Module:
    """Return the layers that the table stands for, with their weights, under their names in the transformer.

    They aren't part of it yet, so whatever fails leaves it as it was. Raises UserError for a weight that is missing.
    """
    layers, width = nn.Module(), transformer.inner_dim
    with empty_weights():
        layers.transformer_blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) for name in STREAMS})
            for _ in transformer.transformer_blocks
        )
    fill_parameters(layers, weights, source)
    check_complete(layers, source)
    return layers.eval().requires_grad_(False)


@contextmanager
def without_table(transformer: QwenImageTransformer2DModel) -> Iterator[None]:
    """Let the layers of `build_layers`, which the table keeps, stand in its place within it: a LoRA may adapt them."""
    table = table_of(transformer)
    if table is None:
        yield
        return
    assert table.layers is not None, "the layers were loaded"
    blocks = list(transformer.transformer_blocks)
    replaced = [[getattr(block, name) for name in STREAMS] for block in blocks]
    own = cast(nn.ModuleList, table.layers.transformer_blocks)
    try:
        if table.hook is not None:
            table.hook.remove()
        for block, layers in zip(blocks, own, strict=True):
            for name in STREAMS:
                setattr(block, name, cast(nn.ModuleDict, layers)[name])
        yield
    finally:
        for block, modules in zip(blocks, replaced, strict=True):
            for name, module in zip(STREAMS, modules, strict=True):
                setattr(block, name, module)
        _show_timesteps(transformer, table)


def table_of(transformer: QwenImageTransformer2DModel) -> ModulationTable | None:
    """Return the table that replaces the modulations, if one does."""
    first = transformer.transformer_blocks[0].img_mod
    return first.table if isinstance(first, _FromTable) else None


def has_table(transformer: QwenImageTransformer2DModel) -> bool:
    """Return whether a table replaces the modulations."""
    return table_of(transformer) is not None
