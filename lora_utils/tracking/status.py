"""What a run leaves in its folder for other programs: status.json, and the name of a step's weights.

status.json says where the run is. It is written beside the old one and renamed, so no reader finds half of it.
"""

import datetime
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lora_utils.io.files import atomic_path, disk_errors

STATUS_FILE = "status.json"
STEP_WEIGHTS = "weights-step-{:06d}.zip"  # the weights after a step, in the run's folder


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run is. `state` is starting, running, done, stopped, failed or cancelled."""

    state: str
    step: int = 0
    steps: int = 0
    eta_s: float | None = None  # None: not known yet, or at its end
    loss: float | None = None  # the mean since the line before
    preview: str | None = None  # the last contact sheet, by its name in the run's folder
    weights: str | None = None  # the last weights that were written, by the name of their file
    error: str | None = None


def read_status(folder: Path) -> RunStatus:
    """Return the status in a run's folder; `starting` where there is none that can be read."""
    try:
        found = json.loads((folder / STATUS_FILE).read_text())
        return RunStatus(**{item.name: found[item.name] for item in fields(RunStatus)})
    except (OSError, ValueError, KeyError, TypeError):
        return RunStatus("starting")


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the status in a run's folder. Raises UserError for a full disk."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = folder / STATUS_FILE
    with disk_errors(f"{path} can't be written", "free some room."), atomic_path(path) as partial:
        partial.write_text(json.dumps({**asdict(status), "updated": now}, indent=2) + "\n")
