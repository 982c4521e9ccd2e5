"""Picture sizes: rounding, aspect presets, training buckets, and the packing of latents into tokens.

Owns what a size is; must not know pictures, files or models.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lora_utils import qwen
from lora_utils.errors import UserError


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Pixels, both sides multiples of 16."""

    width_px: int
    height_px: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens: (rows, columns)."""
        return self.height_px // qwen.PIXELS_PER_TOKEN, self.width_px // qwen.PIXELS_PER_TOKEN

    @property
    def tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"


def round_to_token(pixels: float) -> int:
    """The nearest multiple of 16, at least 16."""
    return max(1, round(pixels / qwen.PIXELS_PER_TOKEN)) * qwen.PIXELS_PER_TOKEN


def picture_size(
    width_px: int | None, height_px: int | None, aspect_ratio: str, megapixels: float | None = None,
    like_px: tuple[int, int] | None = None,
) -> Size:  # fmt: skip
    """The size asked for: width and height if given, rounded to 16, else by aspect ratio.

    The aspect ratio is that of a picture `like_px` to start from, if there is one, in that picture's area, at most that
    of the official sizes; else one of the official sizes. `megapixels` sets the area.
    """
    if (width_px is None) != (height_px is None):
        raise UserError(
            f"width and height come together: got width={width_px}, height={height_px}. Set both or neither."
        )
    if width_px is not None and height_px is not None:
        return Size(round_to_token(width_px), round_to_token(height_px))
    if aspect_ratio not in qwen.OFFICIAL_SIZES_PX:
        raise UserError(f"aspect_ratio {aspect_ratio!r} is unknown: use one of {', '.join(qwen.OFFICIAL_SIZES_PX)}.")
    width, height = like_px or qwen.OFFICIAL_SIZES_PX[aspect_ratio]
    most = math.prod(qwen.OFFICIAL_SIZES_PX["1:1"])
    area = megapixels * 1e6 if megapixels else min(width * height, most) if like_px else width * height
    scale = math.sqrt(area / (width * height))
    return Size(round_to_token(width * scale), round_to_token(height * scale))


def buckets(resolution_px: int) -> list[Size]:
    """The training sizes at one resolution: areas near its square, aspects from 1:2 to 2:1, about 9 of them.

    Few buckets fill batches; crops lose at most half a step of aspect.
    """
    step_px = round_to_token(resolution_px / 8)
    widths_px = range(round_to_token(resolution_px / 2), 2 * resolution_px + 1, step_px)
    return sorted({Size(width, round_to_token(resolution_px**2 / width)) for width in widths_px})


def choose_buckets(width_px: int, height_px: int, resolutions_px: tuple[int, ...]) -> list[Size]:
    """The buckets that a picture trains in: at each resolution the one of nearest aspect, if the picture fills it.

    A picture is enlarged only where it is too small for every resolution, and then to the smallest one.
    """
    nearest = [
        min(buckets(px), key=lambda size: abs(math.log((size.width_px / size.height_px) * (height_px / width_px))))
        for px in sorted(set(resolutions_px))
    ]
    filled = [size for size in nearest if size.width_px <= width_px and size.height_px <= height_px]
    return filled or nearest[:1]


def pack(latents: Tensor) -> Tensor:
    """[B, 16, H/8, W/8] -> tokens [B, N, 64]: each token holds a patch of 2x2 latents."""
    batch, channels, rows, columns = latents.shape
    patches = latents.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (rows // 2) * (columns // 2), channels * 4)  # [B, N, 64]


def unpack(tokens: Tensor, size: Size) -> Tensor:
    """[B, N, 64] -> [B, 16, H/8, W/8]."""
    batch, _, channels = tokens.shape
    rows, columns = size.grid
    patches = tokens.view(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, rows * 2, columns * 2)  # [B, 16, H/8, W/8]
