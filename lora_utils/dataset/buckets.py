"""Buckets: the sizes that images train in. They follow the images' own aspect ratios, so hardly anything is cropped.

At each resolution there is one row of sizes, from squares to the narrowest strips. Neighbours are so close that an
image loses at most 3 % to the nearer one, and so far apart that images of like shape share a size and fill batches.

Legend: n the side of the resolution's square in tokens of 16 pixels; the area asked for is n * n tokens.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from lora_utils.constants import PIXELS_PER_TOKEN
from lora_utils.model.latents import Size

Key = TypeVar("Key")

MOST_CROPPED = 0.03  # of an image, from a resolution of 256 on and up to 2:1; from 512 on up to 8:1
AREA_SLACK = 0.1  # by which a size's area may differ from the one asked for; more below 256, where tokens are coarse
_COARSE = 16  # n below which sides of whole tokens are too coarse for both
# Of sizes at one resolution in one run. Compiled code serves all sizes alike and memory is planned for the largest, so
# they cost nothing there (docs/benchmarks.md); but each one's last batch is short.
MOST_SIZES = 32


@lru_cache
def buckets(resolution_px: int) -> tuple[Size, ...]:
    """Return the sizes at one resolution, the narrowest first: each has its turned one."""
    side = resolution_px // PIXELS_PER_TOKEN  # n
    slack = AREA_SLACK * max(1.0, _COARSE / side)
    step = 1 / (1 - MOST_CROPPED) ** 2  # of two neighbours' aspect ratios: from one to the middle 3 % are lost
    possible = sorted(
        (wide / narrow, abs(math.log(wide * narrow / side**2)), wide, narrow)
        for narrow in range(1, side + 1)
        for wide in range(narrow, int(side**2 * (1 + slack) / narrow) + 1)
        if abs(math.log(wide * narrow / side**2)) <= math.log(1 + slack)
    )

    # From the square on, the next one within the step whose area is nearest to what was asked for; or the next at all.
    row = [(side, side)]
    while True:
        aspect = row[-1][0] / row[-1][1]
        wider = [each for each in possible if each[0] > aspect * (1 + 1e-9)]
        if not wider:
            break
        near = [each for each in wider if aspect * math.sqrt(step) <= each[0] <= aspect * step]
        near = near or [each for each in wider if each[0] <= max(wider[0][0] * 1.01, aspect * step)]
        _, _, wide, narrow = min(near, key=lambda each: (round(each[1] / 0.02), -each[0]))
        row.append((wide, narrow))
    sides = {(wide, narrow) for wide, narrow in row} | {(narrow, wide) for wide, narrow in row}
    sizes = (Size(width * PIXELS_PER_TOKEN, height * PIXELS_PER_TOKEN) for width, height in sides)
    return tuple(sorted(sizes, key=_aspect))


def _aspect(size: Size) -> float:
    return size.width_px / size.height_px


def cropped_share(width_px: int, height_px: int, size: Size) -> float:
    """Return which share of an image falls away when it is scaled to cover a size, and cropped to it."""
    ratio = _aspect(size) * height_px / width_px
    return 1 - min(ratio, 1 / ratio)


def _nearest(width_px: int, height_px: int, sizes: Sequence[Size]) -> Size:
    return min(sizes, key=lambda size: cropped_share(width_px, height_px, size))


def choose_buckets(width_px: int, height_px: int, resolutions_px: tuple[int, ...]) -> list[Size]:
    """Return the buckets that an image trains in: at each resolution the one of nearest aspect, if the image fills it.

    An image is enlarged only where it is too small for every resolution, and then to the smallest one.
    """
    nearest = [_nearest(width_px, height_px, buckets(px)) for px in sorted(set(resolutions_px))]
    filled = [size for size in nearest if size.width_px <= width_px and size.height_px <= height_px]
    return filled or nearest[:1]


def assign_buckets(sizes_px: Mapping[Key, tuple[int, int]], resolutions_px: tuple[int, ...]) -> dict[Key, list[Size]]:
    """Return the buckets of each image, by its width and height: at most `MOST_SIZES` at one resolution.

    Where there would be more, the images of the rarest sizes go to the nearest of the others.
    """
    chosen = {key: choose_buckets(width, height, resolutions_px) for key, (width, height) in sizes_px.items()}
    for px in sorted(set(resolutions_px)):
        row = set(buckets(px))
        counts = Counter(size for sizes in chosen.values() for size in sizes if size in row)
        if len(counts) <= MOST_SIZES:
            continue
        kept = sorted(counts, key=lambda size: (-counts[size], size))[:MOST_SIZES]
        for key, sizes in chosen.items():
            chosen[key] = [_nearest(*sizes_px[key], kept) if size in row - set(kept) else size for size in sizes]
    return chosen
