from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightning_lte.product import applies, product

COUNT, OUT, IN, RANK, SCALE = 2, 6, 5, 2, 1.5
# By the count of rows: beside the base product, or in each head's effective weight.
FEW, MANY = 3, 9


def tensors(rows: int, anchored: bool = True, bias: str = "shared", seed: int = 0) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    biases = {"none": None, "shared": random(OUT), "per head": random(COUNT, OUT)}
    A, B = random(COUNT, RANK, IN), random(COUNT, OUT, RANK)
    anchors = [random(*A.shape).detach(), random(*B.shape).detach()] if anchored else [None, None]
    return [random(COUNT, rows, IN), random(OUT, IN), biases[bias], A, B, *anchors]


def literally(x: Any, weight: Any, bias: Any, A: Any, B: Any, anchor_A: Any, anchor_B: Any) -> Tensor:
    outputs = []
    for h in range(COUNT):
        delta = B[h] @ A[h] - (0 if anchor_A is None else anchor_B[h] @ anchor_A[h])
        own = bias[h] if bias is not None and bias.dim() == 2 else bias
        outputs.append(functional.linear(x[h], weight + SCALE * delta, own))
    return torch.stack(outputs)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("bias", ["none", "shared", "per head"])
def test_value_and_gradients_are_those_of_the_literal_formula(rows: int, anchored: bool, bias: str) -> None:
    inputs: Any = tensors(rows, anchored, bias)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    y, expected = product(*inputs, SCALE), literally(*inputs)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, cotangent)
    for own, literal in zip(found, torch.autograd.grad(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(own, literal)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
def test_it_has_second_derivatives(rows: int, anchored: bool) -> None:
    inputs: Any = tensors(rows, anchored, "per head")
    assert torch.autograd.gradcheck(lambda *own: product(*own, SCALE), inputs)
    assert torch.autograd.gradgradcheck(lambda *own: product(*own, SCALE), inputs)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_after_a_merge_it_is_exactly_the_base_product(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias, A, B, *_ = (None if t is None else t.detach().to(dtype) for t in tensors(rows))
    zero = torch.zeros_like(B)  # type: ignore[arg-type]
    merged = product(x, weight, bias, A, B, A, B, SCALE)  # type: ignore[arg-type]
    assert torch.equal(merged, product(x, weight, bias, A, zero, A, zero, SCALE))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "anchored"), [(30, True), (30, False), (400, True), (400, False)])
def test_it_takes_no_more_multiply_adds_than_its_count_says(rows: int, anchored: bool) -> None:
    m, n, r = 96, 64, 4
    weight = torch.randn(m, n)
    x = torch.randn(1, rows, n, requires_grad=True)
    A, B = torch.randn(1, r, n, requires_grad=True), torch.randn(1, m, r, requires_grad=True)
    anchors = (torch.randn(1, r, n), torch.randn(1, m, r)) if anchored else (None, None)

    def added(_: Any, a: torch.Size, b: torch.Size, **more: Any) -> int:
        return 2 * a.numel() * b[-1]

    in_place: Any = {torch.ops.aten.baddbmm_: added}  # which torch does not count
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        product(x, weight, None, A, B, *anchors, SCALE).sum().backward()
    pairs = 2 if anchored else 1
    few = rows * (2 * m * n + (1 + 2 * pairs) * r * (m + n))
    many = rows * (2 * m * n + 2 * r * (m + n)) + 2 * pairs * r * m * n
    assert counter.get_total_flops() // 2 == (many if rows == 400 else few) < rows * 3 * m * n


def test_a_weight_that_a_first_layer_writes_to_later_breaks_no_backward() -> None:
    x, weight, bias, A, B, *anchors = (None if t is None else t.detach() for t in tensors(FEW))
    y = product(x, weight, bias, A, B.requires_grad_(), *anchors, SCALE)  # type: ignore[arg-type, union-attr]
    weight.zero_()  # type: ignore[union-attr]
    y.sum().backward()
    assert B is not None and B.grad is not None


def test_it_is_left_to_plain_operations_where_it_would_round_or_hide_something() -> None:
    x, weight, bias, A, *_ = (None if t is None else t.detach().float() for t in tensors(FEW))
    own: Any = (x, weight, bias, A)
    assert applies(*own) and applies(x, nn.Parameter(weight), None, A)  # type: ignore[arg-type]
    assert not applies(*(t.bfloat16() for t in own))
    assert not applies(x, weight.double(), bias, A)  # type: ignore[arg-type, union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        assert not applies(*own)
    with torch.autograd.forward_ad.dual_level():
        assert not applies(*own)
    seen = []
    torch.func.grad(lambda t: (seen.append(applies(t, *own[1:])), t.sum())[1])(x)
    assert seen == [False]
