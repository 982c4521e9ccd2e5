"""What a person sees of a run on its way: its lines, the loss on pictures held out, samples, and the numbers kept.

Owns when each is due and what it says; must not know archives or how a step is taken. Looking moves nothing: a run that
is watched learns what it would have learned unseen.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_utils import samples, training, validation
from lora_utils.cards import agree
from lora_utils.config import RunOptions
from lora_utils.console import Progress
from lora_utils.errors import UserError
from lora_utils.journal import Journal, numbers_of, read
from lora_utils.preparation import Run
from lora_utils.samples import Row
from lora_utils.training import StepReport

log = logging.getLogger(__name__)


class Watch:
    """Over a run from where it is. On several cards all look, so that they stay in step, and the first one tells."""

    def __init__(self, run: Run, options: RunOptions, rows: Sequence[Row], model_folder: Path):
        self.run, self.options, self.rows, self.model_folder = run, options, rows, model_folder
        self.folder = Path(options.run_dir) if options.run_dir and run.ranks.first else None
        self.journal = Journal(self.folder, asdict(run.config))
        self.progress = Progress(run.config.steps)
        self.began_at = 0  # the step
        self.reports: list[StepReport] = []
        self.told = self.noted = 0  # of them, how many the lines and the journal have
        self.final_loss: float | None = None
        self.looked_s = 0.0  # between steps

    def open(self) -> None:
        """Begin at the run's step, and look at it if none has yet. Raises UserError if samples have no room."""
        self.began_at = self.run.step
        if self.folder:
            samples.forget_after(self.folder, self.run.step)
        self.journal.open(self.run.step)
        drawn = self.folder is not None and samples.path_of(self.folder, self.run.step).is_file()
        validated, drawn = agree(self.run.ranks, (self.journal.has_validation(self.run.step), drawn))
        if not validated:
            self._validate(self.run.step)
        if not drawn:
            self._sample(self.run.step)
        self.progress, self.looked_s = Progress(self.run.config.steps), 0.0

    def after(self, report: StepReport, stopped: bool) -> None:
        """Look at the run as a step has left it. A stop is told at once, and nothing is drawn that would delay it."""
        self.reports.append(report)
        if self.progress.is_due(report.step) or stopped:
            self._tell(report)
        if not stopped:
            self._validate(report.step)
            try:
                self._sample(report.step)
            except UserError as error:  # a run isn't lost for its samples
                log.warning("no samples after step %d: %s", report.step, error)

    def close(self) -> None:
        """Look no more, whatever has happened."""
        self.journal.close()

    def sum_up(self) -> None:
        """Know how long the steps took, and the mean loss of the run's last tenth, whichever process took its steps."""
        seconds = self.run.seconds
        looked = seconds.get("probe", 0.0) + self.looked_s
        seconds["train"] = max(1e-3, self.progress.elapsed_s() - looked)
        first = self.run.step - max(1, self.run.step // 10) + 1
        if self.folder:
            self.final_loss = mean_loss(line for line in read(self.folder) if line["step"] >= first)
        else:
            self.final_loss = mean_loss(numbers_of(report) for report in self.reports if report.step >= first)

    def _tell(self, report: StepReport) -> None:
        new, self.told = self.reports[self.told :], len(self.reports)
        rate, grad = f"lr {report.learning_rate:.1e}", f"grad {float(report.grad_norm):.2f}"
        pace = self.progress.pace(report.step - self.began_at)
        print(f"step {report.step}/{self.run.config.steps} {described_losses(new)} {rate} {grad} {pace}", flush=True)
        for token, row in training.report_rows(self.run).items():
            near = f"nearest {row.nearest!r} (cosine {row.cosine:.2f})"
            grad = f"grad {float(report.row_grad_norms.get(token, 0)):.2g}"
            print(f"  {token} norm {row.norm:.4f}, {row.share_of_median:.1%} of a word's, {grad}, {near}", flush=True)
        self.note()

    def note(self) -> None:
        """Write the numbers of the steps so far, as before a checkpoint: a run that goes on from it lacks none."""
        self.journal.steps(self.reports[self.noted :])
        self.noted = len(self.reports)

    def _validate(self, step: int) -> None:
        if not validation.is_due(self.run, step):
            return
        began = time.monotonic()
        self.note()
        found = validation.validate(self.run)
        self.journal.validation(step, found)
        print(f"step {step}: loss on pictures held out {found.loss:.4f}", flush=True)
        self._took("validate", began)

    def _sample(self, step: int) -> None:
        if not samples.is_due(self.rows, self.options.sample_every, step, self.run.config.steps):
            return
        began = time.monotonic()
        drawn = samples.draw(self.run, self.rows, self.model_folder)
        if self.folder:
            sheet = samples.sheet(self.rows, drawn, f"after step {step}")
            path = samples.save(self.folder, step, sheet)
            self.note()
            self.journal.samples(step, sheet)
            print(f"samples {path}", flush=True)
        self._took("samples", began)

    def _took(self, what: str, began: float) -> None:
        took = time.monotonic() - began
        self.run.seconds[what] = self.run.seconds.get(what, 0.0) + took
        self.looked_s += took


def described_losses(reports: Sequence[StepReport]) -> str:
    """The mean losses of these steps' micro-batches: of those that taught, and of those that held the class."""
    taught, kept = mean_of([report.taught for report in reports]), mean_of([report.kept for report in reports])
    parts = ["loss -" if taught is None else f"loss {taught:.4f}", "" if kept is None else f"class {kept:.4f}"]
    return " ".join(filter(None, parts))


def mean_loss(steps: Iterable[Mapping[str, Any]]) -> float | None:
    """Of steps as the journal has them: of those that taught, else of those that held the class."""
    lines = [line for line in steps if "loss" in line]  # others are of validations
    for name in ("loss", "class_loss"):
        if found := [line[name] for line in lines if line[name] is not None]:
            return sum(found) / len(found)
    return None


def mean_of(losses: Sequence[torch.Tensor]) -> float | None:
    """None where there are none."""
    some = [loss for loss in losses if len(loss)]
    return float(torch.cat(some).mean()) if some else None
