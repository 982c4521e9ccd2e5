"""Changes to the package's own training by which a class may be held: of its batches, its loss, or what follows a step.

Each is made for `preservation.ways` and acts on a run that is set up.

Legend: B batch, N image tokens, C packed channels, D_in the width that a layer takes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lora_utils import constants
from lora_utils.lora.layers import LoraLinear
from lora_utils.model.components import Components
from lora_utils.model.text_encoder import Prompt, encode_prompts
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.training import loop, loss
from lora_utils.training.batches import Batch
from lora_utils.training.state import TrainState

AfterStep = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Bench:
    """The untouched model."""

    components: Components


class Stream:
    """A run's batches, changed one by one. It stands for the stream itself, whose state no run here needs."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self.batches)


def _change_batches(run: TrainState, change: Callable[[Batch], Batch]) -> None:
    run.stream = Stream(map(change, iter(run.stream)))  # type: ignore[assignment]


# --- strength and levels of noise -----------------------------------------------------------------------------------


def weighted(weight_of: Callable[[Tensor], Tensor]) -> Any:
    """Weight the batches that hold by their levels of noise [B]."""

    def changed(_bench: Bench, run: TrainState, _noun: str, _seed: int, _stack: ExitStack) -> None:
        def change(batch: Batch) -> Batch:
            return replace(batch, image_weights=weight_of(batch.sigma)) if batch.is_prior else batch

        _change_batches(run, change)

    return changed


def beyond(margin: float) -> Any:
    """Hold only what is off by more than a margin."""

    def changed(_bench: Bench, _run: TrainState, _noun: str, _seed: int, stack: ExitStack) -> None:
        original = loss.flow_matching_loss

        def with_margin(state: TrainState, batch: Batch, *given: Any) -> Tensor:
            each = original(state, batch, *given)
            return (each - margin).clamp_min(0.0) if batch.is_prior else each

        stack.enter_context(mock.patch.object(loss, "flow_matching_loss", with_margin))

    return changed


# --- what is held ---------------------------------------------------------------------------------------------------


def _know_captions(run: TrainState, texts: Sequence[str]) -> None:
    """Encode captions that the run itself shows none of, once, as it does with its own. Tokens stay under gradient."""
    new = [text for text in dict.fromkeys(texts) if text not in run.data.text_tokens]
    if not new:
        return
    components, longest = run.components, max(run.data.text_tokens.values())
    fixed = [text for text in new if not any(token in text for token in run.config.tokens)]
    prompts = [Prompt(text) for text in fixed]
    with torch.no_grad():
        encoder = components.need_text_encoder()
        states = encode_prompts(encoder, components.tokenizer, prompts, no_placeholders()) if fixed else []
    run.data = replace(
        run.data,
        texts={**run.data.texts, **dict(zip(fixed, states, strict=True))},
        text_tokens={**dict.fromkeys(new, longest), **run.data.text_tokens},
    )


def everyday(_bench: Bench, run: TrainState, noun: str, seed: int, _stack: ExitStack) -> None:
    """Hold everyday prompts of the class, none of them a caption."""
    texts, generator = everyday_prompts(noun), torch.Generator().manual_seed(seed)
    _know_captions(run, texts)

    def change(batch: Batch) -> Batch:
        if not batch.is_prior:
            return batch
        chosen = torch.randint(len(texts), (len(batch.captions),), generator=generator).tolist()
        return replace(batch, captions=tuple(texts[index] for index in chosen))

    _change_batches(run, change)


# English's basic colour terms (Berlin and Kay 1969)
COLOURS = ("white", "black", "red", "green", "yellow", "blue", "brown", "purple", "pink", "orange", "gray")
PLACES = ("outdoors", "indoors", "in a city", "in a forest", "on a beach", "on a table", "in the snow", "at night")
KINDS = ("small", "big", "new", "old", "beautiful")


def everyday_prompts(noun: str) -> list[str]:
    """Return 61 prompts of a class: plain, in each colour, on a ground of each, of several kinds, and in places."""
    beside = (*COLOURS[3:], *COLOURS[:3])  # a ground of another colour
    return [
        noun,
        f"a {noun}",
        f"a photo of a {noun}",
        f"a drawing of a {noun}",
        *(f"a {colour} {noun}" for colour in COLOURS),
        *(f"a photo of a {colour} {noun}" for colour in COLOURS),
        *(f"{noun}, {ground} background" for ground in COLOURS),
        *(f"a {own} {noun} on a {ground} background" for own, ground in zip(COLOURS, beside, strict=True)),
        *(f"a {kind} {noun}" for kind in KINDS),
        *(f"a {noun} {place}" for place in PLACES),
    ]


def empty_too(share: float) -> Any:
    """Hold the empty prompt, which guidance starts from, in a share of what is held."""

    def changed(_bench: Bench, run: TrainState, _noun: str, seed: int, _stack: ExitStack) -> None:
        generator = torch.Generator().manual_seed(seed)
        _know_captions(run, [constants.EMPTY_PROMPT])

        def change(batch: Batch) -> Batch:
            if not batch.is_prior:
                return batch
            empty = torch.rand(len(batch.captions), generator=generator) < share
            captions = (constants.EMPTY_PROMPT if e else t for e, t in zip(empty, batch.captions, strict=True))
            return replace(batch, captions=tuple(captions))

        _change_batches(run, change)

    return changed


# --- projections ----------------------------------------------------------------------------------------------------


def conflicts_projected(_bench: Bench, run: TrainState, _noun: str, _seed: int, stack: ExitStack) -> None:
    """Remove from what teaches the part that goes against the running mean of what holds."""
    original, mean = loop.forward_backward, list[Tensor]()

    def projected(state: TrainState, batches: Any, needs_base: Any) -> Tensor:
        losses = original(state, batches, needs_base)
        # The last block's text isn't used, so its layers have none.
        gradients = [each.grad for each in state.lora if each.grad is not None]
        if batches[0].is_prior:
            if not mean:
                mean.extend(torch.zeros_like(each) for each in gradients)
            for kept, gradient in zip(mean, gradients, strict=True):
                kept.lerp_(gradient, 0.1)
        elif mean:
            along = sum(float((kept * each).sum()) for kept, each in zip(mean, gradients, strict=True))
            if along < 0:
                square = sum(float(kept.square().sum()) for kept in mean)
                for kept, gradient in zip(mean, gradients, strict=True):
                    gradient.sub_(kept, alpha=along / square)
        return losses

    stack.enter_context(mock.patch.object(loop, "forward_backward", projected))


def orthogonal(energy: float, only: str = "") -> Any:
    """Keep each LoRA's A out of the directions in which the class's activations lie, up to a share of their energy."""

    def changed(bench: Bench, run: TrainState, noun: str, _seed: int, _stack: ExitStack) -> AfterStep:
        layers = {
            name: module
            for name, module in run.components.transformer.named_modules()
            if isinstance(module, LoraLinear) and only in name
        }
        token = run.config.tokens[0]
        projections = {}
        for name, moments in _moments_of_class(run, layers, f"{token} {noun}", noun).items():
            values, vectors = torch.linalg.eigh(moments)
            shares = values.flip(0).cumsum(0) / values.sum()
            held = int((shares < energy).sum()) + 1
            basis = vectors.flip(1)[:, :held]  # [D_in, held]
            projections[name] = torch.eye(len(moments)) - basis @ basis.T

        def project() -> None:
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.down.copy_(layer.down @ projections[name])

        project()
        return project

    return changed


@torch.no_grad()
def _moments_of_class(run: TrainState, layers: Mapping[str, LoraLinear], phrase: str, noun: str) -> dict[str, Tensor]:
    """Return the second moments [D_in, D_in] of what each layer is given for prompts of the class."""
    moments = {name: torch.zeros(layer.down.shape[1], layer.down.shape[1]) for name, layer in layers.items()}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(_module: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                flat = given[0].flatten(0, -2)
                moments[name] += flat.T @ flat

            stack.callback(layer.base_layer.register_forward_pre_hook(record).remove)
        stream = loop_stream(run)
        for _ in range(min(24, run.config.steps)):
            batch = next(stream)
            captions = tuple(text.replace(phrase, noun) for text in batch.captions)
            _know_captions(run, captions)
            loss.flow_matching_loss(run, replace(batch, captions=captions))
    return moments


def loop_stream(run: TrainState) -> Iterator[Batch]:
    """Return batches as the run's own, from a stream that leaves the run's where it is."""
    fresh = type(run.stream)(run.config, run.data.examples, run.components.schedule)
    return iter(fresh)
