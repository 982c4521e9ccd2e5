"""The tensors that a file holds of a layer: put together to its update when it is read, taken apart when it is written.

This module owns which tensors each method has, what shapes they must have, and how strong they are together. A part is
called as `keys.LoraKey` says.

Legend: R rank, D_in and D_out the widths of the adapted linear layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_utils.errors import UserError
from lora_utils.lora.strength import AdapterConfig
from lora_utils.lora.updates import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Update

_METHODS = {"up": "LoRA", "down": "LoRA", "diff": "difference"}  # by part; the others' parts begin as they are called
_PREFIXES = {"lokr": "LoKr", "hada": "LoHa"}


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a file holds of one layer: its tensors by part, and what errors call the layer and the file."""

    layer: str
    tensors: Mapping[str, Tensor]
    source: str

    def fail(self, what: str) -> UserError:
        """Return the error that says what is wrong with this layer."""
        return UserError(f"{self.source}: layer {self.layer!r} {what}")


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What is read of a layer: the change of its weight and that of its bias [D_out], or one of the two."""

    update: Update | None
    bias: Tensor | None


# --- reading --------------------------------------------------------------------------------------------------------


def read_parts(parts: LayerParts, config: AdapterConfig | None) -> LayerChange:
    """Put a layer's parts together. `config` is what the file's config says of strengths, if it has one.

    Raises UserError for parts that are missing, don't belong together or have other shapes, and for impossible numbers.
    """
    _check_numbers(parts)
    method = _method_of(parts)
    if config is not None and method and method not in ("difference", config.method):
        raise parts.fail(f"holds {method} weights, and {config.source} is of a {config.method} adapter.")

    # The change of the weight, by its method.
    used, bias = {"bias"}, parts.tensors.get("bias")
    change: Change | None = None
    if method == "LoRA":
        used |= {"down", "up", "alpha", "up_bias"}
        change = _low_rank(parts, config)
        if "up_bias" in parts.tensors:
            up_bias = parts.tensors["up_bias"].float() * change.strength
            bias = up_bias if bias is None else bias.float() + up_bias
    elif method == "LoKr":
        used |= set(parts.tensors) - {"up_bias"}
        change = _kronecker(parts, config)
    elif method == "LoHa":
        used |= {"alpha"} | set(parts.tensors) - {"up_bias"}
        change = _hadamard(parts, config)
    elif method == "difference":
        used |= {"diff"}
        change = Difference(_matrix(parts, "diff"))

    # What may stand beside it.
    magnitude = parts.tensors.get("magnitude")
    if magnitude is not None and change is not None and method != "difference" and "up_bias" not in parts.tensors:
        used |= {"magnitude"}
        update: Update | None = Decomposed(change, _magnitude(parts, magnitude, change.shape))
    else:
        update = change
    if config is not None and config.decomposed and method == "LoRA" and magnitude is None:
        raise parts.fail(f"lacks the magnitude of a DoRA, which {config.source} says that it is.")
    if extra := sorted(set(parts.tensors) - used):
        raise parts.fail(f"holds {', '.join(extra)} without what it belongs to.")
    if bias is not None and (bias.ndim != 1 or (update is not None and len(bias) != update.shape[0])):
        raise parts.fail(f"has a bias of the shape {tuple(bias.shape)}, expected [D_out].")
    return LayerChange(update, bias)


def _check_numbers(parts: LayerParts) -> None:
    for part, tensor in parts.tensors.items():
        if part == "alpha":
            continue
        if not tensor.is_floating_point():
            raise parts.fail(f"is stored as {tensor.dtype}; store it in bf16, fp16 or fp32.")
        if not tensor.isfinite().all():
            raise UserError(f"{parts.source} holds NaN or infinity in {parts.layer!r}; its training has failed.")


def _method_of(parts: LayerParts) -> str | None:
    """Return the one method that the parts are of; None for a bias alone, or a lonely alpha or magnitude."""
    found = {_METHODS.get(part) or _PREFIXES.get(part[:4]) for part in parts.tensors} - {None}
    if len(found) > 1:
        raise parts.fail(f"holds weights of {' and '.join(sorted(map(str, found)))}; save one method's.")
    if not found and not {"bias"} & set(parts.tensors):
        raise parts.fail("lacks down and up.")
    return next(iter(found), None)


def _matrix(parts: LayerParts, part: str) -> Tensor:
    if parts.tensors[part].ndim != 2 or not parts.tensors[part].numel():
        raise parts.fail(f"has {part} of the shape {tuple(parts.tensors[part].shape)}, expected a matrix.")
    return parts.tensors[part]


def _product(parts: LayerParts, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return matrices whose product is meant, [., R] and [R, .]; or a single one."""
    found = tuple(_matrix(parts, name) for name in names)
    if len(found) == 2 and found[0].shape[1] != found[1].shape[0]:
        shapes = " and ".join(str(tuple(each.shape)) for each in found)
        raise parts.fail(f"has {' and '.join(names)} of the shapes {shapes}, which have no product.")
    return found


def _need(parts: LayerParts, *names: str) -> None:
    if missing := sorted(set(names) - set(parts.tensors)):
        raise parts.fail(f"lacks {' and '.join(missing)}.")


def _low_rank(parts: LayerParts, config: AdapterConfig | None) -> LowRank:
    _need(parts, "down", "up")
    down, up = parts.tensors["down"], parts.tensors["up"]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise parts.fail(f"has the shapes {shapes}, expected [R, D_in] and [D_out, R].")
    return LowRank(down, up, _alpha(parts, config, len(down)))


def _kronecker(parts: LayerParts, config: AdapterConfig | None) -> Kronecker:
    sides = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts.tensors and {f"{name}_a", f"{name}_b"} & set(parts.tensors):
            raise parts.fail(f"holds {name} twice, whole and as a product.")
        is_product = name not in parts.tensors and bool({f"{name}_a", f"{name}_b"} & set(parts.tensors))
        names = (f"{name}_a", f"{name}_b") if is_product else (name,)
        _need(parts, *names)
        sides.append(_product(parts, names))
    update = Kronecker(sides[0], sides[1], 1.0)
    if update.rank is not None:
        return Kronecker(sides[0], sides[1], _alpha(parts, config, update.rank) / update.rank)
    # Where neither is a product there is no rank. LyCORIS and ComfyUI pass over the alpha then (ai-toolkit writes one
    # of ten digits there), while peft divides it by the rank of its config.
    if config is not None and "alpha" not in parts.tensors:
        return Kronecker(sides[0], sides[1], config.alpha_of(parts.layer, None) / config.rank_of(parts.layer))
    return update


def _hadamard(parts: LayerParts, config: AdapterConfig | None) -> Hadamard:
    _need(parts, *(f"hada_w{side}_{half}" for side in (1, 2) for half in "ab"))
    (a1, b1), (a2, b2) = (_product(parts, (f"hada_w{side}_a", f"hada_w{side}_b")) for side in (1, 2))
    if len(a1) != len(a2) or b1.shape[1] != b2.shape[1]:
        raise parts.fail("has two low-rank matrices of other sizes, expected [D_out, D_in] of both.")
    return Hadamard((a1, b1), (a2, b2), _alpha(parts, config, len(b1)) / len(b1))


def _magnitude(parts: LayerParts, magnitude: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a magnitude as [D_out, 1] or [1, D_in]; peft's are without the second dimension."""
    found = magnitude[:, None] if magnitude.ndim == 1 else magnitude
    if tuple(found.shape) not in ((shape[0], 1), (1, shape[1])):
        raise parts.fail(f"has a magnitude of the shape {tuple(magnitude.shape)}, expected [D_out, 1] or [1, D_in].")
    return found


def _alpha(parts: LayerParts, config: AdapterConfig | None, rank: int) -> float:
    """Return a layer's alpha, from its own key or the config, which must agree where there are both."""
    configured = config.alpha_of(parts.layer, rank) if config else None
    if "alpha" not in parts.tensors:
        return float(rank if configured is None else configured)
    given = parts.tensors["alpha"]
    if given.numel() != 1 or given.is_complex() or not given.float().isfinite().all():
        shown = given.flatten()[:4].tolist()
        raise UserError(f"{parts.source}: the alpha of layer {parts.layer!r} must be one finite number, got {shown}.")
    alpha = float(given.flatten()[0])
    if configured is not None and configured != alpha:
        raise parts.fail(f"has the alpha {alpha:g}, and its config says {configured:g}; remove one.")
    return alpha


# --- writing --------------------------------------------------------------------------------------------------------


def parts_of(update: Update) -> dict[str, Tensor]:
    """Return the parts that read as this update again. A plain LoRA's alpha is its rank, and isn't among them."""
    if isinstance(update, Decomposed):
        return {**parts_of(update.change), "magnitude": update.magnitude}
    if isinstance(update, LowRank):
        plain = update.with_alpha_of_rank()
        return {"down": plain.down, "up": plain.up}
    if isinstance(update, Difference):
        return {"diff": update.weight}
    if isinstance(update, Hadamard):
        named = {f"hada_w{side}_a": pair[0] for side, pair in enumerate((update.first, update.second), 1)}
        named |= {f"hada_w{side}_b": pair[1] for side, pair in enumerate((update.first, update.second), 1)}
        return {**named, "alpha": torch.tensor(update.strength * len(update.first[1]))}
    rank, right = update.rank, update.right
    if rank is None and update.strength != 1:  # without a rank there is no alpha to hold it
        right = (right[0].float() * update.strength,)
    named = {}
    for name, side in (("lokr_w1", update.left), ("lokr_w2", right)):
        named |= {name: side[0]} if len(side) == 1 else {f"{name}_a": side[0], f"{name}_b": side[1]}
    return {**named, "alpha": torch.tensor(1.0 if rank is None else update.strength * rank)}
