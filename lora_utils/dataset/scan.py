"""A folder of pictures and captions -> checked `Example`s, and an example -> pixels.

Owns which files are pictures, the choice of buckets and what is wrong or odd; must not know models. Run as a module it
is the report alone, of an archive or a folder:

    python -m lora_utils.dataset DATASET
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_utils.archive import is_litter
from lora_utils.captions import read_captions, with_trigger
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.masks import Masks, is_mask, load_mask, match_masks, open_mask, problem_of
from lora_utils.pictures import PICTURE_ENDINGS, difference_hash, open_alpha, open_picture
from lora_utils.sizes import Size, choose_buckets

PROBLEMS_SHOWN = 20
# Of a hash's 256: what a picture and its copy, scaled to two thirds and stored as JPEG at 60, differ in at most.
ALIKE_BITS = 6
_COMPARED_AT_ONCE = 1024  # pictures with all others: 10 000 take a second and 80 MB


@dataclass(frozen=True, slots=True)
class Example:
    """One picture in one bucket: a picture stands once for each resolution that it fills."""

    image_path: Path
    caption: str
    size: Size
    mask_path: Path | None = None
    masked: bool = False  # by that file, or else by its own alpha


@dataclass(frozen=True, slots=True)
class Dataset:
    """`num_images` pictures as examples, the names of the files that were neither picture nor caption, and remarks."""

    examples: list[Example]
    num_images: int
    left_out: list[str]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # for each of which a training would refuse it
    uncaptioned: frozenset[Path] = frozenset()  # the pictures whose caption is the default one
    folder: Path = Path()
    sizes_px: dict[Path, tuple[int, int]] = field(default_factory=dict)  # width and height of each picture

    @property
    def captions(self) -> list[str]:
        """One a picture, in the pictures' order."""
        return list(self.captions_by_picture.values())

    @property
    def captions_by_picture(self) -> dict[Path, str]:
        return {example.image_path: example.caption for example in self.examples}

    def with_captions(self, captions: dict[Path, str]) -> "Dataset":
        """With these in place of its own; no picture is without one then."""
        examples = [replace(e, caption=captions.get(e.image_path, e.caption)) for e in self.examples]
        return replace(self, examples=examples, uncaptioned=frozenset())

    def held_out(self, share: float) -> tuple["Dataset", "Dataset"]:
        """Split into pictures to learn from and a share to measure on: the same ones for the same names.

        What is measured on stands in its smallest size alone, which is enough to compare by and costs least. At least
        one picture of each, unless the share is 0. Raises UserError for a single picture.
        """
        pictures = list(self.captions_by_picture)
        if share and len(pictures) == 1:
            raise UserError("validation_share holds pictures out, and there is only one; set it to 0, or add some.")
        count = min(len(pictures) - 1, max(1, round(share * len(pictures)))) if share else 0
        names = {path: str(path.relative_to(self.folder)).encode() for path in pictures}
        chosen = set(sorted(pictures, key=lambda path: hashlib.sha256(names[path]).digest())[:count])
        parts = []
        for wanted in (False, True):
            own = [example for example in self.examples if (example.image_path in chosen) == wanted]
            if wanted:
                least = {e.image_path: e.size for e in sorted(own, key=lambda e: e.size.tokens, reverse=True)}
                own = [example for example in own if example.size == least[example.image_path]]
            parts.append(replace(self, examples=own, num_images=len({example.image_path for example in own})))
        return parts[0], parts[1]


def load_crop(example: Example) -> Image.Image:
    """The picture scaled to cover the example's bucket, and cropped about the centre."""
    target = (example.size.width_px, example.size.height_px)
    return ImageOps.fit(open_picture(example.image_path), target, Image.Resampling.LANCZOS)


def load_pixels(example: Example) -> Tensor:
    """The same, [3, H, W] fp32 in -1 to 1."""
    return torch.from_numpy(np.array(load_crop(example))).permute(2, 0, 1).float() / 127.5 - 1.0  # [3, H, W]


def load_shares(example: Example) -> Tensor | None:
    """The share of each latent that is to be learned, [N, 4] in 0 to 1; None where all of the picture is."""
    return load_mask(example.image_path, example.mask_path, example.size) if example.masked else None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a picture turned out to be: its size and hash, whether it has a mask, or what is wrong with it."""

    width_px: int = 0
    height_px: int = 0
    hash: bytes = b""
    masked: bool = False
    problem: str = ""


def _look_at(path: Path, mask_path: Path | None, by_alpha: bool) -> _Seen:
    """Decode a picture to the end: one that is cut short shows only there. Its mask too."""
    try:
        picture = open_picture(path)
        mask = open_mask(mask_path) if mask_path else open_alpha(path) if by_alpha else None
        problem = problem_of(mask, (mask_path or path).name, picture.size) if mask else ""
    except UserError as error:
        return _Seen(problem=str(error))
    return _Seen(picture.width, picture.height, difference_hash(picture), mask is not None, problem)


def read_dataset(folder: Path, config: TrainConfig) -> Dataset:
    """What a training of this config finds below `folder`. Raises UserError with all that is wrong at once."""
    found = survey(folder, config)
    refuse(found.problems)
    return found


def survey(folder: Path, config: TrainConfig) -> Dataset:
    """Find and check every picture below `folder`, in the order of their paths.

    What is wrong is listed in the answer, each file by its name; raises UserError for a folder without pictures.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if not is_litter(PurePosixPath(path.relative_to(folder)))]
    drawn = [path for path in own if path.suffix.lower() in PICTURE_ENDINGS]
    pictures = [path for path in drawn if not is_mask(path)]
    masks = match_masks(pictures, [path for path in drawn if is_mask(path)])
    found = read_captions(folder, pictures, own)
    known = {*found.files, *drawn}
    left_out = [str(path.relative_to(folder)) for path in own if path not in known]
    if not pictures:
        listed = ", ".join(left_out[:5]) or "nothing"
        raise UserError(f"the dataset holds no pictures ({', '.join(PICTURE_ENDINGS)}); it holds {listed}.")
    used = masks.files if config.mask_from == "file" else {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders leave the interpreter free
        jobs = [pool.submit(_look_at, path, used.get(path), config.mask_from == "alpha") for path in pictures]
        seen = {path: job.result() for path, job in zip(pictures, jobs, strict=True)}
    problems = found.problems + [one.problem for one in seen.values() if one.problem]
    problems += _mask_problems(folder, masks, seen, config.mask_from)
    captions, texts = {}, {path: found.texts.get(path, config.default_caption) for path in pictures}
    for path, text in texts.items():
        try:
            captions[path] = with_trigger(text, config.trigger_word, config.tokens)
        except UserError as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
    whole = {path: one for path, one in seen.items() if not one.problem and path in captions}
    examples = [
        Example(path, captions[path], size, used.get(path), one.masked)
        for path, one in whole.items()
        for size in choose_buckets(one.width_px, one.height_px, config.resolutions_px)
    ]
    notes = _trigger_note(config.trigger_word, list(texts.values())) + _mask_notes(masks, whole, config.mask_from)
    notes += _small_note(folder, examples, whole) + _duplicate_notes(folder, whole)
    return Dataset(
        examples, len(pictures), left_out, notes, problems, frozenset(texts) - frozenset(found.texts), folder,
        {path: (one.width_px, one.height_px) for path, one in whole.items()},
    )  # fmt: skip


def refuse(problems: Sequence[str]) -> None:
    """Raise UserError with all of them, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        listed = [f"the dataset has {len(problems)} problems:", *problems[:PROBLEMS_SHOWN], *more]
        raise UserError("\n- ".join(listed))


# --- what is said of it ---------------------------------------------------------------------------------------------


def _mask_problems(folder: Path, masks: Masks, seen: dict[Path, _Seen], mask_from: str) -> list[str]:
    if mask_from == "none":
        return []
    problems = []
    if mask_from == "file":
        problems = [f"{path.relative_to(folder)} is the mask of no picture; name it NAME.mask.png for NAME.jpg."
                    for path in masks.orphans]  # fmt: skip
    if not problems and not any(one.masked or one.problem for one in seen.values()):
        what = "has a NAME.mask.png beside it" if mask_from == "file" else "is transparent anywhere"
        problems.append(f"mask_from is {mask_from}, and none of the {len(seen)} pictures {what}; set it to none.")
    return problems


def _mask_notes(masks: Masks, seen: dict[Path, _Seen], mask_from: str) -> list[str]:
    if mask_from == "none":
        unused = len(masks.files) + len(masks.orphans)
        return [f"{unused} masks aren't used; set mask_from to file to use them"] if unused else []
    masked = sum(one.masked for one in seen.values())
    whole = f", {len(seen) - masked} without one are learned whole" if masked < len(seen) else ""
    return [f"{masked} pictures have a mask{whole}"]


def _trigger_note(trigger_word: str, texts: Sequence[str]) -> list[str]:
    lacking = sum(with_trigger(text, trigger_word, ()) != text for text in texts) if trigger_word else 0
    return [f"{lacking} captions were given the trigger word {trigger_word!r}"] if lacking else []


def _small_note(folder: Path, examples: Sequence[Example], seen: dict[Path, _Seen]) -> list[str]:
    small = [
        str(example.image_path.relative_to(folder))
        for example in examples
        if example.size.width_px > seen[example.image_path].width_px
        or example.size.height_px > seen[example.image_path].height_px
    ]
    return [f"too small for the smallest bucket, and enlarged: {first_of(small)}"] if small else []


def _duplicate_notes(folder: Path, seen: dict[Path, _Seen]) -> list[str]:
    names = [str(path.relative_to(folder)) for path in seen]
    groups = [[names[index] for index in group] for group in alike([one.hash for one in seen.values()])]
    shown = [f"look the same, and count as often: {first_of(group)}" for group in groups[:5]]
    return shown + ([f"and {len(groups) - 5} more groups that look the same"] if len(groups) > 5 else [])


def alike(hashes: Sequence[bytes]) -> list[list[int]]:
    """Groups of two and more that differ in at most `ALIKE_BITS` from the first of them, by their places."""
    bits = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)  # [pictures, 4]
    grouped, groups = np.zeros(len(hashes), bool), []
    for start in range(0, len(hashes), _COMPARED_AT_ONCE):
        rows = bits[start : start + _COMPARED_AT_ONCE]
        apart = sum(np.bitwise_count(rows[:, None, part] ^ bits[None, :, part]) for part in range(bits.shape[1]))
        near = np.asarray(apart) <= ALIKE_BITS  # [rows, pictures]
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            group = [int(other) for other in np.flatnonzero(near[row] & ~grouped)]
            if not grouped[start + row] and len(group) > 1:
                grouped[group] = True
                groups.append(group)
    return groups


def first_of(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
