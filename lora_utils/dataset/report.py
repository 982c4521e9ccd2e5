"""The report on a dataset: what a training would learn from, before any model is loaded."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.dataset.examples import Dataset, listed_names

IMAGES_SHOWN = 20  # of the table


def describe_dataset(dataset: Dataset, config: TrainConfig) -> list[str]:
    """Return the report on a dataset, line by line."""
    learned, _ = dataset.split(config.validation_share)
    passes = config.steps * config.batch_size * config.gradient_accumulation / learned.num_images
    lines = [f"dataset: {dataset.num_images} images, each seen about {passes:.0f} times"]
    for size, count in sorted(Counter(example.size for example in dataset.examples).items()):
        lines.append(f"  bucket {size}: {count} images")
    to_come = dataset.uncaptioned if config.autocaption else frozenset()
    captions = {path: caption for path, caption in dataset.captions_by_image.items() if path not in to_come}
    lines += _table(dataset, captions)
    lines += [f"  {note}" for note in [*_caption_notes(dataset, config, captions), *dataset.notes]]
    if dataset.left_out:
        lines.append(f"  left out, neither image nor caption: {listed_names(dataset.left_out)}")
    return lines


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
        text = "(to be written)" if caption is None else caption or "(none)"
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
        notes.append(
            f"captions: {len(counts)} different ones of {min(counts.values())} to {max(counts.values())} tokens"
        )
    if to_come := len(dataset.captions_by_image) - len(captions):
        notes.append(f"{to_come} images have no caption; the text encoder will describe them")
    if empty := [path for path, caption in captions.items() if not caption]:
        notes.append(f"no caption: {named(empty)}; set default_caption, add NAME.txt or a table, or set autocaption")
    if long := [path for path, caption in captions.items() if counts.get(caption, 0) > constants.TRAINED_PROMPT_TOKENS]:
        notes.append(
            f"captions longer than the {constants.TRAINED_PROMPT_TOKENS} tokens the model was trained on: {named(long)}"
        )
    for token in config.tokens:
        if without := [path for path, caption in captions.items() if token not in caption]:
            notes.append(f"{len(without)} of {len(captions)} captions lack {token}: {named(without)}")
    return notes
