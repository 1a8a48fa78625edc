"""Products with a thin matrix, as factors of a low rank are.

On a CPU products fill registers with columns of their result. Where there are only a few, most of a register is idle:
with 4 of them torch's products took 2 to 4 times as long as those here, which transpose the thin matrix or the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes in a row of a thin matrix at most: half of a register. Beyond that both take the same time.
_THIN = 32


def times_thin(left: Tensor, thin: Tensor) -> Tensor:
    """left @ thin: (..., rows, rank), for (..., rows, in) and (..., in, rank)."""
    return times(left, thin.mT.contiguous().mT if _helps(left, thin) else thin)


def transposed_times_thin(left: Tensor, thin: Tensor) -> Tensor:
    """left^T @ thin: (..., in, rank), for (..., rows, in) and (..., rows, rank)."""
    return times(thin.mT, left).mT.contiguous() if _helps(left, thin) else times(left.mT, thin)


def times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, which takes longer to find out what to do than a small product of (n, ., .) takes."""
    return torch.bmm(left, right) if left.dim() == right.dim() == 3 else left @ right


def _helps(left: Tensor, thin: Tensor) -> bool:
    """Whether to transpose, which takes as long as the product itself where there are no more rows than columns."""
    rows, rank = left.shape[-2], thin.shape[-1]
    return (
        left.is_cpu
        and rank < rows
        and rank * left.element_size() <= _THIN
        and left.dtype in (torch.float32, torch.float64)
    )
