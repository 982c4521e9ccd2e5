"""The ways of holding a class that `benchmarks.preservation` compares."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.preservation.changes import (
    AfterStep,
    Bench,
    beyond,
    conflicts_projected,
    empty_too,
    everyday,
    orthogonal,
    weighted,
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


QUARTER, TENTH = {"preservation_weight": 0.25}, {"preservation_weight": 0.1}
WAYS: dict[str, Way] = {
    "nothing held": Way("No class word.", holds=False),
    "a quarter of the batches": Way(
        "A quarter of the batches shows the images under the class word, with the base model's velocity as target.",
        QUARTER,
    ),
    "a tenth of the batches": Way("The same, of a tenth.", TENTH),
    "a quarter, above 0.7": Way(
        "Only levels of noise above 0.7 count in the batches that hold.",
        QUARTER,
        changed=weighted(lambda sigma: (sigma > 0.7).float()),
    ),
    "a quarter, beyond 0.01": Way("Only what is off by more than a margin counts.", QUARTER, changed=beyond(0.01)),
    "a tenth, everyday prompts": Way(
        "The images are shown under 61 everyday prompts of the class in place of the captions.",
        TENTH,
        changed=everyday,
    ),
    "a tenth, half of it the empty prompt": Way(
        "No caption is dropped, and half of what is held is the empty prompt.",
        {**TENTH, "caption_dropout": 0.0},
        changed=empty_too(0.5),
    ),
    "conflicts projected out": Way(
        "Of what teaches, the part that goes against the mean gradient of what holds is left out.",
        QUARTER,
        changed=conflicts_projected,
    ),
    "orthogonal, 99 %": Way(
        "Nothing is held. Each A is kept out of the directions that hold 99 % of the class's activations.",
        holds=False,
        changed=orthogonal(0.99),
    ),
}
