"""Operations on tensors without data, recorded as the kernels that a GPU would run for them in eager mode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_utils.model import kernels, quantization
from lora_utils.model.roofline import Gpu


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation: what it computes, and what it moves."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        """Return its roofline."""
        return max(self.flops / gpu.reached, self.bytes / gpu.bandwidth)


@dataclass(slots=True)
class Trace:
    """The kernels of a step, and its memory beyond the weights."""

    kernels: list[Kernel] = field(default_factory=list)
    kept_bytes: float = 0.0  # from the forward for the backward pass
    peak_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """All operations of matrix products and attention."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        """All bytes that are read and written."""
        return sum(kernel.bytes for kernel in self.kernels)

    def seconds(self, gpu: Gpu) -> float:
        """Return the step's roofline on a gpu."""
        return sum(kernel.seconds(gpu) for kernel in self.kernels)

    def floor(self, gpu: Gpu) -> float:
        """Return what matrix products and attention alone take."""
        return self.flops / gpu.reached


# --- recording ------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 2,  # products of [S, D] with [D, S]
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
_FREE = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_unsafe_view",
    "_local_scalar_dense",
}


class Recorder(TorchDispatchMode):
    """It records each operation on fake tensors as the kernel that a GPU would run for it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace == "prim" or name in _FREE or _is_view(func):
            return made
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        # Numbers alone never leave the CPU, and what is written in place is both read and written.
        moved = sum(map(_moved_bytes, given)) + sum(map(_moved_bytes, results))
        if results and any(tensor.ndim for tensor in (*given, *results)):
            self.kernels.append(Kernel(name, _flops(func, given), moved))
        return made


def _is_view(func: Any) -> bool:
    """Return whether an operation only looks at its input in another way."""
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _moved_bytes(tensor: Tensor) -> int:
    """Return a tensor's bytes, those of an expanded one once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def _flops(func: Any, given: Sequence[Tensor]) -> float:
    """Count a matrix product's or attention's operations; 0 for all others."""
    if func in _PRODUCTS:
        left, right = given[-2:]
        return 2.0 * left.numel() * right.shape[-1]
    if func in _ATTENTION:
        query, key = (given[1], given[2]) if "backward" in func._schema.name else (given[0], given[1])
        return 2.0 * _ATTENTION[func] * query.numel() * key.shape[-2]
    return 0.0


# A GPU has one kernel for an RMSNorm and one for its backward pass, which a CPU build of torch makes of others.


@torch.library.custom_op("trace::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("trace::rms_norm_backward", mutates_args=())
def _rms_norm_backward(gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    raise NotImplementedError


@_rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _rms_norm_backward(gradients[0], *ctx.saved_tensors), None, None


# Weights that are stored in fewer bits are made dense by a kernel that reads them and writes bf16.


@torch.library.custom_op("trace::dequantize", mutates_args=())
def _dequantize(stored: Tensor, rows: int, columns: int) -> Tensor:
    raise NotImplementedError


@_dequantize.register_fake
def _(stored: Tensor, rows: int, columns: int) -> Tensor:
    return stored.new_empty((rows, columns), dtype=torch.bfloat16)


def store_quantized(transformer: nn.Module, scheme: str) -> None:
    """Let the layers that a scheme quantises hold as many bytes as it takes, and make them dense as it does."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and quantization.is_quantized(name.removesuffix(".base_layer")):
            rows, columns = layer.weight.shape
            size = int(rows * columns * quantization.WEIGHT_BYTES[scheme])
            stored = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
            stored.dense_shape = (rows, columns)  # pyright: ignore[reportAttributeAccessIssue]
            layer.weight = stored
            cast(Any, layer).forward = partial(quantization._forward, layer)


@contextmanager
def on_paper() -> Iterator[None]:
    """Let tensors have no data within it, and operations be a GPU's."""
    real = F.rms_norm, quantization.dense, nn.Module._apply, kernels.choose_join
    kernels.choose_join = lambda *_: cast(kernels.Join, kernels.norm_rope)
    F.rms_norm = lambda x, _shape, weight, eps: _RmsNorm.apply(x, weight, eps)
    quantization.dense = lambda weight: _dequantize(weight, *weight.dense_shape)  # type: ignore[attr-defined]
    nn.Module._apply = lambda self, fn, recurse=True: self  # fake weights are made where and as they should be
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        F.rms_norm, quantization.dense, nn.Module._apply, kernels.choose_join = real
