"""Inputs that are valid alone and useless together: what is refused, and what is warned of, each with what to set.

All such rules stand here. This module imports the standard library alone.
"""

from collections.abc import Iterator

from lora_utils.config import RunOptions, TrainConfig
from lora_utils.errors import UserError

# Adam moves each weight by about its rate at every step, and a trained LoRA's weights are of a size of 0.01 to 0.1:
# at 0.1 the first step is larger than all that could be learned. 1e-4 to 5e-4 is what the field trains with.
RUINOUS_RATE, HIGH_RATE = 0.1, 0.01
PRODIGY_LEAST_RATE = 0.1  # it multiplies the rate that Prodigy finds, which its authors leave at 1
HIGH_EMBEDDING_RATE = 0.1  # a usual embedding of Qwen-Image has an rms of 0.015


def check_conflicts(config: TrainConfig, options: RunOptions) -> list[str]:
    """Return warnings of inputs that do little together. Raises UserError for those that would teach nothing."""
    if refused := list(_refused(config)):
        raise UserError(" ".join(refused))
    return list(_warned(config, options))


def _refused(config: TrainConfig) -> Iterator[str]:
    rate = config.learning_rate
    if config.optimizer == "prodigy" and rate < PRODIGY_LEAST_RATE:
        yield (
            f"learning_rate {rate:g} multiplies the rate that prodigy finds, and would teach next to nothing; leave it "
            "empty, or set it to 1."
        )
    if config.optimizer != "prodigy" and rate >= RUINOUS_RATE:
        yield (
            f"learning_rate {rate:g} with {config.optimizer} moves every weight by more than a whole training should; "
            "set it to about 5e-4, or leave it empty."
        )
    if config.optimizer == "muon" and config.adapter == "dora":
        yield "optimizer muon moves matrices alone, and dora also trains vectors; use adamw, or adapter lora."
    if config.warmup_steps and config.warmup_steps >= config.steps:
        yield f"warmup_steps {config.warmup_steps} doesn't end within the run's {config.steps} steps; set fewer."
    if config.tokens and config.caption_dropout == 1:
        yield f"caption_dropout 1 drops every caption, so {config.tokens[0]} would learn nothing; set it to 0.05."
    if config.tokens and config.placeholder_init_std == 0 and config.placeholder_learning_rate == 0:
        yield (
            "placeholder_init_std 0 with placeholder_learning_rate 0 leaves the token's embedding at zero, which no "
            "prediction could tell from a lost one; leave one of them empty."
        )


def _warned(config: TrainConfig, options: RunOptions) -> Iterator[str]:
    rate, token_rate = config.learning_rate, config.placeholder_learning_rate
    if config.optimizer != "prodigy" and rate > HIGH_RATE:
        yield f"learning_rate {rate:g} is far above the usual with {config.optimizer}; 5e-4 is a good start"
    if config.tokens and token_rate is not None and token_rate > HIGH_EMBEDDING_RATE:
        yield f"placeholder_learning_rate {token_rate:g} moves the token further than a word is large; try 5e-4"
    if len(config.tokens) > 1 and token_rate == 0:
        yield (
            f"placeholder_learning_rate 0 leaves {', '.join(config.tokens)} as they start, where the model can't tell "
            "them apart unless init_weights has learned them; leave it empty"
        )
    if config.caption_dropout == 1:
        yield "caption_dropout 1 drops every caption: nothing is learned of what they say"
    if config.mask_from != "none" and config.mask_floor == 1:
        yield "mask_floor 1 counts what is outside the masks in full, so they do nothing; lower it"
    if config.class_word and not config.preservation_weight:
        yield f"class_word {config.class_word!r} with preservation_weight 0 holds nothing; set it to 0.1"
    if config.preserve_prompts and not config.preservation_weight:
        yield "preserve_prompts with preservation_weight 0 hold nothing; set it to 0.1"
    if (config.autocaption_prefix or config.autocaption_suffix) and not config.autocaption:
        yield "autocaption_prefix and autocaption_suffix do nothing without autocaption; set it to true"
    if options.save_every > config.steps:
        yield f"save_every {options.save_every} is beyond the run's {config.steps} steps: no checkpoint will be saved"
    if options.sample_every and not options.sample_prompts:
        yield f"sample_every {options.sample_every} without sample_prompts: no previews will be sampled"
    elif options.sample_every > config.steps:
        yield (
            f"sample_every {options.sample_every} is beyond the run's {config.steps} steps: previews are sampled "
            "before the first step and after the last"
        )
