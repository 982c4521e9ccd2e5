"""From the runs to RECIPES.md: what each recipe needs to reach the fidelity, in tables with paired tests.

It doesn't know how a run is made.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from benchmarks import PAGES
from benchmarks.experiment import (
    Run,
    at_value,
    by_arm,
    corrected,
    differences_table,
    markdown_table,
    mean_and_error,
    paired_differences,
)
from benchmarks.recipes.moves import base_of
from benchmarks.recipes.peers import RECIPES, STYLES
from benchmarks.recipes.run import FIDELITY, GROUPS, LENGTHS, Length
from benchmarks.subjects import STYLE, SUBJECTS
from benchmarks.teaching import PACE, PACE_ROUNDS

PAGE = PAGES / "RECIPES.md"
EARLY = 300
BASE_ROW = "unchanged"  # of a table of moves
OURS_BY_CHANGE = ("ours until 2026-11-28", "ours", "ours, where it is named", "ours, by a token, where it is named")


def reached(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the measurement at which a run has the fidelity and the one before it; none where it never has it.

    It has it where the next measurement does too, or where it has no next one.
    """
    for index, point in enumerate(points):
        if min(each["fidelity"] for each in points[index : index + 2]) >= FIDELITY:
            return [points[index - 1], point]
    return []


def needed(run: Run) -> float:
    """Return the steps at which a run has the fidelity, and all that it took where it never has it."""
    around = reached(run["points"])
    found = at_value(around, "step", "fidelity", FIDELITY) if around else None
    return run["points"][-1]["step"] if found is None else found


def paced(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with the seconds that a step of their recipe takes, and without those that measured these."""
    measured = {
        name: float(np.mean([run["seconds_a_step"] for run in own])) for name, own in by_arm(runs, PACE).items()
    }
    rest = [run for run in runs if run["group"] != PACE]
    return [{**run, "seconds_a_step": measured[run["arm"]]} if run["arm"] in measured else run for run in rest]


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


COMPARED = {"steps": needed, "best fidelity": best_fidelity}


def table(runs: Sequence[Run], group: str = "recipes", against: str = "", by: str = "steps") -> str:
    """Return what each recipe of a group needs to reach the fidelity, in pairs with the one that it's held `against`.

    `by`, of `COMPARED`, is what is compared. p is of a sign-flip test and corrected by Holm's method over the table.
    """
    found = by_arm(runs, group)
    arms = {name: found[name] for name in (BASE_ROW, *GROUPS[group]) if name in found}
    others = {name: own for name, own in arms.items() if name != against}
    pairs = {name: paired_differences(own, arms.get(against, []), COMPARED[by]) for name, own in others.items()}
    compared, rows = corrected(pairs), []
    for name, own in arms.items():
        cells = [mean_and_error([needed(run) for run in own])]
        cells.append(mean_and_error([needed(run) * run["seconds_a_step"] for run in own if "seconds_a_step" in run]))
        cells.append(mean_and_error([others_right(run) for run in own]))
        cells.append(mean_and_error([early_fidelity(run) for run in own]))
        cells.append(mean_and_error([best_fidelity(run) for run in own]))
        share = f"{sum(bool(reached(run['points'])) for run in own)} of {len(own)}"
        rows.append([name, share, *cells, compared.get(name, "–")])
    measured = ["steps", "seconds", "other prompts right there", f"fidelity at {EARLY} steps", "best fidelity"]
    return markdown_table(["", "reached by", *measured, f"{by} against {against or 'none'}"], rows)


def ours_table(runs: Sequence[Run]) -> str:
    """Return what each of our recipes gains on the one before it, and Muon on the defaults, in pairs."""
    arms = by_arm(runs, "recipes")
    pairs = [*pairwise(name for name in OURS_BY_CHANGE if name in arms)]
    pairs += [("ours", "ours, by muon")] if "ours, by muon" in arms else []
    measured = {"steps": needed, f"fidelity at {EARLY} steps": early_fidelity, "other prompts right": others_right}
    rows = {
        f"{name}, minus {before}": {
            what: paired_differences(arms[name], arms[before], value) for what, value in measured.items()
        }
        for before, name in pairs
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
    of_ours = [run for run in runs if run["group"] == "recipes" and run["arm"] == base_of(run["kind"])]
    base = [run for run in of_ours if (run["kind"], run["seed"]) in seeds]
    return [{**run, "group": "moves", "arm": BASE_ROW} for run in base] + moved


def moves_part(subjects: str, runs: Sequence[Run], by: str) -> list[str]:
    """Return the part of the page on the moves, which none has where nothing was changed yet."""
    if not (moved := moves_and_base(runs)):
        return []
    what = f"Changes to `{base_of(moved[0]['kind'])}`, one at a time."
    return [f"## What moves it: {subjects}", what, table(moved, "moves", BASE_ROW, by)]


def write_page(runs: Sequence[Run]) -> None:
    """Write RECIPES.md: a table for all subjects, one for each, and the sources."""
    runs = paced(runs)
    objects, styled = ([run for run in runs if (run["kind"] == STYLE) == is_style] for is_style in (False, True))
    peer = best_peer(objects)
    parts = [
        "# Which recipe teaches how fast",
        f"{len(runs)} trainings, written by `python -m benchmarks.recipes`. Mean ± standard error over subjects and "
        f"seeds. A run has learned its subject where {FIDELITY:.0%} of {Length().prompts} images show it, twice in a "
        "row or at the last step; steps, seconds and other prompts are of that moment. A run that never has learned "
        f"it counts with its {Length().steps} steps. Seconds are steps times the seconds of one, measured in "
        f"{PACE_ROUNDS} short trainings of each recipe, one recipe after the other; what came later was timed later. "
        "p is of pairs, by a sign-flip test, and corrected over its table.",
        "## The three objects",
        table(objects, "recipes", peer),
        "## Ours against each other",
        "The three objects, in pairs.",
        ours_table(objects),
    ]
    for subject in SUBJECTS:
        if own := [run for run in runs if run["group"] == "recipes" and run["kind"] == subject]:
            by = "best fidelity" if subject == STYLE else "steps"  # few recipes learn a style in so many steps
            parts += [f"## {subject}", table(own, "recipes", peer, by)]
    for what, own in {"the three objects": objects, "the style": styled}.items():
        parts += moves_part(what, own, "best fidelity" if own is styled else "steps")
    if goals := [run for run in runs if run["group"] == "styles"]:
        length = LENGTHS["styles"]
        what = f"The style again, over {length.steps} steps, by {length.prompts} prompts."
        parts += ["## Rates of a style", what, table(goals, "styles", next(iter(STYLES))), rates_table(goals)]
    parts.append("## Sources")
    for name, recipe in RECIPES.items():
        differs = f" Not carried over: {recipe.differs}." if recipe.differs else ""
        parts.append(f"- {name}: {recipe.source}.{differs}")
    PAGE.write_text("\n\n".join(parts) + "\n")
