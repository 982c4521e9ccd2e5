"""Masks: which file says where in which image the loss counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_utils.dataset.captions import same_name

MASK_MARK = ".mask"  # `NAME.mask.png` is the mask of `NAME.jpg`


@dataclass(slots=True)
class Masks:
    """The masks by image, and those of no image."""

    files: dict[Path, Path] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)


def is_mask(path: Path) -> bool:
    """Return whether an image file is the mask of another one, by its name."""
    return path.stem.casefold().endswith(MASK_MARK)


def match_masks(images: Sequence[Path], masks: Sequence[Path]) -> Masks:
    """Find which mask is whose: `a.mask.png` of `a.jpg`, and what some tools write, `a.jpg.mask.png`."""
    by_name = {same_name(str(path)): path for path in images}
    by_name |= {same_name(str(path.with_suffix(""))): path for path in images}
    found = Masks()
    for mask in masks:
        image = by_name.get(same_name(str(mask.with_suffix("")))[: -len(MASK_MARK)])
        if image is None:
            found.orphans.append(mask)
        else:
            found.files[image] = mask
    return found
