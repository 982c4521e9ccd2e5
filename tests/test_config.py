"""Any caller's values become validated, frozen dataclasses, or one clear error."""

import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from cog import Secret

from lora_utils.config import (
    RunOptions,
    SampleInputs,
    SampleRequest,
    TrainConfig,
    TrainInputs,
    declared_inputs,
    from_inputs,
)
from lora_utils.errors import UserError
from lora_utils.options import is_required, kind_of, option_of

NEEDED = {TrainInputs: {"dataset": "d.zip"}, SampleInputs: {"prompt": "a fox"}}
ALL = [(inputs, declared) for inputs in NEEDED for declared in declared_inputs(inputs)]


def test_what_is_not_given_takes_its_default():
    inputs = from_inputs(TrainInputs, {"dataset": "d.zip", "rank": None, "run_dir": None, "seed": 3})
    assert inputs.config == TrainConfig(seed=3)
    assert inputs.options == RunOptions()
    assert inputs.files.dataset == Path("d.zip")
    assert from_inputs(SampleInputs, {"prompt": "a fox", "seed": 3}).request == SampleRequest("a fox", seed=3)


def test_a_seed_that_is_empty_or_minus_one_is_random():
    for given in ({}, {"seed": None}, {"seed": -1}):
        seeds = {from_inputs(TrainInputs, {"dataset": "d.zip", **given}).config.seed for _ in range(3)}
        assert len(seeds) == 3
        assert min(seeds) >= 0
    assert from_inputs(TrainInputs, {"dataset": "d.zip", "seed": 0}).config.seed == 0


def test_numbers_may_come_as_json_clients_send_them():
    config = from_inputs(TrainInputs, {"dataset": "d.zip", "rank": 20.0, "mask_floor": 1}).config
    assert (config.rank, type(config.rank), type(config.mask_floor)) == (20, int, float)


@pytest.mark.parametrize(("inputs", "declared"), ALL, ids=[case[1].name for case in ALL])
def test_each_input_keeps_to_its_type_range_and_choices(inputs, declared):
    about, kind = option_of(declared), kind_of(declared)
    pair = {"width": {"height": 64}, "height": {"width": 64}}.get(declared.name, {})
    given = (
        {**NEEDED[inputs], **pair, "train_placeholder_token": True}
        if inputs is TrainInputs
        else {**NEEDED[inputs], **pair}
    )

    def refused(value):
        with pytest.raises(UserError, match=rf"^{declared.name} must be "):
            from_inputs(inputs, {**given, declared.name: value})

    needs_folder = {"run_dir": "run"} if declared.name in ("save_every", "resume") else {}
    if about.choices:
        for choice in about.choices:
            from_inputs(inputs, {**given, **needs_folder, declared.name: choice})
        refused("nonsense")
        refused(3)
    elif kind in (int, float):
        for edge, beyond in ((about.least, -1), (about.most, 1)):
            from_inputs(inputs, {**given, **needs_folder, declared.name: edge})
            refused(edge + (beyond if kind is int else beyond * 0.01))
        for wrong in (True, "8", math.nan, *([8.5] if kind is int else [])):
            refused(wrong)
    elif kind is bool:
        refused("yes")
    elif not about.accept and not about.secret:
        refused(5)


def test_an_input_that_is_none_or_missing_is_named():
    with pytest.raises(UserError, match="there is no input 'lerning_rate'; the inputs are dataset, "):
        from_inputs(TrainInputs, {"dataset": "d.zip", "lerning_rate": 1})
    for empty in ({}, {"dataset": None}, {"dataset": ""}):
        with pytest.raises(UserError, match="dataset is needed: A zip or tar of images"):
            from_inputs(TrainInputs, empty)


def test_with_the_feature_off_its_inputs_are_ignored_whatever_they_hold():
    given = {"dataset": "d.zip", "placeholder_token": "no name", "placeholder_init_std": 99.0}
    assert not from_inputs(TrainInputs, given).config.tokens
    with pytest.raises(UserError, match="placeholder_token 'no name' isn't a valid name"):
        from_inputs(TrainInputs, {**given, "train_placeholder_token": True})


def test_a_secret_is_read_and_printed_nowhere():
    inputs = from_inputs(TrainInputs, {"dataset": "d.zip", "hub_token": Secret("hf_secret")})
    assert inputs.files.hub_token == "hf_secret"
    assert "hf_secret" not in repr(inputs)


def test_checkpoints_and_previews_need_a_folder():
    for given in ({"save_every": 5}, {"resume": "auto"}, {"sample_prompts": "a fox"}):
        with pytest.raises(UserError, match="need a run_dir"):
            RunOptions(**given)


def test_a_width_needs_a_height():
    with pytest.raises(UserError, match="width and height come together: got width=64, height=None"):
        SampleRequest("a fox", width=64)


def test_settings_are_frozen_and_replaced():
    config = TrainConfig(seed=1)
    assert replace(config, rank=8).rank == 8
    with pytest.raises(AttributeError):
        config.rank = 8  # type: ignore[misc]
    assert asdict(replace(config, rank=8)) == {**asdict(config), "rank": 8}


def test_every_input_is_declared_once_and_described_in_sentences():
    for inputs in NEEDED:
        declared = declared_inputs(inputs)
        assert len({each.name for each in declared}) == len(declared)
        assert is_required(declared[0])
        for each in declared:
            assert option_of(each).sentence.endswith("."), each.name
    assert [field.name for field in fields(TrainInputs)] == ["config", "options", "files"]
    assert (len(declared_inputs(TrainInputs)), len(declared_inputs(SampleInputs))) == (60, 27)


@pytest.mark.parametrize("name", ["steps", "learning_rate", "seed"])
def test_a_number_of_a_thousand_digits_is_refused_in_a_sentence(name):
    with pytest.raises(UserError, match=f"{name} must be"):
        from_inputs(TrainInputs, {"dataset": "d.zip", name: 10**1000})
