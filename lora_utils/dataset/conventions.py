"""Other trainers' conventions: what the names of folders and files mean there, and what becomes of them here."""

import re
from collections.abc import Sequence
from pathlib import Path

MAX_REPEATS = 1000
_REPEATS = re.compile(r"(\d{1,4})_.+")  # kohya's `10_name`
# kohya's and others' folders of images that hold the class and aren't the subject.
_REGULARISATION = re.compile(
    r"(regs?|reg_?(images?|data|imgs?|dir)|regulari[sz]ation.*|class_(images?|data)|prior_images?)"
)


def folder_repeats(folder: Path, path: Path) -> int:
    """Return how often an epoch shows an image in a folder like `10_name`; 1 in any other."""
    for part in reversed(path.relative_to(folder).parts[:-1]):
        if found := _REPEATS.fullmatch(part):
            return min(MAX_REPEATS, max(1, int(found[1])))
    return 1


def is_regularisation(folder: Path, path: Path) -> bool:
    """Return whether an image stands in a folder of regularisation images."""
    return any(_REGULARISATION.fullmatch(part.casefold()) for part in path.relative_to(folder).parts[:-1])


def without_regularisation(folder: Path, images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the images to learn from, and those that were meant as regularisation.

    Where all of them stand in such a folder, they are what there is to learn from.
    """
    sorted_out = {path: is_regularisation(folder, path) for path in images}
    if all(sorted_out.values()):
        return list(images), []
    return [path for path, apart in sorted_out.items() if not apart], [path for path in images if sorted_out[path]]


def convention_notes(folder: Path, images: Sequence[Path], regularisation: Sequence[Path]) -> list[str]:
    """Say what became of other trainers' folders."""
    notes = []
    if regularisation:
        where = sorted({str(path.parent.relative_to(folder)) for path in regularisation})
        notes.append(
            f"left out: {len(regularisation)} regularisation images in {', '.join(where[:3])}; class_word does what "
            "they are for"
        )
    elif images and all(is_regularisation(folder, path) for path in images):
        notes.append("warning: all images stand in a folder for regularisation images, and are learned as the subject")
    repeats = {str(path.parent.relative_to(folder)): folder_repeats(folder, path) for path in images}
    repeated = [f"{name} {count} times" for name, count in sorted(repeats.items()) if count > 1]
    if repeated:
        notes.append(f"repeats by the folders' names: {', '.join(repeated[:5])} an epoch; the names aren't captions")
    return notes
