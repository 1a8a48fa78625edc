"""What is watched of a run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lte.metrics import effective_rank


def matrix(sigma: list[float], out: int = 7, inside: int = 5) -> torch.Tensor:
    """A matrix (out, in) of these singular values, in float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q for n in (out, inside))
    return left[:, : len(sigma)] @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right[: len(sigma)]


@given(st.integers(1, 5), st.floats(1e-3, 1e3))
def test_equal_singular_values_count_as_many(rank: int, size: float) -> None:
    assert effective_rank(matrix([size] * rank)) == pytest.approx(rank, rel=1e-6)


def test_it_is_the_exponential_of_the_entropy() -> None:
    p = [0.5, 0.3, 0.2]
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert effective_rank(matrix([4 * q for q in p])) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(matrix([4 * q for q in p]).mT) == pytest.approx(expected, rel=1e-9)


def test_kernels_are_matrices_of_their_outputs() -> None:
    kernel = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert effective_rank(kernel) == effective_rank(kernel.flatten(1))


def test_half_precision_is_computed_in_single() -> None:
    weight = matrix([3.0, 1.0, 1.0]).bfloat16()
    assert effective_rank(weight) == pytest.approx(effective_rank(weight.double()), rel=1e-5)


def test_a_weight_that_trains_can_be_looked_at() -> None:
    weight = torch.nn.Parameter(matrix([1.0, 1.0]))
    assert isinstance(effective_rank(weight), float)


def test_weights_of_nothing_and_of_no_number() -> None:
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert math.isnan(effective_rank(torch.full((4, 3), float("inf"))))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"that of a matrix; received a tensor of shape \(4,\)\. Give a weight"):
        effective_rank(torch.zeros(4))
