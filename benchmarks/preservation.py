"""How to hold a class while an object of it is taught: ways of doing so, compared on the small model.

    python -m benchmarks.preservation                  # all ways, three objects, 8 paired seeds; resumes
    python -m benchmarks.preservation --seeds 2 --ways "nothing held" "held, a quarter of the batches"
    python -m benchmarks.preservation --report         # only write PRESERVATION.md from the runs there are

An object is taught as `<zwx> square`, the way users write `a photo of <zwx> person`. Is it there, are plain squares
still squares, and are other shapes what they were?
"""

import argparse
import os
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import experiment, preserved_prompts
from benchmarks.experiment import (
    Run,
    Spec,
    by_arm,
    corrected,
    differences_table,
    markdown_table,
    mean_and_error,
    paired_differences,
)
from benchmarks.preservation_changes import Bench
from benchmarks.preservation_ways import CLASSES, WAYS
from benchmarks.subjects import STYLE
from benchmarks.teaching import class_prompts, images_of, sampled, set_up, trained_seconds
from examples import evaluate, shapes
from examples.demo import MODEL, TOKEN
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.training.state import final_lora

WORK = Path("build/preservation")
KEPT = Path(__file__).parent / "preservation_runs.jsonl"
PAGE = Path(__file__).parent / "PRESERVATION.md"
PROMPTS = 40
REFERENCE, DEFAULT = "nothing held", "a tenth of the batches"
BASE = "base"  # the group of the model as it is, whose only arm has no LoRA
MEASURED = {
    "named": "object right, LoRA where it is named",
    "fidelity": "object right, LoRA always",
    "in_new_words": "of these, in new words",  # no caption names a size or a place
    "class_kept": "class kept, LoRA always",
    "others": "other shapes right, LoRA always",
}


@lru_cache(maxsize=1)
def _bench() -> Bench:
    return Bench(load_components(MODEL, default_placement()))


def run_way(spec: Spec, steps: int | None = None, prompts: int = PROMPTS) -> Run:
    """Train in one way, with the seed's images, order and noise, and measure."""
    if spec.group == preserved_prompts.GROUP:
        return preserved_prompts.run_style(_bench().components, spec, steps, prompts)
    bench, noun = _bench(), CLASSES[spec.kind]
    plain = class_prompts(noun, prompts)
    if spec.group == BASE:
        images = evaluate.sample_ours(bench.components, [item.text for item in plain], no_placeholders())
        return {"seconds": 0.0, "class_kept": evaluate.score(images, plain).all_three}
    way = WAYS[spec.arm]
    told = shapes.Prompt(f"{TOKEN} {noun}")
    given = {**way.given, **({"class_word": noun} if way.holds else {}), **({"steps": steps} if steps else {})}
    run = set_up(images_of(told, spec.seed, kind=spec.kind), spec.seed, given)
    with way.applied(bench, run, noun, spec.seed) as after_step:
        seconds = trained_seconds(run, after_step)
    lora, placeholders = final_lora(run), run.placeholders

    def shown(asked: Sequence[evaluate.Asked], named: bool = False) -> list[Image.Image]:
        return sampled(bench.components, lora, placeholders, [item.text for item in asked], named)

    objects = evaluate.object_prompts(told, prompts)
    others = [item for item in evaluate.held_out_prompts(2 * prompts) if item.prompt.noun != noun][: prompts // 2]
    images = shown(objects)
    new = [index for index, item in enumerate(objects) if says_new_words(item.prompt)]
    in_new = [images[index] for index in new], [objects[index] for index in new]
    return {
        "seconds": seconds,
        "named": evaluate.score(shown(objects, named=True), objects, spec.kind).kind,
        "fidelity": evaluate.score(images, objects, spec.kind).kind,
        "in_new_words": evaluate.score(*in_new, spec.kind).kind,
        "class_kept": evaluate.score(shown(plain), plain).all_three,
        "others": evaluate.score(shown(others), others).all_three,
    }


def says_new_words(prompt: shapes.Prompt) -> bool:
    """Return whether a prompt names what no caption here does: a size or a place."""
    return bool(prompt.size or prompt.place)


def table(runs: list[Run]) -> str:
    """Return what each way came to, and what the object gains on training without a class word, in pairs.

    The reference is that training with its LoRA always acting. p is corrected by Holm's method over the table.
    """
    arms = by_arm(runs, "ways")
    ways = [name for name in WAYS if name in arms]
    theirs = arms.get(REFERENCE, [])
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
        ratios = paired_differences(own, theirs, lambda run: np.log(run["seconds"]))
        times = f"{np.exp(np.mean(ratios)):.2f}" if ratios else "–"
        rows.append([name, *cells, times, str(len(own))])
    against = ["named, against no class word", "always, against no class word", "seconds, against none", "runs"]
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
    hours = sum(run["seconds"] for run in runs) / 3600
    of_base = np.mean([run["class_kept"] for run in runs if run["group"] == BASE] or [np.nan])
    trainings = sum(run["group"] != BASE for run in runs)
    PAGE.write_text(
        "# How to hold a class\n\n"
        f"{trainings} trainings, {hours:.1f} hours of one core, written by `python -m benchmarks.preservation`. An "
        "object is taught as `<zwx> square`, `<zwx> circle` or `<zwx> ring`. Mean ± standard error over objects and "
        f"seeds, {PROMPTS} prompts of each kind a training; differences are paired by object and seed, p is of a "
        "two-sided sign-flip test and corrected by Holm's method over the table. No caption names a size or a "
        "place, and 45 % of the prompts do: those are the new words. `LoRA where it is named` is what "
        "prediction does for a LoRA with a class word (`lora_acts`): the class alone is then the base model's, which "
        f"is right for {of_base:.1%} of these prompts.\n\n"
        f"{table(runs)}\n\n{said}\n\n"
        "## The default against each other way\n\n"
        f"`{DEFAULT}` minus the way of the row, in pairs, corrected over this table.\n\n{default_table(runs)}\n\n"
        "## preserve_prompts\n\n"
        "A style in two inks is taught over the whole image, by the word ohwx. What is held is "
        f"{preserved_prompts.HELD} prompts of shapes, none of them among the {PROMPTS} that are measured.\n\n"
        f"{preserved_prompts.table(runs)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--objects", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args()
    # Seed by seed, so that what is there after an interruption is paired.
    specs = [
        Spec(group, way, kind, seed)
        for seed in range(given.seeds)
        for group, kinds, ways in (
            ("ways", given.objects, given.ways),
            (preserved_prompts.GROUP, [STYLE], list(preserved_prompts.SHARES)),
        )
        for kind in kinds
        for way in ways
    ] + [Spec(BASE, "no LoRA", kind, 0) for kind in given.objects]
    runs = experiment.gather([] if given.report else specs, WORK, KEPT, run_way, given.processes)
    write_page(runs)
    print(table(runs))


if __name__ == "__main__":
    main()
