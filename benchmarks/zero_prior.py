"""What the zero-prior token is worth, measured on the small model against the other ways of naming a new object.

    python -m benchmarks.zero_prior                    # all arms, three objects, 8 paired seeds; resumes
    python -m benchmarks.zero_prior --seeds 2 --groups arms --objects house
    python -m benchmarks.zero_prior --report           # only write ZERO_PRIOR.md from the runs there are

Every run is one process of one thread and leaves one file in `build/zero_prior/`; a second call runs what is missing.
What the page was written from is kept in `zero_prior_runs.jsonl`, a line per run, and isn't run again.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

from benchmarks import experiment
from benchmarks import zero_prior_report as report
from benchmarks import zero_prior_run as runs
from benchmarks.experiment import Spec
from benchmarks.zero_prior_arms import ARMS, PAYS, REMEDIES, SWEEP, Arm
from examples import demo, shapes
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement

WORK = Path("build/zero_prior")
KEPT = Path(__file__).parent / "zero_prior_runs.jsonl"
GROUPS: dict[str, dict[str, Arm]] = {"arms": ARMS, "sweep": SWEEP, "remedies": REMEDIES, "pays": PAYS}


def plan(groups: list[str], objects: list[str], seeds: int, only: Sequence[str] = ("",)) -> list[Spec]:
    """Return the runs of the arms whose name holds one of `only`.

    Seed by seed, so that what is there after an interruption is paired. The sweep takes half the seeds.
    """
    return [
        Spec(group, arm, kind, seed)
        for group in groups
        for seed in range((seeds + 1) // 2 if group == "sweep" else seeds)
        for kind in objects
        for arm in GROUPS[group]
        if any(part in arm for part in only)
    ]


def work_folder(model: Path, length: runs.Length) -> Path:
    """Runs of another model or another length don't mix."""
    weights = (model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights + json.dumps(asdict(length)).encode()).hexdigest()
    return WORK / digest[:12]


@lru_cache(maxsize=1)
def _bench_of(model: Path, length: runs.Length) -> runs.Bench:
    """Return what all runs of a process share."""
    return runs.Bench(model, load_components(model, default_placement()), length)


def _run(spec: Spec, model: Path, length: runs.Length, folder: Path) -> experiment.Run:
    record, images = runs.run_arm(_bench_of(model, length), GROUPS[spec.group][spec.arm], spec.kind, spec.seed)
    for index, image in enumerate(images if spec.seed == 0 else []):
        image.save(folder / f"{spec.name}-{index}.png")
    return record


def execute(specs: list[Spec], model: Path, length: runs.Length, processes: int) -> Path:
    """Run what has no result yet. -> the folder of the results."""
    folder = work_folder(model, length)
    experiment.unpack_kept(folder, KEPT)
    experiment.execute(specs, folder, partial(_run, model=model, length=length, folder=folder), processes)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--only", nargs="+", default=[""], help="the arms whose name holds one of these")
    parser.add_argument("--objects", nargs="+", choices=shapes.TAUGHT, default=list(shapes.TAUGHT))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    length = runs.Length()
    specs = [] if arguments.report else plan(arguments.groups, arguments.objects, arguments.seeds, arguments.only)
    folder = execute(specs, arguments.model, length, arguments.processes)
    experiment.keep(folder, KEPT)
    print(f"wrote {report.write(experiment.load(folder), folder, KEPT.parent)}")


if __name__ == "__main__":
    main()
