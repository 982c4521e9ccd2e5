"""The monitor: what a person sees of a run while it is on: log lines, the loss on images held out, previews, metrics.

This module owns when each is due and what it says. Looking moves nothing: a run that is monitored learns what it would
have learned without.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_utils.config import RunOptions
from lora_utils.io.logging import Progress, by_product, format_pace
from lora_utils.model import flops
from lora_utils.model.device import peak_bytes
from lora_utils.model.ram import ram_usage
from lora_utils.placeholder.embedding import EmbeddingReport, report_embeddings
from lora_utils.tracking import contact_sheet
from lora_utils.tracking.metrics import MetricsLogger, StepMetrics, band_name
from lora_utils.tracking.status import RunStatus, write_status
from lora_utils.training.loop import StepReport, mean_step_flops
from lora_utils.training.previews import PreviewPair, PreviewRow, beside_pairs, generate_previews, preview_due
from lora_utils.training.state import StepLoss, TrainState
from lora_utils.training.validation import validate, validation_due

log = logging.getLogger(__name__)


class TrainMonitor:
    """It looks at a run from where it is. On several GPUs all look, so that they stay in step; the main one writes."""

    def __init__(
        self, state: TrainState, options: RunOptions, rows: Sequence[PreviewRow], pairs: Sequence[PreviewPair] = ()
    ):
        """Take the run, and the previews that are to be sampled of it; of an editing model's with their pairs."""
        self.state, self.options, self.rows, self.pairs = state, options, rows, pairs
        self.folder = Path(options.run_dir) if options.run_dir and state.ranks.is_main else None
        self.metrics = MetricsLogger(self.folder, asdict(state.resolved_config))
        self.progress = Progress(state.config.steps)
        self.began_at = 0  # the step
        self.unlogged: list[StepReport] = []  # the steps since the last log line
        self.unwritten: list[StepReport] = []  # the steps whose numbers aren't written yet
        self.looked_s = 0.0  # between steps
        self.status = RunStatus("starting", steps=state.config.steps)
        self.reported_at = time.monotonic()  # when the report of a run that is on was last written
        self.thumbnail: Image.Image | None = None  # the last preview of the first prompt
        self.step_flops = 0.0  # of a mean step; counted at the first line, when the plan is final

    def write_status(self, **changes: Any) -> None:
        """Change the run's status in its folder, which other programs read."""
        self.status = replace(self.status, step=self.state.step, **changes)
        if self.folder:
            with by_product("writing the status"):
                write_status(self.folder, self.status)

    def open(self) -> None:
        """Begin at the run's step, and look at it if none has yet. Raises UserError if previews have no room."""
        step = self.began_at = self.state.step
        self.write_status(state="running")
        if self.folder:
            contact_sheet.remove_sheets_after(self.folder, step)
        self.metrics.open(step)
        if self.state.validated_at != step:
            self._validate(step)
        if self.state.previewed_at != step:
            self._preview(step)
        self.progress, self.looked_s = Progress(self.state.config.steps), 0.0

    def after(self, report: StepReport, stopped: bool) -> None:
        """Look at the run as a step has left it. A stop is logged at once; nothing is sampled that would delay it."""
        self.unlogged.append(report)
        self.unwritten.append(report)
        if self.progress.should_log(report.step) or stopped:
            with by_product(f"the log line of step {report.step}"):
                self._log(report)
        if not stopped:
            with by_product(f"the validation after step {report.step}"):
                self._validate(report.step)
            with by_product(f"the previews after step {report.step}"):
                self._preview(report.step)

    def flush(self) -> None:
        """Write the numbers of the steps so far, as before a checkpoint: a run resumed from it lacks none."""
        metrics = [step_metrics(report) for report in self.unwritten]
        self.unwritten.clear()
        with by_product("writing the metrics"):
            self.metrics.steps(metrics)
        recent = self.state.recent_losses
        recent += [StepLoss(each.step, each.loss, each.class_loss) for each in metrics]
        self.state.recent_losses = [each for each in recent if each.step >= self._first_recent()]

    def close(self) -> None:
        """Look no more, whatever has happened."""
        with by_product("closing the metrics"):
            self.metrics.close()

    def sum_up(self) -> None:
        """Note how long the steps took, without what was done between them."""
        with by_product("summing up"):
            self.flush()
        self.state.seconds["train"] = self._stepping_s()

    def _stepping_s(self) -> float:
        """Return how long the steps have taken, without what came before the first and between them."""
        seconds = self.state.seconds
        others = self.looked_s + seconds.get("probe", 0.0) + seconds.get("compile", 0.0)
        return max(1e-3, self.progress.elapsed_s() - others)

    def _pace(self, step: int) -> str:
        """Return the seconds per step so far and the time that is left."""
        return format_pace(self._stepping_s() / (step - self.began_at), self._left_s(step))

    def _left_s(self, step: int) -> float:
        """Return the seconds that are left after a step.

        A step on large images takes longer, so what is left follows from its operations, not from its steps.
        """
        self.step_flops = self.step_flops or mean_step_flops(self.state)
        done, left = step - self.began_at, self.state.config.steps - step
        per_operation = self._stepping_s() / self.state.flops
        looking_s = left * self.looked_s / done
        return left * self.step_flops * per_operation + looking_s

    def _first_recent(self) -> int:
        """Return the first step of the run's last tenth so far."""
        return self.state.step - max(1, self.state.step // 10) + 1

    def _log(self, report: StepReport) -> None:
        losses, mean = describe_losses(self.unlogged), _mean([each.instance_losses for each in self.unlogged])
        self.unlogged.clear()
        steps, pace = self.state.config.steps, self._pace(report.step)
        rate, grad = f"lr {report.learning_rate:.1e}", f"grad {float(report.grad_norm):.2f}"
        log.info("step %d/%d %s %s %s %s", report.step, steps, losses, rate, grad, pace)
        for token, each in embedding_reports(self.state).items():
            near = f"nearest {each.nearest!r} (cosine {each.cosine:.2f})"
            grad = f"grad {float(report.token_grad_norms.get(token, 0)):.2g}"
            share = f"{each.share_of_median:.1%} of a word's"
            log.info("  %s norm %.4f, %s, %s, %s", token, each.norm, share, grad, near)
        self.flush()
        self.write_status(eta_s=round(self._left_s(report.step), 1), loss=mean)

    def _validate(self, step: int) -> None:
        if not validation_due(self.state, step):
            return
        began = time.monotonic()
        self.flush()
        found = validate(self.state)
        log.info("step %d: loss on images held out %.4f", step, found.loss)
        self.state.validated_at = step
        with by_product("writing the metrics"):
            self.metrics.validation(step, found.loss, found.by_sigma)
        self._took("validate", began)

    def _preview(self, step: int) -> None:
        if not preview_due(self.rows, self.options.sample_every, step, self.state.config.steps):
            return
        began = time.monotonic()
        images = generate_previews(self.state, self.rows)
        self.thumbnail = images[0][0]
        if self.folder:
            labels = [[request.prompt for request in row] for row in self.rows]
            if self.pairs:
                labels, images = beside_pairs(labels, images, self.pairs)
            stored = self.state.plan.quantization
            base = "" if stored == "none" else f", on a base in {stored}: predict agrees with QUANTIZATION={stored}"
            sheet = contact_sheet.draw_sheet(labels, images, f"after step {step}{base}")
            self.flush()
            with by_product("showing the previews to the trackers"):
                self.metrics.previews(step, sheet)
            path = contact_sheet.save_sheet(self.folder, step, sheet)
            log.info("previews %s", path)
            self.write_status(preview=str(path.relative_to(self.folder)))
        self.state.previewed_at = step
        self._took("previews", began)

    def _took(self, what: str, began: float) -> None:
        took = time.monotonic() - began
        self.state.seconds[what] = self.state.seconds.get(what, 0.0) + took
        self.looked_s += took


# --- numbers --------------------------------------------------------------------------------------------------------


def step_metrics(report: StepReport) -> StepMetrics:
    """Return the numbers of a step. It waits for the device."""
    instance, prior = report.instance_losses.tolist(), report.prior_losses.tolist()
    bands: dict[str, list[float]] = {}
    for losses, sigmas, is_prior in zip(report.image_losses.tolist(), report.sigmas, report.is_prior, strict=True):
        for loss, sigma in zip(losses, sigmas.tolist(), strict=False):
            if not is_prior:
                bands.setdefault(band_name(sigma), []).append(loss)
    return StepMetrics(
        report.step,
        sum(instance) / len(instance) if instance else None,
        sum(prior) / len(prior) if prior else None,
        report.learning_rate,
        float(report.grad_norm),
        {token: float(norm) for token, norm in report.token_grad_norms.items()},
        bands,
    )


def final_loss(state: TrainState) -> float | None:
    """Return the mean loss of the run's last tenth: of what taught, else of what held the class; None for no step."""
    for losses in ([each.loss for each in state.recent_losses], [each.class_loss for each in state.recent_losses]):
        if found := [loss for loss in losses if loss is not None and math.isfinite(loss)]:
            return sum(found) / len(found)
    return None


def embedding_reports(state: TrainState) -> dict[str, EmbeddingReport]:
    """Return how each token's embedding stands among the words now; nothing where none is trained."""
    if state.words is None:
        return {}
    return report_embeddings(state.placeholders, state.components.tokenizer, state.words)


# --- lines ----------------------------------------------------------------------------------------------------------


def describe_losses(reports: Sequence[StepReport]) -> str:
    """Return the mean losses of these steps' batches: of those that taught, and of those that held the class."""
    instance = _mean([report.instance_losses for report in reports])
    prior = _mean([report.prior_losses for report in reports])
    parts = ["loss -" if instance is None else f"loss {instance:.4f}", "" if prior is None else f"class {prior:.4f}"]
    return " ".join(filter(None, parts))


def _mean(losses: Sequence[torch.Tensor]) -> float | None:
    some = [loss for loss in losses if len(loss)]
    return float(torch.cat(some).mean()) if some else None


def describe_speed(state: TrainState) -> list[str]:
    """Return the run's last lines: its speed against what the device can do, its peak memory, where the time went."""
    placement, steps, seconds = state.components.placement, state.step - state.resumed_at, state.seconds["train"]
    if steps == 0:
        return [f"no step was left: all {state.step} were taken before"]
    done, peak = state.flops / seconds, flops.measured_peak(placement.device, placement.dtype)
    spent = ", ".join(f"{name} {taken:.1f} s" for name, taken in state.seconds.items())
    return [
        f"trained {steps} steps, {seconds / steps:.3f} s each, at {done / 1e12:.3g} TFLOP/s: {done / peak:.0%} of the "
        f"{peak / 1e12:.3g} that a plain matrix product reaches here",
        f"{_describe_peak(placement.device)}; {spent}",
    ]


def _describe_peak(device: torch.device) -> str:
    """Say how much memory the process had at most; on a CPU also what of its memory are files, which can be evicted."""
    peak = f"at most {peak_bytes(device) / 1e9:.2f} GB"
    if device.type == "cuda":
        return f"{peak} of the GPU's memory"
    usage = ram_usage()
    return (
        f"{peak} of memory, mapped files included; now {usage.held / 1e9:.2f} GB are held and {usage.mapped / 1e9:.2f} "
        "GB mapped"
    )
