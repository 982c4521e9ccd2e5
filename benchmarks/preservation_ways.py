"""The ways of holding a class that `benchmarks.preservation` compares."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.preservation_changes import (
    AfterStep,
    Bench,
    beside,
    beyond,
    class_left_out,
    conflicts_projected,
    empty_too,
    in_pairs,
    noisy_text,
    orthogonal,
    other_prompts,
    own_images,
    together,
    weighted,
    words_left_out,
)
from lora_utils.training.state import TrainState

CLASSES = {"house": "square", "mushroom": "circle", "fish": "ring"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way. `changed` lets it act on a run that is set up; what it returns is called after each step."""

    about: str
    given: Mapping[str, Any] = field(default_factory=dict)
    holds: bool = True
    changed: Callable[[Bench, TrainState, str, int, ExitStack], AfterStep | None] | None = None

    @contextmanager
    def applied(self, bench: Bench, run: TrainState, noun: str, seed: int) -> Iterator[AfterStep]:
        with ExitStack() as stack:
            after = self.changed(bench, run, noun, seed, stack) if self.changed else None
            yield after or (lambda: None)


QUARTER = {"preservation_weight": 0.25}
TEXT_LAYERS = ",".join(f"transformer_blocks.*.{layer}" for layer in ("attn.add_*_proj", "attn.to_add_out", "txt_mlp.*"))
WAYS: dict[str, Way] = {
    "nothing held": Way("No class word.", holds=False),
    "a quarter of the batches": Way(
        "A quarter of the batches shows the images under the class word, with the base model's velocity as target.",
        QUARTER,
    ),
    "a tenth of the batches": Way("The same, of a tenth.", {"preservation_weight": 0.1}),
    "a twentieth of the batches": Way("The same, of a twentieth.", {"preservation_weight": 0.05}),
    "a fiftieth of the batches": Way("The same, of a fiftieth.", {"preservation_weight": 0.02}),
    "a quarter, a quarter as strong": Way(
        "The loss of those batches counts a quarter.",
        QUARTER,
        changed=weighted(lambda sigma: torch.full_like(sigma, 0.25)),
    ),
    "a quarter, a twentieth as strong": Way(
        "It counts a twentieth.", QUARTER, changed=weighted(lambda sigma: torch.full_like(sigma, 0.05))
    ),
    "a quarter, above 0.7": Way(
        "Only levels of noise above 0.7 count in those batches.",
        QUARTER,
        changed=weighted(lambda sigma: (sigma > 0.7).float()),
    ),
    "a quarter, below 0.7": Way(
        "Only levels below 0.7 count.", QUARTER, changed=weighted(lambda sigma: (sigma <= 0.7).float())
    ),
    "a quarter, beyond 0.003": Way("Only what is off by more than a margin counts.", QUARTER, changed=beyond(0.003)),
    "a quarter, beyond 0.01": Way("The same with a wider margin.", QUARTER, changed=beyond(0.01)),
    "a quarter, other prompts": Way(
        "The images are shown under other prompts of the class.", QUARTER, changed=other_prompts
    ),
    "a quarter, the model's own images": Way(
        "24 images that the base model makes of the class are shown in place of the training's.",
        QUARTER,
        changed=own_images,
    ),
    "a quarter, the class left out of half of the captions": Way(
        "Half of the captions that teach say `<zwx>` alone.", QUARTER, changed=class_left_out(0.5)
    ),
    "a quarter, half of the words left out": Way(
        "Captions that teach lose each word beside `<zwx> square` with a chance of a half.",
        QUARTER,
        changed=words_left_out(0.5),
    ),
    "a quarter, half of it the empty prompt": Way(
        "No caption is dropped, and half of what is held is the empty prompt.",
        {**QUARTER, "caption_dropout": 0.0},
        changed=empty_too(0.5),
    ),
    "a quarter, four fifths of it the empty prompt": Way(
        "No caption is dropped, and four fifths of what is held is the empty prompt.",
        {**QUARTER, "caption_dropout": 0.0},
        changed=empty_too(0.8),
    ),
    "a quarter, four fifths of it the empty prompt, which is taught too": Way(
        "The same, with a tenth of the captions dropped.", QUARTER, changed=empty_too(0.8)
    ),
    "a quarter, all of it the empty prompt": Way(
        "No caption is dropped, and the empty prompt alone is held.",
        {**QUARTER, "caption_dropout": 0.0},
        changed=empty_too(1.0),
    ),
    "a quarter, other prompts and the empty one": Way(
        "Half of what is held is other prompts of the class, half the empty one. No caption is dropped.",
        {**QUARTER, "caption_dropout": 0.0},
        changed=together(other_prompts, empty_too(0.5)),
    ),
    "a quarter, noise on the text": Way(
        "Text states have noise of 0.3 of their size.", QUARTER, changed=noisy_text(0.3)
    ),
    "in pairs": Way(
        "Each step teaches two images and holds them at the same noise.",
        {"batch_size": 2, "gradient_accumulation": 2, "preservation_weight": 0.0},
        holds=False,
        changed=in_pairs(2, 1.0),
    ),
    "one image of each step": Way(
        "Each step teaches four images and holds one of them at the same noise, a quarter as strongly.",
        {"gradient_accumulation": 2},
        holds=False,
        changed=in_pairs(1, 0.25),
    ),
    "beside every 4th step": Way(
        "Every fourth step holds its images at the same noise, beside teaching them.",
        holds=False,
        changed=beside(4, 4, 1.0),
    ),
    "beside every 4th step, a quarter as strong": Way(
        "The same, and what it holds counts a quarter.", holds=False, changed=beside(4, 4, 0.25)
    ),
    "beside every 10th step": Way("Every tenth step does.", holds=False, changed=beside(10, 4, 1.0)),
    "beside every 2nd step of the first third": Way(
        "Every second step does, in the first third of the run.", holds=False, changed=beside(2, 4, 1.0, last=1 / 3)
    ),
    "beside every 2nd step of the last third": Way(
        "In the last third.", holds=False, changed=beside(2, 4, 1.0, first=2 / 3)
    ),
    "conflicts projected out": Way(
        "Of what teaches, the part that goes against the mean gradient of what holds is left out.",
        QUARTER,
        changed=conflicts_projected,
    ),
    "orthogonal, 90 %": Way(
        "Nothing is held. Each A is kept out of the directions that hold 90 % of the class's activations.",
        holds=False,
        changed=orthogonal(0.9),
    ),
    "orthogonal, 99 %": Way("The same, of 99 %.", holds=False, changed=orthogonal(0.99)),
    "text layers": Way(
        "Nothing is held. Only the layers of the text stream learn.", {"lora_targets": TEXT_LAYERS}, holds=False
    ),
    "text layers, orthogonal, 99 %": Way("Both.", {"lora_targets": TEXT_LAYERS}, holds=False, changed=orthogonal(0.99)),
    "text layers, a tenth": Way(
        "The layers of the text stream, and a tenth of the batches holds.",
        {"lora_targets": TEXT_LAYERS, "preservation_weight": 0.1},
    ),
}
