"""Captions as users have them: beside each image, or in one table for a folder.

This module owns which file is whose caption. What captions say is `caption_texts`'.
"""

import csv
import io
import itertools
import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_utils.errors import UserError

SIDECAR_ENDINGS, _JSON_SIDECAR = (".txt", ".caption"), ".json"
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json", "captions.jsonl", "captions.csv", "captions.json")
_TABLE_ENDINGS = (".jsonl", ".csv", ".tsv", ".json", ".parquet")  # of tables by other names, which aren't read
# In which archivers may have written a name that is then read as cp437, or as UTF-8 where its bytes happen to be.
_OLD_ENCODINGS = ("gb18030", "shift_jis", "euc_kr", "big5", "cp1251", "cp1252", "cp866")
MAX_CAPTION_BYTES = 64 * 1024
MAX_TABLE_BYTES = 64 * 1024 * 1024
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


def read_rows(folder: Path, table: Path, known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (image's name, row) of a table. Raises UserError for one that can't be read."""
    title = str(table.relative_to(folder))
    for row in _parsed_rows(_read_text(folder, table, MAX_TABLE_BYTES, "table"), table, title, known):
        name = _column(row, _NAME_COLUMNS)
        if isinstance(row, dict) and name is not None:
            yield name, row


def _rows(text: str, table: Path, title: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (image's name, caption) of a table's rows. Raises UserError for one that isn't such a row."""
    for number, row in enumerate(_parsed_rows(text, table, title, known), start=1):
        name, caption = (_column(row, columns) for columns in (_NAME_COLUMNS, _TEXT_COLUMNS))
        if name is None or caption is None:
            raise UserError(f"{title}, row {number}: expected file_name and text, both of them texts.")
        yield name, caption


def _parsed_rows(text: str, table: Path, title: str, known: Collection[str]) -> list[Any]:
    """Return a table's rows. Raises UserError for what is no table."""
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
    return rows


def _csv_header(text: str, known: Collection[str]) -> list[str] | None:
    """Return the columns of a csv whose first row is an image already; None for one that begins with a header."""
    first = next(csv.reader(io.StringIO(text), strict=True), [])
    if len(first) > 1 and same_name(first[0]) in known:
        return [_NAME_COLUMNS[0], _TEXT_COLUMNS[0]]
    return None


def _column(row: object, columns: Sequence[str]) -> str | None:
    values = [row[column] for column in columns if column in row] if isinstance(row, dict) else []
    return values[0] if values and isinstance(values[0], str) else None
