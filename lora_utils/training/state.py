"""The state of a training run: what it learns from, what moves, and how far it has come.

Legend: T text tokens, D the text encoder's width.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_utils.config import TrainConfig
from lora_utils.dataset.cache import CachedExample
from lora_utils.errors import UserError
from lora_utils.lora.adapter import trained_layers
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.updates import does_nothing, tensors_of
from lora_utils.model.components import Components
from lora_utils.model.memory_plan import MemoryPlan
from lora_utils.placeholder.embedding import WordEmbeddings, describe_embeddings, embedding_sha256
from lora_utils.placeholder.tokens import Placeholders
from lora_utils.training.batches import BatchStream, LargestBatch
from lora_utils.training.distributed import Ranks
from lora_utils.training.optimizers import Optimizers
from lora_utils.training.preserved import Preserved

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainData:
    """What a run learns from, encoded."""

    examples: list[CachedExample]
    held_out: list[CachedExample]  # to measure on
    captions: list[str]  # of the images that are learned from, one an image
    preserved: Preserved  # the prompts whose images must stay what they are
    texts: Mapping[str, Tensor]  # [T, D] by caption; without those whose token learns, which every step encodes
    text_tokens: Mapping[str, int]  # T of each caption that a step may show


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The mean losses of a step: of the batches that taught and of those that held the class; None for none."""

    step: int
    loss: float | None
    class_loss: float | None


@dataclass(frozen=True, slots=True)
class SoundWeights:
    """The weights after a step, all of them numbers, on the CPU."""

    step: int
    lora: LoraFile


@dataclass(slots=True)
class TrainState:
    """A training run, ready to step.

    `setup.setup` makes it. `loop.train` moves `step`, `flops` and all that learns, and keeps `sound`, to which
    `final_lora` may go back. `recompute` replaces `plan`.
    `checkpoint.restore_checkpoint` sets what an earlier process left. `monitor` adds to `recent_losses`, `seconds`,
    `validated_at` and `previewed_at`.
    """

    # What the run is.
    config: TrainConfig  # as it was asked for
    ranks: Ranks
    base_model: str  # fingerprint of the model
    init_weights: str  # SHA-256 of the LoRA file that it started from; empty for none
    data: TrainData
    largest: LargestBatch

    # What computes, and what moves.
    components: Components
    plan: MemoryPlan
    lora: list[nn.Parameter]
    placeholders: Placeholders
    initial_embeddings: tuple[Tensor, ...]  # [D] fp32 each, on the CPU
    optimizers: Optimizers
    stream: BatchStream
    words: WordEmbeddings | None = None  # that the tokens' embeddings stand among; None where none is trained
    described: list[dict[str, Any]] = field(default_factory=list)  # what is to be said of embeddings that aren't

    # How far it has come.
    step: int = 0  # optimizer steps taken
    resumed_at: int = 0  # of these, the ones that an earlier process took
    recent_losses: list[StepLoss] = field(default_factory=list)  # of the last tenth of the steps taken
    validated_at: int = -1  # the step after which it was last validated
    previewed_at: int = -1  # the step after which previews were last sampled
    flops: float = 0.0  # done in this process
    seconds: dict[str, float] = field(default_factory=dict)  # where this process's time went
    sound: "SoundWeights | None" = None  # what was last found to be numbers

    def keep_sound(self) -> None:
        """Keep the weights as they are now, if all of them are numbers: a run that diverges later still has them."""
        lora = current_lora(self)
        if _is_finite(lora):
            self.sound = SoundWeights(self.step, lora)

    @property
    def resolved_config(self) -> TrainConfig:
        """The config with the quantisation that it came to, as meta.json has it."""
        return replace(self.config, quantization=self.plan.quantization)

    @property
    def learned(self) -> list[Tensor]:
        """All that may move: the LoRA's weights and the tokens' embeddings."""
        return [*self.lora, *self.placeholders.embeddings]


def current_lora(state: TrainState) -> LoraFile:
    """Return the LoRA and the embeddings of its tokens as they are now, or the average of them, on the CPU."""
    with state.optimizers.averaged():
        embeddings = {
            token: embedding.detach().float().cpu().clone().view(1, -1)
            for token, embedding in zip(state.placeholders.tokens, state.placeholders.embeddings, strict=True)
        }
        return LoraFile(trained_layers(state.components.transformer), embeddings)


def _is_finite(lora: LoraFile) -> bool:
    parts = [part for layer in lora.layers.values() for part in tensors_of(layer)]
    return all(bool(part.isfinite().all()) for part in (*parts, *lora.embeddings.values()))


def _readable_lora(state: TrainState) -> tuple[LoraFile | None, str]:
    """Return the weights as they are, or None and what is wrong with them.

    A GPU that has failed in a step gives no weight back; what was kept of them is on the CPU.
    """
    try:
        lora = current_lora(state)
    except RuntimeError as error:
        if state.sound is None:
            raise
        return None, f"can't be read ({str(error).splitlines()[0]})"
    return (lora, "") if _is_finite(lora) else (None, "aren't finite")


def final_lora(state: TrainState) -> LoraFile:
    """Return what has been learned: the weights as they are or, if these are no numbers, as they last were.

    Warns of what has learned nothing. Raises UserError where no weights are numbers.
    """
    lora, why = _readable_lora(state)
    if lora is None:
        if state.sound is None:
            raise UserError(f"the weights aren't finite after step {state.step}; lower learning_rate.")
        log.warning("the weights %s after step %d: those of step %d are kept", why, state.step, state.sound.step)
        state.step, lora = state.sound.step, state.sound.lora
    for token in unmoved_tokens(state, lora):
        log.warning("%s has learned nothing: its embedding is as it began", token)
    if all(map(does_nothing, lora.layers.values())):
        log.warning("the LoRA has learned nothing: all of its layers are zero")
    return lora


def unmoved_tokens(state: TrainState, lora: LoraFile) -> list[str]:
    """Return the tokens whose embeddings were to be trained and are as they began."""
    pairs = zip(state.placeholders.tokens, state.placeholders.embeddings, state.initial_embeddings, strict=True)
    return [
        token
        for token, own, first in pairs
        if own.requires_grad and torch.equal(lora.embeddings[token].view(-1), first)
    ]


def describe_placeholders(state: TrainState, lora: LoraFile) -> list[dict[str, Any]]:
    """Return what meta.json says of each embedding of the LoRA that is written; nothing without a token."""
    unmoved = unmoved_tokens(state, lora)
    try:
        described = _described(state, lora)
    except RuntimeError as error:  # of a GPU that has failed: what prediction needs is known without it
        log.warning("what meta.json says of the tokens is short: %s", str(error).splitlines()[0])
        ids = state.placeholders.ids_by_token
        described = [
            {"token": token, "token_id": ids[token], "sha256": embedding_sha256(own)}
            for token, own in lora.embeddings.items()
        ]
    return [
        {
            **each,
            "init_std": state.config.placeholder_init_std,
            "learning_rate": state.optimizers.embedding_learning_rate,
            "captions_with_token": sum(each["token"] in caption for caption in state.data.captions),
            "moved": state.config.learns_tokens and each["token"] not in unmoved,
        }
        for each in described
    ]


def _described(state: TrainState, lora: LoraFile) -> list[dict[str, Any]]:
    """Return how the embeddings that are written stand among the words."""
    if state.words is None:
        return state.described
    written = tuple(lora.embeddings[token].view(-1) for token in state.placeholders.tokens)
    return describe_embeddings(
        replace(state.placeholders, embeddings=written),
        state.initial_embeddings,
        state.components.tokenizer,
        state.words,
    )
