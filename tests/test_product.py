from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightning_lte import product as module
from lightning_lte.product import applies, product, scaled_gradient

COUNT, OUT, IN, RANK, SCALE = 2, 6, 5, 2, 1.5
# By the count of rows: beside the base product, or in each head's effective weight.
FEW, MANY = 3, 12


def tensors(
    rows: int, anchored: bool = True, bias: str = "shared", parts: int | None = None, seed: int = 0
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    biases = {"none": None, "shared": random(OUT), "per head": random(COUNT, OUT)}
    lead = (COUNT,) if parts is None else (COUNT, parts)
    A, B = random(*lead, RANK, IN), random(*lead, OUT // (parts or 1), RANK)
    anchors = [random(*A.shape).detach(), random(*B.shape).detach()] if anchored else [None, None]
    return [random(COUNT, rows, IN), random(OUT, IN), biases[bias], A, B, *anchors]


def literally(x: Any, weight: Any, bias: Any, A: Any, B: Any, anchor_A: Any, anchor_B: Any) -> Tensor:
    outputs = []
    for h in range(COUNT):
        delta = (B[h] @ A[h] - (0 if anchor_A is None else anchor_B[h] @ anchor_A[h])).reshape(OUT, IN)
        own = bias[h] if bias is not None and bias.dim() == 2 else bias
        outputs.append(functional.linear(x[h], weight + SCALE * delta, own))
    return torch.stack(outputs)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("bias", ["none", "shared", "per head"])
@pytest.mark.parametrize("parts", [None, 1, 3])
# Of a byte, there is room for one head at a time.
@pytest.mark.parametrize("cache", [1, module.CACHE])
def test_value_and_gradients_are_those_of_the_literal_formula(
    rows: int, anchored: bool, bias: str, parts: int | None, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE", cache)
    inputs: Any = tensors(rows, anchored, bias, parts)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    y, expected = product(*inputs, SCALE), literally(*inputs)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, cotangent)
    for own, literal in zip(found, torch.autograd.grad(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(own, literal)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("differentiated", [True, False])
def test_half_precision_is_float64_but_for_its_rounding(
    rows: int, anchored: bool, parts: int | None, mixed: bool, differentiated: bool
) -> None:
    exact: Any = tensors(rows, anchored, "per head", parts)
    dtype = torch.float32 if mixed else torch.bfloat16
    own: Any = [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in exact]

    def gradients(inputs: Any, autocast: bool) -> tuple[Tensor, ...]:
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = product(*inputs, SCALE, 4)
            # With W in half precision, small deltas would be rounded away.
            assert y.grad_fn.folds == (rows == MANY and inputs[1].dtype != torch.bfloat16)  # type: ignore[union-attr]
            loss = y.double().square().mean()
            if differentiated:
                loss = loss + torch.autograd.grad(loss, inputs[0], create_graph=True)[0].double().square().sum()
            # Autocast is on in here, as it is where users call it in a training step.
            return (y.detach(), *torch.autograd.grad(loss, wanted))

    found, expected = gradients(own, mixed), gradients(exact, False)
    assert [t.dtype for t in found] == [torch.bfloat16, *[dtype] * (len(found) - 1)]
    for half, literal in zip(found, expected, strict=True):
        assert float((half.double() - literal).norm() / literal.norm()) < 0.05


@pytest.mark.parametrize("anchored", [True, False])
def test_under_autocast_differences_are_those_of_the_factors_and_a_scaled_loss_has_room(anchored: bool) -> None:
    x, weight, bias, A, B, *anchors = (
        None if t is None else t.detach().float() for t in tensors(MANY, anchored, "none")
    )
    assert x is not None and A is not None and B is not None
    if anchored:
        anchors = [A - 1e-6, B - 1e-6]
    A.requires_grad_(), B.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = product(x, torch.zeros_like(weight), bias, A, B, *anchors, SCALE, 64)  # type: ignore[arg-type]
    if anchored:  # in float16 the factors are their anchors
        assert float(y.detach().norm()) > 0
    y.backward(torch.full_like(y, 2.0**9))
    expected = torch.autograd.grad(literally(x, torch.zeros_like(weight), bias, A, B, *anchors).sum(), (A, B))  # type: ignore[arg-type]
    for factor, gradient in zip((A, B), expected, strict=True):
        assert factor.grad is not None
        # Times 64, some are larger than what float16 can hold.
        torch.testing.assert_close(factor.grad, 2.0**15 * gradient, rtol=0.01, atol=2.0**15 * 0.01)
    assert float(A.grad.abs().max()) > torch.finfo(torch.float16).max  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("parts", [None, 3])
def test_it_has_second_derivatives(rows: int, anchored: bool, parts: int | None) -> None:
    inputs: Any = tensors(rows, anchored, "per head", parts)
    assert torch.autograd.gradcheck(lambda *own: product(*own, SCALE), inputs)
    assert torch.autograd.gradgradcheck(lambda *own: product(*own, SCALE), inputs)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("parts", [None, 3])
def test_gradients_of_factors_are_scaled_and_so_are_those_that_come_through_a_derivative(
    rows: int, anchored: bool, parts: int | None
) -> None:
    found = []
    for scaled_by_it in (True, False):
        x, weight, bias, A, B, *anchors = tensors(rows, anchored, "shared", parts)
        assert x is not None and A is not None and B is not None
        if scaled_by_it:
            y = product(x, weight, bias, A, B, *anchors, SCALE, 4)  # type: ignore[arg-type]
        else:
            for factor in (A, B):
                factor.register_hook(lambda gradient: 4 * gradient)
            y = literally(x, weight, bias, A, B, *anchors)
        # A penalty on the gradient, as discriminators have it.
        (of_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.sin().sum() + of_x.square().sum()).backward()
        found.append([t.grad for t in (x, A, B)])
    for own, literal in zip(*found, strict=True):
        torch.testing.assert_close(own, literal)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("by_func", [True, False])
def test_many_gradients_come_in_one_batch(
    rows: int, anchored: bool, parts: int | None, create_graph: bool, by_func: bool
) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them, or torch.func.vmap."""
    inputs: Any = tensors(rows, anchored, "per head", parts)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    y = product(*inputs, SCALE, 4)
    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)

    def gradients(cotangent: Tensor, batched: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            y, wanted, cotangent, retain_graph=True, create_graph=create_graph, is_grads_batched=batched
        )

    found = torch.func.vmap(gradients)(cotangents) if by_func else gradients(cotangents, batched=True)
    for own, *one_by_one in zip(found, *map(gradients, cotangents), strict=True):
        torch.testing.assert_close(own, torch.stack(one_by_one))


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_after_a_merge_it_is_exactly_the_base_product(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias, A, B, *_ = (None if t is None else t.detach().to(dtype) for t in tensors(rows))
    zero = torch.zeros_like(B)  # type: ignore[arg-type]
    merged = product(x, weight, bias, A, B, A, B, SCALE)  # type: ignore[arg-type]
    assert torch.equal(merged, product(x, weight, bias, A, zero, A, zero, SCALE))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [30, 400])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_no_more_multiply_adds_than_its_count_says(rows: int, anchored: bool, dtype: torch.dtype) -> None:
    m, n, r = 96, 64, 4

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    weight, x = random(m, n), random(1, rows, n).requires_grad_()
    A, B = random(1, r, n).requires_grad_(), random(1, m, r).requires_grad_()
    anchors = (random(1, r, n), random(1, m, r)) if anchored else (None, None)

    def added(_: Any, a: torch.Size, b: torch.Size, **more: Any) -> int:
        return 2 * a.numel() * b[-1]

    in_place: Any = {torch.ops.aten.baddbmm_: added}  # which torch does not count
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        product(x, weight, None, A, B, *anchors, SCALE).sum().backward()
    pairs = 2 if anchored else 1
    few = rows * (2 * m * n + (1 + 2 * pairs) * r * (m + n))
    many = rows * (2 * m * n + 2 * r * (m + n)) + 2 * pairs * r * m * n
    # In half precision no effective weight is made.
    expected = many if rows == 400 and dtype is torch.float32 else few
    assert counter.get_total_flops() // 2 == expected < rows * 3 * m * n


def test_a_weight_that_a_first_layer_writes_to_later_breaks_no_backward() -> None:
    x, weight, bias, A, B, *anchors = (None if t is None else t.detach() for t in tensors(FEW))
    y = product(x, weight, bias, A, B.requires_grad_(), *anchors, SCALE)  # type: ignore[arg-type, union-attr]
    weight.zero_()  # type: ignore[union-attr]
    y.sum().backward()
    assert B is not None and B.grad is not None


def test_it_is_left_to_plain_operations_where_it_would_hide_something() -> None:
    x, weight, bias, A, *_ = (None if t is None else t.detach().float() for t in tensors(FEW))
    own: Any = (x, weight, bias, A)
    assert applies(*own) and applies(x, nn.Parameter(weight), None, A)  # type: ignore[arg-type]
    assert applies(*(t.bfloat16() for t in own)) and applies(*(t.double() for t in own))
    assert not applies(x, weight.double(), bias, A)  # type: ignore[arg-type, union-attr]
    assert not applies(own[0].bfloat16(), *own[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert applies(*own) and applies(own[0].bfloat16(), *own[1:])
        assert not applies(*(t.double() for t in own))  # autocast would leave them alone
    with torch.autograd.forward_ad.dual_level():
        assert not applies(*own)
    seen = []
    torch.func.grad(lambda t: (seen.append(applies(t, *own[1:])), t.sum())[1])(x)
    assert seen == [False]


def test_a_scaled_gradient_is_one_in_all_ways_to_differentiate() -> None:
    t = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def cube(own: Tensor) -> Tensor:
        return scaled_gradient(own, 4).pow(3).sum()

    expected = 12 * t.detach().square()
    assert torch.equal(scaled_gradient(t, 4), t)
    (found,) = torch.autograd.grad(cube(t), t, create_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.grad(cube)(t.detach()), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cube))(t.detach().expand(2, 3)), expected.expand(2, 3))
    compiled: Any = torch.compile(cube, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(t), t)[0], expected)
    # A tangent is one of the value, which is as it was.
    _, tangent = torch.func.jvp(cube, (t.detach(),), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, 3 * t.detach().square().sum())


@pytest.mark.parametrize(("width", "together"), [(4096, 4), (32, 32), (16384, 1)])
def test_off_the_cpu_effective_weights_are_made_within_bounds(width: int, together: int) -> None:
    factors = torch.empty(32, 1, 2, width, device="meta"), torch.empty(32, 1, width, 2, device="meta"), None, None
    made = [
        own.shape
        for *_, own in module._effective(torch.empty(width, width, device="meta"), factors, 1.0, torch.float32)
    ]
    assert made == [(together, width, width)] * (32 // together)
