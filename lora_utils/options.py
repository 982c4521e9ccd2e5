"""Options: how an input is declared as a dataclass field, and how a caller's value is checked against that.

It imports the standard library alone, and doesn't know which inputs there are.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, TypeGuard, get_args

from lora_utils.errors import UserError, shown

MAX_SEED = 2**32 - 1
MAX_TEXT = 100_000  # characters of an input; the model reads 1024 tokens of a prompt


# --- declaring ------------------------------------------------------------------------------------------------------

REQUIRED = object()
GROUPS = ("main", "common", "advanced")  # the order in which forms, help and docs list them


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an input beyond its name, type and default."""

    sentence: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], object] | None = None  # of a text, to its canonical form; raises UserError
    preset: bool = False  # a goal fills it in where the caller leaves it empty
    only_if: str = ""  # the switch without which this input is ignored
    accept: str = ""  # a file input: the types that a form's file picker offers
    secret: bool = False
    group: str = "common"


def option(default: Any, sentence: str, **known: Any) -> Any:
    """Declare an input: its default (`REQUIRED` for none), the sentence that describes it, and fields of `Option`.

    `ge` and `le` are its range. A default of `random_seed` is another one each time.
    """
    about = Option(sentence, known.pop("ge", None), known.pop("le", None), **known)
    given = {"metadata": {"option": about}, "repr": not about.secret}
    if default is REQUIRED:
        return field(**given)
    return field(default_factory=default, **given) if default is random_seed else field(default=default, **given)


def option_of(declared: Field[Any]) -> Option:
    """Return what is known of a dataclass field that `option` declared."""
    return declared.metadata["option"]


def is_required(declared: Field[Any]) -> bool:
    """Return whether a caller must give this input."""
    return declared.default is MISSING and declared.default_factory is MISSING


def kind_of(declared: Field[Any]) -> type:
    """Return the type of an input's value when it has one: of `int | None`, `int`."""
    if isinstance(declared.type, UnionType):
        return next(kind for kind in get_args(declared.type) if kind is not NoneType)
    assert isinstance(declared.type, type)
    return declared.type


def random_seed() -> int:
    """Return a seed for a caller who gave none. It is reported and can be given back."""
    return secrets.randbelow(MAX_SEED + 1)


# --- checking -------------------------------------------------------------------------------------------------------


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number that a float can hold; JSON may hold an integer of thousands of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def integer(name: str, value: object, least: float, most: float) -> int:
    """Return `value` as an integer in a range; a JSON client's 20.0 is 20. Raises UserError with the input's name."""
    if not is_finite(value) or value != int(value):
        raise UserError(f"{name} must be a whole number from {least:.0f} to {most:.0f}, got {shown(repr(value))}.")
    if not least <= value <= most:
        raise UserError(f"{name} must be from {least:.0f} to {most:.0f}, got {value}.")
    return int(value)


def number(name: str, value: object, least: float, most: float) -> float:
    """Return `value` as a finite number in a range. Raises UserError with the input's name."""
    if not is_finite(value):
        raise UserError(f"{name} must be a finite number from {least:g} to {most:g}, got {shown(repr(value))}.")
    if not least <= value <= most:
        raise UserError(f"{name} must be from {least:g} to {most:g}, got {value:g}.")
    return float(value)


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value`, which must be one of `choices`. Raises UserError with the input's name."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {shown(repr(value))}.")
    return value


def checked(declared: Field[Any], value: object) -> object:
    """Return an input's value in its canonical form. Raises UserError for one that it can't have."""
    name, about, kind = declared.name, option_of(declared), kind_of(declared)
    if value is None and declared.type is not kind:
        return None
    if about.choices:
        return choice(name, value, about.choices)
    if kind in (int, float):
        check = integer if kind is int else number
        least, most = about.least, about.most
        value = check(name, value, -math.inf if least is None else least, math.inf if most is None else most)
        return random_seed() if declared.default_factory is random_seed and value == -1 else value
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {shown(repr(value))}.")
    if kind is str:
        check_text(name, value)
    return about.parse(str(value)) if about.parse else value


def check_text(name: str, value: object) -> None:
    """Raise UserError for what is no text, is longer than any that is read, or can't be written to a file."""
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, got {shown(repr(value))}.")
    if len(value) > MAX_TEXT:
        raise UserError(f"{name} has {len(value)} characters; {MAX_TEXT} are the most.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a character at {error.start}, which no encoding has; remove it.") from error


def validate(settings: Any) -> None:
    """Bring each field of a frozen settings dataclass into its canonical form. Raises UserError for a wrong one.

    An input whose switch (`only_if`) is off is left as it is: nothing reads it.
    """
    for declared in fields(settings):
        switch = option_of(declared).only_if
        if not switch or getattr(settings, switch):
            object.__setattr__(settings, declared.name, checked(declared, getattr(settings, declared.name)))
