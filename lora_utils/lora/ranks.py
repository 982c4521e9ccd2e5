"""Ranks of finished LoRAs: cut to a smaller one, several joined to one, and one found in the difference of two weights.

The best approximation of a matrix by one of rank R keeps its R largest singular values (Eckart and Young 1936).

Legend: R rank, D_in and D_out the widths of the adapted linear layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lora_utils.lora.updates import Change, Decomposed, Difference, LowRank, Update

_EXACT_WIDTH = 1024  # up to here all singular values are computed
_MORE_VECTORS = 16  # than the rank, that random projections look for


def rank_of(update: Update) -> int | None:
    """Return the rank of a LoRA, or of a DoRA's change; None for another method."""
    change = update.change if isinstance(update, Decomposed) else update
    return change.rank if isinstance(change, LowRank) else None


def cut_rank(update: Update, rank: int) -> Update:
    """Return the nearest LoRA of at most a rank to a LoRA, a DoRA's change or a difference; else what was given."""
    if isinstance(update, Decomposed):
        return replace(update, change=cast(Change, cut_rank(update.change, rank)))
    if isinstance(update, Difference):
        return low_rank_of(update.weight, rank)
    if not isinstance(update, LowRank) or update.rank <= rank:
        return update
    # The singular values of up @ down are those of a matrix [R, R]: the rest are rotations.
    left, left_rest = torch.linalg.qr(update.up.float() * update.strength)  # [D_out, R] and [R, R]
    right, right_rest = torch.linalg.qr(update.down.float().T)  # [D_in, R] and [R, R]
    u, values, v = torch.linalg.svd(left_rest @ right_rest.T)
    roots = values[:rank].sqrt()
    return LowRank((roots[:, None] * v[:rank]) @ right.T, left @ u[:, :rank] * roots, float(rank))


def low_rank_of(matrix: Tensor, rank: int) -> LowRank:
    """Return the nearest LoRA of a rank to a change [D_out, D_in], of the matrix's own rank if that is smaller.

    The singular vectors of a large matrix are found by random projections (Halko et al. 2009, arXiv 0909.4061), from a
    seed of their own: what is computed is then within their error of the best.
    """
    matrix = matrix.float()
    if min(matrix.shape) <= _EXACT_WIDTH:
        u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, values, _ = torch.svd_lowrank(matrix, q=min(*matrix.shape, rank + _MORE_VECTORS), niter=4)
    rank = max(1, min(rank, int((values > values[0] * 1e-6).sum())))
    up = u[:, :rank]
    down = up.T @ matrix  # the best for these directions
    roots = values[:rank].sqrt()
    return LowRank(down / roots[:, None], up * roots, float(rank))


def joined(updates: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Return the one LoRA that computes the sum of several, each at its scale: exact, of the sum of their ranks."""
    down = torch.cat([update.down.float() for update, _ in updates])
    up = torch.cat([update.up.float() * (update.strength * scale) for update, scale in updates], dim=1)
    return LowRank(down, up, float(len(down)))


def share_lost(before: Mapping[str, Update], after: Mapping[str, Update]) -> float:
    """Return how much of the LoRAs' size was lost by `cut_rank`: the norm of what is missing by that of all.

    What is kept and what is missing are at right angles to each other, so their squares add up.
    """
    kept, total = (sum(map(_square, layers.values())) for layers in (after, before))
    return max(0.0, 1 - kept / total) ** 0.5 if total else 0.0


def _square(update: Update) -> float:
    """Return the sum of the squares of up @ down, from the products of each with itself; 0 for another method."""
    change = update.change if isinstance(update, Decomposed) else update
    if isinstance(change, Difference):
        return float(change.weight.double().square().sum())
    if not isinstance(change, LowRank):
        return 0.0
    up, down = change.up.double(), change.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum()) * change.strength**2
