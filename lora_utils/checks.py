"""Whether a value that a caller gave is one that can be: each returns it, or says which input is wrong and why."""

import math

from lora_utils.errors import UserError


def whole(name: str, value: object, least: int, most: int) -> int:
    """`value` as an integer in a range; a JSON client's 20.0 is 20."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {value!r}.")
    if not least <= value <= most:
        raise UserError(f"{name} must be from {least} to {most}, got {value}.")
    return int(value)


def number(name: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number from {least:g} to {most:g}, got {value!r}.")
    if not least <= value <= most:
        raise UserError(f"{name} must be from {least:g} to {most:g}, got {value:g}.")
    return float(value)


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value
