"""Cog's training entry point: a zip of images -> weights.zip. Cog reads the signature without importing it."""

from typing import Any, Optional, cast

from cog import BaseModel, Input, Path, Secret, current_scope

from lora_utils.io.access import client_access
from lora_utils.io.libraries import import_libraries
from lora_utils.io.logging import logged_to_stdout

import_libraries()  # before anything else imports diffusers

from lora_utils.training import launch  # noqa: E402 (see above)


class TrainingOutput(BaseModel):
    """What a training returns."""

    weights: Path  # the hosted trainer looks for this name


def train(
    # inputs from lora_utils/config.py, written by scripts/cog_signatures.py
    dataset: Path = Input(accept=".zip,.tar,.tar.gz,.tgz,.tar.bz2,.tar.xz", description="A zip or tar of images (jpg, png, webp, bmp, gif, tiff, avif, heic) with captions in NAME.txt beside them or in metadata.jsonl, metadata.csv or captions.json."),
    train_placeholder_token: bool = Input(default=False, description="Train a new token without any meaning along with the LoRA. Off: the placeholder inputs are ignored."),
    trigger_word: str = Input(default="", description="A word put in front of each caption that lacks it, and in place of [trigger]. Empty: [trigger] is the placeholder token."),
    default_caption: str = Input(default="", description="Caption of images that have none of their own."),
    goal: str = Input(default="none", choices=["none", "person", "object", "style"], description="What is taught. It chooses the rank, steps, learning_rate and lora_targets that you leave empty."),
    steps: Optional[int] = Input(default=None, ge=1, le=20000, description="Optimizer steps. Empty: the goal's, 1000 without one."),
    rank: Optional[int] = Input(default=None, ge=1, le=256, description="Rank of the LoRA. Empty: the goal's, 16 without one."),
    learning_rate: Optional[float] = Input(default=None, ge=1e-07, le=1, description="Learning rate of the LoRA. Empty: the goal's, 5e-4 without one; twice that for muon; 1 for prodigy, which multiplies the rate it finds."),
    resolution: str = Input(default="512,768,1024", description="Training resolutions in pixels: multiples of 16, separated by commas. Images keep their aspect ratio."),
    batch_size: int = Input(default=1, ge=1, le=16, description="Images per batch."),
    seed: Optional[int] = Input(default=None, ge=-1, le=4294967295, description="The same seed gives the same weights. Empty or -1: random, and reported."),
    placeholder_token: str = Input(default="<zwx>", description="Name of the new token, as your captions and prompts write it. Several are separated by commas."),
    lora_targets: Optional[str] = Input(default=None, description="Layers that the LoRA adapts: attention, attention_mlp (2.3 times as large), or patterns like transformer_blocks.{20-39}.attn.*, separated by commas. Empty: the goal's, attention_mlp without one."),
    quantization: str = Input(default="auto", choices=["auto", "none", "fp8", "int8", "nf4"], description="How the frozen model's weights are stored. auto: exact where the GPU has room, else in 8 bits, else in 4."),
    gradient_accumulation: int = Input(default=1, ge=1, le=64, description="Batches per optimizer step."),
    autocaption: bool = Input(default=False, description="Let the text encoder, a vision-language model, describe the images that have no caption."),
    autocaption_prefix: str = Input(default="", description="Text in front of each caption that autocaption writes, like 'a photo of <zwx>, '."),
    autocaption_suffix: str = Input(default="", description="Text behind each caption that autocaption writes."),
    mask_from: str = Input(default="none", choices=["none", "file", "alpha"], description="Where images are learned in full: white in NAME.mask.png beside them (file), or opaque in themselves (alpha). none: everywhere."),
    mask_floor: float = Input(default=0.1, ge=0, le=1, description="Weight of the loss outside a mask; inside it is 1."),
    class_word: str = Input(default="", description="What the token or trigger word is one of, like 'person'. Training then holds that class to what the base model makes of it."),
    preserve_prompts: str = Input(default="", description="Prompts that training holds to what the base model makes of them, one a line or separated by |."),
    preservation_weight: float = Input(default=0.1, ge=0, le=0.9, description="Share of the batches that hold class_word and preserve_prompts (prior preservation), not teach."),
    uncaptioned: str = Input(default="train", choices=["train", "skip", "refuse"], description="Images without any caption: train them under an empty one, skip them, or refuse the dataset."),
    caption_variants: bool = Input(default=False, description="Each line of a caption is another caption of its image, of which one is taken at random each time."),
    caption_shuffle: Optional[int] = Input(default=None, ge=0, le=1000, description="Shuffle the tags of captions, which commas separate, each time, and keep the first so many in their place. Empty: no shuffling."),
    flip: str = Input(default="off", choices=["off", "on", "insist"], description="Show images mirrored half of the time. on refuses captions with left or right, insist takes them too."),
    control_resolution: str = Input(default="1024", description="Side in pixels of the square whose area images to edit are scaled to; auto: as the training resolution, which is faster. Only for a base model that edits."),
    caption_dropout: float = Input(default=0.05, ge=0, le=1, description="Share of the images that train without their caption."),
    validation_share: float = Input(default=0.0, ge=0, le=0.5, description="Share of the images held out, to measure a loss that can be compared between runs."),
    optimizer: str = Input(default="adamw", choices=["adamw", "adamw8bit", "prodigy", "adafactor", "muon"], description="Optimizer of the LoRA. adamw8bit and adafactor need less memory, prodigy finds its own rate, muon learned in fewer steps on the small model. The token always has its own adamw."),
    lr_scheduler: str = Input(default="constant", choices=["constant", "cosine", "linear"], description="What the learning rates do after the warm-up."),
    warmup_steps: int = Input(default=0, ge=0, le=20000, description="Steps over which the learning rates rise from 0."),
    run_dir: str = Input(default="", description="Folder on the machine that trains, for checkpoints, previews, curves and report.html. Empty: nothing is kept."),
    save_every: int = Input(default=0, ge=0, le=20000, description="Steps from one checkpoint in run_dir to the next. 0: none."),
    keep_checkpoints: int = Input(default=2, ge=1, le=1000, description="Checkpoints that are kept; older ones are removed."),
    keep_weights: int = Input(default=3, ge=0, le=1000, description="weights.zip files that are written beside the checkpoints and kept, to compare or to use. 0: none."),
    resume: str = Input(default="never", choices=["never", "auto"], description="auto: continue from the last checkpoint in run_dir, if there is one. The result is that of an uninterrupted run."),
    sample_prompts: str = Input(default="", description="Prompts of previews, one a line or separated by |. They are sampled into run_dir with the token and without it. A line may end in --size 768x512 --seed 5 --steps 30 --guidance 3 --scale 0.8 --negative blurry."),
    sample_every: int = Input(default=0, ge=0, le=20000, description="Steps from one set of previews to the next. 0: only before the first step and after the last."),
    sample_steps: int = Input(default=20, ge=1, le=100, description="Denoising steps of a preview."),
    hub_repo: str = Input(default="", description="owner/name on the Hugging Face hub. The weights and a model card are pushed there. Needs hub_token."),
    hub_private: bool = Input(default=True, description="Make that repository private, if it is new."),
    init_weights: Optional[Path] = Input(default=None, accept=".zip,.tar,.safetensors", description="A weights.zip or LoRA to continue learning from, of the same layers. Of another rank it is padded or cut. Its token continues too."),
    hub_token: Optional[Secret] = Input(default=None, description="Token of the hub that may write to hub_repo. It is neither kept nor logged."),
    control_dropout: float = Input(default=0.0, ge=0, le=1, description="Share of the images that train without their images to edit."),
    prior_loss_weight: float = Input(default=1.0, ge=0, le=10, description="Weight of regularisation images, those in a folder called reg, beside the others. 0 leaves them out."),
    placeholder_learning_rate: Optional[float] = Input(default=None, ge=0, le=1, description="Learning rate of the token's embedding. Empty: 3.3 % of a usual embedding's size (5e-4 for Qwen-Image). 0: it stays as it starts, and a training costs no more than one with a word."),
    placeholder_init_std: float = Input(default=1e-05, ge=0, le=0.1, description="Standard deviation of the token's first embedding. Near zero means no prior."),
    adapter: str = Input(default="lora", choices=["lora", "dora", "lokr"], description="What is trained at each layer. dora adds the length of each output's weights; lokr is a Kronecker product, of which rank is that of the larger factor."),
    lora_alpha: float = Input(default=32.0, ge=0.001, le=10000, description="Strength of the adapter times its rank: alpha / rank multiplies it. Leave it when you change the rank: with AdamW a LoRA then learns as fast as before."),
    timestep_sampling: str = Input(default="resolution", choices=["resolution", "logit_normal", "uniform", "content", "style"], description="Levels of noise that are trained. resolution: as the model was, more noise for larger images; content: about the middle; style: both ends."),
    timestep_shift: Optional[float] = Input(default=None, ge=0.1, le=100, description="Shift of these levels towards noise, like 3; 1 is none. Empty: the image size's, or none for logit_normal and uniform."),
    loss: str = Input(default="mse", choices=["mse", "huber"], description="Error of the velocity. huber counts large errors less, as of images that don't belong."),
    ema_decay: float = Input(default=0.0, ge=0, le=0.9999, description="Decay of a moving average of the weights, like 0.99, that is returned in place of the last step's. 0: none."),
    weight_decay: float = Input(default=0.0001, ge=0, le=1, description="Weight decay of the LoRA; the token has none."),
    beta1: float = Input(default=0.9, ge=0, le=0.999, description="First beta of Adam; adafactor and muon have none."),
    beta2: float = Input(default=0.999, ge=0, le=0.9999, description="Second beta of Adam; adafactor and muon have none."),
    max_grad_norm: float = Input(default=1.0, ge=0, le=1000, description="Norm that gradients are clipped to, the LoRA's and each token's by itself. 0: no clipping."),
    shard_base: str = Input(default="auto", choices=["auto", "never", "always"], description="Shard the frozen transformer over several GPUs, so that each holds a part. auto: where it doesn't fit on one."),
    # end of inputs
) -> TrainingOutput:  # fmt: skip
    """Fine-tune a LoRA of Qwen-Image."""
    inputs = locals()
    with logged_to_stdout():
        done = launch.train(inputs, access=client_access())
    cast(Any, current_scope()).record_metric("training_step_count", done.steps)
    return TrainingOutput(weights=Path(done.weights))  # pyright: ignore[reportCallIssue] (cog makes the constructor)
