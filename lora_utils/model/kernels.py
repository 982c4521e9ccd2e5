"""One kernel of our own for NVIDIA GPUs: the heads' RMSNorm, RoPE and the joining of text and image, in one pass.

Done one after the other, with fp32 between them, these move 28 bytes for each number of q and k; here it is 4. Triton
comes with torch's builds for CUDA. Elsewhere, and where the kernel doesn't work, the same is computed in steps.

Importing this module registers two operations with torch, by which the compiler knows the kernel.

Legend: B batch, T text tokens, N image tokens, S = T + N, H heads, E width of a head.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

_ROWS = 32  # of [H, E] that a program takes: 8 kB of bf16 for Qwen-Image's heads of 128

# Text [B, T, H, E], image [B, N, H, E], the weights [E] of their norms, a table [S, E / 2, 2] of the rotation's real
# and imaginary parts, and the norms' eps -> [B, S, H, E], text first.
Join = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


# --- in steps -------------------------------------------------------------------------------------------------------


def join_in_steps(
    text: Tensor, image: Tensor, text_weight: Tensor, image_weight: Tensor, table: Tensor, eps: float
) -> Tensor:
    """Normalise text and image, join them and rotate. -> [B, S, H, E]"""
    normed = [F.rms_norm(x, w.shape, w, eps) for x, w in ((text, text_weight), (image, image_weight))]
    return rotate(torch.cat(normed, dim=1), table)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply RoPE to [B, S, H, E] in fp32, as diffusers computes it, by a table [S, E / 2, 2].

    The compiler can't do complex numbers. It is given more passes over memory, which it fuses.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, S, H, E / 2, 2]
    if torch.compiler.is_compiling():
        (a, b), (c, d) = pairs.unbind(-1), table[:, None].unbind(-1)
        return torch.stack([a * c - b * d, a * d + b * c], dim=-1).flatten(3).type_as(x)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
    return torch.view_as_real(turned).flatten(3).type_as(x)


# --- the kernel -----------------------------------------------------------------------------------------------------


def _launch(name: str, tensors: tuple[Tensor, ...], text: Tensor, image: Tensor, eps: float) -> None:
    batch, text_tokens, heads, width = text.shape
    programs = [-(-batch * part.shape[1] * heads // _ROWS) for part in (text, image)]
    sizes = programs[0], batch, text_tokens, image.shape[1]
    from lora_utils.model import triton_kernels  # noqa: PLC0415 (triton comes with CUDA alone)

    getattr(triton_kernels, name)[(sum(programs),)](*tensors, eps, *sizes, heads, width, _ROWS)


@torch.library.custom_op("qwen_image_lora::norm_rope", mutates_args=())
def norm_rope(
    text: Tensor, image: Tensor, text_weight: Tensor, image_weight: Tensor, table: Tensor, eps: float
) -> Tensor:
    """Do what `join_in_steps` does, by the kernel. A head's width is a power of two. -> [B, S, H, E]"""
    text, image = text.contiguous(), image.contiguous()
    out = text.new_empty(len(text), text.shape[1] + image.shape[1], *text.shape[2:])
    _launch("forward", (text, image, text_weight, image_weight, table, out), text, image, eps)
    return out


@norm_rope.register_kernel("cpu")
def _(
    text: Tensor, image: Tensor, text_weight: Tensor, image_weight: Tensor, table: Tensor, eps: float
) -> Tensor:  # there is no kernel for it; so a CPU can compile and trace what has one on a GPU
    return join_in_steps(text, image, text_weight, image_weight, table, eps)


@norm_rope.register_fake
def _(text: Tensor, image: Tensor, _tw: Tensor, _iw: Tensor, _table: Tensor, _eps: float) -> Tensor:
    return text.new_empty(text.shape[0], text.shape[1] + image.shape[1], *text.shape[2:])


@torch.library.custom_op("qwen_image_lora::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    gradient: Tensor,
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    table: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of text and image. Norms and table have none."""
    gradient, text, image = gradient.contiguous(), text.contiguous(), image.contiguous()
    outs = torch.empty_like(text), torch.empty_like(image)
    tensors = (gradient, text, image, text_weight, image_weight, table, *outs)
    _launch("backward", tensors, text, image, eps)
    return outs


@norm_rope_backward.register_kernel("cpu")
def _(
    gradient: Tensor,
    text: Tensor,
    image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    table: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    back = rotate(gradient.contiguous(), table * table.new_tensor([1.0, -1.0])).split(
        [text.shape[1], image.shape[1]], dim=1
    )
    found = []
    for turned, part, weight in zip(back, (text, image), (text_weight, image_weight), strict=True):
        wide, scaled = part.float(), turned.float() * weight.float()
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        share = (scaled * wide).mean(-1, keepdim=True) * rstd.square()
        found.append((rstd * (scaled - wide * share)).to(part.dtype))
    return found[0], found[1]


@norm_rope_backward.register_fake
def _(
    _gradient: Tensor, text: Tensor, image: Tensor, _tw: Tensor, _iw: Tensor, _table: Tensor, _eps: float
) -> tuple[Tensor, Tensor]:
    return text.new_empty(text.shape), image.new_empty(image.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the inputs alone: the norm's statistics are made again from them."""
    ctx.save_for_backward(*inputs[:-1])
    ctx.eps = inputs[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    text, image = norm_rope_backward(gradient, *ctx.saved_tensors, ctx.eps)
    return text, image, None, None, None, None


norm_rope.register_autograd(_backward, setup_context=_keep)


# --- the choice -----------------------------------------------------------------------------------------------------


def choose_join(device: torch.device, dtype: torch.dtype, head_width: int) -> Join:
    """Return the kernel where it works, else the steps."""
    fits = device.type == "cuda" and head_width.bit_count() == 1
    return cast(Join, norm_rope) if fits and kernel_works(device, dtype) else join_in_steps


@lru_cache(maxsize=16)
def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel computes on this device what the steps do, forward and backward; a line if it doesn't.

    It is tried once, on a few numbers.
    """
    try:
        worst = largest_difference(cast(Join, norm_rope), device, dtype)
    except Exception as error:  # of any kind: triton's compiler, the system's or the driver may be at fault
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("the kernel for RoPE can't be used here (%s); steps take a little longer", first_line)
        return False
    if worst > (0.05 if dtype.itemsize < torch.float32.itemsize else 1e-4):
        log.warning("the kernel for RoPE is off by %.2g here and isn't used; steps take a little longer", worst)
        return False
    return True


def largest_difference(join: Join, device: torch.device, dtype: torch.dtype) -> float:
    """Return how far results and gradients are off what the steps give, on random numbers of size 1."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with torch.inference_mode(False), torch.enable_grad():
        parts = [random(2, tokens, 3, 32).requires_grad_() for tokens in (5, 11)]
        weights = [1 + 0.1 * random(32), 1 + 0.1 * random(32)]
        angles = torch.randn(16, 16, generator=generator)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)
        out_gradient = random(2, 16, 3, 32)
        found = []
        for each in (join, join_in_steps):
            out = each(parts[0], parts[1], weights[0], weights[1], table, 1e-6)
            found.append((out.detach(), *torch.autograd.grad(out, parts, out_gradient)))
        return max(float((one.float() - other.float()).abs().max()) for one, other in zip(*found, strict=True))
