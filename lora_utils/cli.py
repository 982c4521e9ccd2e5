"""Command-line options from the dataclasses that Cog's inputs come from, with the words that stand there.

So there is one list of them, and one description of each. Must not know what the options do.
"""

import argparse
import ast
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_args


def described(source: Path) -> dict[str, str]:
    """What an entry point's inputs are said to be: the `description` of each `Input(...)` in its signature."""
    found = {}
    for function in ast.walk(ast.parse(source.read_text())):
        if isinstance(function, ast.FunctionDef):
            names = [argument.arg for argument in function.args.args]
            for name, given in zip(reversed(names), reversed(function.args.defaults), strict=False):
                for keyword in given.keywords if isinstance(given, ast.Call) else ():
                    if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
                        found[name] = str(keyword.value.value)
    return found


def add_options(parser: argparse.ArgumentParser, settings: type, descriptions: Mapping[str, str]) -> None:
    """An option for each field, `--name VALUE`; a switch for a bool. What isn't given isn't in the answer."""
    for field in fields(settings):
        kind: Any = next(iter(get_args(field.type)), field.type)  # of `float | None`, the first
        default = "random" if field.default is MISSING else field.default
        needed = field.default is MISSING and field.default_factory is MISSING
        what = descriptions.get(field.name, "").replace("%", "%%")
        says_so = default in (None, "", False) or needed or "Empty:" in what
        help_text = what if says_so else f"{what} [{default}]"
        if kind is bool:
            parser.add_argument(
                f"--{field.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
            )
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
