"""Images to edit, cached: what the text encoder sees of each, which never changes.

Legend: M tokens of an example's images to edit, C packed channels (64), V features, D the text encoder's width.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import PIL
import torch
import transformers

from lora_utils.dataset.cache_keys import arithmetic, digest_files
from lora_utils.dataset.examples import ControlImage, Example
from lora_utils.io.logging import Progress
from lora_utils.io.tensor_store import Tensors, TensorStore, content_key, folder_fingerprint
from lora_utils.model.controls import Controls, no_controls
from lora_utils.model.device import Placement, release_memory
from lora_utils.model.latents import ControlLatents, Size
from lora_utils.model.variant import Variant
from lora_utils.model.vision import VisionFeatures, load_vision, see

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class CachedControls:
    """The images to edit of an example, ready for training: each one's latents and features, and their sizes."""

    latents: tuple[Tensors, ...] = ()  # latents [M, C] fp32 of each
    features: tuple[Tensors, ...] = ()  # states [V, D] of each
    sizes: tuple[Size, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of each one's features
    key: str = ""  # of the images' content and all else that the features follow from

    @property
    def tokens(self) -> int:
        """The image tokens that they take in the transformer, M."""
        return sum(size.tokens for size in self.sizes)

    @property
    def text_tokens(self) -> int:
        """The text tokens that they take: those of their features, of their marks and of their labels."""
        return sum(rows * columns for rows, columns in self.grids)

    def load(self) -> Controls:
        """Read them from the store."""
        if not self.sizes:
            return no_controls()
        seen = [VisionFeatures(own["states"], *grid) for own, grid in zip(self.features, self.grids, strict=True)]
        tokens = torch.cat([own["latents"] for own in self.latents])  # [M, C]
        return Controls(ControlLatents(tokens, self.sizes), tuple(seen), self.key)


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """What the text encoder sees of an image to edit: states [V, D] in a grid, kept under a key."""

    tensors: Tensors
    rows: int
    columns: int
    key: str


def seen_of(controls: Sequence[ControlImage], features: Mapping[ControlImage, CachedFeatures]) -> Controls:
    """Return what the text encoder sees of images to edit, and its key, without their latents."""
    own = [features[control] for control in controls]
    seen = tuple(VisionFeatures(each.tensors["states"], each.rows, each.columns) for each in own)
    return replace(no_controls(), seen=seen, key=" ".join(each.key for each in own))


def cache_features(
    examples: Sequence[Example], folder: Path, variant: Variant, placement: Placement, store: TensorStore
) -> dict[ControlImage, CachedFeatures]:
    """Return what the text encoder sees of all images to edit, the mirrored ones of examples that may be so too.

    The vision tower is loaded only if some of them are new, and is freed at the end.
    """
    images = [control for example in examples for control in example.controls]
    images += [replace(each, mirrored=True) for example in examples if example.flip for each in example.controls]
    controls = list(dict.fromkeys(images))
    if not controls:
        return {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(
            zip(controls, pool.map(digest_files, [(each.image_path, None) for each in controls]), strict=True)
        )
    follows_from = {
        "of": "vision, 1",
        "encoder": folder_fingerprint(folder / "text_encoder"),
        "processor": folder_fingerprint(folder / "processor"),
        "by": transformers.__version__,
        "pillow": PIL.__version__,
        **arithmetic(placement),
    }
    keys = {
        control: content_key(
            **follows_from,
            file=digests[control],
            mirrored=control.mirrored,
            area=variant.vision_area_px or str(control.size),
        )
        for control in controls
    }
    found = {key: store.get(key) for key in dict.fromkeys(keys.values())}
    new = {key: control for control, key in keys.items() if found[key] is None}
    if new:
        vision, progress = load_vision(folder, placement), Progress(len(new), _LOG_EVERY_S)
        for count, (key, control) in enumerate(new.items(), start=1):
            (own,) = see(vision, [control.shown(variant.vision_area_px)])
            grid = torch.tensor([own.rows, own.columns])
            found[key] = store.put(key, {"states": own.states.cpu().clone(), "grid": grid})
            if progress.should_log(count) and 1 < count < len(new):
                log.info("seen %d of %d images to edit", count, len(new))
        del vision
        release_memory()
    features = {}
    for control, key in keys.items():
        tensors = found[key]
        assert tensors is not None
        rows, columns = tensors["grid"].tolist()
        features[control] = CachedFeatures(tensors, rows, columns, key)
    return features
