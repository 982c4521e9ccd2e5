"""Inputs that are valid alone and useless together are refused or warned of, with what to set."""

import pytest

from lora_utils.config import RunOptions, TrainConfig
from lora_utils.conflicts import check_conflicts
from lora_utils.errors import UserError
from tests.helpers import train_archive

TOKEN = {"train_placeholder_token": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "prodigy.*leave it empty, or set it to 1"),
        ({"learning_rate": 1.0}, "learning_rate 1 with adamw.*set it to about 5e-4"),
        ({"learning_rate": 0.5, "optimizer": "adafactor"}, "learning_rate 0.5 with adafactor"),
        ({"optimizer": "muon", "adapter": "dora"}, "dora also trains vectors; use adamw, or adapter lora"),
        ({"learning_rate": 0.5, "optimizer": "adamw8bit"}, "learning_rate 0.5 with adamw8bit"),
        ({"warmup_steps": 1001}, "warmup_steps 1001 doesn't end within the run's 1000 steps; set fewer"),
        ({"warmup_steps": 5, "steps": 5}, "warmup_steps 5 doesn't end within the run's 5 steps"),
        ({**TOKEN, "caption_dropout": 1.0}, "caption_dropout 1 drops every caption, so <zwx> would learn nothing"),
        (
            {**TOKEN, "placeholder_init_std": 0.0, "placeholder_learning_rate": 0.0},
            "leaves the token's embedding at zero",
        ),
    ],
)
def test_what_would_teach_nothing_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        check_conflicts(TrainConfig(seed=0, **given), RunOptions())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"learning_rate": 0.02}, {}, "5e-4 is a good start"),
        ({**TOKEN, "placeholder_learning_rate": 0.5}, {}, "try 5e-4"),
        (
            {**TOKEN, "placeholder_token": "<anna>,<ben>", "placeholder_learning_rate": 0.0},
            {},
            "leaves <anna>, <ben> as they start, where the model can't tell them apart",
        ),
        ({"caption_dropout": 1.0}, {}, "nothing is learned of what they say"),
        ({"mask_from": "file", "mask_floor": 1.0}, {}, "mask_floor 1"),
        ({"trigger_word": "x", "class_word": "y", "preservation_weight": 0.0}, {}, "holds nothing; set it to 0.1"),
        ({"preserve_prompts": "a dog", "preservation_weight": 0.0}, {}, "hold nothing; set it to 0.1"),
        ({"autocaption_prefix": "a "}, {}, "do nothing without autocaption"),
        ({}, {"save_every": 2000, "run_dir": "x"}, "save_every 2000 is beyond the run's 1000 steps"),
        ({}, {"sample_every": 100}, "without sample_prompts"),
        ({}, {"sample_every": 2000, "sample_prompts": "x", "run_dir": "x"}, "sample_every 2000 is beyond"),
    ],
)
def test_what_does_little_is_warned_of(given, options, message):
    (warning,) = check_conflicts(TrainConfig(seed=0, **given), RunOptions(**options))
    assert message in warning


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy", "adafactor", "muon"])
@pytest.mark.parametrize("goal", ["none", "person", "object", "style"])
def test_the_defaults_and_goals_have_no_conflicts(goal, optimizer):
    from lora_utils.config import TrainInputs, from_inputs  # noqa: PLC0415

    inputs = from_inputs(TrainInputs, {"dataset": "d.zip", "goal": goal, "optimizer": optimizer})
    assert check_conflicts(inputs.config, inputs.options) == []


def test_a_refusal_comes_before_anything_is_loaded(archive, random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(random_model))
    monkeypatch.setattr("lora_utils.training.run.start", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match="warmup_steps"):
        train_archive(TrainConfig(seed=0, warmup_steps=2000), archive, tmp_path / "w.zip")
    assert list(tmp_path.iterdir()) == []
