"""The LoRAs that were used last, kept on the device."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from lora_utils.constants import PEFT_CONFIG
from lora_utils.io.files import file_sha256
from lora_utils.lora.hooks import adapts_the_table
from lora_utils.lora.updates import tensors_of
from lora_utils.lora.weights import Weights, load_weights
from lora_utils.model import modulation
from lora_utils.model.components import Components

log = logging.getLogger(__name__)

LORA_CACHE_BYTES = 4 * 10**9  # of LoRAs on the device; one of rank 32 on attention has 0.19


@dataclass(slots=True)
class LoraCache:
    """The LoRAs that were used last, on the device, by the hash of their file: using one again costs milliseconds."""

    most_bytes: float
    loaded: dict[str, Weights] = field(default_factory=dict)

    def get(self, path: Path, components: Components) -> Weights:
        """Return the weights of a file. Raises UserError as `load_weights` does; a file that fails is forgotten."""
        began, key = time.monotonic(), _content_key(path)
        weights, how = self.loaded.pop(key, None), "swapped to"
        if weights is None:
            weights, how = load_weights(path, components), "loaded"
        self.loaded[key] = weights  # the last one used is the last one to go
        while len(self.loaded) > 1 and sum(map(lora_bytes, self.loaded.values())) > self.most_bytes:
            self.loaded.pop(next(iter(self.loaded)))
        table = modulation.table_of(components.transformer)
        if table is not None and not any(adapts_the_table(each.lora) for each in self.loaded.values()):
            table.layers = None  # no LoRA at hand needs them
        tokens = f", with {', '.join(weights.lora.embeddings)}" if weights.lora.embeddings else ""
        log.info(
            "%s %s: a LoRA of %d layers%s, %.0f MB, in %.3f s, sha256 %s",
            how,
            weights.name,
            len(weights.lora.names),
            tokens,
            lora_bytes(weights) / 1e6,
            time.monotonic() - began,
            weights.lora.sha256,
        )
        return weights


def lora_bytes(weights: Weights) -> int:
    """Return what a LoRA's tensors hold on the device."""
    held = [part for layer in weights.lora.layers.values() for part in tensors_of(layer)]
    return sum(part.nbytes for part in [*held, *weights.lora.biases.values()])


def _content_key(path: Path) -> str:
    """Return what a file's or an adapter folder's content hashes to, with the config that may stand beside it."""
    found = sorted(path.glob("*")) if path.is_dir() else [path, path.with_name(PEFT_CONFIG)]
    return " ".join(file_sha256(each) for each in found if each.is_file())
