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
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import zero_prior_report as report
from benchmarks import zero_prior_run as runs
from examples import demo, shapes
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement

WORK = Path("build/zero_prior")
KEPT = Path(__file__).parent / "zero_prior_runs.jsonl"
GROUPS: dict[str, dict[str, runs.Arm]] = {"arms": runs.ARMS, "sweep": runs.SWEEP, "remedies": runs.REMEDIES}


@dataclass(frozen=True, slots=True)
class Spec:
    """One run of the plan."""

    group: str
    arm: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.group}-{self.arm}-{self.kind}-{self.seed}".replace(" ", "_").replace(",", "")


def plan(groups: list[str], objects: list[str], seeds: int) -> list[Spec]:
    """Seed by seed, so that what is there after an interruption is paired. The sweep takes half the seeds."""
    return [
        Spec(group, arm, kind, seed)
        for group in groups
        for seed in range((seeds + 1) // 2 if group == "sweep" else seeds)
        for kind in objects
        for arm in GROUPS[group]
    ]


def work_folder(model: Path, length: runs.Length) -> Path:
    """Runs of another model or another length don't mix."""
    weights = (model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    digest = hashlib.sha256(weights + json.dumps(asdict(length)).encode()).hexdigest()
    return WORK / digest[:12]


_bench: runs.Bench | None = None  # of this worker process


def _start_worker(model: Path, length: runs.Length) -> None:
    global _bench  # noqa: PLW0603 (a process pool hands its workers nothing else)
    torch.set_num_threads(1)
    _bench = runs.Bench(model, load_components(model, default_placement()), length)


def _run(spec: Spec, folder: Path) -> str:
    assert _bench is not None
    record, images = runs.run_arm(_bench, GROUPS[spec.group][spec.arm], spec.kind, spec.seed)
    for index, image in enumerate(images if spec.seed == 0 else []):
        image.save(folder / f"{spec.name}-{index}.png")
    partial = folder / f"{spec.name}.partial"
    partial.write_text(json.dumps({**asdict(spec), **record}))
    partial.replace(folder / f"{spec.name}.json")
    last = record["points"][-1]
    return f"{spec.name}: fidelity {last['fidelity']:.2f}, base {last['base_accuracy']:.2f}, {record['seconds']:.0f} s"


def execute(specs: list[Spec], model: Path, length: runs.Length, processes: int) -> Path:
    """Run what has no result yet. -> the folder of the results."""
    folder = work_folder(model, length)
    folder.mkdir(parents=True, exist_ok=True)
    unpack_kept(folder)
    missing = [spec for spec in specs if not (folder / f"{spec.name}.json").exists()]
    print(f"{len(specs)} runs, {len(missing)} to do, results in {folder}", flush=True)
    began = time.monotonic()
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(model, length)
    ) as pool:
        waiting = [pool.submit(_run, spec, folder) for spec in missing]
        for count, done in enumerate(as_completed(waiting), start=1):
            left_s = (time.monotonic() - began) / count * (len(missing) - count)
            print(f"{count}/{len(missing)} {done.result()}, {left_s / 60:.0f} min left", flush=True)
    return folder


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def keep(folder: Path) -> None:
    """All results of one model and length in one file, beside the page."""
    lines = [
        json.dumps({"of": folder.name, "name": path.stem, **json.loads(path.read_text())})
        for path in sorted(folder.glob("*.json"))
    ]
    KEPT.write_text("".join(f"{line}\n" for line in lines))


def unpack_kept(folder: Path) -> None:
    """The kept results of this model and length, where they aren't there yet."""
    for line in KEPT.read_text().splitlines() if KEPT.exists() else []:
        record = json.loads(line)
        path = folder / f"{record.pop('name')}.json"
        if record.pop("of") == folder.name and not path.exists():
            path.write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--objects", nargs="+", choices=shapes.TAUGHT, default=list(shapes.TAUGHT))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", type=Path, default=demo.MODEL)
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    length = runs.Length()
    specs = [] if arguments.report else plan(arguments.groups, arguments.objects, arguments.seeds)
    folder = execute(specs, arguments.model, length, arguments.processes)
    keep(folder)
    print(f"wrote {report.write(load(folder), folder, KEPT.parent)}")


if __name__ == "__main__":
    main()
