"""What a run leaves: weights.zip, the weights of steps on the way, the report, and what is pushed to the hub."""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from PIL import Image

from lora_utils.config import TrainConfig, TrainInputs
from lora_utils.errors import UserError
from lora_utils.io.download import base_model_label
from lora_utils.io.logging import by_product
from lora_utils.lora import hub
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.weights import TrainingFacts, save_weights
from lora_utils.tracking import contact_sheet, html_report
from lora_utils.tracking.metrics import read_metrics
from lora_utils.tracking.status import STEP_WEIGHTS
from lora_utils.training.batch_plans import is_holding
from lora_utils.training.monitor import TrainMonitor, describe_speed, final_loss
from lora_utils.training.state import TrainState, current_lora, describe_placeholders, final_lora

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartedRun:
    """A run before its first step in this process, its monitor, and what the dataset was found to be."""

    state: TrainState
    monitor: TrainMonitor
    num_images: int
    dataset_report: list[str]
    buckets: dict[str, int] = field(default_factory=dict)  # images by size
    crops: list[tuple[str, Image.Image]] = field(default_factory=list)  # those that lose most, with what they lose


def training_facts(started: StartedRun, inputs: TrainInputs, lora: LoraFile) -> TrainingFacts:
    """Return what the weights' files say of the run as it is now."""
    state = started.state
    return TrainingFacts(
        base_model_label(),
        started.num_images,
        state.step,
        final_loss(state),
        describe_placeholders(state, lora),
        state.data.captions,
        inputs.options.hub_repo.rpartition("/")[2],
        started.monitor.thumbnail,
        state.components.variant.pipeline,
    )


def write_results(started: StartedRun, inputs: TrainInputs, target: Path) -> Path:
    """Write weights.zip, then the last lines and the report, and push to the hub if that is asked for. -> weights.zip

    Only the weights count: what fails of the rest is a warning.
    """
    # The weights.
    began, state, options = time.monotonic(), started.state, inputs.options
    lora = final_lora(state)
    facts = training_facts(started, inputs, lora)
    written = save_somewhere(target, lora, state.resolved_config, facts)
    log.info("wrote %s, %.1f MB", written.name, written.stat().st_size / 1e6)

    # The rest.
    state.seconds["save"] = time.monotonic() - began
    timings: list[str] = []
    with by_product("measuring the speed"):
        timings = [describe_share(state), *describe_speed(state)]
    for line in filter(None, timings):
        log.info(line)
    if options.run_dir:
        with by_product("naming the best weights"):
            if best := describe_best(Path(options.run_dir)):
                log.info(best)
        with by_product("the report"):
            log.info("wrote %s", write_report(started, inputs, list(filter(None, timings))))
    if options.hub_repo:
        with by_product(f"pushing {written.name}, from where it can be pushed again,"):
            sheets = contact_sheet.list_sheets(Path(options.run_dir)) if options.run_dir else []
            pushed = hub.push_weights(options.hub_repo, inputs.files.hub_token, written, sheets)
            log.info("pushed to %s", pushed)
    ended = "done" if state.step >= state.config.steps else "stopped"
    started.monitor.write_status(state=ended, eta_s=None, weights=str(written.name))
    return written


def write_report(started: StartedRun, inputs: TrainInputs, timings: Sequence[str] = (), is_on: bool = False) -> Path:
    """Write the run's report into its folder; of a run that is on it loads itself again. -> its path"""
    state, defaults = started.state, {item.name: item.default for item in fields(TrainConfig)}
    settings = asdict(state.resolved_config)
    summary = html_report.RunSummary(
        base_model_label(),
        settings,
        {name: value for name, value in settings.items() if value != defaults[name]},
        started.dataset_report,
        started.buckets,
        started.crops,
        timings,
        f"running: after step {state.step} of {state.config.steps}" if is_on else "",
    )
    return html_report.write_report(Path(inputs.options.run_dir), summary)


def save_somewhere(target: Path, lora: LoraFile, config: TrainConfig, facts: TrainingFacts) -> Path:
    """Write weights.zip where it was asked for or, if that can't be written any more, where it can. -> its path"""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_weights(target, lora, config, facts)
        return target
    except (OSError, UserError) as error:
        rescue = Path(tempfile.mkdtemp(prefix="qwen-image-lora-rescued-")) / target.name
        log.warning("%s", error)
        save_weights(rescue, lora, config, facts)
        log.warning("the weights are in %s instead", rescue)
        return rescue


def write_step_weights(started: StartedRun, inputs: TrainInputs) -> Path:
    """Write the weights as they are now into the run's folder, and remove all but the last `keep_weights`. -> the file

    Raises UserError for weights that are no numbers, and where the disk is full.
    """
    state, options = started.state, inputs.options
    folder, lora = Path(options.run_dir), current_lora(state)
    path = folder / STEP_WEIGHTS.format(state.step)
    save_weights(path, lora, state.resolved_config, training_facts(started, inputs, lora))
    so_far = [each for each in list_step_weights(folder) if each <= path]  # a kill may have undone the later steps
    for old in so_far[: -options.keep_weights]:
        old.unlink()
    log.info("weights %s", path.name)
    return path


def list_step_weights(folder: Path) -> list[Path]:
    """Return the weights that were written on the way, the oldest first."""
    return sorted(folder.glob(STEP_WEIGHTS.replace("{:06d}", "[0-9]" * 6)))


def describe_best(folder: Path) -> str:
    """Say which of the weights that are kept had the lowest loss on images held out; an empty text without any."""
    losses = {line["step"]: line["validation"] for line in read_metrics(folder) if "validation" in line}
    kept = {path: losses.get(int(path.stem.rpartition("-")[2])) for path in list_step_weights(folder)}
    found = {path: loss for path, loss in kept.items() if loss is not None}
    if not found:
        return ""
    best = min(found, key=found.__getitem__)
    return f"lowest loss on images held out: {found[best]:.4f}, with {best.name}"


def describe_share(state: TrainState) -> str:
    """Say how many batches held what must stay, where some were to; an empty text where none were."""
    if not state.data.preserved:
        return ""
    count = state.step * state.config.gradient_accumulation * state.ranks.world_size
    held = sum(is_holding(index, state.config.preservation_weight) for index in range(count))
    what = state.data.preserved.described(state.config.class_word)
    return f"{held} of {count} batches held {what}, the others taught"
