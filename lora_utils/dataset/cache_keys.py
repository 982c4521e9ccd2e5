"""What an entry of the cache follows from beside its settings: the content of files, and what rounds a result."""

from pathlib import Path

import torch

from lora_utils.io.files import file_sha256
from lora_utils.model.device import Placement


def digest_files(files: tuple[Path, Path | None]) -> str:
    """Return the hashes of an image and its mask, if it has one."""
    return " ".join(file_sha256(path) for path in files if path is not None)


def arithmetic(placement: Placement) -> dict[str, str]:
    """Return what rounds a result this way or another."""
    return {"device": placement.device.type, "dtype": str(placement.dtype), "torch": torch.__version__}
