"""What is taught to compare recipes: three objects, and a style, which is a look over the whole image.

Each has images with captions, prompts that no caption says, and a reader of the result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.teaching import Taught
from examples import evaluate, scorer, shapes
from examples.demo import captioned_images
from examples.fields import Pixels

STYLE = "duotone"
DARK, LIGHT = np.array([24.0, 32.0, 88.0]), np.array([255.0, 226.0, 178.0])  # the style's two inks
MOST_OFF = 14.0  # grey levels that a pixel may be off the line between them, on average
LEAST_CONTRAST = 12.0  # of its brightness: a plain ground is no image
LEAST_APART = 38.0  # grey levels from a shape's brightness to its ground's: of 400 prompts, the inks show all of these
STYLED_IMAGES = 24  # a style shows in many scenes, so it is taught by more of them


@dataclass(frozen=True, slots=True)
class Subject:
    """A thing to teach. Its captions and prompts call it by the trigger that they are given."""

    images: Callable[[str, int], Taught]  # (trigger, seed)
    prompts: Callable[[str, int], list[evaluate.Asked]]  # (trigger, count)
    shows: Callable[[Image.Image, shapes.Prompt], bool]


def inked(pixels: Pixels) -> Pixels:
    """Return an image [H, W, 3] in the style: its brightness between the two inks."""
    share = np.clip(pixels.mean(axis=2, keepdims=True) / 255.0, 0.0, 1.0)
    return DARK * (1.0 - share) + LIGHT * share


def is_inked(image: Image.Image) -> bool:
    """Return whether an image is in the style: all of it lies near the line between the inks, and isn't flat."""
    pixels, line = np.asarray(image.convert("RGB"), float) - DARK, LIGHT - DARK
    along = np.clip(pixels @ line / (line @ line), 0.0, 1.0)
    off = np.linalg.norm(pixels - along[..., None] * line, axis=2).mean()
    return bool(off < MOST_OFF and along.std() * np.linalg.norm(line) > LEAST_CONTRAST)


def _object(kind: str) -> Subject:
    return Subject(
        lambda trigger, seed: _taught(captioned_images(kind, shapes.Prompt(trigger), seed=seed)),
        lambda trigger, count: evaluate.object_prompts(shapes.Prompt(trigger), count),
        lambda image, _prompt: scorer.read(image).kind == kind,
    )


def _taught(captioned: list[tuple[Image.Image, str]]) -> Taught:
    images, captions = [image for image, _ in captioned], [caption for _, caption in captioned]
    return Taught(images, captions, [Image.new("L", image.size, 255) for image in images])


def _styled_images(trigger: str, seed: int) -> Taught:
    rng, found = np.random.default_rng(seed), list[tuple[Image.Image, str]]()
    while len(found) < STYLED_IMAGES:
        prompt = shapes.random_prompt(rng, tok_share=0.0, thing_share=0.0, part_share=0.0)
        if not shapes.is_held_out(prompt):
            image = shapes.to_image(inked(shapes.draw(shapes.scene_of(prompt, rng))))
            found.append((image, f"{rng.choice(prompt.wordings())}, {trigger} style"))
    return _taught(found)


def _styled_prompts(trigger: str, count: int) -> list[evaluate.Asked]:
    """Shapes that two inks show: of one that is as bright as its ground, not even a drawing does."""
    asked = [item for item in evaluate.held_out_prompts(4 * count, seed=3) if item.prompt.noun in shapes.SHAPES]
    seen = [item for item in asked if _grey_levels_apart(item.prompt) >= LEAST_APART][:count]
    return [replace(item, text=f"{item.text}, {trigger} style") for item in seen]


def _grey_levels_apart(prompt: shapes.Prompt) -> float:
    shape, ground = shapes.COLOURS[prompt.colour or "red"], shapes.BACKGROUNDS[prompt.background or "gray"]
    return abs(float(np.mean(shape) - np.mean(ground)))


SUBJECTS: dict[str, Subject] = {
    **{kind: _object(kind) for kind in shapes.TAUGHT},
    STYLE: Subject(
        _styled_images,
        _styled_prompts,
        lambda image, prompt: is_inked(image) and scorer.read(image).kind == prompt.noun,
    ),
}
