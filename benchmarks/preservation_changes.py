"""Changes to the package's own training by which a class may be held: of its batches, its loss, or what follows a step.

Each is made for `preservation_ways` and acts on a run that is set up.

Legend: B batch, N image tokens, C packed channels, D_in the width that a layer takes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from examples import evaluate, shapes
from lora_utils import constants
from lora_utils.io.images import to_pixels
from lora_utils.lora.layers import LoraLinear
from lora_utils.model import flow
from lora_utils.model.components import Components
from lora_utils.model.text_encoder import Prompt, TextEmbeddings, encode_prompts
from lora_utils.model.vae import encode_images
from lora_utils.placeholder.tokens import no_placeholders
from lora_utils.training import loop, loss
from lora_utils.training.batches import Batch
from lora_utils.training.state import TrainState

AfterStep = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Bench:
    """The untouched model."""

    components: Components


def together(*changes: Any) -> Any:
    """Make several changes, in this order, none of which acts after a step."""

    def changed(*given: Any) -> None:
        for change in changes:
            change(*given)

    return changed


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


# --- what is taught -------------------------------------------------------------------------------------------------


def _taught_as(change: Callable[[str, str, torch.Generator], str]) -> Any:
    """Change the captions of what teaches: `change` is given the token, a caption's words and a source of chance."""

    def changed(_bench: Bench, run: TrainState, noun: str, seed: int, _stack: ExitStack) -> None:
        token, generator = run.config.tokens[0], torch.Generator().manual_seed(seed)

        def each(batch: Batch) -> Batch:
            if batch.is_prior:
                return batch
            captions = tuple(change(f"{token} {noun}", text, generator) for text in batch.captions)
            _know_captions(run, captions)
            return replace(batch, captions=captions)

        _change_batches(run, each)

    return changed


def class_left_out(share: float) -> Any:
    """Name the object by its token alone in a share of the captions."""

    def change(phrase: str, text: str, generator: torch.Generator) -> str:
        return text.replace(phrase, phrase.split(maxsplit=1)[0]) if torch.rand(1, generator=generator) < share else text

    return _taught_as(change)


def words_left_out(share: float) -> Any:
    """Leave out each word of the captions, but for the token and its class, with a chance."""

    def change(phrase: str, text: str, generator: torch.Generator) -> str:
        words = text.replace(phrase, phrase.replace(" ", "_")).split(" ")
        kept = [word for word in words if "_" in word or torch.rand(1, generator=generator) >= share]
        return " ".join(kept).replace("_", " ")

    return _taught_as(change)


def noisy_text(size: float) -> Any:
    """Add noise to all text states, of this share of their own size, for what teaches and what holds alike."""

    def changed(_bench: Bench, _run: TrainState, _noun: str, seed: int, stack: ExitStack) -> None:
        original, generator = loss.batch_text, torch.Generator().manual_seed(seed)

        def noisy(*given: Any) -> TextEmbeddings:
            text = original(*given)
            rms = text.states.detach().square().mean(dim=-1, keepdim=True).sqrt()
            return replace(text, states=text.states + size * rms * torch.randn(text.states.shape, generator=generator))

        stack.enter_context(mock.patch.object(loss, "batch_text", noisy))

    return changed


# --- what is held ---------------------------------------------------------------------------------------------------


def _descriptions(noun: str, count: int, seed: int) -> list[str]:
    """Prompts of the plain class, none of them a caption."""
    order = torch.Generator().manual_seed(seed)
    wordings = [
        wording
        for colour in shapes.COLOURS
        for ground in shapes.BACKGROUNDS
        for wording in shapes.Prompt(noun, colour=colour, background=ground).wordings()
    ]
    return [wordings[index] for index in torch.randperm(len(wordings), generator=order)[:count].tolist()]


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


def other_prompts(_bench: Bench, run: TrainState, noun: str, seed: int, _stack: ExitStack) -> None:
    texts, generator = _descriptions(noun, 48, seed), torch.Generator().manual_seed(seed)
    _know_captions(run, texts)

    def change(batch: Batch) -> Batch:
        if not batch.is_prior:
            return batch
        chosen = torch.randint(len(texts), (len(batch.captions),), generator=generator).tolist()
        return replace(batch, captions=tuple(texts[index] for index in chosen))

    _change_batches(run, change)


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


def own_images(bench: Bench, run: TrainState, noun: str, seed: int, _stack: ExitStack) -> None:
    texts, generator = _descriptions(noun, 24, seed), torch.Generator().manual_seed(seed)
    _know_captions(run, texts)
    images = evaluate.sample_ours(bench.components, texts, no_placeholders())
    with torch.inference_mode():
        pixels = torch.stack([to_pixels(image) for image in images])
        latents = encode_images(bench.components.need_vae(), pixels).cpu().clone()

    def change(batch: Batch) -> Batch:
        if not batch.is_prior:
            return batch
        chosen = torch.randint(len(texts), (len(batch.captions),), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = flow.add_noise(clean, noise, batch.sigma)
        captions = tuple(texts[index] for index in chosen.tolist())
        return replace(batch, noisy=noisy, target=flow.velocity_target(clean, noise), captions=captions)

    _change_batches(run, change)


# --- when it is held ------------------------------------------------------------------------------------------------


def in_pairs(images: int, weight: float) -> Any:
    """Hold, in each step, some of its images at the very noise at which they teach; of `weight` beside them."""

    def changed(_bench: Bench, run: TrainState, noun: str, _seed: int, _stack: ExitStack) -> None:
        token = run.config.tokens[0]
        batches = iter(run.stream)

        def paired() -> Iterator[Batch]:
            for batch in batches:
                count = len(batch.captions)
                captions = tuple(text.replace(f"{token} {noun}", noun) for text in batch.captions)
                _know_captions(run, captions)
                yield replace(batch, image_weights=torch.full((count,), 2.0))  # the step is the mean of its batches
                few = slice(0, images)
                yield Batch(
                    batch.noisy[few], batch.target[few], batch.sigma[few], captions[few], batch.size,
                    batch.names[few], is_prior=True, image_weights=torch.full((min(images, count),), 2.0 * weight),
                )  # fmt: skip

        run.stream = Stream(paired())  # type: ignore[assignment]

    return changed


def beside(every: int, images: int, weight: float, first: float = 0.0, last: float = 1.0) -> Any:
    """Hold some of a step's images beside all that it teaches, in every so many steps of a share of the run."""

    def changed(_bench: Bench, run: TrainState, noun: str, _seed: int, stack: ExitStack) -> None:
        original, token = loop.forward_backward, run.config.tokens[0]
        steps = range(math.ceil(first * run.config.steps), round(last * run.config.steps), every)

        def beside(state: TrainState, batches: Sequence[Batch], needs_base: Any) -> Tensor:
            if state.step not in steps:
                return original(state, batches, needs_base)
            (batch,) = batches
            count, few = len(batch.captions), slice(0, images)
            captions = tuple(text.replace(f"{token} {noun}", noun) for text in batch.captions)
            _know_captions(state, captions)
            teaches = replace(batch, image_weights=torch.full((count,), 2.0))  # the step is the mean of its batches
            holds = Batch(
                batch.noisy[few], batch.target[few], batch.sigma[few], captions[few], batch.size, batch.names[few],
                is_prior=True, image_weights=torch.full((min(images, count),), 2.0 * weight),
            )  # fmt: skip
            return original(state, [teaches, holds], [False, True])[:1]

        stack.enter_context(mock.patch.object(loop, "forward_backward", beside))

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
