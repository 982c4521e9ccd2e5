"""The command line takes what Cog takes, by the same names, and says the same of it."""

import os
import re
import signal

import pytest

from lora_utils import __main__ as main
from lora_utils import cli
from lora_utils.config import RunOptions, SampleInputs, TrainConfig, TrainInputs, declared_inputs, from_inputs
from lora_utils.options import option_of
from lora_utils.training import launch

COMMANDS = {"train": TrainInputs, "sample": SampleInputs}


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_input_is_an_option_with_cogs_own_sentence_its_choices_and_its_range(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    output = help_of(command, capsys)
    for declared in declared_inputs(COMMANDS[command]):
        about = option_of(declared)
        if about.secret:
            assert f"--{declared.name}" not in output, "others on the machine could read it"
            continue
        assert re.search(rf"\b{declared.name}\b", output), declared.name
        if declared.name == "dataset":
            continue
        assert " ".join(about.sentence.split()) in output, declared.name
        if about.choices:
            assert "{" + ",".join(about.choices) + "}" in output, declared.name


def test_a_default_is_shown_unless_the_sentence_says_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    output = help_of("train", capsys)
    assert "Denoising steps of a preview. [1 to 100, default 20]" in output
    assert "Rank of the LoRA. Empty: the goal's, 16 without one. [1 to 256]" in output


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig(
            seed=5, train_placeholder_token=True, placeholder_token="<a>,<b>", ema_decay=0.5, optimizer="prodigy"
        ),
        RunOptions("run", 3, sample_prompts="a = b\n- c -- d", hub_repo="me/it", hub_private=False),
    ],
)
def test_settings_written_as_options_are_read_as_the_same(settings):
    given = vars(cli.parser().parse_args(["train", "d.zip", *cli.to_options(settings)]))
    given = {name: value for name, value in given.items() if name not in ("command", "output")}
    inputs = from_inputs(TrainInputs, given)
    assert settings in (inputs.config, inputs.options)


def test_a_seed_of_minus_one_is_random_here_too():
    given = vars(cli.parser().parse_args(["sample", "--prompt", "a fox", "--seed", "-1"]))
    inputs = [from_inputs(SampleInputs, {"prompt": given["prompt"], "seed": given["seed"]}) for _ in range(2)]
    assert inputs[0].request.seed >= 0
    assert inputs[0].request.seed != inputs[1].request.seed


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_takes_no_images_is_refused_before_any_is_sampled(inside, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main.main(["sample", "--prompt", "a fox", "--output", str(tmp_path / "file" / inside)]) == 1
    assert re.fullmatch(
        r"error: the folder .*file.* can't be made \(.*\); name another --output.\n", capsys.readouterr().err
    )


def test_an_output_that_is_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "weights.zip").write_text("precious")
    assert main.main(["train", "d.zip", "--output", str(tmp_path / "weights.zip")]) == 1
    assert "is there already; name another --output" in capsys.readouterr().err
    assert (tmp_path / "weights.zip").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_training_to_stop_after_its_step(number, tmp_path, monkeypatch, capsys):
    """The process is signalled for real; what a stop then leaves is tested with the checkpoints."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def train(given, output, stopped):
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
        return launch.TrainResult(output, 1)

    monkeypatch.setattr(launch, "train", train)
    try:
        assert main.main(["train", "d.zip", "--output", str(tmp_path / "weights.zip")]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a second one ends it at once"
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "stopping after this step; once more ends it at once" in capsys.readouterr().out
