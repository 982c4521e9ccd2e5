"""Write train.py's and predict.py's signatures and the input tables of docs/ from the list of inputs in config.py.

Cog reads a signature as text, without importing it, so it has to hold literals. `--check` writes nothing and fails
where a file is stale.

    python -m scripts.cog_signatures [--check]
"""

import argparse
import json
import sys
from dataclasses import Field
from pathlib import Path
from typing import Any

from lora_utils.config import SampleInputs, TrainInputs, declared_inputs
from lora_utils.options import is_required, kind_of, option_of, random_seed

ROOT = Path(__file__).parent.parent
SIGNATURES = {"train.py": TrainInputs, "predict.py": SampleInputs}
TABLES = {"docs/training.md": TrainInputs, "docs/prediction.md": SampleInputs}
BEGIN, END = "inputs from lora_utils/config.py", "end of inputs"


def cog_type(declared: Field[Any]) -> str:
    """Return the type that Cog's signature gives an input."""
    about = option_of(declared)
    kind = "Path" if about.accept else "Secret" if about.secret else kind_of(declared).__name__
    return f"Optional[{kind}]" if not is_required(declared) and default_of(declared) is None else kind


def default_of(declared: Field[Any]) -> object:
    """Return the default that Cog's signature gives an input: None where `from_inputs` finds the value."""
    random = declared.default_factory is random_seed
    return None if random or option_of(declared).preset else declared.default


def cog_input(declared: Field[Any]) -> str:
    """Return an input as a line of a signature."""
    about, given = option_of(declared), []
    if not is_required(declared):
        given.append(f"default={literal(default_of(declared))}")
    if about.least is not None:
        given.append(f"ge={literal(about.least)}")
    if about.most is not None:
        given.append(f"le={literal(about.most)}")
    if about.choices:
        given.append(f"choices={literal(list(about.choices))}")
    if about.accept:
        given.append(f"accept={literal(about.accept)}")
    given.append(f"description={literal(about.sentence)}")
    return f"{declared.name}: {cog_type(declared)} = Input({', '.join(given)}),"


def literal(value: object) -> str:
    """Return a Python literal, with the quotes that ruff takes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else repr(value)


def table_row(declared: Field[Any]) -> str:
    """Return an input as a row of a table: its name, its default and what it does."""
    about, default = option_of(declared), default_of(declared)
    known = []
    if about.choices:
        known.append(f"One of {', '.join(f'`{choice}`' for choice in about.choices)}.")
    elif about.least is not None and about.most is not None and declared.default_factory is not random_seed:
        known.append(f"{about.least:g} to {about.most:g}.")
    shown = "" if is_required(declared) or default in (None, "") else f"`{json.dumps(default)}`"
    return f"| `{declared.name}` | {shown} | {' '.join([about.sentence, *known])} |"


TITLES = {"main": "First", "common": "Often", "advanced": "Seldom"}  # by the group of an input


def signature(inputs: type[TrainInputs] | type[SampleInputs], indent: str) -> str:
    """Return the lines of a signature between its markers."""
    return "".join(f"{indent}{cog_input(declared)}\n" for declared in declared_inputs(inputs))


def table(inputs: type[TrainInputs] | type[SampleInputs]) -> str:
    """Return the tables of a command's inputs between its markers: those that matter most come first."""
    lines = []
    for group, title in TITLES.items():
        first = group == "main"  # with those that are needed
        own = [e for e in declared_inputs(inputs) if (first if is_required(e) else option_of(e).group == group)]
        rows = [table_row(declared) for declared in own]
        lines += ["", f"### {title}", "", "| input | default | what it does |", "|---|---|---|", *rows]
    return "\n".join([*lines, "", ""])


def rewritten(text: str, lines: str) -> str:
    """Return a file's text with other lines between its two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    mark_end = rest.partition("\n")[0]
    last = rest.partition(END)[0].rpartition("\n")[2]  # what stands before the second marker on its line
    return f"{before}{begin}{mark_end}\n{lines}{last}{END}{after}"


def stale_files(write: bool) -> list[str]:
    """Return the files whose inputs aren't those of config.py; `write` brings them up to date."""
    wanted = {}
    for name, inputs in SIGNATURES.items():
        indent = " " * (4 if name == "train.py" else 8)
        wanted[name] = signature(inputs, indent)
    wanted |= {name: table(inputs) for name, inputs in TABLES.items()}
    stale = []
    for name, lines in wanted.items():
        text = (ROOT / name).read_text()
        if (current := rewritten(text, lines)) != text:
            stale.append(name)
            if write:
                (ROOT / name).write_text(current)
    return stale


def main(arguments: list[str] | None = None) -> int:
    """Write the stale files, or only name them. -> 1 where `--check` found one"""
    parser = argparse.ArgumentParser(prog="python -m scripts.cog_signatures")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a file is stale")
    check = parser.parse_args(arguments).check
    stale = stale_files(write=not check)
    for name in stale:
        print(f"{name} {'is stale; run python -m scripts.cog_signatures' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
