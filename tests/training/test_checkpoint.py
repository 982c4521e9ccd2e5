"""Checkpoints: a resumed run is the uninterrupted one, and a kill leaves the last checkpoint complete."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_utils.config import RunOptions, TrainConfig, TrainInputs, from_inputs
from lora_utils.errors import UserError
from lora_utils.lora.weights import TrainingFacts, read_init_weights, save_weights
from lora_utils.lora.weights_zip import LORA_MEMBER
from lora_utils.model import memory_plan
from lora_utils.training import loop
from lora_utils.training.checkpoint import (
    list_checkpoints,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
    with_seed_of_run,
)
from lora_utils.training.distributed import Ranks
from lora_utils.training.state import current_lora, final_lora
from tests.helpers import ROOT, lora_of, losses, make_state, resume_state, same_result, train_archive

CONFIG = TrainConfig(
    steps=12,
    rank=4,
    learning_rate=1e-3,
    batch_size=3,
    gradient_accumulation=2,
    resolution="64",
    seed=0,
    lr_scheduler="cosine",
    warmup_steps=3,
    train_placeholder_token=True,
    class_word="square",
    preservation_weight=0.3,
)


@pytest.fixture
def new_run(dataset, random_model):
    def make(config=CONFIG, **job):
        return make_state(config, job.pop("dataset", dataset), random_model, **job)

    return make


@pytest.fixture
def resumed(dataset, random_model):
    def make(path, config=CONFIG, **job):
        return resume_state(config, dataset, random_model, path, **job)

    return make


# --- what a resumed run is ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(dataset, random_model):
    """A run that was never stopped, and its losses."""
    run = make_state(CONFIG, dataset, random_model)
    return run, losses(run)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_run_is_the_one_that_was_never_stopped(stop, uninterrupted, new_run, resumed, tmp_path):
    whole, expected = uninterrupted
    first = new_run()
    before = losses(first, stop)
    second = resumed(save_checkpoint(first, tmp_path, keep=2))
    assert before + losses(second) == expected
    assert same_result(whole, second)


def test_a_baseline_run_is_resumed_too_and_through_several_checkpoints(new_run, resumed, tmp_path):
    config = replace(CONFIG, train_placeholder_token=False, class_word="")
    uninterrupted = new_run(config)
    expected, found = losses(uninterrupted), []
    for _ in range(4):
        saved = list_checkpoints(tmp_path)
        run = resumed(saved[-1], config) if saved else new_run(config)
        found += losses(run, 3)
        save_checkpoint(run, tmp_path, keep=1)
    assert found == expected
    assert same_result(uninterrupted, run)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000012"]


def test_a_resumed_run_keeps_its_memory_plan_however_little_memory_is_free(
    archive, random_model, tmp_path, monkeypatch
):
    """The plan follows from the memory that happens to be free; what was begun exact isn't continued rounded."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=2, resume="auto")
    asked = iter([False] * 3 + [True])
    train_archive(CONFIG, archive, tmp_path / "early.zip", options, stopped=lambda: next(asked))
    begun = read_checkpoint(list_checkpoints(tmp_path / "run")[-1]).plan
    assert (begun.quantization, begun.text_encoder_on_device) == ("none", True)

    def little_memory(*_, **__):
        return memory_plan.MemoryPlan("nf4", text_encoder_on_device=False)

    monkeypatch.setattr(memory_plan, "choose_training_plan", little_memory)
    train_archive(CONFIG, archive, tmp_path / "late.zip", options)
    monkeypatch.undo()
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    train_archive(CONFIG, archive, tmp_path / "uninterrupted.zip")
    assert lora_of(tmp_path / "late.zip") == lora_of(tmp_path / "uninterrupted.zip")


def test_only_what_was_asked_for_is_compared_and_not_what_it_came_to(new_run, resumed, tmp_path):
    run = new_run()
    losses(run, 1)
    run.plan = replace(run.plan, quantization="fp8")  # as `auto` would choose on a smaller GPU
    path = save_checkpoint(run, tmp_path, keep=1)
    assert resumed(path).plan.quantization == "fp8"
    with pytest.raises(UserError, match="quantization: 'auto' there, 'none' here"):
        resumed(path, replace(CONFIG, quantization="none"))


def test_a_resumed_run_computes_its_blocks_as_before(new_run, resumed, tmp_path):
    run = new_run()
    losses(run, 2)
    run.plan = replace(run.plan, compiled=True, checkpointed_blocks=1)
    state = resumed(save_checkpoint(run, tmp_path, keep=1))
    assert (state.plan.compiled, state.plan.checkpointed_blocks) == (True, 1)


def test_the_final_loss_of_a_resumed_run_needs_no_log(archive, random_model, tmp_path, monkeypatch):
    """What a run resumes from is in its checkpoint: metrics.jsonl is for people, and may be gone."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    config = replace(CONFIG, steps=20)  # the final loss is the mean of the last two
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=19, resume="auto")
    asked = iter([False] * 18 + [True])
    train_archive(config, archive, tmp_path / "early.zip", options, stopped=lambda: next(asked))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train_archive(config, archive, tmp_path / "late.zip", options)
    train_archive(config, archive, tmp_path / "uninterrupted.zip")
    assert lora_of(tmp_path / "late.zip") == lora_of(tmp_path / "uninterrupted.zip")


def test_a_run_that_was_at_its_end_is_written_again(archive, random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=4, resume="auto")
    paths = [train_archive(CONFIG, archive, tmp_path / f"{name}.zip", options) for name in ("first", "again")]
    first, again = (lora_of(path) for path in paths)
    assert first == again
    assert "no step was left: all 12 were taken before" in capsys.readouterr().out
    assert first[1]["training_steps"] == CONFIG.steps


def test_without_a_seed_the_same_command_resumes_with_the_runs_own(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.chdir(tmp_path)
    given = {"dataset": archive, "run_dir": "run", "save_every": 2, "resume": "auto", "seed": -1}
    first = from_inputs(TrainInputs, with_seed_of_run(given)).config.seed
    options = RunOptions(run_dir="run", save_every=2, resume="auto")
    train_archive(replace(CONFIG, seed=first), archive, tmp_path / "first.zip", options)
    assert from_inputs(TrainInputs, with_seed_of_run(given)).config.seed == first
    assert from_inputs(TrainInputs, with_seed_of_run({**given, "resume": "never"})).config.seed != first
    assert from_inputs(TrainInputs, with_seed_of_run({**given, "seed": 7})).config.seed == 7
    (list_checkpoints(tmp_path / "run")[-1] / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        with_seed_of_run(given)


def write_older(checkpoint, written):
    """Write settings as an earlier version did: without the hash that finds them changed."""
    rest = {name: value for name, value in written.items() if name not in ("sha256", "tensors_sha256")}
    (checkpoint / "settings.json").write_text(json.dumps(rest))


def test_a_checkpoint_of_the_first_format_is_resumed(uninterrupted, new_run, resumed, tmp_path):
    """It has the quantisation as it came to, whether blocks were compiled, and older names; no plan and no losses."""
    whole, expected = uninterrupted
    first = new_run()
    before = losses(first, 5)
    path = save_checkpoint(first, tmp_path, keep=1)
    written = json.loads((path / "settings.json").read_text())
    settings = written["settings"] | {"quantization": "none"}
    for old, new in (("cards", "processes"), ("pictures and captions", "images and captions")):
        settings[old] = settings.pop(new)
    older = {"step": written["step"], "compiled": False, "settings": settings, "optimizer": written["optimizer"]}
    write_older(path, older)
    second = resumed(path)
    assert before + losses(second) == expected
    assert same_result(whole, second)
    with pytest.raises(UserError, match=r"seed: 0 there, 1 here"):
        resumed(path, replace(CONFIG, seed=1))


def test_in_an_older_checkpoint_no_alpha_means_the_rank(new_run, resumed, tmp_path):
    run = new_run()
    losses(run, 2)
    path = save_checkpoint(run, tmp_path, keep=1)
    written = json.loads((path / "settings.json").read_text())
    written["settings"]["lora_alpha"] = None
    write_older(path, written)
    with pytest.raises(UserError, match=rf"lora_alpha: {CONFIG.rank}\.0 there, 32\.0 here"):
        resumed(path)
    written["settings"]["rank"] = 32
    write_older(path, written)
    with pytest.raises(UserError, match=rf"\(rank: 32 there, {CONFIG.rank} here\)"):
        resumed(path)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_other_settings_or_data_are_refused_by_name(new_run, resumed, dataset, tmp_path):
    run = new_run()
    losses(run, 2)
    path = save_checkpoint(run, tmp_path, keep=2)
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 there, 0\.002 here; seed: 0 there, 1 here"):
        resumed(path, replace(CONFIG, learning_rate=2e-3, seed=1))
    renamed = replace(dataset.examples[0], caption="another <zwx>")
    for examples in ([renamed, *dataset.examples[1:]], dataset.examples[::-1]):
        with pytest.raises(UserError, match="images and captions"):
            restore_checkpoint(new_run(dataset=replace(dataset, examples=examples)), read_checkpoint(path))
    other = new_run()
    other.ranks = Ranks(0, 2)
    with pytest.raises(UserError, match="processes: 1 there, 2 here"):
        restore_checkpoint(other, read_checkpoint(path))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_another_base_model_is_refused(part, new_run, dataset, random_model, tmp_path):
    run = new_run()
    losses(run, 1)
    path = save_checkpoint(run, tmp_path / "run", keep=1)
    changed = shutil.copytree(random_model, tmp_path / "model")
    (file,) = (changed / part).glob("*.safetensors")
    weights = load_file(file)
    next(value for name, value in weights.items() if name.endswith("proj.weight"))[0, 0] += 1
    save_file(weights, file)
    with pytest.raises(UserError, match=r"base model: '[0-9a-f]{16}' there"):
        resume_state(CONFIG, dataset, changed, path)


def test_other_weights_to_start_from_are_refused(trained, new_run, resumed, tmp_path):
    start = read_init_weights(trained, CONFIG)
    run = new_run(init_weights=start)
    losses(run, 1)
    path = save_checkpoint(run, tmp_path / "run", keep=1)
    with pytest.raises(UserError, match=r"init_weights: '[0-9a-f]{16}' there, '' here"):
        resumed(path)
    assert resumed(path, init_weights=start).step == 1


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


def test_a_new_run_does_not_begin_in_a_folder_with_anothers_checkpoints(archive, random_model, tmp_path, monkeypatch):
    """Its own would be the older ones of the two, and be removed."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=6)
    train_archive(CONFIG, archive, tmp_path / "weights.zip", options)
    with pytest.raises(UserError, match="holds a run's checkpoints, the last of them step-000012; set resume to auto"):
        train_archive(CONFIG, archive, tmp_path / "again.zip", options)
    assert len(list_checkpoints(tmp_path / "run")) == 2


# --- disks and damage -----------------------------------------------------------------------------------------------


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


@pytest.fixture
def no_model(random_model, monkeypatch):
    """The model is there, and mustn't be loaded: what is refused is refused before."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    for loader in ("setup.load_transformer", "encoding.load_text_encoder"):
        monkeypatch.setattr(f"lora_utils.training.{loader}", lambda *_, **__: pytest.fail("loaded"))


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


# --- starting from weights ------------------------------------------------------------------------------------------


@pytest.fixture
def trained(archive, random_model, tmp_path, monkeypatch):
    """The weights of a short training."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    return train_archive(replace(CONFIG, steps=2, warmup_steps=1), archive, tmp_path / "trained.zip")


def test_a_run_that_starts_from_weights_starts_where_they_are(trained, new_run):
    fresh, start = new_run(), read_init_weights(trained, CONFIG)
    run, other = new_run(init_weights=start), new_run(init_weights=start)
    assert not all(torch.equal(weight, old) for weight, old in zip(run.lora, fresh.lora, strict=True))
    assert all(torch.equal(weight, same) for weight, same in zip(run.lora, other.lora, strict=True))
    assert torch.equal(run.placeholders.embeddings[0].detach(), start.embeddings["<zwx>"][0])
    with zipfile.ZipFile(trained) as packed:
        assert LORA_MEMBER in packed.namelist()
    assert len(losses(run)) == CONFIG.steps


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"train_placeholder_token": False, "class_word": ""}, "has learned <zwx>; set train_placeholder_token"),
        ({"placeholder_token": "<abc>"}, "has learned <zwx>; set train_placeholder_token"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_to_set(other, message, trained, no_model, archive, tmp_path):
    with pytest.raises(UserError, match=message):
        train_archive(replace(CONFIG, **other), archive, tmp_path / "weights.zip", init_weights=trained)


def test_weights_of_other_layers_are_refused_too(trained, new_run):
    config = replace(CONFIG, lora_targets="attention")
    message = r"init_weights has 24 layers and lora_targets adapts 16.*Choose the lora_targets it was trained with"
    with pytest.raises(UserError, match=message):
        new_run(config, init_weights=read_init_weights(trained, config))


# --- as a user runs it ----------------------------------------------------------------------------------------------

LONG = [
    "--steps",
    "24",
    "--rank",
    "4",
    "--batch_size",
    "2",
    "--resolution",
    "64",
    "--seed",
    "3",
    "--train_placeholder_token",
    "--learning_rate",
    "1e-3",
]


def start(archive, folder, model, *given):
    command = [sys.executable, "-m", "lora_utils", "train", str(archive), *LONG, *given]
    environment = {**os.environ, "BASE_MODEL": str(model), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(archive, random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(archive, folder, random_model)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    return lora_of(folder / "weights.zip")


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_and_resumed_writes_the_same_file(archive, random_model, tmp_path, undisturbed):
    """kill -9 twice: at most the steps since the last checkpoint are lost. `benchmarks.soak` kills more often."""
    keeping = ("--run_dir", str(tmp_path / "run"), "--save_every", "4", "--resume", "auto")
    for after_step in (8, 16):
        process = start(archive, tmp_path, random_model, *keeping)
        deadline = time.monotonic() + 60
        while _last(tmp_path / "run") < after_step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (tmp_path / "weights.zip").exists()
    process = start(archive, tmp_path, random_model, *keeping)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "resuming from" in said
    assert lora_of(tmp_path / "weights.zip") == undisturbed


def _last(folder):
    return max((int(path.name[5:11]) for path in list_checkpoints(folder)), default=0)


def test_a_stop_writes_a_checkpoint_and_usable_weights_and_says_where(archive, random_model, tmp_path, undisturbed):
    keeping = ("--run_dir", str(tmp_path / "run"), "--resume", "auto")
    process = start(archive, tmp_path, random_model, *keeping, "--output", "early.zip")
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "as asked" in said
    assert "checkpoint" in said
    assert "the weights are in early.zip" in said
    _, meta = lora_of(tmp_path / "early.zip")
    assert 0 < meta["training_steps"] < 24
    process = start(archive, tmp_path, random_model, *keeping)
    said = process.communicate(timeout=120)[0]
    assert f"after step {meta['training_steps']}" in said
    assert lora_of(tmp_path / "weights.zip") == undisturbed
