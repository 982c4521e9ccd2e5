"""How many floating-point operations a step takes, and how many the device does: what a speed is measured against.

Legend: N image tokens, T text tokens, S = T + N, D width.
"""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a transformer that its operations follow from."""

    blocks: int
    width: int
    channels: int  # of a packed image token, in and out
    text_width: int


def forward_flops(shape: Shape, image_tokens: int, text_tokens: int) -> float:
    """Count one forward of one image; a multiplication and an addition are two. Norms and other passes aren't counted.

    A block holds 12 D^2 weights for a token of either stream: 4 D^2 of attention, 8 D^2 of the MLP; attention itself is
    two products of [S, D] with [D, S]. The modulations, one row per image, are left out.
    """
    tokens = image_tokens + text_tokens
    block = 2 * 12 * shape.width**2 * tokens + 4 * tokens**2 * shape.width
    ends = 2 * shape.width * (2 * shape.channels * image_tokens + shape.text_width * text_tokens)
    return shape.blocks * block + ends


def training_flops(shape: Shape, image_tokens: int, text_tokens: int, checkpointed_blocks: int) -> float:
    """Count forward and backward of one image with a frozen base; the LoRA's own products, below 2 %, aren't counted.

    The backward multiplies each output's gradient by the weight, once, not twice as where the weight learns, and not
    by those whose input has no gradient: q, k and v of the first block, the layers before it, and the last block's text
    beyond attention. Attention's backward is five products for the forward's two.
    """
    tokens = image_tokens + text_tokens
    square = 2 * shape.width**2  # of one D x D layer on one token
    linear = shape.blocks * 12 * square * tokens - 3 * square * tokens - 9 * square * text_tokens
    attention = shape.blocks * 10 * tokens**2 * shape.width
    end = 2 * shape.width * shape.channels * image_tokens
    again = checkpointed_blocks * (12 * square * tokens + 4 * tokens**2 * shape.width)
    return forward_flops(shape, image_tokens, text_tokens) + linear + attention + end + again


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Measure the FLOP/s of a plain matrix product on the device, the best of all tries in so many seconds.

    A device that has just trained is warm, so a few tries are enough.
    """
    rows, width = (4096, 8192) if device.type == "cuda" else (1024, 1024)
    left, right = (
        torch.randn(rows, width, device=device).to(dtype),
        torch.randn(width, width, device=device).to(dtype),
    )
    best, began = 0.0, time.monotonic()
    while time.monotonic() - began < seconds or best == 0.0:
        _synchronize(device)
        start = time.perf_counter()
        torch.matmul(left, right)
        _synchronize(device)
        best = max(best, 2 * rows * width * width / (time.perf_counter() - start))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
