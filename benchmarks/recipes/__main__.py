"""Steps and seconds until something is learned: our default against the peers' defaults, on the small model.

    python -m benchmarks.recipes                       # all recipes, three objects and a style, 8 seeds; resumes
    python -m benchmarks.recipes --groups recipes --seeds 2 --subjects house
    python -m benchmarks.recipes --report              # only write RECIPES.md from the runs there are

A recipe is a set of inputs, run by this package's own training: what differs is its numbers, not its code. Moves are
changes to one of ours, one at a time. A run ends when the subject is there in nine of ten images, twice in a row, or
after so many steps.
"""

from pathlib import Path

from benchmarks import experiment
from benchmarks.experiment import Spec
from benchmarks.recipes.report import table, write_page
from benchmarks.recipes.run import GROUPS, run_recipe
from benchmarks.subjects import STYLE, SUBJECTS
from benchmarks.teaching import PACE, PACE_ROUNDS

WORK = Path("build/recipes")
KEPT = Path(__file__).parent / "runs.jsonl"


def main() -> None:
    parser = experiment.parser_of(str(__package__), __doc__)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=[""], help="the recipes whose name holds one of these")
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    given = parser.parse_args()
    # Seed by seed, so that what is there after an interruption is paired.
    specs = [
        Spec(group, recipe, subject, seed)
        for group in given.groups
        for seed in range(PACE_ROUNDS if group == PACE else given.seeds)
        for subject in (given.subjects[:1] if group == PACE else given.subjects)
        if group != "styles" or subject == STYLE
        for recipe in GROUPS[group]
        if any(part in recipe for part in given.only)
    ]
    runs = experiment.gather([] if given.report else specs, WORK, KEPT, run_recipe, given.processes)
    write_page(runs)
    print("\n\n".join(table(runs, group) for group in given.groups if group != PACE))


if __name__ == "__main__":
    main()
