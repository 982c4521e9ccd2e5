"""One training from an archive to weights.zip, with what a person reads on the way and what is kept of it.

Owns the order of the work, its lines, checkpoints and the stop in between; must not know Cog.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lora_utils import cards, checkpoints, fetch, models, preflight, preparation, training, weights
from lora_utils.archive import unpack
from lora_utils.command_line import to_options
from lora_utils.config import RunOptions, TrainConfig, random_seed
from lora_utils.console import Progress

AGREE_EVERY = 10  # steps, on several cards, from one question whether to stop to the next


def output_path() -> Path:
    """A fresh file per run in a folder per process: the server sends it on, the next run replaces it."""
    folder = Path(tempfile.gettempdir()) / f"qwen-image-lora-train-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder / "weights.zip"


def run(
    config: TrainConfig, options: RunOptions, data: Path, target: Path, init_weights: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Path:  # fmt: skip
    """Train on an archive or a folder and write weights.zip to `target`. What was unpacked is removed in any case.

    `stopped` is asked after each step; once it is true, what has been learned is written, and a checkpoint if there is
    a folder for it. -> `target`
    """
    ranks = cards.join()
    try:
        return _run(config, options, data, target, init_weights, stopped, ranks)
    finally:
        cards.leave(ranks)


def run_on_all_cards(
    config: TrainConfig, options: RunOptions, data: Path, target: Path, init_weights: Path | None = None
) -> Path:
    """The same in a process for each card, which are all ended when one fails or this call is cancelled."""
    command = ["lora_utils", "train", str(data.absolute()), f"--output={target.absolute()}"]
    if init_weights is not None:
        command.append(f"--init_weights={init_weights.absolute()}")
    command += [*to_options(config), *to_options(options)]
    cards.launch(command, cards.several(), Path(__file__).parent.parent)
    return target


def _run(
    config: TrainConfig, options: RunOptions, data: Path, target: Path, init_weights: Path | None,
    stopped: Callable[[], bool], ranks: cards.Ranks,
) -> Path:  # fmt: skip
    cards.silence(ranks)
    print(f"seed {config.seed}" + (f", {ranks.count} cards" if ranks.count > 1 else ""), flush=True)
    if options.run_dir:
        Path(options.run_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as unpacked:
        folder = data if data.is_dir() else Path(unpacked)
        if folder is not data:
            unpack(data, folder)
        base_model = fetch.base_model_name()
        tokenizer = models.load_tokenizer(fetch.fetch_model(base_model, ("tokenizer",)))
        found = preflight.read_dataset(folder, config, tokenizer)
        for line in preflight.describe(found, config, tokenizer):
            print(line, flush=True)
        folder = fetch.fetch_model(base_model)
        prepared = preparation.prepare(config, found, folder, models.default_place(), ranks=ranks)
    if init_weights is not None:
        preparation.start_from(prepared, init_weights)
    go_on(prepared, options)
    loss = consume(prepared, options, stopped)
    if not ranks.first:
        return target
    began = time.monotonic()
    described = training.describe_placeholders(prepared)
    lora, steps = training.finish(prepared), prepared.step
    weights.save_weights(target, lora, prepared.config, base_model, found.num_images, loss, described, steps)
    prepared.seconds["save"] = time.monotonic() - began
    for line in training.describe_speed(prepared):
        print(line, flush=True)
    print(f"wrote {target.name}, {target.stat().st_size / 1e6:.1f} MB", flush=True)
    return target


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


def consume(prepared: preparation.Run, options: RunOptions, stopped: Callable[[], bool]) -> float | None:
    """Step through the run, print its progress and keep its checkpoints. -> the mean loss of the last tenth."""
    config, progress, reports, printed = prepared.config, Progress(prepared.config.steps), [], 0
    first = prepared.step
    for report in training.train(prepared):
        reports.append(report)  # numbers are read, and the device waited for, only where a line is printed
        last = report.step == config.steps
        if prepared.ranks.count == 1 or report.step % AGREE_EVERY == 0:
            last = last or cards.agree(prepared.ranks, stopped())
        if progress.is_due(report.step) or last:
            rate, grad = f"lr {report.learning_rate:.1e}", f"grad {float(report.grad_norm):.2f}"
            losses, pace = described_losses(reports[printed:]), progress.pace(report.step - first)
            print(f"step {report.step}/{config.steps} {losses} {rate} {grad} {pace}", flush=True)
            for token, row in training.report_rows(prepared).items():
                near = f"nearest {row.nearest!r} (cosine {row.cosine:.2f})"
                grad = f"grad {float(report.row_grad_norms.get(token, 0)):.2g}"
                print(
                    f"  {token} norm {row.norm:.4f}, {row.share_of_median:.1%} of a word's, {grad}, {near}", flush=True
                )
            printed = len(reports)
        due = options.save_every and report.step % options.save_every == 0
        if options.run_dir and prepared.ranks.first and (due or (last and report.step < config.steps)):
            kept = checkpoints.save(prepared, Path(options.run_dir), options.keep_checkpoints)
            print(f"checkpoint {kept}", flush=True)
        if last and report.step < config.steps:
            print(f"stopped after step {report.step} of {config.steps}, as asked", flush=True)
            break
    prepared.seconds["train"] = max(1e-3, progress.elapsed_s() - prepared.seconds.get("probe", 0.0))
    taught = mean_of([report.taught for report in reports[-max(1, len(reports) // 10) :]])
    return taught if taught is not None else reports[-1].loss if reports else None


def described_losses(reports: list[training.StepReport]) -> str:
    """The mean losses of these steps' micro-batches: of those that taught, and of those that held the class."""
    taught, kept = mean_of([report.taught for report in reports]), mean_of([report.kept for report in reports])
    parts = ["loss -" if taught is None else f"loss {taught:.4f}", "" if kept is None else f"class {kept:.4f}"]
    return " ".join(filter(None, parts))


def mean_of(losses: list[torch.Tensor]) -> float | None:
    """None where there are none."""
    some = [loss for loss in losses if len(loss)]
    return float(torch.cat(some).mean()) if some else None
