"""Cog's training entry point: a zip of pictures -> weights.zip. Cog reads the signature without importing it."""

from pathlib import Path as LocalPath
from typing import Any, Optional, cast

from cog import BaseModel, Input, Path, current_scope

from lora_utils import cards, session
from lora_utils.config import RunOptions, TrainConfig
from lora_utils.console import log_to_stdout, unexpected_errors_printed


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
    autocaption: bool = Input(
        default=False,
        description="Let the text encoder, a vision-language model, describe the pictures that have no caption.",
    ),
    autocaption_prefix: str = Input(
        default="", description="Put in front of each caption that autocaption writes, like 'a photo of <zwx>, '."
    ),
    autocaption_suffix: str = Input(default="", description="Put behind each caption that autocaption writes."),
    mask_from: str = Input(
        default="none",
        choices=["none", "file", "alpha"],
        description="Where pictures are learned in full: white in NAME.mask.png beside them (file), or opaque in themselves (alpha). none: everywhere.",
    ),
    mask_floor: float = Input(
        default=0.1, ge=0, le=1, description="What the loss counts outside a mask; inside it counts 1."
    ),
    class_word: str = Input(
        default="",
        description="What the token or trigger word is one of, like 'person'. The LoRA is held to what the base model makes of that word, so that others of its kind stay as they are.",
    ),
    preservation_weight: float = Input(
        default=0.25, ge=0, le=0.9, description="Share of the micro-batches that hold the class instead of teaching."
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
    run_dir: str = Input(
        default="",
        description="A folder of the machine that trains, for checkpoints. Empty: nothing is kept on the way.",
    ),
    save_every: int = Input(
        default=0, ge=0, le=20000, description="Steps from one checkpoint in run_dir to the next. 0: none."
    ),
    keep_checkpoints: int = Input(
        default=2, ge=1, le=1000, description="Checkpoints that are kept; older ones are removed."
    ),
    resume: str = Input(
        default="never",
        choices=["never", "auto"],
        description="auto: go on from the last checkpoint in run_dir, if there is one. The result is that of a run that was never stopped.",
    ),
    init_weights: Optional[Path] = Input(
        default=None,
        description="A weights.zip or LoRA to go on learning from, of the same rank and layers. Its token's row goes on too.",
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
        options = RunOptions(run_dir, save_every, keep_checkpoints, resume)
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
            autocaption=autocaption,
            autocaption_prefix=autocaption_prefix,
            autocaption_suffix=autocaption_suffix,
            mask_from=mask_from,
            mask_floor=mask_floor,
            class_word=class_word,
            preservation_weight=preservation_weight,
            caption_dropout=caption_dropout,
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
            seed=session.seed_for(options) if seed is None or seed == -1 else seed,
        )
        init = LocalPath(str(init_weights)) if init_weights else None
        train_it = session.run_on_all_cards if cards.several() > 1 else session.run
        weights_path = train_it(config, options, LocalPath(str(dataset)), session.output_path(), init)
        cast(Any, current_scope()).record_metric("training_step_count", config.steps)
        return TrainingOutput(weights=Path(weights_path))  # pyright: ignore[reportCallIssue] (cog makes the constructor)
