"""A folder of pictures and captions -> checked `Example`s, and an example -> pixels.

Owns which files are pictures, the choice of buckets and the report on what was found; must not know models.

    python -m lora_utils.dataset DATASET      # the report alone, of an archive or a folder
"""

import argparse
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_utils.archive import is_litter, unpack
from lora_utils.captions import read_captions, with_trigger
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.pictures import PICTURE_ENDINGS, difference_hash, open_picture
from lora_utils.sizes import Size, choose_buckets

PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Example:
    """One picture in one bucket: a picture stands once for each resolution that it fills."""

    image_path: Path
    caption: str
    size: Size


@dataclass(frozen=True, slots=True)
class Dataset:
    """`num_images` pictures as examples, the names of the files that were neither picture nor caption, and remarks."""

    examples: list[Example]
    num_images: int
    left_out: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def captions(self) -> list[str]:
        """One a picture, in the pictures' order."""
        return list({example.image_path: example.caption for example in self.examples}.values())


def load_pixels(example: Example) -> Tensor:
    """[3, H, W] fp32 in -1 to 1, scaled to cover the example's bucket and cropped about the centre."""
    target = (example.size.width_px, example.size.height_px)
    fitted = ImageOps.fit(open_picture(example.image_path), target, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0  # [3, H, W]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a picture turned out to be: its size and hash, or what is wrong with it."""

    width_px: int = 0
    height_px: int = 0
    hash: bytes = b""
    problem: str = ""


def _look_at(path: Path) -> _Seen:
    """Decode a picture to the end: one that is cut short shows only there."""
    try:
        picture = open_picture(path)
    except UserError as error:
        return _Seen(problem=str(error))
    return _Seen(picture.width, picture.height, difference_hash(picture))


def read_dataset(
    folder: Path, resolutions_px: tuple[int, ...], default_caption: str, trigger_word: str = "",
    tokens: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Find and check every picture below `folder`, in the order of their paths.

    Raises UserError with all that is wrong at once, each file by its name, and for a folder without pictures.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if not is_litter(PurePosixPath(path.relative_to(folder)))]
    pictures = [path for path in own if path.suffix.lower() in PICTURE_ENDINGS]
    found = read_captions(folder, pictures, own)
    left_out = [str(path.relative_to(folder)) for path in own if path not in found.files and path not in set(pictures)]
    if not pictures:
        listed = ", ".join(left_out[:5]) or "nothing"
        raise UserError(f"the dataset holds no pictures ({', '.join(PICTURE_ENDINGS)}); it holds {listed}.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders leave the interpreter free
        seen = dict(zip(pictures, pool.map(_look_at, pictures), strict=True))
    problems = found.problems + [one.problem for one in seen.values() if one.problem]
    captions = {}
    for path in pictures:
        try:
            captions[path] = with_trigger(found.texts.get(path, default_caption), trigger_word, tokens)
        except UserError as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
    if problems:
        raise UserError(_all_of(problems))
    examples = [
        Example(path, captions[path], size)
        for path, one in seen.items()
        for size in choose_buckets(one.width_px, one.height_px, resolutions_px)
    ]
    notes = _trigger_note(trigger_word, [found.texts.get(path, default_caption) for path in pictures])
    notes += _small_note(folder, examples, seen) + _duplicate_notes(folder, seen)
    return Dataset(examples, len(pictures), left_out, notes)


def _all_of(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
    return "\n- ".join([f"the dataset has {len(problems)} problems:", *problems[:PROBLEMS_SHOWN], *more])


# --- what is said of it ---------------------------------------------------------------------------------------------


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
    return [f"too small for the smallest bucket, and enlarged: {_first(small)}"] if small else []


def _duplicate_notes(folder: Path, seen: dict[Path, _Seen]) -> list[str]:
    alike: dict[bytes, list[str]] = defaultdict(list)
    for path, one in seen.items():
        alike[one.hash].append(str(path.relative_to(folder)))
    groups = [names for names in alike.values() if len(names) > 1]
    shown = [f"look the same, and count as often: {_first(names)}" for names in groups[:5]]
    return shown + ([f"and {len(groups) - 5} more groups that look the same"] if len(groups) > 5 else [])


def describe(dataset: Dataset, passes: float) -> list[str]:
    """The report on a dataset, line by line. `passes` is how often a run shows each picture."""
    lines = [f"dataset: {dataset.num_images} pictures, each seen about {passes:.0f} times"]
    for size, count in sorted(Counter(example.size for example in dataset.examples).items()):
        lines.append(f"  bucket {size}: {count} pictures")
    empty = sum(not caption for caption in dataset.captions)
    if empty:
        lines.append(f"  {empty} pictures have no caption; set default_caption, add NAME.txt or a table of captions")
    lines += [f"  {note}" for note in dataset.notes]
    if dataset.left_out:
        lines.append(f"  left out, neither picture nor caption: {_first(dataset.left_out)}")
    return lines


def _first(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report on a dataset, or what is wrong with it. -> 0, or 1 where a training would refuse it."""
    defaults = TrainConfig(seed=0)
    parser = argparse.ArgumentParser(prog="python -m lora_utils.dataset", description="What a training would find.")
    parser.add_argument("dataset", type=Path, help="an archive or a folder of pictures and captions")
    for name in ("resolution", "default_caption", "trigger_word", "placeholder_token"):
        parser.add_argument(f"--{name}", default=getattr(defaults, name), help="as train's input of that name")
    parser.add_argument("--train_placeholder_token", action="store_true", help="as train's input of that name")
    given = vars(parser.parse_args(arguments))
    source = given.pop("dataset")
    try:
        config = TrainConfig(**given, seed=0)
        with tempfile.TemporaryDirectory(prefix="qwen-image-lora-") as unpacked:
            folder = source if source.is_dir() else Path(unpacked)
            if folder is not source:
                unpack(source, folder)
            found = read_dataset(
                folder, config.resolutions_px, config.default_caption, config.trigger_word, config.tokens
            )
            print("\n".join(describe(found, config.steps * config.batch_size / found.num_images)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
