"""From the runs to PRESERVATION.md: what each way holds and costs, in pairs. It doesn't know how a run is made."""

from operator import itemgetter

import numpy as np

from benchmarks import PAGES
from benchmarks.experiment import (
    Run,
    by_arm,
    corrected,
    differences_table,
    markdown_table,
    mean_and_error,
    paired_differences,
)
from benchmarks.preservation import prompts as preserved_prompts
from benchmarks.preservation.run import BASE, PROMPTS
from benchmarks.preservation.ways import WAYS
from benchmarks.teaching import PACE, PACE_ROUNDS

PAGE = PAGES / "PRESERVATION.md"
REFERENCE, DEFAULT = "nothing held", "a tenth of the batches"
MEASURED = {
    "named": "object right, LoRA where it is named",
    "fidelity": "object right, LoRA always",
    "in_new_words": "of these, in new words",  # no caption names a size or a place
    "class_kept": "class kept, LoRA always",
    "others": "other shapes right, LoRA always",
}


def table(runs: list[Run]) -> str:
    """Return what each way came to, and what the object gains on training without a class word, in pairs.

    The reference is that training with its LoRA always acting. p is corrected by Holm's method over the table.
    """
    arms, paces = by_arm(runs, "ways"), by_arm(runs, PACE)
    ways = [name for name in WAYS if name in arms]
    theirs, of_reference = arms.get(REFERENCE, []), paces.get(REFERENCE, [])
    gains = {
        (name, metric): paired_differences(arms[name], theirs, itemgetter(metric), itemgetter("fidelity"))
        for name in ways
        for metric in ("named", "fidelity")
        if (name, metric) != (REFERENCE, "fidelity")
    }
    compared, rows = corrected(gains), []
    for name in ways:
        own = arms[name]
        cells = [mean_and_error([run[metric] for run in own]) for metric in MEASURED]
        cells += [compared.get((name, metric), "–") for metric in ("named", "fidelity")]
        ratios = paired_differences(paces.get(name, []), of_reference, lambda run: np.log(run["seconds_a_step"]))
        times = f"{np.exp(np.mean(ratios)):.2f}" if ratios else "–"
        rows.append([name, *cells, times, str(len(own))])
    against = ["named, against no class word", "always, against no class word", "seconds a step, against none", "runs"]
    return markdown_table(["", *MEASURED.values(), *against], rows)


def default_table(runs: list[Run]) -> str:
    """Return what the default gains on each other way, metric by metric, in pairs."""
    arms = by_arm(runs, "ways")
    rows = {
        name: {
            what: paired_differences(arms.get(DEFAULT, []), arms[name], itemgetter(metric))
            for metric, what in MEASURED.items()
        }
        for name in WAYS
        if name in arms and name != DEFAULT
    }
    return differences_table("", rows)


def write_page(runs: list[Run]) -> None:
    """Write PRESERVATION.md."""
    said = "\n".join(f"- {name}: {WAYS[name].about}" for name in WAYS if name in by_arm(runs, "ways"))
    of_base = np.mean([run["class_kept"] for run in runs if run["group"] == BASE] or [np.nan])
    trainings = sum(run["group"] not in (BASE, PACE) for run in runs)
    PAGE.write_text(
        "# How to hold a class\n\n"
        f"{trainings} trainings, written by `python -m benchmarks.preservation`. An object is taught as `<zwx> "
        f"square`, `<zwx> circle` or `<zwx> ring`. Mean ± standard error over objects and seeds, {PROMPTS} prompts "
        "of each kind a training; differences are paired by object and seed, p is of a two-sided sign-flip test and "
        "corrected by Holm's method over the table. No caption names a size or a place, and 45 % of the prompts do: "
        "those are the new words. `LoRA where it is named` is what prediction does for a LoRA with a class word "
        f"(`lora_acts`): the class alone is then the base model's, which is right for {of_base:.1%} of these prompts. "
        f"Seconds are of {PACE_ROUNDS} short trainings of each way, one after the other on one machine.\n\n"
        f"{table(runs)}\n\n{said}\n\n"
        "## The default against each other way\n\n"
        f"`{DEFAULT}` minus the way of the row, in pairs, corrected over this table.\n\n{default_table(runs)}\n\n"
        "## preserve_prompts\n\n"
        "A style in two inks is taught over the whole image, by the word ohwx. What is held is "
        f"{preserved_prompts.HELD} prompts of shapes, none of them among the {PROMPTS} that are measured.\n\n"
        f"{preserved_prompts.table(runs)}\n"
    )
