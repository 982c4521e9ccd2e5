"""Plain forms as signed distance fields, and how much of each pixel they cover. They know no colours.

Legend: coordinates are in units of an object's radius, x to the right, y down; radii and centres are in pixels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 64  # of an image
Pixels = NDArray[Any]
Field = Callable[[Pixels, Pixels], Pixels]  # (x, y) -> signed distance, negative inside


def disc(cx: float = 0.0, cy: float = 0.0, r: float = 1.0) -> Field:
    return lambda x, y: np.hypot(x - cx, y - cy) - r


def box(cx: float, cy: float, w: float, h: float) -> Field:
    return lambda x, y: np.maximum(np.abs(x - cx) - w, np.abs(y - cy) - h)


def ellipse(cx: float, cy: float, w: float, h: float) -> Field:
    return lambda x, y: (np.hypot((x - cx) / w, (y - cy) / h) - 1.0) * min(w, h)


def polygon(*corners: tuple[float, float]) -> Field:
    """A convex polygon, its corners clockwise as seen on the screen."""
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))

    def distance(x: Pixels, y: Pixels) -> Pixels:
        sides = []
        for (x0, y0), (x1, y1) in edges:
            length = float(np.hypot(x1 - x0, y1 - y0))
            sides.append(((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length)
        return np.max(sides, axis=0)

    return distance


def both(a: Field, b: Field) -> Field:
    return lambda x, y: np.maximum(a(x, y), b(x, y))


def either(a: Field, b: Field) -> Field:
    return lambda x, y: np.minimum(a(x, y), b(x, y))


def placed(field: Field, cx: float, cy: float, r: float) -> Field:
    """The field made `r` times as large and moved to (cx, cy)."""
    return lambda x, y: field((x - cx) / r, (y - cy) / r) * r


def turned(field: Field, angle: float) -> Field:
    """The field turned about the origin, in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return lambda x, y: field(x * cos - y * sin, x * sin + y * cos)


def ring(x: Pixels, y: Pixels) -> Pixels:
    return np.abs(np.hypot(x, y) - 0.74) - 0.26


def waffle_ridges(x: Pixels, y: Pixels) -> Pixels:
    """A rim and a cross: four pockets between them."""
    rim = 0.7 - np.maximum(np.abs(x), np.abs(y))
    return np.minimum(rim, np.minimum(np.abs(x), np.abs(y)) - 0.15)


_X_PX, _Y_PX = np.meshgrid(np.arange(SIDE_PX) + 0.5, np.arange(SIDE_PX) + 0.5)


def grid(centre_px: tuple[float, float], radius_px: float) -> tuple[Pixels, Pixels]:
    x, y = _X_PX, _Y_PX
    return (x - centre_px[0]) / radius_px, (y - centre_px[1]) / radius_px


def coverage(field: Field, x: Pixels, y: Pixels, radius_px: float) -> Pixels:
    """Share of each pixel inside the field [H, W]: one pixel of antialiasing."""
    return np.clip(0.5 - field(x, y) * radius_px, 0.0, 1.0)
