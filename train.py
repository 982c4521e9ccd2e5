"""Cog's training entry point: a zip of pictures -> weights.zip. Cog reads the signature without importing it."""

from pathlib import Path as LocalPath
from typing import Any, Optional, cast

from cog import BaseModel, Input, Path, Secret, current_scope

from lora_utils import cards, session
from lora_utils.config import RunOptions, TrainConfig
from lora_utils.console import log_to_stdout, unexpected_errors_printed
from lora_utils.recipes import recipe_for


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
    goal: str = Input(
        default="none",
        choices=["none", "person", "object", "style"],
        description="What is taught: it chooses the rank, steps, learning_rate and lora_targets that you leave empty, and the log says how.",
    ),
    rank: Optional[int] = Input(
        default=None, ge=1, le=256, description="Rank of the LoRA; alpha equals it. Empty: the goal's, 32 without one."
    ),
    steps: Optional[int] = Input(
        default=None, ge=1, le=20000, description="Optimizer steps. Empty: the goal's, 1000 without one."
    ),
    learning_rate: Optional[float] = Input(
        default=None,
        ge=1e-7,
        le=1,
        description="Learning rate of the LoRA. Empty: the goal's, 1e-4 without one; 1 for prodigy, which multiplies the rate it finds.",
    ),
    batch_size: int = Input(default=1, ge=1, le=16, description="Pictures per micro-batch."),
    gradient_accumulation: int = Input(default=1, ge=1, le=64, description="Micro-batches per optimizer step."),
    resolution: str = Input(
        default="512,768,1024",
        description="Training resolutions in pixels, multiples of 16, separated by commas. Pictures keep their aspect ratio.",
    ),
    lora_targets: Optional[str] = Input(
        default=None,
        choices=["attention", "attention_mlp"],
        description="Which layers the LoRA adapts: attention alone, or the MLPs too (2.3 times as large). Empty: the goal's, attention without one.",
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
    optimizer: str = Input(
        default="adamw",
        choices=["adamw", "adamw8bit", "prodigy", "adafactor"],
        description="Of the LoRA. adamw8bit and adafactor keep less memory, prodigy finds its own rate. A token's row always has its own adamw.",
    ),
    weight_decay: float = Input(default=1e-4, ge=0, le=1, description="Of the LoRA; a token's row has none."),
    beta1: float = Input(default=0.9, ge=0, le=0.999, description="Adam's first beta; adafactor has none."),
    beta2: float = Input(default=0.999, ge=0, le=0.9999, description="Adam's second beta; adafactor has none."),
    max_grad_norm: float = Input(
        default=1.0,
        ge=0,
        le=1000,
        description="Gradients are clipped to this norm, the LoRA's and each token's by itself. 0: they aren't.",
    ),
    ema_decay: float = Input(
        default=0.0,
        ge=0,
        le=0.9999,
        description="Return the moving average of the weights with this decay, like 0.99, in place of the last step's. 0: the last step's.",
    ),
    lr_scheduler: str = Input(
        default="constant",
        choices=["constant", "cosine", "linear"],
        description="What the learning rates do after the warm-up.",
    ),
    warmup_steps: int = Input(
        default=0, ge=0, le=20000, description="Steps over which the learning rates rise from 0."
    ),
    validation_share: float = Input(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the pictures that are held out, to measure a loss on that can be compared between runs.",
    ),
    run_dir: str = Input(
        default="",
        description="A folder of the machine that trains, for checkpoints, samples, curves and report.html. Empty: nothing is kept on the way.",
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
    sample_prompts: str = Input(
        default="",
        description="Prompts, a line each or separated by |, that are drawn on the way into run_dir, with the token and without it.",
    ),
    sample_every: int = Input(
        default=0,
        ge=0,
        le=20000,
        description="Steps from one drawing of sample_prompts to the next. 0: before the first and after the last alone.",
    ),
    sample_steps: int = Input(default=20, ge=1, le=100, description="Denoising steps of a sample."),
    shard_base: str = Input(
        default="auto",
        choices=["auto", "never", "always"],
        description="Share the frozen transformer out over several cards, each of which then holds a part. auto: where it doesn't fit on one.",
    ),
    hub_repo: str = Input(
        default="",
        description="owner/name on the Hugging Face hub that the weights and a model card are pushed to. Needs hub_token.",
    ),
    hub_private: bool = Input(default=True, description="Make that repository a private one, if it is new."),
    hub_token: Optional[Secret] = Input(
        default=None, description="Token of the hub that may write there. It is neither kept nor logged."
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
        options = RunOptions(
            run_dir=run_dir,
            save_every=save_every,
            keep_checkpoints=keep_checkpoints,
            resume=resume,
            sample_prompts=sample_prompts,
            sample_every=sample_every,
            sample_steps=sample_steps,
            shard_base=shard_base,
            hub_repo=hub_repo,
            hub_private=hub_private,
        )
        recipe = recipe_for(goal, optimizer, steps, learning_rate, rank, lora_targets)
        config = TrainConfig(
            goal=goal,
            train_placeholder_token=train_placeholder_token,
            placeholder_token=placeholder_token,
            placeholder_init_std=placeholder_init_std,
            placeholder_learning_rate=placeholder_learning_rate,
            rank=recipe.rank,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            resolution=resolution,
            lora_targets=recipe.lora_targets,
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
            optimizer=optimizer,
            weight_decay=weight_decay,
            beta1=beta1,
            beta2=beta2,
            max_grad_norm=max_grad_norm,
            ema_decay=ema_decay,
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
            validation_share=validation_share,
            seed=session.seed_for(options) if seed is None or seed == -1 else seed,
        )
        init = LocalPath(str(init_weights)) if init_weights else None
        train_it = session.run_on_all_cards if cards.several() > 1 else session.run
        token = hub_token.get_secret_value() if hub_token else None
        weights_path = train_it(config, options, LocalPath(str(dataset)), session.output_path(), init, hub_token=token)
        cast(Any, current_scope()).record_metric("training_step_count", config.steps)
        return TrainingOutput(weights=Path(weights_path))  # pyright: ignore[reportCallIssue] (cog makes the constructor)
