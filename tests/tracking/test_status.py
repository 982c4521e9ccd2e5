"""status.json: where a run is, for programs that watch it; and the weights of steps on the way."""

import json
import shutil
from dataclasses import replace

import pytest

from lora_utils.errors import UserError
from lora_utils.lora.weights import load_weights
from lora_utils.tracking.status import STATUS_FILE, RunStatus, read_status, write_status
from lora_utils.training import results
from lora_utils.training.results import describe_best, list_step_weights
from tests.helpers import SHORT_RUN, lora_of
from tests.lora import judge


def status_of(folder):
    return json.loads((folder / STATUS_FILE).read_text())


def test_a_finished_run_is_done_and_names_what_it_left(train_run):
    weights, folder = train_run(sample_prompts="a red circle", sample_steps=1, save_every=4)
    found = status_of(folder)
    assert (found["state"], found["step"], found["steps"]) == ("done", 8, 8)
    assert found["loss"] > 0
    assert (found["eta_s"], found["error"]) == (None, None)
    assert (folder / found["preview"]).is_file()
    assert found["weights"] == weights.name


def test_a_stopped_run_says_so_and_a_failed_one_says_why(train_run, tmp_path):
    asked = iter([False, True])
    _, folder = train_run("stopped", stopped=lambda: next(asked))
    assert (status_of(folder)["state"], status_of(folder)["step"]) == ("stopped", 2)
    with pytest.raises(UserError):
        train_run("failed", replace(SHORT_RUN, placeholder_token="<nowhere>"))
    found = status_of(tmp_path / "failed")
    assert found["state"] == "failed"
    assert "none of the 10 captions holds the placeholder token '<nowhere>'" in found["error"]


def test_while_a_run_is_on_its_status_has_step_loss_and_eta(train_run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("lora_utils.training.monitor.write_status", lambda folder, status: seen.append(status))
    monkeypatch.setattr("lora_utils.io.logging.Progress.should_log", lambda *_: True)
    train_run()
    on = [status for status in seen if status.state == "running" and status.step]
    assert [status.step for status in on] == list(range(1, 9))
    assert all(status.loss > 0 and status.eta_s >= 0 for status in on)


def test_a_status_that_cannot_be_read_is_that_of_a_run_that_begins(tmp_path):
    assert read_status(tmp_path) == RunStatus("starting")
    (tmp_path / STATUS_FILE).write_text('{"state": ')
    assert read_status(tmp_path) == RunStatus("starting")
    write_status(tmp_path, RunStatus("running", 3, 9, 1.5))
    assert read_status(tmp_path) == RunStatus("running", 3, 9, 1.5)


# --- weights on the way ---------------------------------------------------------------------------------------------


def test_checkpoints_leave_usable_weights_the_last_of_which_are_kept(train_run, components):
    weights, folder = train_run(save_every=2, keep_weights=2)
    found = list_step_weights(folder)
    assert [path.name for path in found] == ["weights-step-000006.zip", "weights-step-000008.zip"]
    assert lora_of(found[-1])[0] == lora_of(weights)[0], "those of the last step are the result"
    lora, meta = lora_of(found[0])
    assert (meta["training_steps"], lora != lora_of(weights)[0]) == (6, True)
    loaded = load_weights(found[0], components).lora
    assert judge.ours(components, loaded).isfinite().all()
    _, folder = train_run("without", save_every=4, keep_weights=0)
    assert list_step_weights(folder) == []


def test_another_runs_weights_are_neither_mixed_with_a_runs_own_nor_removed(train_run, tmp_path):
    _, folder = train_run("old", save_every=4)
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    old = list_step_weights(folder)
    with pytest.raises(UserError, match=r"holds the weights of another run, the last of them weights-step-000008\.zip"):
        train_run("old", save_every=4)
    assert list_step_weights(folder) == old


def test_a_resumed_run_keeps_its_new_weights_beside_those_of_steps_that_a_kill_has_undone(train_run, tmp_path):
    _, folder = train_run("killed", save_every=2, keep_weights=2, keep_checkpoints=9)
    for step in (4, 6, 8):
        shutil.rmtree(folder / f"step-{step:06d}")
    (tmp_path / "killed.zip").unlink()
    asked = iter([False, True])
    train_run("killed", save_every=2, keep_weights=2, resume="auto", stopped=lambda: next(asked))
    names = [path.name for path in list_step_weights(folder)]
    assert "weights-step-000004.zip" in names, "the one that was just written"
    assert status_of(folder)["weights"] == "killed.zip"


def test_weights_of_a_step_are_those_of_a_run_that_ends_there(train_run):
    _, folder = train_run(save_every=4)
    short, _ = train_run("short", replace(SHORT_RUN, steps=4))
    (step_4, meta), (ended, ended_meta) = lora_of(list_step_weights(folder)[0]), lora_of(short)
    assert results.STEP_WEIGHTS.format(4) == list_step_weights(folder)[0].name
    assert step_4 == ended
    assert meta["final_loss"] == pytest.approx(ended_meta["final_loss"])


def test_with_images_held_out_the_best_weights_are_named(train_run, caplog):
    _, folder = train_run(config=replace(SHORT_RUN, validation_share=0.2, learning_rate=3e-2), save_every=2)
    losses = {
        line["step"]: line["validation"]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "validation" in line
    }
    kept = {int(path.stem[-6:]): path.name for path in list_step_weights(folder)}
    best = min(kept, key=losses.__getitem__)
    assert describe_best(folder) == f"lowest loss on images held out: {losses[best]:.4f}, with {kept[best]}"
    assert describe_best(folder) in caplog.text
