"""An experiment: many runs, each in a process of one thread, resumable, and compared in pairs.

It owns the command's inputs, how runs are executed and kept, and the statistics. It doesn't know what a run does.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Run = dict[str, Any]  # the fields of its Spec, and what it measured
Key = TypeVar("Key", bound=Hashable)  # of a comparison in a table


@dataclass(frozen=True, slots=True)
class Spec:
    """One run of a plan: a way of doing something, for an object, with a seed."""

    group: str
    arm: str
    kind: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.group}-{self.arm}-{self.kind}-{self.seed}".replace(" ", "_").replace(",", "").replace("/", "")


def parser_of(package: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of an experiment's command, with the inputs that all of them have."""
    parser = argparse.ArgumentParser(
        f"python -m {package}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="only write the page from the runs there are")
    return parser


# --- runs -----------------------------------------------------------------------------------------------------------


def execute(specs: Sequence[Spec], folder: Path, run: Callable[[Spec], Run], processes: int) -> None:
    """Run what has no result in the folder yet. `run` is sent to the processes, so it must be picklable."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [spec for spec in specs if not (folder / f"{spec.name}.json").exists()]
    print(f"{len(specs)} runs, {len(missing)} to do, results in {folder}", flush=True)
    began = time.monotonic()
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = {pool.submit(run, spec): spec for spec in missing}
        for count, done in enumerate(as_completed(waiting), start=1):
            spec, left_s = waiting[done], (time.monotonic() - began) / count * (len(missing) - count)
            partial = folder / f"{spec.name}.partial"
            partial.write_text(json.dumps({**asdict(spec), **done.result()}))
            partial.replace(folder / f"{spec.name}.json")
            print(f"{count}/{len(missing)} {spec.name}, {left_s / 60:.0f} min left", flush=True)


def load(folder: Path) -> list[Run]:
    """Return the runs that have a result."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def keep(folder: Path, kept: Path) -> None:
    """Write all results of a folder into one file, a line each."""
    lines = [
        json.dumps({"of": folder.name, "name": path.stem, **json.loads(path.read_text())})
        for path in sorted(folder.glob("*.json"))
    ]
    kept.write_text("".join(f"{line}\n" for line in lines))


def unpack_kept(folder: Path, kept: Path) -> None:
    """Write the kept results of this folder's name where they aren't there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for line in kept.read_text().splitlines() if kept.exists() else []:
        record = json.loads(line)
        path = folder / f"{record.pop('name')}.json"
        if record.pop("of") == folder.name and not path.exists():
            path.write_text(json.dumps(record))


def gather(specs: Sequence[Spec], folder: Path, kept: Path, run: Callable[[Spec], Run], processes: int) -> list[Run]:
    """Run what neither the folder nor the kept file has, and keep all. -> the runs that there are"""
    unpack_kept(folder, kept)
    execute(specs, folder, run, processes)
    keep(folder, kept)
    return load(folder)


# --- statistics -----------------------------------------------------------------------------------------------------


def at_value(points: Sequence[dict[str, float]], metric: str, reached: str, value: float) -> float | None:
    """A metric where another first reaches a value, on the straight line between two measurements; None if never."""
    for before, after in itertools.pairwise(points):
        if after[reached] >= value:
            gain = after[reached] - before[reached]
            share = (value - before[reached]) / gain if gain > 0 else 1.0
            return before[metric] + max(0.0, share) * (after[metric] - before[metric])
    return None


def mean_and_error(values: Sequence[float]) -> str:
    """'0.83 ± 0.02': mean and standard error of the mean, which one value hasn't."""
    if not values:
        return "–"
    digits = 0 if max(map(abs, values)) >= 10 else 2
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a paired sign-flip test: how often random signs give a mean as far from zero as this one.

    It is exact: of all 2^n signs, each sum is one of the first half's differences and one of the second half's, so
    sorting the 2^(n/2) of one half counts them. 40 pairs take a few megabytes, 60 some gigabytes.
    """
    given = np.asarray(differences, float)
    first, second = (_signed_sums(half) for half in (given[: len(given) // 2], given[len(given) // 2 :]))
    second.sort()
    far = abs(given.sum()) - 1e-9 * np.abs(given).sum()  # sums that are equal but for their rounding count
    if far <= 0:
        return 1.0
    above = len(second) - np.searchsorted(second, far - first, side="left")
    below = np.searchsorted(second, -far - first, side="right")
    return float((above + below).sum() / 2 ** len(given))


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """Return the sums of n numbers under all of their signs, [2^n]."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method, in the order in which they are given."""
    order, corrected, most = sorted(range(len(ps)), key=lambda index: ps[index]), [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = most
    return corrected


def paired_differences(
    runs: Iterable[Run],
    reference: Iterable[Run],
    value: Callable[[Run], float | None],
    of_reference: Callable[[Run], float | None] | None = None,
) -> list[float]:
    """Run minus reference, over the objects and seeds that both have a value for.

    `of_reference`: what is taken of the reference, where it isn't the same value.
    """
    other = {_pair(run): (of_reference or value)(run) for run in reference}
    pairs = ((value(run), other.get(_pair(run))) for run in runs)
    return [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]


def _pair(run: Run) -> tuple[str, int]:
    return run["kind"], run["seed"]


def difference_and_p(differences: Sequence[float], p: float | None = None) -> str:
    """'+0.042 (p 0.031)': the mean of paired differences, and p, a sign-flip test's if none is given."""
    if not differences:
        return "–"
    mean = float(np.mean(differences))
    digits = 0 if mean == 0 or abs(mean) >= 1 else 3
    return f"{mean:+.{digits}f} (p {sign_flip_p(differences) if p is None else p:.3f})"


def corrected(compared: Mapping[Key, Sequence[float]]) -> dict[Key, str]:
    """Return a table's comparisons as text, with sign-flip p values corrected by Holm's method over all of them."""
    tested = {key: sign_flip_p(differences) for key, differences in compared.items() if differences}
    ps = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {key: difference_and_p(differences, ps.get(key)) for key, differences in compared.items()}


def by_arm(runs: Sequence[Run], group: str) -> dict[str, list[Run]]:
    """Return a group's runs by the way they do it, in the order in which they come."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if run["group"] == group:
            arms.setdefault(run["arm"], []).append(run)
    return arms


def differences_table(corner: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return paired differences, a row each by what they are of, with p corrected over the table."""
    cells = corrected({(name, what): found for name, row in rows.items() for what, found in row.items()})
    columns = list(next(iter(rows.values()), {}))
    lines = [
        [name, *(cells[name, what] for what in columns), str(max(map(len, row.values())))] for name, row in rows.items()
    ]
    return markdown_table([corner, *columns, "pairs"], lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
