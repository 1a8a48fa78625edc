from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.heads import Factors
from lightning_lte.layers import headed_class
from lightning_lte.layers.base import HeadedLayer, LayerState, enter, leave, original_class, state_of
from lightning_lte.switch import Switch

COUNT = 3


class Named(nn.Linear):
    """A plain subclass, as code bases have them."""


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors_of(layer: nn.Linear, rank: int = 2, keep: bool = True) -> Factors:
    f = Factors("fc", layer.weight, rank=rank, scale=1.5, count=COUNT, first=0, seed=0, init="orthogonal", keep=keep)
    with torch.no_grad():
        f.B.copy_(random(*f.B.shape, seed=1))
        if f.anchor_B is not None:
            f.anchor_B.copy_(random(*f.B.shape, seed=2))
    return f


def stack(*shape: int, seed: int) -> nn.Parameter:
    return nn.Parameter(random(COUNT, *shape, seed=seed))


def headed(layer: nn.Module, state: LayerState) -> None:
    kind = headed_class(layer)
    assert kind is not None
    enter(layer, kind, state)


def heads_and_slices(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield from enumerate(x.chunk(COUNT))


@pytest.mark.parametrize("weight", ["factored", "own", "shared"])
@pytest.mark.parametrize("bias", ["none", "own", "shared"])
@given(rows=st.integers(1, 3), inner=st.lists(st.integers(1, 3), max_size=2), keep=st.booleans())
def test_a_linear_layer_gives_each_head_its_own_literal_product(
    weight: str, bias: str, rows: int, inner: list[int], keep: bool
) -> None:
    layer = nn.Linear(6, 5, bias=bias != "none", dtype=torch.float64)
    switch = Switch(COUNT)
    state = LayerState(switch, factors_of(layer, keep=keep) if weight == "factored" else None)
    if weight == "own":
        state.stacks["weight"] = stack(5, 6, seed=3)
    if bias == "own":
        state.stacks["bias"] = stack(5, seed=4)
    headed(layer, state)
    x = random(COUNT * rows, *inner, 6, seed=5)

    with switch.at("all"):
        y = layer(x)
    assert y.shape == (COUNT * rows, *inner, 5)
    for head, own in heads_and_slices(x):
        W = layer.weight
        if state.factors is not None:
            W = state.factors.effective(head)
        elif weight == "own":
            W = state.stacks["weight"][head]
        expected = own @ W.mT
        if layer.bias is not None:
            expected = expected + (state.stacks["bias"][head] if bias == "own" else layer.bias)
        torch.testing.assert_close(y.chunk(COUNT)[head], expected)

    merged = functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), merged)
    for head in range(COUNT):
        W = layer.weight if state.factors is None else state.factors.effective(head)
        with switch.at(head):
            torch.testing.assert_close(layer(x), functional.linear(x, W, layer.bias))
    assert torch.equal(layer(x), merged)


@pytest.mark.parametrize("position", ["all", 0, 2])
def test_gradients_reach_the_factors_of_the_heads_that_act_and_never_the_base_weight(
    position: int | Literal["all"],
) -> None:
    layer = nn.Linear(6, 5, dtype=torch.float64)
    switch, f = Switch(COUNT), factors_of(layer)
    headed(layer, LayerState(switch, f))
    x = random(COUNT * 2, 6, seed=5).requires_grad_()
    with switch.at(position):
        layer(x).square().sum().backward()
    assert layer.weight.grad is None and f.A.grad is not None and f.B.grad is not None and x.grad is not None

    A, B = f.A.detach().clone().requires_grad_(), f.B.detach().clone().requires_grad_()
    copied = x.detach().clone().requires_grad_()
    for head in range(COUNT):
        if position in ("all", head):
            own = copied.chunk(COUNT)[head] if position == "all" else copied
            W = layer.weight.detach() + f.scale * (B[head] @ A[head] - f.anchor_B[head] @ f.anchor_A[head])
            functional.linear(own, W, layer.bias.detach()).square().sum().backward()
    for found, expected in ((f.A, A), (f.B, B), (x, copied)):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
@pytest.mark.parametrize("own", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_scales_and_shifts_each_slice_by_its_own_head(
    shape: tuple[int, ...], own: tuple[str, ...], bias: bool
) -> None:
    layer = nn.LayerNorm(shape, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for seed, param in enumerate(layer.parameters()):
            param.copy_(random(*shape, seed=seed))
    switch = Switch(COUNT)
    stacks = {name: stack(*shape, seed=9 + len(name)) for name in own if bias or name != "bias"}
    headed(layer, LayerState(switch, stacks=stacks))
    x = random(COUNT * 2, 5, *shape, seed=6)
    with switch.at("all"):
        y = layer(x)
    for head, piece in heads_and_slices(x):
        w = stacks["weight"][head] if "weight" in stacks else layer.weight
        b = stacks["bias"][head] if "bias" in stacks else layer.bias
        torch.testing.assert_close(y.chunk(COUNT)[head], functional.layer_norm(piece, shape, w, b, layer.eps))
    expected = functional.layer_norm(x, shape, layer.weight, layer.bias, layer.eps)
    assert torch.equal(layer(x), expected)
    with switch.at(1):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LayerNorm(6)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("position", [None, "all", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_give_the_dtype_of_the_plain_layer(
    layer: nn.Module, position: Any, dtype: torch.dtype
) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(COUNT * 2, 6, dtype=dtype)
    plain = layer(x).dtype
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x).dtype
    switch = Switch(COUNT)
    stacks = {n: nn.Parameter(p.detach().expand(COUNT, *p.shape).clone()) for n, p in layer.named_parameters()}
    if isinstance(layer, nn.Linear):
        headed(layer, LayerState(switch, factors_of(layer), {"bias": stacks["bias"]}))
    else:
        headed(layer, LayerState(switch, stacks=stacks))
    with switch.at(position):
        assert layer(x).dtype == plain
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == mixed


@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_a_batch_that_cannot_be_dealt_out_is_refused_with_rule_value_and_remedy(shape: tuple[int, ...]) -> None:
    layer, switch = nn.Linear(6, 6), Switch(COUNT)
    headed(layer, LayerState(switch, factors_of(layer)))
    with switch.at("all"), pytest.raises(ValueError, match=r"evenly over the 3 .*received shape .*sequential"):
        layer(torch.zeros(shape))


@pytest.fixture(params=[nn.Linear, Named, nn.LayerNorm], ids=lambda kind: kind.__name__)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return request.param(6, 6) if issubclass(request.param, nn.Linear) else request.param(6)


def state_for(layer: nn.Module) -> LayerState:
    return LayerState(Switch(COUNT), factors_of(layer) if isinstance(layer, nn.Linear) else None)


def test_a_layer_with_heads_looks_like_the_users_own(layer: nn.Module) -> None:
    kind, text, keys = type(layer), repr(layer), list(layer.state_dict())
    params, modules = list(layer.parameters()), list(layer.modules())
    headed(layer, state_for(layer))
    assert isinstance(layer, kind) and original_class(layer) is kind
    assert type(layer).__name__ == kind.__name__ and repr(layer) == text
    assert list(layer.state_dict()) == keys and list(layer.modules()) == modules
    assert all(a is b for a, b in zip(layer.parameters(), params, strict=True))


def test_leaving_is_the_inverse_of_entering(layer: nn.Module) -> None:
    kind, attributes = type(layer), dict(layer.__dict__)
    headed(layer, state_for(layer))
    assert isinstance(layer, HeadedLayer) and headed_class(layer) is None
    leave(layer)
    assert type(layer) is kind and layer.__dict__ == attributes


def copied_by_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": copied_by_torch_save,
    **{
        f"pickle {n}": lambda layer, n=n: pickle.loads(pickle.dumps(layer, n))
        for n in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_of_the_users_class_and_has_no_heads(layer: nn.Module, how: str) -> None:
    kind, x = type(layer), torch.randn(3, 6)
    expected = layer(x)
    layer.note = "kept"  # type: ignore[assignment]
    headed(layer, state_for(layer))
    copied = COPIES[how](layer)
    assert type(copied) is kind and copied.note == "kept"
    assert copied.__dict__.keys() == layer.__dict__.keys() - {"_lte"}
    assert torch.equal(copied(x), expected)
    assert isinstance(layer, HeadedLayer) and state_of(layer)


def test_a_pickle_does_not_need_this_package(layer: nn.Module) -> None:
    headed(layer, state_for(layer))
    assert b"lightning_lte" not in pickle.dumps(layer)


def note_call(module: nn.Module, *_: Any) -> None:
    module.hook_calls = getattr(module, "hook_calls", 0) + 1  # type: ignore[assignment, operator]


def test_hooks_are_kept(layer: nn.Module) -> None:
    layer.register_forward_hook(note_call)
    layer(torch.zeros(3, 6))
    headed(layer, state_for(layer))
    layer(torch.zeros(3, 6))
    copied = copy.deepcopy(layer)
    copied(torch.zeros(3, 6))
    leave(layer)
    layer(torch.zeros(3, 6))
    assert (layer.hook_calls, copied.hook_calls) == (3, 3)


def with_own_forward() -> nn.Linear:
    layer = nn.Linear(6, 6)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Doubling(6, 6),
        with_own_forward(),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.utils.spectral_norm(nn.Linear(6, 6)),
        nn.Bilinear(6, 6, 6),
        nn.Conv1d(6, 6, 1),
        nn.LayerNorm(6, elementwise_affine=False),
    ],
)
def test_a_layer_that_computes_otherwise_is_not_known(layer: nn.Module) -> None:
    assert headed_class(layer) is None


def test_the_switch_goes_back_after_an_error() -> None:
    switch = Switch(COUNT)
    with switch.at("all"):
        with pytest.raises(KeyError), switch.at(1):
            assert switch.position == 1
            raise KeyError
        assert switch.position == "all"
    assert switch.position is None
