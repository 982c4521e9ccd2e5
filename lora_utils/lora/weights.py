"""Between the archive and the model: `weights.zip` -> a checked LoRA with its tokens' embeddings, and back.

This module owns what must hold between a LoRA file, its meta.json and a model.
"""

import datetime
import importlib.metadata
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_utils import constants
from lora_utils.config import TrainConfig
from lora_utils.errors import UserError
from lora_utils.io.files import disk_errors
from lora_utils.lora.base_models import check_base_model, check_variant
from lora_utils.lora.formats import LoraFile, read_lora_file, write_lora_file
from lora_utils.lora.hooks import adapts_the_table, check_lora, move_lora
from lora_utils.lora.metadata import Described, describe_training
from lora_utils.lora.ranks import cut_rank, rank_of, share_lost
from lora_utils.lora.updates import LowRank, does_nothing
from lora_utils.lora.weights_zip import Meta, extract_weights, write_weights_zip
from lora_utils.model import modulation
from lora_utils.model.components import Components
from lora_utils.model.device import release_memory
from lora_utils.model.transformer import load_modulations
from lora_utils.model.variant import TEXT_TO_IMAGE
from lora_utils.placeholder.embedding import embedding_matrix, embedding_sha256
from lora_utils.placeholder.tokens import Placeholders, assign_ids, no_placeholders

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True, slots=True)
class Weights:
    """A LoRA on the model's device, its embeddings on the CPU, and what its meta.json says (None: a bare file)."""

    lora: LoraFile
    meta: Meta | None
    name: str


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


# --- reading --------------------------------------------------------------------------------------------------------


def read_weights(path: Path, name: str | None = None) -> tuple[LoraFile, Meta | None]:
    """Read a weights.zip, a tar of the same, a bare .safetensors or an adapter folder of peft's, with its meta.json.

    Every use of a file goes through it. Raises UserError for what is no LoRA of Qwen-Image.
    """
    name = name or path.name
    with tempfile.TemporaryDirectory() as folder:
        found = extract_weights(path, Path(folder))
        lora = read_lora_file(found.lora_path, name, found.adapter_config)
    changes = [*map(does_nothing, lora.layers.values()), *(not bias.any() for bias in lora.biases.values())]
    if not lora.embeddings and all(changes):
        raise UserError(
            f"{name} is zero in all of its {len(lora.names)} layers: it would generate what the base model does."
        )
    if found.meta is not None and found.meta.base_model:
        check_base_model(found.meta.base_model, name)
    return lora, found.meta


def load_weights(path: Path, components: Components, name: str | None = None) -> Weights:
    """Read a LoRA's file, check all of it and move it to the device.

    Raises UserError with what doesn't fit. Nothing of the model is changed by a file that is refused. One that adapts
    what the modulation table follows from has the table's layers loaded beside it.
    """
    name = name or path.name
    lora, meta = read_weights(path, name)
    width = embedding_matrix(components.need_text_encoder()).shape[1]
    check_variant(lora, meta, components, name)
    _check_embeddings(lora, meta, width, name)
    check_lora(lora, components.transformer)
    table = modulation.table_of(components.transformer)
    had_layers = table is not None and table.layers is not None
    load_what_they_adapt([lora], components)
    try:
        moved = move_lora(lora, components.transformer, components.placement)
    except torch.OutOfMemoryError:
        moved = None
    if moved is None:  # outside of the handler, whose traceback holds what was moved
        if table is not None and not had_layers:
            table.layers = None
        release_memory()
        raise UserError(f"{name} doesn't fit into the memory that is free; use a LoRA of a smaller rank.")
    return Weights(moved, meta, name)


def load_what_they_adapt(loras: Sequence[LoraFile], components: Components) -> None:
    """Load the layers that the modulation table stands for, if one of these LoRAs adapts what it follows from.

    Raises UserError where they don't fit into memory.
    """
    if modulation.has_table(components.transformer) and any(map(adapts_the_table, loras)):
        load_modulations(components.transformer, components.folder, components.placement)


def _check_embeddings(lora: LoraFile, meta: Meta | None, width: int, name: str) -> None:
    """Hold the embeddings against the model and the meta: a lost or swapped one is an error, never a base image."""
    promised = {described["token"]: described["sha256"] for described in meta.placeholders} if meta else {}
    for token, embedding in lora.embeddings.items():
        shape = tuple(embedding.shape)
        if shape != (1, width):
            raise UserError(f"{name}: the embedding of {token} has the shape {shape}, the model takes (1, {width}).")
        if not torch.isfinite(embedding).all():
            raise UserError(f"{name}: the embedding of {token} is not finite; train it again.")
        if not embedding.any() and token not in promised:  # one that meta.json describes so began at zero
            raise UserError(f"{name}: the embedding of {token} is zero; train it again.")
    if meta is None:
        return
    if set(promised) != set(lora.embeddings):
        promise, held = ", ".join(promised) or "no token", ", ".join(lora.embeddings) or "none"
        raise UserError(f"{name}: meta.json speaks of {promise}, the LoRA file holds {held}.")
    for token, sha256 in promised.items():
        if embedding_sha256(lora.embeddings[token]) != sha256:
            raise UserError(
                f"{name}: the embedding of {token} isn't the one that meta.json describes; the file was changed."
            )


def placeholders_of(loaded: Sequence[Weights], components: Components) -> Placeholders:
    """Give the tokens of these weights free ids of the text encoder.

    Raises UserError for a token that means two things.
    """
    embeddings, owners = {}, {}
    for weights in loaded:
        for token, embedding in weights.lora.embeddings.items():
            if token in embeddings and not torch.equal(embeddings[token], embedding):
                raise UserError(
                    f"{token} means different things in {owners[token]} and {weights.name}; use one of them."
                )
            embeddings[token], owners[token] = embedding, weights.name
    if not embeddings:
        return no_placeholders()
    matrix = embedding_matrix(components.need_text_encoder())
    ids = assign_ids(list(embeddings), components.tokenizer, matrix.shape[0])
    moved = tuple(embedding[0].to(matrix.device) for embedding in embeddings.values())
    return Placeholders(tuple(ids), tuple(ids.values()), moved)


# What Qwen-Image-Lightning's files are known by (lightx2v/Qwen-Image-Lightning): rank 64 and an alpha of 8 in a key of
# its own, in all 720 layers of attention and MLPs (sgl-project/sglang#17086, modelscope/DiffSynth-Studio#1241, #1068).
LIGHTNING_RANK, LIGHTNING_ALPHA = 64, 8.0
_LIGHTNING_TITLE = re.compile(r"qwen.?image.*lightning.*\d.?steps?", re.IGNORECASE)


def is_lightning(lora: LoraFile) -> bool:
    """Return whether a LoRA is one that samples in 4 or 8 steps without guidance.

    Its own header tells, or the ranks, alphas and layers that such files are known to have; a file's name doesn't.
    """
    if any(_LIGHTNING_TITLE.search(value) for value in lora.metadata.values()):
        return True
    kinds = {(layer.rank, layer.alpha) for layer in lora.layers.values() if isinstance(layer, LowRank)}
    layers = {name.split(".", 2)[-1] for name in lora.layers}
    known = lora.alphas_in_keys and kinds == {(LIGHTNING_RANK, LIGHTNING_ALPHA)}
    return known and layers == set(constants.LORA_TARGETS["attention_mlp"])


def read_init_weights(path: Path, config: TrainConfig) -> LoraFile:
    """Read an adapter of any layout to continue learning from, before a model is loaded.

    A LoRA of a larger rank than the run's is cut to it, and how much of it is lost is logged. Raises UserError for one
    that changes biases, and where its tokens aren't the run's, with what to set.
    """
    lora, _ = read_weights(path)
    if lora.biases:
        raise UserError(f"init_weights {path.name} changes biases, which aren't trained; give one without.")
    cut = {name: cut_rank(update, config.rank) for name, update in lora.layers.items()}
    if lost := share_lost(lora.layers, cut):
        log.warning("init_weights %s: cut to rank %d, which loses %.1f %% of it", path.name, config.rank, 100 * lost)
    elif any(rank_of(update) not in (None, config.rank) for update in lora.layers.values()):
        log.info(
            "init_weights %s: of a smaller rank; what rank %d adds to it starts as no change", path.name, config.rank
        )
    lora = replace(lora, layers=cut)
    if unused := [token for token in lora.embeddings if token not in config.tokens]:
        raise UserError(
            f"init_weights {path.name} has learned {', '.join(unused)}; set train_placeholder_token and name them in "
            "placeholder_token, or their embeddings would be lost."
        )
    return lora


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What meta.json says of a training beyond its config."""

    base_model: str
    num_images: int
    steps: int
    final_loss: float | None
    placeholders: list[dict[str, Any]]  # what `describe_embeddings` says of each; empty without a token
    captions: Sequence[str] = ()
    title: str = ""  # empty: what the run teaches
    thumbnail: Image.Image | None = None
    pipeline: str = TEXT_TO_IMAGE.pipeline  # of the base model


def save_weights(target: Path, lora: LoraFile, config: TrainConfig, facts: TrainingFacts) -> None:
    """Write `weights.zip` with the LoRA, its embeddings and a meta.json that says how they were made.

    `config` is the resolved one. Raises UserError where the disk is full.
    """
    # What meta.json says.
    meta = Meta(
        base_model=facts.base_model,
        pipeline=facts.pipeline,
        train_placeholder_token=config.train_placeholder_token,
        placeholder_token=config.placeholder_token if facts.placeholders else None,
        placeholder_token_id=_one_or_all([described["token_id"] for described in facts.placeholders]),
        placeholder=_one_or_all(facts.placeholders),
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        training_steps=facts.steps,
        learning_rate=config.learning_rate,
        resolution=config.resolution,
        batch_size=config.batch_size,
        seed=config.seed,
        num_images=facts.num_images,
        final_loss=facts.final_loss,
        config=asdict(config),
        versions=package_versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )

    described = Described(
        facts.base_model,
        facts.captions,
        facts.num_images,
        facts.steps,
        facts.final_loss,
        facts.title or ", ".join(config.triggers) or "Qwen-Image LoRA",
        facts.thumbnail,
        facts.pipeline in constants.EDIT_PIPELINES,
    )

    # Write both beside the target, then rename: there is a complete archive or none.
    remedy = "free some room. If save_every kept checkpoints, resume=auto writes it from the last one."
    with (
        disk_errors(f"{target.name} can't be written", remedy),
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
        lora_path = Path(folder) / "lora_weights.safetensors"
        write_lora_file(lora_path, replace(lora, metadata=describe_training(config, described)))
        write_weights_zip(target, lora_path, meta)


def _one_or_all(values: list[Any]) -> Any:
    """Return None for none, the one for one: what a run with a single token writes is no list."""
    return None if not values else values[0] if len(values) == 1 else values
