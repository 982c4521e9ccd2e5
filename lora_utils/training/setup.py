"""Setting up a run: what is fixed is encoded once, what has no more to do is freed, then the transformer is loaded.

The order is: dataset, plan, texts, latents, transformer with LoRA. Everything that can be refused without loading a
model was refused before.

Legend: T text tokens, D the text encoder's width, S timesteps.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from lora_utils import constants
from lora_utils.dataset.autocaption import write_captions
from lora_utils.dataset.caption_texts import caption_choices
from lora_utils.dataset.examples import Dataset, Example, listed_names
from lora_utils.dataset.scan import check_captions
from lora_utils.io.tensor_store import open_tensor_store
from lora_utils.lora.adapter import AdapterSettings, attach_adapter, load_adapter
from lora_utils.model import flow, memory_estimate, memory_plan, roofline
from lora_utils.model.adapter_sizes import adapted_layers, nearest_preset
from lora_utils.model.components import Components, load_schedule, model_key
from lora_utils.model.controls import prompt_of
from lora_utils.model.device import release_memory, reset_peak
from lora_utils.model.memory_plan import MemoryPlan
from lora_utils.model.text_encoder import prompt_ids
from lora_utils.model.transformer import Storage, load_transformer
from lora_utils.model.vision import area_size, feature_count, load_processor
from lora_utils.placeholder.embedding import embedding_learning_rate
from lora_utils.placeholder.tokens import placeholders_without_embeddings
from lora_utils.training import distributed
from lora_utils.training.batch_plans import generator_for, shown_captions
from lora_utils.training.batches import BatchStream, LargestBatch, other_timesteps, run_timesteps
from lora_utils.training.encoding import TrainJob, edit_prompts, encode_images, encode_texts, see_controls, text_prompts
from lora_utils.training.optimizers import bytes_per_weight, new_optimizers
from lora_utils.training.preserved import preserved_prompts
from lora_utils.training.state import TrainData, TrainState

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Clock:
    """Where the time goes."""

    began: float = field(default_factory=time.monotonic)

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.monotonic()
        seconds, self.began = now - self.began, now
        return seconds


def setup(job: TrainJob) -> TrainState:
    """Encode what is fixed, free what has no more to do, then load the transformer and attach the LoRA."""
    release_memory()  # of a run that was cancelled
    reset_peak(job.placement.device)
    clock, seconds = _Clock(), dict[str, float]()
    tokenizer, schedule = job.tokenizer, load_schedule(job.model_folder)

    # The dataset, with all its captions.
    learned, held_out = _split_dataset(job, tokenizer)
    if job.config.autocaption:
        seconds["describe"] = clock.lap()
    batches = job.config.steps * job.config.gradient_accumulation * job.ranks.world_size
    shown = shown_captions(job.config, learned.examples, batches)
    preserved = preserved_prompts(shown, job.config)
    text_tokens = _text_tokens(job, [*shown, *preserved.texts(shown)], tokenizer)

    # The plan.
    timesteps = _timesteps(job, learned, schedule)
    largest = largest_batch(job, learned, text_tokens, shown)
    plan = job.plan or _choose_plan(job, largest, timesteps)

    # Texts and latents.
    store, planning_s = open_tensor_store(), clock.lap()
    features = see_controls(job, plan, [learned, held_out], store)
    prompts = (
        edit_prompts(job, learned, held_out, preserved, features)
        if job.variant.edits
        else text_prompts(job, [*shown, *preserved.texts(shown), *held_out.captions])
    )
    encoded = encode_texts(job, plan, tokenizer, store, prompts)
    cached = encode_images(job, [learned, held_out], store, features)
    log.info("%d images and %d captions are ready", len(cached), len({prompt_of(key) for key in encoded.texts}) - 1)
    examples, encoding_s = cached[: len(learned.examples)], clock.lap()

    # The transformer with its LoRA, and what moves it.
    transformer, lora = _load_transformer(job, plan, timesteps)
    placeholders = encoded.placeholders
    if job.init_weights is not None:
        load_adapter(transformer, job.init_weights.layers)
        counts = len(job.init_weights.layers), len(job.init_weights.embeddings)
        log.info("continuing from init_weights: %d layers, %d embeddings", *counts)
    rate = embedding_learning_rate(job.config, encoded.words) if encoded.words is not None else 0.0
    state = TrainState(
        config=job.config,
        ranks=job.ranks,
        base_model=model_key(job.model_folder),
        init_weights=job.init_weights.sha256 if job.init_weights else "",
        data=TrainData(
            examples,
            cached[len(learned.examples) :],
            list(learned.taught.values()),
            preserved,
            encoded.texts,
            text_tokens,
        ),
        largest=largest,
        components=Components(
            tokenizer, schedule, encoded.text_encoder, None, transformer, job.placement, job.model_folder, job.variant
        ),
        plan=plan,
        lora=lora,
        placeholders=placeholders,
        initial_embeddings=tuple(embedding.detach().float().cpu().clone() for embedding in placeholders.embeddings),
        optimizers=new_optimizers(job.config, lora, placeholders.embeddings, rate),
        stream=BatchStream(job.config, examples, schedule, preserved),
        words=encoded.words,
        described=encoded.described,
    )
    seconds["load"] = planning_s + encoded.load_s + clock.lap()
    state.seconds = {**seconds, "cache": encoding_s - encoded.load_s}
    return state


# --- dataset --------------------------------------------------------------------------------------------------------


def _split_dataset(job: TrainJob, tokenizer: Qwen2Tokenizer) -> tuple[Dataset, Dataset]:
    """Return what is learned from and what is measured on, with captions for all images if they are to be written."""
    dataset, config = job.dataset, job.config
    if config.autocaption and dataset.uncaptioned:
        if job.ranks.is_main:
            dataset = write_captions(dataset, config, job.model_folder, tokenizer, job.placement)
        # The captions, not the dataset: each process has extracted files of its own.
        captions = distributed.broadcast(job.ranks, dataset.captions)
        dataset = dataset.with_captions(dict(zip(dataset.captions_by_image, captions, strict=True)))
        dataset = check_captions(dataset, config, tokenizer)
    learned, held_out = dataset.split(config.validation_share)
    first = {path: caption_choices(caption, config)[0] for path, caption in held_out.captions_by_image.items()}
    held_out = held_out.with_captions(first)  # it is measured under one caption alone
    if held_out.examples:
        names = listed_names([path.name for path in held_out.captions_by_image])
        log.info("held out to measure on: %d images, %s", held_out.num_images, names)
    return learned, held_out


def _text_tokens(job: TrainJob, captions: Sequence[str], tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Return the text tokens T that the transformer sees of each caption, but for those of images to edit."""
    placeholders = placeholders_without_embeddings(job.config.tokens, tokenizer)
    shown = dict.fromkeys((*captions, constants.EMPTY_PROMPT))
    dropped = job.variant.prefix_tokens
    return {caption: len(prompt_ids(tokenizer, caption, placeholders, job.variant)) - dropped for caption in shown}


# --- plan -----------------------------------------------------------------------------------------------------------


def largest_batch(
    job: TrainJob, learned: Dataset, text_tokens: Mapping[str, int], shown: Sequence[str]
) -> LargestBatch:
    """Return the batch that needs most memory: the largest size, with the longest caption that is shown."""
    image, text = _control_tokens(job, learned)
    widest = max(learned.examples, key=lambda example: example.size.tokens + image[example])
    size, controls = widest.size, image[widest]
    longest = max(text_tokens.values()) + max(text.values())
    step = memory_estimate.step_size(
        job.config,
        job.shapes.transformer,
        job.config.batch_size * (size.tokens + controls + longest),
        job.placement.dtype.itemsize,
        bytes_per_weight(job.config),
    )
    caption = max(shown, key=lambda caption: text_tokens[caption])
    return LargestBatch(size, caption, longest, step, controls)


def _control_tokens(job: TrainJob, learned: Dataset) -> tuple[dict[Example, int], dict[Example, int]]:
    """Return how many image tokens and how many text tokens each example's images to edit take."""
    if not job.variant.edits:
        none = dict.fromkeys(learned.examples, 0)
        return none, none
    processor, area = load_processor(job.model_folder), job.variant.vision_area_px
    marks = {
        count: len(job.tokenizer(job.variant.prompt("", count)).input_ids) - count
        for count in {len(example.controls) for example in learned.examples}
    }
    image, text = dict[Example, int](), dict[Example, int]()
    for example in learned.examples:
        sizes = [control.size for control in example.controls]
        image[example] = sum(size.tokens for size in sizes)
        seen = [size.pixels if area is None else area_size(*size.pixels, area) for size in sizes]
        features = sum(feature_count(processor, *each) for each in seen)
        text[example] = features + marks[len(sizes)] - len(job.tokenizer(job.variant.prompt("", 0)).input_ids)
    return image, text


def _timesteps(job: TrainJob, learned: Dataset, schedule: flow.Schedule) -> Tensor | None:
    """Return all timesteps [S] that the transformer will be shown; None where others may come."""
    if job.any_timestep:
        return None
    dtype = job.placement.dtype
    own = run_timesteps(job.config, learned.examples, schedule, dtype, job.ranks.world_size)
    previews = list(chain(*job.previews))
    return torch.cat([own, other_timesteps(job.config, previews, schedule, dtype)]).unique()


def _choose_plan(job: TrainJob, largest: LargestBatch, timesteps: Tensor | None) -> MemoryPlan:
    """Choose the run's plan by the memory that is free, and log it. On several GPUs the fullest one decides for all."""
    config = job.config
    room = memory_estimate.measure_room(job.placement)
    room = replace(room, free=distributed.all_reduce_min(job.ranks, room.free))
    if room.ram_free is not None:
        room = replace(room, ram_free=distributed.all_reduce_min(job.ranks, room.ram_free))
    count = None if timesteps is None else len(timesteps)
    estimate = memory_estimate.training_estimate(job.shapes, largest.step_size, count, room, job.ranks.world_size)
    timing = _timing(job, largest)
    plan = memory_plan.choose_training_plan(config.quantization, estimate, config.learns_tokens, timing, job.shard_base)
    memory_plan.log_plan(plan, config.quantization, estimate)
    return plan


def _timing(job: TrainJob, largest: LargestBatch) -> memory_plan.Timing | None:
    """Return what the run's time follows from; None without a GPU, or for one whose data sheet isn't known."""
    config, gpu = job.config, roofline.find_gpu(job.placement.device)
    if gpu is None:
        return None
    tokens, size = (largest.size.tokens + largest.control_tokens, largest.text_tokens), largest.step_size
    targets = nearest_preset(adapted_layers(config.lora_targets, job.shapes.blocks))
    step = roofline.Step(job.shapes.of_flops, *tokens, targets, size.lora_parameters)
    images = config.steps * config.gradient_accumulation * config.batch_size
    return memory_plan.Timing(gpu, step, size, images)


# --- transformer ----------------------------------------------------------------------------------------------------


def _load_transformer(
    job: TrainJob, plan: MemoryPlan, timesteps: Tensor | None
) -> tuple[QwenImageTransformer2DModel, list[nn.Parameter]]:
    """Load the transformer as the plan says, and attach the LoRA that is to be trained."""
    config = job.config
    storage = Storage(plan.quantization, timesteps, job.ranks.world_size if plan.sharded else 1)
    transformer = load_transformer(job.model_folder, job.placement, storage)
    settings = AdapterSettings(config.lora_targets, config.rank, config.adapter, config.lora_alpha)
    lora = attach_adapter(transformer, settings, generator_for(config.seed, "lora"))
    name = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}[config.adapter]
    log.info("%s of rank %d: %.1f million weights", name, config.rank, sum(p.numel() for p in lora) / 1e6)
    return transformer, lora
