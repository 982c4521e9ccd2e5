"""Preparing a training run: what is fixed is encoded once, what is done with is freed, then the transformer comes.

Owns the run's state and the order in which the parts of the model are on the device; must not know the loop.

Legend: T text tokens, D the text encoder's width, S timesteps.
"""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import flow, fresh_token, memory, models
from lora_utils import plan as plans
from lora_utils.adapters import attach_trainable_lora, set_trainable_lora, trained_lora
from lora_utils.autocaption import write_captions
from lora_utils.bundle import unpack_weights
from lora_utils.caching import CachedExample, cache_examples, encode_captions, find_captions
from lora_utils.captions import preserved_caption
from lora_utils.cards import ALONE, Ranks, agree, first_goes_first
from lora_utils.config import SampleRequest, TrainConfig
from lora_utils.dataset import Dataset, first_of, refuse
from lora_utils.draws import EMPTY_CAPTION, VALIDATION_SIGMAS, MicroBatches, Sized, generator_for, run_timesteps
from lora_utils.errors import UserError
from lora_utils.lora_file import LoraFile, read_lora_file
from lora_utils.optimizers import Optimizers, new_optimizers
from lora_utils.placeholder import Placeholders, no_placeholders
from lora_utils.preflight import caption_problems
from lora_utils.sizes import picture_size
from lora_utils.store import fingerprint, key_of, open_store

log = logging.getLogger(__name__)

PROBE_SIGMA = 0.5  # of the step that tries the memory plan out, before the first of the run's own


@dataclass(slots=True)
class Run:
    """A training run, ready to step: made by `prepare`, advanced by `train`, read by `finish`."""

    config: TrainConfig
    place: models.Place
    schedule: flow.Schedule
    transformer: QwenImageTransformer2DModel
    lora: list[nn.Parameter]
    examples: list[CachedExample]
    texts: Mapping[str, Tensor]  # [T, D] each; captions with the token are missing, they are encoded at every step
    placeholders: Placeholders
    text_encoder: Qwen2_5_VLTextModel | None  # kept only while a row is trained
    tokenizer: Qwen2Tokenizer
    optimizers: Optimizers
    first_rows: tuple[Tensor, ...]  # as they were drawn
    captions: list[str] = field(default_factory=list)  # one a picture
    preserved: dict[str, str] = field(default_factory=dict)  # captions with the class word in place of what is taught
    ranks: Ranks = ALONE
    base: str = ""  # fingerprint of the model
    started_from: str = ""  # SHA-256 of the LoRA file, if it didn't start fresh
    held_out: list[CachedExample] = field(default_factory=list)  # to measure on
    step: int = 0  # optimizer steps taken
    resumed_at: int = 0  # of these, the ones that an earlier process took
    stream: MicroBatches | None = None  # what is drawn, once it has begun
    recomputed: int = 0  # blocks that recompute their activations in the backward pass
    compiled: bool = False  # the blocks' arithmetic
    flops: float = 0.0  # done so far
    seconds: dict[str, float] = field(default_factory=dict)  # where the time went


def prepare(
    config: TrainConfig, dataset: Dataset, model_folder: Path, place: models.Place, any_timestep: bool = False,
    ranks: Ranks = ALONE, samples: Sequence[SampleRequest] = (), shard_base: str = "auto",
) -> Run:  # fmt: skip
    """Encode what is fixed, free what is done with, then load the transformer and attach the LoRA.

    `any_timestep`: the caller will show the transformer others than the run's own, so a table won't do. `samples`: what
    is to be drawn on the way, each with width and height; their prompts are encoded too. `shard_base`: whether several
    cards share the transformer out; see `RunOptions`.
    """
    models.release_memory()  # of a run that was cancelled
    memory.forget_peak(place.device)
    began = time.monotonic()
    tokenizer, schedule = models.load_tokenizer(model_folder), models.load_schedule(model_folder)
    dataset = _captioned(config, dataset, model_folder, tokenizer, place, ranks)
    described = time.monotonic()
    dataset, held_out = _held_out(config, dataset, tokenizer)
    captions = {caption: preserved_caption(caption, config) for caption in dataset.captions}
    preserved = {caption: held for caption, held in captions.items() if held != caption}
    shown = shown_timesteps(config, dataset.examples, schedule, place.dtype, ranks, samples)
    timesteps = None if any_timestep else shown
    plan = make_plan(config, dataset, model_folder, tokenizer, place, timesteps, ranks, shard_base)
    config = replace(config, quantization=plan.quantization)
    text_place = place if plan.text_encoder_on_card else replace(place, device=torch.device("cpu"))
    store = open_store()
    fixed = _fixed_texts(config, [*captions, *preserved.values(), *held_out.captions], samples)
    looked_up = find_captions(fixed, tokenizer, model_folder, text_place, store)
    text_encoder: Qwen2_5_VLTextModel | None = None
    if config.tokens or looked_up.new:
        text_encoder = models.load_text_encoder(model_folder, text_place)
    loaded = time.monotonic()
    placeholders = no_placeholders()
    if config.tokens and text_encoder is not None:
        rows = generator_for(config.seed, "row")
        placeholders = fresh_token.new_placeholders(config, tokenizer, text_encoder, rows)
    with first_goes_first(ranks):
        again = looked_up if ranks.first else find_captions(fixed, tokenizer, model_folder, text_place, store)
        texts = encode_captions(again, text_encoder, tokenizer, store)
    if not config.tokens:
        text_encoder = None
    models.release_memory()
    with first_goes_first(ranks):
        cached = cache_examples([*dataset.examples, *held_out.examples], model_folder, place, store)
    examples = cached[: len(dataset.examples)]
    if ranks.first:
        store.trim()
    log.info("%d pictures and %d captions are ready", len(cached), len(texts) - 1)
    encoded = time.monotonic()

    shards = ranks.count if plan.sharded else 1
    transformer = models.load_transformer(model_folder, place, timesteps, config.quantization, shards)
    lora = attach_trainable_lora(transformer, config.lora_targets, config.rank, generator_for(config.seed, "lora"))
    log.info("LoRA of rank %d: %.1f million weights", config.rank, sum(p.numel() for p in lora) / 1e6)
    row_rate = 0.0 if text_encoder is None else fresh_token.learning_rate(config, tokenizer, text_encoder)
    optimizers = new_optimizers(config, lora, placeholders.rows, row_rate)
    first_rows = tuple(row.detach().clone() for row in placeholders.rows)
    base = key_of(**{part: fingerprint(model_folder / part) for part in ("transformer", "text_encoder", "vae")})
    run = Run(
        config, place, schedule, transformer, lora, examples, texts, placeholders, text_encoder, tokenizer, optimizers,
        first_rows, dataset.captions, preserved, ranks, base, compiled=plan.compiled,
        held_out=cached[len(dataset.examples) :],
    )  # fmt: skip
    describing = {"describe": described - began} if config.autocaption else {}
    run.seconds = {**describing, "load": loaded - described + time.monotonic() - encoded, "cache": encoded - loaded}
    return run


def _captioned(
    config: TrainConfig, dataset: Dataset, model_folder: Path, tokenizer: Qwen2Tokenizer, place: models.Place,
    ranks: Ranks,
) -> Dataset:  # fmt: skip
    """With captions for all pictures, if they are to be written; checked, whoever wrote them."""
    refuse(caption_problems(dataset, config, tokenizer))
    if not (config.autocaption and dataset.uncaptioned):
        return dataset
    if ranks.first:
        dataset = write_captions(dataset, config, model_folder, tokenizer, place)
    captions = agree(ranks, dataset.captions)  # not the dataset: each process has unpacked files of its own
    dataset = dataset.with_captions(dict(zip(dataset.captions_by_picture, captions, strict=True)))
    refuse(caption_problems(dataset, config, tokenizer))
    return dataset


def _fixed_texts(config: TrainConfig, captions: Sequence[str], samples: Sequence[SampleRequest]) -> list[str]:
    """Those that hold no token: what the text encoder makes of them never changes."""
    prompts = [text for request in samples for text in (request.prompt, request.negative_prompt)]
    return [text for text in (*captions, *prompts, EMPTY_CAPTION) if not any(token in text for token in config.tokens)]


def _held_out(config: TrainConfig, dataset: Dataset, tokenizer: Qwen2Tokenizer) -> tuple[Dataset, Dataset]:
    """What is learned from, and what is measured on; the first still has to hold every token."""
    learned_from, held_out = dataset.held_out(config.validation_share)
    if held_out.examples:
        names = first_of([path.name for path in held_out.captions_by_picture])
        log.info("held out to measure on: %d pictures, %s", held_out.num_images, names)
        refuse(caption_problems(learned_from, config, tokenizer))
    return learned_from, held_out


def make_plan(
    config: TrainConfig, dataset: Dataset, model_folder: Path, tokenizer: Qwen2Tokenizer, place: models.Place,
    timesteps: Tensor | None, ranks: Ranks, shard_base: str,
) -> plans.Plan:  # fmt: skip
    """The run's switches, and what is said of them."""
    image_tokens = max(example.size.tokens for example in dataset.examples)
    shown = [*dataset.captions, *(preserved_caption(caption, config) for caption in dataset.captions)]
    text_tokens = max(len(models.prompt_ids(tokenizer, caption, no_placeholders())) for caption in dict.fromkeys(shown))
    tokens = config.batch_size * (image_tokens + text_tokens)
    demand = plans.demand_of(config, model_folder, place.device, place.dtype, tokens, timesteps, ranks)
    seconds = plans.compiled_seconds(config, model_folder, place.device, image_tokens, text_tokens)
    plan = plans.choose(config.quantization, demand, bool(config.tokens), seconds, shard_base)
    for line in plans.describe(plan, config.quantization, demand):
        log.info(line)
    return plan


def shown_timesteps(
    config: TrainConfig, examples: Sequence[Sized], schedule: flow.Schedule, dtype: torch.dtype,
    ranks: Ranks = ALONE, samples: Sequence[SampleRequest] = (),
) -> Tensor:  # fmt: skip
    """The run's own timesteps, the probe's, and those of validation and samples, [S]."""
    sigmas = [PROBE_SIGMA, *(VALIDATION_SIGMAS if config.validation_share else ())]
    for request in samples:
        tokens = picture_size(request.width, request.height, request.aspect_ratio).tokens
        sigmas += schedule.sampling_sigmas(request.steps, tokens)[:-1]
    own = run_timesteps(config, examples, schedule, dtype, ranks.count)
    return torch.cat([own, flow.model_time(torch.tensor(sigmas), dtype)]).unique()


def learned(run: Run) -> LoraFile:
    """The LoRA with the rows of its tokens as they are now, or the average of them, on the CPU."""
    with run.optimizers.averaged():
        rows = {
            token: row.detach().float().cpu().clone().view(1, -1)
            for token, row in zip(run.placeholders.tokens, run.placeholders.rows, strict=True)
        }
        return LoraFile(trained_lora(run.transformer), rows)


def read_start(path: Path, config: TrainConfig) -> LoraFile:
    """A LoRA of any layout to go on learning from, before a model is there.

    Raises UserError where its rank or tokens aren't the run's, with what to set.
    """
    with tempfile.TemporaryDirectory() as folder:
        lora_path, _ = unpack_weights(path, Path(folder))
        lora = read_lora_file(lora_path, path.name)
    if others := sorted({layer.rank for layer in lora.layers.values()} - {config.rank}):
        raise UserError(
            f"init_weights {path.name} is of rank {others[-1]}, and rank is {config.rank}; set rank={others[-1]}."
        )
    if unused := [token for token in lora.rows if token not in config.tokens]:
        raise UserError(
            f"init_weights {path.name} has learned {', '.join(unused)}; set train_placeholder_token and name them in "
            "placeholder_token, or their rows would be lost."
        )
    return lora


def start_from(run: Run, lora: LoraFile) -> None:
    """Let a run go on learning from this LoRA and the rows of its tokens. Raises UserError for another model's."""
    set_trainable_lora(run.transformer, lora.layers)
    for token, row in zip(run.placeholders.tokens, run.placeholders.rows, strict=True):
        if token in lora.rows:
            if lora.rows[token].numel() != row.numel():
                raise UserError(f"the row of {token} in init_weights is of another width than the model's.")
            with torch.no_grad():
                row.copy_(lora.rows[token].view(-1))
    run.first_rows = tuple(row.detach().clone() for row in run.placeholders.rows)
    run.started_from = lora.sha256
    log.info("going on from init_weights: %d layers, %d rows", len(lora.layers), len(lora.rows))
