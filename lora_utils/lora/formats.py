"""LoRA files: every known key layout read into one canonical map, and the portable file written from it.

This module is the one way in: prediction, `init_weights` and `convert` read what it reads, and refuse what it refuses.
It knows no more of models than the names of their layers.

Legend: R rank, D_in and D_out the widths of the adapted linear layer, D the text encoder's width.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_utils import constants
from lora_utils.constants import PEFT_CONFIG, PEFT_WEIGHTS
from lora_utils.errors import UserError
from lora_utils.io.files import atomic_path
from lora_utils.lora.keys import foreign_layers, other_method, parse_key
from lora_utils.lora.strength import HEADER_KEY, AdapterConfig, adapter_config, header_config, other_base

log = logging.getLogger(__name__)

_EMBEDDING_KEY = re.compile(re.escape(constants.PLACEHOLDER_KEY).replace(r"\{token\}", r"(?P<token><[^.]+>)"))
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Layout:
    """A tool's names of a LoRA's tensors: a module's key, and what is added to it for each of its parts."""

    key: str
    down: str
    up: str
    flat: bool = False  # the module's dots are underscores
    alpha: bool = False  # has alpha keys; without them it is the rank
    takes_embeddings: bool = False  # its readers take a token's embedding in the same file


LAYOUTS = {
    "diffusers": Layout("transformer.{}", ".lora_A.weight", ".lora_B.weight", takes_embeddings=True),
    "comfyui": Layout("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight"),  # ai-toolkit's and fal's too
    "kohya": Layout("lora_unet_{}", ".lora_down.weight", ".lora_up.weight", flat=True, alpha=True),  # musubi's too
    "diffsynth": Layout("{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft": Layout(_PEFT_PREFIX + "{}", ".lora_A.weight", ".lora_B.weight"),  # in a folder with its config
    "lycoris": Layout("lycoris_{}", ".lora_down.weight", ".lora_up.weight", flat=True, alpha=True),
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one linear layer, up @ down times alpha / R."""

    down: Tensor  # [R, D_in]
    up: Tensor  # [D_out, R]
    alpha: float

    @property
    def rank(self) -> int:
        """The rank, R."""
        return self.down.shape[0]

    def with_alpha_of_rank(self) -> "LowRank":
        """Return the same update with alpha = rank, which is what a file without alphas means."""
        if self.alpha == self.rank:
            return self
        return LowRank(self.down, self.up.float() * (self.alpha / self.rank), float(self.rank))

    def does_nothing(self) -> bool:
        """Return whether the update is zero."""
        return self.alpha == 0 or not self.up.any() or not self.down.any()


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA: `layers` by dotted module name of the transformer, `embeddings` [1, D] fp32 by placeholder token."""

    layers: dict[str, LowRank]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    sha256: str = ""  # of the file it was read from
    metadata: Mapping[str, str] = field(default_factory=dict)  # of its header
    alphas_in_keys: bool = False  # each layer's alpha stands in a key of its own, as kohya's tools write it


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def read_lora_file(path: Path, name: str | None = None, config: Mapping[str, Any] | None = None) -> LoraFile:
    """Read a safetensors LoRA in any known layout. `name` stands for the file in messages.

    `config` is the adapter_config.json that came with it, if one did. Raises UserError for what isn't safetensors,
    holds no LoRA, another method, another model's layers, half a pair, a layer twice, or numbers that can't be.
    """
    name = name or path.name
    tensors, metadata = _read_tensors(path, name)
    if model := other_base(metadata, config):
        raise UserError(f"{name} says that it was made for {model}; use a LoRA of Qwen-Image.")
    embeddings = {found["token"]: tensor for key, tensor in tensors.items() if (found := _EMBEDDING_KEY.fullmatch(key))}
    parts = _sorted_by_layer([key for key in tensors if not _EMBEDDING_KEY.fullmatch(key)], name)
    strengths = header_config(metadata, name)
    if strengths is None and config is not None:
        strengths = adapter_config(config, f"{name}: its {PEFT_CONFIG}")
    layers = {layer: _layer(layer, keys, tensors, strengths, name) for layer, keys in parts.items()}
    alphas_in_keys = all("alpha" in keys for keys in parts.values())
    if strengths is None and not alphas_in_keys and any(_is_pefts(key) for key in tensors):
        log.warning("%s says nothing of its alpha, which is taken to be its rank; add its %s", name, PEFT_CONFIG)
    return LoraFile(layers, embeddings, file_sha256(path), metadata, alphas_in_keys)


def _read_tensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors, those of 8 bits as fp32, and its header."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{name} is no safetensors file that can be read ({why}); give a weights.zip or a .safetensors LoRA."
        ) from error
    eight_bits = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize == 1}
    return {**tensors, **{key: tensor.float() for key, tensor in eight_bits.items()}}, metadata


def _sorted_by_layer(keys: list[str], name: str) -> dict[str, dict[str, str]]:
    """Return each layer's keys by their part. Raises UserError for what isn't a plain LoRA of Qwen-Image."""
    parts: dict[str, dict[str, str]] = {}
    for key in keys:
        if method := other_method(key):
            raise UserError(f"{name} holds {method} weights ({key!r}), which aren't supported; use a plain LoRA.")
    if model := foreign_layers(keys):
        raise UserError(f"{name} holds layers of {model}: this LoRA was made for another model than Qwen-Image.")
    for key in keys:
        found = parse_key(key)
        if found is None:
            if key.startswith(("lora_", "lycoris_")):
                raise UserError(f"LoRA key {key!r} names no layer of Qwen-Image: this LoRA was made for another model.")
            raise UserError(f"{name} holds {key!r}, which belongs to no LoRA; is it a LoRA of Qwen-Image?")
        own = parts.setdefault(found.layer, {})
        if found.part in own:
            raise UserError(f"{name} holds layer {found.layer!r} twice, as {own[found.part]!r} and {key!r}.")
        own[found.part] = key
    if not parts:
        raise UserError(f"{name} holds no LoRA layers.")
    return parts


def _layer(
    layer: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], config: AdapterConfig | None, name: str
) -> LowRank:
    """Return a layer's update. Raises UserError for half a pair, wrong shapes and numbers that can't be."""
    # The pair.
    if not {"down", "up"} <= set(keys):
        raise UserError(f"{name}: layer {layer!r} lacks {' and '.join(sorted({'down', 'up'} - set(keys)))}.")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise UserError(f"{name}: layer {layer!r} has the shapes {shapes}, expected [R, D_in] and [D_out, R].")
    for part in (down, up):
        if not part.is_floating_point():
            raise UserError(f"{name}: layer {layer!r} is stored as {part.dtype}; store it in bf16, fp16 or fp32.")
        if not part.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity in {layer!r}; its training has failed.")

    # Its alpha, from its own key or the config, which must agree where there are both.
    rank = down.shape[0]
    configured = config.alpha_of(layer, rank) if config else None
    if "alpha" not in keys:
        return LowRank(down, up, float(rank if configured is None else configured))
    given = tensors[keys["alpha"]]
    if given.numel() != 1 or given.is_complex() or not given.float().isfinite().all():
        shown = given.flatten()[:4].tolist()
        raise UserError(f"{name}: the alpha of layer {layer!r} must be one finite number, got {shown}.")
    alpha = float(given.flatten()[0])
    if configured is not None and configured != alpha:
        raise UserError(
            f"{name}: layer {layer!r} has the alpha {alpha:g}, and its config says {configured:g}; remove one."
        )
    return LowRank(down, up, alpha)


def _is_pefts(key: str) -> bool:
    """Return whether a key is as peft writes it: peft keeps the alpha in another file."""
    found = parse_key(key)
    return found is not None and (key.startswith(_PEFT_PREFIX) or bool(found.adapter))


# --- writing --------------------------------------------------------------------------------------------------------


def write_lora_file(path: Path, lora: LoraFile, layout: str = "diffusers", dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a tool's keys, alpha = rank, the config in the header for diffusers, and the embeddings in fp32.

    diffusers' own, the default, are what diffusers, ComfyUI and we read alike. A layout whose readers refuse a token's
    embedding is written without: see `write_embeddings`. Raises UserError for a number that the dtype can't hold.
    """
    names = LAYOUTS[layout]
    tensors = _tensors(lora, names, dtype)
    if names.takes_embeddings:
        tensors |= _embedding_tensors(lora)
    if layout == "diffusers":
        header = json.dumps({f"transformer.{key}": value for key, value in _config_of(lora).items()})
        save_file(tensors, path, {HEADER_KEY: header})  # one entry: safetensors writes several in random order
    else:
        save_file(tensors, path)


def write_peft_folder(folder: Path, lora: LoraFile, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an adapter folder as `PeftModel.from_pretrained(transformer, folder)` loads it."""
    from peft import LoraConfig  # noqa: PLC0415 (heavy, and only here)

    folder.mkdir()
    write_lora_file(folder / PEFT_WEIGHTS, lora, "peft", dtype)
    LoraConfig(**_config_of(lora)).save_pretrained(str(folder))


def write_embeddings(path: Path, lora: LoraFile) -> None:
    """Write the tokens' embeddings alone, [1, D] fp32 each, under the keys that they have in our own file."""
    with atomic_path(path) as partial:
        save_file(_embedding_tensors(lora), partial)


def _tensors(lora: LoraFile, names: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for module, given in lora.layers.items():
        layer, key = given.with_alpha_of_rank(), names.key.format(module.replace(".", "_") if names.flat else module)
        for ending, part in ((names.down, layer.down), (names.up, layer.up)):
            tensors[key + ending] = part.to(dtype).contiguous()
            if not tensors[key + ending].isfinite().all() and part.isfinite().all():
                most = float(part.abs().max())
                raise UserError(f"layer {module!r} holds {most:.3g}, which {dtype} can't; convert to bf16 or fp32.")
        if names.alpha:
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def _embedding_tensors(lora: LoraFile) -> dict[str, Tensor]:
    return {
        constants.PLACEHOLDER_KEY.format(token=token): embedding.float().contiguous()
        for token, embedding in lora.embeddings.items()
    }


def _config_of(lora: LoraFile) -> dict[str, Any]:
    """Return the fields of peft's config that a file with alpha = rank has."""
    ranks = {module: layer.rank for module, layer in lora.layers.items()}
    rank = max(ranks.values())
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(lora.layers), "bias": "none"}
    if others := {module: own for module, own in ranks.items() if own != rank}:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    return config
