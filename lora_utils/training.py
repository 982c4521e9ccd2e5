"""Training: examples -> a LoRA and, if asked for, the row of a placeholder token.

Owns the run and its loop; must not know Cog, archives or sampling. The loop yields; printing, saving and cancelling
belong to whoever consumes it.

Legend: B batch, N image tokens, C packed channels (64), T text tokens, D the text encoder's width, R rank.
"""

import hashlib
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils import flow, fresh_token, models, modulation
from lora_utils.adapters import attach_trainable_lora, trained_lora
from lora_utils.caching import CachedExample, encode_examples, encode_fixed_captions
from lora_utils.config import TrainConfig
from lora_utils.dataset import Dataset
from lora_utils.errors import UserError
from lora_utils.lora_file import LoraFile
from lora_utils.placeholder import Placeholders, RowReport

log = logging.getLogger(__name__)

EMPTY_CAPTION = " "  # what a dropped caption becomes: the sampler's default negative prompt
MAX_GRAD_NORM = 1.0  # for the LoRA and for the row, each by itself
WEIGHT_DECAY = 1e-4  # of the LoRA; the row has none


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step. `loss` is the mean of its micro-batches, gradient norms are before clipping."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    row_grad_norms: dict[str, float] = field(default_factory=dict)  # of the tokens that the step's captions held


@dataclass(slots=True)
class Run:
    """A training run, ready to step: made by `prepare`, advanced by `train`, read by `finish`."""

    config: TrainConfig
    place: models.Place
    schedule: flow.Schedule
    transformer: QwenImageTransformer2DModel
    lora: list[nn.Parameter]
    examples: list[CachedExample]
    texts: dict[str, Tensor]  # [T, D] each; captions with the token are missing, they are encoded at every step
    placeholders: Placeholders
    text_encoder: Qwen2_5_VLTextModel | None  # kept only while a row is trained
    tokenizer: Qwen2Tokenizer
    optimizer: torch.optim.Optimizer
    first_rows: tuple[Tensor, ...]  # as they were drawn


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, so that one more draw here doesn't shift what is drawn there."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# --- preparing ------------------------------------------------------------------------------------------------------


def prepare(
    config: TrainConfig, dataset: Dataset, model_folder: Path, place: models.Place, any_timestep: bool = False
) -> Run:
    """Encode what is fixed, free what is done with, then load the transformer and attach the LoRA.

    `any_timestep`: the caller will show the transformer others than the run's own, so a table won't do.
    """
    models.release_memory()  # of a run that was cancelled
    tokenizer, schedule = models.load_tokenizer(model_folder), models.load_schedule(model_folder)
    text_encoder: Qwen2_5_VLTextModel | None = models.load_text_encoder(model_folder, place)
    placeholders = fresh_token.new_placeholders(config, tokenizer, text_encoder, generator_for(config.seed, "row"))
    if config.tokens:
        fresh_token.check_captions(dataset.captions, tokenizer, placeholders)
    for caption in dict.fromkeys(dataset.captions):
        if warning := models.length_warning(tokenizer, caption, placeholders):
            log.warning("caption %s", warning)
    fixed = [caption for caption in dataset.captions if not placeholders.used_in([caption]).tokens]
    texts = encode_fixed_captions(text_encoder, tokenizer, [*fixed, EMPTY_CAPTION])
    if not config.tokens:
        text_encoder = None
    models.release_memory()
    vae = models.load_vae(model_folder, place)
    examples = encode_examples(vae, dataset.examples)
    log.info("encoded %d pictures and %d captions", len(examples), len(texts) - 1)
    del vae
    models.release_memory()

    timesteps = None if any_timestep else run_timesteps(config, examples, schedule, place.dtype)
    transformer = models.load_transformer(model_folder, place, timesteps)
    if timesteps is not None and modulation.has_table(transformer):
        log.info("a table of %d timesteps stands in for the modulations", len(timesteps))
    lora = attach_trainable_lora(transformer, config.lora_targets, config.rank, generator_for(config.seed, "lora"))
    log.info("LoRA of rank %d: %.1f million weights", config.rank, sum(p.numel() for p in lora) / 1e6)
    largest = max(example.size.tokens for example in examples)
    if models.plan_checkpointing(transformer, place, largest, config.batch_size):
        log.info("gradient checkpointing is on: the activations of %d tokens wouldn't fit", largest)
    row_rate = 0.0 if text_encoder is None else fresh_token.learning_rate(config, tokenizer, text_encoder)
    optimizer = new_optimizer(config, lora, placeholders, row_rate)
    first_rows = tuple(row.detach().clone() for row in placeholders.rows)
    return Run(
        config, place, schedule, transformer, lora, examples, texts, placeholders, text_encoder, tokenizer, optimizer,
        first_rows,
    )  # fmt: skip


def new_optimizer(
    config: TrainConfig, lora: list[nn.Parameter], placeholders: Placeholders, row_rate: float
) -> torch.optim.Optimizer:
    """AdamW; the rows are a group of their own, with their own rate and without weight decay."""
    groups = [{"params": lora, "lr": config.learning_rate, "weight_decay": WEIGHT_DECAY}]
    if rows := [row for row in placeholders.rows if row.requires_grad]:
        groups.append({"params": rows, "lr": row_rate, "weight_decay": 0.0})
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups)


# --- the loop -------------------------------------------------------------------------------------------------------


def rate_factor(step: int, config: TrainConfig) -> float:
    """What the learning rates are multiplied by at optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_scheduler == "linear" else 1.0


def batches(examples: Sequence[CachedExample], batch_size: int, seed: int) -> Iterator[list[CachedExample]]:
    """Endless batches, each of one bucket. An epoch shows every example once; the last of a bucket may be short."""
    rng = random.Random(seed)
    by_size = [list(group) for _, group in groupby(sorted(examples, key=lambda e: e.size), key=lambda e: e.size)]
    while True:
        epoch = []
        for group in by_size:
            rng.shuffle(group)
            epoch += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
        rng.shuffle(epoch)
        yield from epoch


def run_timesteps(
    config: TrainConfig, examples: Sequence[CachedExample], schedule: flow.Schedule, dtype: torch.dtype
) -> Tensor:
    """Every timestep [S] that the run will show the transformer, drawn beforehand just as the loop will draw them."""
    stream, generator = batches(examples, config.batch_size, config.seed), generator_for(config.seed, "sigma")
    drawn = []
    for _ in range(config.steps * config.gradient_accumulation):
        batch = next(stream)
        drawn.append(flow.draw_sigmas(len(batch), schedule.mu(batch[0].size.tokens), generator))
    return flow.model_time(torch.cat(drawn), dtype).unique()


def batch_text(run: Run, captions: Sequence[str]) -> models.Text:
    """The captions' states: fixed ones from the cache, those with the token encoded under gradient."""
    live = [caption for caption in captions if caption not in run.texts]
    states = {caption: run.texts[caption].to(run.place.device) for caption in captions if caption in run.texts}
    if live and run.text_encoder is not None:
        used = run.placeholders.used_in(live)
        encoded = models.encode_text(run.text_encoder, run.tokenizer, live, used)
        if any(row.requires_grad for row in used.rows) and not encoded.states.requires_grad:
            raise RuntimeError(f"no gradient reaches {', '.join(used.tokens)}: the text encoder ran without grad mode")
        for index, caption in enumerate(live):
            length = len(encoded.states[index]) if encoded.mask is None else int(encoded.mask[index].sum())
            states[caption] = encoded.states[index, :length]
    return models.join_text([states[caption] for caption in captions])


@dataclass(frozen=True, slots=True)
class Streams:
    """The run's random draws during training."""

    noise: torch.Generator
    sigma: torch.Generator
    dropout: torch.Generator


def batch_loss(run: Run, batch: Sequence[CachedExample], streams: Streams, step: int = 1) -> Tensor:
    """Flow-matching loss of one micro-batch: the mean squared error of the velocity, in fp32."""
    clean = torch.stack([example.latents for example in batch])  # [B, N, C]
    noise = torch.randn(clean.shape, generator=streams.noise)
    sigma = flow.draw_sigmas(len(batch), run.schedule.mu(clean.shape[1]), streams.sigma)  # [B]
    dropped = torch.rand(len(batch), generator=streams.dropout) < run.config.caption_dropout
    captions = [EMPTY_CAPTION if drop else example.caption for drop, example in zip(dropped, batch, strict=True)]
    noisy = flow.add_noise(clean, noise, sigma).to(run.place.device, run.place.dtype)
    text = batch_text(run, captions)
    with run.place.autocast():
        velocity = models.predict_velocity(run.transformer, noisy, sigma, text, batch[0].size)
    loss = F.mse_loss(velocity.float(), flow.velocity_target(clean, noise).to(run.place.device))
    if not torch.isfinite(loss):
        names = ", ".join(example.image_name for example in batch)
        levels = ", ".join(f"{level:.3f}" for level in sigma.tolist())
        raise UserError(
            f"the loss is {loss.item()} at step {step} (pictures: {names}; sigma: {levels}); lower learning_rate."
        )
    return loss


def clip_and_step(run: Run, step: int) -> tuple[float, dict[str, float]]:
    """Clip the LoRA and each row apart, step, clear the gradients. -> their gradient norms before clipping.

    Apart, because a fresh row's first gradient is some 50 times the LoRA's and would stop it from learning. A row that
    isn't trained, or whose token no caption of the step held, has no gradient and isn't moved.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate_factor(step, run.config)
    lora_norm = float(nn.utils.clip_grad_norm_(run.lora, MAX_GRAD_NORM))
    row_norms = {}
    for token, row in zip(run.placeholders.tokens, run.placeholders.rows, strict=True):
        if row.grad is None:
            continue
        row_norms[token] = norm = float(nn.utils.clip_grad_norm_([row], MAX_GRAD_NORM))
        if norm == 0:
            raise RuntimeError(f"no gradient reaches the row of {token} at step {step + 1}")
        if not math.isfinite(norm):
            raise UserError(f"the gradient of {token} is {norm} at step {step + 1}; lower its rate.")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return lora_norm, row_norms


def train(run: Run) -> Iterator[StepReport]:
    """Step through the run, one report per optimizer step. The last states of the run are in `run`."""
    config = run.config
    stream = batches(run.examples, config.batch_size, config.seed)
    streams = Streams(*(generator_for(config.seed, purpose) for purpose in ("noise", "sigma", "dropout")))
    for step in range(config.steps):
        began, loss = time.monotonic(), 0.0
        for _ in range(config.gradient_accumulation):
            part = batch_loss(run, next(stream), streams, step + 1) / config.gradient_accumulation
            part.backward()
            loss += part.item()
        grad_norm, row_grad_norms = clip_and_step(run, step)
        rate = run.optimizer.param_groups[0]["lr"]
        yield StepReport(step + 1, loss, rate, grad_norm, time.monotonic() - began, row_grad_norms)


# --- the result -----------------------------------------------------------------------------------------------------


def finish(run: Run) -> LoraFile:
    """The trained LoRA with the rows of its tokens, on the CPU. Raises RuntimeError for a row that hasn't moved."""
    rows = {}
    for token, row, first in zip(run.placeholders.tokens, run.placeholders.rows, run.first_rows, strict=True):
        if row.requires_grad and torch.equal(row, first):
            raise RuntimeError(f"the row of {token} hasn't moved in {run.config.steps} steps")
        rows[token] = row.detach().float().cpu().view(1, -1)
    return LoraFile(trained_lora(run.transformer), rows)


def report_rows(run: Run) -> dict[str, RowReport]:
    """How each token's row stands among the words now; empty where none is trained."""
    if run.text_encoder is None:
        return {}
    return fresh_token.report(run.placeholders, run.tokenizer, run.text_encoder)


def describe_placeholders(run: Run, captions: Sequence[str]) -> list[dict[str, Any]]:
    """What meta.json says of each trained row; nothing in baseline mode."""
    if run.text_encoder is None:
        return []
    rate = run.optimizer.param_groups[-1]["initial_lr"] if len(run.optimizer.param_groups) > 1 else 0.0
    return [
        {
            **described,
            "init_std": run.config.placeholder_init_std,
            "learning_rate": rate,
            "captions_with_token": sum(described["token"] in caption for caption in captions),
        }
        for described in fresh_token.describe(run.placeholders, run.first_rows, run.tokenizer, run.text_encoder)
    ]
