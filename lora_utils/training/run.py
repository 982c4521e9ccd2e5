"""One training in this process, from an archive to weights.zip, with its checkpoints and the stop in between."""

import logging
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from lora_utils.config import RunOptions, TrainConfig, TrainInputs
from lora_utils.conflicts import check_conflicts
from lora_utils.dataset.examples import Dataset
from lora_utils.dataset.report import bucket_counts, describe_dataset, worst_crops
from lora_utils.dataset.scan import inspect, raise_problems
from lora_utils.errors import UserError
from lora_utils.io.archive import extracted
from lora_utils.io.download import base_model_name, download_model
from lora_utils.io.files import disk_errors, locked_folder, temporary_folder
from lora_utils.io.logging import by_product
from lora_utils.lora import hub
from lora_utils.lora.weights import read_init_weights
from lora_utils.model.device import default_placement
from lora_utils.model.memory_estimate import read_shapes
from lora_utils.model.text_encoder import load_tokenizer
from lora_utils.model.variant import read_variant
from lora_utils.presets import preset_for
from lora_utils.tracking import html_report
from lora_utils.tracking.status import RunStatus, read_status, write_status
from lora_utils.training import distributed, loop
from lora_utils.training.batch_plans import first_shown, shown_captions
from lora_utils.training.checkpoint import (
    list_checkpoints,
    placement_of,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from lora_utils.training.distributed import Ranks
from lora_utils.training.monitor import TrainMonitor
from lora_utils.training.preserved import preserved_prompts
from lora_utils.training.previews import hint_at_tokens, paired_rows, preview_pairs, preview_rows, usual_size
from lora_utils.training.results import (
    StartedRun,
    list_step_weights,
    write_report,
    write_results,
    write_step_weights,
)
from lora_utils.training.setup import TrainJob, setup

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
        for warning in check_conflicts(inputs.config, inputs.options):
            log.warning("%s", warning)
        with checked_folders(inputs.options, target, ranks), failure_as_status(inputs, ranks):
            started = start(inputs, ranks)
            try:
                started.monitor.open()
                run_steps(started, inputs, stopped)
            finally:
                started.monitor.close()
            started.monitor.sum_up()
            return write_results(started, inputs, target) if ranks.is_main else target
    finally:
        distributed.destroy(ranks)


@contextmanager
def failure_as_status(inputs: TrainInputs, ranks: Ranks) -> Iterator[None]:
    """Write what ends the run to its folder's status, if it has one, and let it go on its way."""
    folder = Path(inputs.options.run_dir) if inputs.options.run_dir and ranks.is_main else None
    if folder:
        with by_product("writing the status"):
            write_status(folder, RunStatus("starting", steps=inputs.config.steps))
    try:
        yield
    except BaseException as error:
        if folder:
            with by_product("writing the status"):
                why = str(error) or type(error).__name__
                state = "failed" if isinstance(error, Exception) else "cancelled"
                write_status(folder, replace(read_status(folder), state=state, eta_s=None, error=why))
        raise


@contextmanager
def checked_folders(options: RunOptions, target: Path, ranks: Ranks) -> Iterator[None]:
    """Keep the run's folder to this run within it.

    Raises UserError where nothing can be written, where another run uses the folder, or may yet be resumed in it.
    """
    with disk_errors(f"{target.name} can't be written to {target.parent}", "name another folder."):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent):  # as it will be written: found now, not after hours
            pass
    if not options.run_dir:
        yield
        return
    folder = Path(options.run_dir)
    with disk_errors(f"run_dir {folder} can't be made", "name another."):
        folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, f"run_dir {folder}") if ranks.is_main else nullcontext():
        if options.resume == "never" and (found := list_checkpoints(folder)):
            raise UserError(
                f"run_dir {folder} holds a run's checkpoints, the last of them {found[-1].name}; set resume to auto to "
                "continue it, name another folder, or remove them."
            )
        if options.resume == "never" and (left := list_step_weights(folder)):
            raise UserError(
                f"run_dir {folder} holds the weights of another run, the last of them {left[-1].name}; name another "
                "folder, or move them."
            )
        yield


def start(inputs: TrainInputs, ranks: Ranks) -> StartedRun:
    """Set a run up, or resume it. What can be refused without a model, from the data to the hub's token, is at once."""
    config, options, files = inputs.config, inputs.options, inputs.files
    found = list_checkpoints(Path(options.run_dir)) if options.resume == "auto" else []
    resumed = read_checkpoint(found[-1]) if found else None
    init_weights = read_init_weights(files.init_weights, config) if files.init_weights else None
    with temporary_folder("data") as folder:
        # The data and the prompts, with the tokenizer alone.
        images = extracted(files.dataset, folder)
        base_model = base_model_name()
        model_index = download_model(base_model, ("tokenizer",))
        tokenizer = load_tokenizer(model_index)
        rows = preview_rows(config, options)
        hint_at_tokens(rows, config)
        variant = read_variant(model_index)
        dataset = inspect(images, config, tokenizer, variant)
        report = describe_dataset(dataset, config)
        for line in [*describe_goal(config), *report]:
            log.info(line)
        raise_problems(dataset.problems)
        check_tokens_are_shown(dataset, config, ranks, init_weights.embeddings if init_weights else {})
        if options.hub_repo and ranks.is_main:
            hub.ensure_repository(options.hub_repo, files.hub_token, options.hub_private)

        crops = worst_crops(dataset) if options.run_dir and ranks.is_main else []
        pairs = preview_pairs(dataset, config, len(rows)) if variant.edits else []
        rows = paired_rows(rows, pairs, usual_size(config)) if pairs else rows

        # The model.
        model = download_model(base_model)
        shapes = read_shapes(model)
        job = TrainJob(
            config,
            dataset,
            model,
            placement_of(resumed) if resumed else default_placement(shapes.weights),
            tokenizer,
            shapes,
            ranks,
            rows,
            options.shard_base,
            resumed.plan if resumed else None,
            init_weights,
            variant=variant,
        )
        state = setup(job)
    if resumed:
        restore_checkpoint(state, resumed)
        log.info("resuming from %s, after step %d", resumed.path, state.step)
    elif options.resume == "auto":
        log.info("no checkpoint in %s; starting from the first step", options.run_dir)
    monitor = TrainMonitor(state, options, rows, pairs)
    return StartedRun(state, monitor, dataset.num_images, report, bucket_counts(dataset), crops)


def check_tokens_are_shown(dataset: Dataset, config: TrainConfig, ranks: Ranks, learned_before: Container[str]) -> None:
    """Raise UserError for a token that no batch of the run would show, which its seed tells, with the steps it takes.

    Captions that are still to be written aren't known yet. A token that isn't trained, or that has learned something
    before, needn't be shown.
    """
    if not config.learns_tokens or (config.autocaption and dataset.uncaptioned):
        return
    learned, _ = dataset.split(config.validation_share)
    a_step = config.gradient_accumulation * ranks.world_size
    count = config.steps * a_step
    looked_through = count + 10_000  # to say in which step it would be
    preserved = preserved_prompts(shown_captions(config, learned.examples, looked_through), config)
    found = first_shown(config, learned.examples, preserved, looked_through)
    for token, at in found.items():
        if token not in learned_before and (at is None or at >= count):
            needed = f"set steps to {at // a_step + 1} or more" if at is not None else "lower caption_dropout"
            raise UserError(
                f"none of the {count} batches of this run shows {token}, which would learn nothing; {needed}, or write "
                "it into more captions."
            )


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


def run_steps(started: StartedRun, inputs: TrainInputs, stopped: Callable[[], bool]) -> None:
    """Step through the run, monitor it and save its checkpoints, until it is done, asked to stop, or can't go on.

    An error after the first step ends it there: what was learned until then is kept. On several GPUs it is raised, for
    the others wait for this one.
    """
    state = started.state
    try:
        _run_steps(started, inputs, stopped)
    except Exception as error:  # whatever it is: hours of training aren't lost for it
        if state.sound is None or state.ranks.world_size > 1:
            raise
        if not isinstance(error, UserError):
            log.exception("an unexpected error; please report it with this traceback")
        log.warning("the run ends after step %d of %d: %s", state.step, state.config.steps, error)
        log.warning("what it has learned is written")
        started.monitor.write_status(error=str(error))


def report_so_far(started: StartedRun, inputs: TrainInputs) -> None:
    """Write the report of a run that is on, where there is a folder for it; not sooner than the page loads itself."""
    monitor, now = started.monitor, time.monotonic()
    if inputs.options.run_dir and started.state.ranks.is_main and now - monitor.reported_at > html_report.RELOAD_S:
        monitor.reported_at = now
        with by_product("the report"):
            monitor.flush()
            write_report(started, inputs, is_on=True)


def _run_steps(started: StartedRun, inputs: TrainInputs, stopped: Callable[[], bool]) -> None:
    state, monitor, options = started.state, started.monitor, inputs.options
    steps, ranks = state.config.steps, state.ranks
    for report in loop.train(state):
        asked = report.step < steps and (ranks.world_size == 1 or report.step % STOP_CHECK_STEPS == 0)
        stop = asked and distributed.broadcast(ranks, stopped())
        with by_product(f"looking at step {report.step}"):
            monitor.after(report, stop)
        if state.previewed_at == report.step and report.step < steps:
            report_so_far(started, inputs)
        due = bool(options.save_every) and (report.step % options.save_every == 0 or report.step == steps)
        if options.run_dir and (due or stop):
            with by_product(f"the checkpoint after step {report.step}"):
                monitor.flush()
                if ranks.is_main:
                    log.info("checkpoint %s", save_checkpoint(state, Path(options.run_dir), options.keep_checkpoints))
            with by_product(f"the weights after step {report.step}"):
                if ranks.is_main and options.keep_weights:
                    monitor.write_status(weights=write_step_weights(started, inputs).name)
            report_so_far(started, inputs)
        if stop:
            log.info("stopped after step %d of %d, as asked", report.step, steps)
            break
