"""How to hold a class while an object of it is taught: ways of doing so, compared on the small model.

    python -m benchmarks.preservation                  # all ways, three objects, 8 paired seeds; resumes
    python -m benchmarks.preservation --seeds 2 --ways "nothing held" "a quarter of the batches"
    python -m benchmarks.preservation --report         # only write PRESERVATION.md from the runs there are

An object is taught as `<zwx> square`, the way users write `a photo of <zwx> person`. Is it there, are plain squares
still squares, and are other shapes what they were?
"""

from pathlib import Path

from benchmarks import experiment
from benchmarks.experiment import Spec
from benchmarks.preservation import prompts as preserved_prompts
from benchmarks.preservation.report import table, write_page
from benchmarks.preservation.run import BASE, run_way
from benchmarks.preservation.ways import CLASSES, WAYS
from benchmarks.subjects import STYLE
from benchmarks.teaching import PACE, PACE_ROUNDS

WORK = Path("build/preservation")
KEPT = Path(__file__).parent / "runs.jsonl"


def main() -> None:
    parser = experiment.parser_of(str(__package__), __doc__)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--objects", nargs="+", choices=list(CLASSES), default=list(CLASSES))
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
    specs += [Spec(PACE, way, given.objects[0], turn) for turn in range(PACE_ROUNDS) for way in given.ways]
    runs = experiment.gather([] if given.report else specs, WORK, KEPT, run_way, given.processes)
    write_page(runs)
    print(table(runs))


if __name__ == "__main__":
    main()
