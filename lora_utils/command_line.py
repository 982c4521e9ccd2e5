"""Command-line options from the dataclasses that Cog's inputs come from, so that there is one list of them.

Must not know what the options do.
"""

import argparse
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """An option for each field, `--name VALUE`; a switch for a bool. What isn't given isn't in the answer."""
    for field in fields(settings):
        kind: Any = next(iter(get_args(field.type)), field.type)  # of `float | None`, the first
        default = "random" if field.default is MISSING else field.default
        needed = field.default is MISSING and field.default_factory is MISSING
        help_text = "" if default in (None, "", False) or needed else f"default {default}"
        if kind is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        else:
            parser.add_argument(
                f"--{field.name}", type=kind, default=argparse.SUPPRESS, help=help_text, required=needed
            )


def to_options(settings: Any) -> list[str]:
    """The options that `add_options` reads as these settings."""
    options = []
    for name, value in asdict(settings).items():
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            options.append(f"--{name}={value}")
    return options
