"""Which runs the experiment has, where their results are, and how they are executed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

from benchmarks import experiment
from benchmarks.experiment import Spec
from benchmarks.zero_prior import run as runs
from benchmarks.zero_prior.arms import ARMS, PAYS, REMEDIES, SWEEP, Arm
from lora_utils.model.components import load_components
from lora_utils.model.device import default_placement

WORK = Path("build/zero_prior")
KEPT = Path(__file__).parent / "runs.jsonl"
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
