"""What an adapter changes at one linear layer, by method: as a matrix, and computed on an input without that matrix.

This module owns the arithmetic of each method. It knows no files, names or models.

Legend: D_in and D_out the widths of the linear layer, R a rank, W its weight [D_out, D_in].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): up @ down times alpha / R."""

    down: Tensor  # [R, D_in]
    up: Tensor  # [D_out, R]
    alpha: float

    @property
    def rank(self) -> int:
        """The rank, R."""
        return self.down.shape[0]

    @property
    def strength(self) -> float:
        """What up @ down is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """D_out and D_in."""
        return self.up.shape[0], self.down.shape[1]

    def with_alpha_of_rank(self) -> "LowRank":
        """Return the same update with alpha = rank, which is what a file without alphas means."""
        if self.alpha == self.rank:
            return self
        return LowRank(self.down, self.up.float() * self.strength, float(self.rank))

    def matrix(self) -> Tensor:
        """Return the change of W [D_out, D_in]."""
        return self.up @ self.down * self.strength

    def add_to(self, output: Tensor, x: Tensor, scale: float) -> None:
        """Add scale times the change on x [..., D_in] to output [..., D_out] in place, in no pass of its own."""
        low = F.linear(x, self.down).flatten(0, -2)  # [..., R]
        output.view(-1, output.shape[-1]).addmm_(low, self.up.T, alpha=scale * self.strength)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr (Yeh et al. 2023, LyCORIS, arXiv 2309.14859): the Kronecker product of two small matrices.

    Each is one matrix or the product of two, [A, R] @ [R, B] and [C, R] @ [R, D], with D_out = A C, D_in = B D.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    strength: float

    @property
    def rank(self) -> int | None:
        """The rank of the matrices that are products; None where neither is a product."""
        return next((len(pair[1]) for pair in (self.left, self.right) if len(pair) == 2), None)

    @property
    def shape(self) -> tuple[int, int]:
        """D_out and D_in."""
        return len(self.left[0]) * len(self.right[0]), self.left[-1].shape[1] * self.right[-1].shape[1]

    def matrix(self) -> Tensor:
        """Return the change of W [D_out, D_in]."""
        return torch.kron(reduce(torch.matmul, self.left), reduce(torch.matmul, self.right)) * self.strength

    def add_to(self, output: Tensor, x: Tensor, scale: float) -> None:
        """Add scale times the change on x [..., D_in] to output [..., D_out] in place."""
        output.add_(kronecker_product(self.left, self.right, x), alpha=scale * self.strength)


def kronecker_product(left: tuple[Tensor, ...], right: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Multiply x [..., B D] by the Kronecker product of left [A, B] and right [C, D] -> [..., A C].

    Seen as a matrix [B, D], x becomes left @ x @ right^T. Either may be given as the product of two.
    """
    x = x.unflatten(-1, (left[-1].shape[1], -1))  # [..., B, D]
    for factor in reversed(right):
        x = F.linear(x, factor)  # [..., B, C] in the end
    x = x.transpose(-1, -2)  # [..., C, B]
    for factor in reversed(left):
        x = F.linear(x, factor)  # [..., C, A] in the end
    return x.transpose(-1, -2).flatten(-2)  # [..., A C]


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa (Hyeon-Woo et al. 2022, FedPara, arXiv 2108.06098): two low-rank matrices, multiplied element by element."""

    first: tuple[Tensor, Tensor]  # [D_out, R] and [R, D_in]
    second: tuple[Tensor, Tensor]
    strength: float

    @property
    def shape(self) -> tuple[int, int]:
        """D_out and D_in."""
        return len(self.first[0]), self.first[1].shape[1]

    def matrix(self) -> Tensor:
        """Return the change of W [D_out, D_in]."""
        return (self.first[0] @ self.first[1]) * (self.second[0] @ self.second[1]) * self.strength

    def add_to(self, output: Tensor, x: Tensor, scale: float) -> None:
        """Add scale times the change on x [..., D_in] to output [..., D_out] in place.

        The matrix is made for each use: kept, those of all layers would be as large as the model.
        """
        output.add_(F.linear(x, self.matrix()), alpha=scale)


@dataclass(frozen=True, slots=True)
class Difference:
    """The weight after a full fine-tuning less the weight before."""

    weight: Tensor  # [D_out, D_in]

    @property
    def shape(self) -> tuple[int, int]:
        """D_out and D_in."""
        return self.weight.shape[0], self.weight.shape[1]

    def matrix(self) -> Tensor:
        """Return the change of W [D_out, D_in]."""
        return self.weight

    def add_to(self, output: Tensor, x: Tensor, scale: float) -> None:
        """Add scale times the change on x [..., D_in] to output [..., D_out] in place."""
        output.add_(F.linear(x, self.weight), alpha=scale)


Change = LowRank | Kronecker | Hadamard | Difference


@dataclass(frozen=True, slots=True)
class Decomposed:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): W plus a change, each row or column brought to a learned length.

    W' = magnitude * (W + change) / ||W + change||. The paper's magnitude is one per column of W^T, which is a row of
    torch's W [D_out, D_in]; LyCORIS can also hold one per input.
    """

    change: Change
    magnitude: Tensor  # [D_out, 1], or [1, D_in]
    gain: Tensor | None = None  # magnitude / ||W + change|| of a model's W, of the magnitude's shape, fp32

    @property
    def shape(self) -> tuple[int, int]:
        """D_out and D_in."""
        return self.change.shape

    def on_model(self, weight: Tensor) -> "Decomposed":
        """Return it with its gain for a model's W [D_out, D_in]."""
        lengths = (weight.float() + with_tensors(self.change, Tensor.float).matrix()).norm(
            dim=1 if self.magnitude.shape[1] == 1 else 0, keepdim=True
        )
        return replace(self, gain=self.magnitude.float() / lengths.clamp_min(torch.finfo(torch.float32).eps))

    def add_to(self, output: Tensor, x: Tensor, scale: float, base: Tensor, weight: Tensor | None) -> None:
        """Add scale * (W' - W) on x [..., D_in] to output [..., D_out] in place.

        `base` [..., D_out] is W on x. `weight` is W [D_out, D_in], and needed for a magnitude of the inputs alone.
        """
        assert self.gain is not None
        if self.magnitude.shape[1] == 1:
            gain = self.gain[:, 0]  # [D_out]
            changed = torch.zeros_like(output)
            self.change.add_to(changed, x, scale)
            output.addcmul_(changed, gain.to(output.dtype)).addcmul_(base, ((gain - 1) * scale).to(output.dtype))
        else:
            assert weight is not None
            gain = self.gain[0]  # [D_in]
            output.add_(F.linear(x * (gain - 1).to(x.dtype), weight), alpha=scale)
            self.change.add_to(output, x * gain.to(x.dtype), scale)


Update = LowRank | Kronecker | Hadamard | Difference | Decomposed
AnyUpdate = TypeVar("AnyUpdate", bound=Update)


def with_tensors(update: AnyUpdate, change: Callable[[Tensor], Tensor]) -> AnyUpdate:
    """Return an update with each of its tensors changed, to another device or dtype."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return with_tensors(value, change) if isinstance(value, Update) else value

    return replace(update, **{item.name: changed(getattr(update, item.name)) for item in fields(update)})


def tensors_of(update: Update) -> Iterator[Tensor]:
    """Yield the tensors that an update is stored as."""
    found: list[Tensor] = []
    with_tensors(update, lambda tensor: found.append(tensor) or tensor)
    yield from found


def does_nothing(update: Update) -> bool:
    """Return whether an update is zero whatever the model's weights are."""
    if isinstance(update, Decomposed):
        return False
    strength = 1.0 if isinstance(update, Difference) else update.strength
    return strength == 0 or not all(tensor.any() for tensor in tensors_of(update))
