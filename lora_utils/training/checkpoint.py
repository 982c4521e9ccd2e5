"""Checkpoints: all that a run's next step follows from, on disk, whole or not there.

Owns the folders, what must be equal for a run to go on, and how old ones go. A checkpoint is written under another
name, synced to the disk and renamed: whatever kills the process, at whatever moment, the last one is whole. A run that
goes on from it is, on the same machine, the run that was never stopped, bit for bit.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_utils.disk import refusals_named
from lora_utils.draws import MicroBatches
from lora_utils.errors import UserError
from lora_utils.preparation import Run

_PREFIX, _PARTIAL = "step-", ".partial"
_STATE, _SETTINGS = "state.safetensors", "settings.json"
_SHOWN = 16  # digits of a hash, enough to tell two apart


def _learned(run: Run) -> list[torch.nn.Parameter | Tensor]:
    return [*run.lora, *run.placeholders.rows]


def _tensors(run: Run, optimizer: dict[str, Tensor]) -> dict[str, Tensor]:
    """By a name that says whose they are: the weights, what the optimizers keep, and the draws' place."""
    if run.stream is None:
        raise RuntimeError("a run that hasn't begun has no place to write down")
    tensors = {f"learned.{index}": parameter.detach() for index, parameter in enumerate(_learned(run))}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    tensors |= {f"draws.{name}": value for name, value in run.stream.place().items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _named(tensors: dict[str, Tensor], whose: str) -> dict[str, Tensor]:
    return {name.removeprefix(whose): value for name, value in tensors.items() if name.startswith(whose)}


def _settings(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    data = [(example.key, example.caption, str(example.size)) for example in run.examples]  # in the order of the draws
    return {
        **asdict(run.config),
        "base model": run.base[:_SHOWN],
        "init_weights": run.started_from[:_SHOWN],
        "cards": run.ranks.count,
        "pictures and captions": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        "device": run.place.device.type,
        "dtype": str(run.place.dtype),
        "torch": torch.__version__,
    }


def save(run: Run, folder: Path, keep: int) -> Path:
    """Write the run as it is now, and remove all but the `keep` last checkpoints. -> its folder.

    Raises UserError for weights that are no numbers, and where the disk is full; older checkpoints are whole then.
    """
    optimizer, numbers = run.optimizers.state()
    tensors = _tensors(run, optimizer)
    if not all(value.isfinite().all() for name, value in tensors.items() if name.startswith("learned")):
        raise UserError(f"the weights aren't finite after step {run.step}, and aren't saved; lower learning_rate.")
    target = folder / f"{_PREFIX}{run.step:06d}"
    partial = target.with_name(target.name + _PARTIAL)
    remedy = "free some room, lower keep_checkpoints or name another run_dir."
    if older := saved(folder):
        remedy += f" {older[-1].name} is whole: resume=auto goes on from it."
    with refusals_named(f"the checkpoint in {folder} can't be written", remedy):
        for left in folder.glob(f"{_PREFIX}*{_PARTIAL}"):  # by a process that was killed
            shutil.rmtree(left)
        try:
            partial.mkdir(parents=True)
            save_file(tensors, partial / _STATE)
            told = {"step": run.step, "compiled": run.compiled, "settings": _settings(run), "optimizer": numbers}
            (partial / _SETTINGS).write_text(json.dumps(told, indent=2) + "\n")
            for path in (partial / _STATE, partial / _SETTINGS, partial):
                _sync(path)
            if target.exists():  # the same step of a run before this one
                shutil.rmtree(target)
            partial.rename(target)
            _sync(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in saved(folder)[: -max(1, keep)]:
            shutil.rmtree(old)
    return target


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if not path.name.endswith(_PARTIAL)]
    return sorted(path for path in found if (path / _SETTINGS).is_file())


def seed_of(checkpoint: Path) -> int:
    """Of the run that wrote it."""
    try:
        return json.loads((checkpoint / _SETTINGS).read_text())["settings"]["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError(f"the checkpoint {checkpoint} can't be read ({error}); remove it, or name another run_dir.")


def restore(run: Run, checkpoint: Path) -> None:
    """Make a prepared run the one that was saved. Raises UserError for one of other settings or data."""
    try:
        written = json.loads((checkpoint / _SETTINGS).read_text())
        tensors = load_file(checkpoint / _STATE)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(checkpoint, error) from error
    ours, theirs = _settings(run), written["settings"]
    other = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if other:
        listed = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in other)
        raise UserError(
            f"the checkpoint {checkpoint} is another run's ({listed}). Give the same inputs and data, or another "
            "run_dir."
        )
    run.step = run.resumed_at = written["step"]
    run.compiled = written["compiled"]  # compiled blocks round another way
    with torch.no_grad():
        for index, parameter in enumerate(_learned(run)):
            parameter.copy_(tensors[f"learned.{index}"])
        run.optimizers.restore(_named(tensors, "optimizer."), written["optimizer"])
    run.stream = MicroBatches(run.config, run.examples, run.schedule, run.preserved)
    run.stream.return_to(_named(tensors, "draws."))
