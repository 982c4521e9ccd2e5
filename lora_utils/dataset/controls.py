"""Images to edit: which files are controls, of which image each is, and what is wrong with them.

An image that is learned is the target; its controls are what it was made of. They are found by name or in a table.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_utils import constants
from lora_utils.dataset.captions import TABLES, read_rows, same_name
from lora_utils.dataset.examples import ControlImage, Example
from lora_utils.errors import UserError
from lora_utils.io.images import open_image
from lora_utils.model.controls import aspect_problem, control_area_px, control_sizes
from lora_utils.model.variant import Variant

_MARK = re.compile(r"(.+)\.control(?:_(\d))?", re.IGNORECASE)  # `NAME.control.png`, `NAME.control_1.png`
_FOLDER = re.compile(r"controls?(?:_(\d))?", re.IGNORECASE)  # `control/NAME.png`, `control_1/NAME.png`
# In tables: ours and musubi's (control_path, control_path_0), DiffSynth's (edit_image, one or a list).
_COLUMN = re.compile(r"(?:control|control_path|control_image|edit_image)(?:_(\d))?")
LISTED = 5


@dataclass(slots=True)
class ControlFiles:
    """The controls of each image in their order, those of no image, and what is wrong with tables."""

    of_image: dict[Path, tuple[Path, ...]] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sizes_px: dict[Path, tuple[int, int]] = field(default_factory=dict)  # width and height, once they are measured

    @property
    def files(self) -> set[Path]:
        """All files that are controls."""
        return {path for paths in self.of_image.values() for path in paths} | set(self.orphans)


def match_controls(folder: Path, images: Sequence[Path], files: Sequence[Path]) -> ControlFiles:
    """Find which of a dataset's image files are images to edit, and whose; `files` are all of the folder's.

    The image of `control/a.png` may stand beside the folder, or in any other if no other has its name.
    """
    found, by_number = ControlFiles(), dict[Path, dict[int, list[Path]]]()
    owners = {path: own for path in images if (own := _owner(path.relative_to(folder))) is not None}
    targets = [path for path in images if path not in owners]
    by_name = {same_name(str(path.relative_to(folder).with_suffix(""))): path for path in reversed(targets)}
    by_stem: dict[str, list[Path]] = {}
    for path in targets:
        by_stem.setdefault(same_name(path.stem), []).append(path)
    for path, (name, number) in owners.items():
        alike = by_stem.get(same_name(Path(name).name), [])
        target = by_name.get(same_name(name)) or (alike[0] if len(alike) == 1 else None)
        if target is None:
            found.orphans.append(path)
        else:
            by_number.setdefault(target, {}).setdefault(number, []).append(path)
    for target, numbered in by_number.items():
        found.of_image[target] = tuple(path for number in sorted(numbered) for path in numbered[number])
        for same in (paths for paths in numbered.values() if len(paths) > 1):
            names = " and ".join(str(path.relative_to(folder)) for path in same)
            found.problems.append(f"{names} are the same image to edit of {target.name}; number them, or keep one.")
    for table in (path for path in files if path.name.casefold() in TABLES):
        _read_table(folder, table, images, found)
    return found


def _owner(relative: Path) -> tuple[str, int] | None:
    """Return the name without ending of the image that a control belongs to, and its number; None for no control."""
    if marked := _MARK.fullmatch(relative.stem):
        return str(relative.with_name(marked[1])), int(marked[2] or 0)
    for index, part in enumerate(relative.parts[:-1]):
        if inside := _FOLDER.fullmatch(part):
            name = Path(*relative.parts[:index], *relative.parts[index + 1 :]).with_suffix("")
            return str(name), int(inside[1] or 0)
    return None


def _read_table(folder: Path, table: Path, images: Sequence[Path], found: ControlFiles) -> None:
    """Add the controls that a table names, relative to where it stands. They replace those found by name."""
    title = str(table.relative_to(folder))
    known = {same_name(str(path.relative_to(table.parent))): path for path in images if table.parent in path.parents}
    try:
        rows = list(read_rows(folder, table, known))
    except UserError:
        return  # which the reader of captions reports
    for name, row in rows:
        named = _named_controls(row)
        target = known.get(same_name(name))
        if target is None or not named:
            continue  # a name without an image is the reader of captions' too
        paths = [known.get(same_name(each)) for each in named]
        missing = [each for each, path in zip(named, paths, strict=True) if path is None]
        if missing:
            found.problems.append(
                f"{title} names {missing[0]!r} to edit, and there is no such image; correct the name."
            )
        else:
            found.of_image[target] = tuple(path for path in paths if path is not None)


def _named_controls(row: Mapping[str, object]) -> list[str]:
    """Return the files that a row of a table names as images to edit, in their order."""
    numbered = [
        (int(match[1] or 0), row[column])
        for column in row
        if isinstance(column, str) and (match := _COLUMN.fullmatch(column.casefold()))
    ]
    named: list[str] = []
    for _, value in sorted(numbered, key=lambda item: item[0]):
        named += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each]
    return named


def control_problems(folder: Path, images: Collection[Path], found: ControlFiles, variant: Variant) -> list[str]:
    """Say what is wrong with a dataset's controls, for the kind of base model that is to learn from them."""
    if not variant.edits:
        if not found.of_image and not found.orphans:
            return []
        return [
            f"{_listed(folder, sorted(found.files))} are images to edit, and the base model makes images from text; "
            f"set BASE_MODEL to {constants.EDIT_MODEL}, or leave them out."
        ]
    if not found.of_image and not found.problems:
        return [
            "the base model edits images, and the dataset holds none to edit; add NAME.control.png beside each "
            "NAME.png, or a folder control/ with the same names, or set BASE_MODEL to "
            f"{constants.DEFAULT_BASE_MODEL}."
        ]
    problems = list(found.problems)
    if without := [path for path in images if path not in found.of_image]:
        problems.append(f"{_listed(folder, without)}: no image to edit; add NAME.control.png or control/NAME.png.")
    if found.orphans:
        problems.append(f"{_listed(folder, found.orphans)}: an image to edit without the image that is made of it.")
    counts = {path: len(found.of_image[path]) for path in images if path in found.of_image}
    usual = max(set(counts.values()), key=list(counts.values()).count, default=0)
    if odd := [path for path, count in counts.items() if count != usual]:
        each = ", ".join(f"{path.relative_to(folder)} {counts[path]}" for path in odd[:LISTED])
        problems.append(f"most images have {usual} to edit, but {each}; give all the same number.")
    if usual > variant.most_controls:
        problems.append(
            f"the images have {usual} to edit each, and the base model takes {variant.most_controls}; leave some out."
        )
    return problems


def with_controls(examples: Sequence[Example], found: ControlFiles, resolution: str) -> list[Example]:
    """Return the examples with their images to edit, at the sizes that sampling gives them too."""

    def controls(example: Example) -> tuple[ControlImage, ...]:
        paths = found.of_image[example.image_path]
        sizes = control_sizes([found.sizes_px[path] for path in paths], control_area_px(resolution, example.size))
        return tuple(ControlImage(path, size) for path, size in zip(paths, sizes, strict=True))

    return [replace(example, controls=controls(example)) for example in examples]


def measure_controls(found: ControlFiles) -> list[str]:
    """Read the sizes of all controls, each of which is decoded once. -> what is wrong with their files"""
    paths = sorted(found.files - set(found.orphans))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders leave the interpreter free
        read = list(pool.map(_size_or_problem, paths))
    found.sizes_px = {path: own for path, own in zip(paths, read, strict=True) if isinstance(own, tuple)}
    problems = [own for own in read if isinstance(own, str)]
    return problems + [text for path, own in found.sizes_px.items() if (text := aspect_problem(path.name, *own))]


def _size_or_problem(path: Path) -> tuple[int, int] | str:
    try:
        return open_image(path).size
    except UserError as error:
        return str(error)


def _listed(folder: Path, paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(str(path.relative_to(folder)) for path in paths[:LISTED]) + more
