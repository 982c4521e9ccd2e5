"""Edits of the drawn world: instructions, what each makes of a scene, and an exact scorer of what changed and stayed.

An instruction changes one property of the object in picture 1 or of its background. Some name a second image, whose
background or colour is to be taken over. One in eight combinations of an instruction with a scene is never trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from examples import fields, scorer, shapes
from examples.fields import SIDE_PX, Pixels
from examples.shapes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES_PX, TOK, Scene

OF_ONE_IMAGE = ("colour", "background", "place", "size", "add", "replace")
OF_TWO_IMAGES = ("background of", "colour of")  # picture 2
# A shape that is added stands in the corner at the top right. Smaller than this, 16 latent tokens don't show its form.
ADDED_RADIUS_PX = 9.0
ADDED_CENTRE_PX = (SIDE_PX - ADDED_RADIUS_PX - shapes.EDGE_GAP_PX, ADDED_RADIUS_PX + shapes.EDGE_GAP_PX)
MOST_OFF_PX = 4.0  # that the centre of an object may move where it is to stay
MOST_SCALED = 0.15  # of its radius that it may grow or shrink


@dataclass(frozen=True, slots=True)
class Instruction:
    """What is to be done to picture 1. `word` is a colour, background, place or size, `noun` what is added or put."""

    action: str
    word: str = ""
    noun: str = ""

    def wordings(self) -> list[str]:
        """Every way this world has of saying it."""
        thing = " ".join(word for word in (self.word, self.noun) if word)
        return {
            "colour": [f"make it {self.word}", f"change its colour to {self.word}"],
            "background": [f"put it on a {self.word} background", f"change the background to {self.word}"],
            "place": [f"move it to the {self.word}", f"put it at the {self.word}"],
            "size": [f"make it {self.word}", f"make the object {self.word}"],
            "add": [f"add a small {thing}", f"put a small {thing} in the corner"],
            "replace": [f"replace it with {_article(self.noun)}{thing}", f"turn it into {_article(self.noun)}{thing}"],
            "background of": ["picture 1 with the background of picture 2"],
            "colour of": ["picture 1 in the colour of picture 2"],
        }[self.action]


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction with the scenes it is given, and the scene that it makes of the first."""

    instruction: Instruction
    sources: tuple[Scene, ...]
    target: Scene


def _article(noun: str) -> str:
    return "a " if noun in SHAPES else ""


def clamped_px(centre_px: tuple[float, float], radius_px: float) -> tuple[float, float]:
    """Return the nearest centre at which an object of this radius lies within the image."""
    least, most = radius_px + shapes.EDGE_GAP_PX, SIDE_PX - radius_px - shapes.EDGE_GAP_PX
    x, y = (min(max(value, least), most) for value in centre_px)
    return x, y


def apply(instruction: Instruction, source: Scene, other: Scene | None = None) -> Scene:
    """Return the scene that an instruction makes of picture 1; `other` is picture 2."""
    word, changes = instruction.word, dict[str, Any]()
    match instruction.action:
        case "colour":
            changes = {"colour": word}
        case "background":
            changes = {"background": word}
        case "place":
            changes = {"centre_px": shapes.place_px(word, source.radius_px)}
        case "size":
            radius_px = SIZES_PX[word]
            changes = {"radius_px": radius_px, "centre_px": clamped_px(source.centre_px, radius_px)}
        case "add":
            centre, size = _added(source)
            changes = {
                "parts": (*source.parts, (fields.placed(SHAPES[instruction.noun], *centre, size), COLOURS[word]))
            }
        case "replace":
            changes = {"kind": instruction.noun, "colour": word or None, "parts": ()}
    if other is not None:
        name = instruction.action.removesuffix(" of")
        changes = {name: getattr(other, name)}
    return replace(source, **changes)


def _added(scene: Scene) -> tuple[tuple[float, float], float]:
    """Return centre and radius of an added shape in units of the object's radius, from the object's centre."""
    x, y = ((added - own) / scene.radius_px for added, own in zip(ADDED_CENTRE_PX, scene.centre_px, strict=True))
    return (x, y), ADDED_RADIUS_PX / scene.radius_px


def random_scene(rng: np.random.Generator) -> Scene:
    """Return a scene with a plain shape as a rule; a thing of chance or TOK now and then, which edits must keep."""
    return shapes.scene_of(shapes.random_prompt(rng, tok_share=0.06, thing_share=0.2, part_share=0.15), rng)


def is_plain(scene: Scene) -> bool:
    """Return whether a scene's object is one shape of one colour."""
    return scene.kind in SHAPES and not scene.parts


def _another(rng: np.random.Generator, words: Sequence[str], *but: str | None) -> str:
    return str(rng.choice([word for word in words if word not in but]))


def random_instruction(rng: np.random.Generator, action: str, source: Scene) -> Instruction:
    """Return an instruction of this action that changes something about the scene."""
    colours, word, noun = list(COLOURS), "", ""
    match action:
        case "colour":
            word = _another(rng, colours, source.colour)
        case "background":
            word = _another(rng, list(BACKGROUNDS), source.background)
        case "place":
            word = str(rng.choice(list(PLACES)))
        case "size":
            word = str(rng.choice(list(SIZES_PX)))
        case "add":
            word, noun = _another(rng, colours, source.colour), str(rng.choice(list(SHAPES)))
        case "replace" if rng.random() < 0.1:
            noun = TOK
        case "replace":
            word, noun = str(rng.choice(colours)), _another(rng, list(SHAPES), source.kind)
    return Instruction(action, word, noun)


def random_edit(rng: np.random.Generator, images: int = 1) -> Edit:
    """Return an edit of one image, or of two."""
    source, other = random_scene(rng), random_scene(rng)
    if images == 2:
        action = str(rng.choice(OF_TWO_IMAGES)) if is_plain(source) and other.colour else "background of"
        instruction = Instruction(action)
        return Edit(instruction, (source, other), apply(instruction, source, other))
    actions = [name for name in OF_ONE_IMAGE if is_plain(source) or name not in ("colour", "add")]
    instruction = random_instruction(rng, str(rng.choice(actions)), source)
    return Edit(instruction, (source,), apply(instruction, source))


def is_held_out(edit: Edit) -> bool:
    """Return whether an edit is one of the eighth that is never trained on: an instruction with a scene's look."""
    source = edit.sources[0]
    if not is_plain(source):
        return False
    words = [*COLOURS, *BACKGROUNDS, *PLACES, *SIZES_PX, *SHAPES, TOK, ""]
    last = edit.sources[-1]
    ranks = [
        words.index(edit.instruction.word),
        words.index(edit.instruction.noun),
        sorted(SHAPES).index(source.kind),
        list(COLOURS).index(source.colour or "red"),
        list(BACKGROUNDS).index(source.background),
        list(BACKGROUNDS).index(last.background) if len(edit.sources) > 1 else 0,
    ]
    return sum(rank * weight for rank, weight in zip(ranks, (3, 1, 5, 7, 3, 1), strict=True)) % 8 == 0


# --- the scorer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EditScore:
    """Whether an image shows the change that was asked for, and whether everything else is what it was."""

    changed: bool
    kept: bool
    fit: float  # how crisp the object is: the share of its energy that its best template explains, 0 to 1


def score(image: Image.Image, edit: Edit) -> EditScore:
    """Read an edited image of a plain shape. What an instruction says nothing of must be as in picture 1."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), float)
    action, target = edit.instruction.action, edit.target
    added = action == "add"
    reading = scorer.read(_without_added(pixels, edit) if added else pixels)
    near = math.dist(reading.centre_px, target.centre_px) <= MOST_OFF_PX
    right = {
        "kind": reading.kind == target.kind,
        "colour": target.kind not in SHAPES or reading.colour == target.colour,
        "background": reading.background == target.background,
        "place": near,
        "size": abs(reading.radius_px / target.radius_px - 1) <= MOST_SCALED,
    }
    asked = {
        "colour": ("colour",),
        "colour of": ("colour",),
        "background": ("background",),
        "background of": ("background",),
        "place": ("place",),
        "size": ("size",),
        "replace": ("kind", "colour"),
        "add": (),
    }[action]
    # An object that grows is moved into the image, and one that is replaced has another outline.
    loose = {"size": ("place",), "replace": ("size",)}.get(action, ())
    changed = _shows_added(pixels, edit) if added else all(right[name] for name in asked)
    kept = all(fine for name, fine in right.items() if name not in (*asked, *loose))
    return EditScore(changed, kept, reading.fit)


def _added_cover(noun: str) -> Pixels:
    """Return how much of each pixel the added shape covers, [H, W, 1]."""
    x, y = fields.grid(ADDED_CENTRE_PX, ADDED_RADIUS_PX)
    return fields.coverage(SHAPES[noun], x, y, ADDED_RADIUS_PX)[..., None]


def _added_area() -> Pixels:
    """Return the area in which an added shape lies, [H, W, 1], 0 to 1."""
    x, y = fields.grid(ADDED_CENTRE_PX, ADDED_RADIUS_PX)
    return fields.coverage(fields.disc(0, 0, 1.4), x, y, ADDED_RADIUS_PX)[..., None]


def _without_added(pixels: Pixels, edit: Edit) -> Pixels:
    """Return the image with picture 1 where the added shape lies."""
    area = _added_area()
    return pixels * (1 - area) + shapes.draw(edit.sources[0]) * area


def _shows_added(pixels: Pixels, edit: Edit) -> bool:
    """Return whether of all shapes in all colours, and none, the one asked for is the nearest to what was added."""
    source = edit.sources[0]
    area, before = _added_area(), shapes.draw(source)
    off: dict[tuple[str, str], float] = {("", ""): float(np.sum(area * (pixels - before) ** 2))}
    for noun in SHAPES:
        cover = _added_cover(noun)
        for colour, value in COLOURS.items():
            drawn = before * (1 - cover) + np.array(value, float) * cover
            off[colour, noun] = float(np.sum(area * (pixels - drawn) ** 2))
    return min(off, key=off.__getitem__) == (edit.instruction.word, edit.instruction.noun)
