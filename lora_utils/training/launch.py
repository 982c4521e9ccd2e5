"""The start of a training: in this process, or in one for each GPU, which all end when one fails."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_utils.cli import to_options
from lora_utils.config import TrainInputs, from_inputs
from lora_utils.errors import UserError
from lora_utils.io.access import CALLER, Access
from lora_utils.io.files import new_process_folder
from lora_utils.io.logging import ERROR_PREFIX
from lora_utils.lora import hub
from lora_utils.training.checkpoint import with_seed_of_run
from lora_utils.training.run import train_in_process

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "HUB_TOKEN"  # by which a process of several is given the caller's token
ROOT = Path(__file__).parents[2]  # where `python -m lora_utils` finds the package
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A training's weights.zip, and the optimizer steps that were asked for."""

    weights: Path
    steps: int


def train(
    given: Mapping[str, Any],
    target: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
    access: Access = CALLER,
) -> TrainResult:
    """Train as a caller's inputs say, on all GPUs there are, and write weights.zip to `target`, or a temporary folder.

    Once `stopped` is true, what has been learned is written, and a checkpoint if there is a folder for it. `access`
    says which folders and whose token the caller may use. Raises UserError for bad input.
    """
    allowed = {**given, "run_dir": access.run_dir(str(given.get("run_dir") or "").strip())}
    inputs = from_inputs(TrainInputs, with_seed_of_run(allowed))
    if inputs.options.hub_repo:
        token = hub.need_token(inputs.options.hub_repo, access.hub_token(inputs.files.hub_token))
        inputs = replace(inputs, files=replace(inputs.files, hub_token=token))
    train_it = train_on_all_gpus if gpu_count() > 1 else train_in_process
    if target is not None:
        return TrainResult(train_it(inputs, target, stopped), inputs.config.steps)
    folder = new_process_folder("train")  # the server sends the file on, and the next run removes it
    try:
        return TrainResult(train_it(inputs, folder / "weights.zip", stopped), inputs.config.steps)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def gpu_count() -> int:
    """Return how many GPUs this process may use; 1 where it is one of several processes already."""
    if "RANK" in os.environ:
        return 1
    return max(1, torch.cuda.device_count())


def train_on_all_gpus(inputs: TrainInputs, target: Path, stopped: Callable[[], bool] = lambda: False) -> Path:
    """Train in a process for each GPU. They are all ended when one fails or this call is cancelled. -> `target`"""
    files = inputs.files
    arguments = ["lora_utils", "train", str(files.dataset.absolute()), f"--output={target.absolute()}"]
    if files.init_weights is not None:
        arguments.append(f"--init_weights={files.init_weights.absolute()}")
    arguments += [*to_options(inputs.config), *to_options(inputs.options)]
    # An option could be read by others on the machine, so the token goes into the environment.
    environment = {TOKEN_VARIABLE: files.hub_token} if files.hub_token else {}
    launch(arguments, gpu_count(), environment, stopped)
    return target


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Process:
    """A process of the run, with the lines that it has said and how many of them were relayed."""

    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    relayed: int = 0

    def collect(self) -> None:
        for line in self.popen.stdout or ():
            self.lines.append(line.rstrip())


def launch(
    module: Sequence[str],
    count: int,
    environment: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Run a module of Python's with its arguments in `count` processes, and relay what they print.

    All are ended when one ends badly, by a cancel, or by any other exception here. Once `stopped` is true they are
    asked to end by themselves, with SIGTERM. Raises UserError with the last words of the one that failed.
    """
    # What all processes have in common, and where they meet.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **(environment or {}),
    }

    # Start them, relay what they say, and leave none behind.
    processes: list[_Process] = []
    try:
        for rank in range(count):
            popen = subprocess.Popen(
                [sys.executable, "-m", *module],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            processes.append(_Process(popen))
            threading.Thread(target=processes[-1].collect, daemon=True).start()
        _wait(processes, stopped)
    finally:
        for process in processes:
            process.popen.kill()
        for process in processes:
            process.popen.wait()


def _wait(processes: Sequence[_Process], stopped: Callable[[], bool]) -> None:
    """Wait until all are done, and relay what they say from here: a thread's prints aren't in a run's log."""
    asked = False
    while True:
        if stopped() and not asked:
            asked = True
            for process in processes:
                process.popen.send_signal(signal.SIGTERM)
        codes = [process.popen.poll() for process in processes]
        if any(codes):
            time.sleep(0.2)  # their last words are on their way
        for rank, process in enumerate(processes):
            for line in process.lines[process.relayed :]:
                log.info(line if rank == 0 else f"process {rank}: {line}")
                process.relayed += 1
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            words = _last_words(processes[failed[0]].lines)
            raise UserError(words or f"process {failed[0]} ended with {codes[failed[0]]}")
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_S)


def _last_words(lines: Sequence[str]) -> str:
    """Return what a process said was wrong, which may be several lines; else its last one."""
    for index in reversed(range(len(lines))):
        if lines[index].startswith(ERROR_PREFIX):
            return "\n".join(lines[index:]).removeprefix(ERROR_PREFIX)
    return next((line for line in reversed(lines) if line.strip()), "")
