"""Teach the small editing model an edit and a subject, through train.py and predict.py themselves.

`make demo-edit` runs it.

The edit is a golden frame, which the model has never seen. The subject is a house, which it has no name for: a token
is taught to stand for it in "replace it with <zwx>". `preserve_prompts` keeps other edits what they are. Writes
out/demo_edit.png, and with --score measures both.
"""

import argparse
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples import edits, scorer, shapes
from examples.demo import Row, call, contact_sheet
from examples.shapes import Scene
from predict import Predictor
from train import train

MODEL = Path(__file__).parent / "tiny_qwen_image_edit"
OUT = Path("out")
TOKEN, OBJECT = "<zwx>", "house"
FRAME_PX, GOLD = 6, (232, 184, 44)
FRAME, REPLACE = "give it a golden frame", f"replace it with {TOKEN}"
PINK = "change the background to pink"  # an edit that the model knows
# Edits that the model knows, which a LoRA would bend towards what it learns.
KNOWN = "\n".join(
    [
        *(f"make it {word}" for word in ("red", "green", "white", "small", "big")),
        *(f"put it on a {word} background" for word in ("black", "pink", "cyan")),
        *(f"move it to the {word}" for word in ("left", "right", "top")),
        *("add a small blue ring", "replace it with a yellow cross", "turn it into a purple circle"),
    ]
)
PAIRS = 20
TRAINING = {
    "rank": 16,
    "lora_alpha": 16.0,
    "steps": 500,
    "learning_rate": 5e-4,
    "batch_size": 4,
    "lora_targets": "attention_mlp",
    "resolution": "64",
    "control_resolution": "auto",
    "lr_scheduler": "cosine",
    "seed": 0,
}
SUBJECT = {"steps": 1000}  # an object is more to learn than a frame
# A quarter of the batches holds them, so as many more steps are taken.
KEPT = {"preserve_prompts": KNOWN, "preservation_weight": 0.25}
LONGER_FRAME, LONGER_SUBJECT = {"steps": 800}, {"steps": 1500}
WITH_TOKEN = {"train_placeholder_token": True, "placeholder_token": TOKEN}
SAMPLING = {"steps": 20, "guidance": 4.0, "width": 64, "height": 64, "output_format": "png"}
MOST_OFF = 14.0  # mean difference in grey levels that what is to stay may have


@dataclass(frozen=True, slots=True)
class Pair:
    """A scene, and the image that an instruction makes of it."""

    scene: Scene
    before: Image.Image
    target: Image.Image


def framed(scene: Scene) -> Image.Image:
    """Return the scene within a golden frame."""
    pixels = shapes.draw(scene)
    inside = pixels[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX].copy()
    pixels[:] = GOLD
    pixels[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = inside
    return shapes.to_image(pixels)


def replaced(scene: Scene) -> Image.Image:
    """Return the scene with the taught object in its object's place."""
    return shapes.to_image(shapes.draw(replace(scene, kind=OBJECT, colour=None, parts=())))


def on_pink(scene: Scene) -> Image.Image:
    """Return the scene on a pink background."""
    return shapes.to_image(shapes.draw(replace(scene, background="pink")))


def make_pairs(edited: Callable[[Scene], Image.Image], count: int, seed: int) -> list[Pair]:
    """Return pairs of plain scenes."""
    rng, pairs = np.random.default_rng(seed), list[Pair]()
    while len(pairs) < count:
        scene = edits.random_scene(rng)
        if edits.is_plain(scene):
            pairs.append(Pair(scene, shapes.to_image(shapes.draw(scene)), edited(scene)))
    return pairs


def write_dataset(archive: Path, pairs: list[Pair], caption: str) -> Path:
    """Pack pairs as a user would: targets with their captions, and the images that they are made of in control/."""
    with zipfile.ZipFile(archive, "w") as packed:
        for index, pair in enumerate(pairs):
            for name, image in ((f"{index:02d}.png", pair.target), (f"control/{index:02d}.png", pair.before)):
                with packed.open(name, "w") as file:
                    image.save(file, "png")
            packed.writestr(f"{index:02d}.txt", caption)
    return archive


def has_frame(image: Image.Image) -> bool:
    """Return whether each side of an image is golden, to within what the autoencoder rounds."""
    pixels = np.asarray(image.convert("RGB"), float)
    width = FRAME_PX - 1  # not the edge, which is soft
    sides = pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:]
    return all(np.abs(side.reshape(-1, 3).mean(axis=0) - GOLD).max() < 40 for side in sides)


def keeps_inside(image: Image.Image, scene: Scene) -> bool:
    """Return whether what is within the frame is what it was."""
    inner = slice(FRAME_PX + 1, -FRAME_PX - 1)
    difference = np.asarray(image.convert("RGB"), float) - np.clip(shapes.draw(scene), 0, 255)
    return float(np.abs(difference[inner, inner]).mean()) < MOST_OFF


def shows_object(image: Image.Image) -> bool:
    """Return whether the taught object is there."""
    return scorer.read(image).kind == OBJECT


def keeps_scene(image: Image.Image, scene: Scene) -> bool:
    """Return whether background and place are what they were."""
    reading = scorer.read(image)
    near = np.hypot(*(np.array(reading.centre_px) - np.array(scene.centre_px))) <= edits.MOST_OFF_PX
    return bool(reading.background == scene.background and near)


class Editor:
    """The predictor that the demo samples with."""

    def __init__(self) -> None:
        os.environ["BASE_MODEL"] = str(MODEL)
        self.predictor = Predictor()
        self.predictor.setup()

    def edit(self, pair: Pair, prompt: str, weights: Path | None, seed: int) -> Image.Image:
        """Edit a pair's image, with a LoRA or without."""
        before = OUT / "before.png"
        pair.before.save(before)
        given: dict[str, Any] = {"replicate_weights": weights} if weights else {"control_resolution": "auto"}
        (path,) = call(self.predictor.predict, prompt=prompt, image=before, seed=seed, **SAMPLING, **given)
        with Image.open(path) as image:
            return image.convert("RGB")


def teach(name: str, pairs: list[Pair], caption: str, **given: Any) -> Path:
    """Train on pairs. -> the weights"""
    archive = write_dataset(OUT / f"{name}.zip", pairs, caption)
    trained = call(train, dataset=archive, **{**TRAINING, **given})
    return Path(shutil.copy(trained.weights, OUT / f"{name}_weights.zip"))


def rows_of(editor: Editor, heading: str, pairs: list[Pair], prompt: str, weights: Path) -> list[Row]:
    """Return a row for each pair: before, what the base makes of it, what the LoRA does, and the target."""
    rows = []
    for seed, pair in enumerate(pairs):
        base, taught = (editor.edit(pair, prompt, own, seed) for own in (None, weights))
        images = [(pair.before, "before"), (base, "base model"), (taught, "with the LoRA"), (pair.target, "target")]
        rows.append(Row(f"{heading}: {prompt}" if not seed else "", images))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", type=int, default=0, metavar="N", help="measure on N scenes of each kind too")
    arguments = parser.parse_args()
    began = time.monotonic()
    OUT.mkdir(exist_ok=True)
    os.environ["BASE_MODEL"] = str(MODEL)
    print(f"teaching an edit the base model doesn't know, a golden frame, from {PAIRS} pairs")
    frame = teach("frame", make_pairs(framed, PAIRS, seed=1), FRAME, **KEPT, **LONGER_FRAME)
    print(f"teaching {TOKEN}, a {OBJECT}, which the base model has never seen, from {PAIRS} pairs")
    subject = teach("subject", make_pairs(replaced, PAIRS, seed=2), REPLACE, **WITH_TOKEN, **KEPT, **LONGER_SUBJECT)
    editor = Editor()
    rows = rows_of(editor, "An edit", make_pairs(framed, 3, seed=11), FRAME, frame)
    rows += rows_of(editor, "A subject", make_pairs(replaced, 3, seed=12), REPLACE, subject)
    rows += rows_of(editor, "The frame's LoRA, a known edit", make_pairs(on_pink, 2, seed=13), PINK, frame)
    contact_sheet(rows).save(OUT / "demo_edit.png")
    if arguments.score:
        print_scores(editor, arguments.score, frame, subject)
    print(f"{time.monotonic() - began:.0f} s in all; weights: {frame}, {subject}; image: {OUT / 'demo_edit.png'}")


def print_scores(editor: Editor, count: int, frame: Path, subject: Path) -> None:
    """Print in how many of so many scenes the edit is right, and in how many all else is kept."""
    for name, edited, prompt, weights, right, kept in (
        ("frame", framed, FRAME, frame, has_frame, keeps_inside),
        ("subject", replaced, REPLACE, subject, shows_object, keeps_scene),
    ):
        pairs = make_pairs(edited, count, seed=21)
        for who, own in (("base", None), ("LoRA", weights)):
            images = [editor.edit(pair, prompt, own, seed) for seed, pair in enumerate(pairs)]
            shares = np.mean(
                [(right(image), kept(image, pair.scene)) for image, pair in zip(images, pairs, strict=True)], axis=0
            )
            print(f"{name}, {who}: edit right {shares[0]:.0%}, rest kept {shares[1]:.0%} of {count}")


if __name__ == "__main__":
    main()
