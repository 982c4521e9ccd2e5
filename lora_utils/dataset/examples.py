"""Examples: one image in one bucket each, and the dataset that they make up.

Legend: N image tokens.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from lora_utils.errors import UserError
from lora_utils.io.images import load_pixels, open_alpha, open_crop, open_image, open_mask, to_pixels
from lora_utils.model.latents import Size, mask_shares
from lora_utils.model.vision import resized


@dataclass(frozen=True, slots=True)
class ControlImage:
    """An image to edit, scaled to its own size: nothing of it is cropped, as in sampling."""

    image_path: Path
    size: Size
    mirrored: bool = False
    masked: bool = False  # never: the loss counts the target alone
    mask_path: Path | None = None

    def pixels(self) -> Tensor:
        """Return the image as a tensor [3, H, W], fp32 in -1 to 1."""
        pixels = to_pixels(open_image(self.image_path).resize(self.size.pixels, Image.Resampling.LANCZOS))
        return pixels.flip(-1) if self.mirrored else pixels

    def shares(self) -> None:
        """Return that nothing of it is masked."""

    def shown(self, area_px: int | None) -> Image.Image:
        """Return the image as the text encoder sees it, scaled to an area; None: to its size."""
        image = open_image(self.image_path)
        image = ImageOps.mirror(image) if self.mirrored else image
        return image.resize(self.size.pixels, Image.Resampling.LANCZOS) if area_px is None else resized(image, area_px)


@dataclass(frozen=True, slots=True)
class Example:
    """One image in one bucket: an image is an example for each resolution that it fills."""

    image_path: Path
    caption: str
    size: Size
    mask_path: Path | None = None
    masked: bool = False  # by that file, or else by its own alpha
    repeats: int = 1  # how often an epoch shows it
    flip: bool = False  # it may be shown mirrored
    mirrored: bool = False  # it is
    regularisation: bool = False  # it shows the class, not what is taught
    controls: tuple[ControlImage, ...] = ()  # that it was made of, for a base model that edits

    @property
    def layout(self) -> tuple[Size, ...]:
        """The sizes of all images that the transformer is given: the bucket's, and those of the images to edit."""
        return (self.size, *(control.size for control in self.controls))

    def crop(self) -> Image.Image:
        """Return the image as it fills the bucket. Raises UserError for a file that can't be read any more."""
        return open_crop(self.image_path, self.size.pixels)

    def pixels(self) -> Tensor:
        """Return the same as a tensor [3, H, W], fp32 in -1 to 1."""
        pixels = load_pixels(self.image_path, self.size.pixels)
        return pixels.flip(-1) if self.mirrored else pixels

    def shares(self) -> Tensor | None:
        """Return what share of each latent is to be learned, [N, 4] in 0 to 1; None where all of the image is."""
        if not self.masked:
            return None
        mask = open_mask(self.mask_path) if self.mask_path else open_alpha(self.image_path)
        if mask is None:
            raise UserError(f"image {self.image_path.name} has no alpha.")
        return mask_shares(ImageOps.mirror(mask) if self.mirrored else mask, self.size)


@dataclass(frozen=True, slots=True)
class Dataset:
    """`num_images` images as examples, the names of files that were neither image nor caption, and remarks."""

    examples: list[Example]
    num_images: int
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # for which a training would refuse it
    uncaptioned: frozenset[Path] = frozenset()  # the images whose caption is the default one
    folder: Path = Path()
    sizes_px: Mapping[Path, tuple[int, int]] = field(default_factory=dict)  # width and height of each image
    token_counts: Mapping[str, int] = field(default_factory=dict)  # by caption; empty where no tokenizer was there

    @property
    def captions(self) -> list[str]:
        """The captions of the images, in the images' order."""
        return list(self.captions_by_image.values())

    @property
    def captions_by_image(self) -> dict[Path, str]:
        """The caption of each image."""
        return {example.image_path: example.caption for example in self.examples}

    @property
    def taught(self) -> dict[Path, str]:
        """The caption of each image that shows what is taught."""
        return {example.image_path: example.caption for example in self.examples if not example.regularisation}

    def with_captions(self, captions: Mapping[Path, str]) -> "Dataset":
        """Return the dataset with these captions in place of its own; no image is without one then."""
        examples = [replace(e, caption=captions.get(e.image_path, e.caption)) for e in self.examples]
        return replace(self, examples=examples, uncaptioned=frozenset())

    def split(self, share: float) -> tuple["Dataset", "Dataset"]:
        """Split into images to learn from and a share held out to measure on: the same ones for the same names.

        The images held out are measured in their smallest size, which is enough to compare by and costs least. There
        is at least one image of each kind, unless the share is 0. Regularisation images are never held out. Raises
        UserError for a single image.
        """
        images = list(self.taught)
        if share and len(images) == 1:
            raise UserError("validation_share holds images out, and there is only one; set it to 0, or add some.")
        count = min(len(images) - 1, max(1, round(share * len(images)))) if share else 0
        names = {path: str(path.relative_to(self.folder)).encode() for path in images}
        chosen = set(sorted(images, key=lambda path: hashlib.sha256(names[path]).digest())[:count])
        parts = []
        for wanted in (False, True):
            own = [example for example in self.examples if (example.image_path in chosen) == wanted]
            if wanted:
                smallest = {e.image_path: e.size for e in sorted(own, key=lambda e: e.size.tokens, reverse=True)}
                own = [replace(e, repeats=1) for e in own if e.size == smallest[e.image_path]]
            count = len({example.image_path for example in own if not example.regularisation})
            parts.append(replace(self, examples=own, num_images=count))
        return parts[0], parts[1]


def listed_names(names: list[str], count: int = 5) -> str:
    """Return the first of these names as a text that says how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
