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
from lora_utils.adapters import attach_trainable_lora, set_trainable_lora
from lora_utils.autocaption import write_captions
from lora_utils.bundle import unpack_weights
from lora_utils.caching import CachedExample, cache_examples, encode_captions, find_captions
from lora_utils.captions import preserved_caption
from lora_utils.cards import Ranks, agree, first_goes_first
from lora_utils.config import TrainConfig
from lora_utils.dataset import Dataset, refuse
from lora_utils.draws import EMPTY_CAPTION, MicroBatches, Sized, generator_for, run_timesteps
from lora_utils.errors import UserError
from lora_utils.lora_file import read_lora_file
from lora_utils.placeholder import Placeholders, no_placeholders
from lora_utils.preflight import caption_problems
from lora_utils.store import open_store

log = logging.getLogger(__name__)

ALONE = Ranks()

WEIGHT_DECAY = 1e-4  # of the LoRA; the row has none
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
    optimizer: torch.optim.Optimizer
    first_rows: tuple[Tensor, ...]  # as they were drawn
    captions: list[str] = field(default_factory=list)  # one a picture
    preserved: dict[str, str] = field(default_factory=dict)  # captions with the class word in place of what is taught
    ranks: Ranks = ALONE
    step: int = 0  # optimizer steps taken
    resumed_at: int = 0  # of these, the ones that an earlier process took
    stream: MicroBatches | None = None  # what is drawn, once it has begun
    recomputed: int = 0  # blocks that recompute their activations in the backward pass
    compiled: bool = False  # the blocks' arithmetic
    flops: float = 0.0  # done so far
    seconds: dict[str, float] = field(default_factory=dict)  # where the time went


def prepare(
    config: TrainConfig, dataset: Dataset, model_folder: Path, place: models.Place, any_timestep: bool = False,
    ranks: Ranks = ALONE,
) -> Run:  # fmt: skip
    """Encode what is fixed, free what is done with, then load the transformer and attach the LoRA.

    `any_timestep`: the caller will show the transformer others than the run's own, so a table won't do.
    """
    models.release_memory()  # of a run that was cancelled
    memory.forget_peak(place.device)
    began = time.monotonic()
    tokenizer, schedule = models.load_tokenizer(model_folder), models.load_schedule(model_folder)
    dataset = _captioned(config, dataset, model_folder, tokenizer, place, ranks)
    described = time.monotonic()
    captions = {caption: preserved_caption(caption, config) for caption in dataset.captions}
    preserved = {caption: held for caption, held in captions.items() if held != caption}
    timesteps = None if any_timestep else shown_timesteps(config, dataset.examples, schedule, place.dtype, ranks)
    plan = make_plan(config, dataset, model_folder, tokenizer, place, timesteps)
    config = replace(config, quantization=plan.quantization)
    text_place = place if plan.text_encoder_on_card else replace(place, device=torch.device("cpu"))
    store = open_store()
    fixed = [caption for caption in (*captions, *preserved.values()) if not any(t in caption for t in config.tokens)]
    fixed_and_empty = [*fixed, EMPTY_CAPTION]
    looked_up = find_captions(fixed_and_empty, tokenizer, model_folder, text_place, store)
    text_encoder: Qwen2_5_VLTextModel | None = None
    if config.tokens or looked_up.new:
        text_encoder = models.load_text_encoder(model_folder, text_place)
    loaded = time.monotonic()
    placeholders = no_placeholders()
    if config.tokens and text_encoder is not None:
        rows = generator_for(config.seed, "row")
        placeholders = fresh_token.new_placeholders(config, tokenizer, text_encoder, rows)
    with first_goes_first(ranks):
        again = looked_up if ranks.first else find_captions(fixed_and_empty, tokenizer, model_folder, text_place, store)
        texts = encode_captions(again, text_encoder, tokenizer, store)
    if not config.tokens:
        text_encoder = None
    models.release_memory()
    with first_goes_first(ranks):
        examples = cache_examples(dataset.examples, model_folder, place, store)
    if ranks.first:
        store.trim()
    log.info("%d pictures and %d captions are ready", len(examples), len(texts) - 1)
    cached = time.monotonic()

    transformer = models.load_transformer(model_folder, place, timesteps, config.quantization)
    lora = attach_trainable_lora(transformer, config.lora_targets, config.rank, generator_for(config.seed, "lora"))
    log.info("LoRA of rank %d: %.1f million weights", config.rank, sum(p.numel() for p in lora) / 1e6)
    row_rate = 0.0 if text_encoder is None else fresh_token.learning_rate(config, tokenizer, text_encoder)
    optimizer = new_optimizer(config, lora, placeholders, row_rate)
    first_rows = tuple(row.detach().clone() for row in placeholders.rows)
    run = Run(
        config, place, schedule, transformer, lora, examples, texts, placeholders, text_encoder, tokenizer, optimizer,
        first_rows, dataset.captions, preserved, ranks, compiled=plan.compiled,
    )  # fmt: skip
    describing = {"describe": described - began} if config.autocaption else {}
    run.seconds = {**describing, "load": loaded - described + time.monotonic() - cached, "cache": cached - loaded}
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


def make_plan(
    config: TrainConfig, dataset: Dataset, model_folder: Path, tokenizer: Qwen2Tokenizer, place: models.Place,
    timesteps: Tensor | None,
) -> plans.Plan:  # fmt: skip
    """The run's switches, and what is said of them."""
    image_tokens = max(example.size.tokens for example in dataset.examples)
    shown = [*dataset.captions, *(preserved_caption(caption, config) for caption in dataset.captions)]
    text_tokens = max(len(models.prompt_ids(tokenizer, caption, no_placeholders())) for caption in dict.fromkeys(shown))
    tokens = config.batch_size * (image_tokens + text_tokens)
    demand = plans.demand_of(config, model_folder, place.device, place.dtype, tokens, timesteps)
    seconds = plans.estimated_seconds(config, model_folder, place.device, place.dtype, image_tokens, text_tokens)
    plan = plans.choose(config.quantization, demand, live_text=bool(config.tokens), run_s=seconds)
    for line in plans.describe(plan, config.quantization, demand):
        log.info(line)
    return plan


def shown_timesteps(
    config: TrainConfig, examples: Sequence[Sized], schedule: flow.Schedule, dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Tensor:  # fmt: skip
    """The run's own timesteps and the probe's, [S]."""
    probe = flow.model_time(torch.tensor([PROBE_SIGMA]), dtype)
    return torch.cat([run_timesteps(config, examples, schedule, dtype, ranks.count), probe]).unique()


def new_optimizer(
    config: TrainConfig, lora: list[nn.Parameter], placeholders: Placeholders, row_rate: float
) -> torch.optim.Optimizer:
    """Fused AdamW; the rows are a group of their own, with their own rate and without weight decay."""
    groups = [{"params": lora, "lr": config.learning_rate, "weight_decay": WEIGHT_DECAY}]
    if rows := [row for row in placeholders.rows if row.requires_grad]:
        groups.append({"params": rows, "lr": row_rate, "weight_decay": 0.0})
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, fused=True)


def start_from(run: Run, path: Path) -> None:
    """Let a run go on learning from a LoRA of any layout, and from the rows of its tokens.

    Raises UserError where layers, ranks or tokens don't fit, with what to set.
    """
    with tempfile.TemporaryDirectory() as folder:
        lora_path, _ = unpack_weights(path, Path(folder))
        lora = read_lora_file(lora_path, path.name)
    if unused := [token for token in lora.rows if token not in run.placeholders.tokens]:
        raise UserError(
            f"init_weights {path.name} has learned {', '.join(unused)}; set train_placeholder_token and name them in "
            "placeholder_token, or their rows would be lost."
        )
    set_trainable_lora(run.transformer, lora.layers)
    for token, row in zip(run.placeholders.tokens, run.placeholders.rows, strict=True):
        if token in lora.rows:
            if lora.rows[token].numel() != row.numel():
                raise UserError(f"init_weights {path.name}: the row of {token} is of another width than the model's.")
            with torch.no_grad():
                row.copy_(lora.rows[token].view(-1))
    run.first_rows = tuple(row.detach().clone() for row in run.placeholders.rows)
    log.info("going on from %s: %d layers, %d rows", path.name, len(lora.layers), len(lora.rows))
