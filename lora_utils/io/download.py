"""From a name to a local path: files by URL, models and LoRAs by hub name, within limits."""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_utils import constants
from lora_utils.errors import UserError

log = logging.getLogger(__name__)

MAX_DOWNLOAD_BYTES = 10 * 10**9


def base_model_name() -> str:
    """Return what `BASE_MODEL` names: a hub repository or a folder. Nothing else selects the model."""
    return os.environ.get("BASE_MODEL") or constants.DEFAULT_BASE_MODEL


def _component_patterns(parts: Sequence[str]) -> list[str]:
    """Return which of a repository's files these components are loaded from; it may hold images and other formats."""
    return ["model_index.json", *(f"{part}/*.{end}" for part in parts for end in ("json", "safetensors", "txt"))]


def download_model(base_model: str, parts: Sequence[str] = constants.COMPONENTS) -> Path:
    """Return the folder of a model in diffusers' layout: itself if it is one, else the hub's files, kept between calls.

    Only the components in `parts` are sure to be there. Raises UserError for what is neither.
    """
    folder = Path(base_model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"BASE_MODEL {base_model!r} holds no model_index.json; give a folder in diffusers' layout.")
        return folder
    if folder.is_absolute() or base_model.count("/") != 1:
        raise UserError(
            f"BASE_MODEL {base_model!r} is neither a folder nor a hub name like {constants.DEFAULT_BASE_MODEL!r}."
        )
    missing_bytes = _missing_bytes(base_model, _component_patterns(parts))
    if missing_bytes:
        log.info("downloading %s from the hub: %.2f GB", base_model, missing_bytes / 1e9)
    try:
        return Path(snapshot_download(base_model, allow_patterns=_component_patterns(parts)))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"BASE_MODEL {base_model!r} is neither on this machine nor to be had from the hub; give a folder."
        ) from error


def _missing_bytes(base_model: str, patterns: Sequence[str]) -> int:
    """Return what a download would fetch; 0 where the hub can't be asked, for then the cache is all there is."""
    try:
        files = HfApi().model_info(base_model, files_metadata=True).siblings or []
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {base_model!r}, or it is private: check BASE_MODEL and HF_TOKEN."
        ) from error
    except (OSError, httpx2.HTTPError):  # offline: OfflineModeIsEnabled is an OSError
        return 0
    wanted = [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    return sum(
        file.size or 0 for file in wanted if not isinstance(try_to_load_from_cache(base_model, file.rfilename), str)
    )


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")


def download_weights(source: str, folder: Path, token: str | None = None) -> Path:
    """Return a LoRA's file: a local path as it is, an http(s) URL downloaded into `folder`, or one of a hub repository.

    `owner/name` is a repository with one LoRA in it, `owner/name/file.safetensors` says which. `token` is for private
    ones and is sent to the hub alone. Raises UserError for what can't be had, is too large or isn't to be trusted.
    """
    if source.startswith(("http://", "https://")):
        return _download(source, folder)
    path = Path(source.removeprefix("file://"))
    if path.is_file():
        return path
    if "://" in source or path.is_absolute() or not _HUB_NAME.fullmatch(source):
        raise UserError(
            f"there is no weights file {source!r}; give a path, a URL that starts with http:// or https://, or a hub "
            "repository like 'owner/name'."
        )
    return _from_hub(source, token)


def _from_hub(source: str, token: str | None) -> Path:
    owner, name, *inside = source.split("/", 2)
    repository = f"{owner}/{name}"
    try:
        files = HfApi(token=token).model_info(repository, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in files}
        chosen = _choose_file(repository, list(sizes), inside[0] if inside else None)
        if sizes[chosen] > MAX_DOWNLOAD_BYTES:
            raise UserError(f"{repository}/{chosen} is larger than {MAX_DOWNLOAD_BYTES // 10**9} GB.")
        return Path(hf_hub_download(repository, chosen, token=token))
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(
            f"there is no file {source!r}, and the hub has no repository {repository!r} that may be read; for a "
            "private one give hf_token."
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        raise UserError(f"there is no file {source!r}, and the hub can't be asked for it: {error}.") from error


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


def _download(source: str, folder: Path) -> Path:
    """Return a URL's content, under the name that it ends in. One that was downloaded before isn't again."""
    target = folder / hashlib.sha256(source.encode()).hexdigest()[:16] / (_file_name(source) or "weights")
    if target.is_file():
        return target
    partial = target.with_suffix(".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with httpx2.stream("GET", source, follow_redirects=True, timeout=60) as reply, partial.open("wb") as sink:
            reply.raise_for_status()
            for chunk in reply.iter_bytes(1 << 20):
                sink.write(chunk)
                if sink.tell() > MAX_DOWNLOAD_BYTES:
                    raise UserError(f"{source} is larger than {MAX_DOWNLOAD_BYTES // 10**9} GB.")
        partial.replace(target)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise UserError(f"{source} can't be downloaded: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
        if not target.exists():
            target.parent.rmdir()
    return target


def _file_name(url: str) -> str:
    return re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2])[:100].lstrip(".")
