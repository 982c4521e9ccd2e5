"""The frozen transformer sharded over several GPUs by FSDP2: each holds a part, and fetches a block while it runs.

This module owns what is sharded and how a weight from the disk becomes a part. LoRA and embeddings aren't sharded: they
are small, and every GPU has them, as without sharding. The weights stay as they are, so it is exact.

torch's modules for it are heavy to import, so a run that isn't sharded never does.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn


def in_a_block(name: str) -> bool:
    """Return whether a weight, by its dotted name in the transformer, is one that is sharded."""
    return name.startswith("transformer_blocks.")


def shard(transformer: QwenImageTransformer2DModel, device: torch.device, count: int) -> None:
    """Shard the blocks of an empty transformer over `count` processes. Their weights come by `store`.

    What stands outside of the blocks is filled already; every process has it.
    """
    from torch.distributed import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh(device.type, (count,))
    outside = {parameter for name, parameter in transformer.named_parameters() if not in_a_block(name)}
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh, ignored_params=outside)  # the root: it fetches a block while the last computes


def store(transformer: nn.Module, name: str, tensor: Tensor) -> bool:
    """Keep this process's part of a weight; False, and nothing done, for one that isn't sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415

    owner, _, leaf = name.rpartition(".")
    module = transformer.get_submodule(owner)
    empty = module._parameters[leaf]
    if not isinstance(empty, DTensor):
        return False
    part = distribute_tensor(tensor, empty.device_mesh, empty.placements, src_data_rank=None)
    module._parameters[leaf] = nn.Parameter(part, requires_grad=False)
    return True


def is_sharded(transformer: nn.Module) -> bool:
    """Return whether the transformer is sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # until `shard` has imported it, nothing is
    return fsdp is not None and isinstance(transformer, fsdp.FSDPModule)


@contextmanager
def sampling_mode(transformer: nn.Module) -> Iterator[None]:
    """Turn gradients off, and where FSDP2 can bear it autograd's bookkeeping too.

    torch 2.13's fails in inference mode: "Inference tensors do not track version counter".
    """
    with torch.no_grad(), cast(Any, torch.inference_mode)(mode=not is_sharded(transformer)):
        yield
