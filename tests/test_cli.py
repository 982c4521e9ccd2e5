"""The command line takes what Cog takes, by the same names, and says the same of it."""

import argparse
import re

import pytest

from lora_utils import __main__ as main
from lora_utils.cli import add_options, described, to_options
from lora_utils.config import RunOptions, SampleRequest, TrainConfig
from scripts import cog_contract
from tests.conftest import ROOT

AS_SECRETS = {"hub_token", "hf_token"}  # HF_TOKEN's in the environment


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("command", "source"), [("train", "train.py"), ("sample", "predict.py")])
def test_every_input_of_cog_is_an_option_with_cogs_own_words(command, source, capsys):
    inputs, told = cog_contract.inputs((ROOT / source).read_text()), help_of(command, capsys)
    descriptions = described(ROOT / source)
    for item in inputs:
        if item.name in AS_SECRETS:
            continue
        assert re.search(rf"\b{item.name}\b", told), item.name
        if item.type != "Path" and item.name != "replicate_weights":
            assert " ".join(descriptions[item.name].split()) in told, item.name


def test_a_default_is_told_unless_the_words_tell_it(capsys):
    told = help_of("train", capsys)
    assert "Denoising steps of a sample. [20]" in told
    assert "Empty: the goal's, 32 without one. --" in told


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig(
            seed=5, train_placeholder_token=True, placeholder_token="<a>,<b>", ema_decay=0.5, optimizer="prodigy"
        ),
        RunOptions("run", 3, sample_prompts="a = b\n--c", hub_repo="me/it", hub_private=False),
        SampleRequest("a 'quoted' prompt", width=64, height=64, seed=1, go_fast=True),
    ],
)
def test_settings_written_as_options_are_read_as_the_same(settings):
    parser = argparse.ArgumentParser()
    add_options(parser, type(settings), {})
    assert type(settings)(**vars(parser.parse_args(to_options(settings)))) == settings


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_takes_no_pictures_is_refused_before_any_is_drawn(inside, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main.main(["sample", "--prompt", "a fox", "--output", str(tmp_path / "file" / inside)]) == 1
    assert re.fullmatch(
        r"error: the folder .*file.* can't be made \(.*\); name another --output.\n", capsys.readouterr().err
    )
