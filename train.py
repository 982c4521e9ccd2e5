"""Cog's training entry point: a zip of pictures -> weights.zip. Cog reads the signature without importing it."""

import os
import shutil
import tempfile
import time
from pathlib import Path as LocalPath
from typing import Any, Optional, cast

import torch
from cog import BaseModel, Input, Path, current_scope

from lora_utils import dataset as datasets
from lora_utils import fetch, models, preparation, training, weights
from lora_utils.archive import unpack
from lora_utils.config import TrainConfig, random_seed
from lora_utils.console import Progress, log_to_stdout, unexpected_errors_printed


class TrainingOutput(BaseModel):
    weights: Path  # the hosted trainer looks for this name


def train(
    dataset: Path = Input(
        description="A zip or tar of pictures (jpg, png, webp, bmp, gif, tiff, avif, heic) with captions in NAME.txt beside them or in metadata.jsonl, metadata.csv or captions.json."
    ),
    train_placeholder_token: bool = Input(
        default=False,
        description="Train a fresh token without any prior meaning along with the LoRA. Off: every placeholder input is ignored.",
    ),
    placeholder_token: str = Input(
        default="<zwx>",
        description="The fresh token's name, as your captions and prompts write it; several are separated by commas.",
    ),
    placeholder_init_std: float = Input(
        default=1e-5,
        ge=0,
        le=0.1,
        description="Standard deviation of the fresh token's first embedding: near zero is no prior.",
    ),
    placeholder_learning_rate: Optional[float] = Input(
        default=None,
        ge=0,
        le=1,
        description="Learning rate of the token's embedding. Empty: 3.3 % of a usual embedding's size (5e-4 for Qwen-Image). 0: it stays as drawn.",
    ),
    rank: int = Input(default=32, ge=1, le=256, description="Rank of the LoRA; alpha equals it."),
    steps: int = Input(default=1000, ge=1, le=20000, description="Optimizer steps."),
    learning_rate: float = Input(default=1e-4, ge=1e-7, le=1, description="Learning rate of the LoRA."),
    batch_size: int = Input(default=1, ge=1, le=16, description="Pictures per micro-batch."),
    gradient_accumulation: int = Input(default=1, ge=1, le=64, description="Micro-batches per optimizer step."),
    resolution: str = Input(
        default="512,768,1024",
        description="Training resolutions in pixels, multiples of 16, separated by commas. Pictures keep their aspect ratio.",
    ),
    lora_targets: str = Input(
        default="attention",
        choices=["attention", "attention_mlp"],
        description="Which layers the LoRA adapts: attention alone, or the MLPs too (2.3 times as large).",
    ),
    quantization: str = Input(
        default="auto",
        choices=["auto", "none", "fp8", "int8", "nf4"],
        description="How the frozen model's weights are stored. auto: as they are where the card has room, else in 8 bits, else in 4.",
    ),
    default_caption: str = Input(default="", description="Caption of pictures that have none of their own."),
    trigger_word: str = Input(
        default="",
        description="A word put in front of each caption that lacks it, and in the place of [trigger]. Without it [trigger] is the placeholder token.",
    ),
    caption_dropout: float = Input(
        default=0.05, ge=0, le=1, description="Share of the steps that train without the caption."
    ),
    lr_scheduler: str = Input(
        default="constant",
        choices=["constant", "cosine", "linear"],
        description="What the learning rates do after the warm-up.",
    ),
    warmup_steps: int = Input(
        default=0, ge=0, le=20000, description="Steps over which the learning rates rise from 0."
    ),
    seed: Optional[int] = Input(
        default=None,
        ge=-1,
        le=4294967295,
        description="The same seed gives the same weights. Empty or -1: random, and reported.",
    ),
) -> TrainingOutput:
    """Fine-tune a LoRA of Qwen-Image."""
    log_to_stdout()
    with unexpected_errors_printed():
        config = TrainConfig(
            train_placeholder_token=train_placeholder_token,
            placeholder_token=placeholder_token,
            placeholder_init_std=placeholder_init_std,
            placeholder_learning_rate=placeholder_learning_rate,
            rank=rank,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            resolution=resolution,
            lora_targets=lora_targets,
            quantization=quantization,
            default_caption=default_caption,
            trigger_word=trigger_word,
            caption_dropout=caption_dropout,
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
            seed=random_seed() if seed is None or seed == -1 else seed,
        )
        weights_path = run_training(config, LocalPath(str(dataset)))
        return TrainingOutput(weights=Path(weights_path))  # pyright: ignore[reportCallIssue] (cog makes the constructor)


def output_path() -> LocalPath:
    """A fresh file per run in a folder per process: the server sends it on, the next run replaces it."""
    folder = LocalPath(tempfile.gettempdir()) / f"qwen-image-lora-train-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder / "weights.zip"


def run_training(config: TrainConfig, archive: LocalPath) -> LocalPath:
    """Unpack, train, write weights.zip; the unpacked pictures are removed whatever happens."""
    print(f"seed {config.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as folder:
        unpack(archive, LocalPath(folder))
        found = datasets.read_dataset(
            LocalPath(folder), config.resolutions_px, config.default_caption, config.trigger_word, config.tokens
        )
        passes = config.steps * config.batch_size * config.gradient_accumulation / found.num_images
        for line in datasets.describe(found, passes):
            print(line, flush=True)
        base_model = fetch.base_model_name()
        run = preparation.prepare(config, found, fetch.fetch_model(base_model), models.default_place())
    loss = consume(run)
    target, began = output_path(), time.monotonic()
    placeholders = training.describe_placeholders(run, found.captions)
    weights.save_weights(target, training.finish(run), run.config, base_model, found.num_images, loss, placeholders)
    run.seconds["save"] = time.monotonic() - began
    for line in training.describe_speed(run):
        print(line, flush=True)
    print(f"wrote weights.zip, {target.stat().st_size / 1e6:.1f} MB", flush=True)
    return target


def consume(run: preparation.Run) -> float:
    """Step through the run and print its progress. -> the mean loss over the last tenth of the steps."""
    config, progress, losses, printed = run.config, Progress(run.config.steps), [], 0
    for report in training.train(run):
        losses.append(report.losses)  # numbers are read, and the device waited for, only where a line is printed
        if progress.is_due(report.step):
            mean = float(torch.cat(losses[printed:]).mean())
            line = f"step {report.step}/{config.steps} loss {mean:.4f} lr {report.learning_rate:.1e}"
            print(f"{line} grad {float(report.grad_norm):.2f} {progress.pace(report.step)}", flush=True)
            for token, row in training.report_rows(run).items():
                near = f"nearest {row.nearest!r} (cosine {row.cosine:.2f})"
                grad = f"grad {float(report.row_grad_norms.get(token, 0)):.2g}"
                print(
                    f"  {token} norm {row.norm:.4f}, {row.share_of_median:.1%} of a word's, {grad}, {near}", flush=True
                )
            printed = len(losses)
    cast(Any, current_scope()).record_metric("training_step_count", config.steps)
    run.seconds["train"] = progress.elapsed_s() - run.seconds["probe"]
    return float(torch.cat(losses[-max(1, len(losses) // 10) :]).mean())
