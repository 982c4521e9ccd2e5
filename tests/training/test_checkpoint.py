"""A checkpoint is complete or it isn't there: damage, full disks and killed processes."""

import json
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_utils.config import RunOptions
from lora_utils.errors import UserError
from lora_utils.lora.weights import TrainingFacts, save_weights
from lora_utils.training import loop
from lora_utils.training.checkpoint import (
    list_checkpoints,
    save_checkpoint,
)
from lora_utils.training.state import current_lora, final_lora
from tests.helpers import lora_of, losses, train_archive
from tests.training.conftest import CONFIG


def _with_another_decay(path):
    written = json.loads((path / "settings.json").read_text())
    written["optimizer"]["0.group.weight_decay"] = 1e9
    (path / "settings.json").write_text(json.dumps(written))


def _with_another_shape(path):
    tensors = load_file(path / "state.safetensors")
    save_file({**tensors, "learned.0": torch.zeros(3, 5)}, path / "state.safetensors")


def _with_another_bit(path):
    written = bytearray((path / "state.safetensors").read_bytes())
    written[-5] ^= 1
    (path / "state.safetensors").write_bytes(written)


DAMAGE = {
    "no tensors": lambda path: (path / "state.safetensors").write_bytes(b""),
    "a bit of a number": _with_another_bit,
    "a tensor of another shape": _with_another_shape,
    "a changed setting": _with_another_decay,
    "a list": lambda path: (path / "settings.json").write_text("[]"),
    "a file that ends early": lambda path: (path / "settings.json").write_text('{"format": 2, "st'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named(damage, new_run, resumed, tmp_path):
    run = new_run()
    losses(run, 1)
    path = save_checkpoint(run, tmp_path, keep=1)
    damage(path)
    with pytest.raises(UserError, match=r"step-000001 can't be read .*; remove it"):
        resumed(path)


def test_the_last_ones_are_kept(new_run, tmp_path):
    run = new_run()
    for report in loop.train(run):
        save_checkpoint(run, tmp_path, keep=3)
        if report.step == 6:
            break
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000005", "step-000006"]


@contextmanager
def files_end_at(size_bytes):
    """Let the system refuse to write beyond it, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_is_complete(new_run, resumed, tmp_path):
    run = new_run()
    losses(run, 2)
    with files_end_at(1000), pytest.raises(UserError, match=r"can't be written \(.*\); free some room.*run_dir\.$"):
        save_checkpoint(run, tmp_path, keep=1)
    complete = save_checkpoint(run, tmp_path, keep=1)
    run.step += 1
    message = r"can't be written \(.*File too large.*\); free some room.*step-000002 is complete: resume=auto continues"
    with files_end_at(1000), pytest.raises(UserError, match=message):
        save_checkpoint(run, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [complete.name]
    assert resumed(complete).step == 2


def test_a_checkpoint_that_fails_is_a_warning(archive, random_model, tmp_path, monkeypatch, caplog):
    """What has been learned is worth more than the checkpoint to resume from."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))

    def refused(*_):
        raise UserError("no room")

    monkeypatch.setattr("lora_utils.training.run.save_checkpoint", refused)
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=4)
    train_archive(CONFIG, archive, tmp_path / "w.zip", options)
    assert caplog.text.count("the checkpoint after step 4 failed: no room") == 1
    assert lora_of(tmp_path / "w.zip")[1]["training_steps"] == CONFIG.steps


@pytest.mark.usefixtures("no_model")
def test_folders_that_nothing_can_be_written_to_are_refused_before_the_training(archive, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(UserError, match=r"weights.zip can't be written to .*file \(File exists\); name another folder"):
        train_archive(CONFIG, archive, file / "weights.zip")
    with pytest.raises(UserError, match=r"run_dir .*file can't be made \(File exists\); name another"):
        train_archive(CONFIG, archive, tmp_path / "weights.zip", RunOptions(run_dir=str(file)))


def test_the_outputs_folder_is_made(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    path = train_archive(replace(CONFIG, steps=1, warmup_steps=0), archive, tmp_path / "a/b/weights.zip")
    assert [found.name for found in path.parent.iterdir()] == ["weights.zip"]


def test_weights_that_find_no_room_are_a_clear_error_and_leave_nothing(new_run, tmp_path):
    run = new_run()
    losses(run)
    facts = TrainingFacts("base", 1, run.step, None, [])
    with files_end_at(1000), pytest.raises(UserError, match=r"weights.zip can't be written \(.*\); free some room"):
        save_weights(tmp_path / "weights.zip", final_lora(run), CONFIG, facts)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_checkpoint_and_is_removed(new_run, tmp_path):
    run = new_run()
    losses(run, 2)
    half = tmp_path / "step-000001.partial"
    half.mkdir()
    (half / "settings.json").write_text("{}")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(run, tmp_path, keep=1)
    assert not half.exists()


def test_weights_that_are_no_numbers_are_not_saved(new_run, tmp_path):
    run = new_run()
    losses(run, 1)
    sound = current_lora(run)
    run.lora[0].data[0, 0] = torch.nan
    with pytest.raises(UserError, match="aren't finite after step 1"):
        save_checkpoint(run, tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []
    kept = final_lora(run)
    assert all(torch.equal(kept.layers[name].up, layer.up) for name, layer in sound.layers.items())
    run.sound = None
    with pytest.raises(UserError, match="aren't finite after step 1; lower learning_rate"):
        final_lora(run)
