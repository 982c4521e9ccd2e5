"""Encoding what is fixed: texts without a token that learns, images, and what the text encoder sees of images to edit.

It is done once, before the transformer is loaded, and its models are freed. `TrainJob` says what a run is set up from.

Legend: T text tokens, D the text encoder's width.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.dataset.cache import CachedExample, cache_examples
from lora_utils.dataset.examples import ControlImage, Dataset
from lora_utils.dataset.feature_cache import CachedFeatures, cache_features, seen_of
from lora_utils.dataset.text_cache import FixedCaptions, encode_captions, find_captions
from lora_utils.io.tensor_store import TensorStore
from lora_utils.lora.formats import LoraFile
from lora_utils.model.controls import text_key
from lora_utils.model.device import Placement, release_memory
from lora_utils.model.memory_estimate import ModelShapes
from lora_utils.model.memory_plan import MemoryPlan
from lora_utils.model.text_encoder import Prompt, load_text_encoder
from lora_utils.model.variant import TEXT_TO_IMAGE, Variant
from lora_utils.placeholder.embedding import (
    WordEmbeddings,
    describe_embeddings,
    measure_words,
    new_placeholders,
    start_embeddings,
)
from lora_utils.placeholder.tokens import Placeholders, no_placeholders
from lora_utils.training import distributed
from lora_utils.training.batch_plans import captions_by_example, generator_for
from lora_utils.training.distributed import SINGLE_PROCESS, Ranks
from lora_utils.training.preserved import Preserved
from lora_utils.training.previews import PreviewRow


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What a run is set up from."""

    config: TrainConfig
    dataset: Dataset  # checked
    model_folder: Path
    placement: Placement
    tokenizer: Qwen2Tokenizer
    shapes: ModelShapes  # of the model
    ranks: Ranks = SINGLE_PROCESS
    previews: Sequence[PreviewRow] = ()  # each request with width and height; their prompts are encoded too
    shard_base: str = "auto"  # see `RunOptions`
    plan: MemoryPlan | None = None  # of the run that is resumed, which is kept; None: one is chosen
    init_weights: LoraFile | None = None  # to continue learning from
    any_timestep: bool = False  # others than the run's own will be shown, so a table of the modulations won't do
    variant: Variant = TEXT_TO_IMAGE  # of the model


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """The encoded captions, and what is left of the text encoder: it stays only while a token's embedding learns."""

    texts: Mapping[str, Tensor]
    text_encoder: Qwen2_5_VLTextModel | None
    words: WordEmbeddings | None  # that learning embeddings stand among
    placeholders: Placeholders
    described: list[dict[str, Any]]  # what `describe_embeddings` says of those that don't learn
    load_s: float


def see_controls(
    job: TrainJob, plan: MemoryPlan, parts: Sequence[Dataset], store: TensorStore
) -> dict[ControlImage, CachedFeatures]:
    """Return what the text encoder sees of these datasets' images to edit; nothing where there are none."""
    placement = job.placement if plan.text_encoder_on_device else job.placement.on_cpu()
    examples = [example for part in parts for example in part.examples]
    with distributed.main_process_first(job.ranks):
        return cache_features(examples, job.model_folder, job.variant, placement, store)


def text_prompts(job: TrainJob, captions: Sequence[str]) -> dict[str, Prompt]:
    """Return all prompts that a text-to-image run will show, by their `text_key`."""
    previews = [text for row in job.previews for request in row for text in (request.prompt, request.negative_prompt)]
    return {text: Prompt(text) for text in (*captions, *previews, constants.EMPTY_PROMPT)}


def edit_prompts(
    job: TrainJob,
    learned: Dataset,
    held_out: Dataset,
    preserved: Preserved,
    features: Mapping[ControlImage, CachedFeatures],
) -> dict[str, Prompt]:
    """Return all prompts that an editing run will show with the images that they speak of, by their `text_key`."""
    config, found = job.config, dict[str, Prompt]()

    def add(texts: Iterable[str], controls: Sequence[ControlImage]) -> None:
        own = seen_of(controls, features)
        found.update({text_key(text, own): Prompt(text, own.seen) for text in texts})

    batches = config.steps * config.gradient_accumulation * job.ranks.world_size
    captions = captions_by_example(config, learned.examples, batches)
    for example, own in zip(learned.examples, captions, strict=True):
        texts = [*own, constants.EMPTY_PROMPT, *preserved.texts(own)]
        add(texts, example.controls)
        if example.flip:
            add(texts, [replace(control, mirrored=True) for control in example.controls])
        if config.control_dropout:
            add(texts, ())
    for example in held_out.examples:
        add([example.caption], example.controls)
    pairs = (held_out.examples or learned.examples) if job.previews else []
    for index, row in enumerate(job.previews):
        texts = [text for request in row for text in (request.prompt, request.negative_prompt)]
        add(texts, pairs[index % len(pairs)].controls)
    return found


def encode_texts(
    job: TrainJob, plan: MemoryPlan, tokenizer: Qwen2Tokenizer, store: TensorStore, prompts: Mapping[str, Prompt]
) -> EncodedTexts:
    """Encode the prompts that hold no token that learns: what the text encoder makes of them never changes.

    The text encoder is loaded only if it is needed, and freed unless a token's embedding is trained. One that stays as
    it starts costs no more than a word does.
    """
    config, began = job.config, time.monotonic()
    placement = job.placement if plan.text_encoder_on_device else job.placement.on_cpu()

    # The tokens' embeddings.
    text_encoder: Qwen2_5_VLTextModel | None = None
    words: WordEmbeddings | None = None
    placeholders, described = no_placeholders(), list[dict[str, Any]]()
    if config.tokens:
        text_encoder = load_text_encoder(job.model_folder, placement)
        placeholders = new_placeholders(config, tokenizer, text_encoder, generator_for(config.seed, "row"))
        start_embeddings(placeholders, job.init_weights.embeddings if job.init_weights else {})
        words = measure_words(text_encoder, tokenizer)

    # Which texts are still to be encoded.
    learning = config.tokens if config.learns_tokens else ()
    fixed = {name: prompt for name, prompt in prompts.items() if not any(token in prompt.text for token in learning)}

    def find() -> FixedCaptions:
        return find_captions(fixed, tokenizer, job.model_folder, placement, store, job.variant, placeholders)

    found = find()
    if found.new and text_encoder is None:
        text_encoder = load_text_encoder(job.model_folder, placement)
    load_s = time.monotonic() - began

    # Encode: the main process first, so that the others find its work in the store.
    with distributed.main_process_first(job.ranks):
        texts = encode_captions(found if job.ranks.is_main else find(), text_encoder, tokenizer, store, job.variant)
    if words is not None and not config.learns_tokens:
        described = describe_embeddings(placeholders, placeholders.embeddings, tokenizer, words)
    if not config.learns_tokens:
        text_encoder = words = None  # the words are a part of it
    release_memory()
    return EncodedTexts(texts, text_encoder, words, placeholders, described, load_s)


def encode_images(
    job: TrainJob, parts: Sequence[Dataset], store: TensorStore, features: Mapping[ControlImage, CachedFeatures]
) -> list[CachedExample]:
    """Encode the examples of these datasets, in their order."""
    examples = [example for part in parts for example in part.examples]
    with distributed.main_process_first(job.ranks):
        cached = cache_examples(examples, job.model_folder, job.placement, store, features)
    if job.ranks.is_main:
        store.trim()
    return cached
