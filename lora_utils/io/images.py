"""Image files in and out: upright pixels in sRGB from whatever made a file, and finished images with their settings.

This module owns formats, orientation, colour and transparency. It doesn't know captions, buckets or models.
`io.libraries.configure_libraries` must have run for heic to be read.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from lora_utils.errors import UserError

_JPEG_ENDINGS = (".jpg", ".jpeg", ".jfif", ".jpe")
IMAGE_ENDINGS = (*_JPEG_ENDINGS, ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")  # of the content, whatever its name says
MAX_PIXELS = 100_000_000  # 100 megapixels: 300 MB once decoded
MASK_ASPECT_SLACK = 0.02  # by which a mask's aspect ratio may differ from its image's: the rounding of a smaller one

# What Pillow's decoders have been seen to raise for bytes that aren't an image.
_DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_SRGB = ImageCms.createProfile("sRGB")
_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_MAX_EXIF_BYTES = 65_000  # JPEG keeps EXIF in one segment of 65 535 bytes; the rest is for its own fields
_UNICODE = b"UNICODE\0"  # the marker that EXIF wants before a comment in UTF-16


# --- reading --------------------------------------------------------------------------------------------------------


def open_image(path: Path) -> Image.Image:
    """Return the image upright, in sRGB, with transparency laid on white; of an animation its first frame.

    Raises UserError for what can't be read.
    """
    with _decoder_errors(path):
        return _to_srgb(open_upright(path))


def open_alpha(path: Path) -> Image.Image | None:
    """Return an image's alpha, upright and in greyscale: white is opaque. None where nothing can be transparent.

    Raises UserError for what can't be read.
    """
    with _decoder_errors(path):
        upright = open_upright(path)
        return upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None


def open_mask(path: Path) -> Image.Image:
    """Return a mask in greyscale: white where the loss counts in full; what is transparent counts as black.

    Raises UserError for what can't be read.
    """
    upright = open_upright(path)
    if not upright.has_transparency_data:
        return (to_8_bits(upright) if upright.mode.startswith("I") else upright).convert("L")
    rgba = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("L")


def mask_problem(mask: Image.Image, name: str, image_px: tuple[int, int]) -> str:
    """Say what is wrong with a mask for an image of this width and height. An empty text means nothing is."""
    (width, height), (own_width, own_height) = image_px, mask.size
    if abs(own_width * height / (own_height * width) - 1) > MASK_ASPECT_SLACK:
        return f"mask {name} has {own_width}x{own_height} pixels, its image {width}x{height}; they must show the same."
    if not np.asarray(mask).any():
        return f"mask {name} is black all over; paint white what counts."
    return ""


def open_upright(path: Path) -> Image.Image:
    """Return an image decoded and turned upright, in its own mode.

    Raises UserError for what can't be read, or has more pixels than `MAX_PIXELS`, which is found before it is decoded.
    """
    with _decoder_errors(path), Image.open(path, formats=_FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise UserError(
                f"image {path.name} has {opened.width}x{opened.height} pixels; scale it down to "
                f"{MAX_PIXELS // 10**6} megapixels or less."
            )
        if opened.mode in ("I", "F"):
            raise UserError(
                f"image {path.name} has numbers of 32 bits, and nothing says which is white; save it with 8 or 16."
            )
        upright = ImageOps.exif_transpose(opened)
        upright.load()
        return upright


def open_crop(path: Path, size_px: tuple[int, int]) -> Image.Image:
    """Return the image scaled to cover this width and height, and cropped about the centre."""
    return ImageOps.fit(open_image(path), size_px, Image.Resampling.LANCZOS)


def load_pixels(path: Path, size_px: tuple[int, int]) -> Tensor:
    """Return the same crop as a tensor [3, H, W], fp32 in -1 to 1."""
    return to_pixels(open_crop(path, size_px))


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as a tensor [3, H, W], fp32 in -1 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0  # [3, H, W]


def difference_hash(image: Image.Image) -> bytes:
    """Return 256 bits that near-equal images share: whether each of 16 x 16 areas is brighter than its right one."""
    levels = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(levels[:, 1:] < levels[:, :-1]).tobytes()


def thumbnail(image: Image.Image) -> bytes:
    """Return the mean colours of 32 x 32 areas, [32, 32, 3] in bytes: by them drawings in other colours differ."""
    return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX)).tobytes()


@contextmanager
def _decoder_errors(path: Path) -> Iterator[None]:
    """Turn what a decoder raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit is twice ours, and is met on opening
        limit = f"{MAX_PIXELS // 10**6} megapixels"
        raise UserError(f"image {path.name} has more than {limit}; scale it down.") from error
    except _DECODER_ERRORS as error:
        why = str(error).replace(str(path), path.name)  # Pillow names the file with the folder that it lies in
        raise UserError(f"image {path.name} can't be read ({why}); save it again as JPEG or PNG.") from error


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return _by_profile(seen, profile) if image.mode in ("RGBA", "P") else seen
    if image.mode.startswith("I"):
        image = to_8_bits(image)
    if image.mode in ("P", "1"):
        image = image.convert("RGB")
    return _by_profile(image, profile).convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a greyscale image of 16 bits down to 8; Pillow alone would clip it at 255."""
    levels = np.asarray(image).astype(np.int64)
    return Image.fromarray((levels.clip(0, 65535) / 257).round().astype(np.uint8))


def _by_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image by its embedded ICC profile. A damaged one, or one of another colour space, counts as none."""
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


# --- writing --------------------------------------------------------------------------------------------------------


def fit_settings(settings: Mapping[str, object], file_format: str) -> tuple[dict[str, object], bool]:
    """Return settings that fit into a format's metadata, with its longest texts cut; and whether any was."""
    fitted, cut = dict(settings), False
    while file_format == "jpg" and len(json.dumps(fitted, ensure_ascii=False).encode("utf-16-be")) > _MAX_EXIF_BYTES:
        texts = {name: value for name, value in fitted.items() if isinstance(value, str)}
        name = max(texts, key=lambda each: len(texts[each]))
        fitted[name], cut = texts[name][: len(texts[name]) // 2], True
    return fitted, cut


def save_image(image: Image.Image, path: Path, quality: int, settings: Mapping[str, object] | None) -> Path:
    """Write an image in the format of the path's ending, webp, jpg or png. -> `path`

    Settings are embedded as JSON, in PNG's text chunk or EXIF's user comment.
    """
    text = json.dumps(settings, ensure_ascii=False)
    if settings is None:
        image.save(path, quality=quality)
    elif path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        image.save(path, pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
        image.save(path, quality=quality, exif=exif)
    return path


def read_settings(path: Path) -> dict[str, object]:
    """Return the settings that `save_image` embedded; empty where there are none."""
    with Image.open(path) as image:
        text = image.info.get("parameters")
        if text is None:
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_EXIF_USER_COMMENT, b"")
            text = comment.removeprefix(_UNICODE).decode("utf-16-be")
    return json.loads(text) if text else {}
