"""The recipes of other trainers for Qwen-Image: what their own examples and documents set, in this package's inputs.

Resolutions and memory are left out: neither matters for what is learned from small images. What a trainer doesn't set
is its code's default. 8-bit AdamW keeps 32 bits of matrices as small as the small model's, so it is AdamW here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A test says that these are the defaults.
OURS = {"learning_rate": 5e-4, "rank": 16, "lora_alpha": 32.0, "lora_targets": "attention_mlp"}
# The image stream alone, peft's names to_q, to_k, to_v and to_out.0: diffusers' example and SimpleTuner leave out text.
IMAGE_ATTENTION = ",".join(f"transformer_blocks.*.attn.to_{layer}" for layer in ("q", "k", "v", "out.0"))
ACCUMULATED = "its 4 accumulated batches are one of 4 here, which has the same gradient and takes fewer seconds"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a trainer recommends, as inputs of this package, with where it says so and what couldn't be carried over."""

    source: str
    given: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""
    named: bool = False  # sampled as a LoRA that acts where it is named, not always: `lora_acts`


RECIPES: dict[str, Recipe] = {
    "ours": Recipe("lora_utils/config.py, its defaults", OURS),
    "ours, where it is named": Recipe(
        "these with lora_acts=named, which a LoRA of a person or an object has by its goal", OURS, named=True
    ),
    "ours, by a token, where it is named": Recipe(
        "these with lora_acts=named and train_placeholder_token", {**OURS, "train_placeholder_token": True}, named=True
    ),
    "ours, by muon": Recipe(
        "these with optimizer=muon, whose rate is then 1e-3", {**OURS, "optimizer": "muon", "learning_rate": 1e-3}
    ),
    "ours until 2026-11-28": Recipe(
        "lora_utils/presets.py as it was",
        {"learning_rate": 1e-4, "rank": 32, "lora_alpha": 32.0, "lora_targets": "attention"},
    ),
    "ai-toolkit": Recipe(
        "ostris/ai-toolkit 01c9f83, config/examples/train_lora_qwen_image_24gb.yaml; timestep_type sigmoid is the "
        "default of toolkit/config_modules.py",
        {
            "rank": 16,
            "lora_alpha": 16.0,
            "learning_rate": 1e-4,
            "lora_targets": "attention_mlp",
            "timestep_sampling": "logit_normal",
            "caption_dropout": 0.05,
        },
        "3-bit weights, and a LoRA on the modulations",
    ),
    "musubi-tuner": Recipe(
        "kohya-ss/musubi-tuner 2b7e279, docs/qwen_image.md, the command for training; network_alpha is 1 by default, "
        "and the modulations are left out (networks/lora_qwen_image.py)",
        {
            "rank": 16,
            "lora_alpha": 1.0,
            "learning_rate": 5e-5,
            "lora_targets": "attention_mlp",
            "timestep_sampling": "logit_normal",
            "timestep_shift": 2.2,
            "caption_dropout": 0.0,
        },
    ),
    "diffusers": Recipe(
        "huggingface/diffusers 5cbf07e, examples/dreambooth/README_qwen.md, the command; rank and layers are the "
        "defaults of train_dreambooth_lora_qwen_image.py (02303d1)",
        {
            "rank": 4,
            "lora_alpha": 4.0,
            "learning_rate": 2e-4,
            "batch_size": 4,
            "lora_targets": IMAGE_ATTENTION,
            "timestep_sampling": "uniform",
            "caption_dropout": 0.0,
        },
        ACCUMULATED,
    ),
    "SimpleTuner": Recipe(
        "bghira/SimpleTuner 0921dd3, documentation/quickstart/QWEN_IMAGE.md, its config.json",
        {
            "rank": 8,
            "lora_alpha": 8.0,
            "learning_rate": 1e-4,
            "batch_size": 4,
            "warmup_steps": 100,
            "max_grad_norm": 0.01,
            "lora_targets": IMAGE_ATTENTION,
            "timestep_sampling": "logit_normal",
            "timestep_shift": 1.73,
            "caption_dropout": 0.0,
        },
        f"AdamW in place of Lion; {ACCUMULATED}",
    ),
    "Replicate": Recipe(
        "replicate/qwen-image-lora-trainer 3eb933a, README.md, training defaults; it runs ai-toolkit",
        {
            "rank": 32,
            "lora_alpha": 32.0,
            "learning_rate": 5e-4,
            "lora_targets": "attention_mlp",
            "timestep_sampling": "logit_normal",
            "caption_dropout": 0.05,
        },
        "ai-toolkit's LoRA on the modulations",
    ),
    "fal": Recipe(
        "fal.ai/models/fal-ai/qwen-image-trainer/llms.txt: steps 1000, learning_rate 5e-4; it publishes no more",
        {
            "rank": 16,
            "lora_alpha": 16.0,
            "learning_rate": 5e-4,
            "lora_targets": "attention_mlp",
            "timestep_sampling": "logit_normal",
            "caption_dropout": 0.05,
        },
        "rank, layers and levels of noise are ai-toolkit's",
    ),
}

# What a style may be taught by: one of them is goal=style.
STYLES = {
    f"rate {rate}": Recipe("lora_utils/presets.py, but for the rate", {**OURS, "learning_rate": float(rate)})
    for rate in ("2e-4", "5e-4")
}
