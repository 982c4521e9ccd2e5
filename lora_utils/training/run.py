"""One training in this process, from an archive to weights.zip, with its checkpoints and the stop in between."""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from lora_utils.config import RunOptions, TrainConfig, TrainInputs
from lora_utils.dataset.report import describe_dataset
from lora_utils.dataset.scan import load
from lora_utils.errors import UserError
from lora_utils.io.archive import extracted
from lora_utils.io.download import base_model_name, download_model
from lora_utils.io.files import disk_errors
from lora_utils.lora import hub
from lora_utils.lora.weights import TrainingFacts, read_init_weights, save_weights
from lora_utils.model.device import default_placement
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.presets import preset_for
from lora_utils.tracking import contact_sheet, html_report
from lora_utils.training import distributed, loop
from lora_utils.training.checkpoint import (
    list_checkpoints,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from lora_utils.training.distributed import Ranks
from lora_utils.training.monitor import TrainMonitor, describe_speed, final_loss
from lora_utils.training.previews import check_preview_prompts, preview_rows
from lora_utils.training.setup import TrainJob, setup
from lora_utils.training.state import TrainState, describe_placeholders, final_lora

log = logging.getLogger(__name__)

STOP_CHECK_STEPS = 10  # on several GPUs, from one question whether to stop to the next


def train_in_process(inputs: TrainInputs, target: Path, stopped: Callable[[], bool] = lambda: False) -> Path:
    """Train on an archive or a folder and write weights.zip to `target`. What was extracted is removed in any case.

    `stopped` is asked after each step; once it is true, what has been learned is written, and a checkpoint if there is
    a folder for it. Raises UserError for what can't be trained. -> `target`
    """
    ranks = distributed.init()
    try:
        if not ranks.is_main:
            logging.getLogger("lora_utils").setLevel(logging.ERROR)  # the main process speaks for all
        processes = f", {ranks.world_size} processes" if ranks.world_size > 1 else ""
        log.info("seed %d%s", inputs.config.seed, processes)
        check_folders(inputs.options, target)
        started = start(inputs, ranks)
        try:
            started.monitor.open()
            run_steps(started.state, inputs.options, started.monitor, stopped)
        finally:
            started.monitor.close()
        started.monitor.sum_up()
        if ranks.is_main:
            write_results(started, inputs, target)
        return target
    finally:
        distributed.destroy(ranks)


@dataclass(frozen=True, slots=True)
class StartedRun:
    """A run before its first step in this process, its monitor, and what the dataset was found to be."""

    state: TrainState
    monitor: TrainMonitor
    num_images: int
    dataset_report: list[str]


def check_folders(options: RunOptions, target: Path) -> None:
    """Raise UserError where nothing can be written, or where another run may yet be resumed."""
    with disk_errors(f"{target.name} can't be written to {target.parent}", "name another folder."):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent):  # as it will be written: found now, not after hours
            pass
    if not options.run_dir:
        return
    folder = Path(options.run_dir)
    with disk_errors(f"run_dir {folder} can't be made", "name another."):
        folder.mkdir(parents=True, exist_ok=True)
    if options.resume == "never" and (found := list_checkpoints(folder)):
        raise UserError(
            f"run_dir {folder} holds a run's checkpoints, the last of them {found[-1].name}; set resume to auto to "
            "continue it, name another folder, or remove them."
        )


def start(inputs: TrainInputs, ranks: Ranks) -> StartedRun:
    """Set a run up, or resume it. What can be refused without a model, from the data to the hub's token, is at once."""
    config, options, files = inputs.config, inputs.options, inputs.files
    found = list_checkpoints(Path(options.run_dir)) if options.resume == "auto" else []
    resumed = read_checkpoint(found[-1]) if found else None
    init_weights = read_init_weights(files.init_weights, config) if files.init_weights else None
    with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as folder:
        # The data and the prompts, with the tokenizer alone.
        images = extracted(files.dataset, Path(folder))
        base_model = base_model_name()
        tokenizer = load_tokenizer(download_model(base_model, ("tokenizer",)))
        rows = preview_rows(config, options)
        check_preview_prompts(rows, config, tokenizer)
        dataset = load(images, config, tokenizer)
        report = describe_dataset(dataset, config)
        for line in [*describe_goal(config), *report]:
            log.info(line)
        if options.hub_repo and ranks.is_main:
            hub.ensure_repository(options.hub_repo, files.hub_token, options.hub_private)

        # The model.
        job = TrainJob(
            config,
            dataset,
            download_model(base_model),
            default_placement(),
            ranks,
            list(chain(*rows)),
            options.shard_base,
            resumed.plan if resumed else None,
            init_weights,
        )
        state = setup(job)
    if resumed:
        restore_checkpoint(state, resumed)
        log.info("resuming from %s, after step %d", resumed.path, state.step)
    elif options.resume == "auto":
        log.info("no checkpoint in %s; starting from the first step", options.run_dir)
    return StartedRun(state, TrainMonitor(state, options, rows), dataset.num_images, report)


def describe_goal(config: TrainConfig) -> list[str]:
    """Say what the goal has chosen, and what the caller has in its place."""
    if config.goal == "none":
        return []
    chosen, ours = asdict(preset_for(config.goal, config.optimizer)), asdict(config)
    parts = [
        f"{name} {ours[name]}" + ("" if ours[name] == value else f" (yours; the goal's is {value})")
        for name, value in chosen.items()
    ]
    return [f"goal {config.goal}: {', '.join(parts)}"]


def run_steps(state: TrainState, options: RunOptions, monitor: TrainMonitor, stopped: Callable[[], bool]) -> None:
    """Step through the run, monitor it and save its checkpoints, until it is done or asked to stop."""
    steps, ranks = state.config.steps, state.ranks
    for report in loop.train(state):
        asked = report.step < steps and (ranks.world_size == 1 or report.step % STOP_CHECK_STEPS == 0)
        stop = asked and distributed.broadcast(ranks, stopped())
        monitor.after(report, stop)
        due = bool(options.save_every) and report.step % options.save_every == 0
        if options.run_dir and (due or stop):
            monitor.flush()
            if ranks.is_main:
                _save(state, options, is_last=stop or report.step == steps)
        if stop:
            log.info("stopped after step %d of %d, as asked", report.step, steps)
            break


def _save(state: TrainState, options: RunOptions, is_last: bool) -> None:
    """Save a checkpoint. Where the last one fails that is only logged: the weights themselves may yet find room."""
    try:
        saved = save_checkpoint(state, Path(options.run_dir), options.keep_checkpoints)
        log.info("checkpoint %s", saved)
    except UserError as error:
        if not is_last:
            raise
        log.warning("%s", error)


def write_results(started: StartedRun, inputs: TrainInputs, target: Path) -> None:
    """Write weights.zip, the last lines and the report, and push to the hub if that is asked for."""
    began, state, options = time.monotonic(), started.state, inputs.options
    facts = TrainingFacts(
        base_model_name(), started.num_images, state.step, final_loss(state), describe_placeholders(state)
    )
    save_weights(target, final_lora(state), state.resolved_config, facts)
    state.seconds["save"] = time.monotonic() - began
    timings = describe_speed(state)
    for line in timings:
        log.info(line)
    log.info("wrote %s, %.1f MB", target.name, target.stat().st_size / 1e6)
    if options.run_dir:
        summary = html_report.RunSummary(
            facts.base_model, asdict(state.resolved_config), started.dataset_report, timings
        )
        try:
            log.info("wrote %s", html_report.write_report(Path(options.run_dir), summary))
        except UserError as error:  # the weights are there
            log.warning("%s", error)
    if options.hub_repo:
        share(options, target, inputs.files.hub_token)


def share(options: RunOptions, weights: Path, hub_token: str | None) -> None:
    """Push to the hub. A failure there is only logged: the training is done."""
    sheets = contact_sheet.list_sheets(Path(options.run_dir)) if options.run_dir else []
    try:
        log.info("pushed to %s", hub.push_weights(options.hub_repo, hub_token, weights, sheets))
    except UserError as error:
        log.warning("%s; they are in %s, and can be pushed from there", error, weights.name)
