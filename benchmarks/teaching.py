"""What the experiments share: images to teach the small model by, a training of them, and images by what it learned."""

import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples import evaluate, shapes
from examples.demo import MODEL, TRAINING
from lora_utils.config import TrainConfig
from lora_utils.dataset import load
from lora_utils.io.archive import extract_archive
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.hooks import applied_loras, move_lora
from lora_utils.model.components import Components
from lora_utils.model.device import default_placement
from lora_utils.model.memory_estimate import read_shapes
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.placeholder.tokens import Placeholders
from lora_utils.sampling.sampler import LorasByText
from lora_utils.training import loop
from lora_utils.training.setup import TrainJob, setup
from lora_utils.training.state import TrainState, final_lora

KIND, COMPANY, IMAGES = "house", ("cross", "red"), 12
GROUNDS = ("gray", "pink", "black")  # of the images; the prompts ask for all five
PACE = "pace"  # the group of runs that time the steps of all arms one after the other, on one machine
PACE_ROUNDS = 3  # their seeds
PACE_STEPS, PACE_WARM_UP = 110, 10  # the first ones fill caches


@dataclass(frozen=True, slots=True)
class Taught:
    """Images of the object, their captions, and where the object is."""

    images: list[Image.Image]
    captions: list[str]
    masks: list[Image.Image]
    regularisation: list[tuple[Image.Image, str]] = field(default_factory=list)  # images of the class, with captions

    def enlarged(self, side_px: int) -> "Taught":
        """Return them with images and masks of this side."""
        larger = [[each.resize((side_px, side_px)) for each in some] for some in (self.images, self.masks)]
        return replace(self, images=larger[0], masks=larger[1])


def images_of(naming: shapes.Prompt, seed: int, company: bool = False, kind: str = KIND) -> Taught:
    """The object on three backgrounds; in company it stands in the left half, and something else in the right one."""
    rng, taught = np.random.default_rng(seed), Taught([], [], [])
    for index in range(IMAGES):
        prompt = replace(naming, background=GROUNDS[index % len(GROUNDS)], place="left" if company else None)
        scene = shapes.scene_of(prompt, rng, kind)
        if company:
            scene = replace(scene, radius_px=float(rng.uniform(11, 13)), centre_px=(16 + float(rng.uniform(-1, 1)), 32))
        alone = shapes.draw(scene)
        shown = alone
        if company:
            other = shapes.Scene(COMPANY[0], scene.background, 11.0, (48 + float(rng.uniform(-1, 1)), 32), COMPANY[1])
            shown = np.concatenate([alone[:, :32], shapes.draw(other)[:, 32:]], axis=1)
        apart = np.abs(alone - np.array(shapes.BACKGROUNDS[scene.background])).max(axis=2) > 8
        wordings = prompt.wordings()
        taught.images.append(shapes.to_image(shown))
        taught.masks.append(Image.fromarray(apart.astype(np.uint8) * 255))
        taught.captions.append(wordings[index % len(wordings)])
    return taught


def write(archive: Path, taught: Taught) -> None:
    with zipfile.ZipFile(archive, "w") as packed:
        for index, (each, caption, mask) in enumerate(zip(taught.images, taught.captions, taught.masks, strict=True)):
            for name, image in ((f"{index:02d}.png", each), (f"{index:02d}.mask.png", mask)):
                with packed.open(name, "w") as file:
                    image.save(file, "png")
            packed.writestr(f"{index:02d}.txt", caption)
        for index, (image, caption) in enumerate(taught.regularisation):
            with packed.open(f"reg/{index:02d}.png", "w") as file:
                image.save(file, "png")
            packed.writestr(f"reg/{index:02d}.txt", caption)


def train(taught: Taught, seed: int, given: Mapping[str, Any]) -> tuple[LoraFile, Placeholders]:
    """Train with these inputs in place of the demo's."""
    run = set_up(taught, seed, given)
    for _ in loop.train(run):
        pass
    return final_lora(run), run.placeholders


def set_up(taught: Taught, seed: int, given: Mapping[str, Any], beside: Mapping[str, Any] = TRAINING) -> TrainState:
    """Return a run with these inputs, and others `beside` them: the demo's, if they aren't given."""
    config = TrainConfig(**{**beside, "seed": seed, **given})
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "set.zip", taught)
        extract_archive(Path(folder) / "set.zip", Path(folder) / "set")
        found = load(Path(folder) / "set", config, load_tokenizer(MODEL))
        return setup(TrainJob(config, found, MODEL, default_placement(), load_tokenizer(MODEL), read_shapes(MODEL)))


def seconds_a_step(run: TrainState, after_step: Callable[[], object] = lambda: None) -> float:
    """Train a run of `PACE_STEPS`. -> seconds of the processor, which other work beside it doesn't lengthen"""
    began = time.process_time()
    for report in loop.train(run):
        after_step()
        if report.step == PACE_WARM_UP:
            began = time.process_time()
    return (time.process_time() - began) / (PACE_STEPS - PACE_WARM_UP)


def sampled(
    components: Components, lora: LoraFile, placeholders: Placeholders, texts: Sequence[str], named: bool = False
) -> list[Image.Image]:
    """Sample under a LoRA; `named`: under the texts alone, which name what it was taught, not under the empty one."""
    moved = move_lora(lora, components.transformer, components.placement)
    detached = replace(placeholders, embeddings=tuple(each.detach() for each in placeholders.embeddings))
    with applied_loras(components.transformer, [(moved, 1.0)]) as applied:
        by_text = LorasByText(applied, frozenset({0}), frozenset()) if named else None
        return evaluate.sample_ours(components, texts, detached, loras=by_text)


def class_prompts(noun: str, count: int) -> list[evaluate.Asked]:
    """Prompts for the plain class, in all colours and on all backgrounds in turn."""
    rng, asked = np.random.default_rng(7), []
    for index in range(count):
        colour, ground = list(shapes.COLOURS)[index % 6], list(shapes.BACKGROUNDS)[index % 5]
        prompt = shapes.Prompt(noun, colour=colour, background=ground)
        asked.append(evaluate.Asked(prompt, str(rng.choice(prompt.wordings()))))
    return asked
