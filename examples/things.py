"""Objects of no meaning, in forms and colours of chance: for the autoencoder, and for the word `thing`.

Coordinates are in units of an object's radius, as in fields.py.
"""

import numpy as np

from examples import fields
from examples.fields import SIDE_PX, Field, Pixels

Colour = tuple[int, int, int]
Layers = tuple[tuple[Field, Colour], ...]  # painted one on the other

FORMS: tuple[Field, ...] = (
    fields.disc(),
    fields.box(0, 0, 0.88, 0.88),
    fields.polygon((0, -1), (1, 0.8), (-1, 0.8)),
    fields.ring,
    fields.either(fields.box(0, 0, 1, 0.33), fields.box(0, 0, 0.33, 1)),
    fields.box(0, 0, 1, 0.36),
)


def random_colour(rng: np.random.Generator) -> Colour:
    red, green, blue = (int(value) for value in rng.uniform(0, 255, 3))
    return red, green, blue


def random_form(rng: np.random.Generator) -> Field:
    """A form, squeezed or turned now and then."""
    form = FORMS[rng.integers(len(FORMS))]
    if rng.random() < 0.4:
        form = fields.ellipse(0, 0, *rng.uniform(0.4, 1.0, 2)) if rng.random() < 0.5 else _random_box(rng)
    return fields.turned(form, float(rng.uniform(0, 2 * np.pi))) if rng.random() < 0.3 else form


def _random_box(rng: np.random.Generator) -> Field:
    return fields.box(0, 0, *rng.uniform(0.3, 0.95, 2))


def random_object(rng: np.random.Generator) -> Layers:
    """A body with one to three smaller parts on it."""
    layers = [(random_form(rng), random_colour(rng))]
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(-0.7, 0.7, 2)
        part = fields.placed(random_form(rng), float(x), float(y), float(rng.uniform(0.2, 0.6)))
        layers.append((part, random_colour(rng)))
    return tuple(layers)


def recoloured(layers: Layers, index: int, colour: Colour) -> Layers:
    """Return an object with another colour for one of its layers."""
    return (*layers[:index], (layers[index][0], colour), *layers[index + 1 :])


def paint(ground: Pixels, layers: Layers, radius_px: float, centre_px: tuple[float, float]) -> Pixels:
    """Lay an object on an image [H, W, 3] and return the new one."""
    x, y = fields.grid(centre_px, radius_px)
    for field, colour in layers:
        cover = fields.coverage(field, x, y, radius_px)[..., None]
        ground = ground * (1 - cover) + np.array(colour, float) * cover
    return ground


def random_drawing(rng: np.random.Generator) -> Pixels:
    """An image [H, W, 3] of one object, or of a few forms apart, in any colours on any ground."""
    image = np.empty((SIDE_PX, SIDE_PX, 3))
    image[:] = rng.uniform(0, 255, 3)
    if rng.random() < 0.7:
        x, y = rng.uniform(20, 44, 2)
        return paint(image, random_object(rng), float(rng.uniform(12, 22)), (float(x), float(y)))
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(8, 56, 2)
        layers = ((random_form(rng), random_colour(rng)),)
        image = paint(image, layers, float(rng.uniform(4, 24)), (float(x), float(y)))
    return image
