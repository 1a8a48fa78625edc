"""What plain and transposed convolutions with heads share: memory formats, all heads in one convolution, and a gradient
that keeps no more than it needs.

torch's own convolution keeps its input for the backward whether or not its weight wants a gradient. That of W, which
wants none, keeps W alone here. And the convolution of all heads reads a copy of the input, which is made once more for
the backward in place of keeping it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightning_lte.product import applies, cast, is_batched

_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
# Channels last, by the dimensions of a tensor.
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """All of a convolution but its weight, in the order of torch's own operation. One number for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: Any, padding: Any, output_padding: Any = 0) -> Geometry:
        """That of a layer, some of whose attributes users may have set to a number for all dimensions."""
        dims = len(layer.kernel_size)

        def sizes(own: Any) -> tuple[int, ...]:
            return (own,) * dims if isinstance(own, int) else tuple(own)

        stride, dilation = sizes(layer.stride), sizes(layer.dilation)
        return cls(stride, sizes(padding), dilation, layer.transposed, sizes(output_padding), layer.groups)

    @classmethod
    def pointwise(cls, dims: int, groups: int) -> Geometry:
        """That of kernel 1."""
        return cls((1,) * dims, (0,) * dims, (1,) * dims, False, (0,) * dims, groups)

    def of_heads(self, count: int) -> Geometry:
        """That of `count` heads side by side in the channels."""
        return self._replace(groups=count * self.groups)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's own operation."""
        stride, padding, dilation, transposed, output_padding, groups = self
        if transposed:
            y = _TRANSPOSED[len(stride)](x, weight, bias, stride, padding, output_padding, groups, dilation)
        else:
            y = _CONVOLUTIONS[len(stride)](x, weight, bias, stride, padding, dilation, groups)
        return y

    def backward(
        self, gradient: Tensor, x: Tensor | None, weight: Tensor | None, for_x: bool, for_weight: bool
    ) -> tuple[Any, Any]:
        """The gradients of x and of the weight, or None for one that is not wanted. Each reads the values of the other,
        and its own shape alone."""
        if not (for_x or for_weight):
            return None, None
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *self, [for_x, for_weight, False]
        )
        return of_x, of_weight

    def size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """How many places an output has in each direction, of a convolution that is not transposed."""
        each = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(s + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for s, k, stride, padding, dilation in each]


def convolve(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None = None, count: int = 1) -> Tensor:
    """The convolution of `count` heads side by side: (batch / n, n * out, *size).

    For its backward it keeps x, as it is, where the weight wants a gradient, and the weight where x wants one.

    Args:
        geometry: of one head.
        x: (batch, in, *size), the heads' samples below each other.
        weight: (n * out, in / groups, *kernel), or (n * in, out / groups, *kernel) of a transposed one.
        bias: (n * out,) or None.
        count: n.
    """
    geometry = geometry.of_heads(count)
    if x.dim() != weight.dim() or not applies(x, weight, bias):
        return geometry.convolve(side_by_side(x, count), weight, bias)
    y: Tensor = _Convolution.apply(cast(x), cast(weight), cast(bias), geometry, count)
    return y


def convolve_each(geometry: Geometry, x: Tensor, weight: Tensor, own: Tensor) -> Tensor:
    """The convolutions of n heads with a weight each, below each other: (batch, out, *size).

    Args:
        geometry: of one head.
        x: (batch, in, *size).
        weight: the user's, whose memory format counts.
        own: (n, *shape) in place of the weight.
    """
    if x.device.type == "cpu":
        # torch's gradient of depthwise weights takes many times as long there with the channels of all heads together.
        pairs = zip(x.chunk(len(own)), own, strict=True)
        return torch.cat([convolve(geometry, part, in_format_of(weight, each)) for part, each in pairs])
    weights = in_format_of(weight, own.flatten(0, 1))
    return below_each_other(convolve(geometry, x, weights, count=len(own)), len(own))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, count: int) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad[:3]
        ctx.geometry, ctx.count, ctx.laid_out = geometry, count, (x.shape, x.stride())
        ctx.save_for_backward(x if for_weight else None, weight if for_x or for_weight else None)
        ctx.set_materialize_grads(False)
        return geometry.convolve(side_by_side(x, count), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # from functions that stop gradients
            return (None,) * 5
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        x, weight = ctx.saved_tensors
        if x is None and for_x:
            x = weight.new_empty_strided(*ctx.laid_out)  # where nothing is, as its gradient reads its shape alone
        x = x if x is None else side_by_side(x, ctx.count)
        of_x, of_weight = ctx.geometry.backward(gradient, x, weight, for_x, for_weight)
        of_x = of_x if of_x is None else below_each_other(of_x, ctx.count)
        of_bias = gradient_of_bias(gradient) if for_bias else None
        return of_x, of_weight, of_bias, None, None


def gradient_of_bias(gradient: Tensor) -> Tensor:
    """(out,). torch's operation would compute the gradient of the weight for it, too, on CPUs."""
    return gradient.sum([0, *range(2, gradient.dim())])


def side_by_side(x: Tensor, count: int) -> Tensor:
    """(n * b, channels, *size) as (b, n * channels, *size): the heads' samples next to each other in the channels.

    Channels last stay so, in this and in its gradient.
    """
    if count == 1:
        return x
    if channels_last(x):
        return x.movedim(1, -1).unflatten(0, (count, -1)).movedim(0, -2).flatten(-2).movedim(-1, 1)
    return x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)


def below_each_other(y: Tensor, count: int) -> Tensor:
    """The inverse of `side_by_side`, in the same way."""
    if count == 1:
        return y
    if channels_last(y):
        return y.movedim(1, -1).unflatten(-1, (count, -1)).movedim(-2, 0).flatten(0, 1).movedim(-1, 1)
    # Not by unflatten and flatten, which batched gradients don't have.
    y = y.reshape(len(y), count, -1, *y.shape[2:]).transpose(0, 1)
    return y.reshape(-1, *y.shape[2:])


def channels_last(*tensors: Tensor) -> bool:
    """Whether any of an input and a weight is, so that torch computes so."""
    return any(_is_channels_last(t) for t in tensors)


def in_format_of(other: Tensor, tensor: Tensor) -> Tensor:
    """A tensor in the memory format of another."""
    last = channels_last(other)
    return tensor.contiguous(memory_format=_FORMATS[tensor.dim()] if last else torch.contiguous_format)


def _is_channels_last(tensor: Tensor) -> bool:
    last = _FORMATS.get(tensor.dim())
    if last is None or tensor.is_contiguous():
        return False
    # Batched tensors don't tell.
    told = torch.compiler.is_compiling() or not is_batched(tensor)
    return told and tensor.is_contiguous(memory_format=last)
