"""Several LoRAs as one, a LoRA of another rank, and the LoRA that lies between two checkpoints of the transformer.

This module owns what such a file means, and how much of what it was made from it has lost.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_utils.errors import UserError
from lora_utils.io.model_folder import weight_files
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.keys import without_wrappers
from lora_utils.lora.ranks import cut_rank, joined, low_rank_of, share_lost
from lora_utils.lora.updates import Decomposed, Difference, LowRank, Update, with_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Merged:
    """A LoRA made of others, and the share of their size that it has lost: the norm of what is missing by all."""

    lora: LoraFile
    lost: float


# --- merging --------------------------------------------------------------------------------------------------------


def merge(loras: Sequence[tuple[LoraFile, float]], rank: int | None, names: Sequence[str]) -> Merged:
    """Return the one LoRA that computes the sum of several, each at its scale, of the sum of their ranks or of `rank`.

    `names` are the files' for errors. Raises UserError for a token that means two things, for a DoRA, whose change
    hangs on the model's weights, and for a method without a rank where none is given.
    """
    embeddings: dict[str, Tensor] = {}
    for (lora, _), name in zip(loras, names, strict=True):
        for token, embedding in lora.embeddings.items():
            if not torch.equal(embeddings.setdefault(token, embedding), embedding):
                raise UserError(f"{token} of {name} means another thing in a file before it; merge others.")
    exact: dict[str, Update] = {}
    for layer in dict.fromkeys(layer for lora, _ in loras for layer in lora.layers):
        exact[layer] = _sum([(lora.layers[layer], scale) for lora, scale in loras if layer in lora.layers], layer, rank)
    cut = exact if rank is None else {layer: cut_rank(update, rank) for layer, update in exact.items()}
    biases: dict[str, Tensor] = {}
    for lora, scale in loras:
        for layer, bias in lora.biases.items():
            biases[layer] = biases.get(layer, torch.zeros(())) + scale * bias.float()
    one = loras[0][0] if len(loras) == 1 else None
    return Merged(
        LoraFile(cut, embeddings, metadata=one.metadata if one else {}, biases=biases), share_lost(exact, cut)
    )


def _sum(updates: Sequence[tuple[Update, float]], layer: str, rank: int | None) -> Update:
    """Return one layer's sum: a single update at scale 1 as it is, LoRAs side by side, anything else by its matrix."""
    if len({update.shape for update, _ in updates}) > 1:
        raise UserError(f"layer {layer!r} has several shapes in these files; merge LoRAs of one model.")
    if len(updates) == 1 and updates[0][1] == 1 and (rank is None or isinstance(updates[0][0], LowRank)):
        return updates[0][0]
    low_rank = [(update, scale) for update, scale in updates if isinstance(update, LowRank)]
    if len(low_rank) == len(updates):
        return joined(low_rank)
    if any(isinstance(update, Decomposed) for update, _ in updates):
        raise UserError(
            f"layer {layer!r} has a DoRA, which changes with the model's weights; it can't be merged or cut."
        )
    if rank is None:
        raise UserError(f"layer {layer!r} is no plain LoRA, so its sum has no rank of its own; give --rank.")
    total = torch.zeros(updates[0][0].shape)
    for update, scale in updates:
        assert not isinstance(update, Decomposed)
        total += scale * with_tensors(update, Tensor.float).matrix()
    return Difference(total)


# --- extraction -----------------------------------------------------------------------------------------------------


def extract(tuned: Path, base: Path, rank: int) -> Merged:
    """Return the LoRA of a rank that is nearest to what a checkpoint has more than its base, layer by layer.

    Both are a model folder, its transformer's, or one .safetensors file. Raises UserError for what isn't, for other
    layers or shapes, and for two that are equal. What isn't a linear layer's weight is left out, and said.
    """
    layers: dict[str, Update] = {}
    kept = total = 0.0
    left_out = []
    with ExitStack() as stack:
        ours, theirs = (dict(_weights(path, stack)) for path in (base, tuned))
        if missing := sorted(set(ours) ^ set(theirs)):
            raise UserError(f"{tuned.name} and {base.name} aren't of one model: {missing[0]} is in one only.")
        for index, name in enumerate(theirs):
            if index % 100 == 0:
                log.info("%d of %d tensors compared", index, len(theirs))
            before, after = ours[name](), theirs[name]()
            if before.shape != after.shape:
                shapes = f"{tuple(before.shape)} in {base.name} and {tuple(after.shape)} in {tuned.name}"
                raise UserError(f"{name} has two shapes, {shapes}; give checkpoints of one model.")
            change = after.float() - before.float()
            if not change.any():
                continue
            if change.ndim != 2:
                left_out.append(name)
                continue
            found = low_rank_of(change, rank)
            layers[name.removesuffix(".weight")] = found
            kept, total = kept + float(found.matrix().square().sum()), total + float(change.square().sum())
    if left_out:
        log.warning("%d tensors that aren't linear layers' weights differ too, and are left out", len(left_out))
    if not layers:
        raise UserError(f"{tuned.name} and {base.name} have the same weights; there is nothing to extract.")
    return Merged(LoraFile(layers), max(0.0, 1 - kept / total) ** 0.5)


def _weights(path: Path, stack: ExitStack) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the names of a checkpoint's tensors, as the transformer has them, each with what reads it."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = weight_files(folder) if folder.is_dir() else [path]
    for file in files:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file.name} is no safetensors file that can be read ({error}); name a checkpoint."
            ) from error
        for stored in opened.keys():  # noqa: SIM118 (safe_open isn't a mapping)
            yield without_wrappers(stored), partial(opened.get_tensor, stored)
