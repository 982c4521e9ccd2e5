"""Checkpoints: all that a run's next step follows from, on disk, complete or not there.

A checkpoint is written under another name, synced to the disk and renamed: whatever kills the process, at whatever
moment, the last one is complete. Each of its files has a hash, by which damage is found. A run resumed from it is, on
the same machine, the uninterrupted run bit for bit. So it keeps the memory plan that it began with; only what the
caller asked for is compared.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_utils.errors import UserError
from lora_utils.io.files import disk_errors, file_sha256
from lora_utils.model import modulation
from lora_utils.model.device import Placement, default_placement
from lora_utils.model.memory_plan import MemoryPlan
from lora_utils.training.batches import run_timesteps
from lora_utils.training.older_checkpoints import FORMAT, in_this_format, with_new_settings
from lora_utils.training.state import StepLoss, TrainState

log = logging.getLogger(__name__)

_PREFIX, _PARTIAL = "step-", ".partial"
_STATE_FILE, _SETTINGS_FILE = "state.safetensors", "settings.json"
_DIGEST, _TENSORS_DIGEST = "sha256", "tensors_sha256"
_SHOWN = 16  # digits of a hash, enough to tell two apart


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as it was read, but for its tensors."""

    path: Path
    step: int
    plan: MemoryPlan
    settings: dict[str, Any]  # what must be the same for a run to be resumed
    optimizer: dict[str, Any]
    recent_losses: list[StepLoss]
    validated_at: int
    previewed_at: int
    tensors_hash: str | None  # an older one doesn't say


# --- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(state: TrainState, folder: Path, keep: int) -> Path:
    """Write the run as it is now, and remove all but the `keep` last checkpoints. -> its folder

    Raises UserError for weights that are no numbers, and where the disk is full; older checkpoints are complete then.
    """
    # What a checkpoint holds.
    tensors, optimizer = _tensors_and_numbers(state)
    if not all(value.isfinite().all() for name, value in tensors.items() if name.startswith("learned")):
        raise UserError(f"the weights aren't finite after step {state.step}, and aren't saved; lower learning_rate.")
    written = {
        "format": FORMAT,
        "step": state.step,
        "plan": asdict(state.plan),
        "settings": _settings(state),
        "optimizer": optimizer,
        "recent_losses": [asdict(each) for each in state.recent_losses],
        "validated_at": state.validated_at,
        "previewed_at": state.previewed_at,
    }

    # Write it under another name, sync it and rename it: a kill at any moment leaves older ones complete.
    target = folder / f"{_PREFIX}{state.step:06d}"
    partial = target.with_name(target.name + _PARTIAL)
    remedy = "free some room, lower keep_checkpoints or name another run_dir."
    if older := list_checkpoints(folder):
        remedy += f" {older[-1].name} is complete: resume=auto continues from it."
    with disk_errors(f"the checkpoint in {folder} can't be written", remedy):
        for left in folder.glob(f"{_PREFIX}*{_PARTIAL}"):  # by a process that was killed
            shutil.rmtree(left)
        try:
            partial.mkdir(parents=True)
            save_file(tensors, partial / _STATE_FILE)
            written[_TENSORS_DIGEST] = file_sha256(partial / _STATE_FILE)
            written[_DIGEST] = _digest(written)
            (partial / _SETTINGS_FILE).write_text(json.dumps(written, indent=2) + "\n")
            for path in (partial / _STATE_FILE, partial / _SETTINGS_FILE, partial):
                _sync(path)
            if target.exists():  # the same step of a run before this one
                shutil.rmtree(target)
            partial.rename(target)
            _sync(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

        # Only now remove the oldest.
        for old in list_checkpoints(folder)[: -max(1, keep)]:
            shutil.rmtree(old)
    return target


def _tensors_and_numbers(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights, the optimizers' state and the stream's, by a name that says whose they are."""
    optimizer, numbers = state.optimizers.state_dict()
    tensors = {f"learned.{index}": parameter.detach() for index, parameter in enumerate(state.learned)}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    tensors |= {f"draws.{name}": value for name, value in state.stream.state_dict().items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, numbers


def _digest(written: Mapping[str, Any]) -> str:
    """Return the hash of a checkpoint's JSON without its own hash, by which damage to any of it is found."""
    rest = {name: value for name, value in written.items() if name != _DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _settings(state: TrainState) -> dict[str, Any]:
    """Return what must be the same for a run to be resumed."""
    # In the order in which the stream shows them.
    data = [
        (example.key, example.caption, str(example.size), *([example.controls.key] if example.controls else []))
        for example in state.data.examples
    ]
    placement = state.components.placement
    return {
        **asdict(state.config),
        "base model": state.base_model[:_SHOWN],
        "init_weights": state.init_weights[:_SHOWN],
        "processes": state.ranks.world_size,
        "images and captions": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        "device": placement.device.type,
        "dtype": str(placement.dtype),
        "torch": torch.__version__,
    }


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if not path.name.endswith(_PARTIAL)]
    return sorted(path for path in found if (path / _SETTINGS_FILE).is_file())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint but for its tensors. Raises UserError for one that can't be read."""
    try:
        found = json.loads((path / _SETTINGS_FILE).read_text())
        if _DIGEST in found and found[_DIGEST] != _digest(found):
            raise ValueError(f"{_SETTINGS_FILE} isn't as it was written")
        written = in_this_format(found)
        return Checkpoint(
            path,
            written["step"],
            MemoryPlan(**written["plan"]),
            written["settings"],
            written["optimizer"],
            [StepLoss(**each) for each in written["recent_losses"]],
            written["validated_at"],
            written["previewed_at"],
            written.get(_TENSORS_DIGEST),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def placement_of(checkpoint: Checkpoint) -> Placement:
    """Return this process's device, with the dtype that the checkpoint's run computed in on such a device."""
    own, settings = default_placement(), checkpoint.settings
    named = getattr(torch, str(settings.get("dtype")).removeprefix("torch."), None)
    same_device = settings.get("device") == own.device.type and isinstance(named, torch.dtype)
    return replace(own, dtype=named) if same_device else own


def with_seed_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a caller's inputs, with the seed of the run that they resume where they name none."""
    inputs, folder = dict(given), str(given.get("run_dir") or "").strip()
    resumes = inputs.get("resume") == "auto" and bool(folder)
    found = list_checkpoints(Path(folder)) if resumes and inputs.get("seed") in (None, -1) else []
    if found:
        inputs["seed"] = read_checkpoint(found[-1]).settings["seed"]
    return inputs


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the checkpoint {path} can't be read ({error}); remove it, or name another run_dir.")


def restore_checkpoint(state: TrainState, checkpoint: Checkpoint) -> None:
    """Make a run, set up with the checkpoint's plan, the one that was saved.

    It may have more steps than it had then. Raises UserError for a checkpoint of other settings or data.
    """
    ours, theirs = _settings(state), with_new_settings(checkpoint.settings)
    before, theirs["steps"] = theirs["steps"], max(theirs["steps"], ours["steps"])  # a run may grow
    other = [name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))]
    if other:
        listed = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in other)
        raise UserError(
            f"the checkpoint {checkpoint.path} is another run's ({listed}). Give the same inputs and data, or another "
            "run_dir."
        )
    if before < ours["steps"]:
        _log_longer(state, before)
    try:
        if checkpoint.tensors_hash not in (None, file_sha256(checkpoint.path / _STATE_FILE)):
            raise ValueError(f"{_STATE_FILE} isn't as it was written")
        tensors = load_file(checkpoint.path / _STATE_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(checkpoint.path, error) from error
    with torch.no_grad():
        for index, parameter in enumerate(state.learned):
            parameter.copy_(tensors[f"learned.{index}"])
        state.optimizers.load_state_dict(_belonging_to(tensors, "optimizer."), checkpoint.optimizer)
    state.stream.load_state_dict(_belonging_to(tensors, "draws."))
    state.step = state.resumed_at = checkpoint.step
    state.plan, state.recent_losses = checkpoint.plan, list(checkpoint.recent_losses)
    state.validated_at, state.previewed_at = checkpoint.validated_at, checkpoint.previewed_at


def _log_longer(state: TrainState, before: int) -> None:
    """Say that a run goes on for more steps, and whether the result is that of a run that had them from the start."""
    config = state.config
    log.info("lengthened from %d to %d steps", before, config.steps)
    if config.lr_scheduler != "constant":
        log.warning(
            "lr_scheduler %s goes on along the new length: the result isn't that of a run of %d steps from the start",
            config.lr_scheduler,
            config.steps,
        )
    components, examples = state.components, state.data.examples

    def has_table(steps: int) -> bool:
        longer, dtype = replace(config, steps=steps), components.placement.dtype
        shown = run_timesteps(longer, examples, components.schedule, dtype, state.ranks.world_size)
        return modulation.pays(len(shown), components.transformer.inner_dim)

    if has_table(before) and not has_table(config.steps):
        log.warning("the steps from here on have no modulation table any more: the result differs by its rounding")


def _same(ours: object, theirs: object) -> bool:
    return ours in theirs if isinstance(theirs, set) else ours == theirs


def _belonging_to(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
