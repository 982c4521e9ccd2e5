"""Finished pictures -> files with their settings embedded. Owns formats and names; must not know models."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_UNICODE = b"UNICODE\0"  # the marker that EXIF wants before a comment in UTF-16


def save_picture(
    picture: Image.Image, folder: Path, name: str, output_format: str, quality: int,
    settings: Mapping[str, object] | None,
) -> Path:  # fmt: skip
    """Write `name`.`output_format` into `folder`. Settings go into PNG's text chunk or EXIF's user comment, as JSON."""
    path = folder / f"{name}.{output_format}"
    text = json.dumps(settings, ensure_ascii=False)
    if settings is None:
        picture.save(path, quality=quality)
    elif output_format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        picture.save(path, pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
        picture.save(path, quality=quality, exif=exif)
    return path


def read_settings(path: Path) -> dict[str, object]:
    """The settings that `save_picture` embedded; empty where there are none."""
    with Image.open(path) as picture:
        text = picture.info.get("parameters")
        if text is None:
            comment = picture.getexif().get_ifd(_EXIF_IFD).get(_EXIF_USER_COMMENT, b"")
            text = comment.removeprefix(_UNICODE).decode("utf-16-be")
    return json.loads(text) if text else {}
