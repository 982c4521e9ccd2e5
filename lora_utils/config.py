"""What a caller can ask for: `TrainConfig` and `SampleRequest`, frozen and validated once.

Owns every default and every range; `train.py` and `predict.py` repeat them as literals because Cog reads those
without importing anything, and a test holds the two together.
"""

import math
import re
import secrets
from dataclasses import dataclass, field

from lora_utils import qwen
from lora_utils.checks import choice, number, whole
from lora_utils.errors import UserError
from lora_utils.recipes import GOALS

MAX_SEED = 2**32 - 1
LR_SCHEDULERS = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
SHARDINGS = ("auto", "never", "always")
QUANTIZATIONS = ("auto", "none", "fp8", "int8", "nf4")
RESUMES = ("never", "auto")
MASK_SOURCES = ("none", "file", "alpha")
OUTPUT_FORMATS = ("webp", "jpg", "png")
TRIGGER = "[trigger]"  # in captions: the trigger word, or the placeholder token
HUB_REPO_PATTERN = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PLACEHOLDER_PATTERN = re.compile(r"<[A-Za-z][A-Za-z0-9_-]{0,30}>")


def random_seed() -> int:
    """A seed for a caller who gave none; it is reported and can be given back."""
    return secrets.randbelow(MAX_SEED + 1)


def _resolutions(text: str) -> str:
    """'512,768,1024' in its canonical form: sorted, no repeats, multiples of 16."""
    try:
        sides_px = sorted({int(part) for part in str(text).replace(" ", "").split(",") if part})
    except ValueError:
        raise UserError(f"resolution must be pixels like '512' or '512,768,1024', got {text!r}.") from None
    wrong = [px for px in sides_px if not 64 <= px <= 2048 or px % qwen.PIXELS_PER_TOKEN]
    if wrong or not sides_px:
        raise UserError(f"resolution takes multiples of 16 from 64 to 2048, got {text!r}.")
    return ",".join(map(str, sides_px))


def _token_names(text: str) -> str:
    """'<zwx>' or '<anna>,<ben>', without spaces."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not PLACEHOLDER_PATTERN.fullmatch(name):
            raise UserError(
                f"placeholder_token {name!r} isn't a valid name: write '<', a letter, then up to 30 letters, digits, "
                "'_' or '-', then '>', like '<zwx>'; several are separated by commas."
            )
        if names.count(name) > 1:
            raise UserError(f"placeholder_token names {name!r} twice.")
    return ",".join(names)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run. A run is a function of this, the pictures and the base model."""

    goal: str = "none"  # what `recipe_for` chose by, where the caller left steps, rate, rank or targets open
    train_placeholder_token: bool = False
    placeholder_token: str = "<zwx>"  # or several, separated by commas
    placeholder_init_std: float = 1e-5  # of the fresh row; the median row of Qwen's matrix has an rms of about 1.5e-2
    placeholder_learning_rate: float | None = None  # None: a share of a usual row; 0 keeps the fresh row as drawn
    rank: int = GOALS["none"].rank  # and alpha
    steps: int = GOALS["none"].steps  # optimizer steps, whatever the accumulation
    learning_rate: float = GOALS["none"].learning_rate
    batch_size: int = 1
    gradient_accumulation: int = 1  # micro-batches per optimizer step
    resolution: str = "512,768,1024"  # sides of squares with the buckets' area, in pixels
    lora_targets: str = GOALS["none"].lora_targets
    quantization: str = "auto"  # of the frozen transformer; in a run's own config what it came to
    default_caption: str = ""
    trigger_word: str = ""  # put in front of captions that lack it, and in the place of `[trigger]`
    autocaption: bool = False  # the text encoder describes pictures without a caption
    autocaption_prefix: str = ""  # around what it writes
    autocaption_suffix: str = ""
    mask_from: str = "none"  # where the loss counts in full: `NAME.mask.png`, or the picture's own alpha
    mask_floor: float = 0.1  # what it counts elsewhere
    class_word: str = ""  # what token or trigger word is one of: the LoRA leaves it as the base has it
    preservation_weight: float = 0.25  # share of the micro-batches that see to that, if there is a class_word
    caption_dropout: float = 0.05  # share of the captions replaced by the sampler's empty prompt
    optimizer: str = "adamw"  # of the LoRA; a token's row always has an AdamW of its own
    weight_decay: float = 1e-4  # of the LoRA, never of a row
    beta1: float = 0.9  # Adam's, of the LoRA; adafactor has none
    beta2: float = 0.999
    max_grad_norm: float = 1.0  # for the LoRA and for each row by itself; 0: gradients aren't clipped
    ema_decay: float = 0.0  # of the average that is returned in place of the last step's weights; 0: none
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    validation_share: float = 0.0  # of the pictures, held out to measure on
    seed: int = field(default_factory=random_seed)

    def __post_init__(self) -> None:
        checked = {
            "goal": choice("goal", self.goal, tuple(GOALS)),
            "rank": whole("rank", self.rank, 1, 256),
            "steps": whole("steps", self.steps, 1, 20000),
            "learning_rate": number("learning_rate", self.learning_rate, 1e-7, 1.0),
            "batch_size": whole("batch_size", self.batch_size, 1, 16),
            "gradient_accumulation": whole("gradient_accumulation", self.gradient_accumulation, 1, 64),
            "resolution": _resolutions(self.resolution),
            "lora_targets": choice("lora_targets", self.lora_targets, tuple(qwen.LORA_TARGETS)),
            "quantization": choice("quantization", self.quantization, QUANTIZATIONS),
            "mask_from": choice("mask_from", self.mask_from, MASK_SOURCES),
            "mask_floor": number("mask_floor", self.mask_floor, 0, 1),
            "preservation_weight": number("preservation_weight", self.preservation_weight, 0, 0.9),
            "caption_dropout": number("caption_dropout", self.caption_dropout, 0, 1),
            "optimizer": choice("optimizer", self.optimizer, OPTIMIZERS),
            "weight_decay": number("weight_decay", self.weight_decay, 0, 1),
            "beta1": number("beta1", self.beta1, 0, 0.999),
            "beta2": number("beta2", self.beta2, 0, 0.9999),
            "max_grad_norm": number("max_grad_norm", self.max_grad_norm, 0, 1000),
            "ema_decay": number("ema_decay", self.ema_decay, 0, 0.9999),
            "lr_scheduler": choice("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS),
            "warmup_steps": whole("warmup_steps", self.warmup_steps, 0, 20000),
            "validation_share": number("validation_share", self.validation_share, 0, 0.5),
            "seed": whole("seed", self.seed, 0, MAX_SEED),
            "default_caption": self.default_caption.strip(),
            "trigger_word": self.trigger_word.strip(),
            "class_word": self.class_word.strip(),
        }
        if self.train_placeholder_token:  # off: whatever stands in its fields is ignored
            checked["placeholder_init_std"] = number("placeholder_init_std", self.placeholder_init_std, 0, 0.1)
            if self.placeholder_learning_rate is not None:
                rate = number("placeholder_learning_rate", self.placeholder_learning_rate, 0, 1)
                checked["placeholder_learning_rate"] = rate
            checked["placeholder_token"] = _token_names(self.placeholder_token)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        """What is wrong only beside another input."""
        around = self.autocaption_prefix + self.autocaption_suffix
        unnamed = [token for token in self.tokens if token not in around]
        if self.autocaption and self.tokens and TRIGGER not in around and len(unnamed) == len(self.tokens):
            raise UserError(
                f"autocaption writes captions without {self.tokens[0]}, which would then learn nothing from them; set "
                f"autocaption_prefix to something like 'a photo of {self.tokens[0]}, '."
            )
        if self.class_word and not self.triggers:
            raise UserError(
                f"class_word {self.class_word!r} says what a token or trigger word is one of, and there is neither; "
                "set train_placeholder_token or trigger_word."
            )
        if any(trigger in self.class_word for trigger in self.triggers):
            raise UserError(
                f"class_word {self.class_word!r} holds the token or trigger word itself; name the class alone."
            )

    @property
    def resolutions_px(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.resolution.split(","))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens, if they are trained."""
        return tuple(self.placeholder_token.split(",")) if self.train_placeholder_token else ()

    @property
    def triggers(self) -> tuple[str, ...]:
        """The tokens, and the trigger word if there is one: what names the thing that is taught."""
        return self.tokens + ((self.trigger_word,) if self.trigger_word else ())


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is kept and shown of a training on its way, and where it goes. None of it changes what is learned."""

    run_dir: str = ""  # a folder of the machine that trains; empty: nothing is kept
    save_every: int = 0  # steps from one checkpoint to the next; 0: none
    keep_checkpoints: int = 2  # older ones are removed
    resume: str = "never"  # or "auto": go on from the last checkpoint in run_dir, if there is one
    sample_prompts: str = ""  # drawn on the way, into run_dir; a line each
    sample_every: int = 0  # steps; 0: before the first and after the last alone
    sample_steps: int = 20  # of denoising
    shard_base: str = "auto"  # the frozen transformer over several cards: where one is too small, or never, or always
    hub_repo: str = ""  # owner/name on the hub that the weights are pushed to
    hub_private: bool = True

    def __post_init__(self) -> None:
        checked = {
            "run_dir": self.run_dir.strip(),
            "save_every": whole("save_every", self.save_every, 0, 20000),
            "keep_checkpoints": whole("keep_checkpoints", self.keep_checkpoints, 1, 1000),
            "resume": choice("resume", self.resume, RESUMES),
            "sample_prompts": "\n".join(filter(None, map(str.strip, re.split(r"[\n|]", self.sample_prompts)))),
            "sample_every": whole("sample_every", self.sample_every, 0, 20000),
            "sample_steps": whole("sample_steps", self.sample_steps, 1, 100),
            "shard_base": choice("shard_base", self.shard_base, SHARDINGS),
            "hub_repo": self.hub_repo.strip(),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.run_dir and (self.save_every or self.resume != "never"):
            raise UserError("save_every and resume need a run_dir, the folder that checkpoints are kept in.")
        if self.sample_prompts and not self.run_dir:
            raise UserError("sample_prompts need a run_dir, the folder that the pictures go to.")
        if self.hub_repo and not HUB_REPO_PATTERN.fullmatch(self.hub_repo):
            raise UserError(f"hub_repo must be owner/name, got {self.hub_repo!r}.")

    @property
    def prompts(self) -> list[str]:
        """Those that are drawn on the way."""
        return self.sample_prompts.splitlines()


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prediction: `num_outputs` pictures of one prompt, picture i drawn from seed + i."""

    prompt: str
    negative_prompt: str = " "
    steps: int = 50
    guidance: float = 4.0  # true CFG; 1 or less runs the conditional branch alone
    width: int | None = None  # pixels; both or neither
    height: int | None = None
    aspect_ratio: str = "1:1"
    megapixels: float | None = None  # of the picture's area; None: the official size
    num_outputs: int = 1
    strength: float = 0.7  # share of the schedule that a picture to start from goes through
    go_fast: bool = False  # lossy
    extra_lora: str = ""  # a path, URL or hub repository
    extra_lora_scale: float = 1.0
    disable_metadata: bool = False  # leave the settings out of the files
    lora_scale: float = 1.0
    output_format: str = "webp"
    output_quality: int = 95
    seed: int = field(default_factory=random_seed)

    def __post_init__(self) -> None:
        if (self.width is None) != (self.height is None):
            raise UserError(f"width and height come together: got width={self.width}, height={self.height}.")
        checked = {
            "steps": whole("steps", self.steps, 1, 100),
            "guidance": number("guidance", self.guidance, 0, 10),
            "width": None if self.width is None else whole("width", self.width, 64, 2048),
            "height": None if self.height is None else whole("height", self.height, 64, 2048),
            "aspect_ratio": choice("aspect_ratio", self.aspect_ratio, tuple(qwen.OFFICIAL_SIZES_PX)),
            "megapixels": None if self.megapixels is None else number("megapixels", self.megapixels, 0.05, 4),
            "strength": number("strength", self.strength, 0, 1),
            "extra_lora": self.extra_lora.strip(),
            "extra_lora_scale": number("extra_lora_scale", self.extra_lora_scale, -1, 3),
            "num_outputs": whole("num_outputs", self.num_outputs, 1, 4),
            "lora_scale": number("lora_scale", self.lora_scale, -1, 3),
            "output_format": choice("output_format", self.output_format, OUTPUT_FORMATS),
            "output_quality": whole("output_quality", self.output_quality, 1, 100),
            "seed": whole("seed", self.seed, 0, MAX_SEED),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def seed_of(self, index: int) -> int:
        """The seed of picture `index`; past the largest seed it starts again at 0."""
        return (self.seed + index) % (MAX_SEED + 1)

    @property
    def steps_run(self) -> int:
        """The steps that a picture to start from goes through: the last `strength` of them."""
        return min(self.steps, math.ceil(self.steps * self.strength - 1e-9))

    @property
    def guided(self) -> bool:
        return self.guidance > 1.0
