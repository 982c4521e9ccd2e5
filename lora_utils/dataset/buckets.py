"""Buckets: the sizes that images train in, so that those of one batch have the same."""

import math

from lora_utils.model.latents import Size, round_to_token


def buckets(resolution_px: int) -> list[Size]:
    """Return the sizes at one resolution: areas near its square, aspects from 1:2 to 2:1, about 9 of them.

    Few buckets fill batches; crops lose at most half a step of aspect.
    """
    step_px = round_to_token(resolution_px / 8)
    widths_px = range(round_to_token(resolution_px / 2), 2 * resolution_px + 1, step_px)
    return sorted({Size(width, round_to_token(resolution_px**2 / width)) for width in widths_px})


def choose_buckets(width_px: int, height_px: int, resolutions_px: tuple[int, ...]) -> list[Size]:
    """Return the buckets that an image trains in: at each resolution the one of nearest aspect, if the image fills it.

    An image is enlarged only where it is too small for every resolution, and then to the smallest one.
    """
    nearest = [
        min(buckets(px), key=lambda size: abs(math.log((size.width_px / size.height_px) * (height_px / width_px))))
        for px in sorted(set(resolutions_px))
    ]
    filled = [size for size in nearest if size.width_px <= width_px and size.height_px <= height_px]
    return filled or nearest[:1]
