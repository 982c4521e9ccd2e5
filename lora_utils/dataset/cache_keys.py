"""What an entry of the cache follows from beside its settings: the content of files, and what rounds a result."""

import hashlib
from pathlib import Path

import torch

from lora_utils.model.device import Placement


def digest_files(files: tuple[Path, Path | None]) -> str:
    """Return the hashes of an image and its mask, if it has one."""
    digests = []
    for path in (path for path in files if path is not None):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def arithmetic(placement: Placement) -> dict[str, str]:
    """Return what rounds a result this way or another."""
    return {"device": placement.device.type, "dtype": str(placement.dtype), "torch": torch.__version__}
