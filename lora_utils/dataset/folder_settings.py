"""dataset.json: settings of a folder's images, in the folder itself or above it.

    {"repeats": 3, "caption_prefix": "a photo of <zwx>, ", "folders": {"reg": {"regularisation": true}}}

This module owns which settings there are, and which of several files counts: for each setting the nearest one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_utils.config import parse_resolutions
from lora_utils.dataset.conventions import MAX_REPEATS, folder_repeats, is_regularisation
from lora_utils.errors import UserError, shown

SETTINGS_FILE, _FOLDERS = "dataset.json", "folders"
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """What holds for the images of a folder. None: what the run's inputs, or the folder's name, say."""

    repeats: int | None = None
    resolution: str | None = None
    caption_prefix: str | None = None
    mask: bool | None = None  # false: learned everywhere, whatever masks there are
    flip: bool | None = None
    regularisation: bool | None = None


@dataclass(frozen=True, slots=True)
class DatasetSettings:
    """All settings below a folder, the files that held them, and what is wrong with them."""

    folder: Path
    by_folder: Mapping[Path, FolderSettings]
    files: set[Path]
    problems: list[str]

    def of(self, path: Path) -> FolderSettings:
        """Return what holds for an image: of each setting the nearest folder's, then what its folder is called."""
        found = FolderSettings()
        for folder in reversed([each for each in path.parents if each == self.folder or self.folder in each.parents]):
            given = self.by_folder.get(folder, FolderSettings())
            own = {item.name: value for item in fields(given) if (value := getattr(given, item.name)) is not None}
            found = replace(found, **own)
        if found.repeats is None:
            found = replace(found, repeats=folder_repeats(self.folder, path))
        if found.regularisation is None:
            found = replace(found, regularisation=is_regularisation(self.folder, path))
        return found


def read_folder_settings(folder: Path, files: Sequence[Path]) -> DatasetSettings:
    """Read every dataset.json among these files below a folder."""
    by_folder: dict[Path, FolderSettings] = {}
    read, problems = set[Path](), list[str]()
    for path in sorted(path for path in files if path.name == SETTINGS_FILE):
        if path.with_suffix("") in {each.with_suffix("") for each in files if each != path}:
            continue  # an image is called dataset: it is that one's caption
        read.add(path)
        title = str(path.relative_to(folder))
        try:
            values = _object(path, title)
            inner = values.pop(_FOLDERS, {})
            if not isinstance(inner, dict):
                raise UserError(f'{title}: "folders" must be an object of settings by folder, got {_kind(inner)}.')
            by_folder[path.parent] = _settings(values, title)
            for name, own in inner.items():
                if Path(name).is_absolute() or ".." in Path(name).parts or not (path.parent / name).is_dir():
                    raise UserError(f"{title}: there is no folder {shown(name)!r} beside it; correct the name.")
                if not isinstance(own, dict):
                    raise UserError(f"{title}: folder {shown(name)!r} must be an object of settings, got {_kind(own)}.")
                by_folder[path.parent / name] = _settings(own, title)
        except UserError as error:
            problems.append(str(error))
    return DatasetSettings(folder, by_folder, read, problems)


def _object(path: Path, title: str) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{title} has {path.stat().st_size} bytes; {MAX_BYTES} are the most.")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{title} can't be read ({error}); docs/dataset.md shows one.") from error
    if not isinstance(values, dict):
        raise UserError(f"{title} must hold an object of settings, got {_kind(values)}.")
    return values


def _settings(values: Mapping[str, Any], title: str) -> FolderSettings:
    """Return a folder's settings. Raises UserError for one that there isn't, or that can't be so."""
    names = [item.name for item in fields(FolderSettings)]
    checked: dict[str, Any] = {}
    for name, given in values.items():
        value = str(given) if name == "resolution" and isinstance(given, int) else given
        if name not in names:
            raise UserError(f"{title} has no setting {shown(str(name))!r}; it takes {', '.join(names)} and {_FOLDERS}.")
        if name == "repeats":
            right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_REPEATS
        elif name in ("resolution", "caption_prefix"):
            right = isinstance(value, str)
        else:
            right = isinstance(value, bool)
        if not right:
            kinds = {"repeats": f"a whole number from 1 to {MAX_REPEATS}", "caption_prefix": "a text"}
            kinds["resolution"] = "pixels like '512' or '512,768'"
            raise UserError(f"{title}: {name} must be {kinds.get(name, 'true or false')}, got {shown(repr(value))}.")
        checked[name] = parse_resolutions(str(value)) if name == "resolution" else value
    return FolderSettings(**checked)


def _kind(value: object) -> str:
    return type(value).__name__
