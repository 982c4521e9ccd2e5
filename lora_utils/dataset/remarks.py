"""Remarks on a dataset: what is odd about its images, and what is wrong with how they fit the inputs.

It reads what the scan found, and no file.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_utils.config import TrainConfig
from lora_utils.dataset.buckets import MOST_CROPPED, cropped_share
from lora_utils.dataset.caption_texts import names_a_side, with_trigger
from lora_utils.dataset.duplicates import near_duplicates
from lora_utils.dataset.examples import Example, listed_names
from lora_utils.dataset.folder_settings import DatasetSettings
from lora_utils.dataset.masks import Masks


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image turned out to be: its size and looks, whether it has a mask, or what is wrong with it."""

    width_px: int = 0
    height_px: int = 0
    hash: bytes = b""
    thumbnail: bytes = b""
    masked: bool = False
    problem: str = ""


def mask_problems(folder: Path, masks: Masks, facts: Mapping[Path, ImageFacts], mask_from: str) -> list[str]:
    if mask_from == "none":
        return []
    problems = []
    if mask_from == "file":
        problems = [
            f"{path.relative_to(folder)} is the mask of no image; name it NAME.mask.png for NAME.jpg."
            for path in masks.orphans
        ]
    if not problems and not any(one.masked or one.problem for one in facts.values()):
        what = "has a NAME.mask.png beside it" if mask_from == "file" else "is transparent anywhere"
        problems.append(f"mask_from is {mask_from}, and none of the {len(facts)} images {what}; set it to none.")
    return problems


def mask_notes(masks: Masks, facts: Mapping[Path, ImageFacts], mask_from: str) -> list[str]:
    if mask_from == "none":
        unused = len(masks.files) + len(masks.orphans)
        notes = [f"{unused} masks aren't used; set mask_from to file to use them"] if unused else []
        return notes + doubtful_note(masks)
    masked = sum(one.masked for one in facts.values())
    others = f", {len(facts) - masked} without one are learned everywhere" if masked < len(facts) else ""
    return [f"{masked} images have a mask{others}", *doubtful_note(masks)]


def doubtful_note(masks: Masks) -> list[str]:
    names = listed_names([path.name for path in masks.doubtful])
    return [f"warning: learned as images, though their names are masks': {names}"] if masks.doubtful else []


def cropped_notes(folder: Path, examples: Sequence[Example], sizes_px: Mapping[Path, tuple[int, int]]) -> list[str]:
    """Say how much of which images falls away: those that lose most, and warn where it is more than a bucket should."""
    shares: dict[Path, float] = {}
    for example in examples:
        share = cropped_share(*sizes_px[example.image_path], example.size)
        shares[example.image_path] = max(share, shares.get(example.image_path, 0.0))
    lose = sorted((path for path in shares if shares[path] >= 0.005), key=lambda path: -shares[path])
    if not lose:
        return []
    named = [f"{path.relative_to(folder)} {shares[path]:.1%}" for path in lose]
    much = "warning: " if shares[lose[0]] > MOST_CROPPED else ""
    return [f"{much}cropped at the sides to fit a bucket: {listed_names(named)}"]


def trigger_note(trigger_word: str, texts: Sequence[str]) -> list[str]:
    lacking = sum(with_trigger(text, trigger_word, ()) != text for text in texts) if trigger_word else 0
    return [f"{lacking} captions were given the trigger word {trigger_word!r}"] if lacking else []


def small_note(folder: Path, examples: Sequence[Example], facts: Mapping[Path, ImageFacts]) -> list[str]:
    small = [
        str(example.image_path.relative_to(folder))
        for example in examples
        if example.size.width_px > facts[example.image_path].width_px
        or example.size.height_px > facts[example.image_path].height_px
    ]
    return [f"too small for the smallest bucket, and enlarged: {listed_names(small)}"] if small else []


def duplicate_notes(folder: Path, facts: Mapping[Path, ImageFacts]) -> list[str]:
    names = [str(path.relative_to(folder)) for path in facts]
    found = near_duplicates([one.hash for one in facts.values()], [one.thumbnail for one in facts.values()])
    groups = [[names[index] for index in group] for group in found]
    shown = [f"look the same, and count as often: {listed_names(group)}" for group in groups[:5]]
    return shown + ([f"and {len(groups) - 5} more groups that look the same"] if len(groups) > 5 else [])


def regularisation_notes(
    folder: Path, images: Sequence[Path], used: Collection[Path], config: TrainConfig
) -> list[str]:
    """Say what becomes of the regularisation images: those that are used, and why the others aren't."""
    notes, unused = [], [path for path in images if path not in used]

    def where(paths: Sequence[Path]) -> str:
        return listed_names(sorted({str(path.parent.relative_to(folder)) for path in paths}), 3)

    if used:
        notes.append(
            f"{len(used)} regularisation images in {where(list(used))}: an epoch shows as many of them as of the "
            f"others, with a weight of {config.prior_loss_weight:g}"
        )
    if unused:
        why = "they have no caption" if config.prior_loss_weight else "prior_loss_weight is 0"
        notes.append(f"left out: {len(unused)} regularisation images in {where(unused)}, for {why}")
    return notes


def settings_note(folder: Path, settings: DatasetSettings) -> list[str]:
    names = sorted(str(path.relative_to(folder)) for path in settings.files)
    return [f"settings of folders from {listed_names(names)}"] if names else []


def sided_problems(folder: Path, examples: Sequence[Example]) -> list[str]:
    """Say which captions speak of a side that mirrored images turn round."""
    captions = {example.image_path: example.caption for example in examples if example.flip}
    sided = [path for path, caption in captions.items() if names_a_side(caption)]
    if not sided:
        return []
    names = listed_names([str(path.relative_to(folder)) for path in sided])
    return [
        f"flip mirrors images, and {len(sided)} captions speak of left or right: {names}; set flip to off, or to "
        "insist if the images don't mind."
    ]


def uncaptioned_problems(folder: Path, images: Sequence[Path], config: TrainConfig) -> list[str]:
    """Say which images have no caption, where that is refused."""
    if config.uncaptioned != "refuse" or config.autocaption or not images:
        return []
    names = listed_names([str(path.relative_to(folder)) for path in images])
    return [f"{len(images)} images have no caption: {names}; write them, or set uncaptioned to train or skip."]


def skipped_notes(images: Sequence[Path], config: TrainConfig) -> list[str]:
    """Say which images were skipped because they have no caption."""
    if config.uncaptioned != "skip" or config.autocaption or not images:
        return []
    return [f"skipped without a caption: {listed_names([path.name for path in images])}"]
