"""Captions, cached: the states of those that hold no token that learns, which never change.

Legend: T text tokens, D the text encoder's width.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Qwen2_5_VLTextModel, Qwen2Tokenizer

from lora_utils.dataset.cache_keys import arithmetic
from lora_utils.io.logging import Progress
from lora_utils.io.tensor_store import Tensors, TensorStore, content_key, folder_fingerprint
from lora_utils.model.device import Placement
from lora_utils.model.text_encoder import Prompt, encode_text, prompt_ids
from lora_utils.model.variant import TEXT_TO_IMAGE, Variant
from lora_utils.placeholder.embedding import embedding_sha256
from lora_utils.placeholder.tokens import Placeholders

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


class CachedTexts(Mapping[str, Tensor]):
    """Caption -> states [T, D] on the CPU, read when they are asked for."""

    def __init__(self, entries: Mapping[str, Tensors]):
        self._entries = entries

    def __getitem__(self, caption: str) -> Tensor:
        return self._entries[caption]["states"]

    def __contains__(self, caption: object) -> bool:  # Mapping's own would read the states
        return caption in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True, slots=True)
class FixedCaptions:
    """Prompts whose states never change: what was found of them, the rest's keys, and the tokens they may hold."""

    found: dict[str, Tensors]
    new: dict[str, tuple[str, Prompt]]
    placeholders: Placeholders


def find_captions(
    prompts: Mapping[str, Prompt],
    tokenizer: Qwen2Tokenizer,
    folder: Path,
    placement: Placement,
    store: TensorStore,
    variant: Variant,
    placeholders: Placeholders,
) -> FixedCaptions:
    """Look prompts up, each by its `text_key`; `encode_captions` adds those that are new.

    `placeholders`: tokens that don't learn. What holds one follows from its embedding too.
    """
    source = folder / "text_encoder"
    follows_from = {
        "of": "text, 1",
        "encoder": folder_fingerprint(source),
        "by": transformers.__version__,
        **arithmetic(placement),
    }

    def key_of(name: str, prompt: Prompt) -> str:
        read = {
            "embeddings": [embedding_sha256(each) for each in placeholders.used_in([prompt.text]).embeddings],
            "seen": name.partition("\0")[2] if prompt.images else "",
        }
        return content_key(
            **follows_from,
            drop=variant.prefix_tokens,
            ids=prompt_ids(tokenizer, prompt, placeholders, variant),
            **{name: value for name, value in read.items() if value},
        )

    keys = {name: key_of(name, prompt) for name, prompt in prompts.items()}
    found = {caption: tensors for caption, key in keys.items() if (tensors := store.get(key)) is not None}
    if found:
        log.info("%d of %d encoded captions were in the cache", len(found), len(keys))
    new = {name: (key, prompts[name]) for name, key in keys.items() if name not in found}
    return FixedCaptions(found, new, placeholders)


@torch.no_grad()
def encode_captions(
    fixed: FixedCaptions,
    text_encoder: Qwen2_5_VLTextModel | None,
    tokenizer: Qwen2Tokenizer,
    store: TensorStore,
    variant: Variant = TEXT_TO_IMAGE,
) -> CachedTexts:
    """Encode the new captions one at a time, as prediction does, so that both are the same bit for bit. -> all"""
    entries = dict(fixed.found)
    progress = Progress(len(fixed.new), _LOG_EVERY_S)
    for count, (name, (key, prompt)) in enumerate(fixed.new.items(), start=1):
        if text_encoder is None:
            raise RuntimeError(f"{len(fixed.new)} captions are new, and there is no text encoder")
        used = fixed.placeholders.used_in([prompt.text])
        states = encode_text(text_encoder, tokenizer, [prompt], used, variant).states[0].cpu()
        entries[name] = store.put(key, {"states": states.clone()})
        if progress.should_log(count) and 1 < count < len(fixed.new):
            log.info("encoded %d of %d captions", count, len(fixed.new))
    return CachedTexts(entries)
