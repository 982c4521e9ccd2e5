"""Weights from disk to device, tensor by tensor: what is on its way is all that the CPU holds beyond what stays.

This module owns how an empty part is filled and found complete. It doesn't know what the parts compute.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_utils.errors import UserError

# The names under which diffusers and transformers store a part that is one file.
_SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return a part's safetensors files, in its index's order if it has one. Raises UserError for a missing one."""
    indexes = [folder / f"{name}.index.json" for name in _SINGLE_FILES]
    for index in (path for path in indexes if path.is_file()):
        names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, one of its {len(names)} weight files; download it again.")
        return [folder / name for name in names]
    found = [folder / name for name in _SINGLE_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} holds no weights: neither {' nor '.join(_SINGLE_FILES)}.")
    return found[:1]


def stream_tensors(
    folder: Path, device: torch.device, dtype: torch.dtype, rename: Callable[[str], str | None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a part's weights, straight to the device. What `rename` turns into None isn't read."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt", device=str(device)) as shard:
            for stored in shard.keys():  # noqa: SIM118 (safe_open isn't a mapping)
                if (name := rename(stored)) is not None:
                    yield name, shard.get_tensor(stored).to(dtype)


def fill_parameters(
    module: nn.Module,
    tensors: Iterator[tuple[str, Tensor]],
    source: Path,
    store: Callable[[str, Tensor], bool] = lambda _name, _tensor: False,
) -> None:
    """Replace a module's empty parameters by these tensors, frozen. Raises UserError for one that doesn't fit.

    `store` may take one to store it another way, and says so.
    """
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        parameters = module.get_submodule(owner)._parameters if _has(module, owner) else {}
        empty = parameters.get(leaf)
        if empty is None or empty.shape != tensor.shape:
            expected = "no such weight" if empty is None else f"the shape {tuple(empty.shape)}"
            raise UserError(f"{source}: {name} {tuple(tensor.shape)} doesn't fit, the model has {expected} there.")
        if not store(name, tensor):
            parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def check_complete(module: nn.Module, source: Path) -> None:
    """Raise UserError if a parameter was never filled."""
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise UserError(f"{source} lacks {len(empty)} weights, the first is {empty[0]}; download it again.")
