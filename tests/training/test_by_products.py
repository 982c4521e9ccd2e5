"""By-products never cost a run: whatever fails after the first step, the weights are those of an undisturbed run."""

import itertools
from dataclasses import replace
from pkgutil import resolve_name

import pytest
import torch

from lora_utils.config import RunOptions
from lora_utils.errors import UserError
from lora_utils.io.logging import by_product
from lora_utils.lora.weights import load_weights
from lora_utils.training import loop, results, run
from lora_utils.training.batch_plans import generator_for
from tests.helpers import SHORT_RUN, lora_of, train_archive, without_thumbnail

STEPS = 4
CONFIG = replace(SHORT_RUN, steps=STEPS, validation_share=0.2)
OPTIONS = {"save_every": 1, "sample_prompts": "a <zwx>", "sample_every": 1, "sample_steps": 1, "hub_repo": "me/it"}

# What is made to fail: a function, with how many calls come before the first step. Those may refuse the run.
MONITOR, RUN = "lora_utils.training.monitor", "lora_utils.training.run"
BY_PRODUCTS = {
    "metrics": ("lora_utils.tracking.metrics.MetricsLogger._append", 1),
    "steps of the metrics": ("lora_utils.tracking.metrics.MetricsLogger.steps", 2),
    "TensorBoard": ("accelerate.tracking.TensorBoardTracker.log", 1),
    "TensorBoard's images": ("accelerate.tracking.TensorBoardTracker.log_images", 1),
    "wandb": ("tests.training.test_by_products.Wandb.log", 1),
    "wandb's end": ("tests.training.test_by_products.Wandb.finish", 0),
    "previews": (f"{MONITOR}.generate_previews", 1),
    "the previews' sheet": ("lora_utils.tracking.contact_sheet.save_sheet", 1),
    "validation": (f"{MONITOR}.validate", 1),
    "the log line": (f"{MONITOR}.embedding_reports", 0),
    "checkpoint": (f"{RUN}.save_checkpoint", 0),
    "report": ("lora_utils.tracking.html_report.write_report", 0),
    "the speed": ("lora_utils.training.results.describe_speed", 0),
    "hub": ("lora_utils.lora.hub.push_weights", 0),
}
# Many fail in one run, for a run of its own for each takes a minute and says no more. These keep others from being
# called, so they fail in runs apart.
CALLERS = [{"previews", "TensorBoard"}, {"metrics", "steps of the metrics"}]
ERRORS = [OSError(28, "No space left on device"), RuntimeError("CUDA error"), UserError("no room"), KeyError("x")]


class Wandb:
    """A tracker like wandb's, without a network."""

    name = "wandb"

    def log(self, _values, step):
        pass

    def log_images(self, _values, step):
        pass

    def finish(self):
        pass

    def start(self):
        pass


@pytest.fixture
def train(archive, random_model, tmp_path):
    """Train with all by-products there are, some of which fail at some of their calls. -> weights.zip"""
    return lambda fails=None: _train(archive, random_model, tmp_path / "0.zip", fails or {})


def _train(archive, model, target, fails):
    """Train with every by-product. `fails`: for each that does, whether its call of this number fails."""
    real = run.TrainMonitor.open

    def opened(monitor):
        real(monitor)
        monitor.metrics.trackers.append(Wandb())

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", str(model))
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setattr("lora_utils.lora.hub.ensure_repository", lambda *_: None)
        patch.setattr("lora_utils.lora.hub.push_weights", lambda *_: "a page")
        patch.setattr(run.TrainMonitor, "open", opened)
        for which, at in fails.items():
            _let_fail(patch, which, at)
        options = RunOptions(run_dir=str(target.with_suffix("")), **OPTIONS)
        return train_archive(CONFIG, archive, target, options, hub_token="hf_x")


def _let_fail(patch, which, fails):
    path, _ = BY_PRODUCTS[which]
    calls, real = itertools.count(), resolve_name(path)

    def sometimes(*given, **named):
        if fails(next(calls)):
            raise ERRORS[len(which) % len(ERRORS)]
        return real(*given, **named)

    patch.setattr(path, sometimes)


@pytest.fixture(scope="module")
def undisturbed(archive, random_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("undisturbed") / "weights.zip"
    return without_thumbnail(lora_of(_train(archive, random_model, target, {}))[0])


@pytest.mark.parametrize(
    "failing", [BY_PRODUCTS.keys() - set.union(*CALLERS), *CALLERS], ids=["all others", "previews", "metrics"]
)
def test_by_products_that_fail_from_the_first_step_on_cost_nothing_of_what_is_learned(
    failing, train, undisturbed, caplog
):
    failed = set()

    def always_after(which):
        return lambda call: call >= BY_PRODUCTS[which][1] and not failed.add(which)

    weights = train({which: always_after(which) for which in failing})
    assert failed == failing
    assert without_thumbnail(lora_of(weights)[0]) == undisturbed
    assert lora_of(weights)[1]["training_steps"] == STEPS
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) >= len(failing), "all are said"


@pytest.mark.slow
@pytest.mark.parametrize("at", range(STEPS + 2))
def test_by_products_that_each_fail_once_at_some_step_cost_nothing_of_what_is_learned(at, train, undisturbed):
    """Each at another step, in turn. A caller that fails keeps what it calls from failing too, at that step only."""
    turns = STEPS + 2
    fails = {
        which: lambda call, fails_at=first + (at + index) % turns: call == fails_at
        for index, (which, (_, first)) in enumerate(BY_PRODUCTS.items())
    }
    assert without_thumbnail(lora_of(train(fails))[0]) == undisturbed


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow), STEPS])
def test_a_folder_that_moves_away_at_a_step_costs_nothing_of_what_is_learned(
    step, train, undisturbed, tmp_path, monkeypatch
):
    real = loop.take_step

    def moving(state, batches, index):
        if index + 1 == step:
            (tmp_path / "0").rename(tmp_path / "gone")
        return real(state, batches, index)

    monkeypatch.setattr(loop, "take_step", moving)
    assert without_thumbnail(lora_of(train())[0]) == undisturbed


def test_cancels_go_through():
    with pytest.raises(KeyboardInterrupt), by_product("this"):
        raise KeyboardInterrupt


# --- the run itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def train_alone(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))

    def go(name="w", **changes):
        return train_archive(replace(SHORT_RUN, **{"steps": 6, **changes}), archive, tmp_path / f"{name}.zip")

    return go


def fail_at(monkeypatch, step, error):
    real = loop.take_step

    def failing(state, batches, index):
        if index + 1 == step:
            raise error
        return real(state, batches, index)

    monkeypatch.setattr(loop, "take_step", failing)


@pytest.mark.parametrize(("step", "error"), list(zip((2, 4, 5, 6), ERRORS, strict=True)))
def test_a_step_that_fails_leaves_what_was_learned_before_it(step, error, train_alone, components, monkeypatch, caplog):
    fail_at(monkeypatch, step, error)
    weights = train_alone()
    assert lora_of(weights)[1]["training_steps"] == step - 1
    assert f"the run ends after step {step - 1} of 6" in caplog.text
    assert load_weights(weights, components).lora.layers


def test_the_first_step_that_fails_ends_the_run_with_its_error(train_alone, monkeypatch, tmp_path):
    fail_at(monkeypatch, 1, UserError("no room"))
    with pytest.raises(UserError, match="no room"):
        train_alone()
    assert not (tmp_path / "w.zip").exists()


def test_a_run_that_diverges_leaves_the_weights_that_were_numbers(train_alone, components, monkeypatch, caplog):
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    real = loop.take_step

    def diverging(state, batches, index):
        if index == 3:
            state.lora[0].data.fill_(torch.nan)
        return real(state, batches, index)

    monkeypatch.setattr(loop, "take_step", diverging)
    weights = train_alone()
    assert "those of step 3 are kept" in caplog.text
    assert lora_of(weights)[1]["training_steps"] == 3
    assert load_weights(weights, components).lora.layers


def test_a_gpu_that_fails_leaves_the_weights_that_were_kept_on_the_cpu(train_alone, components, monkeypatch, caplog):
    """After an error of CUDA nothing can be read from the device any more."""
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    real = loop.take_step

    def unreadable(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")

    def failing(state, batches, index):
        if index == 4:
            monkeypatch.setattr("lora_utils.training.state.trained_layers", unreadable)
            monkeypatch.setattr("lora_utils.training.state.describe_embeddings", unreadable)
            unreadable()
        return real(state, batches, index)

    monkeypatch.setattr(loop, "take_step", failing)
    weights = train_alone()
    assert "the weights can't be read (CUDA error: an illegal memory access was encountered)" in caplog.text
    assert lora_of(weights)[1]["training_steps"] == 3
    assert load_weights(weights, components).lora.embeddings


def test_weights_that_cannot_be_written_where_they_were_asked_for_are_written_elsewhere(
    train_alone, components, monkeypatch, caplog
):
    real, calls = results.save_weights, itertools.count()

    def refused_once(target, *given):
        if next(calls) == 0:
            raise UserError(f"{target.name} can't be written (No space left on device); free some room.")
        return real(target, *given)

    monkeypatch.setattr(results, "save_weights", refused_once)
    weights = train_alone()
    try:
        assert "qwen-image-lora-rescued-" in str(weights)
        assert f"the weights are in {weights} instead" in caplog.text
        assert load_weights(weights, components).lora.layers
    finally:
        weights.unlink()
        weights.parent.rmdir()


def test_a_token_that_no_batch_shows_is_refused_before_a_model_is_loaded(train_alone, monkeypatch):
    for loader in ("setup.load_transformer", "encoding.load_text_encoder"):
        monkeypatch.setattr(f"lora_utils.training.{loader}", lambda *_, **__: pytest.fail("loaded"))
    seed = next(seed for seed in range(100) if all(dropped_first(seed)))
    with pytest.raises(UserError, match=r"none of the 1 batches of this run shows <zwx>.*set steps to \d+ or more"):
        train_alone(steps=1, caption_dropout=0.9, seed=seed)


def dropped_first(seed):
    """Which captions of a seed's first batch are dropped at a share of 0.9."""
    return torch.rand(SHORT_RUN.batch_size, generator=generator_for(seed, "dropout")) < 0.9


def test_a_stop_after_a_step_that_did_not_show_the_token_leaves_it_as_it_began(
    archive, random_model, tmp_path, monkeypatch
):
    """The run would have shown it later."""
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    seed = next(seed for seed in range(100) if all(dropped_first(seed)))
    config = replace(SHORT_RUN, steps=50, caption_dropout=0.9, seed=seed)
    weights = train_archive(config, archive, tmp_path / "w.zip", stopped=lambda: True)
    meta = lora_of(weights)[1]
    assert meta["placeholder"]["moved"] is False
    assert meta["placeholder"]["first_norm"] == meta["placeholder"]["last_norm"]


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_on(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    options, refused = RunOptions(run_dir=str(tmp_path / "run")), []

    def second():
        with pytest.raises(UserError, match="is in use by another run") as error:
            train_archive(SHORT_RUN, archive, tmp_path / "second.zip", options)
        refused.append(error)
        return False

    train_archive(replace(SHORT_RUN, steps=2), archive, tmp_path / "first.zip", options, stopped=second)
    assert refused
    assert not (tmp_path / "second.zip").exists()
    train_archive(SHORT_RUN, archive, tmp_path / "second.zip", options)
