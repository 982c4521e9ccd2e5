"""What a LoRA teaches the small editing model: python -m benchmarks.editing

A golden frame, which no image of the model's world has, and a house, which it can't draw, are taught from twenty pairs.
How often is the edit right, how often is all else kept, and are the edits that the model knows as good as before?
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples import demo_edit, evaluate_edit
from examples.demo_edit import (
    FRAME,
    KEPT,
    LONGER_FRAME,
    LONGER_SUBJECT,
    OBJECT,
    REPLACE,
    SUBJECT,
    TOKEN,
    WITH_TOKEN,
    Pair,
    framed,
    replaced,
)
from examples.evaluate_edit import Asked, EditScores
from examples.shapes import Scene
from lora_utils.lora.weights import Weights, load_weights
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement

SEEDS, SCENES, OTHERS = 2, 40, 60
TARGETS_ALONE: dict[str, Any] = {"control_dropout": 1.0}


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is taught: how targets are made, how they are prompted, and how a result is read."""

    edited: Callable[[Scene], Image.Image]
    right: Callable[[Image.Image], bool]
    kept: Callable[[Image.Image, Scene], bool]
    prompt: str
    given: dict[str, Any] = field(default_factory=dict)


def _frame(**given: Any) -> Lesson:
    return Lesson(framed, demo_edit.has_frame, demo_edit.keeps_inside, FRAME, given)


def _house(name: str, **given: Any) -> Lesson:
    prompt = REPLACE.replace(TOKEN, name)
    return Lesson(replaced, demo_edit.shows_object, demo_edit.keeps_scene, prompt, {**SUBJECT, **given})


LESSONS = {
    "a golden frame": _frame(),
    "the same with preserve_prompts": _frame(**KEPT),
    "the same with preserve_prompts, 800 steps": _frame(**KEPT, **LONGER_FRAME),
    "the same, targets alone": _frame(**TARGETS_ALONE),
    f"a house as {TOKEN}": _house(TOKEN, **WITH_TOKEN),
    f"a house as {TOKEN} with preserve_prompts": _house(TOKEN, **WITH_TOKEN, **KEPT),
    f"a house as {TOKEN} with preserve_prompts, 1500 steps": _house(TOKEN, **WITH_TOKEN, **KEPT, **LONGER_SUBJECT),
    f"a house as `{OBJECT}`": _house(f"a {OBJECT}"),
    "a house as `TOK`": _house("TOK"),
    f"a house as {TOKEN}, targets alone": _house(TOKEN, **WITH_TOKEN, **TARGETS_ALONE),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Shares, 0 to 1."""

    right: float
    kept: float
    others: EditScores


def measure(components: Components, lesson: Lesson, weights: Weights | None, others: Sequence[Any]) -> Measured:
    """Edit scenes that no training has seen, and edits that the model knows."""
    pairs: list[Pair] = demo_edit.make_pairs(lesson.edited, SCENES, seed=21)
    asked = [Asked(lesson.prompt, (pair.before,)) for pair in pairs]
    images = evaluate_edit.edit_ours(components, asked, weights)
    right = [lesson.right(image) for image in images]
    kept = [lesson.kept(image, pair.scene) for image, pair in zip(images, pairs, strict=True)]
    known = evaluate_edit.score(evaluate_edit.edit_ours(components, others, weights), others)
    return Measured(float(np.mean(right)), float(np.mean(kept)), known)


def _row(name: str, runs: Sequence[Measured], seconds: Sequence[float]) -> str:
    cells = [
        f"{np.mean(values):.0%}"
        for values in (
            [run.right for run in runs],
            [run.kept for run in runs],
            [run.others.changed for run in runs],
            [run.others.kept for run in runs],
        )
    ]
    return (
        f"| {name} | {' | '.join(cells)} | {np.mean(seconds):.0f} |"
        if seconds
        else f"| {name} | {' | '.join(cells)} | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", default="", help="the lines whose name holds this")
    arguments = parser.parse_args()
    os.environ["BASE_MODEL"] = str(demo_edit.MODEL)
    demo_edit.OUT.mkdir(exist_ok=True)
    components = load_components(demo_edit.MODEL, default_placement())
    others = evaluate_edit.held_out_edits(OTHERS)
    print(
        "| | edit right | rest kept | other edits right | their rest kept | s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, lesson in LESSONS.items():
        if arguments.only not in name:
            continue
        runs, seconds = [], []
        for seed in range(arguments.seeds):
            began = time.monotonic()
            pairs = demo_edit.make_pairs(lesson.edited, demo_edit.PAIRS, seed=seed + 1)
            path: Path = demo_edit.teach("measured", pairs, lesson.prompt, **{**lesson.given, "seed": seed})
            seconds.append(time.monotonic() - began)
            runs.append(measure(components, lesson, load_weights(path, components), others))
        print(_row(name, runs, seconds), flush=True)
    for name, lesson in (
        ("base model, asked for the frame", _frame()),
        ("base model, asked for the house", _house("a house")),
    ):
        print(_row(name, [measure(components, lesson, None, others)], []), flush=True)


if __name__ == "__main__":
    main()
