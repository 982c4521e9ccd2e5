"""Where in a picture the loss counts: a mask in a file of its own, or the picture's own alpha.

Owns which file is whose mask and how a mask becomes weights of the loss; must not know the loss.

Legend: H and W the bucket's sides in pixels, N image tokens; a token holds 2 x 2 latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_utils import qwen
from lora_utils.captions import same_name
from lora_utils.errors import UserError
from lora_utils.pictures import in_8_bits, open_alpha, open_upright
from lora_utils.sizes import Size, pack

MARK = ".mask"  # `NAME.mask.png` is the mask of `NAME.jpg`
ASPECT_SLACK = 0.02  # by which a mask's aspect ratio may differ from its picture's: the rounding of a smaller one


@dataclass(slots=True)
class Masks:
    """Masks by picture, and those of no picture."""

    files: dict[Path, Path] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)


def is_mask(path: Path) -> bool:
    return path.stem.casefold().endswith(MARK)


def match_masks(pictures: Sequence[Path], masks: Sequence[Path]) -> Masks:
    """Which mask is whose: `a.mask.png` of `a.jpg`, and what some tools write, `a.jpg.mask.png`."""
    of_name = {same_name(str(path)): path for path in pictures}
    of_name |= {same_name(str(path.with_suffix(""))): path for path in pictures}
    found = Masks()
    for mask in masks:
        picture = of_name.get(same_name(str(mask.with_suffix("")))[: -len(MARK)])
        if picture is None:
            found.orphans.append(mask)
        else:
            found.files[picture] = mask
    return found


def open_mask(path: Path) -> Image.Image:
    """Greyscale, white where the loss counts in full; what is transparent counts as black."""
    upright = open_upright(path)
    if not upright.has_transparency_data:
        return (in_8_bits(upright) if upright.mode.startswith("I") else upright).convert("L")
    rgba = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("L")


def problem_of(mask: Image.Image, name: str, picture_px: tuple[int, int]) -> str:
    """What is wrong with a mask for a picture of this size; nothing is an empty text."""
    (width, height), (own_width, own_height) = picture_px, mask.size
    if abs(own_width * height / (own_height * width) - 1) > ASPECT_SLACK:
        return (
            f"mask {name} has {own_width}x{own_height} pixels, its picture {width}x{height}; they must show the same."
        )
    if not np.asarray(mask).any():
        return f"mask {name} is black all over; paint white what counts."
    return ""


def load_mask(picture: Path, mask: Path | None, size: Size) -> Tensor:
    """The share of each latent that is to be learned, [N, 4] in 0 to 1, cut as the picture is. No mask: its alpha.

    Raises UserError for a file that can't be read any more.
    """
    opened = open_mask(mask) if mask else open_alpha(picture)
    if opened is None:
        raise UserError(f"picture {picture.name} has no alpha.")
    latents = (size.width_px // qwen.VAE_SCALE, size.height_px // qwen.VAE_SCALE)
    fitted = ImageOps.fit(opened, latents, Image.Resampling.BOX)
    return pack(torch.from_numpy(np.array(fitted)).float().div(255)[None, None])[0]  # [N, 4]
