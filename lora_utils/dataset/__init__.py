"""A dataset: an upload of images and captions -> checked examples -> cached tensors.

`load` reads and checks a folder. It is imported when it is asked for: `python -m lora_utils.dataset --help` needs
neither torch nor a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_utils.dataset.examples import Dataset, Example
    from lora_utils.dataset.scan import load

__all__ = ["Dataset", "Example", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'scan' if name == 'load' else 'examples'}"), name)
