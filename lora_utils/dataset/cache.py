"""Examples -> tensors, in one pass: what a run can compute once, it computes here, and finds it in the next run.

This module owns what an entry of the cache follows from, and which captions can be encoded beforehand.

Legend: N image tokens, C packed channels (64), T text tokens, D the text encoder's width.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import PIL
import torch
import transformers
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils.dataset.examples import ControlImage, Example
from lora_utils.io.logging import Progress
from lora_utils.io.tensor_store import Tensors, TensorStore, content_key, folder_fingerprint
from lora_utils.model.controls import Controls, no_controls
from lora_utils.model.device import Placement, release_memory
from lora_utils.model.latents import ControlLatents, Size
from lora_utils.model.text_encoder import Prompt, encode_text, prompt_ids
from lora_utils.model.vae import encode_images, load_vae
from lora_utils.model.variant import TEXT_TO_IMAGE, Variant
from lora_utils.model.vision import VisionFeatures, load_vision, see
from lora_utils.placeholder.tokens import no_placeholders

log = logging.getLogger(__name__)

# Images are encoded in batches of about this many pixels. A bucket's batches are all of one size, the last filled up
# with blanks: so an image's latents don't depend on which others are new today.
BATCH_PIXELS, MOST_AT_ONCE = 1024 * 1024, 8
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
class CachedExample:
    """One image in one bucket, ready for training. Its text is looked up by the caption."""

    tensors: Tensors  # latents [N, C] fp32, normalised; shares [N, 4] where there is a mask
    caption: str
    size: Size
    image_name: str
    key: str = ""  # of the image's content and all else that its latents follow from
    repeats: int = 1  # how often an epoch shows it
    mirror: Tensors | None = None  # the same of the mirrored image, where that may be shown
    regularisation: bool = False  # it shows the class, not what is taught
    controls: CachedControls | None = None  # that it was made of, where the base model edits
    mirror_controls: CachedControls | None = None

    @property
    def layout(self) -> tuple[Size, ...]:
        """The sizes of all images that the transformer is given: the bucket's, and those of the images to edit."""
        return (self.size, *(self.controls.sizes if self.controls else ()))

    @property
    def flip(self) -> bool:
        """Whether it may be shown mirrored."""
        return self.mirror is not None

    def turned(self, mirrored: bool) -> "CachedExample":
        """Return it, or its mirrored image."""
        if not mirrored or self.mirror is None:
            return self
        return replace(self, tensors=self.mirror, mirror=None, controls=self.mirror_controls)

    @property
    def latents(self) -> Tensor:
        """The normalised packed latents [N, C], fp32."""
        return self.tensors["latents"]

    @property
    def shares(self) -> Tensor | None:
        """The share of each latent that is to be learned, [N, 4]; None means all of it."""
        return self.tensors.get("shares")


# --- images -------------------------------------------------------------------------------------------------------


def cache_examples(
    examples: Sequence[Example],
    folder: Path,
    placement: Placement,
    store: TensorStore,
    features: Mapping[ControlImage, "CachedFeatures"] | None = None,
) -> list[CachedExample]:
    """Return each example's latents, and those of its images to edit.

    The VAE is loaded only if some of them are new, and is freed at the end. `features` are those of `cache_features`.
    """
    turned = [replace(example, mirrored=True) for example in examples if example.flip]
    controls = list(features or {})
    images: list[Example | ControlImage] = [*examples, *turned, *controls]
    keys = _example_keys(images, folder / "vae", placement)
    found = {key: store.get(key) for key in dict.fromkeys(keys)}
    new = {key: example for key, example in zip(keys, images, strict=True) if found[key] is None}
    if new:
        vae, progress = load_vae(folder, placement), Progress(len(new), _LOG_EVERY_S)
        for count, (key, tensors) in enumerate(_encoded(vae, new), start=1):
            found[key] = store.put(key, tensors)
            if progress.should_log(count) and 1 < count < len(new):
                log.info("encoded %d of %d images", count, len(new))
        del vae
        release_memory()
    if len(new) < len(found):
        log.info("%d of %d encoded images were in the cache", len(found) - len(new), len(found))
    mirrors = iter(keys[len(examples) :])
    control_latents = dict(zip(controls, keys[len(keys) - len(controls) :], strict=True))

    def given(example: Example, mirrored: bool) -> CachedControls | None:
        """Return an example's images to edit; None where there are none."""
        if not example.controls:
            return None
        own = [replace(control, mirrored=mirrored) for control in example.controls]
        latents = [found[control_latents[control]] for control in own]
        seen = [(features or {})[control] for control in own]
        return CachedControls(
            tuple(each for each in latents if each is not None),
            tuple(each.tensors for each in seen),
            tuple(control.size for control in own),
            tuple((each.rows, each.columns) for each in seen),
            " ".join(each.key for each in seen),
        )

    cached = []
    for key, example in zip(keys, examples, strict=False):
        tensors, mirror = found[key], found[next(mirrors)] if example.flip else None
        assert tensors is not None
        cached.append(
            CachedExample(
                tensors,
                example.caption,
                example.size,
                example.image_path.name,
                key,
                example.repeats,
                mirror,
                example.regularisation,
                given(example, mirrored=False),
                given(example, mirrored=True) if example.flip else None,
            )
        )
    return cached


def _example_keys(examples: Sequence[Example | ControlImage], vae: Path, placement: Placement) -> list[str]:
    files = {(example.image_path, example.mask_path) for example in examples}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(files, pool.map(_digest, files), strict=True))
    follows_from = {
        "of": "latents, 1",
        "vae": folder_fingerprint(vae),
        "pillow": PIL.__version__,
        **_arithmetic(placement),
    }
    return [
        content_key(
            **follows_from,
            files=digests[example.image_path, example.mask_path],
            size=str(example.size),
            masked=example.masked,
            **({"mirrored": True} if example.mirrored else {}),  # the others' keys stay what they were
            **({"to": "edit"} if isinstance(example, ControlImage) else {}),
        )
        for example in examples
    ]


def _digest(files: tuple[Path, Path | None]) -> str:
    digests = []
    for path in (path for path in files if path is not None):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def _arithmetic(placement: Placement) -> dict[str, str]:
    """Return what rounds a result this way or another."""
    return {"device": placement.device.type, "dtype": str(placement.dtype), "torch": torch.__version__}


def encode_batch_size(size: Size) -> int:
    """Return how many images of a size are encoded together."""
    return max(1, min(MOST_AT_ONCE, BATCH_PIXELS // (size.width_px * size.height_px)))


def _encoded(
    vae: AutoencoderKLQwenImage, new: Mapping[str, Example | ControlImage]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (key, tensors) of examples, bucket by bucket. While one batch is encoded, the next is read and decoded."""
    batches = []
    for size, keys in groupby(sorted(new, key=lambda key: new[key].size), key=lambda key: new[key].size):
        bucket, count = list(keys), encode_batch_size(size)
        batches += [bucket[start : start + count] for start in range(0, len(bucket), count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        coming: list[Future[tuple[Tensor, Tensor | None]]] = []
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            read = [future.result() for future in coming or [pool.submit(_read, new[key]) for key in batch]]
            coming = [pool.submit(_read, new[key]) for key in following]
            pixels = torch.zeros(encode_batch_size(new[batch[0]].size), *read[0][0].shape)
            for index, (own, _) in enumerate(read):
                pixels[index] = own
            latents = encode_images(vae, pixels).cpu()  # [B, N, C]
            for index, key in enumerate(batch):
                shares = read[index][1]
                yield key, {"latents": latents[index].clone()} | ({} if shares is None else {"shares": shares})


def _read(example: Example | ControlImage) -> tuple[Tensor, Tensor | None]:
    return example.pixels(), example.shares()


# --- what the text encoder sees -------------------------------------------------------------------------------------


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
        digests = dict(zip(controls, pool.map(_digest, [(each.image_path, None) for each in controls]), strict=True))
    follows_from = {
        "of": "vision, 1",
        "encoder": folder_fingerprint(folder / "text_encoder"),
        "processor": folder_fingerprint(folder / "processor"),
        "by": transformers.__version__,
        "pillow": PIL.__version__,
        **_arithmetic(placement),
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


# --- captions -------------------------------------------------------------------------------------------------------


class CachedTexts(Mapping[str, Tensor]):
    """Caption -> states [T, D] on the CPU, read when they are asked for."""

    def __init__(self, entries: Mapping[str, Tensors]):
        self._entries = entries

    def __getitem__(self, caption: str) -> Tensor:
        return self._entries[caption]["states"]

    def __contains__(self, caption: object) -> bool:  # Mapping's own would read the states
        return caption in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True, slots=True)
class FixedCaptions:
    """Prompts without a placeholder token, whose states never change: what was found of them, and the rest's keys."""

    found: dict[str, Tensors]
    new: dict[str, tuple[str, Prompt]]


def find_captions(
    prompts: Mapping[str, Prompt],
    tokenizer: Qwen2Tokenizer,
    folder: Path,
    placement: Placement,
    store: TensorStore,
    variant: Variant = TEXT_TO_IMAGE,
) -> FixedCaptions:
    """Look prompts up, each by its `text_key`; `encode_captions` adds those that are new."""
    source = folder / "text_encoder"
    follows_from = {
        "of": "text, 1",
        "encoder": folder_fingerprint(source),
        "by": transformers.__version__,
        **_arithmetic(placement),
    }
    keys = {
        name: content_key(
            **follows_from,
            drop=variant.prefix_tokens,
            ids=prompt_ids(tokenizer, prompt, no_placeholders(), variant),
            **({"seen": name.partition("\0")[2]} if prompt.images else {}),
        )
        for name, prompt in prompts.items()
    }
    found = {caption: tensors for caption, key in keys.items() if (tensors := store.get(key)) is not None}
    if found:
        log.info("%d of %d encoded captions were in the cache", len(found), len(keys))
    return FixedCaptions(found, {name: (key, prompts[name]) for name, key in keys.items() if name not in found})


@torch.no_grad()
def encode_captions(
    fixed: FixedCaptions,
    text_encoder: Qwen2_5_VLTextModel | None,
    tokenizer: Qwen2Tokenizer,
    store: TensorStore,
    variant: Variant = TEXT_TO_IMAGE,
) -> CachedTexts:
    """Encode the new captions one at a time, as prediction does, so that both are the same bit for bit. -> all"""
    entries = dict(fixed.found)
    progress = Progress(len(fixed.new), _LOG_EVERY_S)
    for count, (name, (key, prompt)) in enumerate(fixed.new.items(), start=1):
        if text_encoder is None:
            raise RuntimeError(f"{len(fixed.new)} captions are new, and there is no text encoder")
        states = encode_text(text_encoder, tokenizer, [prompt], no_placeholders(), variant).states[0].cpu()
        entries[name] = store.put(key, {"states": states.clone()})
        if progress.should_log(count) and 1 < count < len(fixed.new):
            log.info("encoded %d of %d captions", count, len(fixed.new))
    return CachedTexts(entries)
