"""What checkpoints of earlier versions say, in the words of this one."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_utils.model.memory_plan import MemoryPlan

FORMAT = 2  # the first one had no plan and no losses
# Inputs that came after a format's first checkpoints, by what a run was before there were any.
NEW_SETTINGS = {
    "adapter": "lora",
    "lora_alpha": None,
    "timestep_sampling": "resolution",
    "timestep_shift": None,
    "loss": "mse",
    "uncaptioned": "train",
    "caption_variants": False,
    "caption_shuffle": None,
    "flip": "off",
    "prior_loss_weight": 1.0,
    "control_resolution": "1024",
    "control_dropout": 0.0,
    "preserve_prompts": "",
}


def in_this_format(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's JSON as this version writes it.

    In the first format the quantisation stood in the settings as it came to, and where the text encoder ran wasn't
    written: it is taken to have been on the GPU. A validation that its stop skipped isn't repeated.
    """
    if written.get("format", 1) == FORMAT:
        return written
    settings = dict(written["settings"])
    for old, new in (("cards", "processes"), ("pictures and captions", "images and captions")):
        settings[new] = settings.pop(old)
    plan = MemoryPlan(settings["quantization"], text_encoder_on_device=True, compiled=written["compiled"])
    step = written["step"]
    settings |= {"quantization": {"auto", settings["quantization"]}}
    return {
        **written,
        "plan": asdict(plan),
        "settings": settings,
        "recent_losses": [],
        "validated_at": step,
        "previewed_at": step,
    }


def with_new_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings with those that it knew nothing of."""
    known = {**NEW_SETTINGS, **settings}
    if known["lora_alpha"] is None:  # the default was the rank
        known["lora_alpha"] = float(known["rank"])
    return known
