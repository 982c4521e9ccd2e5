"""Trainable layers: each wraps a frozen linear layer, and learns a change of its weight by one method.

peft's layers hold the same weights and compute the same numbers (tests/model/test_blocks.py). These cast their weights
rather than their input, keep less for the backward pass, and come without peft's quantizers and other methods.

All start as no change. Their weights are fp32, whatever the frozen layer's are stored as.

Legend: R rank, D_in and D_out the widths of a linear layer, W its weight [D_out, D_in].
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_utils.lora.updates import Decomposed, Kronecker, LowRank, Update, kronecker_product
from lora_utils.model.adapter_sizes import lokr_factors, lokr_is_one_matrix
from lora_utils.model.quantization import dense


def _started(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> nn.Parameter:
    """Return a matrix as torch starts a linear layer (peft's and LyCORIS's default too), from `generator`."""
    bound = math.sqrt(1 / columns)  # kaiming_uniform with a = sqrt(5)
    return nn.Parameter((torch.rand(rows, columns, generator=generator) * 2 - 1).mul(bound).to(like.device))


def _zero(rows: int, columns: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, device=like.device))


class LoraLinear(nn.Module):
    """LoRA: base_layer(x) + strength * up @ down @ x, with strength alpha / R."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base_layer, self.alpha, self.enabled = base_layer, alpha, True
        self.strength = alpha / rank
        self.down = _started(rank, base_layer.in_features, generator, base_layer.weight)  # [R, D_in]
        self.up = _zero(base_layer.out_features, rank, base_layer.weight)  # [D_out, R]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on x [..., D_in] -> [..., D_out]. The small weights are cast to x's dtype, never x."""
        if not self.enabled:
            return self.base_layer(x)
        return self.add_update(x, F.linear(x, self.down.to(x.dtype)))

    def add_update(self, x: Tensor, low: Tensor) -> Tensor:
        """Return base_layer(x) [..., D_out] + strength * low [..., R] @ up^T, in one pass over the output."""
        output = self.base_layer(x)
        flat, up = output.flatten(0, -2), self.up.to(output.dtype)
        return torch.addmm(flat, low.flatten(0, -2), up.T, alpha=self.strength).view_as(output)

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.down, self.up]

    def update(self) -> LowRank:
        """Return the change as it is now, on the CPU."""
        return LowRank(_copy(self.down), _copy(self.up), float(self.alpha))

    def load(self, given: Update) -> None:
        """Start from a change that fits. What a smaller rank leaves stays as it was started, and can be trained."""
        assert isinstance(given, LowRank)
        _fill(self.weights, [given.down, given.up.float() * (given.strength / self.strength)])

    def fits(self, given: Update) -> bool:
        """Return whether a change is one that this layer can start from."""
        return isinstance(given, LowRank) and _fits_rank(given, self.down, self.up)


class DoraLinear(nn.Module):
    """DoRA: magnitude * (W + strength * up @ down) / ||W + strength * up @ down||, on x, and base_layer's bias.

    A row's length ||...|| is taken as a constant in the backward pass (Liu et al. 2024, section 4.3).
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        weight = dense(base_layer.weight).detach().float()
        self.base_layer, self.alpha, self.enabled = base_layer, alpha, True
        self.strength = alpha / rank
        self.down = _started(rank, base_layer.in_features, generator, weight)  # [R, D_in]
        self.up = _zero(base_layer.out_features, rank, weight)  # [D_out, R]
        self.squares = weight.square().sum(dim=1)  # of W's rows [D_out]
        self.magnitude = nn.Parameter(self.squares.sqrt())  # [D_out]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on x [..., D_in] -> [..., D_out].

        It is y + (gain - 1) * (y - bias) with y of the plain LoRA: a gain near 1 has no room in 16 bits, gain - 1 has.
        """
        output = self.base_layer(x)
        if not self.enabled:
            return output
        low, up = F.linear(x, self.down.to(x.dtype)), self.up.to(output.dtype)
        plain = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.T, alpha=self.strength).view_as(output)
        gain = self.magnitude / self.lengths().clamp_min(torch.finfo(torch.float32).eps)
        unbiased = plain if self.base_layer.bias is None else plain - self.base_layer.bias
        return torch.addcmul(plain, unbiased, (gain - 1).to(plain.dtype))

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Return ||W + strength * up @ down|| of each row [D_out], without that matrix.

        Its square is |W|^2 + 2 s <W down^T, up> + s^2 <up (down down^T), up>, summed over a row.
        """
        down, up, weight = self.down, self.up, dense(self.base_layer.weight)
        across = F.linear(weight, down.to(weight.dtype)).float()  # [D_out, R]
        mixed = 2 * self.strength * across + self.strength**2 * (up @ (down @ down.T))
        return (self.squares + (mixed * up).sum(dim=1)).clamp_min(0).sqrt()

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.down, self.up, self.magnitude]

    def update(self) -> Decomposed:
        """Return the change as it is now, on the CPU."""
        return Decomposed(LowRank(_copy(self.down), _copy(self.up), float(self.alpha)), _copy(self.magnitude)[:, None])

    def load(self, given: Update) -> None:
        """Start from a change that fits. What a smaller rank leaves stays as it was started, and can be trained."""
        assert isinstance(given, Decomposed)
        assert isinstance(given.change, LowRank)
        up = given.change.up.float() * (given.change.strength / self.strength)
        _fill(self.weights, [given.change.down, up, given.magnitude[:, 0]])

    def fits(self, given: Update) -> bool:
        """Return whether a change is one that this layer can start from."""
        if not isinstance(given, Decomposed) or given.magnitude.shape != (len(self.magnitude), 1):
            return False
        return isinstance(given.change, LowRank) and _fits_rank(given.change, self.down, self.up)


class LokrLinear(nn.Module):
    """LoKr: base_layer(x) + strength * kron(left, right) @ x, where right may be the product of two of rank R.

    Without a rank the strength is 1, as LyCORIS has it.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base_layer, self.enabled = base_layer, True
        like, d_in, d_out = base_layer.weight, base_layer.in_features, base_layer.out_features
        (a, c), (b, d) = lokr_factors(d_out), lokr_factors(d_in)
        self.left = _started(a, b, generator, like)
        if lokr_is_one_matrix(rank, d_in, d_out):
            self.strength, self.right = 1.0, nn.ParameterList([_zero(c, d, like)])
        else:
            self.strength = alpha / rank
            self.right = nn.ParameterList([_started(c, rank, generator, like), _zero(rank, d, like)])

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer on x [..., D_in] -> [..., D_out]."""
        output = self.base_layer(x)
        if not self.enabled:
            return output
        right = tuple(factor.to(x.dtype) for factor in self.right)
        return torch.add(output, kronecker_product((self.left.to(x.dtype),), right, x), alpha=self.strength)

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.left, *self.right]

    def update(self) -> Kronecker:
        """Return the change as it is now, on the CPU."""
        return Kronecker((_copy(self.left),), tuple(map(_copy, self.right)), self.strength)

    def load(self, given: Update) -> None:
        """Start from a change that fits."""
        assert isinstance(given, Kronecker)
        last = given.right[-1].float() * (given.strength / self.strength)
        _fill(self.weights, [*given.left, *given.right[:-1], last])

    def fits(self, given: Update) -> bool:
        """Return whether a change is one that this layer can start from."""
        shapes = [weight.shape for weight in self.weights]
        return isinstance(given, Kronecker) and [each.shape for each in (*given.left, *given.right)] == shapes


TrainableLayer = LoraLinear | DoraLinear | LokrLinear
LAYERS: dict[str, type[LoraLinear] | type[DoraLinear] | type[LokrLinear]] = {
    "lora": LoraLinear,
    "dora": DoraLinear,
    "lokr": LokrLinear,
}


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().cpu().clone()


def _fits_rank(given: LowRank, down: Tensor, up: Tensor) -> bool:
    return given.shape == (len(up), down.shape[1]) and given.rank <= len(down)


def _fill(weights: Sequence[nn.Parameter], given: Sequence[Tensor]) -> None:
    """Copy into the first rows and columns of each weight."""
    with torch.no_grad():
        for weight, values in zip(weights, given, strict=True):
            weight[tuple(slice(size) for size in values.shape)].copy_(values)
