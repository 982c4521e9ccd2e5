"""What a training would find, before any model is loaded: one report, or all that is wrong at once.

Owns the report and what is checked of captions with the tokenizer; must not load weights.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import Qwen2Tokenizer

from lora_utils import fetch, fresh_token, models, qwen
from lora_utils.archive import unpack
from lora_utils.command_line import add_options, described
from lora_utils.config import TrainConfig
from lora_utils.dataset import Dataset, first_of, refuse, survey
from lora_utils.errors import UserError
from lora_utils.placeholder import tokenize
from lora_utils.recipes import filled

ROWS_SHOWN = 20  # of the table


def read_dataset(folder: Path, config: TrainConfig, tokenizer: Qwen2Tokenizer | None) -> Dataset:
    """The pictures and captions below `folder`. Raises UserError with all that is wrong with them, at once.

    Without a tokenizer, the captions' lengths aren't checked.
    """
    found = survey(folder, config)
    refuse([*found.problems, *(caption_problems(found, config, tokenizer) if tokenizer else [])])
    return found


def caption_problems(dataset: Dataset, config: TrainConfig, tokenizer: Qwen2Tokenizer) -> list[str]:
    """Captions that the model can't read to their end, and tokens that none of them holds."""
    captions = _final_captions(dataset, config)
    lengths = token_counts(captions.values(), config, tokenizer)
    problems = [
        f"the caption of {path.name} has {lengths[caption]} tokens, and the model reads {qwen.MAX_PROMPT_TOKENS}: "
        f"{caption[:60]!r}...; shorten it."
        for path, caption in captions.items()
        if lengths[caption] > qwen.MAX_PROMPT_TOKENS
    ]
    if not config.tokens or (config.autocaption and dataset.uncaptioned):
        return problems  # captions to come hold what autocaption_prefix and suffix hold
    return problems + fresh_token.missing_tokens(list(captions.values()), config.tokens)


def _final_captions(dataset: Dataset, config: TrainConfig) -> dict[Path, str]:
    """By picture; those that are still to be written aren't among them."""
    to_come = dataset.uncaptioned if config.autocaption else frozenset[Path]()
    return {path: caption for path, caption in dataset.captions_by_picture.items() if path not in to_come}


def token_counts(captions: Iterable[str], config: TrainConfig, tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Of each different caption; a placeholder token is one."""
    slots = fresh_token.unplaced(config, tokenizer).slots
    return {caption: len(tokenize(tokenizer, caption, slots)) for caption in dict.fromkeys(captions)}


# --- the report -----------------------------------------------------------------------------------------------------


def describe(dataset: Dataset, config: TrainConfig, tokenizer: Qwen2Tokenizer | None) -> list[str]:
    """The report on a dataset, line by line."""
    learned_from, _ = dataset.held_out(config.validation_share)
    passes = config.steps * config.batch_size * config.gradient_accumulation / learned_from.num_images
    lines = [f"dataset: {dataset.num_images} pictures, each seen about {passes:.0f} times"]
    for size, count in sorted(Counter(example.size for example in dataset.examples).items()):
        lines.append(f"  bucket {size}: {count} pictures")
    captions = _final_captions(dataset, config)
    counts = token_counts(captions.values(), config, tokenizer) if tokenizer else {}
    lines += _table(dataset, captions, counts)
    lines += [f"  {note}" for note in [*_caption_notes(dataset, config, captions, counts), *dataset.notes]]
    if dataset.left_out:
        lines.append(f"  left out, neither picture nor caption: {first_of(dataset.left_out)}")
    return lines


def _table(dataset: Dataset, captions: dict[Path, str], counts: dict[str, int]) -> list[str]:
    """A row for each of the first pictures: its size, its buckets, and its caption with the number of its tokens."""
    shown = list(dataset.captions_by_picture)[:ROWS_SHOWN]
    buckets: dict[Path, list[str]] = {path: [] for path in shown}
    for example in dataset.examples:
        if example.image_path in buckets:
            buckets[example.image_path].append(str(example.size))
    rows = [("picture", "size", "buckets", "tokens", "caption")]
    for path in shown:
        width, height = dataset.sizes_px[path]
        caption = captions.get(path)
        tokens = "" if caption is None or not counts else str(counts[caption])
        text = "(to be written)" if caption is None else caption or "(none)"
        name = str(path.relative_to(dataset.folder))
        rows.append((name, f"{width}x{height}", " ".join(buckets[path]), tokens, text.replace("\n", " ")[:70]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
             for row in rows]  # fmt: skip
    left = len(dataset.captions_by_picture) - len(shown)
    return [*lines, *([f"  and {left} more"] if left else [])]


def _caption_notes(
    dataset: Dataset, config: TrainConfig, captions: dict[Path, str], counts: dict[str, int]
) -> list[str]:
    def named(paths: Iterable[Path]) -> str:
        return first_of([str(path.relative_to(dataset.folder)) for path in paths])

    notes = []
    if counts:
        notes.append(
            f"captions: {len(counts)} different ones of {min(counts.values())} to {max(counts.values())} tokens"
        )
    if to_come := len(dataset.captions_by_picture) - len(captions):
        notes.append(f"{to_come} pictures have no caption; the text encoder will describe them")
    if empty := [path for path, caption in captions.items() if not caption]:
        notes.append(f"no caption: {named(empty)}; set default_caption, add NAME.txt or a table, or set autocaption")
    if long := [path for path, caption in captions.items() if counts.get(caption, 0) > qwen.TRAINED_PROMPT_TOKENS]:
        notes.append(
            f"captions longer than the {qwen.TRAINED_PROMPT_TOKENS} tokens the model was trained on: {named(long)}"
        )
    for token in config.tokens:
        if without := [path for path, caption in captions.items() if token not in caption]:
            notes.append(f"{len(without)} of {len(captions)} captions lack {token}: {named(without)}")
    return notes


def main(arguments: list[str] | None = None) -> int:
    """Print the report on a dataset, or what is wrong with it. -> 0, or 1 where a training would refuse it."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_utils.dataset",
        description="What a training would find. The options are train's inputs.",
    )
    parser.add_argument("dataset", type=Path, help="an archive or a folder of pictures and captions")
    add_options(parser, TrainConfig, described(Path(__file__).parent.parent / "train.py"))
    given = vars(parser.parse_args(arguments))
    source = given.pop("dataset")
    try:
        config, tokenizer = TrainConfig(**filled(given)), _tokenizer()
        with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as unpacked:
            folder = source if source.is_dir() else Path(unpacked)
            if folder is not source:
                unpack(source, folder)
            print("\n".join(describe(read_dataset(folder, config, tokenizer), config, tokenizer)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _tokenizer() -> Qwen2Tokenizer | None:
    """The base model's, if it is here or can be fetched; the report does without."""
    try:
        return models.load_tokenizer(fetch.fetch_model(fetch.base_model_name(), ("tokenizer",)))
    except UserError as error:
        print(f"the captions' tokens aren't counted: {error}", file=sys.stderr)
        return None
