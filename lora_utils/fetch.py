"""From a name to a local path: files by URL, models by hub name. Owns downloads and their limits."""

import hashlib
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from lora_utils.errors import UserError

DEFAULT_BASE_MODEL = "Qwen/Qwen-Image"
MAX_DOWNLOAD_BYTES = 10 * 10**9
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def base_model_name() -> str:
    """What `BASE_MODEL` names: a hub repository or a folder. The only thing that selects the model."""
    return os.environ.get("BASE_MODEL") or DEFAULT_BASE_MODEL


def _files_of(parts: Sequence[str]) -> list[str]:
    """Of a repository with example pictures and other formats, only what these components are loaded from."""
    return ["model_index.json", *(f"{part}/*.{end}" for part in parts for end in ("json", "safetensors", "txt"))]


def fetch_model(base_model: str, parts: Sequence[str] = COMPONENTS) -> Path:
    """The folder of a model in diffusers' layout: itself if it is one, else the hub's files, cached between calls.

    Of those only the components in `parts` are sure to be there.
    """
    folder = Path(base_model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"BASE_MODEL {base_model!r} holds no model_index.json; give a folder in diffusers' layout.")
        return folder
    if folder.is_absolute() or base_model.count("/") != 1:
        raise UserError(f"BASE_MODEL {base_model!r} is neither a folder nor a hub name like {DEFAULT_BASE_MODEL!r}.")
    missing_bytes = _missing_bytes(base_model, _files_of(parts))
    if missing_bytes:
        print(f"fetching {base_model} from the hub: {missing_bytes / 1e9:.2f} GB", flush=True)
    try:
        return Path(snapshot_download(base_model, allow_patterns=_files_of(parts)))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"BASE_MODEL {base_model!r} is neither on this machine nor to be had from the hub; give a folder."
        ) from error


def _missing_bytes(base_model: str, patterns: Sequence[str]) -> int:
    """What a download would fetch; 0 where the hub can't be asked, for then the cache is all there is."""
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


def fetch_file(source: str, folder: Path) -> Path:
    """A local path as it is, an http(s) URL downloaded into `folder`. Raises UserError for what can't be had."""
    if not source.startswith(("http://", "https://")):
        path = Path(source.removeprefix("file://"))
        if not path.is_file():
            raise UserError(f"there is no file {source!r}; give a path, or a URL that starts with http:// or https://.")
        return path
    target = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    if target.is_file():
        return target
    partial = target.with_suffix(".partial")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with httpx2.stream("GET", source, follow_redirects=True, timeout=60) as reply, partial.open("wb") as sink:
            reply.raise_for_status()
            for chunk in reply.iter_bytes(1 << 20):
                sink.write(chunk)
                if sink.tell() > MAX_DOWNLOAD_BYTES:
                    raise UserError(f"{source} is larger than {MAX_DOWNLOAD_BYTES // 10**9} GB.")
        partial.replace(target)
    except httpx2.HTTPError as error:
        raise UserError(f"{source} can't be downloaded: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return target
