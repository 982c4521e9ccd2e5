"""Contact sheets: images under their captions as one image, and the sheets in a run's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lora_utils.io.files import atomic_path, disk_errors

SHEET_FOLDER = "samples"
_LABEL_PX, _MARGIN_PX, _LEAST_SIDE_PX = 14, 8, 256


def draw_sheet(labels: Sequence[Sequence[str]], images: Sequence[Sequence[Image.Image]], title: str) -> Image.Image:
    """Return rows of images under their labels; small ones are all enlarged alike, without smoothing."""
    font, shown = ImageFont.load_default(_LABEL_PX), [image for row in images for image in row]
    width, height = max(image.width for image in shown), max(image.height for image in shown)
    times = max(1, -(-_LEAST_SIDE_PX // width))
    line, columns = _LABEL_PX + 6, max(map(len, images))
    cell_width, cell_height = times * width + _MARGIN_PX, times * height + line + _MARGIN_PX
    canvas = Image.new("RGB", (columns * cell_width + _MARGIN_PX, len(images) * cell_height + line), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN_PX, 2), title, "black", font)
    for index, (row_labels, row_images) in enumerate(zip(labels, images, strict=True)):
        for column, (label, image) in enumerate(zip(row_labels, row_images, strict=True)):
            left, top = _MARGIN_PX + column * cell_width, line + index * cell_height
            pen.text((left, top), _shortened(label, pen, font, times * width), "black", font)
            enlarged = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, top + line))
    return canvas


def _shortened(text: str, pen: ImageDraw.ImageDraw, font: Any, width_px: int) -> str:
    """Return as much of a text as fits into a width."""
    if pen.textlength(text, font) <= width_px:
        return text
    count = next((n for n in range(len(text), 0, -1) if pen.textlength(text[:n] + "...", font) <= width_px), 0)
    return text[:count] + "..."


# --- sheets in a run's folder ---------------------------------------------------------------------------------------


def sheet_path(folder: Path, step: int) -> Path:
    """Return the path of the sheet that was sampled after a step."""
    return folder / SHEET_FOLDER / f"step-{step:06d}.png"


def save_sheet(folder: Path, step: int, sheet: Image.Image) -> Path:
    """Write a sheet, complete or not at all. -> its path. Raises UserError for a full disk."""
    path = sheet_path(folder, step)
    with disk_errors(f"{path} can't be written", "free some room."):
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as partial:
            sheet.save(partial, "png")
    return path


def list_sheets(folder: Path) -> list[Path]:
    """Return a run's sheets, the oldest first."""
    return sorted((folder / SHEET_FOLDER).glob("step-*.png"))


def remove_sheets_after(folder: Path, step: int) -> None:
    """Remove the sheets of later steps: another run's, or of steps that a kill has undone."""
    for path in list_sheets(folder):
        if path.stem > f"step-{step:06d}" or step == 0:
            path.unlink()
