"""Where LoRAs act: which of a call's change what the prompt shows, and which what the negative prompt does.

This module owns what weights say of how they were taught. It knows no model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lora_utils.config import SampleRequest
from lora_utils.lora.weights import Weights
from lora_utils.triggers import holds

log = logging.getLogger(__name__)

ONE_THING = ("person", "object")  # goals


@dataclass(frozen=True, slots=True)
class ScaledLora:
    """A loaded LoRA and the strength that a call gives it."""

    weights: Weights
    scale: float


class Taught(NamedTuple):
    """By which words weights were taught, and what, as their meta.json says: also what `[trigger]` stands for."""

    trigger_word: str
    tokens: tuple[str, ...]
    class_word: str
    goal: str

    @property
    def is_one_thing(self) -> bool:
        """Whether it is a thing among others, which its words alone tell apart; a style is a look of all things."""
        return bool(self.class_word) or self.goal in ONE_THING

    @property
    def names(self) -> tuple[str, ...]:
        """The words for what was taught."""
        return ((self.trigger_word,) if self.trigger_word else ()) + self.tokens

    @classmethod
    def by(cls, weights: Weights) -> "Taught":
        """Read it of weights; nothing for a file without a meta.json."""
        config = weights.meta.config if weights.meta else {}
        trigger, class_word, goal = (
            word if isinstance(word, str) else "" for word in map(config.get, ("trigger_word", "class_word", "goal"))
        )
        return cls(trigger, tuple(weights.lora.embeddings), class_word, goal)

    def acts_under(self, text: str, lora_acts: str) -> bool:
        """Return whether a LoRA that was taught so acts under a text, as the input `lora_acts` has it."""
        if lora_acts == "always" or not self.names or (lora_acts == "auto" and not self.is_one_thing):
            return True
        return any(holds(text, name) for name in self.names)


def acting_under(text: str, request: SampleRequest, loras: Sequence[ScaledLora]) -> frozenset[int]:
    """Return which LoRAs, by index, change what a text shows.

    Where one acts under texts that name what it was taught, any other prompt shows what the base model makes of it.
    Guidance gains too. It moves away from what the negative prompt shows, which under the LoRA is what was taught, for
    a LoRA changes all prompts somewhat: part of what the prompt's pass adds is then taken away again.
    """
    return frozenset(
        index
        for index, lora in enumerate(loras)
        if lora.scale != 0 and Taught.by(lora.weights).acts_under(text, request.lora_acts)
    )


def without_unnamed(request: SampleRequest, loras: Sequence[ScaledLora]) -> list[ScaledLora]:
    """Return the LoRAs at their scales, 0 where neither text lets one act."""
    texts = [request.prompt, request.negative_prompt] if request.guided else [request.prompt]
    acting = frozenset[int]().union(*(acting_under(text, request, loras) for text in texts))
    for index in (index for index, lora in enumerate(loras) if lora.scale != 0 and index not in acting):
        taught = Taught.by(loras[index].weights)
        log.info(
            "the prompt doesn't name %s, so this LoRA%s is left out; lora_acts=always applies it",
            " or ".join(taught.names),
            f" for a {taught.class_word}" if taught.class_word else "",
        )
    return [lora if index in acting else replace(lora, scale=0.0) for index, lora in enumerate(loras)]
