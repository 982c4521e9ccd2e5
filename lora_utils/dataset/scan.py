"""A folder of images and captions -> a checked `Dataset`, or everything that is wrong with it at once.

This module owns which files are images and what is odd about them. It doesn't load a model.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

from transformers import Qwen2Tokenizer

from lora_utils.config import TrainConfig
from lora_utils.dataset.buckets import assign_buckets
from lora_utils.dataset.caption_texts import caption_choices, caption_problems, count_tokens, missing_tokens
from lora_utils.dataset.captions import read_captions
from lora_utils.dataset.controls import control_problems, measure_controls, with_controls
from lora_utils.dataset.conventions import convention_notes
from lora_utils.dataset.examples import Dataset, Example
from lora_utils.dataset.remarks import (
    ImageFacts,
    cropped_notes,
    duplicate_notes,
    mask_notes,
    mask_problems,
    regularisation_notes,
    settings_note,
    sided_problems,
    skipped_notes,
    small_note,
    trigger_note,
    uncaptioned_problems,
)
from lora_utils.dataset.selection import ChosenImages, choose_images, make_captions, sort_files
from lora_utils.errors import UserError
from lora_utils.io.images import (
    IMAGE_ENDINGS,
    difference_hash,
    mask_problem,
    open_alpha,
    open_image,
    open_mask,
    thumbnail,
)
from lora_utils.model.latents import Size
from lora_utils.model.variant import TEXT_TO_IMAGE, Variant

PROBLEMS_SHOWN = 20


def load(
    folder: Path, config: TrainConfig, tokenizer: Qwen2Tokenizer | None = None, variant: Variant = TEXT_TO_IMAGE
) -> Dataset:
    """Read the images and captions below a folder. Raises UserError with all that is wrong with them.

    Without a tokenizer the captions' lengths and placeholder tokens aren't checked.
    """
    found = inspect(folder, config, tokenizer, variant)
    raise_problems(found.problems)
    return found


def inspect(
    folder: Path, config: TrainConfig, tokenizer: Qwen2Tokenizer | None = None, variant: Variant = TEXT_TO_IMAGE
) -> Dataset:
    """Read the same, with what is wrong in its `problems`, so that a report can show all else too.

    Raises UserError for a folder without images.
    """
    found = scan(folder, config, variant)
    return with_caption_problems(found, config, tokenizer) if tokenizer is not None else found


def with_caption_problems(dataset: Dataset, config: TrainConfig, tokenizer: Qwen2Tokenizer) -> Dataset:
    """Return the dataset with its captions' token counts, and what is wrong with them among its problems.

    Every token has to stand in an image that is learned from; one that is held out doesn't teach it. Captions that
    autocaption will write aren't there yet, so they are checked once they are.
    """
    to_come = dataset.uncaptioned if config.autocaption else frozenset()
    final = {path: caption for path, caption in dataset.captions_by_image.items() if path not in to_come}
    choices = {path: caption_choices(caption, config) for path, caption in final.items()}
    counts = count_tokens(chain(*choices.values()), config.tokens, tokenizer)
    longest = {path: max(own, key=lambda caption: counts[caption]) for path, own in choices.items()}
    counts |= {final[path]: counts[caption] for path, caption in longest.items()}  # an image's are those of its longest
    problems = [*dataset.problems, *caption_problems(longest, counts)]
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


def scan(folder: Path, config: TrainConfig, variant: Variant = TEXT_TO_IMAGE) -> Dataset:
    """Find and check every image below a folder, in the order of their paths, for this kind of base model.

    Raises UserError for a folder without images.
    """
    # Which file is what.
    files = sort_files(folder, config)
    texts_in = [path for path in files.own if path not in files.settings.files]
    found = read_captions(folder, files.images, texts_in, config.caption_variants)
    chosen, masks = choose_images(files, found.texts, config), files.masks
    images, regularisation, settings = chosen.images, chosen.regularisation, chosen.settings
    known = found.files | files.known
    left_out = [str(path.relative_to(folder)) for path in files.own if path not in known]
    if not set(images) - regularisation:
        listed = ", ".join(left_out[:5]) or "nothing"
        raise UserError(f"the dataset holds no images ({', '.join(IMAGE_ENDINGS)}); it holds {listed}.")

    # What each image is, and what is wrong.
    maskable = {path for path in images if settings[path].mask is not False}
    used = {path: mask for path, mask in masks.files.items() if config.mask_from == "file" and path in maskable}
    by_alpha = maskable if config.mask_from == "alpha" else set[Path]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders leave the interpreter free
        jobs = [pool.submit(_inspect, path, used.get(path), path in by_alpha) for path in images]
        facts = {path: job.result() for path, job in zip(images, jobs, strict=True)}
    captions, caption_errors = make_captions(folder, chosen, found.texts, config)
    problems = files.settings.problems + found.problems + [one.problem for one in facts.values() if one.problem]
    problems += mask_problems(folder, masks, facts, config.mask_from) + caption_errors
    problems += uncaptioned_problems(folder, chosen.without_caption, config)
    problems += control_problems(folder, images, files.controls, variant) + measure_controls(files.controls)
    if variant.edits and config.autocaption:
        problems.append(
            "autocaption describes images, and pairs need instructions; write them, or set default_caption."
        )

    # The examples of what is sound, each in its buckets.
    sound = {path: one for path, one in facts.items() if not one.problem and path in captions}
    repeats = {path: settings[path].repeats or 1 for path in sound}
    examples = _make_examples(sound, chosen, captions, used, config)
    if variant.edits and not problems:
        examples = with_controls(examples, files.controls, config.control_resolution)
    problems += _masks_cropped_away(folder, examples)
    if config.flip != "insist":
        problems += sided_problems(folder, examples)

    # What is worth a remark.
    taught = [path for path in sound if path not in regularisation]
    texts = [found.texts.get(path, config.default_caption) for path in taught]
    notes = trigger_note(config.trigger_word, texts) + mask_notes(masks, sound, config.mask_from)
    notes += regularisation_notes(folder, files.regularisation, regularisation, config)
    notes += convention_notes(folder, images, repeats) + found.notes + settings_note(folder, files.settings)
    sizes_px = {path: (one.width_px, one.height_px) for path, one in sound.items()}
    notes += skipped_notes(chosen.without_caption, config) + cropped_notes(folder, examples, sizes_px)
    notes += small_note(folder, examples, sound) + duplicate_notes(folder, sound)
    uncaptioned = frozenset(images) - frozenset(found.texts) - regularisation
    return Dataset(examples, len(taught), left_out, notes, problems, uncaptioned, folder, sizes_px)


def _make_examples(
    sound: Mapping[Path, ImageFacts],
    chosen: ChosenImages,
    captions: Mapping[Path, str],
    masks: Mapping[Path, Path],
    config: TrainConfig,
) -> list[Example]:
    """Return an example of each sound image for each of its buckets. What all folders repeat changes nothing."""
    settings, regularisation = chosen.settings, chosen.regularisation
    repeats = {path: settings[path].repeats or 1 for path in sound}
    fewest = math.gcd(*(count for path, count in repeats.items() if path not in regularisation)) or 1
    sizes_px = {path: (one.width_px, one.height_px) for path, one in sound.items()}
    buckets = _buckets_by_resolution(sizes_px, {path: settings[path].resolution or config.resolution for path in sound})
    return [
        Example(
            path,
            captions[path],
            size,
            masks.get(path),
            sound[path].masked,
            repeats[path] if path in regularisation else repeats[path] // fewest,
            flip=config.flip != "off" if settings[path].flip is None else bool(settings[path].flip),
            regularisation=path in regularisation,
        )
        for path in sound
        for size in buckets[path]
    ]


def _buckets_by_resolution(
    sizes_px: Mapping[Path, tuple[int, int]], resolutions: Mapping[Path, str]
) -> dict[Path, list[Size]]:
    """Return the buckets of each image; those of a folder with resolutions of its own are chosen among themselves."""
    found: dict[Path, list[Size]] = {}
    for wanted in dict.fromkeys(resolutions.values()):
        own = {path: size for path, size in sizes_px.items() if resolutions[path] == wanted}
        found |= assign_buckets(own, tuple(int(side) for side in wanted.split(",")))
    return found


def _inspect(path: Path, mask_path: Path | None, by_alpha: bool) -> ImageFacts:
    """Decode an image and its mask to the end: one that is cut short shows only there."""
    try:
        image = open_image(path)
        mask = open_mask(mask_path) if mask_path else open_alpha(path) if by_alpha else None
        problem = mask_problem(mask, (mask_path or path).name, image.size) if mask else ""
    except UserError as error:
        return ImageFacts(problem=str(error))
    width, height = image.size
    return ImageFacts(width, height, difference_hash(image), thumbnail(image), mask is not None, problem)


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
