"""A folder of pictures and captions -> checked `Example`s, and a picture -> pixels.

Owns captions, EXIF, transparency, the choice of buckets and the report on what was found; must not know models.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from torch import Tensor

from lora_utils.archive import is_litter
from lora_utils.errors import UserError
from lora_utils.sizes import Size, choose_buckets

register_heif_opener()  # teaches Pillow .heic and .heif; avif it reads by itself

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".heic", ".heif")
MAX_CAPTION_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One picture in one bucket: a picture stands once for each resolution that it fills."""

    image_path: Path
    caption: str
    size: Size


@dataclass(frozen=True, slots=True)
class Dataset:
    """`num_images` pictures as examples, and the names of the files that were neither picture nor caption."""

    examples: list[Example]
    num_images: int
    left_out: list[str]

    @property
    def captions(self) -> list[str]:
        """One a picture, in the pictures' order."""
        return list({example.image_path: example.caption for example in self.examples}.values())


def open_picture(path: Path) -> Image.Image:
    """The picture upright, in RGB, transparency laid on white. Raises UserError for what can't be read."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            return upright.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {path.name} can't be read ({error}); save it anew as JPEG or PNG.") from error


def load_pixels(example: Example) -> Tensor:
    """[3, H, W] fp32 in -1 to 1, scaled to cover the example's bucket and cropped about the centre."""
    target = (example.size.width_px, example.size.height_px)
    fitted = ImageOps.fit(open_picture(example.image_path), target, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0  # [3, H, W]


def read_caption(picture: Path, default: str) -> str:
    """The text of NAME.txt beside the picture; the default where there is none or it is empty."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return default
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise UserError(f"caption {path.name} has {path.stat().st_size} bytes; captions end at {MAX_CAPTION_BYTES}.")
    try:
        return path.read_text(encoding="utf-8-sig").strip() or default
    except UnicodeDecodeError as error:
        raise UserError(f"caption {path.name} isn't UTF-8 text ({error}); save it as UTF-8.") from error


def read_dataset(folder: Path, resolutions_px: tuple[int, ...], default_caption: str) -> Dataset:
    """Find and check every picture below `folder`, in the order of their paths.

    Raises UserError naming the file for a picture or caption that can't be read, and for a folder without pictures.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if not is_litter(PurePosixPath(path.relative_to(folder)))]
    pictures = [path for path in own if path.suffix.lower() in PICTURE_ENDINGS]
    captions = {path.with_suffix(".txt") for path in pictures}
    left_out = [str(path.relative_to(folder)) for path in own if path not in captions and path not in pictures]
    if not pictures:
        found = ", ".join(left_out[:5]) or "nothing"
        raise UserError(f"the dataset holds no pictures ({', '.join(PICTURE_ENDINGS)}); it holds {found}.")
    examples = []
    for path in pictures:
        width_px, height_px = open_picture(path).size
        caption = read_caption(path, default_caption)
        examples += [Example(path, caption, size) for size in choose_buckets(width_px, height_px, resolutions_px)]
    return Dataset(examples, len(pictures), left_out)


def describe(dataset: Dataset, passes: float) -> list[str]:
    """The report on a dataset, line by line. `passes` is how often a run shows each picture."""
    lines = [f"dataset: {dataset.num_images} pictures, each seen about {passes:.0f} times"]
    for size, count in sorted(Counter(example.size for example in dataset.examples).items()):
        lines.append(f"  bucket {size}: {count} pictures")
    empty = sum(not caption for caption in dataset.captions)
    if empty:
        lines.append(f"  {empty} pictures have no caption; set default_caption or add NAME.txt")
    if dataset.left_out:
        lines.append(f"  left out, neither picture nor caption: {_first(dataset.left_out)}")
    return lines


def _first(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
