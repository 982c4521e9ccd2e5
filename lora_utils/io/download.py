"""From a name to a local path: files by URL, models and LoRAs by hub name, within limits."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx2
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_utils import constants
from lora_utils.errors import UserError, shown
from lora_utils.io import transfer
from lora_utils.io.access import CALLER, Access
from lora_utils.io.model_folder import MODEL_INDEX, check_model_folder

log = logging.getLogger(__name__)

CACHE_BYTES = 20 * 10**9  # of downloaded LoRAs, and at most half of what the disk has free
_VALIDATORS = ".validators.json"
_MAX_PATH = 1024  # characters; a longer text isn't asked of the file system


def base_model_name() -> str:
    """Return what `BASE_MODEL` names: a hub repository or a folder. Nothing else selects the model."""
    return os.environ.get("BASE_MODEL") or constants.DEFAULT_BASE_MODEL


def base_model_label() -> str:
    """Return the base model as files that leave the machine call it: the repository, or the folder's name alone."""
    name = base_model_name()
    return Path(name).resolve().name if Path(name).is_dir() else name


def _component_patterns(parts: Sequence[str]) -> list[str]:
    """Return which of a repository's files these components are loaded from; it may hold images and other formats."""
    return [MODEL_INDEX, *(f"{part}/*.{end}" for part in parts for end in ("json", "safetensors", "txt"))]


def download_model(base_model: str, parts: Sequence[str] = constants.COMPONENTS) -> Path:
    """Return the folder of a model in diffusers' layout: itself if it is one, else the hub's files, kept between calls.

    The components in `parts` are complete in it; with a text encoder that sees images, what prepares these too. Raises
    UserError for what is neither, and for an incomplete one.
    """
    folder = Path(base_model)
    if folder.is_dir():
        if not (folder / MODEL_INDEX).is_file():
            raise UserError(f"BASE_MODEL {base_model!r} holds no model_index.json; give a folder in diffusers' layout.")
        parts = _with_processor(parts, check_pipeline(folder / MODEL_INDEX, base_model))
        command = f"hf download {constants.DEFAULT_BASE_MODEL} --local-dir {shlex.quote(base_model)}"
        check_model_folder(folder, parts, base_model, command)
        return folder
    if folder.is_absolute() or base_model.count("/") != 1:
        raise UserError(
            f"BASE_MODEL {base_model!r} is neither a folder nor a hub name like {constants.DEFAULT_BASE_MODEL!r}."
        )
    pipeline = check_pipeline(_from_cache_or_hub(base_model, [MODEL_INDEX]) / MODEL_INDEX, base_model)
    parts = _with_processor(parts, pipeline)
    missing_bytes = _missing_bytes(base_model, _component_patterns(parts))
    if missing_bytes:
        log.info("downloading %s from the hub: %.2f GB", base_model, missing_bytes / 1e9)
    found = _from_cache_or_hub(base_model, _component_patterns(parts))
    check_model_folder(found, parts, base_model, f"hf download {base_model}")
    return found


def _from_cache_or_hub(base_model: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository with the files of these patterns in it."""
    try:
        return Path(snapshot_download(base_model, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"BASE_MODEL {base_model!r} is neither on this machine nor to be had from the hub; give a folder."
        ) from error
    except RepositoryNotFoundError as error:
        raise _no_such_model(base_model) from error


def _no_such_model(base_model: str) -> UserError:
    return UserError(f"the hub has no model {base_model!r}, or it is private: check BASE_MODEL and HF_TOKEN.")


def _with_processor(parts: Sequence[str], pipeline: str) -> Sequence[str]:
    """Return the parts of a model, with the processor of images that belongs to the text encoder of one that edits."""
    edits = pipeline in constants.EDIT_PIPELINES and "text_encoder" in parts
    return [part for part in constants.EDIT_COMPONENTS if part in parts or part == "processor"] if edits else parts


def check_pipeline(index: Path, base_model: str) -> str:
    """Return which pipeline a model is for.

    Raises UserError for one of another kind, before any of its weights is downloaded or loaded.
    """
    try:
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"model_index.json of BASE_MODEL {base_model!r} can't be read; download it again.") from error
    if pipeline not in constants.TEXT_PIPELINES + constants.EDIT_PIPELINES:
        raise UserError(
            f"BASE_MODEL {base_model!r} is a model of {str(pipeline)[:60]}, and not a Qwen-Image; set it to "
            f"Qwen/Qwen-Image or Qwen/Qwen-Image-2512, or to {constants.EDIT_MODEL} to edit images."
        )
    return pipeline


def _missing_bytes(base_model: str, patterns: Sequence[str]) -> int:
    """Return what a download would fetch; 0 where the hub can't be asked, for then the cache is all there is."""
    try:
        files = HfApi().model_info(base_model, files_metadata=True).siblings or []
    except RepositoryNotFoundError as error:
        raise _no_such_model(base_model) from error
    except (OSError, httpx2.HTTPError):  # offline: OfflineModeIsEnabled is an OSError
        return 0
    wanted = [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    return sum(
        file.size or 0 for file in wanted if not isinstance(try_to_load_from_cache(base_model, file.rfilename), str)
    )


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")


def download_weights(source: str, folder: Path, token: str | None = None, access: Access = CALLER) -> Path:
    """Return a LoRA's file: a local path as it is, or an http(s) URL's or a hub repository's content, in `folder`.

    `owner/name` is a repository with one LoRA in it, `owner/name/file.safetensors` says which. `token` is for private
    ones and is sent to the hub alone. Raises UserError for what can't be had, is too large or may not be reached.
    """
    if source.startswith(("http://", "https://")):
        return _download(source, folder, access)
    path = Path(source.removeprefix("file://"))
    if access.local_paths and len(source) < _MAX_PATH and path.exists():
        return path
    if "://" in source or path.is_absolute() or not _HUB_NAME.fullmatch(source):
        own = "a path, " if access.local_paths else ""
        raise UserError(
            f"there is no weights file {shown(source)!r}; give {own}a URL that starts with http:// or https://, or a "
            "hub repository like 'owner/name'."
        )
    return _from_hub(source, folder, access.hub_token(token), access)


def forget_download(path: Path, folder: Path) -> None:
    """Remove a downloaded file that has turned out to be no LoRA. A path of the caller's own is left alone."""
    if path.is_relative_to(folder) and path.parent != folder:
        shutil.rmtree(path.parent, ignore_errors=True)


def _from_hub(source: str, folder: Path, token: str | None, access: Access) -> Path:
    owner, name, *inside = source.split("/", 2)
    repository = f"{owner}/{name}"
    try:
        # Which file: `False` keeps the hub's client from a token of its own.
        api = HfApi(token=token or False)
        info = transfer.interruptible(lambda: api.model_info(repository, files_metadata=True))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        chosen = _choose_file(repository, list(sizes), inside[0] if inside else None)
        if sizes[chosen] > transfer.MAX_BYTES:
            raise UserError(f"{repository}/{chosen} is larger than {transfer.MAX_BYTES // 10**9} GB.")

        # It, and the config that peft keeps its alpha in: the owner's among the hub's files, a stranger's apart.
        config = str(Path(chosen).with_name(constants.PEFT_CONFIG))
        found = folder / hashlib.sha256(f"{repository} {info.sha} {chosen}".encode()).hexdigest()[:16]
        paths = []
        for wanted in (chosen, *([config] if config in sizes and chosen.endswith(constants.PEFT_WEIGHTS) else [])):
            if access.any_run_dir:  # a caller on this machine, which keeps what it downloads
                paths.append(Path(hf_hub_download(repository, wanted, token=token or False)))
            else:
                url = hf_hub_url(repository, wanted, revision=info.sha)
                paths.append(_fetch(transfer.Transfer(url, found / Path(wanted).name, token=token), folder))
        return paths[0]
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(
            f"there is no file {source!r}, and the hub has no repository {repository!r} that may be read; for a "
            "private one give hf_token."
        ) from error
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"there is no file {source!r}, and the hub can't be asked for it: {why}.") from error


def _choose_file(repository: str, names: list[str], asked: str | None) -> str:
    """Return which file of a repository is its LoRA. Pickles are never looked at."""
    found = [name for name in names if name.endswith((".safetensors", ".zip"))]
    if asked is not None:
        if asked not in names or asked not in found:
            raise UserError(f"{repository} has no {asked!r} that could be a LoRA; it has {', '.join(found) or 'none'}.")
        return asked
    best = [name for name in constants.HUB_WEIGHT_NAMES if name in found] or found
    if not found or (len(best) > 1 and best[0] not in constants.HUB_WEIGHT_NAMES):
        listed = f"several: {', '.join(found[:10])}; name one, like '{repository}/{found[0]}'" if found else "none"
        raise UserError(f"{repository} should hold one .safetensors file or weights.zip, and holds {listed}.")
    return best[0]


# --- the cache of downloads -----------------------------------------------------------------------------------------


def _download(source: str, folder: Path, access: Access) -> Path:
    """Return a URL's content, under the name that it ends in. A copy is used again where its server says it is good."""
    target = folder / hashlib.sha256(source.encode()).hexdigest()[:16] / (_file_name(source) or "weights")
    return _fetch(transfer.Transfer(source, target, public_only=not access.private_addresses), folder)


def _fetch(wanted: transfer.Transfer, folder: Path) -> Path:
    """Transfer a file into its own folder of the cache, or keep the copy there, and let the oldest ones go."""
    kept, notes = wanted.target, wanted.target.parent / _VALIDATORS
    kept.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(notes.read_text()) if notes.is_file() and kept.is_file() else {}
    partial = kept.with_name(".partial")
    try:
        found = transfer.transfer(transfer.Transfer(wanted.url, partial, wanted.public_only, wanted.token, known))
        if found is not None:
            partial.replace(kept)
            notes.write_text(json.dumps(found))
    finally:
        partial.unlink(missing_ok=True)
        if not kept.is_file():
            shutil.rmtree(kept.parent, ignore_errors=True)
    os.utime(kept.parent)  # used now
    _trim(folder, kept.parent)
    return kept


def _trim(folder: Path, used: Path) -> None:
    """Remove the downloads that weren't used for longest, until the rest is within the limit."""
    entries = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    held = {path: sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in entries}
    total = sum(held.values())
    most = min(CACHE_BYTES, (total + shutil.disk_usage(folder).free) // 2)
    for path in entries:
        if total > most and path != used:
            shutil.rmtree(path, ignore_errors=True)
            total -= held[path]


def _file_name(url: str) -> str:
    """Return the name that a URL ends in, as a file may be called: for messages, and for what its ending says."""
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2]).lstrip(".")
    return name.encode()[-120:].decode(errors="ignore")  # a file system takes 255 bytes
