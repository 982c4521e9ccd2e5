"""One training by a recipe, measured as it goes.

It owns how long a run is, what is measured on the way and where it ends. It doesn't know how runs are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from benchmarks.experiment import Run, Spec
from benchmarks.recipes.moves import MOVES, Move, base_of
from benchmarks.recipes.peers import RECIPES, STYLES, Recipe
from benchmarks.subjects import SUBJECTS
from benchmarks.teaching import PACE, PACE_STEPS, seconds_a_step, set_up
from examples import evaluate, shapes
from examples.demo import MODEL, TOKEN
from lora_utils.lora.hooks import applied_loras, move_lora
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement
from lora_utils.sampling.sampler import LorasByText
from lora_utils.training import loop
from lora_utils.training.state import TrainState, current_lora

RARE_WORD = "ohwx"  # no caption of the small model's pretraining holds any of its tokens
FIDELITY = 0.9
GROUPS: dict[str, dict[str, Recipe]] = {
    "recipes": RECIPES,
    "moves": MOVES,
    "styles": STYLES,
    PACE: {**STYLES, **MOVES, **RECIPES},  # one name in two of them is one recipe
}


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run may be, and when and on how many prompts it is measured."""

    steps: int = 1000  # what Replicate, fal and this package train for by default
    measured_at: tuple[int, ...] = (25, 50, 75, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000)
    prompts: int = 20
    sampling_steps: int = 10


LENGTHS = {
    "styles": Length(2000, (100, 200, 300, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000), prompts=40),
    PACE: Length(PACE_STEPS),
}


@lru_cache(maxsize=1)
def _components() -> Components:
    return load_components(MODEL, default_placement())


def measure(run: TrainState, subject: str, trigger: str, length: Length, named: bool = False) -> dict[str, float]:
    """Sample with what a run has learned so far.

    -> shares of images: the subject is there, and, once it is in enough of them or at the end, other prompts are right.
    `named`: the LoRA acts under texts that name the subject, so not under the empty one or under other prompts.
    """
    components, lora = _components(), current_lora(run)
    placeholders = replace(run.placeholders, embeddings=tuple(each.detach() for each in run.placeholders.embeddings))
    moved = move_lora(lora, components.transformer, components.placement)

    def sampled(asked: Sequence[evaluate.Asked], scale: float = 1.0) -> list[Image.Image]:
        texts = [item.text for item in asked]
        with applied_loras(components.transformer, [(moved, scale)]) as applied:
            by_text = LorasByText(applied, frozenset({0}), frozenset()) if named else None
            return evaluate.sample_ours(components, texts, placeholders, length.sampling_steps, loras=by_text)

    taught, plain = SUBJECTS[subject].prompts(trigger, length.prompts), evaluate.held_out_prompts(length.prompts)
    shown = [SUBJECTS[subject].shows(image, item.prompt) for image, item in zip(sampled(taught), taught, strict=True)]
    measured = {"fidelity": float(np.mean(shown))}
    if measured["fidelity"] >= FIDELITY or run.step >= length.steps:
        measured["base_accuracy"] = evaluate.score(sampled(plain, 0.0 if named else 1.0), plain).all_three
    return measured


def run_recipe(spec: Spec, length: Length | None = None) -> Run:
    """Train by a recipe, with the seed's images, and measure on the way: as long as the group's are, by default.

    Of the group `PACE` only the steps are timed.
    """
    recipe, length = GROUPS[spec.group][spec.arm], length or LENGTHS.get(spec.group, Length())
    given = {**recipe.given, "steps": length.steps}
    trigger = TOKEN if given.get("train_placeholder_token") else RARE_WORD
    taught, side, named = SUBJECTS[spec.kind].images(trigger, spec.seed), str(shapes.SIDE_PX), recipe.named
    if isinstance(recipe, Move):
        taught, named = taught.enlarged(recipe.side_px), RECIPES[base_of(spec.kind)].named
    run = set_up(taught, spec.seed, given, {"resolution": side})
    if isinstance(recipe, Move) and recipe.changed:
        recipe.changed(run)
    if spec.group == PACE:
        return {"seconds_a_step": seconds_a_step(run)}
    points = [{"step": 0, "fidelity": 0.0}]
    for report in loop.train(run):
        if report.step in length.measured_at:
            points.append({"step": report.step, **measure(run, spec.kind, trigger, length, named)})
            if min(point["fidelity"] for point in points[-2:]) >= FIDELITY:
                break
    return {"points": points}
