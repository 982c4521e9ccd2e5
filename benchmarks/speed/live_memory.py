"""Live memory, counted: what tensors hold at once while code runs on them, with data or without."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within it each storage that an operation makes is counted until it is freed. Views hold nothing of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes, self.peak_bytes = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:  # a view's storage is its input's
                self._hold(tensor)
        return made

    def _hold(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, key)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor as freed, one that is accounted for elsewhere."""
        self._free(_key(tensor))

    def _free(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
