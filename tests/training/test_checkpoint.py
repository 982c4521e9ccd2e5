"""Checkpoints: a run that goes on is the run that was never stopped, and a kill leaves the last one whole."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_utils.config import RunOptions, TrainConfig
from lora_utils.errors import UserError
from lora_utils.lora.weights import save_weights
from lora_utils.lora.weights_zip import LORA_MEMBER, META_MEMBER
from lora_utils.model import transformer
from lora_utils.model.device import default_placement
from lora_utils.training import checkpoint, distributed, loop
from lora_utils.training.checkpoint import list_checkpoints, restore_checkpoint, save_checkpoint
from lora_utils.training.run import seed_for, train_once
from lora_utils.training.setup import read_init_weights, setup, start_from_weights
from lora_utils.training.state import TrainState
from tests.conftest import ROOT

CONFIG = TrainConfig(
    steps=12, rank=4, learning_rate=1e-3, batch_size=3, gradient_accumulation=2, resolution="64", seed=0,
    lr_scheduler="cosine", warmup_steps=3, train_placeholder_token=True, class_word="square", preservation_weight=0.3,
)  # fmt: skip


@pytest.fixture
def prepare(dataset, random_model):
    def make(config=CONFIG) -> TrainState:
        return setup(config, dataset, random_model, default_placement())

    return make


def steps(run, count=None):
    losses = []
    for report in loop.train(run):
        losses.append(report.loss)
        if len(losses) == count:
            break
    return losses


def same_result(one, other) -> bool:
    a, b = final_lora(one), final_lora(other)
    layers = all(torch.equal(a.layers[n].up, b.layers[n].up) and torch.equal(a.layers[n].down, b.layers[n].down)
                 for n in a.layers)  # fmt: skip
    return layers and all(torch.equal(a.rows[token], b.rows[token]) for token in a.rows)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_run_that_goes_on_is_the_one_that_was_never_stopped(stop, prepare, tmp_path):
    whole = prepare()
    expected = steps(whole)
    first = prepare()
    losses = steps(first, stop)
    path = save_checkpoint(first, tmp_path, keep=2)
    second = prepare()
    restore_checkpoint(second, path)
    assert losses + steps(second) == expected
    assert same_result(whole, second)


def test_a_baseline_run_goes_on_too_and_through_several_checkpoints(prepare, tmp_path):
    config = replace(CONFIG, train_placeholder_token=False, class_word="")
    whole = prepare(config)
    expected = steps(whole)
    losses = []
    for _ in range(4):
        run = prepare(config)
        if found := list_checkpoints(tmp_path):
            restore_checkpoint(run, found[-1])
        losses += steps(run, 3)
        save_checkpoint(run, tmp_path, keep=1)
    assert losses == expected
    assert same_result(whole, run)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000012"]


def test_a_run_that_was_at_its_end_is_written_again(archive, random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=4, resume="auto")
    paths = [train_once(CONFIG, options, archive, tmp_path / f"{name}.zip") for name in ("first", "again")]
    first, again = (lora_of(path) for path in paths)
    assert first[0] == again[0]
    assert again[1] == first[1]
    assert "no step was left: all 12 were taken before" in capsys.readouterr().out
    assert first[1]["training_steps"] == CONFIG.steps


def test_without_a_seed_the_same_command_goes_on_with_the_runs_own(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.chdir(tmp_path)
    options = RunOptions(run_dir="run", save_every=2, resume="auto")
    drawn = seed_for(options)
    train_once(replace(CONFIG, seed=drawn), options, archive, tmp_path / "first.zip")
    assert seed_for(options) == drawn
    assert seed_for(RunOptions()) != drawn
    (list_checkpoints(tmp_path / "run")[-1] / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        seed_for(options)


def test_other_settings_or_data_are_refused_by_name(prepare, tmp_path):
    run = prepare()
    steps(run, 2)
    path = save_checkpoint(run, tmp_path, keep=2)
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 there, 0\.002 here; seed: 0 there, 1 here"):
        restore_checkpoint(prepare(replace(CONFIG, learning_rate=2e-3, seed=1)), path)
    other = prepare()
    other.data.examples[0] = replace(other.data.examples[0], caption="another <zwx>")
    with pytest.raises(UserError, match="images and captions"):
        restore_checkpoint(other, path)
    other = prepare()
    other.data.examples.reverse()
    with pytest.raises(UserError, match="images and captions"):
        restore_checkpoint(other, path)
    other = prepare()
    other.ranks = distributed.Ranks(0, 2)
    with pytest.raises(UserError, match="GPUs: 1 there, 2 here"):
        restore_checkpoint(other, path)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_another_base_model_is_refused(part, prepare, dataset, random_model, tmp_path):
    run = prepare()
    steps(run, 1)
    path = save_checkpoint(run, tmp_path / "run", keep=1)
    changed = shutil.copytree(random_model, tmp_path / "model")
    (file,) = (changed / part).glob("*.safetensors")
    weights = load_file(file)
    next(value for name, value in weights.items() if name.endswith("proj.weight"))[0, 0] += 1
    save_file(weights, file)
    other = setup(CONFIG, dataset, changed, default_placement())
    with pytest.raises(UserError, match=r"base model: '[0-9a-f]{16}' there"):
        restore_checkpoint(other, path)


def test_other_weights_to_start_from_are_refused(trained, prepare, tmp_path):
    run = prepare()
    start_from_weights(run, read_init_weights(trained, CONFIG))
    steps(run, 1)
    path = save_checkpoint(run, tmp_path / "run", keep=1)
    with pytest.raises(UserError, match=r"init_weights: '[0-9a-f]{16}' there, '' here"):
        restore_checkpoint(prepare(), path)
    same = prepare()
    start_from_weights(same, read_init_weights(trained, CONFIG))
    restore_checkpoint(same, path)


def test_the_last_ones_are_kept(prepare, tmp_path):
    run = prepare()
    for report in loop.train(run):
        save_checkpoint(run, tmp_path, keep=3)
        if report.step == 6:
            break
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000005", "step-000006"]


@contextmanager
def files_end_at(size_bytes):
    """The system refuses to write beyond it, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_is_whole(prepare, tmp_path):
    run = prepare()
    steps(run, 2)
    with files_end_at(1000), pytest.raises(UserError, match=r"can't be written \(.*\); free some room.*run_dir\.$"):
        save_checkpoint(run, tmp_path, keep=1)
    whole = save_checkpoint(run, tmp_path, keep=1)
    run.step += 1
    message = r"can't be written \(.*File too large.*\); free some room.*step-000002 is whole: resume=auto goes on"
    with files_end_at(1000), pytest.raises(UserError, match=message):
        save_checkpoint(run, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    restore_checkpoint(prepare(), whole)


def test_a_checkpoint_that_fails_ends_the_run_but_not_after_its_last_step(
    archive, random_model, tmp_path, monkeypatch, caplog
):
    """What has been learned is worth more than the place to go on from."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))

    def refused(*_):
        raise UserError("no room")

    monkeypatch.setattr(checkpoint, "save", refused)
    for save_every, target in ((4, tmp_path / "early.zip"), (CONFIG.steps, tmp_path / "late.zip")):
        options = RunOptions(run_dir=str(tmp_path / "run"), save_every=save_every)
        with pytest.raises(UserError, match="no room") if save_every == 4 else nullcontext():
            train_once(CONFIG, options, archive, target)
    assert "no room" in caplog.text
    assert not (tmp_path / "early.zip").exists()
    assert lora_of(tmp_path / "late.zip")[1]["training_steps"] == CONFIG.steps


@pytest.fixture
def no_model(random_model, monkeypatch):
    """The model is there, and mustn't be loaded: what is refused is refused before."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    for part in ("load_transformer", "load_text_encoder"):
        monkeypatch.setattr(transformer, part, lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.usefixtures("no_model")
def test_places_that_nothing_can_be_written_to_are_refused_before_the_training(archive, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(UserError, match=r"weights.zip can't be written to .*file \(File exists\); name another folder"):
        train_once(CONFIG, RunOptions(), archive, file / "weights.zip")
    with pytest.raises(UserError, match=r"run_dir .*file can't be made \(File exists\); name another"):
        train_once(CONFIG, RunOptions(run_dir=str(file)), archive, tmp_path / "weights.zip")


def test_the_outputs_folder_is_made(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    path = train_once(replace(CONFIG, steps=1, warmup_steps=0), RunOptions(), archive, tmp_path / "a/b/weights.zip")
    assert [found.name for found in path.parent.iterdir()] == ["weights.zip"]


def test_weights_that_find_no_room_are_a_clear_error_and_leave_nothing(prepare, tmp_path):
    run = prepare()
    steps(run)
    with files_end_at(1000), pytest.raises(UserError, match=r"weights.zip can't be written \(.*\); free some room"):
        save_weights(tmp_path / "weights.zip", final_lora(run), CONFIG, "base", 1, None, [])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(prepare, tmp_path):
    run = prepare()
    steps(run, 2)
    half = tmp_path / "step-000001.partial"
    half.mkdir()
    (half / "settings.json").write_text("{}")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(run, tmp_path, keep=1)
    assert not half.exists()


def test_a_run_goes_on_with_the_blocks_that_it_had(prepare, tmp_path):
    run = prepare()
    steps(run, 2)
    run.plan.compiled = True
    path = save_checkpoint(run, tmp_path, keep=1)
    other = prepare()
    restore_checkpoint(other, path)
    assert other.compiled


def test_a_damaged_checkpoint_is_named(prepare, tmp_path):
    run = prepare()
    steps(run, 1)
    path = save_checkpoint(run, tmp_path, keep=1)
    (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000001 can't be read .*; remove it"):
        restore_checkpoint(prepare(), path)


def test_weights_that_are_no_numbers_are_not_saved(prepare, tmp_path):
    run = prepare()
    steps(run, 1)
    run.lora[0].data[0, 0] = torch.nan
    with pytest.raises(UserError, match="aren't finite after step 1"):
        save_checkpoint(run, tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="aren't finite after step 1; lower learning_rate"):
        final_lora(run)


def test_checkpoints_need_a_folder():
    for given in ({"save_every": 5}, {"resume": "auto"}):
        with pytest.raises(UserError, match="need a run_dir"):
            RunOptions(**given)


def test_a_new_run_does_not_begin_in_a_folder_with_anothers_checkpoints(archive, random_model, tmp_path, monkeypatch):
    """Its own would be the older ones of the two, and be removed."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=6)
    train_once(CONFIG, options, archive, tmp_path / "weights.zip")
    with pytest.raises(UserError, match="holds a run's checkpoints, the last of them step-000012; set resume to auto"):
        train_once(CONFIG, options, archive, tmp_path / "again.zip")
    assert len(list_checkpoints(tmp_path / "run")) == 2


# --- going on from weights ------------------------------------------------------------------------------------------


@pytest.fixture
def trained(archive, random_model, tmp_path, monkeypatch):
    """The weights of a short training."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    return train_once(replace(CONFIG, steps=2), RunOptions(), archive, tmp_path / "trained.zip")


def test_a_run_that_starts_from_weights_starts_where_they_are(trained, prepare):
    run = prepare()
    fresh = [weight.clone() for weight in run.lora]
    start_from_weights(run, read_init_weights(trained, CONFIG))
    with zipfile.ZipFile(trained) as packed:
        names = packed.namelist()
    assert LORA_MEMBER in names
    assert not all(torch.equal(weight, old) for weight, old in zip(run.lora, fresh, strict=True))
    start = final_lora(replace_first_rows(run))
    other = prepare()
    start_from_weights(other, read_init_weights(trained, CONFIG))
    assert all(torch.equal(layer.up, final_lora(replace_first_rows(other)).layers[n].up)
               for n, layer in start.layers.items())  # fmt: skip
    assert len(steps(run)) == CONFIG.steps


def replace_first_rows(run):
    run.initial_embeddings = tuple(torch.zeros_like(row) for row in run.initial_embeddings)
    return run


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rank": 8}, "init_weights trained.zip is of rank 4, and rank is 8; set rank=4"),
        ({"train_placeholder_token": False, "class_word": ""}, "has learned <zwx>; set train_placeholder_token"),
        ({"placeholder_token": "<abc>"}, "has learned <zwx>; set train_placeholder_token"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_to_set(other, message, trained, no_model, archive, tmp_path):
    with pytest.raises(UserError, match=message):
        train_once(replace(CONFIG, **other), RunOptions(), archive, tmp_path / "weights.zip", trained)


def test_weights_of_other_layers_are_refused_too(trained, prepare):
    run = prepare(replace(CONFIG, lora_targets="attention_mlp"))
    with pytest.raises(
        UserError,
        match=r"init_weights has 16 layers and lora_targets adapts 24.*Choose the lora_targets it was trained with",
    ):
        start_from_weights(run, read_init_weights(trained, run.config))


# --- as a user runs it ----------------------------------------------------------------------------------------------

LONG = ["--steps", "40", "--rank", "4", "--batch_size", "2", "--resolution", "64", "--seed", "3",
        "--train_placeholder_token", "--learning_rate", "1e-3"]  # fmt: skip


def start(archive, folder, model, *given):
    command = [sys.executable, "-m", "lora_utils", "train", str(archive), *LONG, *given]
    environment = {**os.environ, "BASE_MODEL": str(model), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lora_of(path):
    """The LoRA file's bytes, and all that meta.json says but when it was written."""
    with zipfile.ZipFile(path) as packed:
        meta = json.loads(packed.read(META_MEMBER))
        return packed.read(LORA_MEMBER), {name: value for name, value in meta.items() if name != "created"}


@pytest.fixture(scope="module")
def undisturbed(archive, random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(archive, folder, random_model)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    return lora_of(folder / "weights.zip")


def test_a_run_that_is_killed_at_random_and_resumed_writes_the_same_file(archive, random_model, tmp_path, undisturbed):
    """kill -9 again and again: at most the steps since the last checkpoint are lost."""
    keeping = ("--run_dir", str(tmp_path / "run"), "--save_every", "4", "--resume", "auto")
    for wait_for in (1, 2, 3):
        process = start(archive, tmp_path, random_model, *keeping)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "run").glob("step-*"))) == 0 or _last(tmp_path / "run") < 8 * wait_for:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (tmp_path / "weights.zip").exists()
    process = start(archive, tmp_path, random_model, *keeping)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "going on from" in said
    assert lora_of(tmp_path / "weights.zip") == undisturbed


def _last(folder):
    return max((int(path.name[5:11]) for path in list_checkpoints(folder)), default=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_writes_a_checkpoint_and_usable_weights_and_says_where(
    number, archive, random_model, tmp_path, undisturbed
):
    keeping = ("--run_dir", str(tmp_path / "run"), "--resume", "auto")
    process = start(archive, tmp_path, random_model, *keeping, "--output", "early.zip", "--steps", "40")
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(number)
            break
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "as asked" in said
    assert "checkpoint" in said
    assert "the weights are in early.zip" in said
    _, meta = lora_of(tmp_path / "early.zip")
    assert 0 < meta["training_steps"] < 40
    process = start(archive, tmp_path, random_model, *keeping)
    said = process.communicate(timeout=120)[0]
    assert f"after step {meta['training_steps']}" in said
    assert lora_of(tmp_path / "weights.zip") == undisturbed
