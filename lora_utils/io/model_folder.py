"""A model's folder in diffusers' layout: which files each of its parts has, and whether all of them are there."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_utils.errors import UserError

MODEL_INDEX = "model_index.json"
# The names under which diffusers and transformers store the weights of a part that is one file.
_SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "",
    "processor": "preprocessor_config.json",
}  # of the other parts: config.json
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # of which a tokenizer has one


class _Incomplete(Exception):
    """A part of a model lacks a file, or has one that can't be used. Its text says which."""


def weight_files(folder: Path) -> list[Path]:
    """Return a part's safetensors files, in its index's order if it has one. Raises UserError for a missing one."""
    try:
        return _weight_files(folder)
    except _Incomplete as error:
        raise UserError(f"{folder.parent} isn't complete: {error}; download it again.") from error


def check_model_folder(folder: Path, parts: Sequence[str], base_model: str, command: str) -> None:
    """Raise UserError where a part of a model isn't complete: its config, its vocabulary or any of its weights.

    `command` is what completes it. Weights are opened and not read.
    """
    try:
        for part in parts:
            _check_part(folder / part)
    except _Incomplete as error:
        raise UserError(f"BASE_MODEL {base_model!r} isn't complete: {error}; complete it with `{command}`.") from error


def _check_part(folder: Path) -> None:
    if not folder.is_dir():
        raise _Incomplete(f"{folder.name}/ is missing")
    config = _CONFIGS.get(folder.name, "config.json")
    if config and not (folder / config).is_file():
        raise _Incomplete(f"{folder.name}/{config} is missing")
    if folder.name == "tokenizer":
        if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
            raise _Incomplete("tokenizer/ has neither tokenizer.json nor vocab.json with merges.txt")
    elif folder.name not in ("scheduler", "processor"):
        for file in _weight_files(folder):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise _Incomplete(f"{folder.name}/{file.name} is cut off or damaged ({error})") from error


def _weight_files(folder: Path) -> list[Path]:
    for index in (folder / f"{name}.index.json" for name in _SINGLE_FILES):
        if not index.is_file():
            continue
        try:
            names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
            files = [folder / Path(name).name for name in names]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Incomplete(f"{folder.name}/{index.name} can't be read") from error
        missing = [file.name for file in files if not file.is_file()]
        if not files:
            raise _Incomplete(f"{folder.name}/{index.name} lists no files")
        if missing:
            raise _Incomplete(f"{folder.name}/ lacks {missing[0]}, one of its {len(files)} weight files")
        return files
    found = [folder / name for name in _SINGLE_FILES if (folder / name).is_file()]
    if not found:
        raise _Incomplete(f"{folder.name}/ holds no weights: neither {' nor '.join(_SINGLE_FILES)}")
    return found[:1]
