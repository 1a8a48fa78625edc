from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lte.product import product
from lightning_lte.thin import times_thin, transposed_times_thin

ROWS, IN, OUT = 24, 6, 5


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
@pytest.mark.parametrize("rows", [3, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_are_the_plain_products(rank: int, rows: int, dtype: torch.dtype) -> None:
    left, right, below = (torch.randn(2, *shape).to(dtype) for shape in ((rows, IN), (IN, rank), (rows, rank)))
    torch.testing.assert_close(times_thin(left, right), left @ right)
    found = transposed_times_thin(left, below)
    torch.testing.assert_close(found, left.mT @ below)
    assert found.is_contiguous()


class _Results(TorchDispatchMode):
    """Notes how many columns a batched product computes at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.bmm.default:
            # A transposed result of a transposed product counts as its rows.
            self.columns.append(args[1].shape[-1] if args[1].is_contiguous() else args[1].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [ROWS // 4, 4 * ROWS])
def test_in_a_backward_no_product_fills_a_register_with_the_few_columns_of_a_factor(rows: int) -> None:
    rank = 2
    x, A, B = torch.randn(2, rows, IN), torch.randn(2, rank, IN), torch.randn(2, OUT, rank)
    wanted: list[Tensor] = [t.requires_grad_() for t in (x, A, B)]
    y = product(x, torch.randn(OUT, IN), None, A, B, torch.zeros_like(A), torch.zeros_like(B), 2.0)
    with _Results() as results:
        torch.autograd.grad(y, wanted, torch.randn_like(y))
    assert results.columns
    assert rank not in results.columns
