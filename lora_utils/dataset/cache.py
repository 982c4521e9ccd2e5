"""Examples -> tensors, in one pass: what a run can compute once, it computes here, and finds it in the next run.

Captions are `text_cache`'s, and what the text encoder sees of images to edit is `feature_cache`'s.

Legend: N image tokens, C packed channels (64).
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import PIL
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from lora_utils.dataset.cache_keys import arithmetic, digest_files
from lora_utils.dataset.examples import ControlImage, Example
from lora_utils.dataset.feature_cache import CachedControls, CachedFeatures
from lora_utils.io.logging import Progress
from lora_utils.io.tensor_store import Tensors, TensorStore, content_key, folder_fingerprint
from lora_utils.model.device import Placement, release_memory
from lora_utils.model.latents import Size
from lora_utils.model.vae import encode_images, load_vae

log = logging.getLogger(__name__)

# Images are encoded in batches of about this many pixels. A bucket's batches are all of one size, the last filled up
# with blanks: so an image's latents don't depend on which others are new today.
BATCH_PIXELS, MOST_AT_ONCE = 1024 * 1024, 8
_LOG_EVERY_S = 10.0


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
    features: Mapping[ControlImage, CachedFeatures] | None = None,
) -> list[CachedExample]:
    """Return each example's latents, and those of its images to edit.

    The VAE is loaded only if some of them are new, and is freed at the end. `features` are those of `cache_features`.
    """
    features = features or {}
    turned = [replace(example, mirrored=True) for example in examples if example.flip]
    latents = _cache_latents([*examples, *turned, *features], folder, placement, store)
    return [_cached(example, latents, features) for example in examples]


@dataclass(frozen=True, slots=True)
class _Latents:
    """An image's entry of the cache, and its key."""

    tensors: Tensors
    key: str


def _cache_latents(
    images: Sequence[Example | ControlImage], folder: Path, placement: Placement, store: TensorStore
) -> dict[Example | ControlImage, _Latents]:
    """Return the latents of each image, and encode those that are new."""
    keys = _example_keys(images, folder / "vae", placement)
    found = {key: store.get(key) for key in dict.fromkeys(keys)}
    new = {key: image for key, image in zip(keys, images, strict=True) if found[key] is None}
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
    entries = {key: _Latents(tensors, key) for key, tensors in found.items() if tensors is not None}
    return {image: entries[key] for key, image in zip(keys, images, strict=True)}


def _cached(
    example: Example,
    latents: Mapping[Example | ControlImage, _Latents],
    features: Mapping[ControlImage, CachedFeatures],
) -> CachedExample:
    """Put an example together, with its mirrored image and its images to edit."""

    def controls(mirrored: bool) -> CachedControls | None:
        own = [replace(control, mirrored=mirrored) for control in example.controls]
        seen = [features[control] for control in own]
        if not own:
            return None
        return CachedControls(
            tuple(latents[control].tensors for control in own),
            tuple(each.tensors for each in seen),
            tuple(control.size for control in own),
            tuple((each.rows, each.columns) for each in seen),
            " ".join(each.key for each in seen),
        )

    return CachedExample(
        latents[example].tensors,
        example.caption,
        example.size,
        example.image_path.name,
        latents[example].key,
        example.repeats,
        latents[replace(example, mirrored=True)].tensors if example.flip else None,
        example.regularisation,
        controls(mirrored=False),
        controls(mirrored=True) if example.flip else None,
    )


def _example_keys(examples: Sequence[Example | ControlImage], vae: Path, placement: Placement) -> list[str]:
    files = {(example.image_path, example.mask_path) for example in examples}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(files, pool.map(digest_files, files), strict=True))
    follows_from = {
        "of": "latents, 1",
        "vae": folder_fingerprint(vae),
        "pillow": PIL.__version__,
        **arithmetic(placement),
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
