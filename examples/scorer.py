"""The exact scorer: what an image of the drawn world shows, found by laying the drawings themselves on it.

Legend: coordinates are in units of an object's radius, x to the right, y down; radii and centres are in pixels.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from examples import fields
from examples.fields import SIDE_PX, Pixels
from examples.shapes import BACKGROUNDS, COLOURS, OBJECTS, SHAPES, SIZES_PX, layers_of
from examples.things import Colour


@dataclass(frozen=True, slots=True)
class Reading:
    """What an image shows. `fit` is the share of the object's energy that the best template explains, 0 to 1."""

    kind: str | None
    colour: str | None
    background: str
    radius_px: float
    centre_px: tuple[float, float]
    fit: float

    @property
    def size(self) -> str:
        return "small" if self.radius_px < sum(SIZES_PX.values()) / 2 else "big"

    @property
    def place(self) -> str:
        dx, dy = self.centre_px[0] - SIDE_PX / 2, self.centre_px[1] - SIDE_PX / 2
        if max(abs(dx), abs(dy)) < 4.5:
            return "centre"
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("bottom" if dy > 0 else "top")


MIN_FIT = 0.6  # below it an image shows nothing the world knows
MIN_ENERGY = 60.0  # mean squared deviation from the ground, in grey levels: below it an image is empty
_SEARCHED_KINDS, _REFINED_KINDS = 5, 2


@dataclass(frozen=True, slots=True)
class _Seen:
    """An image as matches are measured on it: its ground's colour [3], and how far it is off that."""

    ground: Pixels
    deviation: Pixels  # [H*W, 3]
    energy: float  # of the deviation: the sum of its squares


@dataclass(frozen=True, slots=True)
class _Match:
    """A template laid on an image. `tint` is a plain shape's colour as least squares finds it."""

    fit: float
    kind: str
    radius_px: float
    centre_px: tuple[float, float]
    tint: Pixels | None


def _nearest(colour: Pixels, palette: dict[str, Colour]) -> str:
    return min(palette, key=lambda name: float(np.sum((colour - np.array(palette[name])) ** 2)))


def _cover(shape: str, radius_px: float, centre_px: tuple[float, float]) -> Pixels:
    """How much of each pixel [H*W] a plain shape covers."""
    return fields.coverage(SHAPES[shape], *fields.grid(centre_px, radius_px), radius_px).reshape(-1)


def _deviation(kind: str, ground: Pixels, radius_px: float, centre_px: tuple[float, float]) -> Pixels:
    """How far an object that has colours of its own is off its ground [H*W, 3]."""
    x, y = fields.grid(centre_px, radius_px)
    found = np.zeros((3, SIDE_PX, SIDE_PX))
    for field, colour in layers_of(kind, None):
        layer = fields.coverage(field, x, y, radius_px)
        found += (np.subtract(colour, ground)[:, None, None] - found) * layer
    return found.reshape(3, -1).T


def _match(seen: _Seen, kind: str, radius_px: float, centre_px: tuple[float, float]) -> _Match:
    """How much of the image's deviation from its ground the template explains there."""
    if kind in SHAPES:
        cover = _cover(kind, radius_px, centre_px)
        along, size = cover @ seen.deviation, max(float(cover @ cover), 1e-9)
        explained, tint = float(along @ along) / size, seen.ground + along / size
    else:
        left = seen.deviation - _deviation(kind, seen.ground, radius_px, centre_px)
        explained, tint = seen.energy - float(np.sum(left**2)), None
    return _Match(explained / max(seen.energy, 1.0), kind, radius_px, centre_px, tint)


def _moments(energy: Pixels) -> tuple[float, float, float]:
    """Centre (x, y) and root mean square distance from it, in pixels, of an energy [H*W]; faint parts don't count."""
    energy = np.where(energy > 0.1 * energy.max(), energy, 0.0).reshape(SIDE_PX, SIDE_PX)
    total = energy.sum()
    ys, xs = np.mgrid[0:SIDE_PX, 0:SIDE_PX] + 0.5
    x, y = float((energy * xs).sum() / total), float((energy * ys).sum() / total)
    return x, y, float(np.sqrt((energy * ((xs - x) ** 2 + (ys - y) ** 2)).sum() / total))


def _search(seen: _Seen, start: _Match, step_px: float, step_radius: float) -> _Match:
    """Better a match by steps in its place and radius, twice along each."""
    best = start
    for dx, dy, dr in ((1, 0, 0), (0, 1, 0), (0, 0, 1)) * 2:
        x, y = best.centre_px
        steps = [
            _match(
                seen,
                best.kind,
                best.radius_px * (1 + sign * dr * step_radius),
                (x + sign * dx * step_px, y + sign * dy * step_px),
            )
            for sign in (-1, 1)
        ]
        best = max((best, *steps), key=lambda match: match.fit)
    return best


def _first_guess(seen: _Seen, moments: tuple[float, float, float], kind: str) -> _Match:
    """Lay the template where centre and spread of its energy are the image's `moments`."""
    middle, radius_px = SIDE_PX / 2, 16.0
    at = (radius_px, (middle, middle))
    alone = _cover(kind, *at) if kind in SHAPES else np.sum(_deviation(kind, seen.ground, *at) ** 2, axis=1)
    tx, ty, template_spread = _moments(alone)
    x, y, spread = moments
    scale = spread / template_spread
    centre = (x - (tx - middle) * scale, y - (ty - middle) * scale)
    return _match(seen, kind, radius_px * scale, centre)


def _best(matches: list[_Match], count: int) -> list[_Match]:
    return sorted(matches, key=lambda match: match.fit, reverse=True)[:count]


def read(image: Image.Image | Pixels, kinds: tuple[str, ...] | None = None) -> Reading:
    """Say what a 64x64 image shows, by template matching. Images of another size are scaled.

    `kinds` limits the objects looked for (all shapes, TOK and the taught ones if None).
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), float)
    sides = (image[:2], image[-2:], image[:, :2], image[:, -2:])
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    background = _nearest(ground, BACKGROUNDS)
    deviation = image.reshape(-1, 3) - ground
    energies = np.sum(deviation**2, axis=1)
    nothing = Reading(None, None, background, 0.0, (SIDE_PX / 2, SIDE_PX / 2), 0.0)
    if energies.mean() < MIN_ENERGY:
        return nothing
    seen, moments = _Seen(ground, deviation, float(energies.sum())), _moments(energies)
    guesses = [_first_guess(seen, moments, kind) for kind in kinds or (*SHAPES, *OBJECTS)]
    coarse = [_search(seen, match, 1.5, 0.08) for match in _best(guesses, _SEARCHED_KINDS)]
    fine = [_search(seen, match, 0.6, 0.03) for match in _best(coarse, _REFINED_KINDS)]
    best = max(fine, key=lambda match: match.fit)
    if best.fit < MIN_FIT:
        return replace(nothing, fit=best.fit)
    colour = None if best.tint is None else _nearest(best.tint, COLOURS)
    return Reading(best.kind, colour, background, best.radius_px, best.centre_px, best.fit)
