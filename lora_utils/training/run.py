"""One training from an archive to weights.zip, with what a person reads on the way and what is kept of it.

Owns the order of the work, its lines, checkpoints and the stop in between; must not know Cog.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from lora_utils import (
    cards,
    checkpoints,
    fetch,
    hub,
    models,
    preflight,
    preparation,
    report,
    samples,
    training,
    weights,
)  # fmt: skip
from lora_utils.archive import unpack
from lora_utils.cards import agree
from lora_utils.command_line import to_options
from lora_utils.config import RunOptions, TrainConfig, random_seed
from lora_utils.disk import refusals_named
from lora_utils.errors import UserError
from lora_utils.recipes import recipe_for
from lora_utils.watching import Watch

log = logging.getLogger(__name__)

AGREE_EVERY = 10  # steps, on several cards, from one question whether to stop to the next


def output_path() -> Path:
    """A fresh file per run in a folder per process: the server sends it on, the next run replaces it."""
    folder = Path(tempfile.gettempdir()) / f"qwen-image-lora-train-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder / "weights.zip"


def run(
    config: TrainConfig, options: RunOptions, data: Path, target: Path, init_weights: Path | None = None,
    stopped: Callable[[], bool] = lambda: False, hub_token: str | None = None,
) -> Path:  # fmt: skip
    """Train on an archive or a folder and write weights.zip to `target`. What was unpacked is removed in any case.

    `stopped` is asked after each step; once it is true, what has been learned is written, and a checkpoint if there is
    a folder for it. -> `target`
    """
    ranks = cards.join()
    try:
        cards.silence(ranks)
        print(f"seed {config.seed}" + (f", {ranks.count} cards" if ranks.count > 1 else ""), flush=True)
        _open_folders(options, target)
        start = None if init_weights is None else preparation.read_start(init_weights, config)
        begun = _prepare(config, options, data, ranks, hub_token)
        if start is not None:
            preparation.start_from(begun.run, start)
        go_on(begun.run, options)
        try:
            begun.watch.open()
            consume(begun.run, options, begun.watch, stopped)
        finally:
            begun.watch.close()
        begun.watch.sum_up()
        if ranks.first:
            _write(begun, options, target)
            share(options, target, hub_token)
        return target
    finally:
        cards.leave(ranks)


def run_on_all_cards(
    config: TrainConfig, options: RunOptions, data: Path, target: Path, init_weights: Path | None = None,
    stopped: Callable[[], bool] = lambda: False, hub_token: str | None = None,
) -> Path:  # fmt: skip
    """The same in a process for each card, which are all ended when one fails or this call is cancelled."""
    command = ["lora_utils", "train", str(data.absolute()), f"--output={target.absolute()}"]
    if init_weights is not None:
        command.append(f"--init_weights={init_weights.absolute()}")
    command += [*to_options(config), *to_options(options)]
    secrets = {"HF_TOKEN": hub_token} if hub_token else {}  # an option could be read by others of the machine
    cards.launch(command, cards.several(), Path(__file__).parent.parent, secrets, stopped)
    return target


@dataclass(frozen=True, slots=True)
class _Begun:
    """A run before its first step, who watches it, and what was found."""

    run: preparation.Run
    watch: Watch
    num_images: int
    described: list[str]  # lines of the report on the data


def _prepare(
    config: TrainConfig, options: RunOptions, data: Path, ranks: cards.Ranks, hub_token: str | None
) -> _Begun:  # fmt: skip
    """What can be refused is, from the data to the hub's token, before a model is fetched or loaded."""
    with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as unpacked:
        folder = data if data.is_dir() else Path(unpacked)
        if folder is not data:
            unpack(data, folder)
        base_model = fetch.base_model_name()
        tokenizer = models.load_tokenizer(fetch.fetch_model(base_model, ("tokenizer",)))
        rows = samples.rows_of(config, options)
        samples.check_prompts(rows, config, tokenizer)
        found = preflight.read_dataset(folder, config, tokenizer)
        described = preflight.describe(found, config, tokenizer)
        print("\n".join([*describe_goal(config), *described]), flush=True)
        if options.hub_repo and ranks.first:
            hub.open_repository(options.hub_repo, hub_token, options.hub_private)
        model_folder = fetch.fetch_model(base_model)
        prepared = preparation.prepare(
            config, found, model_folder, models.default_place(), ranks=ranks, samples=list(chain(*rows)),
            shard_base=options.shard_base,
        )  # fmt: skip
    return _Begun(prepared, Watch(prepared, options, rows, model_folder), found.num_images, described)


def _write(begun: _Begun, options: RunOptions, target: Path) -> None:
    """weights.zip, the last lines, and the report."""
    began, base_model, run, loss = time.monotonic(), fetch.base_model_name(), begun.run, begun.watch.final_loss
    rows, lora = training.describe_placeholders(run), training.finish(run)
    weights.save_weights(target, lora, run.config, base_model, begun.num_images, loss, rows, run.step)
    run.seconds["save"] = time.monotonic() - began
    timings = training.describe_speed(run)
    print("\n".join(timings), flush=True)
    print(f"wrote {target.name}, {target.stat().st_size / 1e6:.1f} MB", flush=True)
    if options.run_dir:
        told = report.Told(base_model, run.config, begun.described, timings)
        try:
            print(f"wrote {report.write(Path(options.run_dir), told)}", flush=True)
        except UserError as error:  # the weights are there
            log.warning("%s", error)


def share(options: RunOptions, weights_path: Path, hub_token: str | None) -> None:
    """Push to the hub, if that is asked for. What fails there is said, and nothing else: the training is done."""
    if not options.hub_repo:
        return
    sheets = samples.saved(Path(options.run_dir)) if options.run_dir else []
    try:
        print(f"pushed to {hub.push(options.hub_repo, hub_token, weights_path, sheets)}", flush=True)
    except UserError as error:
        print(f"warning: {error}; they are in {weights_path.name}, and can be pushed from there", flush=True)


def describe_goal(config: TrainConfig) -> list[str]:
    """What the goal has chosen, and what the caller has in its place."""
    if config.goal == "none":
        return []
    chosen, ours = asdict(recipe_for(config.goal, config.optimizer)), asdict(config)
    parts = [
        f"{name} {ours[name]}" + ("" if ours[name] == value else f" (yours; the goal's is {value})")
        for name, value in chosen.items()
    ]
    return [f"goal {config.goal}: {', '.join(parts)}"]


def _open_folders(options: RunOptions, target: Path) -> None:
    """Where things will go. Raises UserError where nothing can, or another run may yet be gone on with."""
    with refusals_named(f"{target.name} can't be written to {target.parent}", "name another folder."):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent):  # as it will be written: found now, not after hours
            pass
    if not options.run_dir:
        return
    folder = Path(options.run_dir)
    with refusals_named(f"run_dir {folder} can't be made", "name another."):
        folder.mkdir(parents=True, exist_ok=True)
    if options.resume == "never" and (found := checkpoints.saved(folder)):
        raise UserError(
            f"run_dir {folder} holds a run's checkpoints, the last of them {found[-1].name}; set resume to auto to go "
            "on with it, name another folder, or remove them."
        )


def seed_for(options: RunOptions) -> int:
    """For a caller who gave none: that of the run that is to be gone on with, else a random one."""
    found = checkpoints.saved(Path(options.run_dir)) if options.resume == "auto" else []
    return checkpoints.seed_of(found[-1]) if found else random_seed()


def go_on(prepared: preparation.Run, options: RunOptions) -> None:
    """From the last checkpoint, if that is asked for and there is one."""
    found = checkpoints.saved(Path(options.run_dir)) if options.resume == "auto" else []
    if found:
        checkpoints.restore(prepared, found[-1])
        print(f"going on from {found[-1]}, after step {prepared.step}", flush=True)
    elif options.resume == "auto":
        print(f"no checkpoint in {options.run_dir}; starting anew", flush=True)


def consume(prepared: preparation.Run, options: RunOptions, watch: Watch, stopped: Callable[[], bool]) -> None:
    """Step through the run, watch it and keep its checkpoints, until it is done or asked to stop."""
    steps, ranks = prepared.config.steps, prepared.ranks
    for taken in training.train(prepared):
        asked = taken.step < steps and (ranks.count == 1 or taken.step % AGREE_EVERY == 0)
        stop = asked and agree(ranks, stopped())
        watch.after(taken, stop)
        due = options.save_every and taken.step % options.save_every == 0
        if options.run_dir and ranks.first and (due or stop):
            watch.note()
            try:
                kept = checkpoints.save(prepared, Path(options.run_dir), options.keep_checkpoints)
                print(f"checkpoint {kept}", flush=True)
            except UserError as error:
                if not stop and taken.step < steps:
                    raise
                log.warning("%s", error)  # the weights themselves may yet find room
        if stop:
            print(f"stopped after step {taken.step} of {steps}, as asked", flush=True)
            break
