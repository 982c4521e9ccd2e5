"""Captions as users have them: beside each image, or in one table for a folder.

This module owns which file is whose caption, what a caption's `[trigger]` becomes, and what is wrong with captions.
"""

import csv
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Qwen2Tokenizer

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.placeholder.tokens import placeholders_without_embeddings, tokenize
from lora_utils.triggers import expand_trigger, holds, replace_words

SIDECAR_ENDINGS, _JSON_SIDECAR = (".txt", ".caption"), ".json"
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json", "captions.jsonl", "captions.csv", "captions.json")
_TABLE_ENDINGS = (".jsonl", ".csv", ".tsv", ".json", ".parquet")  # of tables by other names, which aren't read
# In which archivers may have written a name that is then read as cp437, or as UTF-8 where its bytes happen to be.
_OLD_ENCODINGS = ("gb18030", "shift_jis", "euc_kr", "big5", "cp1251", "cp1252", "cp866")
MAX_CAPTION_BYTES = 64 * 1024
MAX_TABLE_BYTES = 64 * 1024 * 1024
_SIDES = re.compile(r"\b(left|right|leftmost|rightmost|gauche|droite|izquierda|derecha|rechts)\b|左|右", re.IGNORECASE)
_NAME_COLUMNS = ("file_name", "filename", "file", "image")  # the hub's imagefolder calls it the first
_TEXT_COLUMNS = ("text", "caption", "prompt")


@dataclass(slots=True)
class Captions:
    """What was found: captions by image, the files that held them, and what is wrong with them."""

    texts: dict[Path, str] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def same_name(name: str) -> str:
    """Return a name in the form in which two names of one file are equal.

    Archivers of macOS take accents apart, those of Windows turn slashes round; neither keeps the case.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./").casefold()


def read_captions(
    folder: Path, images: Sequence[Path], files: Sequence[Path], lines_are_captions: bool = False
) -> Captions:
    """Read the captions of these images from all the folder's files. One beside its image wins over a table's."""
    found = Captions()
    for table in (path for path in files if path.name.casefold() in TABLES):
        found.files.add(table)
        _read_table(folder, table, images, found)
    endings = (*SIDECAR_ENDINGS, _JSON_SIDECAR)
    sidecars = {path: path for path in files if path.suffix.casefold() in endings and path not in found.files}
    alike, others = {same_name(str(path)): path for path in sidecars}, list[str]()
    for image in images:
        for name in _sidecar_names(image):
            path = sidecars.get(name) or alike.get(same_name(str(name)))
            if path is not None:
                found.files.add(path)
                try:
                    text = _read_sidecar(folder, path)
                except UserError as error:
                    found.problems.append(str(error))
                    text = ""
                if text:
                    found.texts[image] = text
                elif text is None:
                    others.append(str(path.relative_to(folder)))
                break
    if others:
        found.notes.append(f"no caption, text, prompt or tags in {', '.join(others[:5])}: other tools' data, not used")
    found.notes += _notes(folder, files, found, lines_are_captions)
    return found


def _is_encodable(text: str) -> bool:
    """Return whether a text can be written: JSON may hold half of a character, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _notes(folder: Path, files: Sequence[Path], found: Captions, lines_are_captions: bool) -> list[str]:
    """Say what became of files and captions in ways of other tools."""
    notes = []
    others = [path for path in files if path.suffix.casefold() in _TABLE_ENDINGS and path not in found.files]
    if others:
        names = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        notes.append(f"not read, though it may be a table: {names}; a table of captions is called {TABLES[0]}")
    lines = [path.name for path, text in found.texts.items() if len(text.splitlines()) > 1]
    if lines and lines_are_captions:
        notes.append(f"{len(lines)} images have several captions, a line each, of which one is taken at random")
    elif lines:
        notes.append(f"captions of several lines, read as one text each: {', '.join(lines[:5])}")
    return notes


def _read_sidecar(folder: Path, path: Path) -> str | None:
    """Return the caption in a file beside an image; None for a JSON that holds other things."""
    if path.suffix.casefold() != _JSON_SIDECAR:
        return _read_text(folder, path, MAX_CAPTION_BYTES, "caption").strip()
    return _json_caption(_read_text(folder, path, MAX_TABLE_BYTES, "caption"), str(path.relative_to(folder)))


def _json_caption(text: str, title: str) -> str | None:
    """Return the caption of a NAME.json: its caption, text or prompt, else its tags; None where it has none of them.

    Raises UserError for what is no JSON.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{title} can't be read ({error}); docs/dataset.md lists the formats.") from error
    values = {"caption": values} if isinstance(values, str) else values
    tags = values.get("tags") if isinstance(values, dict) else None
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    caption = _column(values, _TEXT_COLUMNS) or tags
    if not isinstance(caption, str):
        return None
    if not _is_encodable(caption):
        raise UserError(f"{title} holds half a character; remove it.")
    return caption.strip()


def _sidecar_names(image: Path) -> Iterator[Path]:
    """Yield NAME.txt, NAME.caption, NAME.json, and what some tools write, NAME.jpg.txt."""
    for ending in (*SIDECAR_ENDINGS, _JSON_SIDECAR):
        yield image.with_suffix(ending)
    for ending in (*SIDECAR_ENDINGS, _JSON_SIDECAR):
        yield image.with_name(image.name + ending)


def _read_text(folder: Path, path: Path, most_bytes: int, what: str) -> str:
    name = path.relative_to(folder)
    if (size := path.stat().st_size) > most_bytes:
        raise UserError(f"{what} {name} has {size} bytes; {most_bytes} are the most.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {name} isn't UTF-8 text ({error.reason}); save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{what} {name} holds zero bytes; save it as UTF-8 text.")
    return text


# --- tables ---------------------------------------------------------------------------------------------------------


def _read_table(folder: Path, table: Path, images: Sequence[Path], found: Captions) -> None:
    """Add a table's captions; the names in it are relative to where it stands."""
    title, own = str(table.relative_to(folder)), {}
    for image in images:
        if table.parent in image.parents:
            own[same_name(str(image.relative_to(table.parent)))] = image
    restored = dict(_restored_names({str(image.relative_to(table.parent)): image for image in own.values()}))
    try:
        for name, text in _rows(_read_text(folder, table, MAX_TABLE_BYTES, "table"), table, title, set(own)):
            image = own.get(same_name(name)) or restored.get(same_name(name))
            if not _is_encodable(name + text):
                found.problems.append(f"{title} holds half a character in the row of {name!a}; remove it.")
            elif image is None:
                found.problems.append(f"{title} names {name!r}, and there is no such image; correct the name.")
            elif text.strip():
                found.texts[image] = text.strip()
    except UserError as error:
        found.problems.append(str(error))


def _restored_names(own: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield what names may have been before an archiver of another country's encoding wrote them."""
    foreign = {name: image for name, image in own.items() if not name.isascii()}
    for (name, image), as_read, encoding in itertools.product(foreign.items(), ("cp437", "utf-8"), _OLD_ENCODINGS):
        with suppress(UnicodeError):
            yield same_name(name.encode(as_read).decode(encoding)), image


def _rows(text: str, table: Path, title: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (image's name, caption) of a table's rows. Raises UserError for one that isn't such a row."""
    try:
        if table.suffix.casefold() == ".json":
            values = json.loads(text)
            rows = (
                [{"file_name": k, **(v if isinstance(v, dict) else {"text": v})} for k, v in values.items()]
                if isinstance(values, dict)
                else values
            )
        elif table.suffix.casefold() == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text), _csv_header(text, known), strict=True))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{title} can't be read ({error}); docs/dataset.md lists the formats.") from error
    if not isinstance(rows, list):
        raise UserError(f"{title} must hold an object or a list of objects.")
    for number, row in enumerate(rows, start=1):
        name, caption = (_column(row, columns) for columns in (_NAME_COLUMNS, _TEXT_COLUMNS))
        if name is None or caption is None:
            raise UserError(f"{title}, row {number}: expected file_name and text, both of them texts.")
        yield name, caption


def _csv_header(text: str, known: Collection[str]) -> list[str] | None:
    """Return the columns of a csv whose first row is an image already; None for one that begins with a header."""
    first = next(csv.reader(io.StringIO(text), strict=True), [])
    if len(first) > 1 and same_name(first[0]) in known:
        return [_NAME_COLUMNS[0], _TEXT_COLUMNS[0]]
    return None


def _column(row: object, columns: Sequence[str]) -> str | None:
    values = [row[column] for column in columns if column in row] if isinstance(row, dict) else []
    return values[0] if values and isinstance(values[0], str) else None


# --- triggers -------------------------------------------------------------------------------------------------------


def names_a_side(caption: str) -> bool:
    """Return whether a caption speaks of left or right, which a mirrored image turns round."""
    return _SIDES.search(caption) is not None


def with_trigger(caption: str, trigger_word: str, tokens: Sequence[str]) -> str:
    """Return the caption with `[trigger]` replaced, and with the trigger word in front where it lacks it."""
    caption = expand_trigger(caption, trigger_word, tokens)
    if trigger_word and not holds(caption, trigger_word):
        return f"{trigger_word}, {caption}" if caption else trigger_word
    return caption


def taught_caption(text: str, config: TrainConfig) -> str:
    """Return the caption of an image that teaches: each of its lines, where these are captions, with the trigger."""
    choices = caption_choices(text, config)
    return "\n".join(with_trigger(each, config.trigger_word, config.tokens) for each in choices)


def regularisation_caption(caption: str, class_of_folder: str, config: TrainConfig) -> str:
    """Return the caption of a regularisation image: its own, what its folder is called, or the class word's.

    It is empty where there is none of them. Raises UserError for one that names what is taught.
    """
    of_class = prior_caption(config.default_caption, config) or config.class_word if config.class_word else ""
    found = caption or class_of_folder or of_class
    if any(holds(found, trigger) for trigger in config.triggers):
        raise UserError(f"the caption of a regularisation image names what is taught: {found[:60]!r}; name the class.")
    return found


def prior_caption(caption: str, config: TrainConfig) -> str:
    """Return the caption with the class word in place of what is taught; as it is where it names nothing of it."""
    return replace_words(caption, config.triggers, config.class_word) if config.class_word else caption


# --- what is shown ---------------------------------------------------------------------------------------------------


def caption_choices(caption: str, config: TrainConfig) -> list[str]:
    """Return the captions that an image may be shown under, before tags are shuffled: one, or its lines."""
    lines = [line.strip() for line in caption.splitlines() if line.strip()] if config.caption_variants else []
    return lines or [caption]


def shown_caption(caption: str, config: TrainConfig, generator: torch.Generator) -> str:
    """Return the caption that an image is shown under this time: one of its lines, its tags shuffled, as asked for."""
    choices = caption_choices(caption, config)
    chosen = choices[int(torch.randint(len(choices), (1,), generator=generator))] if len(choices) > 1 else choices[0]
    if config.caption_shuffle is None:
        return chosen
    tags = [tag.strip() for tag in chosen.split(",")]
    kept, moved = tags[: config.caption_shuffle], tags[config.caption_shuffle :]
    order = torch.randperm(len(moved), generator=generator).tolist()
    return ", ".join([*kept, *(moved[index] for index in order)])


# --- checks ---------------------------------------------------------------------------------------------------------


def count_tokens(captions: Iterable[str], tokens: Sequence[str], tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Return the number of tokens of each different caption; a placeholder token is one.

    Raises UserError for a placeholder token that the tokenizer can't take.
    """
    ids = placeholders_without_embeddings(tokens, tokenizer).ids_by_token
    return {caption: len(tokenize(tokenizer, caption, ids)) for caption in dict.fromkeys(captions)}


def caption_problems(captions: Mapping[Path, str], counts: Mapping[str, int]) -> list[str]:
    """Say which captions the model can't read to their end, by their images and numbers of tokens."""
    most = constants.MAX_PROMPT_TOKENS
    return [
        f"the caption of {path.name} has {counts[caption]} tokens, and the model reads {most}: {caption[:60]!r}...; "
        "shorten it."
        for path, caption in captions.items()
        if counts[caption] > most
    ]


def missing_tokens(captions: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Say which of the tokens these captions could never train."""
    return [
        f"none of the {len(captions)} captions holds the placeholder token {token!r}; the first is {captions[0]!r}. "
        f"Write {token!r} into the captions, or set default_caption to something like 'a photo of {token}'."
        for token in tokens
        if captions and not any(token in caption for caption in captions)
    ]
