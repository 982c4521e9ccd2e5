"""The command line, made from the list of inputs: the same names, choices, ranges and sentences as Cog's forms.

This module parses arguments and imports no heavy library, so that help and wrong options answer at once.
"""

import argparse
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

from lora_utils.config import RunOptions, SampleInputs, TrainConfig, TrainInputs, declared_inputs
from lora_utils.options import is_required, kind_of, option_of, random_seed


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m lora_utils`. What isn't given isn't in its answer."""
    top = argparse.ArgumentParser(prog="python -m lora_utils", description="Qwen-Image LoRAs, without Cog.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "The environment variable BASE_MODEL names the model: a hub repository or a folder."
    training = commands.add_parser("train", help="images -> weights.zip", description=about)
    training.add_argument("dataset", help="an archive or a folder of images and captions")
    training.add_argument("--output", type=Path, default=Path("weights.zip"), help="default weights.zip")
    add_options(training, declared_inputs(TrainInputs))
    sampling = commands.add_parser("sample", help="a prompt -> images", description=about)
    sampling.add_argument("--output", type=Path, default=Path("images"), help="a folder, default images")
    add_options(sampling, declared_inputs(SampleInputs))
    return top


def dataset_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m lora_utils.dataset`."""
    top = argparse.ArgumentParser(
        prog="python -m lora_utils.dataset",
        description="What a training would find in a dataset. The options are train's inputs.",
    )
    top.add_argument("dataset", help="an archive or a folder of images and captions")
    add_options(top, (declared for declared in declared_inputs(TrainInputs) if declared in fields(TrainConfig)))
    return top


def add_options(target: argparse.ArgumentParser, inputs: Iterable[Field[Any]]) -> None:
    """Add an option for each input, `--name VALUE`, and a switch for each bool. `dataset` and secrets aren't options.

    A secret on a command line could be read by others on the machine; the hub's token comes from HF_TOKEN.
    """
    for declared in inputs:
        about, kind = option_of(declared), kind_of(declared)
        if about.secret or declared.name == "dataset":
            continue
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text(declared)}
        if kind is bool:
            target.add_argument(f"--{declared.name}", action=argparse.BooleanOptionalAction, **settings)
        else:
            settings |= {"type": kind, "required": is_required(declared)}
            if about.choices:
                settings["metavar"] = "{" + ",".join(about.choices) + "}"
            target.add_argument(f"--{declared.name}", **settings)


def help_text(declared: Field[Any]) -> str:
    """Return an input's sentence with its range and default, as argparse takes it."""
    about, known = option_of(declared), []
    if about.least is not None and about.most is not None and declared.default_factory is not random_seed:
        known.append(f"{about.least:g} to {about.most:g}")
    said = "Empty:" in about.sentence or declared.default in (None, "", " ", False, MISSING)
    if not said:
        known.append(f"default {declared.default}")
    return (about.sentence + (f" [{', '.join(known)}]" if known else "")).replace("%", "%%")


def to_options(settings: TrainConfig | RunOptions) -> list[str]:
    """Return the options that are read as these settings."""
    options = []
    for name, value in asdict(settings).items():
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            options.append(f"--{name}={value}")
    return options
