"""Convolutions through factors, against the literal formula: values, all derivatives, and what they take."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_lte import Explorer, LTEConfig
from lightning_lte.layers import factored_convolution
from lightning_lte.layers.base import LayerState
from lightning_lte.switch import Switch
from tests.test_layers import COUNT, factors_of, headed, random

# By the count of places: with each head's effective weight, or beside the base convolution.
MANY, FEW = True, False
LAYERS: dict[str, tuple[Callable[[], Any], dict[bool, tuple[int, ...]], int]] = {
    "1d in parts": (lambda: nn.Conv1d(2, 6, 3, stride=2, padding=1), {MANY: (25,), FEW: (2,)}, 3),
    "2d with groups": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2), {MANY: (8, 5), FEW: (2, 4)}, 1),
    "2d of one place, channels last": (
        lambda: nn.Conv2d(4, 6, 1, bias=False).to(memory_format=torch.channels_last),
        {MANY: (4, 3), FEW: (1, 2)},
        1,
    ),
    "transposed with groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        {MANY: (3, 3), FEW: (1, 2)},
        1,
    ),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), {MANY: (6, 6), FEW: (1, 2)}, 1),
    "3d": (lambda: nn.Conv3d(2, 6, 2), {MANY: (4, 4, 3), FEW: (2, 2, 3)}, 1),
}


@pytest.fixture(autouse=True, params=[True, False], ids=["whole", "thin"])
def small_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed as large ones are: calls take no time, and so a few places are many; and gradients of factors
    come from those of effective weights, or from the input."""
    monkeypatch.setattr(factored_convolution, "_CALLS", 0)
    monkeypatch.setattr(factored_convolution._Form, "is_thin", lambda *_: request.param)


per_layer = pytest.mark.parametrize("case", LAYERS)
per_places = pytest.mark.parametrize("many", [MANY, FEW])
per_anchors = pytest.mark.parametrize("keep", [True, False])


class Convolutions(TorchDispatchMode):
    """Counts convolutions, and gradients of them, by the shapes of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self._seen[tuple(args[1].shape)] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self._seen["backward", tuple(args[2].shape)] += 1
        return func(*args, **(kwargs or {}))

    def of(self, shape: torch.Size) -> tuple[int, int]:
        """How many there were of a weight of this shape: forwards, and gradients."""
        return self._seen[tuple(shape)], self._seen["backward", tuple(shape)]

    @property
    def gradients(self) -> int:
        """How many gradients there were."""
        return sum(count for key, count in self._seen.items() if key[0] == "backward")


def made(case: str, many: bool, keep: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Tensor]:
    """A layer, a plain twin, its factors, and an input."""
    make, sizes, parts = LAYERS[case]
    layer = make().to(dtype)
    with torch.no_grad():
        for seed, param in enumerate(layer.parameters()):
            param.copy_(random(*param.shape, seed=10 + seed))
    plain = copy.deepcopy(layer)
    f = factors_of(layer, rank=1, keep=keep, parts=parts)
    f.gradient_scale = COUNT
    headed(layer, LayerState(Switch(COUNT), {"weight": f}))
    layer._lte.switch.acting = "all"
    x = random(COUNT, layer.in_channels, *sizes[many], seed=4).to(dtype)
    if layer.weight.dim() == 4 and not layer.weight.is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    return layer, plain, f, x.requires_grad_()


def literally(plain: Any, f: Any, x: Tensor) -> Tensor:
    """Each head's effective weight, in a plain layer."""
    outputs = []
    for h, part in enumerate(x.chunk(COUNT)):
        old = 0 if f.anchor_A is None else f.anchor_B[h] @ f.anchor_A[h]
        weight = plain.weight.detach() + f.scale * f.matrices.as_weight(f.B[h] @ f.A[h] - old, plain.weight.shape)
        outputs.append(torch.func.functional_call(plain, {"weight": weight}, (part,)))
    return torch.cat(outputs)


@per_layer
@per_places
def test_the_count_of_places_tells_how_they_are_computed(case: str, many: bool) -> None:
    layer, _, _, x = made(case, many)
    # For one sample of each head torch has a slow kernel in three dimensions.
    assert layer(x).grad_fn.folds == (many and case != "3d")


@pytest.mark.parametrize(("size", "samples", "kernel", "calls"), [
    (16, 1, 3, 3), (32, 4, 3, 4), (4, 4, 1, 3), (16, 4, 1, 4),
])  # fmt: skip
def test_several_heads_take_as_few_calls_as_pay(
    size: int, samples: int, kernel: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of all heads together (W, A and B) on a CPU, or one for each of four heads, of many places."""
    monkeypatch.undo()
    layer = nn.Conv2d(64, 64, kernel, padding=kernel // 2)
    net = nn.Sequential(layer)
    explorer = Explorer(net, torch.optim.SGD(net.parameters(), 0.1), LTEConfig(4, 10, rank=4, execution="batched"))
    x = torch.randn(4 * samples, 64, size, size)
    with explorer.heads(), profile() as profiler:
        net(x)
    assert sum(event.count for event in profiler.key_averages() if event.key == "aten::conv2d") == calls


@per_layer
@per_places
@per_anchors
def test_value_and_gradients_are_those_of_the_literal_formula(case: str, many: bool, keep: bool) -> None:
    layer, plain, f, x = made(case, many, keep)
    y, expected = layer(x), literally(plain, f, x)
    assert type(y.grad_fn).__name__ == "_FactoredConvolutionBackward" and not y._is_view()
    torch.testing.assert_close(y, expected)
    seed = random(*y.shape, seed=5)
    found = torch.autograd.grad(y, [x, f.A, f.B], seed)
    wanted = torch.autograd.grad(expected, [x, f.A, f.B], seed)
    for own, literal, size in zip(found, wanted, (1, COUNT, COUNT), strict=True):
        torch.testing.assert_close(own, size * literal)


@per_layer
@per_places
@per_anchors
@pytest.mark.parametrize("differentiated", [True, False])
def test_under_autocast_it_is_float64_but_for_its_rounding(
    case: str, many: bool, keep: bool, differentiated: bool
) -> None:
    """With a weight that wants a gradient, as in the first steps."""

    def found(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        layer, _, f, x = made(case, many, keep, dtype)
        f.base = lambda: layer.weight
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
            assert y.grad_fn.folds == (many and (case != "3d" or autocast))  # oneDNN has a fast kernel for bfloat16
            loss = y.double().square().mean()
            if differentiated:
                loss = loss + torch.autograd.grad(loss, x, create_graph=True)[0].double().square().sum()
            # Autocast is on in here, as it is where users call it in a training step.
            return [y.detach(), *torch.autograd.grad(loss, [x, layer.weight, f.A, f.B])]

    own, exact = found(torch.float32, True), found(torch.float64, False)
    assert [t.dtype for t in own] == [torch.bfloat16, *[torch.float32] * 4]
    for half, literal in zip(own, exact, strict=True):
        assert float((half.double() - literal).norm() / literal.norm()) < 0.05


@per_layer
@per_places
@per_anchors
def test_it_has_second_derivatives_where_a_layer_is_used_twice_and_many_at_once(
    case: str, many: bool, keep: bool
) -> None:
    found = []
    for through_heads in (True, False):
        layer, plain, f, x = made(case, many, keep)
        if not through_heads:  # as for any gradient of a factor, what comes through a derivative is scaled, too
            f.A.register_hook(lambda gradient: COUNT * gradient)
            f.B.register_hook(lambda gradient: COUNT * gradient)
        run = layer if through_heads else lambda own, plain=plain, f=f: literally(plain, f, own)
        y = torch.tanh(run(x * torch.tanh(run(x)).mean()))
        of_x, of_A = torch.autograd.grad(y.square().sum(), [x, f.A], create_graph=True)
        (y.sin().sum() + of_x.square().sum() + of_A.square().sum()).backward()
        found.append([x.grad, f.A.grad, f.B.grad])
    for own, literal in zip(*found, strict=True):
        torch.testing.assert_close(own, literal)
    layer, _, f, x = made(case, many, keep)
    f.gradient_scale = 1
    A, B = f.A, f.B

    def of(x: Tensor, own_A: Tensor, own_B: Tensor) -> Tensor:
        f.A, f.B = own_A, own_B
        y: Tensor = layer(x)
        return y

    assert torch.autograd.gradcheck(of, (x, A, B), check_batched_grad=True, fast_mode=True)


@per_layer
@per_places
def test_a_weight_that_a_first_layer_writes_to_later_breaks_no_backward(case: str, many: bool) -> None:
    layer, _, f, x = made(case, many)
    y = layer(x.detach())
    with torch.no_grad():
        layer.weight.zero_()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.sum(), [f.A, f.B], retain_graph=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.sum(), [f.A, f.B], create_graph=True))


@pytest.mark.parametrize(("channels", "groups", "rank", "calls"), [(64, 8, 2, 1), (32, 1, 8, 1), (128, 1, 8, 3)])
def test_the_gradients_of_thin_factors_come_from_those_of_effective_weights(
    channels: int, groups: int, rank: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    net = nn.Sequential(nn.Conv2d(channels, channels, 3, groups=groups))
    explorer = Explorer(net, torch.optim.SGD(net.parameters(), 0.1), LTEConfig(1, 10, rank=rank))
    for f in explorer.injection.factors.values():
        f.end_trial()
    x = torch.randn(4, channels, 32, 32, requires_grad=True)
    with explorer.heads():
        y = net(x).sum()
        with profile() as profiler:
            y.backward()
    assert sum(event.count for event in profiler.key_averages() if event.key == "aten::convolution_backward") == calls


@pytest.mark.parametrize(("samples", "of_pairs"), [(1, 2), (2, 2 * COUNT)])
def test_gradients_of_all_pairs_come_together_where_their_samples_lie_side_by_side(
    samples: int, of_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factored_convolution._Form, "is_thin", lambda *_: False)
    layer = nn.Conv2d(4, 8, 3)
    headed(layer, LayerState(switch := Switch(COUNT), {"weight": factors_of(layer)}))
    with switch.at("all"), Convolutions() as seen:
        layer(random(samples * COUNT, 4, 9, 9).float().requires_grad_()).sum().backward()
    # With each head's effective weight there are one forward and one gradient of the input for each head.
    assert seen.of(layer.weight.shape) == (COUNT, COUNT)
    assert seen.gradients - COUNT == of_pairs


def test_one_small_sample_of_each_head_in_three_dimensions_goes_with_the_others() -> None:
    """Torch has a slow kernel of its own for it, and oneDNN's is for more."""
    layer = nn.Conv3d(4, 8, 3, padding=1)
    headed(layer, LayerState(switch := Switch(COUNT), {"weight": factors_of(layer)}))
    for samples, times in ((1, 1), (2, COUNT)):
        with switch.at("all"), Convolutions() as seen:
            layer(random(samples * COUNT, 4, 5, 5, 5).float().requires_grad_()).sum().backward()
        assert seen.of(layer.weight.shape) == (times, times)


@pytest.mark.parametrize(("places", "keep"), [(30, True), (30, False), (400, True), (400, False)])
def test_it_takes_no_more_multiply_adds_than_its_count_says(
    places: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    layer, m, n, r = nn.Conv1d(64, 96, 3, padding=1), 96, 3 * 64, 2
    f = factors_of(layer, rank=r, keep=keep)
    headed(layer, LayerState(switch := Switch(COUNT), {"weight": f}))
    x = torch.randn(1, 64, places, requires_grad=True)
    # One head, as torch counts the gradients of weights of several groups several times.
    with switch.at(0), FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    pairs = 2 if keep else 1
    few = places * (2 * m * n + (1 + 2 * pairs) * r * (m + n) + r * m)  # the gradient times B comes by itself
    many = places * (2 * m * n + 2 * r * (m + n)) + 2 * pairs * r * m * n
    assert counter.get_total_flops() // 2 == (many if places == 400 else few) < places * 3 * m * n
