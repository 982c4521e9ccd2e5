"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in fp32 and for all matrices of one shape at once.

A matrix of momentum U S V^T moves the weights by U V^T: all directions in which there is a gradient move alike. torch
has it as `torch.optim.Muon`, in bf16 and one matrix at a time, which takes minutes on a CPU without bf16.

Legend: K matrices, M rows, N columns of one.
"""

from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTUM = 0.95
# Five rounds of x <- a x + b x^3 + c x^5 take singular values between 0.01 and 1 to between 0.7 and 1.2 (Jordan et al.)
ROUNDS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7  # a gradient of nothing moves nothing: so is A's at the first step, for B is zero


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices [K, M, N] with singular values near 1 in place of their own; those of zero stay zero."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
    for _ in range(ROUNDS):
        gram = x @ x.mT  # [K, M, M]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(Optimizer):
    """A step of a matrix [M, N] is `lr` sqrt(max(1, M / N)) U V^T, as in the first implementation and torch's.

    Like AdamW's, it is `lr` 0.2 sqrt(max(M, N)) U V^T. That moves weights by 0.2 `lr` in the root mean square, as AdamW
    tends to (Liu et al. 2025, arXiv 2502.16982); torch calls it `match_rms_adamw`.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, like_adamw: bool = False):
        super().__init__(params, {"lr": lr})
        self.like_adamw = like_adamw

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            moving = [each for each in group["params"] if each.grad is not None]
            for shape, same in groupby(sorted(moving, key=lambda each: each.shape), key=lambda each: each.shape):
                factor = 0.2 * max(shape) ** 0.5 if self.like_adamw else max(1.0, shape[0] / shape[1]) ** 0.5
                self._move(list(same), group["lr"] * factor)

    def _move(self, matrices: list[nn.Parameter], rate: float) -> None:
        for each in matrices:
            if not self.state[each]:
                self.state[each]["momentum"] = torch.zeros_like(each)
        weights = [each.data for each in matrices]
        gradients = [each.grad for each in matrices if each.grad is not None]
        momenta = [self.state[each]["momentum"] for each in matrices]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)  # Nesterov's
        torch._foreach_add_(weights, list(orthogonal(torch.stack(list(ahead)))), alpha=-rate)
