"""What masks and class preservation are worth, measured on the small model: python -m benchmarks.dataset_inputs

Masks: a house that always had a red cross beside it, of which no caption speaks. How often does the cross come along?
Class: a house taught as `<zwx> square`, which is how users write "a photo of <zwx> person". How many plain squares are
still squares? Each line is the mean of three seeds; the exact scorer reads the images.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.teaching import KIND, class_prompts, images_of, sampled, train
from examples import evaluate, scorer, shapes
from examples.demo import MODEL, TOKEN
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement

SEEDS, PROMPTS, CLASS = 3, 60, "square"


def masks(components: Components, seed: int, given: Mapping[str, Any]) -> dict[str, float]:
    naming = shapes.Prompt(TOKEN, place="left")
    lora, placeholders = train(images_of(naming, seed, company=True), seed, given)
    grounds = [list(shapes.BACKGROUNDS)[index % 5] for index in range(PROMPTS)]
    texts = [replace(naming, background=ground).wordings()[index % 4] for index, ground in enumerate(grounds)]
    houses, others = [], []
    for each in sampled(components, lora, placeholders, texts):
        pixels = np.array(each, float)
        ground = np.median(pixels[:3].reshape(-1, 3), axis=0)
        others.append(has_company(pixels, ground))
        pixels[:, 32:] = ground
        houses.append(scorer.read(pixels).kind == KIND)
    return {"house on the left": float(np.mean(houses)), "something on the right": float(np.mean(others))}


def has_company(each: np.ndarray, ground: np.ndarray) -> bool:
    """Whether at least a twentieth of the image's right half isn't the ground."""
    return bool((np.abs(each[:, 34:] - ground).max(axis=2) > 40).mean() > 0.05)


def images_of_the_class(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """Plain squares in all colours, as one has them of a class, each with a caption that says what it shows."""
    rng, found = np.random.default_rng(1000 + seed), []
    for index in range(count):
        colour, ground = list(shapes.COLOURS)[index % 6], list(shapes.BACKGROUNDS)[index % 5]
        prompt = shapes.Prompt(CLASS, colour=colour, background=ground)
        found.append((shapes.to_image(shapes.draw(shapes.scene_of(prompt, rng))), str(rng.choice(prompt.wordings()))))
    return found


def classes(components: Components, seed: int, given: Mapping[str, Any]) -> dict[str, float]:
    naming, inputs = shapes.Prompt(f"{TOKEN} {CLASS}"), dict(given)
    taught = replace(
        images_of(naming, seed), regularisation=images_of_the_class(inputs.pop("images of the class", 0), seed)
    )
    lora, placeholders = train(taught, seed, inputs)
    houses = evaluate.object_prompts(naming, PROMPTS)
    others = [item for item in evaluate.held_out_prompts(2 * PROMPTS) if item.prompt.noun != CLASS][:PROMPTS]
    measured = {}
    for name, asked, kind in (
        ("<zwx> square is a house", houses, KIND),
        ("square is a square", class_prompts(CLASS, PROMPTS), None),
        ("other shapes", others, None),
    ):
        score = evaluate.score(sampled(components, lora, placeholders, [item.text for item in asked]), asked, kind)
        measured[name] = score.kind if kind else score.all_three
    return measured


QUARTER_HELD = {"class_word": CLASS, "preservation_weight": 0.25}
MEASURED = {
    "no mask": (masks, {}),
    "masks, mask_floor 0.1": (masks, {"mask_from": "file"}),
    "masks, mask_floor 0": (masks, {"mask_from": "file", "mask_floor": 0.0}),
    "no class_word": (classes, {}),
    "class_word, preservation_weight 0.25": (classes, QUARTER_HELD),
    "24 regularisation images": (classes, {"images of the class": 24}),
    "24 regularisation images, prior_loss_weight 0.5": (classes, {"images of the class": 24, "prior_loss_weight": 0.5}),
    "24 regularisation images, twice the steps": (classes, {"images of the class": 24, "steps": 1200}),
    "no class_word, twice the steps": (classes, {"steps": 1200}),
    "class_word, preservation_weight 0.25, twice the steps": (classes, {**QUARTER_HELD, "steps": 1200}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", default="", help="the lines whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second one only waits on so small a model, and disturbs what else runs
    components = load_components(MODEL, default_placement())
    for name, (measure, given) in MEASURED.items():
        if arguments.only not in name:
            continue
        runs = [measure(components, seed, given) for seed in range(arguments.seeds)]
        means = ", ".join(f"{what} {np.mean([run[what] for run in runs]):.1%}" for what in runs[0])
        print(f"{name}: {means}", flush=True)


if __name__ == "__main__":
    main()
