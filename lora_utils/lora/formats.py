"""LoRA files: every known key layout read into one canonical map, and the portable file written from it.

This module is the one way in: prediction, `init_weights` and `convert` read what it reads, and refuse what it refuses.
It knows no more of models than the names of their layers.

Legend: R rank, D_in and D_out the widths of the adapted linear layer, D the text encoder's width.
"""

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
from lora_utils.io.files import atomic_path, file_sha256
from lora_utils.lora.keys import foreign_layers, other_method, parse_key
from lora_utils.lora.metadata import kept_metadata, sort_header
from lora_utils.lora.parts import LayerParts, parts_of, read_parts
from lora_utils.lora.strength import HEADER_KEY, adapter_config, header_config, other_base
from lora_utils.lora.updates import Decomposed, LowRank, Update

log = logging.getLogger(__name__)

_EMBEDDING_KEY = re.compile(re.escape(constants.PLACEHOLDER_KEY).replace(r"\{token\}", r"(?P<token><[^.]+>)"))
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Layout:
    """A tool's names of a LoRA's tensors: a module's key, and what is added to it for each of its parts."""

    key: str
    down: str
    up: str
    magnitude: str = ""  # of a DoRA; empty: its readers know none
    flat: bool = False  # the module's dots are underscores
    alpha: bool = False  # a LoRA has alpha keys; without them it is the rank
    takes_embeddings: bool = False  # its readers take a token's embedding in the same file
    takes_lycoris: bool = False  # and LoKr, LoHa and differences, as LyCORIS calls their parts


_AB, _DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
_LYCORIS: dict[str, Any] = {"magnitude": ".dora_scale", "takes_lycoris": True}
_PEFTS = ".lora_magnitude_vector"
LAYOUTS = {
    # ComfyUI reads this one too, but for a DoRA's magnitudes.
    "diffusers": Layout("transformer.{}", *_AB, _PEFTS, takes_embeddings=True, takes_lycoris=True),
    "comfyui": Layout("diffusion_model.{}", *_AB, **_LYCORIS),  # ai-toolkit's and fal's too
    "kohya": Layout("lora_unet_{}", *_DOWN_UP, flat=True, alpha=True, **_LYCORIS),  # musubi's too
    "diffsynth": Layout("{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft": Layout(_PEFT_PREFIX + "{}", *_AB, _PEFTS),  # in a folder with its config
    "lycoris": Layout("lycoris_{}", *_DOWN_UP, flat=True, alpha=True, **_LYCORIS),
}


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA: `layers` by dotted module name of the transformer, `embeddings` [1, D] fp32 by placeholder token.

    `layers` holds any method's updates of weights, `biases` the changes of biases [D_out].
    """

    layers: dict[str, Update]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    sha256: str = ""  # of the file it was read from
    metadata: Mapping[str, str] = field(default_factory=dict)  # of its header
    alphas_in_keys: bool = False  # each layer's alpha stands in a key of its own, as kohya's tools write it
    biases: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The layers of which it changes the weight or the bias."""
        return list(dict.fromkeys([*self.layers, *self.biases]))


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
    read = {
        layer: read_parts(LayerParts(layer, {part: tensors[key] for part, key in keys.items()}, name), strengths)
        for layer, keys in parts.items()
    }
    layers = {layer: found.update for layer, found in read.items() if found.update is not None}
    biases = {layer: found.bias for layer, found in read.items() if found.bias is not None}
    alphas_in_keys = all("alpha" in keys for keys in parts.values())
    if strengths is None and not alphas_in_keys and any(_is_pefts(key) for key in tensors):
        log.warning("%s says nothing of its alpha, which is taken to be its rank; add its %s", name, PEFT_CONFIG)
    return LoraFile(layers, embeddings, file_sha256(path), metadata, alphas_in_keys, biases)


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
    tensors = _tensors(lora, layout, dtype)
    if names.takes_embeddings:
        tensors |= _embedding_tensors(lora)
    header = kept_metadata(lora.metadata)
    if layout == "diffusers" and is_of_one_kind(lora):
        config = {f"transformer.{key}": value for key, value in _config_of(lora).items()}
        header[HEADER_KEY] = json.dumps(config)
    save_file(tensors, path, header or None)
    sort_header(path)


def write_peft_folder(folder: Path, lora: LoraFile, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an adapter folder as `PeftModel.from_pretrained(transformer, folder)` loads it.

    Raises UserError for what peft's layout and its one config for all layers can't say.
    """
    from peft import LoraConfig  # noqa: PLC0415 (heavy, and only here)

    _tensors(lora, "peft", dtype)
    if not is_of_one_kind(lora):
        raise UserError("peft's config describes LoRAs alone or DoRAs alone, and this file holds both; choose lycoris.")
    folder.mkdir()
    write_lora_file(folder / PEFT_WEIGHTS, lora, "peft", dtype)
    LoraConfig(**_config_of(lora)).save_pretrained(str(folder))


def write_embeddings(path: Path, lora: LoraFile) -> None:
    """Write the tokens' embeddings alone, [1, D] fp32 each, under the keys that they have in our own file."""
    with atomic_path(path) as partial:
        save_file(_embedding_tensors(lora), partial)


def _tensors(lora: LoraFile, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    names, tensors = LAYOUTS[layout], {}
    for module in lora.names:
        parts = parts_of(lora.layers[module]) if module in lora.layers else {}
        if module in lora.biases:
            parts["bias"] = lora.biases[module]
        key = names.key.format(module.replace(".", "_") if names.flat else module)
        for part, tensor in parts.items():
            ending = _ending(names, part)
            if not ending:
                raise UserError(f"the layout {layout} has no place for {part} of layer {module!r}; choose lycoris.")
            # A magnitude moves by less than 16 bits tell apart.
            kept = tensor.float() if part in ("alpha", "magnitude") else tensor.to(dtype)
            if not kept.isfinite().all() and tensor.isfinite().all():
                most = float(tensor.abs().max())
                raise UserError(f"layer {module!r} holds {most:.3g}, which {dtype} can't; convert to bf16 or fp32.")
            if part == "magnitude" and names.magnitude == _PEFTS:
                if kept.shape[1] != 1:
                    raise UserError(
                        f"layer {module!r} has a magnitude per input, which the layout {layout} has no place for; "
                        "choose lycoris."
                    )
                kept = kept[:, 0]
            tensors[key + ending] = kept.contiguous()
        if names.alpha and "down" in parts:
            tensors[f"{key}.alpha"] = torch.tensor(float(len(parts["down"])))
    return tensors


def _ending(names: Layout, part: str) -> str:
    """Return what a layout adds to a module's key for a part; empty for one that its readers don't know."""
    if part in ("down", "up", "magnitude"):
        return {"down": names.down, "up": names.up, "magnitude": names.magnitude}[part]
    return f".{'diff_b' if part == 'bias' else part}" if names.takes_lycoris else ""


def is_of_one_kind(lora: LoraFile) -> bool:
    """Return whether a file holds LoRAs alone or DoRAs alone, which peft's config can describe."""
    decomposed = {isinstance(layer, Decomposed) for layer in lora.layers.values()}
    changes = [layer.change if isinstance(layer, Decomposed) else layer for layer in lora.layers.values()]
    return len(decomposed) == 1 and not lora.biases and all(isinstance(change, LowRank) for change in changes)


def _embedding_tensors(lora: LoraFile) -> dict[str, Tensor]:
    return {
        constants.PLACEHOLDER_KEY.format(token=token): embedding.float().contiguous()
        for token, embedding in lora.embeddings.items()
    }


def _config_of(lora: LoraFile) -> dict[str, Any]:
    """Return the fields of peft's config that a file of LoRAs or DoRAs with alpha = rank has."""
    changes = {name: layer.change if isinstance(layer, Decomposed) else layer for name, layer in lora.layers.items()}
    ranks = {module: change.rank for module, change in changes.items() if isinstance(change, LowRank)}
    rank = max(ranks.values())
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), "bias": "none"}
    if any(isinstance(layer, Decomposed) for layer in lora.layers.values()):
        config["use_dora"] = True
    if others := {module: own for module, own in ranks.items() if own != rank}:
        config |= {"rank_pattern": others, "alpha_pattern": others}
    return config
