from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lte.config import Init
from lightning_lte.heads import Factors, Matrices

shapes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 9), st.integers(1, 2))


def factors(
    count: int = 3, out_features: int = 5, in_features: int = 7, rank: int = 2, dtype: Any = torch.float64, **more: Any
) -> Factors:
    chosen = {"name": "layer", "scale": 1.5, "first": 0, "seed": 0, "init": "orthogonal", "keep": True, **more}
    weight = nn.Parameter(
        torch.linspace(-1, 1, out_features * in_features, dtype=dtype).view(out_features, in_features)
    )
    return Factors(weight=weight, rank=rank, count=count, **chosen)


def learn(f: Factors, seed: int = 1) -> None:
    """Give all heads factors and anchors that differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (f.A, f.B, f.anchor_A, f.anchor_B):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def literal_delta(f: Factors, head: int) -> Tensor:
    product = f.B[head].detach() @ f.A[head].detach()
    if f.anchor_A is not None and f.anchor_B is not None:
        product = product - f.anchor_B[head] @ f.anchor_A[head]
    return f.scale * product


@pytest.mark.parametrize("init", get_args(Init))
@given(first=st.integers(0, 5), count=st.integers(1, 3))
def test_a_head_starts_alike_wherever_it_sits(init: Init, first: int, count: int) -> None:
    everywhere = factors(count=8, init=init)
    here = factors(count=count, first=first, init=init)
    torch.testing.assert_close(here.A, everywhere.A[first : first + count], rtol=0, atol=0)


@pytest.mark.parametrize("init", get_args(Init))
def test_drawing_leaves_the_random_stream_alone_and_does_not_depend_on_it(init: Init) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = factors(init=init)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(factors(init=init).A, first.A)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_drawing_does_not_depend_on_default_dtype_and_device(default: torch.dtype) -> None:
    f = factors()
    expected = f.draw()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            drawn = f.draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("init", get_args(Init))
def test_heads_layers_seeds_and_merges_all_start_differently(init: Init) -> None:
    f = factors(count=4, init=init)
    draws = [*f.draw(), *f.draw(merges=1), *factors(seed=1, init=init).draw(), *factors(name="other", init=init).draw()]
    for i, one in enumerate(draws):
        assert not any(torch.allclose(one, other, atol=0.1) for other in draws[:i])


@given(shapes)
def test_orthogonal_rows_have_the_length_of_the_released_code(shape: tuple[int, int, int, int]) -> None:
    count, out_features, in_features, rank = shape
    A = factors(count, out_features, in_features, rank).A.detach()
    expected = torch.eye(rank, dtype=A.dtype).expand(count, -1, -1) * in_features / rank
    torch.testing.assert_close(A @ A.mT, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("init", "expected"), [("kaiming", (2 / 200) ** 0.5), ("xavier", (2 / 250) ** 0.5)])
def test_normal_starts_have_the_standard_deviation_they_are_named_for(init: Init, expected: float) -> None:
    assert float(factors(out_features=1, in_features=200, rank=50, init=init).draw().std()) == pytest.approx(
        expected, rel=0.02
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_start_is_the_base_weight(keep: bool) -> None:
    f = factors(keep=keep)
    for head in range(f.count):
        assert torch.equal(f.effective(head), f.weight)
    assert not f.summed_delta(torch.ones(f.count, dtype=torch.bool)).any()
    assert (f.anchor_A is not None) == (f.anchor_B is not None) == keep


@given(shapes, st.booleans(), st.data())
def test_summed_delta_is_the_literal_sum_of_products_over_good_heads(
    shape: tuple[int, int, int, int], keep: bool, data: st.DataObject
) -> None:
    f = factors(*shape, keep=keep)
    learn(f)
    good = torch.tensor(data.draw(st.lists(st.booleans(), min_size=f.count, max_size=f.count)))
    chosen = [literal_delta(f, head) for head in range(f.count) if good[head]]
    expected = torch.stack(chosen).sum(0) if chosen else torch.zeros_like(f.weight)
    torch.testing.assert_close(f.summed_delta(good), expected)
    squares = sum((d.square().sum() for d in chosen), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(f.squared_norms(good), squares)


@pytest.mark.parametrize("keep", [True, False])
def test_a_head_that_is_not_good_leaves_no_trace_in_the_sum(keep: bool) -> None:
    f = factors(keep=keep)
    learn(f)
    expected = literal_delta(f, 0) + literal_delta(f, 2)
    with torch.no_grad():
        f.A[1], f.B[1] = torch.nan, torch.inf
    assert f.finite().tolist() == [True, False, True]
    torch.testing.assert_close(f.summed_delta(f.finite()), expected)
    assert f.squared_norms(f.finite()).isfinite()


@given(shapes, st.booleans())
def test_all_ways_to_apply_heads_agree_with_their_effective_weights(
    shape: tuple[int, int, int, int], keep: bool
) -> None:
    f = factors(*shape, keep=keep)
    learn(f)
    x = torch.randn(f.count, 4, shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = x @ f.weight.detach().mT
    together = f.apply(base, x)
    for head in range(f.count):
        expected = x[head] @ (f.weight.detach() + literal_delta(f, head)).mT
        torch.testing.assert_close(f.effective(head), f.weight.detach() + literal_delta(f, head))
        torch.testing.assert_close(together[head].detach(), expected)
        torch.testing.assert_close(f.apply(base[head, None], x[head, None], head)[0].detach(), expected)
    assert f.took_part


@given(shapes, st.integers(2, 4), st.booleans())
def test_each_of_several_matrices_has_factors_of_its_own(
    shape: tuple[int, int, int, int], parts: int, keep: bool
) -> None:
    count, out_features, in_features, rank = shape
    weight = nn.Parameter(torch.zeros(parts * out_features, in_features, dtype=torch.float64))
    choices: dict[str, Any] = {"scale": 1.5, "first": 0, "seed": 0, "init": "orthogonal"}
    f = Factors("layer", weight, rank=rank, count=count, keep=keep, matrices=Matrices.of(weight, parts), **choices)
    assert f.A.shape == (count, parts, rank, in_features) and f.B.shape == (count, parts, out_features, rank)
    assert not torch.allclose(f.A[:, 0], f.A[:, 1])
    learn(f)
    x = torch.randn(count, 4, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = f.apply(x @ weight.detach().mT, x)
    literal = [torch.cat(list(literal_delta(f, head))) for head in range(count)]
    good = torch.ones(count, dtype=torch.bool)
    torch.testing.assert_close(f.summed_delta(good), torch.stack(literal).sum(0))
    torch.testing.assert_close(f.squared_norms(good), torch.stack(literal).square().sum())
    for head, delta in enumerate(literal):
        torch.testing.assert_close(f.effective(head), delta)
        torch.testing.assert_close(together[head].detach(), x[head] @ delta.mT)
        for part, own in enumerate(literal_delta(f, head)):
            y = f.apply(torch.zeros(1, 4, out_features, dtype=torch.float64), x[head, None], head, part)
            torch.testing.assert_close(y[0].detach(), x[head] @ own.mT)


def test_parts_that_do_not_divide_a_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"received 3 parts for a weight of shape \(8, 4\)\. Give a divisor of 8"):
        Matrices.of(torch.zeros(8, 4), 3)


def test_anchors_follow_factors_and_take_the_delta_to_zero() -> None:
    f = factors()
    learn(f)
    f.settle()
    for head in range(f.count):
        torch.testing.assert_close(f.effective(head), f.weight.detach(), rtol=0, atol=0)
    learned = f.A.detach().clone()
    with torch.no_grad():
        f.A += 1
    assert torch.equal(f.anchor_A, learned)  # a copy, not a view


@pytest.mark.parametrize("redraw", [True, False])
def test_a_restart_changes_the_chosen_heads_alone(redraw: bool) -> None:
    f = factors(count=4)
    learn(f)
    A, B = f.A.detach().clone(), f.B.detach().clone()
    chosen = torch.tensor([False, True, True, False])
    f.restart(chosen, redraw=redraw, merges=3)
    assert torch.equal(f.B[~chosen], B[~chosen]) and not f.B[chosen].any()
    assert torch.equal(f.A[~chosen], A[~chosen])
    expected = f.draw(merges=3).to(A)[chosen] if redraw else A[chosen]
    assert torch.equal(f.A[chosen], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_deltas_add_up_in_half_precision(dtype: torch.dtype) -> None:
    f = factors(dtype=dtype)
    start = f.weight.detach().float()
    for _ in range(100):
        f.add(torch.full(f.weight.shape, 1e-4))
    assert f.remainder is not None
    torch.testing.assert_close(f.weight.detach().float() + f.remainder, start + 0.01, rtol=0, atol=1e-5)
    torch.testing.assert_close(f.weight.detach().float(), start + 0.01, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_carries_no_remainder(dtype: torch.dtype) -> None:
    f = factors(dtype=dtype)
    expected = f.weight.detach() + 0.25
    f.add(torch.full(f.weight.shape, 0.25))
    assert f.remainder is None and torch.equal(f.weight, expected)


def test_the_sum_is_accumulated_in_float32_where_factors_are_in_half_precision() -> None:
    f = factors(dtype=torch.bfloat16, keep=False)
    learn(f)
    wide = sum(f.scale * f.B[h].detach().float() @ f.A[h].detach().float() for h in range(f.count))
    summed = f.summed_delta(torch.ones(f.count, dtype=torch.bool))
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed, wide)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_deltas_do_not_drown_in_rounding(size: float) -> None:
    f = factors(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        f.B.copy_(torch.randn(f.B.shape, generator=generator))
        f.settle()
        for p in (f.A, f.B):
            p += size * torch.randn(p.shape, generator=generator)
    assert f.anchor_A is not None and f.anchor_B is not None
    A, B, anchor_A, anchor_B = (t.detach().double() for t in (f.A, f.B, f.anchor_A, f.anchor_B))
    exact = f.scale * (B @ A - anchor_B @ anchor_A)
    good = torch.ones(f.count, dtype=torch.bool)
    error = (f.summed_delta(good).double() - exact.sum(0)).norm() / exact.sum(0).norm()
    assert error < 1e-5
    assert float(f.squared_norms(good)) == pytest.approx(float(exact.square().sum()), rel=1e-4)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("lead", [{}, {"lead": (1,)}], ids=str)
def test_merges_are_in_full_precision_under_autocast(keep: bool, lead: dict[str, Any]) -> None:
    f = factors(keep=keep, dtype=torch.float32, matrices=Matrices(5, 7, **lead))
    learn(f)
    good = torch.ones(f.count, dtype=torch.bool)

    def found() -> list[Tensor]:
        return [f.summed_delta(good), f.squared_norms(good), f.effective(0)]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found(), expected, rtol=0, atol=0)


@given(rank=st.integers(1, 6), in_features=st.integers(6, 40), out_features=st.integers(2, 30), seed=st.integers(0, 99))
def test_adams_first_step_moves_a_weight_by_s_times_the_learning_rate(
    rank: int, in_features: int, out_features: int, seed: int
) -> None:
    """Whatever the rank and the shape: see "How large a step is" in docs/equations.md."""
    f = factors(count=1, rank=rank, in_features=in_features, out_features=out_features, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    f.B.grad = torch.randn(f.B.shape, generator=generator, dtype=torch.float64)
    torch.optim.Adam([f.B], lr=0.01, eps=0).step()
    [delta] = f.summed_delta(torch.tensor([True])).unsqueeze(0)
    assert float(delta.square().mean().sqrt()) == pytest.approx(f.scale * 0.01)


@pytest.mark.parametrize("count", [2, 8, 32])
def test_what_heads_learn_from_noise_is_orthogonal(count: int) -> None:
    """So the mean of N deltas is 1/sqrt(N) as large as each, and as large as each where all learn the same."""
    f = factors(count=count, rank=8, in_features=64, out_features=64)
    generator = torch.Generator().manual_seed(0)
    f.B.grad = torch.randn(f.B.shape, generator=generator, dtype=torch.float64)
    torch.optim.Adam([f.B], lr=0.01, eps=0).step()
    mean = f.summed_delta(torch.ones(count, dtype=torch.bool)) / count
    assert float(mean.square().mean().sqrt()) == pytest.approx(f.scale * 0.01 / count**0.5, rel=0.03)
