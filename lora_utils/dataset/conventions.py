"""Other trainers' conventions: what the names of folders and files mean there, and what becomes of them here."""

import re
from collections.abc import Mapping, Sequence
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


def folder_class(folder: Path, path: Path) -> str:
    """Return `woman` of an image in a folder like `1_woman`, which is its caption in kohya's tools; else nothing."""
    for part in reversed(path.relative_to(folder).parts[:-1]):
        if _REPEATS.fullmatch(part):
            return part.partition("_")[2].replace("_", " ").strip()
    return ""


def is_regularisation(folder: Path, path: Path) -> bool:
    """Return whether an image stands in a folder of regularisation images."""
    return any(_REGULARISATION.fullmatch(part.casefold()) for part in path.relative_to(folder).parts[:-1])


def convention_notes(folder: Path, images: Sequence[Path], counts: Mapping[Path, int]) -> list[str]:
    """Say what became of other trainers' folders; `counts` is how often an epoch shows each image."""
    notes = []
    if images and all(is_regularisation(folder, path) for path in images):
        notes.append("warning: all images stand in a folder for regularisation images, and are learned as the subject")
    repeats = {str(path.parent.relative_to(folder)): count for path, count in counts.items()}
    repeated = [
        f"{'the top' if name == '.' else name} {count} times" for name, count in sorted(repeats.items()) if count > 1
    ]
    if repeated:
        notes.append(f"repeats of folders: {', '.join(repeated[:5])} an epoch; their names aren't captions")
    return notes
