"""Which layers an adapter is put on, and how large it is there: known before a model is loaded.

Legend: R rank, D the transformer's width, D_in and D_out the widths of the adapted linear layer.
"""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import product

from lora_utils import constants
from lora_utils.errors import UserError, shown

LOKR_FACTOR = 16  # the left matrix is at most so wide: SimpleTuner's advice for LoKr on large transformers
_MOST_PATTERNS = 1000  # of layers, with each number that braces stand for counted


def adapted_layers(targets: str, blocks: int) -> list[list[str]]:
    """Return the names of the layers that `lora_targets` means in each of so many blocks, in the model's order.

    Raises UserError for a pattern that no layer of this model matches.
    """
    names = [
        [f"transformer_blocks.{block}.{layer}" for layer in constants.LORA_TARGETS["attention_mlp"]]
        for block in range(blocks)
    ]
    wanted: set[str] = set()
    if len(patterns := split_targets(targets)) > _MOST_PATTERNS:
        raise UserError(f"lora_targets has {len(patterns)} patterns; {_MOST_PATTERNS} are the most.")
    for pattern in patterns:
        if pattern in constants.LORA_TARGETS:
            found = {name for own in names for name in own if layer_in_block(name) in constants.LORA_TARGETS[pattern]}
        else:
            globs = expand_ranges(pattern)
            found = {name for own in names for name in own if any(fnmatchcase(name, glob) for glob in globs)}
        if not found:
            raise UserError(
                f"lora_targets: {shown(pattern)!r} matches no layer that can be adapted. They are called like "
                f"{names[0][0]} and {names[-1][-1]}; give one of {', '.join(constants.LORA_TARGETS)}, or patterns like "
                "transformer_blocks.{20-39}.attn.*"
            )
        wanted |= found
    return [[name for name in own if name in wanted] for own in names]


def layer_in_block(name: str) -> str:
    """Return `attn.to_q` of `transformer_blocks.0.attn.to_q`."""
    return name.split(".", 2)[2]


def split_targets(targets: str) -> list[str]:
    """Return the patterns of `lora_targets`, which commas outside of braces separate."""
    return [part.strip() for part in re.split(r",(?![^{]*})", targets) if part.strip()]


def expand_ranges(pattern: str) -> list[str]:
    """Return the patterns without braces that one with braces stands for: {20-39} and {0,4,8-11} are numbers.

    Raises UserError for one that stands for too many.
    """
    parts = re.split(r"\{([\d,-]*)\}", pattern)
    choices = [[part] if index % 2 == 0 else _numbers(part) for index, part in enumerate(parts)]
    if math.prod(map(len, choices)) > _MOST_PATTERNS:
        raise UserError(
            f"lora_targets: {shown(pattern)!r} stands for too many patterns; {_MOST_PATTERNS} are the most."
        )
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(text: str) -> Sequence[str]:
    found: list[str] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += map(str, range(int(first), int(last or first) + 1))
    return found


def nearest_preset(layers: Sequence[Sequence[str]]) -> str:
    """Return the preset that layers, given by block, come nearest to: what times are predicted by."""
    adapts_mlps = any(layer_in_block(name) in constants.MLP_TARGETS for block in layers for name in block)
    return "attention_mlp" if adapts_mlps else "attention"


def layer_widths(layer: str, width: int) -> tuple[int, int]:
    """Return D_in and D_out of a layer of a block, by its name in it: attention's are D x D, the MLPs' D and 4 D."""
    if layer in constants.MLP_TARGETS:
        return (width, 4 * width) if layer.endswith("proj") else (4 * width, width)
    return width, width


def count_adapter_weights(adapter: str, rank: int, layers: Sequence[Sequence[str]], width: int) -> int:
    """Return how many weights an adapter has on these layers, given by block, of a transformer of width D."""
    names = (layer_in_block(name) for block in layers for name in block)
    return sum(adapter_weights(adapter, rank, *layer_widths(name, width)) for name in names)


def lokr_factors(width: int) -> tuple[int, int]:
    """Return how a width is split between the two matrices of a Kronecker product: the smaller number first."""
    small = next(size for size in range(LOKR_FACTOR, 0, -1) if width % size == 0 and size * size <= width)
    return small, width // small


def lokr_is_one_matrix(rank: int, d_in: int, d_out: int) -> bool:
    """Return whether the larger matrix is no product: from half of its width on a product would be no smaller.

    LyCORIS has the same rule.
    """
    return rank >= max(lokr_factors(d_in)[1], lokr_factors(d_out)[1]) / 2


def adapter_weights(adapter: str, rank: int, d_in: int, d_out: int) -> int:
    """Return how many weights an adapter has at one layer."""
    if adapter != "lokr":
        return rank * (d_in + d_out) + (d_out if adapter == "dora" else 0)
    (a, c), (b, d) = lokr_factors(d_out), lokr_factors(d_in)
    return a * b + (c * d if lokr_is_one_matrix(rank, d_in, d_out) else rank * (c + d))
