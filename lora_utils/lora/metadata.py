"""What a LoRA file's header says of it, for people who manage many: ModelSpec's keys and those of kohya's tools.

ModelSpec is github.com/Stability-AI/ModelSpec, version 1.0.1. The `ss_` keys are those of kohya-ss/sd-scripts that
model managers show. A header is a function of the run, but for the date: SOURCE_DATE_EPOCH sets that one
(reproducible-builds.org/specs/source-date-epoch).
"""

import base64
import datetime
import json
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from lora_utils.config import TrainConfig

ARCHITECTURE, IMPLEMENTATION = "Qwen-Image/lora", "https://github.com/QwenLM/Qwen-Image"
EDIT_ARCHITECTURE = "Qwen-Image-Edit/lora"
MOST_THUMBNAIL_BYTES = 64_000  # of the data URI
_KEPT = ("modelspec.", "ss_", "format")  # what a file that is rewritten keeps of its header
_METHODS = {"lora": "networks.lora", "dora": "networks.lora", "lokr": "lycoris.kohya"}
_MOST_TAGS = 500  # that are counted; a caption may be a text of its own for each image


@dataclass(frozen=True, slots=True)
class Described:
    """What a header says of a training beyond its config."""

    base_model: str
    captions: Sequence[str]
    num_images: int
    steps: int
    final_loss: float | None
    title: str
    thumbnail: Image.Image | None = None
    edits: bool = False  # the base model edits images


def describe_training(config: TrainConfig, described: Described) -> dict[str, str]:
    """Return the header of a file that a training wrote."""
    side, base = max(config.resolutions_px), described.base_model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    found = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": EDIT_ARCHITECTURE if described.edits else ARCHITECTURE,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": described.title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": _today().isoformat(),
        "modelspec.trigger_phrase": ", ".join(config.triggers),
        "modelspec.thumbnail": thumbnail_uri(described.thumbnail) if described.thumbnail else "",
        "ss_base_model_version": "qwen_image_edit" if described.edits else "qwen_image",
        "ss_sd_model_name": base,
        "ss_output_name": described.title,
        "ss_network_module": _METHODS[config.adapter],
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{config.lora_alpha:g}",
        "ss_num_train_images": str(described.num_images),
        "ss_steps": str(described.steps),
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_learning_rate": f"{config.learning_rate:g}",
        "ss_optimizer": config.optimizer,
        "ss_seed": str(config.seed),
        "ss_resolution": f"({side}, {side})",
        "ss_final_loss": "" if described.final_loss is None else f"{described.final_loss:.5g}",
        "ss_tag_frequency": json.dumps({"dataset": count_tags(described.captions)}, ensure_ascii=False),
    }
    return {name: value for name, value in found.items() if value}


def count_tags(captions: Sequence[str]) -> dict[str, int]:
    """Return how many captions hold each tag, which commas separate; the most frequent first."""
    counts = Counter(tag for caption in captions for tag in dict.fromkeys(map(str.strip, caption.split(","))) if tag)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_TAGS])


def thumbnail_uri(image: Image.Image) -> str:
    """Return an image as a data URI of at most 64 kB: smaller and coarser until it fits."""
    small = image.convert("RGB")
    for side in (512, 384, 256, 128):
        small.thumbnail((side, side))
        for quality in (85, 60):
            file = BytesIO()
            small.save(file, "JPEG", quality=quality)
            uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
            if len(uri) <= MOST_THUMBNAIL_BYTES:
                return uri
    return ""


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a rewritten file keeps of the header that it was read with."""
    return {name: value for name, value in metadata.items() if name.startswith(_KEPT)}


def sort_header(path: Path) -> None:
    """Bring the entries of a safetensors file's header into an order that is always the same.

    safetensors writes several in random order, and two files of equal content would differ. Nothing else changes: the
    header keeps its length, which the format allows to fill with spaces.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"the header of {path.name} would grow from {length} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(length))


def _today() -> datetime.date:
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.datetime.now(datetime.UTC)
    return (datetime.datetime.fromtimestamp(int(given), datetime.UTC) if given.isdecimal() else now).date()
