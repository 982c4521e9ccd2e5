"""Presets: the steps, learning rate, rank and layers that a goal fills in where a caller leaves them empty.

This module owns these four defaults. It imports the standard library alone and doesn't know what the values do.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Preset:
    """The four settings that a goal chooses, each named like the input that it fills in."""

    steps: int
    learning_rate: float
    rank: int
    lora_targets: str


# All values lie within what trainers of Qwen-Image agree on: 1000 steps and more at 1e-4 to 2e-4, rank 16 to 32.
# A likeness needs many steps at a gentle rate. An object is learned sooner and by a smaller LoRA. A style lives in
# textures, which the MLPs make. None of them has been measured on the 20 B model.
PRESETS = {
    "none": Preset(steps=1000, learning_rate=1e-4, rank=32, lora_targets="attention"),
    "person": Preset(steps=1500, learning_rate=1e-4, rank=32, lora_targets="attention_mlp"),
    "object": Preset(steps=1000, learning_rate=2e-4, rank=16, lora_targets="attention"),
    "style": Preset(steps=2000, learning_rate=1e-4, rank=32, lora_targets="attention_mlp"),
}
PRODIGY_LEARNING_RATE = 1.0  # Prodigy finds the rate itself and multiplies it by this


def preset_for(goal: str, optimizer: str) -> Preset:
    """Return the settings of a goal, with Prodigy's own learning rate where that is the optimizer."""
    chosen = PRESETS[goal]
    return replace(chosen, learning_rate=PRODIGY_LEARNING_RATE) if optimizer == "prodigy" else chosen
