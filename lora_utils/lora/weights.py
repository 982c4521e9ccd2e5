"""Between the archive and the model: `weights.zip` -> a checked LoRA with its rows, and back.

Owns what must hold between a LoRA file, its meta.json and a model; must not know of training or sampling.
"""

import datetime
import importlib.metadata
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_utils import modulation
from lora_utils.adapters import place_lora
from lora_utils.bundle import Meta, unpack_weights, write_weights
from lora_utils.config import TrainConfig
from lora_utils.disk import refusals_named
from lora_utils.errors import UserError
from lora_utils.lora_file import LoraFile, file_sha256, read_lora_file, row_sha256, write_lora_file
from lora_utils.models import Components, restore_modulations
from lora_utils.placeholder import Placeholders, assign_slots, embedding_matrix, no_placeholders

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True, slots=True)
class Weights:
    """A LoRA on the model's device, its placeholder rows on the CPU, and what its meta.json says (None: bare file)."""

    lora: LoraFile
    meta: Meta | None
    name: str


def versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def _check_rows(lora: LoraFile, meta: Meta | None, width: int, name: str) -> None:
    """Hold the rows against the model and the meta: a lost or swapped row is an error, never a base picture."""
    for token, row in lora.rows.items():
        if tuple(row.shape) != (1, width):
            raise UserError(
                f"{name}: the row of {token} has the shape {tuple(row.shape)}, the model takes (1, {width})."
            )
        if not torch.isfinite(row).all() or not row.any():
            raise UserError(
                f"{name}: the row of {token} is {'zero' if not row.any() else 'not finite'}; train it anew."
            )
    if meta is None:
        return
    promised = {described["token"]: described["sha256"] for described in meta.placeholders}
    if set(promised) != set(lora.rows):
        promise = ", ".join(promised) or "no token"
        raise UserError(f"{name}: meta.json speaks of {promise}, the LoRA file holds {', '.join(lora.rows) or 'none'}.")
    for token, sha256 in promised.items():
        if row_sha256(lora.rows[token]) != sha256:
            raise UserError(f"{name}: the row of {token} isn't the one that meta.json describes; the file was changed.")


def load_weights(path: Path, components: Components, name: str | None = None) -> Weights:
    """Read a weights.zip, a tar of the same, or a bare .safetensors, check all of it and place the LoRA.

    Raises UserError with what doesn't fit; nothing of the model is changed here.
    """
    name = name or path.name
    with tempfile.TemporaryDirectory() as folder:
        lora_path, meta = unpack_weights(path, Path(folder))
        lora = read_lora_file(lora_path, name)
    if modulation.has_table(components.transformer) and any(map(modulation.is_modulation_layer, lora.layers)):
        restore_modulations(components)
        log.info("%s adapts the modulations: their weights are loaded and stand in for the table from here on", name)
    width = embedding_matrix(components.text_encoder).shape[1]
    _check_rows(lora, meta, width, name)
    return Weights(place_lora(lora, components.transformer, components.place), meta, name)


def placeholders_of(loaded: Sequence[Weights], components: Components) -> Placeholders:
    """The tokens of these weights in free slots of the text encoder. Raises UserError for a token that means two."""
    rows, owners = {}, {}
    for weights in loaded:
        for token, row in weights.lora.rows.items():
            if token in rows and not torch.equal(rows[token], row):
                raise UserError(
                    f"{token} means different things in {owners[token]} and {weights.name}; use one of them."
                )
            rows[token], owners[token] = row, weights.name
    if not rows:
        return no_placeholders()
    matrix = embedding_matrix(components.text_encoder)
    slots = assign_slots(list(rows), components.tokenizer, matrix.shape[0])
    placed = tuple(row[0].to(matrix.device) for row in rows.values())
    return Placeholders(tuple(slots), tuple(slots.values()), placed)


# --- loaded weights -------------------------------------------------------------------------------------------------

SHELF_BYTES = 4 * 10**9  # of LoRAs on the device; one of rank 32 on attention has 0.19


@dataclass(slots=True)
class Shelf:
    """The LoRAs that were used last, on the device, by the hash of their file: using one again costs milliseconds."""

    most_bytes: float
    loaded: dict[str, Weights] = field(default_factory=dict)

    def get(self, path: Path, components: Components) -> Weights:
        """The weights of a file. Raises UserError as `load_weights` does; a file that fails is forgotten."""
        began, key = time.monotonic(), file_sha256(path)
        weights, how = self.loaded.pop(key, None), "swapped to"
        if weights is None:
            weights, how = load_weights(path, components), "loaded"
        self.loaded[key] = weights  # the last one used is the last one to go
        while len(self.loaded) > 1 and sum(map(size_bytes, self.loaded.values())) > self.most_bytes:
            self.loaded.pop(next(iter(self.loaded)))
        tokens = f", with {', '.join(weights.lora.rows)}" if weights.lora.rows else ""
        log.info(
            "%s %s: a LoRA of %d layers%s, %.0f MB, in %.3f s, sha256 %s", how, weights.name, len(weights.lora.layers),
            tokens, size_bytes(weights) / 1e6, time.monotonic() - began, weights.lora.sha256,
        )  # fmt: skip
        return weights


def size_bytes(weights: Weights) -> int:
    """What its matrices hold on the device."""
    return sum(part.nbytes for layer in weights.lora.layers.values() for part in (layer.down, layer.up))


def is_lightning(weights: Weights) -> bool:
    """Whether it is one of the LoRAs that draw in 4 or 8 steps without guidance: they are told by their names alone."""
    return "lightning" in weights.name.casefold()


def _one_or_all(values: list[Any]) -> Any:
    """None for none, the one for one: what a run with a single token writes is no list."""
    return None if not values else values[0] if len(values) == 1 else values


def save_weights(
    target: Path, lora: LoraFile, config: TrainConfig, base_model: str, num_images: int, final_loss: float | None,
    placeholders: list[dict[str, Any]], steps: int | None = None,
) -> None:  # fmt: skip
    """Write `weights.zip` with the LoRA, its rows and a meta.json that says how they were made.

    Raises UserError where the disk is full.
    """
    meta = Meta(
        base_model=base_model,
        train_placeholder_token=config.train_placeholder_token,
        placeholder_token=config.placeholder_token if placeholders else None,
        placeholder_token_id=_one_or_all([described["token_id"] for described in placeholders]),
        placeholder=_one_or_all(placeholders),
        rank=config.rank,
        lora_alpha=config.rank,
        lora_targets=config.lora_targets,
        training_steps=config.steps if steps is None else steps,
        learning_rate=config.learning_rate,
        resolution=config.resolution,
        batch_size=config.batch_size,
        seed=config.seed,
        num_images=num_images,
        final_loss=final_loss,
        config=asdict(config),
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    remedy = "free some room. If save_every kept checkpoints, resume=auto writes it from the last one."
    with (
        refusals_named(f"{target} can't be written", remedy),
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
        lora_path = Path(folder) / "lora_weights.safetensors"
        write_lora_file(lora_path, lora)
        write_weights(target, lora_path, meta)
