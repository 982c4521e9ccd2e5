"""A resumed run is the uninterrupted one, and what isn't its continuation is refused by name."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from lora_utils.config import RunOptions, TrainInputs, from_inputs
from lora_utils.errors import UserError
from lora_utils.lora.weights import read_init_weights
from lora_utils.model import memory_plan
from lora_utils.training.checkpoint import (
    list_checkpoints,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
    with_seed_of_run,
)
from lora_utils.training.distributed import Ranks
from tests.helpers import lora_of, losses, make_state, resume_state, same_result, train_archive
from tests.training.conftest import CONFIG


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


# --- what is refused --------------------------------------------------------------------------------------------------


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


def test_a_new_run_does_not_begin_in_a_folder_with_anothers_checkpoints(archive, random_model, tmp_path, monkeypatch):
    """Its own would be the older ones of the two, and be removed."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options = RunOptions(run_dir=str(tmp_path / "run"), save_every=6)
    train_archive(CONFIG, archive, tmp_path / "weights.zip", options)
    with pytest.raises(UserError, match="holds a run's checkpoints, the last of them step-000012; set resume to auto"):
        train_archive(CONFIG, archive, tmp_path / "again.zip", options)
    assert len(list_checkpoints(tmp_path / "run")) == 2
