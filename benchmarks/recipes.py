"""Steps and seconds until something is learned: our default against the peers' defaults, on the small model.

    python -m benchmarks.recipes                       # all recipes, three objects and a style, 8 seeds; resumes
    python -m benchmarks.recipes --groups recipes --seeds 2 --subjects house
    python -m benchmarks.recipes --report              # only write RECIPES.md from the runs there are

A recipe is a set of inputs, run by this package's own training: what differs is its numbers, not its code. Moves are
changes to one of ours, one at a time. A run ends when the subject is there in nine of ten images, twice in a row, or
after so many steps.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import experiment
from benchmarks.experiment import (
    Run,
    Spec,
    at_value,
    by_arm,
    corrected,
    differences_table,
    markdown_table,
    mean_and_error,
    paired_differences,
)
from benchmarks.moves import BASE_NAME, MOVES, Move
from benchmarks.peers import RECIPES, STYLES, Recipe
from benchmarks.subjects import STYLE, SUBJECTS
from benchmarks.teaching import set_up
from examples import evaluate, shapes
from examples.demo import MODEL, TOKEN
from lora_utils.lora.hooks import applied_loras, move_lora
from lora_utils.model.components import Components, load_components
from lora_utils.model.device import default_placement
from lora_utils.sampling.sampler import LorasByText
from lora_utils.training import loop
from lora_utils.training.state import TrainState, current_lora

WORK = Path("build/recipes")
KEPT = Path(__file__).parent / "recipes_runs.jsonl"
PAGE = Path(__file__).parent / "RECIPES.md"
RARE_WORD = "ohwx"  # no caption of the small model's pretraining holds any of its tokens
FIDELITY, EARLY = 0.9, 300
OURS_BY_CHANGE = ("ours until 2026-11-28", "ours", "ours, where it is named", "ours, by a token, where it is named")
GROUPS: dict[str, dict[str, Recipe]] = {"recipes": RECIPES, "moves": MOVES, "styles": STYLES}


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run may be, and when and on how many prompts it is measured."""

    steps: int = 1000  # what Replicate, fal and this package train for by default
    measured_at: tuple[int, ...] = (25, 50, 75, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000)
    prompts: int = 20
    sampling_steps: int = 10


LENGTHS = {"styles": Length(2000, (100, 200, 300, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000), prompts=40)}


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
    """Train by a recipe, with the seed's images, and measure on the way: as long as the group's are, by default."""
    recipe, length = GROUPS[spec.group][spec.arm], length or LENGTHS.get(spec.group, Length())
    given = {**recipe.given, "steps": length.steps}
    trigger = TOKEN if given.get("train_placeholder_token") else RARE_WORD
    taught, side = SUBJECTS[spec.kind].images(trigger, spec.seed), str(shapes.SIDE_PX)
    run = set_up(taught, spec.seed, given, {"resolution": side})
    if isinstance(recipe, Move) and recipe.changed:
        recipe.changed(run)
    points = [{"step": 0, "seconds": 0.0, "fidelity": 0.0}]
    seconds, began = 0.0, time.process_time()
    for report in loop.train(run):
        if report.step in length.measured_at:
            seconds += time.process_time() - began
            points.append(
                {"step": report.step, "seconds": seconds, **measure(run, spec.kind, trigger, length, recipe.named)}
            )
            if min(point["fidelity"] for point in points[-2:]) >= FIDELITY:
                break
            began = time.process_time()
    return {"points": points, "seconds": seconds}


def reached(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the measurement at which a run has the fidelity and the one before it; none where it never has it.

    It has it where the next measurement does too, or where it has no next one.
    """
    for index, point in enumerate(points):
        if min(each["fidelity"] for each in points[index : index + 2]) >= FIDELITY:
            return [points[index - 1], point]
    return []


def needed(run: Run, metric: str = "step") -> float:
    """Return the steps or seconds at which a run has the fidelity, and all that it took where it never has it."""
    around = reached(run["points"])
    found = at_value(around, metric, "fidelity", FIDELITY) if around else None
    return run["points"][-1][metric] if found is None else found


def fidelity_at(run: Run, steps: int) -> float:
    """Return the fidelity after so many steps, and a run's last one where it needed fewer."""
    return [point["fidelity"] for point in run["points"] if point["step"] <= steps][-1]


def early_fidelity(run: Run) -> float:
    """Return the fidelity at `EARLY` steps."""
    return fidelity_at(run, EARLY)


def best_fidelity(run: Run) -> float:
    """Return the highest fidelity that was measured."""
    return max(point["fidelity"] for point in run["points"])


def others_right(run: Run) -> float:
    """Return the share of other prompts that are right where a run has the fidelity, and else at its end."""
    return (reached(run["points"]) or run["points"])[-1]["base_accuracy"]


def table(runs: Sequence[Run], group: str = "recipes", against: str = "") -> str:
    """Return what each recipe of a group needs to reach the fidelity, in pairs with the one that it's held `against`.

    p is of a sign-flip test of the steps and corrected by Holm's method over the table.
    """
    found = by_arm(runs, group)
    arms = {name: found[name] for name in (BASE_NAME, *GROUPS[group]) if name in found}
    fewer = {name: by for name, own in arms.items() if (by := paired_differences(own, arms.get(against, []), needed))}
    fewer.pop(against, None)
    compared, rows = corrected(fewer), []
    for name, own in arms.items():
        cells = [mean_and_error([needed(run, metric) for run in own]) for metric in ("step", "seconds")]
        cells.append(mean_and_error([others_right(run) for run in own]))
        cells.append(mean_and_error([early_fidelity(run) for run in own]))
        cells.append(mean_and_error([best_fidelity(run) for run in own]))
        share = f"{sum(bool(reached(run['points'])) for run in own)} of {len(own)}"
        rows.append([name, share, *cells, compared.get(name, "–")])
    measured = ["steps", "seconds", "other prompts right there", f"fidelity at {EARLY} steps", "best fidelity"]
    return markdown_table(["", "reached by", *measured, f"steps against {against or 'none'}"], rows)


def ours_table(runs: Sequence[Run]) -> str:
    """Return what each of our recipes gains on the one before it, in pairs."""
    arms = by_arm(runs, "recipes")
    measured = {"steps": needed, f"fidelity at {EARLY} steps": early_fidelity, "other prompts right": others_right}
    rows = {
        f"{name}, minus {before}": {
            what: paired_differences(arms[name], arms[before], value) for what, value in measured.items()
        }
        for before, name in pairwise(name for name in OURS_BY_CHANGE if name in arms)
    }
    return differences_table("", rows)


def rates_table(runs: Sequence[Run]) -> str:
    """Return what the higher rate of a style gains on the lower one, in pairs."""
    low, high = (by_arm(runs, "styles").get(name, []) for name in STYLES)
    steps = LENGTHS["styles"].steps
    half, whole = (partial(fidelity_at, steps=count) for count in (steps // 2, steps))
    gained = {
        f"fidelity after {steps // 2} steps": paired_differences(high, low, half),
        f"after {steps // 2}, minus after {steps}": paired_differences(high, low, half, whole),
        "best fidelity": paired_differences(high, low, best_fidelity),
        "other prompts right": paired_differences(high, low, others_right),
    }
    return differences_table("", {" minus ".join(reversed(list(STYLES))): gained})


def best_peer(runs: Sequence[Run]) -> str:
    """Return the recipe, not one of ours, that needs the fewest steps."""
    peers = {name: own for name, own in by_arm(runs, "recipes").items() if not name.startswith("ours")}
    return min(peers, key=lambda name: np.mean([needed(run) for run in peers[name]]), default="")


def moves_and_base(runs: Sequence[Run]) -> list[Run]:
    """Return the moves' runs, and as one more move those of what they change, of the same subjects and seeds."""
    moved = [run for run in runs if run["group"] == "moves"]
    seeds = {(run["kind"], run["seed"]) for run in moved}
    base = [run for run in runs if run["arm"] == BASE_NAME and (run["kind"], run["seed"]) in seeds]
    return [{**run, "group": "moves"} for run in base] + moved


def write_page(runs: Sequence[Run]) -> None:
    """Write RECIPES.md: a table for all subjects, one for each, and the sources."""
    objects, styled = ([run for run in runs if (run["kind"] == STYLE) == is_style] for is_style in (False, True))
    hours, peer = sum(run["seconds"] for run in runs) / 3600, best_peer(objects)
    parts = [
        "# Which recipe teaches how fast",
        f"{len(runs)} trainings, {hours:.1f} hours of one core, written by `python -m benchmarks.recipes`. Mean ± "
        f"standard error over subjects and seeds. A run has learned its subject where {FIDELITY:.0%} of "
        f"{Length().prompts} images show it, twice in a row or at the last step; steps, seconds "
        "and other prompts are of that moment. A run that never has learned it "
        f"counts with its {Length().steps} steps.",
        "## The three objects",
        table(objects, "recipes", peer),
        "## Ours against each other",
        "The three objects, in pairs; p corrected over this table.",
        ours_table(objects),
    ]
    for subject in SUBJECTS:
        if own := [run for run in runs if run["group"] == "recipes" and run["kind"] == subject]:
            parts += [f"## {subject}", table(own, "recipes", peer)]
    for what, own in {"the three objects": objects, "the style": styled}.items():
        if any(run["group"] == "moves" for run in own):
            parts += [
                f"## What moves it: {what}",
                f"Changes to `{BASE_NAME}`, one at a time.",
                table(moves_and_base(own), "moves", BASE_NAME),
            ]
    if goals := [run for run in runs if run["group"] == "styles"]:
        length = LENGTHS["styles"]
        what = f"The style again, over {length.steps} steps, by {length.prompts} prompts."
        parts += ["## Rates of a style", what, table(goals, "styles", next(iter(STYLES))), rates_table(goals)]
    parts.append("## Sources")
    for name, recipe in RECIPES.items():
        differs = f" Not carried over: {recipe.differs}." if recipe.differs else ""
        parts.append(f"- {name}: {recipe.source}.{differs}")
    PAGE.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=[""], help="the recipes whose name holds one of these")
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args()
    # Seed by seed, so that what is there after an interruption is paired.
    specs = [
        Spec(group, recipe, subject, seed)
        for group in given.groups
        for seed in range(given.seeds)
        for subject in given.subjects
        if group != "styles" or subject == STYLE
        for recipe in GROUPS[group]
        if any(part in recipe for part in given.only)
    ]
    runs = experiment.gather([] if given.report else specs, WORK, KEPT, run_recipe, given.processes)
    write_page(runs)
    print("\n\n".join(table(runs, group) for group in given.groups))


if __name__ == "__main__":
    main()
