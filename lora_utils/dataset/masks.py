"""Masks: which file says where in which image the loss counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_utils.dataset.captions import same_name

MASK_MARK = ".mask"  # `NAME.mask.png` is the mask of `NAME.jpg`: nothing else has such a name
# Of other trainers: OneTrainer's, and what users of several write. They are masks only beside an image of that name.
_OTHER_MARKS = ("-masklabel", "_mask", "-mask")
_MARKS_IN_FRONT = ("mask_", "mask-")
_FOLDERS = ("masks", "mask")  # `masks/NAME.png`


@dataclass(slots=True)
class Masks:
    """The masks by image, those of no image, and images that may be masks by their names, but are of no image."""

    files: dict[Path, Path] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)
    doubtful: list[Path] = field(default_factory=list)


def match_masks(folder: Path, images: Sequence[Path]) -> Masks:
    """Find which of a dataset's image files are masks, and whose.

    `a.mask.png` is the mask of `a.jpg`, and so are what some tools write, `a.jpg.mask.png`, `a_mask.png`,
    `a-masklabel.png`, and `masks/a.png`, whose image may stand in any folder if no other has its name.
    """
    owners = {same_name(str(path.relative_to(folder).with_suffix(""))): path for path in reversed(images)}
    owners |= {same_name(str(path.relative_to(folder))): path for path in images}
    stems = _by_stem(folder, images)
    found = Masks()
    for path in images:
        relative = path.relative_to(folder).with_suffix("")
        surely, names = _named_owners(relative)
        own = next((owners[name] for name in map(same_name, names) if owners.get(name, path) != path), None)
        if own is None and surely:
            others = {image for name in names for image in stems.get(same_name(Path(name).name), ())}
            own = others.pop() if len(others) == 1 else None
        if own is not None:
            found.files.setdefault(own, path)
        elif surely:
            found.orphans.append(path)
        elif names:
            found.doubtful.append(path)
    if len(found.orphans) == len(images) and not any(path.stem.casefold().endswith(MASK_MARK) for path in images):
        found.orphans, found.doubtful = [], found.orphans  # there is nothing else to learn from
    return found


def _by_stem(folder: Path, images: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the images by their names without ending, whatever folder they stand in but one of masks."""
    stems: dict[str, list[Path]] = {}
    for image in images:
        if not any(part.casefold() in _FOLDERS for part in image.relative_to(folder).parts[:-1]):
            stems.setdefault(same_name(image.stem), []).append(image)
    return stems


def _named_owners(relative: Path) -> tuple[bool, list[str]]:
    """Return whether a name is surely a mask's, and the names that its image may have, all of them without endings."""
    stem, names = relative.name.casefold(), []
    for mark in (MASK_MARK, *_OTHER_MARKS):
        if stem.endswith(mark) and len(stem) > len(mark):
            names.append(str(relative.with_name(relative.name[: -len(mark)])))
    for mark in _MARKS_IN_FRONT:
        if stem.startswith(mark) and len(stem) > len(mark):
            names.append(str(relative.with_name(relative.name[len(mark) :])))
    inside = [index for index, part in enumerate(relative.parts[:-1]) if part.casefold() in _FOLDERS]
    if inside:
        names += list(_beside(relative, inside[-1]))
    return stem.endswith(MASK_MARK) or bool(inside), names


def _beside(relative: Path, index: int) -> Iterator[str]:
    """Yield where the image of `x/masks/y/a` may stand: `x/y/a`, and in folders that stand for images."""
    before, after = relative.parts[:index], relative.parts[index + 1 :]
    for images in ((), ("images",), ("image",), ("img",), ("imgs",), ("train",)):
        name = Path(*before, *images, *after)
        yield str(name)
        for mark in (MASK_MARK, *_OTHER_MARKS):
            if name.name.casefold().endswith(mark) and len(name.name) > len(mark):
                yield str(name.with_name(name.name[: -len(mark)]))
