"""Muon: an optimizer that moves a matrix alike along all directions in which it has a gradient.

Jordan et al. 2024, kellerjordan.github.io/posts/muon: a matrix of momentum U S V^T moves the weights by U V^T. torch
has it as `torch.optim.Muon`, which takes one matrix at a time, in bf16. A LoRA of Qwen-Image has 1440 small ones, and
each takes some twenty kernels. Here all matrices of one shape move at once, in fp32; a test compares the two.

Legend: K matrices, M rows, N columns of one.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTUM = 0.95  # Jordan's, and torch's default
# Five rounds of x <- a x + b x^3 + c x^5 take singular values between 0.01 and 1 to between 0.7 and 1.2 (Jordan et al.)
ROUNDS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7  # a gradient of nothing moves nothing: so is A's at the first step, for B is zero
# AdamW tends to move weights by 0.2 of its rate in the root mean square (Liu et al. 2025, arXiv 2502.16982), so Muon's
# rates are comparable with AdamW's. torch calls that `match_rms_adamw`.
RMS = 0.2
MOST_AT_ONCE = 1 << 22  # numbers, of which five copies are held for a moment: 80 MB


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices [K, M, N] with singular values near 1 in place of their own; those of zero stay zero.

    A round is (a + b G + c G^2) x with G = x x^T, which is of the matrix's small side. So the rounds are taken on G and
    on their product alone, and only two products of the large side are left, in place of ten.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
    gram = x @ x.mT  # [K, M, M]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    rounds = unit
    for _ in range(ROUNDS):
        factor = a * unit + b * gram + c * gram @ gram
        gram, rounds = factor @ gram @ factor, factor @ rounds
    return rounds @ x


class Muon(Optimizer):
    """A step of a matrix [M, N] is `lr` 0.2 sqrt(max(M, N)) U V^T. It moves matrices alone."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for matrices in _alike([each for each in group["params"] if each.grad is not None]):
                self._move(matrices, group["lr"], group["weight_decay"])

    def _move(self, matrices: list[nn.Parameter], rate: float, decay: float) -> None:
        for each in matrices:
            if not self.state[each]:
                self.state[each]["momentum"] = torch.zeros_like(each)
        weights = [each.data for each in matrices]
        gradients = [each.grad for each in matrices if each.grad is not None]
        momenta = [self.state[each]["momentum"] for each in matrices]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)  # Nesterov's
        moved = orthogonal(torch.stack(list(ahead)))
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_add_(weights, list(moved), alpha=-rate * RMS * max(moved.shape[1:]) ** 0.5)


def _alike(matrices: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield matrices of one shape together, as many as are moved at once."""
    for shape, same in groupby(sorted(matrices, key=lambda each: each.shape), key=lambda each: each.shape):
        found, count = list(same), max(1, MOST_AT_ONCE // shape.numel())
        yield from (found[start : start + count] for start in range(0, len(found), count))
