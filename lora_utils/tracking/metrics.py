"""The numbers of a run, step by step: metrics.jsonl in its folder, TensorBoard beside it, and wandb if its key is set.

Owns what is written of a step and how a run that goes on continues the files of the one before. Numbers are read from
the device only when they are written, many steps at once.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from lora_utils.disk import refusals_named, whole
from lora_utils.errors import UserError
from lora_utils.training import StepReport
from lora_utils.validation import Validation

log = logging.getLogger(__name__)

FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"
WANDB_PROJECT, WANDB_ID = "qwen-image-lora", "wandb-id"
_QUEUE = 10**6  # of TensorBoard's thread: once that has died, of a full disk, a queue that fills up waits for ever
Tracker = TensorBoardTracker | WandBTracker
BANDS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of sigma


def band_name(band: tuple[float, float]) -> str:
    return f"{band[0]:g}-{band[1]:g}"


def numbers_of(report: StepReport) -> dict[str, Any]:
    """What is written of a step. Waits for the device. `bands` lists the pictures' losses by their level of noise."""
    taught, kept = report.taught.tolist(), report.kept.tolist()
    losses, bands = report.pictures.tolist(), {band_name(band): [] for band in BANDS}
    for row, sigmas, preserves in zip(losses, report.sigmas, report.preserves, strict=True):
        for loss, sigma in zip(row, sigmas.tolist(), strict=False):
            if not preserves:
                bands[band_name(next(band for band in BANDS if sigma <= band[1]))].append(loss)
    return {
        "step": report.step,
        "loss": sum(taught) / len(taught) if taught else None,
        "class_loss": sum(kept) / len(kept) if kept else None,
        "learning_rate": report.learning_rate,
        "grad_norm": float(report.grad_norm),
        "row_grad_norms": {token: float(norm) for token, norm in report.row_grad_norms.items()},
        "bands": {name: found for name, found in bands.items() if found},
    }


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics. One that a kill has cut short isn't there."""
    path = folder / FILE
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _trackers(folder: Path, settings: Mapping[str, Any], resumed_at: int) -> list[Tracker]:
    going_on = {"purge_step": resumed_at + 1} if resumed_at else {}
    trackers: list[Tracker] = [TensorBoardTracker(TENSORBOARD, folder, max_queue=_QUEUE, **going_on)]
    if os.environ.get("WANDB_API_KEY"):
        config, run_id = {"run_dir": str(folder), **settings}, _wandb_id(folder, resumed_at)
        trackers.append(WandBTracker(WANDB_PROJECT, dir=str(folder), id=run_id, resume="allow", config=config))
    return trackers


def _wandb_id(folder: Path, resumed_at: int) -> str:
    """The run's there: a process that goes on adds to the curves of the one before."""
    path = folder / WANDB_ID
    if not (resumed_at and path.is_file()):
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _start(tracker: Tracker) -> None:
    """Raises UserError for a key that wandb doesn't take."""
    if not isinstance(tracker, WandBTracker):
        tracker.start()
        return
    from wandb.errors import Error  # noqa: PLC0415 (wandb takes a second to import, and few use it)

    try:
        tracker.start()
    except (Error, ValueError) as error:  # ValueError: a key of the wrong length
        raise UserError(f"wandb doesn't begin a run with WANDB_API_KEY ({error}); correct it, or unset it.") from error


class Journal:
    """Open from a run's first step here to its last. Without a folder it writes nothing."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, settings  # the run's, which wandb shows beside its curves
        self.trackers: list[Tracker] = []

    def open(self, step: int) -> None:
        """Begin behind this step: what an earlier process wrote of later ones goes."""
        if self.folder is None:
            return
        kept = [line for line in read(self.folder) if line["step"] <= step] if step else []
        self._write(kept, "w")
        if step == 0:  # another run's
            shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
        with refusals_named(f"curves can't be written to {self.folder}", "free some room, or name another run_dir."):
            for tracker in _trackers(self.folder, self.settings, step):
                _start(tracker)
                self.trackers.append(tracker)

    def has_validation(self, step: int) -> bool:
        """Whether an earlier process has measured after this step."""
        lines = read(self.folder) if self.folder else ()
        return any("validation" in line and line["step"] == step for line in lines)

    def steps(self, reports: Sequence[StepReport]) -> None:
        if self.folder is None:
            return
        lines = [numbers_of(report) for report in reports]
        self._write(lines, "a")
        for line in lines:
            self._track(line["step"], _scalars(line))

    def validation(self, step: int, validation: Validation) -> None:
        if self.folder is None:
            return
        self._write([{"step": step, "validation": validation.loss, "by_sigma": list(validation.by_sigma)}], "a")
        self._track(step, {"validation/loss": validation.loss})

    def samples(self, step: int, sheet: Image.Image) -> None:
        """Show the trackers what is drawn after a step. All steps up to it must have been written."""

        def show(tracker: Tracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": [sheet]}, step=step)

        self._tell(show)

    def close(self) -> None:
        """Whatever has happened: nothing stays open in a server that lives on."""
        self._tell(lambda tracker: tracker.finish())
        self.trackers.clear()

    def _track(self, step: int, values: dict[str, float]) -> None:
        self._tell(lambda tracker: tracker.log(values, step=step))

    def _tell(self, something: Callable[[Tracker], None]) -> None:
        """To every tracker. One that fails is told no more, whatever its error: a run isn't lost for its curves."""
        for tracker in tuple(self.trackers):
            try:
                something(tracker)
            except Exception as error:
                log.warning("%s is told no more: %s", tracker.name, error)
                self.trackers.remove(tracker)
                with suppress(Exception):
                    tracker.finish()

    def _write(self, lines: Sequence[dict[str, Any]], mode: str) -> None:
        if self.folder is None:
            return
        path = self.folder / FILE
        place = nullcontext(path) if mode == "a" else whole(path)
        with (
            refusals_named(f"{path} can't be written", "free some room."),
            place as written,
            written.open(mode) as file,
        ):
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """A step's numbers by the names that curves have."""
    values = {f"train/{name}": line[name] for name in ("loss", "class_loss", "learning_rate", "grad_norm")}
    values |= {f"train/grad_norm {token}": norm for token, norm in line["row_grad_norms"].items()}
    values |= {f"sigma/{name}": sum(found) / len(found) for name, found in line["bands"].items()}
    return {name: value for name, value in values.items() if value is not None}
