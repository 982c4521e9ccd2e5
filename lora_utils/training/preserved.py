"""What must stay: prompts that some batches show in place of their captions, to hold what the base model makes of them.

A class word gives one for each caption. `preserve_prompts` are a caller's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import prior_caption
from lora_utils.prompts import split_prompts


@dataclass(frozen=True, slots=True)
class Preserved:
    """The prompts of a run that hold something. It is false where nothing is to be held."""

    of_class: Mapping[str, str] = field(default_factory=dict)  # by caption: the class in place of what is taught
    prompts: tuple[str, ...] = ()  # the caller's

    def __bool__(self) -> bool:
        return bool(self.of_class or self.prompts)

    def texts(self, captions: Sequence[str]) -> list[str]:
        """Return all that images with these captions may be shown under."""
        return [*(self.of_class[caption] for caption in captions if caption in self.of_class), *self.prompts]

    def in_place_of(self, captions: Sequence[str], generator: torch.Generator) -> list[str]:
        """Return what a batch that holds is shown under, an image each. A class beside prompts has half of them."""
        if not self.prompts:
            return [self.of_class[caption] for caption in captions]
        chosen = torch.randint(len(self.prompts), (len(captions),), generator=generator).tolist()
        holds_class = torch.rand(len(captions), generator=generator) < (0.5 if self.of_class else 0.0)
        return [
            self.of_class[caption] if of_class else self.prompts[index]
            for caption, index, of_class in zip(captions, chosen, holds_class.tolist(), strict=True)
        ]

    def described(self, class_word: str) -> str:
        """Say what is held."""
        named = f"{len(self.prompts)} prompt{'s' if len(self.prompts) > 1 else ''}"
        return " and ".join([repr(class_word)] * bool(self.of_class) + [named] * bool(self.prompts))


NOTHING = Preserved()


def preserved_prompts(captions: Sequence[str], config: TrainConfig) -> Preserved:
    """Return what a run with these captions holds."""
    of_class = {caption: prior_caption(caption, config) for caption in captions} if config.class_word else {}
    return Preserved(of_class, tuple(split_prompts(config.preserve_prompts)))
