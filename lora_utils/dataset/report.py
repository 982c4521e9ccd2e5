"""The report on a dataset: what a training would learn from, before any model is loaded."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageEnhance

from lora_utils import constants
from lora_utils.config import PLACEHOLDER_PATTERN, TrainConfig
from lora_utils.dataset.buckets import cropped_share
from lora_utils.dataset.caption_texts import caption_choices
from lora_utils.dataset.examples import Dataset, listed_names
from lora_utils.io.images import open_image
from lora_utils.triggers import holds

IMAGES_SHOWN, SIZES_SHOWN = 20, 24
LEAST_CROP_SHOWN = 0.005  # of an image; less than that nobody sees


def describe_dataset(dataset: Dataset, config: TrainConfig) -> list[str]:
    """Return the report on a dataset, line by line."""
    lines = [_first_line(dataset, config)]
    sizes = Counter(example.size for example in dataset.examples)
    for size, count in sorted(sizes.most_common(SIZES_SHOWN)):
        lines.append(f"  bucket {size}: {count} images")
    edited = Counter(control.size for example in dataset.examples for control in example.controls)
    if edited:
        shown = ", ".join(f"{size} ({count})" for size, count in sorted(edited.most_common(5)))
        lines.append(f"  to edit: {len(dataset.examples[0].controls)} for each, {shown}")
    if len(sizes) > SIZES_SHOWN:
        lines.append(f"  and {len(sizes) - SIZES_SHOWN} more buckets")
    to_come = dataset.uncaptioned if config.autocaption else frozenset()
    captions = {path: caption for path, caption in dataset.captions_by_image.items() if path not in to_come}
    lines += _table(dataset, captions)
    lines += [f"  {note}" for note in [*_caption_notes(dataset, config, captions), *dataset.notes]]
    if dataset.left_out:
        lines.append(f"  left out, neither image nor caption: {listed_names(dataset.left_out)}")
    return lines


def bucket_counts(dataset: Dataset) -> dict[str, int]:
    """Return how many images each bucket has, from the smallest size on."""
    counts = Counter(example.size for example in dataset.examples)
    return {str(size): counts[size] for size in sorted(counts)}


def worst_crops(dataset: Dataset, count: int = 6) -> list[tuple[str, Image.Image]]:
    """Return the images that lose most to their bucket, small, with what they lose darkened; each with its name."""
    lost = {}
    for example in dataset.examples:
        share = cropped_share(*dataset.sizes_px[example.image_path], example.size)
        if share >= LEAST_CROP_SHOWN and share > lost.get(example.image_path, (0.0, None))[0]:
            lost[example.image_path] = (share, example.size)
    worst = sorted(lost.items(), key=lambda item: (-item[1][0], item[0]))[:count]
    return [
        (
            f"{path.relative_to(dataset.folder)}: {share:.1%} at {size}",
            _with_lost_dark(path, size.width_px / size.height_px),
        )
        for path, (share, size) in worst
    ]


def _with_lost_dark(path: Path, aspect: float) -> Image.Image:
    """Return an image of at most 220 pixels a side, darkened where a centred crop of this aspect ratio cuts it."""
    image = open_image(path)
    image.thumbnail((220, 220))
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    shown = ImageEnhance.Brightness(image).enhance(0.35)
    shown.paste(image.crop((left, top, left + width, top + height)), (left, top))
    return shown


def _first_line(dataset: Dataset, config: TrainConfig) -> str:
    """Say how many images there are, and how often each is seen: a run may be too short for all of them."""
    count = dataset.num_images
    if not count or (config.validation_share and count == 1):
        return f"dataset: {count} images"
    learned, held_out = dataset.split(config.validation_share)
    shown = config.steps * config.batch_size * config.gradient_accumulation
    passes = shown / learned.num_images
    seen = f"each seen about {passes:.0f} times" if passes >= 1 else f"of which the run shows at most {shown}"
    apart = f"; {held_out.num_images} are held out ({held_out.num_images / count:.0%})" if held_out.examples else ""
    return f"dataset: {count} images, {seen}{apart}"


def _table(dataset: Dataset, captions: dict[Path, str]) -> list[str]:
    """Return a row for each of the first images: its size, its buckets, its caption and the number of its tokens."""
    shown = list(dataset.captions_by_image)[:IMAGES_SHOWN]
    buckets: dict[Path, list[str]] = {path: [] for path in shown}
    for example in dataset.examples:
        if example.image_path in buckets:
            buckets[example.image_path].append(str(example.size))
    rows = [("image", "size", "buckets", "tokens", "caption")]
    for path in shown:
        width, height = dataset.sizes_px[path]
        caption = captions.get(path)
        tokens = "" if caption is None else str(dataset.token_counts.get(caption, ""))
        text = "(to be written)" if caption is None else " | ".join(caption.splitlines()) or "(none)"
        name = str(path.relative_to(dataset.folder))
        rows.append((name, f"{width}x{height}", " ".join(buckets[path]), tokens, text.replace("\n", " ")[:70]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    left = len(dataset.captions_by_image) - len(shown)
    return [*lines, *([f"  and {left} more"] if left else [])]


def _caption_notes(dataset: Dataset, config: TrainConfig, captions: dict[Path, str]) -> list[str]:
    counts = dataset.token_counts

    def named(paths: Iterable[Path]) -> str:
        return listed_names([str(path.relative_to(dataset.folder)) for path in paths])

    notes = []
    if counts:
        different = {choice for caption in captions.values() for choice in caption_choices(caption, config)}
        notes.append(
            f"captions: {len(different)} different ones of {min(counts.values())} to {max(counts.values())} tokens"
        )
    if to_come := len(dataset.captions_by_image) - len(captions):
        notes.append(f"{to_come} images have no caption; the text encoder will describe them")
    if empty := [path for path, caption in captions.items() if not caption]:
        notes.append(f"no caption: {named(empty)}; set default_caption, add NAME.txt or a table, or set autocaption")
    if long := [path for path, caption in captions.items() if counts.get(caption, 0) > constants.TRAINED_PROMPT_TOKENS]:
        notes.append(
            f"captions longer than the {constants.TRAINED_PROMPT_TOKENS} tokens the model was trained on: {named(long)}"
        )
    notes += _trigger_notes(config, captions)
    taught = {path: caption for path, caption in captions.items() if path in dataset.taught}
    for token in config.tokens:
        if without := [path for path, caption in taught.items() if token not in caption]:
            notes.append(f"{len(without)} of {len(taught)} captions lack {token}: {named(without)}")
    return notes


def _trigger_notes(config: TrainConfig, captions: dict[Path, str]) -> list[str]:
    """Say what looks like a token and isn't trained as one, and what the class word does."""
    written = dict.fromkeys(found for text in captions.values() for found in PLACEHOLDER_PATTERN.findall(text))
    untrained = [token for token in written if token not in config.tokens]
    notes = []
    if untrained:
        notes.append(
            f"{listed_names(untrained)} is read as letters, for it isn't trained as a token; if it should be, set "
            "train_placeholder_token and placeholder_token"
        )
    if config.class_word or config.preserve_prompts:
        held = config.class_word and sum(
            not any(holds(text, trigger) for trigger in config.triggers) for text in captions.values()
        )
        plain = f"; {held} captions name nothing taught and are held as they are" if held else ""
        what = [repr(config.class_word)] * bool(config.class_word)
        what += [f"preserve_prompts ({len(config.preserve_prompts.splitlines())})"] * bool(config.preserve_prompts)
        notes.append(f"{config.preservation_weight:.0%} of the batches hold {' and '.join(what)}{plain}")
    return notes
