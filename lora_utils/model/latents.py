"""Image sizes and latents: rounding, the official sizes, and the packing of latents into tokens.

Legend: B batch, N image tokens, H and W an image's sides in pixels; a token holds a patch of 2x2 latents.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_utils import constants


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """An image's width and height in pixels, both multiples of 16."""

    width_px: int
    height_px: int

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of tokens."""
        return self.height_px // constants.PIXELS_PER_TOKEN, self.width_px // constants.PIXELS_PER_TOKEN

    @property
    def tokens(self) -> int:
        """The number of image tokens, N."""
        rows, columns = self.grid
        return rows * columns

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height, as Pillow takes them."""
        return self.width_px, self.height_px

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"


@dataclass(frozen=True, slots=True)
class ControlLatents:
    """The images to edit of one example, without noise: packed latents [M, C] of all of them, and their sizes."""

    tokens: Tensor
    sizes: tuple[Size, ...]


def round_to_token(pixels: float) -> int:
    """Return the nearest multiple of 16, at least 16."""
    return max(1, round(pixels / constants.PIXELS_PER_TOKEN)) * constants.PIXELS_PER_TOKEN


def image_size(
    width_px: int | None,
    height_px: int | None,
    aspect_ratio: str,
    megapixels: float | None = None,
    like_px: tuple[int, int] | None = None,
) -> Size:
    """Return the size asked for: width and height if given, rounded to 16, else by aspect ratio.

    The aspect ratio is that of an image `like_px` to start from, if there is one, in that image's area, at most that
    of the official sizes; else one of the official sizes. `megapixels` sets the area.
    """
    if width_px is not None and height_px is not None:
        return Size(round_to_token(width_px), round_to_token(height_px))
    width, height = like_px or constants.OFFICIAL_SIZES_PX[aspect_ratio]
    most = math.prod(constants.OFFICIAL_SIZES_PX["1:1"])
    area = megapixels * 1e6 if megapixels else min(width * height, most) if like_px else width * height
    scale = math.sqrt(area / (width * height))
    return Size(round_to_token(width * scale), round_to_token(height * scale))


def pack_latents(latents: Tensor) -> Tensor:
    """Pack latents [B, 16, H/8, W/8] into tokens [B, N, 64], each of which holds a patch of 2x2."""
    batch, channels, rows, columns = latents.shape
    patches = latents.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (rows // 2) * (columns // 2), channels * 4)  # [B, N, 64]


def unpack_latents(tokens: Tensor, size: Size) -> Tensor:
    """Unpack tokens [B, N, 64] into latents [B, 16, H/8, W/8]."""
    batch, _, channels = tokens.shape
    rows, columns = size.grid
    patches = tokens.view(batch, rows, columns, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, rows * 2, columns * 2)  # [B, 16, H/8, W/8]


def mask_shares(mask: Image.Image, size: Size) -> Tensor:
    """Return what share of each latent is white in a mask, [N, 4] in 0 to 1, with the mask cropped as its image is."""
    latents = (size.width_px // constants.VAE_SCALE, size.height_px // constants.VAE_SCALE)
    fitted = ImageOps.fit(mask, latents, Image.Resampling.BOX)
    return pack_latents(torch.from_numpy(np.array(fitted)).float().div(255)[None, None])[0]  # [N, 4]
