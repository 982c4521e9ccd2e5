"""The list of inputs: what a caller may ask for, each declared once as a field with its default, range and sentence.

`TrainInputs` and `SampleInputs` hold all of them. Cog's signatures, the command line and the tables in docs/ are made
from these fields. `from_inputs` turns any caller's values into validated, frozen dataclasses. This module imports the
standard library alone.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lora_utils import constants
from lora_utils.errors import UserError, shown
from lora_utils.options import (
    GROUPS,
    MAX_SEED,
    REQUIRED,
    checked,
    is_required,
    kind_of,
    option,
    option_of,
    random_seed,
    validate,
)
from lora_utils.presets import PRESETS, preset_for
from lora_utils.prompts import split_prompts, split_scale, split_settings
from lora_utils.triggers import holds, holds_mark

QUANTIZATIONS = ("auto", "none", "fp8", "int8", "nf4")
HUB_REPO_PATTERN = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PLACEHOLDER_PATTERN = re.compile(r"<[A-Za-z][A-Za-z0-9_-]{0,30}>")
ARCHIVES = ".zip,.tar,.tar.gz,.tgz,.tar.bz2,.tar.xz"
WEIGHTS = ".zip,.tar,.safetensors"


# --- what texts may hold ---------------------------------------------------------------------------------------------


def parse_resolutions(text: str) -> str:
    """Return '512,768,1024' in its canonical form: sorted, without repeats, each a multiple of 16."""
    try:
        sides_px = sorted({int(part) for part in text.replace(" ", "").split(",") if part})
    except ValueError:
        raise UserError(f"resolution must be pixels like '512' or '512,768,1024', got {shown(text)!r}.") from None
    wrong = [px for px in sides_px if not 64 <= px <= 2048 or px % constants.PIXELS_PER_TOKEN]
    if wrong or not sides_px:
        raise UserError(f"resolution takes multiples of 16 from 64 to 2048, got {shown(text)!r}.")
    return ",".join(map(str, sides_px))


def parse_control_resolution(text: str) -> str:
    """Return a side in pixels as a text, 'auto', or nothing. Raises UserError for anything else."""
    plain = text.strip().lower()
    if plain in ("", "auto"):
        return plain
    if not plain.isdecimal() or len(plain) > 4 or not 64 <= int(plain) <= 2048:
        raise UserError(f"control_resolution takes auto, or a side of 64 to 2048 pixels, got {shown(text)!r}.")
    return str(int(plain))


def check_token_name(name: str) -> None:
    """Raise UserError for a name that a placeholder token can't have, whoever gives it."""
    if not PLACEHOLDER_PATTERN.fullmatch(name):
        raise UserError(
            f"placeholder_token {shown(name)!r} isn't a valid name: write '<', a letter, then up to 30 letters, "
            "digits, '_' or '-', then '>', like '<zwx>'; several are separated by commas."
        )


def parse_token_names(text: str) -> str:
    """Return '<zwx>' or '<anna>,<ben>' without spaces."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_token_name(name)
        if names.count(name) > 1:
            raise UserError(f"placeholder_token names {name!r} twice.")
    return ",".join(names)


def parse_targets(text: str) -> str:
    """Return presets and patterns of layers without spaces. Which layers there are, the model knows."""
    plain = re.sub(r"\s", "", text)
    number = r"\d{1,3}(-\d{1,3})?"
    if not re.fullmatch(rf"([\w.*?]|\{{{number}(,{number})*\}}|,)+", plain):
        raise UserError(
            f"lora_targets takes {', '.join(constants.LORA_TARGETS)}, or patterns of layers like "
            f"transformer_blocks.{{20-39}}.attn.*, separated by commas; got {shown(text)!r}."
        )
    return plain


def parse_prompts(text: str) -> str:
    """Return prompts that are separated by lines or '|', one a line. Raises UserError for settings that can't be."""
    lines = split_prompts(text)
    for line in lines:
        preview_request(line, SampleRequest("", seed=0))
    return "\n".join(lines)


MOST_PRESERVED_PROMPTS = 200  # all of them are encoded before the first step


def parse_preserved_prompts(text: str) -> str:
    """Return prompts that are separated by lines or '|', one a line."""
    lines = split_prompts(text)
    if len(lines) > MOST_PRESERVED_PROMPTS:
        raise UserError(f"preserve_prompts takes at most {MOST_PRESERVED_PROMPTS} prompts, got {len(lines)}.")
    return "\n".join(lines)


MOST_EXTRA_LORAS = 8


def parse_extra_loras(text: str) -> str:
    """Return the sources of LoRAs, one a line, each with a scale behind it if it has one of its own."""
    lines = split_prompts(text)
    if len(lines) > MOST_EXTRA_LORAS:
        raise UserError(f"extra_lora names {len(lines)} LoRAs; {MOST_EXTRA_LORAS} are the most.")
    for line in lines:
        extra_lora(line, 1.0)
    return "\n".join(lines)


def extra_lora(line: str, usual: float) -> tuple[str, float]:
    """Return a LoRA's source and scale, which is `usual` where the line has none. Raises UserError for a wrong one."""
    source, scale = split_scale(line)
    if scale is None:
        return source, usual
    (declared,) = (item for item in fields(SampleRequest) if item.name == "extra_lora_scale")
    try:
        return source, float(str(checked(declared, float(scale))))
    except UserError as error:
        raise UserError(f"extra_lora {shown(source)!r}: {error}") from error
    except ValueError:
        raise UserError(f"extra_lora {shown(source)!r}: --scale must be a number, got {shown(scale)!r}.") from None


def preview_request(line: str, usual: "SampleRequest") -> "SampleRequest":
    """Return what a line of `sample_prompts` asks for: `usual` with its prompt and settings."""
    prompt, settings = split_settings(line)
    declared = {item.name: item for item in fields(SampleRequest)}
    values: dict[str, Any] = {"prompt": prompt}
    for name, text in settings.items():
        kind = kind_of(declared[name])
        try:
            values[name] = checked(declared[name], text if kind is str else kind(text))
        except UserError as error:
            raise UserError(f"sample_prompts: {error}") from error
        except ValueError:
            raise UserError(f"sample_prompts: {name} must be a number, got {shown(text)!r}.") from None
    return replace(usual, **values)


# --- training -------------------------------------------------------------------------------------------------------

# The formatter is off where inputs are listed: one reads as its default, its sentence and its limits, and with an
# argument a line the list would be three times as long.


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What a training learns from its images. A run is a function of this, the images and the base model."""

    # fmt: off
    train_placeholder_token: bool = option(
        False, "Train a new token without any meaning along with the LoRA. Off: the placeholder inputs are ignored.",
        group="main",
    )
    trigger_word: str = option(
        "", "A word put in front of each caption that lacks it, and in place of [trigger]. Empty: [trigger] is the "
        "placeholder token.", parse=str.strip, group="main",
    )
    default_caption: str = option("", "Caption of images that have none of their own.", parse=str.strip, group="main")
    goal: str = option(
        "none", "What is taught. It chooses the rank, steps, learning_rate and lora_targets that you leave empty.",
        choices=tuple(PRESETS), group="main",
    )
    steps: int = option(
        PRESETS["none"].steps, "Optimizer steps. Empty: the goal's, 1000 without one.",
        ge=1, le=20000, preset=True, group="main",
    )
    rank: int = option(
        PRESETS["none"].rank, "Rank of the LoRA. Empty: the goal's, 16 without one.",
        ge=1, le=256, preset=True, group="main",
    )
    learning_rate: float = option(
        PRESETS["none"].learning_rate, "Learning rate of the LoRA. Empty: the goal's, 5e-4 without one; twice that for "
        "muon; 1 for prodigy, which multiplies the rate it finds.", ge=1e-7, le=1, preset=True, group="main",
    )
    resolution: str = option(
        "512,768,1024", "Training resolutions in pixels: multiples of 16, separated by commas. Images keep their "
        "aspect ratio.", parse=parse_resolutions, group="main",
    )
    batch_size: int = option(1, "Images per batch.", ge=1, le=16, group="main")
    seed: int = option(
        random_seed, "The same seed gives the same weights. Empty or -1: random, and reported.",
        ge=-1, le=MAX_SEED, group="main",
    )
    placeholder_token: str = option(
        "<zwx>", "Name of the new token, as your captions and prompts write it. Several are separated by commas.",
        parse=parse_token_names, only_if="train_placeholder_token",
    )
    lora_targets: str = option(
        PRESETS["none"].lora_targets, "Layers that the LoRA adapts: attention, attention_mlp (2.3 times as large), or "
        "patterns like transformer_blocks.{20-39}.attn.*, separated by commas. Empty: the goal's, attention_mlp "
        "without one.", parse=parse_targets, preset=True,
    )
    quantization: str = option(
        "auto", "How the frozen model's weights are stored. auto: exact where the GPU has room, else in 8 bits, else "
        "in 4.", choices=QUANTIZATIONS,
    )
    gradient_accumulation: int = option(1, "Batches per optimizer step.", ge=1, le=64)
    autocaption: bool = option(
        False, "Let the text encoder, a vision-language model, describe the images that have no caption."
    )
    autocaption_prefix: str = option(
        "", "Text in front of each caption that autocaption writes, like 'a photo of <zwx>, '."
    )
    autocaption_suffix: str = option("", "Text behind each caption that autocaption writes.")
    mask_from: str = option(
        "none", "Where images are learned in full: white in NAME.mask.png beside them (file), or opaque in themselves "
        "(alpha). none: everywhere.", choices=("none", "file", "alpha"),
    )
    mask_floor: float = option(0.1, "Weight of the loss outside a mask; inside it is 1.", ge=0, le=1)
    class_word: str = option(
        "", "What the token or trigger word is one of, like 'person'. Training then holds that class to what the base "
        "model makes of it.", parse=str.strip,
    )
    preserve_prompts: str = option(
        "", "Prompts that training holds to what the base model makes of them, one a line or separated by |.",
        parse=parse_preserved_prompts,
    )
    preservation_weight: float = option(
        0.1, "Share of the batches that hold class_word and preserve_prompts (prior preservation), not teach.",
        ge=0, le=0.9,
    )
    uncaptioned: str = option(
        "train", "Images without any caption: train them under an empty one, skip them, or refuse the dataset.",
        choices=("train", "skip", "refuse"),
    )
    caption_variants: bool = option(
        False, "Each line of a caption is another caption of its image, of which one is taken at random each time."
    )
    caption_shuffle: int | None = option(
        None, "Shuffle the tags of captions, which commas separate, each time, and keep the first so many in their "
        "place. Empty: no shuffling.", ge=0, le=1000,
    )
    flip: str = option(
        "off", "Show images mirrored half of the time. on refuses captions with left or right, insist takes them too.",
        choices=("off", "on", "insist"),
    )
    control_resolution: str = option(
        "1024", "Side in pixels of the square whose area images to edit are scaled to; auto: as the training "
        "resolution, which is faster. Only for a base model that edits.", parse=parse_control_resolution,
    )
    control_dropout: float = option(
        0.0, "Share of the images that train without their images to edit.", ge=0, le=1, group="advanced"
    )
    prior_loss_weight: float = option(
        1.0, "Weight of regularisation images, those in a folder called reg, beside the others. 0 leaves them out.",
        ge=0, le=10, group="advanced",
    )
    caption_dropout: float = option(0.05, "Share of the images that train without their caption.", ge=0, le=1)
    validation_share: float = option(
        0.0, "Share of the images held out, to measure a loss that can be compared between runs.", ge=0, le=0.5
    )
    optimizer: str = option(
        "adamw", "Optimizer of the LoRA. adamw8bit and adafactor need less memory, prodigy finds its own rate, muon "
        "learned in fewer steps on the small model. The token always has its own adamw.",
        choices=("adamw", "adamw8bit", "prodigy", "adafactor", "muon"),
    )
    lr_scheduler: str = option(
        "constant", "What the learning rates do after the warm-up.", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = option(0, "Steps over which the learning rates rise from 0.", ge=0, le=20000)
    placeholder_learning_rate: float | None = option(
        None, "Learning rate of the token's embedding. Empty: 3.3 % of a usual embedding's size (5e-4 for Qwen-Image). "
        "0: it stays as it starts, and a training costs no more than one with a word.",
        ge=0, le=1, only_if="train_placeholder_token", group="advanced",
    )
    placeholder_init_std: float = option(
        1e-5, "Standard deviation of the token's first embedding. Near zero means no prior.",
        ge=0, le=0.1, only_if="train_placeholder_token", group="advanced",
    )
    adapter: str = option(
        "lora", "What is trained at each layer. dora adds the length of each output's weights; lokr is a Kronecker "
        "product, of which rank is that of the larger factor.", choices=("lora", "dora", "lokr"), group="advanced",
    )
    # AdamW moves every number by about its rate, so R columns of B move a layer's output R times as far, and alpha / R
    # undoes that: ranks 4 to 64 learn alike. 32 is the strength of Replicate's recipe, rank 32 at alpha 32.
    lora_alpha: float = option(
        32.0, "Strength of the adapter times its rank: alpha / rank multiplies it. Leave it when you change "
        "the rank: with AdamW a LoRA then learns as fast as before.", ge=0.001, le=10000, group="advanced",
    )
    timestep_sampling: str = option(
        "resolution", "Levels of noise that are trained. resolution: as the model was, more noise for larger images; "
        "content: about the middle; style: both ends.",
        choices=("resolution", "logit_normal", "uniform", "content", "style"), group="advanced",
    )
    timestep_shift: float | None = option(
        None, "Shift of these levels towards noise, like 3; 1 is none. Empty: the image size's, or none for "
        "logit_normal and uniform.", ge=0.1, le=100, group="advanced",
    )
    loss: str = option(
        "mse", "Error of the velocity. huber counts large errors less, as of images that don't belong.",
        choices=("mse", "huber"), group="advanced",
    )
    ema_decay: float = option(
        0.0, "Decay of a moving average of the weights, like 0.99, that is returned in place of the last step's. "
        "0: none.",
        ge=0, le=0.9999, group="advanced",
    )
    weight_decay: float = option(1e-4, "Weight decay of the LoRA; the token has none.", ge=0, le=1, group="advanced")
    beta1: float = option(0.9, "First beta of Adam; adafactor and muon have none.", ge=0, le=0.999, group="advanced")
    beta2: float = option(
        0.999, "Second beta of Adam; adafactor and muon have none.", ge=0, le=0.9999, group="advanced"
    )
    max_grad_norm: float = option(
        1.0, "Norm that gradients are clipped to, the LoRA's and each token's by itself. 0: no clipping.",
        ge=0, le=1000, group="advanced",
    )
    # fmt: on

    def __post_init__(self) -> None:
        """Validate each input, then what is wrong only beside another one."""
        validate(self)
        around = self.autocaption_prefix + self.autocaption_suffix
        unnamed = [token for token in self.tokens if token not in around]
        if self.autocaption and self.tokens and not holds_mark(around) and len(unnamed) == len(self.tokens):
            raise UserError(
                f"autocaption writes captions without {self.tokens[0]}, which would then learn nothing from them; set "
                f"autocaption_prefix to something like 'a photo of {self.tokens[0]}, '."
            )
        if self.class_word and not self.triggers:
            raise UserError(
                f"class_word {self.class_word!r} says what a token or trigger word is one of, and there is neither; "
                "set train_placeholder_token or trigger_word."
            )
        if any(holds(self.class_word, trigger) for trigger in self.triggers):
            raise UserError(
                f"class_word {self.class_word!r} holds the token or trigger word itself; name the class alone."
            )
        for prompt in split_prompts(self.preserve_prompts):
            if any(holds(prompt, trigger) for trigger in self.triggers):
                raise UserError(
                    f"preserve_prompts: {shown(prompt)!r} names what is taught, which can't stay as it is; leave it "
                    "out."
                )

    @property
    def resolutions_px(self) -> tuple[int, ...]:
        """The sides of the squares whose area the buckets have, ascending."""
        return tuple(int(part) for part in self.resolution.split(","))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens, if the feature is on."""
        return tuple(self.placeholder_token.split(",")) if self.train_placeholder_token else ()

    @property
    def learns_tokens(self) -> bool:
        """Whether the tokens' embeddings are trained; otherwise they stay as they start."""
        return bool(self.tokens) and self.placeholder_learning_rate != 0

    @property
    def triggers(self) -> tuple[str, ...]:
        """The tokens, and the trigger word if there is one: what names the thing that is taught."""
        return self.tokens + ((self.trigger_word,) if self.trigger_word else ())


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is kept and shown of a training while it runs, and where it goes. None of it changes what is learned."""

    # fmt: off
    run_dir: str = option(
        "", "Folder on the machine that trains, for checkpoints, previews, curves and report.html. Empty: nothing is "
        "kept.", parse=str.strip,
    )
    save_every: int = option(0, "Steps from one checkpoint in run_dir to the next. 0: none.", ge=0, le=20000)
    keep_checkpoints: int = option(2, "Checkpoints that are kept; older ones are removed.", ge=1, le=1000)
    keep_weights: int = option(
        3, "weights.zip files that are written beside the checkpoints and kept, to compare or to use. 0: none.",
        ge=0, le=1000,
    )
    resume: str = option(
        "never", "auto: continue from the last checkpoint in run_dir, if there is one. The result is that of an "
        "uninterrupted run.", choices=("never", "auto"),
    )
    sample_prompts: str = option(
        "", "Prompts of previews, one a line or separated by |. They are sampled into run_dir with the token and "
        "without it. A line may end in --size 768x512 --seed 5 --steps 30 --guidance 3 --scale 0.8 --negative blurry.",
        parse=parse_prompts,
    )
    sample_every: int = option(
        0, "Steps from one set of previews to the next. 0: only before the first step and after the last.",
        ge=0, le=20000,
    )
    sample_steps: int = option(20, "Denoising steps of a preview.", ge=1, le=100)
    hub_repo: str = option(
        "", "owner/name on the Hugging Face hub. The weights and a model card are pushed there. Needs hub_token.",
        parse=str.strip,
    )
    hub_private: bool = option(True, "Make that repository private, if it is new.")
    shard_base: str = option(
        "auto", "Shard the frozen transformer over several GPUs, so that each holds a part. auto: where it doesn't fit "
        "on one.", choices=("auto", "never", "always"), group="advanced",
    )
    # fmt: on

    def __post_init__(self) -> None:
        """Validate each input, then what is wrong only beside another one."""
        validate(self)
        if not self.run_dir and (self.save_every or self.resume != "never"):
            raise UserError("save_every and resume need a run_dir, the folder that checkpoints are kept in.")
        if self.sample_prompts and not self.run_dir:
            raise UserError("sample_prompts need a run_dir, the folder that the images go to.")
        if self.hub_repo and not HUB_REPO_PATTERN.fullmatch(self.hub_repo):
            raise UserError(f"hub_repo must be owner/name, got {shown(self.hub_repo)!r}.")

    @property
    def prompts(self) -> list[str]:
        """The prompts of the previews."""
        return self.sample_prompts.splitlines()


@dataclass(frozen=True, slots=True)
class TrainFiles:
    """What a training reads from files, and the secret that it needs to write elsewhere."""

    # fmt: off
    dataset: Path = option(
        REQUIRED, "A zip or tar of images (jpg, png, webp, bmp, gif, tiff, avif, heic) with captions in NAME.txt "
        "beside them or in metadata.jsonl, metadata.csv or captions.json.", accept=ARCHIVES,
    )
    init_weights: Path | None = option(
        None, "A weights.zip or LoRA to continue learning from, of the same layers. Of another rank it is padded or "
        "cut. Its token continues too.", accept=WEIGHTS,
    )
    hub_token: str | None = option(
        None, "Token of the hub that may write to hub_repo. It is neither kept nor logged.", secret=True
    )
    # fmt: on


# --- prediction -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prediction: `num_outputs` images of one prompt, image i from seed + i."""

    # fmt: off
    prompt: str = option(REQUIRED, "What to show. Name the placeholder token of your weights, if they have one.")
    lora_scale: float = option(1.0, "Strength of the LoRA; 0 is the base model.", ge=-1, le=3, group="main")
    aspect_ratio: str = option(
        "1:1", "One of the model's official sizes, 1328x1328 for 1:1.",
        choices=tuple(constants.OFFICIAL_SIZES_PX), group="main",
    )
    width: int | None = option(
        None, "Width in pixels, rounded to 16. Needs height; overrides aspect_ratio.", ge=64, le=2048, group="main"
    )
    height: int | None = option(
        None, "Height in pixels, rounded to 16. Needs width; overrides aspect_ratio.", ge=64, le=2048, group="main"
    )
    num_outputs: int = option(1, "Number of images; image i uses seed + i.", ge=1, le=4, group="main")
    seed: int = option(
        random_seed, "The same seed gives the same image. Empty or -1: random, and reported.",
        ge=-1, le=MAX_SEED, group="main",
    )
    steps: int = option(50, "Denoising steps.", ge=1, le=100, group="main")
    guidance: float = option(
        4.0, "Classifier-free guidance. 1 or less turns it off and takes half the time.", ge=0, le=10, group="main"
    )
    negative_prompt: str = option(" ", "What to steer away from; used when guidance is above 1.", group="main")
    strength: float = option(
        0.7, "How far to go from image: the share of the steps that are run. 1 starts from noise, 0 changes nothing.",
        ge=0, le=1,
    )
    go_fast: bool = option(
        False, "Faster and lossy: a Lightning LoRA samples without guidance on its own schedule; without one, steps "
        "that change little reuse earlier work.",
    )
    megapixels: float | None = option(
        None, "Area of the image at that aspect ratio. Empty: the official size.", ge=0.05, le=4
    )
    control_resolution: str = option(
        "", "Side in pixels of the square whose area images to edit are scaled to; auto: the area of what is made. "
        "Empty: as the LoRA was trained, else 1024.", parse=parse_control_resolution,
    )
    extra_lora: str = option(
        "", "More LoRAs, one a line or separated by |: a URL, a path, or a hub repository as owner/name or "
        "owner/name/file.safetensors. Each may end in a strength of its own, like --scale 0.8.",
        parse=parse_extra_loras,
    )
    extra_lora_scale: float = option(1.0, "Strength of the extra LoRAs that have none of their own.", ge=-1, le=3)
    lora_acts: str = option(
        "auto", "Under which texts a LoRA acts, prompt and negative prompt each. always: both. named: those that name "
        "what it was taught. auto: named for a LoRA of a person or an object, by its goal or class_word, else always.",
        choices=("auto", "always", "named"),
    )
    lightning: str = option(
        "auto", "Whether a LoRA is a Lightning one, made for 4 or 8 steps. auto: its header, or its ranks and alphas, "
        "tell.", choices=("auto", "yes", "no"),
    )
    output_format: str = option("webp", "Format of the images.", choices=("webp", "jpg", "png"))
    output_quality: int = option(95, "Quality of webp and jpg.", ge=1, le=100)
    disable_metadata: bool = option(False, "Leave prompt and settings out of the files.")
    # fmt: on

    def __post_init__(self) -> None:
        """Validate each input, then what is wrong only beside another one."""
        if (self.width is None) != (self.height is None):
            raise UserError(
                f"width and height come together: got width={self.width}, height={self.height}. Set both or neither."
            )
        validate(self)

    def seed_of(self, index: int) -> int:
        """Return the seed of image `index`; past the largest seed it starts again at 0."""
        return (self.seed + index) % (MAX_SEED + 1)

    @property
    def extra_loras(self) -> list[tuple[str, float]]:
        """The extra LoRAs, each a source and its strength."""
        return [extra_lora(line, self.extra_lora_scale) for line in self.extra_lora.splitlines()]

    @property
    def steps_run(self) -> int:
        """The steps that run on an initial image: the last `strength` of them."""
        return min(self.steps, math.ceil(self.steps * self.strength - 1e-9))

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance > 1.0


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """What a prediction reads from files, and the secret that it needs for a private repository."""

    # fmt: off
    replicate_weights: str | None = option(
        None, "weights.zip from a training, a tar of the same, or a .safetensors LoRA.", accept=WEIGHTS, group="main"
    )
    image: Path | None = option(
        None, "An image to start from or, with a base model that edits, to edit. It gives the aspect ratio where width "
        "and height don't.", accept="image/*",
    )
    image_2: Path | None = option(
        None, "A second image to edit, which the prompt calls picture 2. Only for a base model that edits several.",
        accept="image/*",
    )
    image_3: Path | None = option(None, "A third image to edit, picture 3.", accept="image/*")
    mask: Path | None = option(
        None, "What of image is generated again: white. The rest stays. Empty: all of it.", accept="image/*"
    )
    hf_token: str | None = option(
        None, "Token of the hub, for a private repository. It is neither kept nor logged.",
        secret=True, group="advanced",
    )
    # fmt: on


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """All inputs of a training."""

    config: TrainConfig
    options: RunOptions
    files: TrainFiles


@dataclass(frozen=True, slots=True)
class SampleInputs:
    """All inputs of a prediction."""

    files: SampleFiles
    request: SampleRequest


Inputs = TypeVar("Inputs", TrainInputs, SampleInputs)


def parts_of(inputs: type[TrainInputs] | type[SampleInputs]) -> dict[str, type]:
    """Return the dataclasses that hold a command's inputs, by the name that each has in `inputs`."""
    return {part.name: part.type for part in fields(inputs) if isinstance(part.type, type)}


def declared_inputs(inputs: type[TrainInputs] | type[SampleInputs]) -> list[Field[Any]]:
    """Return a command's inputs in the order that forms, help and docs list them: those used most come first."""
    found = [declared for part in parts_of(inputs).values() for declared in fields(part)]
    return sorted(found, key=lambda each: (not is_required(each), GROUPS.index(option_of(each).group)))


def from_inputs(inputs: type[Inputs], given: Mapping[str, Any]) -> Inputs:
    """Turn a caller's values, from Cog, the command line or a test, into validated, frozen dataclasses.

    None is an input that wasn't given: its default or its goal's preset is taken. A seed of -1 is random, 20.0 is 20.
    Raises UserError for a name that is no input and for a value that an input can't have.
    """
    parts = parts_of(inputs)
    known = {declared.name: declared for declared in declared_inputs(inputs)}
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"there is no input {shown(str(unknown[0]))!r}; the inputs are {', '.join(known)}.")
    values = dict(_plain(known, given))
    if missing := [name for name, declared in known.items() if is_required(declared) and name not in values]:
        raise UserError(f"{missing[0]} is needed: {option_of(known[missing[0]]).sentence}")
    if any(option_of(declared).preset for declared in known.values()):
        goal, optimizer = (
            checked(known[name], values.get(name, known[name].default)) for name in ("goal", "optimizer")
        )
        values = {**asdict(preset_for(str(goal), str(optimizer))), **values}
    return inputs(
        **{
            name: part(**{declared.name: values[declared.name] for declared in fields(part) if declared.name in values})
            for name, part in parts.items()
        }
    )


def _plain(known: Mapping[str, Field[Any]], given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values that were given, as Python's own types: Cog has types of its own for paths and secrets."""
    for name, value in given.items():
        about = option_of(known[name])
        if value is None or (about.accept and not str(value).strip()):  # a file that Cog's client didn't give
            continue
        if about.secret:
            yield name, getattr(value, "get_secret_value", lambda plain=value: plain)()
        else:
            yield name, kind_of(known[name])(str(value)) if about.accept else value
