"""What a goal chooses: the steps, rate, rank and layers that a caller leaves open.

Owns these four defaults; must not know what they do.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_utils.checks import choice


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a goal chooses."""

    steps: int
    learning_rate: float
    rank: int
    lora_targets: str


# Within what the field agrees on for Qwen-Image: 1000 steps and more at 1e-4 to 2e-4, rank 16 to 32. A likeness needs
# many steps at a gentle rate; an object is learned sooner, and by less; a style lives in textures, which the MLPs make.
GOALS = {
    "none": Recipe(steps=1000, learning_rate=1e-4, rank=32, lora_targets="attention"),
    "person": Recipe(steps=1500, learning_rate=1e-4, rank=32, lora_targets="attention_mlp"),
    "object": Recipe(steps=1000, learning_rate=2e-4, rank=16, lora_targets="attention"),
    "style": Recipe(steps=2000, learning_rate=1e-4, rank=32, lora_targets="attention_mlp"),
}
PRODIGY_RATE = 1.0  # it finds the rate itself; this multiplies it


def recipe_for(
    goal: str, optimizer: str, steps: int | None = None, learning_rate: float | None = None, rank: int | None = None,
    lora_targets: str | None = None,
) -> Recipe:  # fmt: skip
    """What a caller gives, and the goal's choice where that is None. Raises UserError for an unknown goal."""
    chosen = GOALS[choice("goal", goal, tuple(GOALS))]
    rate = PRODIGY_RATE if optimizer == "prodigy" else chosen.learning_rate
    return Recipe(
        chosen.steps if steps is None else steps,
        rate if learning_rate is None else learning_rate,
        chosen.rank if rank is None else rank,
        lora_targets or chosen.lora_targets,
    )


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by name, with the goal's choices where they have none."""
    names = [field.name for field in fields(Recipe)]
    goal, optimizer = given.get("goal", "none"), given.get("optimizer", "adamw")
    return {**given, **asdict(recipe_for(goal, optimizer, **{name: given.get(name) for name in names}))}
