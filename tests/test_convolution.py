from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lte.layers.convolution import Geometry, convolve_each

COUNT, CHANNELS = 2, 3
LARGE: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {  # size, kernel, stride, dilation
    "1d": ((13,), (5,), 1, 1),
    "2d": ((8, 9), (5, 7), 1, 1),
    "2d of an even kernel": ((8, 9), (6, 6), 1, 1),
    "2d of a stride that leaves some out": ((12, 9), (5, 5), 3, 1),
    "2d of stride and dilation": ((14, 15), (5, 1), 2, 3),
    "3d": ((4, 7, 7), (1, 5, 3), 2, 1),
}


def tensors(case: str, bias: str, last: bool = False, samples: int = 4) -> tuple[Geometry, Tensor, list[Any]]:
    """Those of a depthwise convolution: its geometry, the user's weight, and x, each head's own weight, and biases."""
    size, kernel, stride, dilation = LARGE[case]
    dims = len(size)
    geometry = Geometry(
        (stride,) * dims, tuple(k // 2 for k in kernel), (dilation,) * dims, False, (0,) * dims, CHANNELS
    )
    generator = torch.Generator().manual_seed(0)
    biases: dict[str, tuple[int, ...]] = {"shared": (CHANNELS,), "per head": (COUNT, CHANNELS)}
    shapes: list[Any] = [(samples, CHANNELS, *size), (COUNT, CHANNELS, 1, *kernel), biases.get(bias)]
    x, own, bias_of = [None if s is None else torch.randn(s, generator=generator) for s in shapes]
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    return geometry, own[0], [x.requires_grad_(), own.requires_grad_(), bias_of]


def literally(geometry: Geometry, x: Tensor, own: Tensor, bias: Tensor | None) -> Tensor:
    biases = itertools.repeat(bias) if bias is None or bias.dim() == 1 else bias
    parts = zip(x.chunk(COUNT), own, biases, strict=False)
    return torch.cat([geometry.convolve(*of_head) for of_head in parts])


@pytest.mark.parametrize("bias", ["none", "shared", "per head"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", LARGE)
def test_large_depthwise_kernels_of_each_head_learn_what_the_formula_says(case: str, last: bool, bias: str) -> None:
    if last and not case.startswith("2d"):
        pytest.skip("channels are last in images")
    geometry, weight, inputs = tensors(case, bias, last)
    if bias != "none":
        inputs[2].requires_grad_()
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    y, expected = convolve_each(geometry, inputs[0], weight, *inputs[1:]), literally(geometry, *exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert not last or y.is_contiguous(memory_format=torch.channels_last)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted, of_exact = ([t for t in each if t is not None] for each in (inputs, exact))
    found = torch.autograd.grad(y, wanted, cotangent, retain_graph=True)
    literal = torch.autograd.grad(expected, of_exact, cotangent.double())
    for one, other in zip(found, literal, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    # Of a weight alone, as where its input wants none, and of many gradients at once.
    (alone,) = torch.autograd.grad(y, wanted[1], cotangent, retain_graph=True)
    torch.testing.assert_close(alone, found[1])
    (many,) = torch.autograd.grad(y, wanted[1], torch.stack([cotangent, 2 * cotangent]), is_grads_batched=True)
    torch.testing.assert_close(many, torch.stack([found[1], 2 * found[1]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["1d", "2d of stride and dilation"])
def test_large_depthwise_kernels_have_second_derivatives(case: str) -> None:
    geometry, weight, inputs = tensors(case, "none")
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    shape = literally(geometry, *inputs).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def twice(y: Tensor, x: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        penalty = sum(g.square().sum() for g in torch.autograd.grad(y, (x, own), cotangent.to(y), create_graph=True))
        return torch.autograd.grad(penalty, (x, own))

    found = twice(convolve_each(geometry, inputs[0], weight, *inputs[1:]), *inputs[:2])
    for one, other in zip(found, twice(literally(geometry, *exact), *exact[:2]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


class _OfWeights(TorchDispatchMode):
    """Counts convolutions' gradients of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.convolution_backward.default:
            self.count += args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch._C._get_mkldnn_enabled(), reason="is about oneDNN")
def test_on_a_cpu_gradients_of_large_depthwise_kernels_are_not_left_to_onednn() -> None:
    """There they took 3 to 20 times as long."""
    geometry, weight, inputs = tensors("2d", "none")
    with _OfWeights() as of_weights:
        convolve_each(geometry, inputs[0], weight, *inputs[1:]).sum().backward()
    assert of_weights.count == 0
