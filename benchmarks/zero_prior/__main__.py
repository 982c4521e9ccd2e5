"""What the zero-prior token is worth, measured on the small model against the other ways of naming a new object.

    python -m benchmarks.zero_prior                    # all arms, three objects, 8 paired seeds; resumes
    python -m benchmarks.zero_prior --seeds 2 --groups arms --objects house
    python -m benchmarks.zero_prior --report           # only write ZERO_PRIOR.md from the runs there are

Every run is one process of one thread and leaves one file in `build/zero_prior/`; a second call runs what is missing.
What the page was written from is kept in `zero_prior/runs.jsonl`, a line per run, and isn't run again.
"""

from pathlib import Path

from benchmarks import PAGES, experiment
from benchmarks.zero_prior import report
from benchmarks.zero_prior.plan import GROUPS, KEPT, execute, plan
from benchmarks.zero_prior.run import Length
from examples import demo, shapes


def main() -> None:
    parser = experiment.parser_of(str(__package__), __doc__)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=[""], help="the arms whose name holds one of these")
    parser.add_argument("--objects", nargs="+", choices=shapes.TAUGHT, default=list(shapes.TAUGHT))
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    arguments = parser.parse_args()
    length = Length()
    specs = [] if arguments.report else plan(arguments.groups, arguments.objects, arguments.seeds, arguments.only)
    folder = execute(specs, arguments.model, length, arguments.processes)
    experiment.keep(folder, KEPT)
    print(f"wrote {report.write(experiment.load(folder), folder, PAGES)}")


if __name__ == "__main__":
    main()
