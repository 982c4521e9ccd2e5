"""Picture files -> upright pixels in sRGB, whatever camera, scanner or program made them.

Owns formats, orientation, colour and transparency; must not know captions, buckets or models.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps
from pillow_heif import register_heif_opener

from lora_utils.errors import UserError

register_heif_opener()  # teaches Pillow .heic and .heif; avif it reads by itself

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")  # of the content, whatever its name says
MAX_PIXELS = 100_000_000  # 100 megapixels: 300 MB once decoded
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own guard, for what a decoder makes of a file on its way

# What Pillow's decoders have been seen to raise for bytes that aren't a picture.
_DECODER_ERRORS = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip

_SRGB = ImageCms.createProfile("sRGB")


def open_picture(path: Path) -> Image.Image:
    """The picture upright, in sRGB, transparency laid on white; of a moving one the first frame. Errors as below."""
    with _errors_named(path):
        return _in_srgb(open_upright(path))


def open_alpha(path: Path) -> Image.Image | None:
    """Its alpha, upright and in greyscale: white is opaque. None where nothing can be transparent. Errors as below."""
    with _errors_named(path):
        upright = open_upright(path)
        return upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None


def open_upright(path: Path) -> Image.Image:
    """Decoded and turned upright, in its own mode.

    Raises UserError for what can't be read, or has more pixels than `MAX_PIXELS`, which is found before it is decoded.
    """
    with _errors_named(path), Image.open(path, formats=_FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise UserError(
                f"picture {path.name} has {opened.width}x{opened.height} pixels; scale it down to "
                f"{MAX_PIXELS // 10**6} megapixels or less."
            )
        upright = ImageOps.exif_transpose(opened)
        upright.load()
        return upright


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn what a decoder raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit is twice ours, and is met on opening
        limit = f"{MAX_PIXELS // 10**6} megapixels"
        raise UserError(f"picture {path.name} has more than {limit}; scale it down.") from error
    except _DECODER_ERRORS as error:
        raise UserError(f"picture {path.name} can't be read ({error}); save it anew as JPEG or PNG.") from error


def _in_srgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return _by_profile(seen, profile) if picture.mode in ("RGBA", "P") else seen
    if picture.mode.startswith("I"):
        picture = in_8_bits(picture)
    if picture.mode in ("P", "1"):
        picture = picture.convert("RGB")
    return _by_profile(picture, profile).convert("RGB")


def in_8_bits(picture: Image.Image) -> Image.Image:
    """A greyscale picture of 16 bits; Pillow alone would clip it at 255."""
    levels = np.asarray(picture).astype(np.int64)
    return Image.fromarray((levels.clip(0, 65535) / 257).round().astype(np.uint8))


def _by_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Converted by its embedded ICC profile. One that is damaged or of another colour space is as good as none."""
    if not profile:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, source, _SRGB, outputMode="RGB") or picture
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture


def difference_hash(picture: Image.Image) -> bytes:
    """256 bits that near-equal pictures share: whether each of 16 x 16 places is brighter than its right neighbour."""
    levels = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(levels[:, 1:] < levels[:, :-1]).tobytes()
