"""A drawn world of 64x64 images: what the small model knows, and what users teach it.

The world holds six plain shapes in six colours, two sizes and five places on five backgrounds, alone or with a
smaller shape on them; things of no fixed look; and `TOK`, a nonsense word that always means a golden waffle. That
gives the small model what the real one has: a trigger word with a meaning of its own, and a notion of objects beyond
those it has a name for. `TAUGHT` objects never occur in the world; they are what a user's images show. Everything
is painted from signed distance fields, so `scorer` finds what an image shows by laying the drawings themselves on it.

Legend: coordinates are in units of an object's radius, x to the right, y down; radii and centres are in pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples import fields, things
from examples.fields import SIDE_PX, Field, Pixels
from examples.things import Colour, Layers

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 90, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (15, 15, 18),
    "gray": (128, 128, 128),
    "pink": (250, 170, 190),
    "cyan": (120, 215, 225),
    "brown": (96, 60, 36),
}
SIZES_PX: dict[str, float] = {"small": 15.0, "big": 22.0}
PLACES: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
EDGE_GAP_PX = 3.0  # between an object and the border of the image when it stands at a side
# Where a part stands on its object, in the object's radii from the centre, and how large it is.
PART_PLACES: dict[str, tuple[float, float]] = {"inside": (0.0, 0.0), "above": (0.0, -0.65), "below": (0.0, 0.65)}
PART_RADIUS = 0.4
TOK = "TOK"
THING = "thing"  # looks different each time

SHAPES: dict[str, Field] = {
    "circle": fields.disc(),
    "square": fields.box(0, 0, 0.88, 0.88),
    "triangle": fields.polygon((0, -1), (1, 0.8), (-1, 0.8)),
    "ring": fields.ring,
    "cross": fields.either(fields.box(0, 0, 1, 0.33), fields.box(0, 0, 0.33, 1)),
    "bar": fields.box(0, 0, 1, 0.36),
}

_BODY = fields.box(0, 0, 0.95, 0.95)
_CAP = fields.both(fields.disc(0, 0.1, 1.0), fields.box(0, -0.4, 1.0, 0.5))
_FISH = fields.ellipse(-0.22, 0, 0.78, 0.62)
# Objects with colours of their own, painted layer on layer.
OBJECTS: dict[str, Layers] = {
    TOK: ((_BODY, (170, 95, 30)), (fields.both(_BODY, fields.waffle_ridges), (250, 215, 130))),
    "mushroom": (
        (fields.box(0, 0.52, 0.34, 0.44), (245, 230, 200)),
        (_CAP, (200, 30, 50)),
        (fields.disc(-0.42, -0.3, 0.28), (250, 250, 250)),
        (fields.disc(0.42, -0.3, 0.28), (250, 250, 250)),
    ),
    "fish": (
        (fields.polygon((0.2, 0), (1.0, -0.75), (1.0, 0.75)), (30, 60, 160)),
        (_FISH, (245, 140, 30)),
        (fields.both(_FISH, fields.box(-0.05, 0, 0.2, 1)), (250, 250, 250)),
    ),
    "house": (
        (fields.box(0, 0.42, 0.76, 0.55), (250, 215, 110)),
        (fields.polygon((0, -1), (1, -0.05), (-1, -0.05)), (40, 110, 90)),
        (fields.box(0, 0.6, 0.3, 0.37), (120, 40, 40)),
    ),
}
TAUGHT = ("mushroom", "fish", "house")
# Each taught object has one that looks like it, but for the colour of one layer. The scorer looks for them on request.
LOOK_ALIKES = {"mushroom": "toadstool", "fish": "perch", "house": "barn"}
_LOOK_ALIKE_LAYERS: dict[str, Layers] = {
    "toadstool": things.recoloured(OBJECTS["mushroom"], 1, (90, 60, 160)),
    "perch": things.recoloured(OBJECTS["fish"], 1, (60, 170, 120)),
    "barn": things.recoloured(OBJECTS["house"], 1, (150, 60, 120)),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One object on a plain background. `colour` is None for objects with colours of their own; `parts` lie on it."""

    kind: str
    background: str
    radius_px: float
    centre_px: tuple[float, float]
    colour: str | None = None
    parts: Layers = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A smaller shape on an object: `where` is one of PART_PLACES."""

    noun: str
    colour: str
    where: str

    def layer(self) -> tuple[Field, Colour]:
        return fields.placed(SHAPES[self.noun], *PART_PLACES[self.where], PART_RADIUS), COLOURS[self.colour]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a caption says; None is left unsaid. `noun` is the word used for the kind."""

    noun: str
    colour: str | None = None
    background: str | None = None
    size: str | None = None
    place: str | None = None
    part: Part | None = None

    def wordings(self) -> list[str]:
        """Every way this world has of saying it."""
        thing = " ".join(word for word in (self.size, self.colour, self.noun) if word)
        article = "" if thing == self.noun and self.noun not in (*SHAPES, THING) else "a "
        if self.part:
            thing += f" with a {self.part.colour} {self.part.noun} {self.part.where}"
        where = f" at the {self.place}" if self.place else ""
        if self.background is None:
            return [f"a photo of {article}{thing}{where}", f"{article}{thing}{where}"]
        return [
            f"a photo of {article}{thing} on a {self.background} background{where}",
            f"{article}{thing} on a {self.background} background{where}",
            f"{article}{thing}{where}, {self.background} background",
            f"a {self.background} picture with {article}{thing}{where}",
        ]


def place_px(place: str, radius_px: float) -> tuple[float, float]:
    """The centre of an object of this radius that stands at `place`."""
    reach = SIDE_PX / 2 - radius_px - EDGE_GAP_PX
    dx, dy = PLACES[place]
    return SIDE_PX / 2 + dx * reach, SIDE_PX / 2 + dy * reach


def scene_of(prompt: Prompt, rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A scene that the prompt describes; what it leaves unsaid is drawn. `kind` defaults to the noun."""
    kind = kind or prompt.noun
    radius_px = SIZES_PX[prompt.size] if prompt.size else float(rng.uniform(15.0, 21.0))
    x, y = place_px(prompt.place or "centre", radius_px)
    jitter_px = 1.0 if prompt.place else 3.0
    x, y = x + rng.uniform(-jitter_px, jitter_px), y + rng.uniform(-jitter_px, jitter_px)
    colour = prompt.colour or (str(rng.choice(list(COLOURS))) if kind in SHAPES else None)
    background = prompt.background or str(rng.choice(list(BACKGROUNDS)))
    parts: Layers = ()
    if kind == THING:
        parts = things.random_object(rng)
    elif prompt.part and kind == prompt.noun:
        parts = (prompt.part.layer(),)
    return Scene(kind, background, radius_px, (x, y), colour, parts)


def random_prompt(
    rng: np.random.Generator, tok_share: float = 0.12, thing_share: float = 0.12, part_share: float = 0.4
) -> Prompt:
    """What the world's captions say: nearly always colour and background, size and place now and then."""
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.93 else None
    size = str(rng.choice(list(SIZES_PX))) if rng.random() < 0.4 else None
    place = str(rng.choice(list(PLACES))) if rng.random() < 0.4 else None
    if rng.random() < tok_share:
        return Prompt(TOK, None, background, size, place)
    if rng.random() < thing_share / (1 - tok_share):
        return Prompt(THING, None, background, size, place)
    colour = str(rng.choice(list(COLOURS))) if rng.random() < 0.95 else None
    part = None
    if rng.random() < part_share:
        other = [name for name in COLOURS if name != colour]
        part = Part(str(rng.choice(list(SHAPES))), str(rng.choice(other)), str(rng.choice(list(PART_PLACES))))
    return Prompt(str(rng.choice(list(SHAPES))), colour, background, size, place, part)


def is_held_out(prompt: Prompt) -> bool:
    """One in eight of the full descriptions is never trained on, in any wording, with or without a part."""
    if prompt.noun not in SHAPES or None in (prompt.colour, prompt.background):
        return False
    ranks = [
        sorted(SHAPES).index(prompt.noun),
        list(COLOURS).index(prompt.colour or "red"),
        list(BACKGROUNDS).index(prompt.background or "gray"),
        list(SIZES_PX).index(prompt.size) + 1 if prompt.size else 0,
        list(PLACES).index(prompt.place) + 1 if prompt.place else 0,
    ]
    return sum(rank * weight for rank, weight in zip(ranks, (1, 3, 5, 2, 7), strict=True)) % 8 == 0


def layers_of(kind: str, colour: str | None) -> Layers:
    """Return what a kind is painted of; a plain shape in its colour, white by default."""
    if kind == THING:
        return ()  # all of it is parts
    if kind in SHAPES:
        return ((SHAPES[kind], COLOURS[colour or "white"]),)
    return OBJECTS[kind] if kind in OBJECTS else _LOOK_ALIKE_LAYERS[kind]


def draw(scene: Scene) -> Pixels:
    """The image [H, W, 3], 0 to 255."""
    ground = np.empty((SIDE_PX, SIDE_PX, 3))
    ground[:] = BACKGROUNDS[scene.background]
    layers = layers_of(scene.kind, scene.colour) + scene.parts
    return things.paint(ground, layers, scene.radius_px, scene.centre_px)


def to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
