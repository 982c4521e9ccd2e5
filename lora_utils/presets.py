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


# Rate and steps without a goal are fal's and Replicate's, who train the 20 B model by them for all comers. The layers
# are Replicate's but for the modulations. On the small model 1e-4 and less taught next to nothing in 1000 steps
# (benchmarks/RECIPES.md). Rank 16 is ai-toolkit's, and fits a 16 GB GPU, where 32 on all layers doesn't. A style takes
# more steps: at 2e-4 it was no better after 2000 than at 5e-4 after 1000 (same page, eight seeds). A likeness takes the
# gentler rate of diffusers' example, which nothing has been measured for. None has been measured on the 20 B model.
PRESETS = {
    "none": Preset(steps=1000, learning_rate=5e-4, rank=16, lora_targets="attention_mlp"),
    "person": Preset(steps=1500, learning_rate=2e-4, rank=16, lora_targets="attention_mlp"),
    "object": Preset(steps=1000, learning_rate=5e-4, rank=16, lora_targets="attention_mlp"),
    "style": Preset(steps=1500, learning_rate=5e-4, rank=16, lora_targets="attention_mlp"),
}
PRODIGY_LEARNING_RATE = 1.0  # Prodigy finds the rate itself and multiplies it by this

# Muon can take larger steps than AdamW. On the small model, in 24 pairs, it learned sooner at twice AdamW's rate than
# AdamW did (p 0.001), and no later than at four times (docs/benchmarks.md). The 20 B model hasn't been tried.
MUON_FACTOR = 2.0


def preset_for(goal: str, optimizer: str) -> Preset:
    """Return the settings of a goal, with the learning rate that the optimizer wants in place of AdamW's."""
    chosen = PRESETS[goal]
    rates = {"prodigy": PRODIGY_LEARNING_RATE, "muon": MUON_FACTOR * chosen.learning_rate}
    return replace(chosen, learning_rate=rates.get(optimizer, chosen.learning_rate))
