"""A folder of images and captions -> a checked `Dataset`, or everything that is wrong with it at once.

This module owns which files are images and what is odd about them. It doesn't load a model.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from transformers import Qwen2Tokenizer

from lora_utils.config import TrainConfig
from lora_utils.dataset.buckets import MOST_CROPPED, assign_buckets, cropped_share
from lora_utils.dataset.captions import caption_problems, count_tokens, missing_tokens, read_captions, with_trigger
from lora_utils.dataset.conventions import convention_notes, folder_repeats, without_regularisation
from lora_utils.dataset.duplicates import near_duplicates
from lora_utils.dataset.examples import Dataset, Example, listed_names
from lora_utils.dataset.masks import Masks, match_masks
from lora_utils.errors import UserError
from lora_utils.io.archive import is_litter
from lora_utils.io.images import (
    IMAGE_ENDINGS,
    difference_hash,
    mask_problem,
    open_alpha,
    open_image,
    open_mask,
    thumbnail,
)

PROBLEMS_SHOWN = 20


def load(folder: Path, config: TrainConfig, tokenizer: Qwen2Tokenizer | None = None) -> Dataset:
    """Read the images and captions below a folder. Raises UserError with all that is wrong with them.

    Without a tokenizer the captions' lengths and placeholder tokens aren't checked.
    """
    found = inspect(folder, config, tokenizer)
    raise_problems(found.problems)
    return found


def inspect(folder: Path, config: TrainConfig, tokenizer: Qwen2Tokenizer | None = None) -> Dataset:
    """Read the same, with what is wrong in its `problems`, so that a report can show all else too.

    Raises UserError for a folder without images.
    """
    found = scan(folder, config)
    return with_caption_problems(found, config, tokenizer) if tokenizer is not None else found


def with_caption_problems(dataset: Dataset, config: TrainConfig, tokenizer: Qwen2Tokenizer) -> Dataset:
    """Return the dataset with its captions' token counts, and what is wrong with them among its problems.

    Every token has to stand in an image that is learned from; one that is held out doesn't teach it. Captions that
    autocaption will write aren't there yet, so they are checked once they are.
    """
    to_come = dataset.uncaptioned if config.autocaption else frozenset()
    final = {path: caption for path, caption in dataset.captions_by_image.items() if path not in to_come}
    counts = count_tokens(final.values(), config.tokens, tokenizer)
    problems = [*dataset.problems, *caption_problems(final, counts)]
    if not to_come and dataset.examples:
        try:
            learned, _ = dataset.split(config.validation_share)
        except UserError as error:
            return replace(dataset, token_counts=counts, problems=[*problems, str(error)])
        problems += missing_tokens(learned.captions, config.tokens)
    return replace(dataset, token_counts=counts, problems=problems)


def check_captions(dataset: Dataset, config: TrainConfig, tokenizer: Qwen2Tokenizer) -> Dataset:
    """Return the dataset with its captions' token counts. Raises UserError with all that is wrong with them."""
    checked = with_caption_problems(dataset, config, tokenizer)
    raise_problems(checked.problems)
    return checked


def raise_problems(problems: Sequence[str]) -> None:
    """Raise UserError with all of these problems, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        listed = [f"the dataset has {len(problems)} problems:", *problems[:PROBLEMS_SHOWN], *more]
        raise UserError("\n- ".join(listed))


# --- the scan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ImageFacts:
    """What an image turned out to be: its size and looks, whether it has a mask, or what is wrong with it."""

    width_px: int = 0
    height_px: int = 0
    hash: bytes = b""
    thumbnail: bytes = b""
    masked: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Files:
    """Which of a folder's files is what."""

    images: list[Path]
    masks: Masks
    regularisation: list[Path]
    own: list[Path]  # all but what archivers left

    @property
    def known(self) -> set[Path]:
        """The images of any use."""
        return {*self.images, *self.masks.files.values(), *self.masks.orphans, *self.regularisation}


def _sort_files(folder: Path) -> _Files:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if not is_litter(PurePosixPath(path.relative_to(folder)))]
    readable = [path for path in own if path.suffix.lower() in IMAGE_ENDINGS]
    taught, regularisation = without_regularisation(folder, readable)
    masks = match_masks(folder, taught)
    apart = {*masks.files.values(), *masks.orphans}
    return _Files([path for path in taught if path not in apart], masks, regularisation, own)


def scan(folder: Path, config: TrainConfig) -> Dataset:
    """Find and check every image below a folder, in the order of their paths.

    Raises UserError for a folder without images.
    """
    # Which file is what.
    files = _sort_files(folder)
    images, masks = files.images, files.masks
    found = read_captions(folder, images, files.own)
    known = found.files | files.known
    left_out = [str(path.relative_to(folder)) for path in files.own if path not in known]
    if not images:
        listed = ", ".join(left_out[:5]) or "nothing"
        raise UserError(f"the dataset holds no images ({', '.join(IMAGE_ENDINGS)}); it holds {listed}.")

    # What each image is, and what is wrong.
    used = masks.files if config.mask_from == "file" else {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders leave the interpreter free
        jobs = [pool.submit(_inspect, path, used.get(path), config.mask_from == "alpha") for path in images]
        facts = {path: job.result() for path, job in zip(images, jobs, strict=True)}
    problems = found.problems + [one.problem for one in facts.values() if one.problem]
    problems += _mask_problems(folder, masks, facts, config.mask_from)
    captions, texts = {}, {path: found.texts.get(path, config.default_caption) for path in images}
    for path, text in texts.items():
        try:
            captions[path] = with_trigger(text, config.trigger_word, config.tokens)
        except UserError as error:
            problems.append(f"{path.relative_to(folder)}: {error}")

    # The examples of what is sound, each in its buckets.
    sound = {path: one for path, one in facts.items() if not one.problem and path in captions}
    sizes_px = {path: (one.width_px, one.height_px) for path, one in sound.items()}
    repeats = {path: folder_repeats(folder, path) for path in sound}
    fewest = math.gcd(*repeats.values()) or 1  # what all have in common changes nothing
    examples = [
        Example(path, captions[path], size, used.get(path), sound[path].masked, repeats[path] // fewest)
        for path, sizes in assign_buckets(sizes_px, config.resolutions_px).items()
        for size in sizes
    ]
    problems += _masks_cropped_away(folder, examples)

    # What is worth a remark.
    notes = _trigger_note(config.trigger_word, list(texts.values())) + _mask_notes(masks, sound, config.mask_from)
    notes += convention_notes(folder, images, files.regularisation) + found.notes
    notes += _cropped_notes(folder, examples, sizes_px) + _small_note(folder, examples, sound)
    notes += _duplicate_notes(folder, sound)
    uncaptioned = frozenset(texts) - frozenset(found.texts)
    return Dataset(examples, len(sound), left_out, notes, problems, uncaptioned, folder, sizes_px)


def _inspect(path: Path, mask_path: Path | None, by_alpha: bool) -> _ImageFacts:
    """Decode an image and its mask to the end: one that is cut short shows only there."""
    try:
        image = open_image(path)
        mask = open_mask(mask_path) if mask_path else open_alpha(path) if by_alpha else None
        problem = mask_problem(mask, (mask_path or path).name, image.size) if mask else ""
    except UserError as error:
        return _ImageFacts(problem=str(error))
    width, height = image.size
    return _ImageFacts(width, height, difference_hash(image), thumbnail(image), mask is not None, problem)


def _masks_cropped_away(folder: Path, examples: Sequence[Example]) -> list[str]:
    """Say which masks leave nothing to learn from as they are used: cropped as their image, at the latents' grid."""
    masked = [example for example in examples if example.masked]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda example: example.shares(), masked))
    return [
        f"the mask of {example.image_path.relative_to(folder)} leaves nothing to learn from at {example.size}: what is "
        "white there is cropped away, or smaller than a latent; paint more of it white."
        for example, shares in zip(masked, found, strict=True)
        if shares is not None and not shares.any()
    ]


# --- what is said of it ---------------------------------------------------------------------------------------------


def _mask_problems(folder: Path, masks: Masks, facts: Mapping[Path, _ImageFacts], mask_from: str) -> list[str]:
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


def _mask_notes(masks: Masks, facts: Mapping[Path, _ImageFacts], mask_from: str) -> list[str]:
    if mask_from == "none":
        unused = len(masks.files) + len(masks.orphans)
        notes = [f"{unused} masks aren't used; set mask_from to file to use them"] if unused else []
        return notes + _doubtful_note(masks)
    masked = sum(one.masked for one in facts.values())
    others = f", {len(facts) - masked} without one are learned everywhere" if masked < len(facts) else ""
    return [f"{masked} images have a mask{others}", *_doubtful_note(masks)]


def _doubtful_note(masks: Masks) -> list[str]:
    names = listed_names([path.name for path in masks.doubtful])
    return [f"warning: learned as images, though their names are masks': {names}"] if masks.doubtful else []


def _cropped_notes(folder: Path, examples: Sequence[Example], sizes_px: Mapping[Path, tuple[int, int]]) -> list[str]:
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


def _trigger_note(trigger_word: str, texts: Sequence[str]) -> list[str]:
    lacking = sum(with_trigger(text, trigger_word, ()) != text for text in texts) if trigger_word else 0
    return [f"{lacking} captions were given the trigger word {trigger_word!r}"] if lacking else []


def _small_note(folder: Path, examples: Sequence[Example], facts: Mapping[Path, _ImageFacts]) -> list[str]:
    small = [
        str(example.image_path.relative_to(folder))
        for example in examples
        if example.size.width_px > facts[example.image_path].width_px
        or example.size.height_px > facts[example.image_path].height_px
    ]
    return [f"too small for the smallest bucket, and enlarged: {listed_names(small)}"] if small else []


def _duplicate_notes(folder: Path, facts: Mapping[Path, _ImageFacts]) -> list[str]:
    names = [str(path.relative_to(folder)) for path in facts]
    found = near_duplicates([one.hash for one in facts.values()], [one.thumbnail for one in facts.values()])
    groups = [[names[index] for index in group] for group in found]
    shown = [f"look the same, and count as often: {listed_names(group)}" for group in groups[:5]]
    return shown + ([f"and {len(groups) - 5} more groups that look the same"] if len(groups) > 5 else [])
