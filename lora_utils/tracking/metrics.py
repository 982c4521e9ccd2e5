"""The numbers of a run, step by step: metrics.jsonl in its folder, TensorBoard beside it, and wandb if its key is set.

This module owns what is written of a step, and how a resumed run continues the files of the one before.
"""

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from lora_utils.errors import UserError
from lora_utils.io.files import atomic_path, disk_errors

log = logging.getLogger(__name__)

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"
WANDB_PROJECT, WANDB_ID_FILE = "qwen-image-lora", "wandb-id"
_QUEUE = 10**6  # of TensorBoard's thread: once that has died, of a full disk, a queue that fills up waits for ever
_MOST_UNWRITTEN = 100_000  # lines that are kept for a disk that may come back
Tracker = TensorBoardTracker | WandBTracker
SIGMA_BANDS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The numbers of one optimizer step."""

    step: int
    loss: float | None  # of the batches that taught; None where none did
    class_loss: float | None  # of those that held the class; None where none did
    learning_rate: float
    grad_norm: float
    token_grad_norms: dict[str, float] = field(default_factory=dict)
    bands: dict[str, list[float]] = field(default_factory=dict)  # each image's loss, by its level of noise

    def curves(self) -> dict[str, float]:
        """Return the numbers by the names that curves have."""
        values = {
            "train/loss": self.loss,
            "train/class_loss": self.class_loss,
            "train/learning_rate": self.learning_rate,
            "train/grad_norm": self.grad_norm,
        }
        values |= {f"train/grad_norm {token}": norm for token, norm in self.token_grad_norms.items()}
        values |= {f"sigma/{name}": sum(losses) / len(losses) for name, losses in self.bands.items()}
        return {name: value for name, value in values.items() if value is not None}


def band_name(sigma: float) -> str:
    """Return the name of the band that a level of noise is in, like '0.25-0.5'."""
    low, high = next(band for band in SIGMA_BANDS if sigma <= band[1])
    return f"{low:g}-{high:g}"


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's metrics. One that a kill has cut short isn't among them."""
    path = folder / METRICS_FILE
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class MetricsLogger:
    """It writes a run's numbers, from its first step in this process to its last. Without a folder it is idle."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]):
        """Take the run's folder, and its settings, which wandb shows beside the curves."""
        self.folder, self.settings = folder, settings
        self.trackers: list[Tracker] = []
        self.unwritten: list[str] = []  # lines that the disk has refused so far

    def open(self, step: int) -> None:
        """Begin after this step; what an earlier process wrote of later ones is removed."""
        if self.folder is None:
            return
        kept = [line for line in read_metrics(self.folder) if line["step"] <= step] if step else []
        path = self.folder / METRICS_FILE
        with (
            disk_errors(f"{path} can't be written", "free some room."),
            atomic_path(path) as partial,
            partial.open("w") as file,
        ):
            file.writelines(json.dumps(line) + "\n" for line in kept)
        if step == 0:  # another run's
            shutil.rmtree(self.folder / TENSORBOARD_FOLDER, ignore_errors=True)
        with disk_errors(f"curves can't be written to {self.folder}", "free some room, or name another run_dir."):
            for tracker in _trackers(self.folder, self.settings, step):
                _start(tracker)
                self.trackers.append(tracker)

    def steps(self, metrics: Sequence[StepMetrics]) -> None:
        """Write the numbers of these steps."""
        if self.folder is None:
            return
        self._append([asdict(each) for each in metrics])
        for each in metrics:
            self._track(each.step, each.curves())

    def validation(self, step: int, loss: float, by_sigma: Sequence[float]) -> None:
        """Write the loss on images held out, and what it was at each level of noise."""
        if self.folder is None:
            return
        self._append([{"step": step, "validation": loss, "by_sigma": list(by_sigma)}])
        self._track(step, {"validation/loss": loss})

    def previews(self, step: int, sheet: Image.Image) -> None:
        """Show the trackers the previews after a step. All steps up to it must have been written."""

        def show(tracker: Tracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({"previews": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"previews": [sheet]}, step=step)

        self._on_each(show)

    def close(self) -> None:
        """Finish, whatever has happened: nothing stays open in a server that lives on."""
        self._on_each(lambda tracker: tracker.finish())
        self.trackers.clear()

    def _track(self, step: int, values: dict[str, float]) -> None:
        self._on_each(lambda tracker: tracker.log(values, step=step))

    def _on_each(self, action: Callable[[Tracker], None]) -> None:
        """Do this with every tracker. One that fails is dropped, whatever its error: no run is lost for its curves."""
        for tracker in tuple(self.trackers):
            try:
                action(tracker)
            except Exception as error:  # of any kind: trackers are other people's code
                log.warning("%s is no longer written: %s", tracker.name, error)
                self.trackers.remove(tracker)
                with suppress(Exception):
                    tracker.finish()

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write lines, with those that the disk has refused before. A folder that is gone costs the run nothing."""
        if self.folder is None:
            return
        failing, path = bool(self.unwritten), self.folder / METRICS_FILE
        self.unwritten += [json.dumps(line) + "\n" for line in lines]
        try:
            size_bytes = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a") as file:
                    file.writelines(self.unwritten)
            except OSError:
                with suppress(OSError):  # half a line would spoil the next one
                    os.truncate(path, size_bytes)
                raise
        except OSError as error:
            del self.unwritten[:-_MOST_UNWRITTEN]
            if not failing:
                log.warning("%s can't be written (%s); the run goes on, and tries again", path.name, error.strerror)
        else:
            self.unwritten.clear()


def _trackers(folder: Path, settings: Mapping[str, Any], resumed_at: int) -> list[Tracker]:
    resumed = {"purge_step": resumed_at + 1} if resumed_at else {}
    trackers: list[Tracker] = [TensorBoardTracker(TENSORBOARD_FOLDER, folder, max_queue=_QUEUE, **resumed)]
    if os.environ.get("WANDB_API_KEY"):
        config, run_id = {"run_dir": str(folder), **settings}, _wandb_id(folder, resumed_at)
        trackers.append(WandBTracker(WANDB_PROJECT, dir=str(folder), id=run_id, resume="allow", config=config))
    return trackers


def _wandb_id(folder: Path, resumed_at: int) -> str:
    """Return the run's id there: a resumed process adds to the curves of the one before."""
    path = folder / WANDB_ID_FILE
    if not (resumed_at and path.is_file()):
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _start(tracker: Tracker) -> None:
    """Start a tracker. Raises UserError for a key that wandb doesn't take."""
    if not isinstance(tracker, WandBTracker):
        tracker.start()
        return
    from wandb.errors import Error  # noqa: PLC0415 (wandb takes a second to import, and few use it)

    try:
        tracker.start()
    except (Error, ValueError) as error:  # ValueError: a key of the wrong length
        raise UserError(f"wandb doesn't begin a run with WANDB_API_KEY ({error}); correct it, or unset it.") from error
