"""From the experiment's runs to ZERO_PRIOR.md: tables, paired tests, one figure and a contact sheet.

It doesn't know how a run is made.
"""

import datetime
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

from benchmarks.experiment import (
    Run,
    at_value,
    by_arm,
    difference_and_p,
    differences_table,
    markdown_table,
    mean_and_error,
    paired_differences,
)
from examples import demo

mpl.use("agg")
from matplotlib import pyplot as plt

MATCHED_FIDELITY = 0.7
REFERENCE = "fresh token, trained"
AT_THE_END = ("fidelity", "background", "leakage", "intrusion", "base_accuracy", "prior_meaning", "drift")
AT_MATCHED = ("step", "background", "leakage", "intrusion", "base_accuracy", "prior_meaning", "drift")


# --- statistics -----------------------------------------------------------------------------------------------------


def at_fidelity(points: Sequence[dict[str, float]], metric: str, fidelity: float = MATCHED_FIDELITY) -> float | None:
    """A metric where the run first reaches a fidelity; None if it never does."""
    return at_value(points, metric, "fidelity", fidelity)


# --- tables ---------------------------------------------------------------------------------------------------------


def end_table(arms: dict[str, list[Run]]) -> str:
    rows = []
    for arm, runs in arms.items():
        values = [[run["points"][-1][metric] for run in runs] for metric in AT_THE_END]
        shares = [run["points"][-1]["row_share"] for run in runs if run["points"][-1]["row_share"] is not None]
        rows.append([arm, *map(mean_and_error, values), mean_and_error(shares), str(len(runs))])
    return markdown_table(
        ["", *(name.replace("_", " ") for name in AT_THE_END), "embedding / median word", "runs"], rows
    )


def matched_table(arms: dict[str, list[Run]]) -> str:
    rows = []
    for arm, runs in arms.items():
        values = [[at_fidelity(run["points"], metric) for run in runs] for metric in AT_MATCHED]
        reached = [[value for value in column if value is not None] for column in values]
        rows.append([arm, *map(mean_and_error, reached), f"{len(reached[0])} of {len(runs)}"])
    return markdown_table(["", *(name.replace("_", " ") for name in AT_MATCHED), "reached by"], rows)


def paired_table(arms: dict[str, list[Run]], reference: list[Run]) -> str:
    """Each arm minus the trained fresh token, with p."""
    measured: dict[str, Callable[[Run], float | None]] = {
        "fidelity at the end": lambda run: run["points"][-1]["fidelity"],
        "leakage at the end": lambda run: run["points"][-1]["leakage"],
        "base accuracy at the end": lambda run: run["points"][-1]["base_accuracy"],
        "base accuracy, matched": lambda run: at_fidelity(run["points"], "base_accuracy"),
        "leakage, matched": lambda run: at_fidelity(run["points"], "leakage"),
        "drift, matched": lambda run: at_fidelity(run["points"], "drift"),
    }
    rows = []
    for arm, runs in arms.items():
        cells = []
        for value in measured.values():
            differences = paired_differences(runs, reference, value)
            cells.append(difference_and_p(differences))
        rows.append([arm, *cells])
    return markdown_table(["minus the trained fresh token", *measured], rows)


def as_pairs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the arms above as settings of the last table: each with its frozen and its trained embedding."""
    arms, remedies = by_arm(runs, "arms"), by_arm(runs, "remedies")
    frozen, after = arms.get("fresh token, frozen", []), "trained after a tenth"
    return {
        "as above, frozen": frozen,
        "as above, trained": arms.get("fresh token, trained", []),
        f"{after}, frozen": frozen,
        f"{after}, trained": remedies.get(after, []),
    }


def pays_table(arms: dict[str, list[Run]]) -> str:
    """Each setting's trained embedding minus its frozen one, with p corrected over the table."""
    measured: dict[str, Callable[[Run], float | None]] = {
        "fidelity at the end": lambda run: run["points"][-1]["fidelity"],
        "base accuracy at the end": lambda run: run["points"][-1]["base_accuracy"],
        "steps, matched": lambda run: at_fidelity(run["points"], "step"),
        "base accuracy, matched": lambda run: at_fidelity(run["points"], "base_accuracy"),
    }
    settings = [name.removesuffix(", trained") for name in arms if name.endswith(", trained")]
    rows = {
        name: {
            what: paired_differences(arms[f"{name}, trained"], arms[f"{name}, frozen"], value)
            for what, value in measured.items()
        }
        for name in settings
    }
    return differences_table("trained minus frozen", rows)


# --- images -------------------------------------------------------------------------------------------------------


def draw_figure(arms: dict[str, list[Run]], path: Path) -> None:
    """Leakage against fidelity, a line per arm from the first step to the last: down and right is better."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=110)
    for arm, runs in arms.items():
        fidelity, leakage = (
            np.mean([[point[metric] for point in run["points"]] for run in runs], axis=0)
            for metric in ("fidelity", "leakage")
        )
        axes.plot(fidelity, leakage, marker="o", markersize=4, label=arm, linewidth=2.4 if arm == REFERENCE else 1.4)
    axes.set_xlabel("fidelity: the trigger draws the taught object")
    axes.set_ylabel("leakage: it draws what the model knew before")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_sheet(arms: dict[str, list[Run]], folder: Path, path: Path) -> None:
    """Images of the trigger at the end of the first seed's runs, a row per arm and object."""
    rows = []
    for arm, runs in arms.items():
        for run in (run for run in runs if run["seed"] == 0):
            stem = f"{run['group']}-{arm}-{run['kind']}-0".replace(" ", "_").replace(",", "")
            images = [Image.open(file) for file in sorted(folder.glob(f"{stem}-?.png"))]
            rows.append(demo.Row(f"{run['kind']}: {arm}", [(image, "") for image in images]))
    rows = [row for row in sorted(rows, key=lambda row: row.heading) if row.images]
    if rows:
        sheet = demo.contact_sheet(rows)
        sheet.resize((sheet.width // 2, sheet.height // 2)).save(path)


# --- the page -------------------------------------------------------------------------------------------------------


def write(runs: list[Run], folder: Path, target: Path) -> Path:
    """ZERO_PRIOR.md, zero_prior.png and zero_prior_sheet.png in `target`."""
    arms = by_arm(runs, "arms")
    draw_figure(arms, target / "zero_prior.png")
    draw_sheet(arms, folder, target / "zero_prior_sheet.png")
    reference = arms.get(REFERENCE, [])
    seconds = sum(run["seconds"] for run in runs)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "peft"))
    page = [
        "# What the zero-prior token is worth on the small model",
        f"{len(runs)} runs, {seconds / 3600:.1f} hours of one core in all, {datetime.date.today()}, {versions}, "
        f"{os.cpu_count()} cores of a CPU. Written by `python -m benchmarks.zero_prior`; mean ± standard error over "
        "objects and seeds. What is measured is said in `zero_prior/run.py`.",
        "![leakage against fidelity](zero_prior.png)",
        "## At the end of training",
        end_table(arms),
        f"## Where a run first reaches a fidelity of {MATCHED_FIDELITY}",
        matched_table(arms),
        "## Paired differences",
        "Paired by object and seed; p of a two-sided sign-flip test, not corrected for the number of comparisons.",
        paired_table(arms, reference),
    ]
    for group, title in (
        ("sweep", "The embedding's rate and its first size"),
        ("remedies", "Remedies for the trained embedding"),
    ):
        if found := by_arm(runs, group):
            page += [f"## {title}", end_table(found), matched_table(found), paired_table(found, reference)]
    if found := by_arm(runs, "pays"):
        found = {**as_pairs(runs), **found}
        page += [
            "## When training the embedding pays",
            "Paired by object and seed; p of a two-sided sign-flip test, corrected by Holm's method over this table.",
            pays_table(found),
            end_table(found),
        ]
    page += ["## Images of the first seed", "![images](zero_prior_sheet.png)"]
    path = target / "ZERO_PRIOR.md"
    path.write_text("\n\n".join(page) + "\n")
    return path
