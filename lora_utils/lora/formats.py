"""LoRA files: every known key layout read into one canonical map, and the portable file written from it.

This module owns key names and alphas. It knows no more of models than the names of their layers.

Legend: R rank, D_in and D_out the widths of the adapted linear layer, D the text encoder's width.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_utils import constants
from lora_utils.errors import UserError

HEADER_KEY = "lora_adapter_metadata"  # where diffusers looks for the adapter's config

# What tools put in front of a module's name. Longest first, so that the shorter ones don't cut into them.
_PREFIXES = ("base_model.model.transformer.", "base_model.model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = (
    "lora_unet_",
    "lycoris_",
    "lora_transformer_",
)  # kohya's, LyCORIS's, OneTrainer's: no dots from here on
_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", ".lora_A.default")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", ".lora_B.default")
_OTHER_METHODS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lokr_w": "LoKr",
    ".hada_w": "LoHa",
    ".oft_": "OFT",
    ".diff": "a full-weight difference",
    ".lora_mid": "Tucker LoCon",
}
_FLAT_NAMES = {
    name.replace(".", "_"): name
    for name in (*constants.ATTENTION_TARGETS, *constants.MLP_TARGETS, "img_mod.1", "txt_mod.1", "attn.to_out")
}
_EMBEDDING_KEY = re.compile(re.escape(constants.PLACEHOLDER_KEY).replace(r"\{token\}", r"(?P<token><[^.]+>)"))


@dataclass(frozen=True, slots=True)
class Layout:
    """A tool's names of a LoRA's tensors: a module's key, and what is added to it for each of its parts."""

    key: str
    down: str
    up: str
    flat: bool = False  # the module's dots are underscores
    alpha: bool = False  # has alpha keys; without them it is the rank


LAYOUTS = {
    "diffusers": Layout("transformer.{}", ".lora_A.weight", ".lora_B.weight"),
    "comfyui": Layout("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight"),  # ai-toolkit's and fal's too
    "kohya": Layout("lora_unet_{}", ".lora_down.weight", ".lora_up.weight", flat=True, alpha=True),  # musubi's too
    "diffsynth": Layout("{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft": Layout("base_model.model.{}", ".lora_A.weight", ".lora_B.weight"),
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
        return LowRank(self.down, self.up * (self.alpha / self.rank), float(self.rank))


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA: `layers` by dotted module name of the transformer, `embeddings` [1, D] fp32 by placeholder token."""

    layers: dict[str, LowRank]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    sha256: str = ""  # of the file it was read from


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _module_name(name: str, key: str) -> str:
    """Return the dotted module name behind a key without its LoRA ending."""
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            block = re.fullmatch(r"transformer_blocks_(\d+)_(\w+)", flat)
            if block and block[2] in _FLAT_NAMES:
                return f"transformer_blocks.{block[1]}.{_FLAT_NAMES[block[2]]}"
            raise UserError(f"LoRA key {key!r} names no layer of Qwen-Image: this LoRA was made for another model.")
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _split(key: str) -> tuple[str, str] | None:
    """Return (module, part) of a LoRA key, part one of down, up and alpha; None for keys that belong to no LoRA."""
    for part, endings in (("down", _DOWN), ("up", _UP), ("alpha", (".alpha",))):
        for ending in endings:
            if key.endswith(ending):
                return _module_name(key.removesuffix(ending), key), part
    return None


def _header_alphas(metadata: dict[str, str], name: str) -> tuple[float | None, dict[str, float]]:
    """Return (alpha of all layers, alphas of single layers) from diffusers' header; None where it says nothing."""
    if HEADER_KEY not in metadata:
        return None, {}
    try:
        config = {k.removeprefix("transformer."): v for k, v in json.loads(metadata[HEADER_KEY]).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{name}: the header's {HEADER_KEY} isn't a JSON object ({error}).") from error
    single = {name.removeprefix("^"): float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()}
    return (float(config["lora_alpha"]) if config.get("lora_alpha") is not None else None), single


def read_lora_file(path: Path, name: str | None = None) -> LoraFile:
    """Read a safetensors LoRA in any known layout. `name` stands for the file in messages.

    Raises UserError for what isn't safetensors, holds no LoRA, an unknown key or method, or half a pair.
    """
    # All tensors of the file.
    name = name or path.name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{name} is no safetensors file ({error}); give a weights.zip or a .safetensors LoRA."
        ) from error

    # Sort them by module; embeddings apart.
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if embedding := _EMBEDDING_KEY.fullmatch(key):
            embeddings[embedding["token"]] = tensor
            continue
        for mark, method in _OTHER_METHODS.items():
            if mark in key:
                raise UserError(f"{name} holds {method} weights ({key!r}), which aren't supported; use a plain LoRA.")
        found = _split(key)
        if found is None:
            raise UserError(f"{name} holds {key!r}, which belongs to no LoRA; is it a LoRA of Qwen-Image?")
        parts.setdefault(found[0], {})[found[1]] = tensor
    if not parts:
        raise UserError(f"{name} holds no LoRA layers.")

    # Pair them up, each with its alpha.
    default_alpha, alphas = _header_alphas(metadata, name)
    layers = {}
    for module, part in parts.items():
        if not {"down", "up"} <= set(part):
            raise UserError(f"{name}: layer {module!r} lacks {' and '.join(sorted({'down', 'up'} - set(part)))}.")
        rank = part["down"].shape[0]
        if part["down"].ndim != 2 or part["up"].ndim != 2 or part["up"].shape[1] != rank:
            shapes = f"{tuple(part['down'].shape)} and {tuple(part['up'].shape)}"
            raise UserError(f"{name}: layer {module!r} has the shapes {shapes}, expected [R, D_in] and [D_out, R].")
        alpha = float(part["alpha"]) if "alpha" in part else alphas.get(module, default_alpha or rank)
        layers[module] = LowRank(part["down"], part["up"], alpha)
    return LoraFile(layers, embeddings, file_sha256(path))


def write_lora_file(path: Path, lora: LoraFile, layout: str = "diffusers", dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a tool's keys, alpha = rank, the config in the header for diffusers, and the embeddings in fp32.

    diffusers' own, the default, are what diffusers, ComfyUI and we read alike.
    """
    names, tensors = LAYOUTS[layout], {}
    for module, given in lora.layers.items():
        layer, key = given.with_alpha_of_rank(), names.key.format(module.replace(".", "_") if names.flat else module)
        tensors[key + names.down] = layer.down.to(dtype).contiguous()
        tensors[key + names.up] = layer.up.to(dtype).contiguous()
        if names.alpha:
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    for token, embedding in lora.embeddings.items():
        tensors[constants.PLACEHOLDER_KEY.format(token=token)] = embedding.float().contiguous()
    if layout != "diffusers":
        save_file(tensors, path)
        return
    ranks = {module: layer.rank for module, layer in lora.layers.items()}
    rank = max(ranks.values())
    config = {"r": rank, "lora_alpha": rank, "target_modules": sorted(lora.layers), "bias": "none"}
    if others := {module: own for module, own in ranks.items() if own != rank}:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, path, {HEADER_KEY: header})  # one entry: safetensors writes several in random order
