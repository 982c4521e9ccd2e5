"""The strength of a LoRA's layers, as peft reads it from an adapter's config.

The config stands in adapter_config.json beside the weights (peft), or in the header of a safetensors file (diffusers).
Patterns of ranks and alphas, and what they match, are peft's own.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_utils.errors import UserError
from lora_utils.lora.keys import foreign_name
from lora_utils.options import is_finite

HEADER_KEY = "lora_adapter_metadata"  # where diffusers looks for the adapter's config
_PREFIX = "transformer."  # in front of each field there
_NAMED_BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model", "base_model_name")
# Ways to start that change the base model's weights too: what was trained is no change of the base as it is.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}  # by peft's names
_PLAIN = re.compile(r"[\w.]+")
_MAX_PATTERN = 300  # characters
_NESTED = re.compile(r"\([^)]*[+*}][^)]*\)[+*{]")  # a repeated group that repeats: it may take for ever to match


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter's config says of its layers' ranks and strengths."""

    rank: int
    alpha: float
    rslora: bool  # alpha / sqrt(rank) is the strength, not alpha / rank
    ranks: Mapping[str, float]  # by pattern
    alphas: Mapping[str, float]
    says_rank: bool
    source: str  # what errors call it
    method: str = "LoRA"
    decomposed: bool = False  # whether it is a DoRA

    def rank_of(self, layer: str) -> float:
        """Return the rank that it gives a layer."""
        return self.ranks.get(_pattern_of(self.ranks, layer, self.source), self.rank)

    def alpha_of(self, layer: str, rank: int | None) -> float:
        """Return the alpha with which alpha / rank is the layer's strength. Raises UserError for another rank.

        `rank` is that of the layer's weights, None where they tell none.
        """
        own_rank = self.rank_of(layer)
        if self.says_rank and rank is not None and own_rank != rank:
            raise UserError(
                f"{self.source} gives layer {layer!r} the rank {own_rank}, and its weights have {rank}: the two don't "
                "belong together."
            )
        alpha = self.alphas.get(_pattern_of(self.alphas, layer, self.source), self.alpha)
        return alpha * math.sqrt(own_rank if rank is None else rank) if self.rslora else alpha


def _pattern_of(patterns: Mapping[str, float], layer: str, source: str) -> str:
    """Return which pattern, a name, a suffix or a regular expression, a layer is meant by; itself for none.

    A plain name matches itself and what it is the end of. Sorting those out first spares peft a product of all layers
    with all patterns, in the order of which the first match counts.
    """
    possible = [each for each in patterns if not _PLAIN.fullmatch(each) or f".{layer}".endswith(f".{each}")]
    if not possible:
        return layer

    from peft.utils.other import get_pattern_key  # noqa: PLC0415 (heavy, and seldom needed)

    try:
        return get_pattern_key(possible, layer)
    except re.error as error:
        raise UserError(f"{source} has a pattern that is no regular expression ({error}).") from error


def header_config(metadata: Mapping[str, str], name: str) -> AdapterConfig | None:
    """Return the config in a safetensors header, as diffusers writes it; None where there is none.

    Raises UserError for one that can't be read.
    """
    if HEADER_KEY not in metadata:
        return None
    values = parse_config(metadata[HEADER_KEY], f"{name}: the header's {HEADER_KEY}")
    own = {key.removeprefix(_PREFIX): value for key, value in values.items() if key.startswith(_PREFIX)}
    own |= {key: value for key, value in values.items() if "." not in key}
    return adapter_config(own, f"{name}: the header's {HEADER_KEY}")


def parse_config(text: str, source: str) -> dict[str, Any]:
    """Return a config's JSON object. Raises UserError for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} isn't a JSON object ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{source} isn't a JSON object, but {type(values).__name__}.")
    return values


def adapter_config(values: Mapping[str, Any], source: str) -> AdapterConfig:
    """Return an adapter's config. Raises UserError for another method, or a value that can't be."""
    # The method.
    named = values.get("peft_type") or "LORA"
    if not isinstance(named, str) or named not in _METHODS:
        raise UserError(f"{source} is of a {str(named)[:40]} adapter, which isn't supported; use a LoRA, LoHa or LoKr.")
    method = _METHODS[named]
    start = str(values.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_THE_BASE):
        raise UserError(f"{source} starts from {start}, which changes the base model too; save it as a plain LoRA.")
    if values.get("layer_replication"):
        raise UserError(f"{source} repeats layers of the base model, which isn't supported; use a plain LoRA.")

    # Its numbers.
    name_of_alpha = "lora_alpha" if method == "LoRA" else "alpha"
    rank, alpha = values.get("r", 8), values.get(name_of_alpha, 8)
    _check_number(rank, f"{source}: r", whole=True)
    _check_number(alpha, f"{source}: {name_of_alpha}")
    patterns = {}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns[field] = values.get(field) or {}
        if not isinstance(patterns[field], dict):
            raise UserError(f"{source}: {field} must be an object of numbers, got {type(patterns[field]).__name__}.")
        for pattern, number in patterns[field].items():
            if len(pattern) > _MAX_PATTERN or _NESTED.search(pattern):
                raise UserError(f"{source} has a pattern that is too complicated: {pattern[:60]!r}.")
            _check_number(number, f"{source}: {field} of {pattern[:60]!r}", whole=field == "rank_pattern")
    if not isinstance(values.get("use_rslora"), bool | None):
        raise UserError(f"{source}: use_rslora must be true or false, got {str(values['use_rslora'])[:60]!r}.")
    rslora, says_rank = values.get("use_rslora") is True, "r" in values
    return AdapterConfig(
        int(rank),
        alpha,
        rslora,
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        says_rank,
        source,
        method,
        decomposed=bool(values.get("use_dora")),
    )


def _check_number(value: object, what: str, whole: bool = False) -> None:
    """Raise UserError unless this is a finite number; a rank is a whole one of 1 and more."""
    kind = "a whole number of at least 1" if whole else "a finite number"
    if not is_finite(value):
        raise UserError(f"{what} must be {kind}, got {str(value)[:60]!r}.")
    if whole and (value != int(value) or value < 1):
        raise UserError(f"{what} must be {kind}, got {value:g}.")


def other_base(metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> str | None:
    """Return which other model a file's header or config says that it was made for."""
    base = (config or {}).get("base_model_name_or_path")
    named = [*named_bases(metadata), *([base] if isinstance(base, str) else [])]
    return next(filter(None, map(foreign_name, named)), None)


def named_bases(metadata: Mapping[str, str]) -> list[str]:
    """Return the models that a file's header says it was made for."""
    return [metadata[key].removesuffix("/lora") for key in _NAMED_BASES if key in metadata]  # as modelspec ends it
