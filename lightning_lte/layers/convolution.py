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

from lightning_lte.product import applies, backward_of, cast, is_batched

_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
# Which kernel torch takes for a convolution, and those in three dimensions that take twice as long as oneDNN's.
_chosen = torch._C._select_conv_backend
_kernels: Any = torch._C._ConvBackend  # type: ignore[attr-defined]
_SLOW = _kernels.Slow3d, _kernels.SlowDilated3d, _kernels.SlowTranspose3d
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

    def is_slow(self, x: Tensor, weight: Tensor) -> bool:
        """Whether torch takes a kernel of its own on a CPU that is slow: in three dimensions, for one small sample."""
        # Under autocast x has fewer bits than the weight, which comes later.
        return len(self.stride) == 3 and _chosen(x, torch.empty_like(weight, dtype=x.dtype), None, *self) in _SLOW

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


def convolve_each(geometry: Geometry, x: Tensor, weight: Tensor, own: Tensor, bias: Tensor | None) -> Tensor:
    """The convolutions of n heads with a weight each, below each other: (batch, out, *size).

    Args:
        geometry: of one head.
        x: (batch, in, *size).
        weight: the user's, whose memory format counts.
        own: (n, *shape) in place of the weight.
        bias: (out,), or (n, out) with one for each head, or None.
    """
    count = len(own)
    biases = None if bias is None else bias.expand(count, -1)
    if x.device.type != "cpu":
        weights = in_format_of(weight, own.flatten(0, 1))
        whole = convolve(geometry, x, weights, None if biases is None else biases.flatten(), count)
        return below_each_other(whole, count)
    if x.dim() != weight.dim() or not applies(x, own, biases):
        return _one_by_one(geometry, x, own, biases, channels_last(weight))
    x, own, biases = cast(x), cast(own), cast(biases)
    y: Tensor = _EachConvolution.apply(x, own, biases, geometry, channels_last(weight))
    return y


def _one_by_one(geometry: Geometry, x: Tensor, own: Tensor, biases: Tensor | None, last: bool) -> Tensor:
    """What `convolve_each` computes, one head after the other."""
    each = zip(x.chunk(len(own)), own, [None] * len(own) if biases is None else biases, strict=True)
    return torch.cat([geometry.convolve(part, _formatted(of_head, last), bias) for part, of_head, bias in each])


def _keep(ctx: Any, x: Tensor, weight: Tensor) -> None:
    """Keep what the backward reads of the two arguments that come first."""
    for_x, for_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x or for_weight else None)
    ctx.laid_out = x.shape, x.stride()
    ctx.set_materialize_grads(False)


def _kept_by(ctx: Any) -> tuple[Any, Any]:
    """What `_keep` kept: an x of which nothing but the shape is read is laid out as it was, and empty."""
    x, weight = ctx.saved_tensors
    if x is None and ctx.needs_input_grad[0]:
        x = weight.new_empty_strided(*ctx.laid_out)
    return x, weight


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, count: int) -> Tensor:
        ctx.geometry, ctx.count = geometry, count
        _keep(ctx, x, weight)
        return geometry.convolve(side_by_side(x, count), weight, bias)

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        x, weight = _kept_by(ctx)
        x = x if x is None else side_by_side(x, ctx.count)
        of_x, of_weight = ctx.geometry.backward(gradient, x, weight, for_x, for_weight)
        of_x = of_x if of_x is None else below_each_other(of_x, ctx.count)
        of_bias = gradient_of_bias(gradient) if for_bias else None
        return of_x, of_weight, of_bias, None, None


class _EachConvolution(torch.autograd.Function):
    """One head after the other, as torch's gradient of depthwise weights takes many times as long on a CPU with the
    channels of all heads together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, biases: Tensor | None, geometry: Geometry, last: bool) -> Tensor:
        ctx.geometry, ctx.last, ctx.count = geometry, last, len(own)
        _keep(ctx, x, own)
        return _one_by_one(geometry, x, own, biases, last)

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_own, for_biases = ctx.needs_input_grad[:3]
        geometry: Geometry = ctx.geometry
        x, own = _kept_by(ctx)
        of_x = of_own = of_biases = None
        if for_biases:
            of_biases = torch.stack([gradient_of_bias(part) for part in gradient.chunk(ctx.count)])
        if for_own and _is_large_and_depthwise(geometry, x, own) and not is_batched(gradient):
            of_own, for_own = _depthwise(geometry, gradient, x, own), False
        if for_x or for_own:
            weights = [_formatted(each, ctx.last) for each in own]
            parts = zip(gradient.chunk(ctx.count), x.chunk(ctx.count), weights, strict=True)
            found = [geometry.backward(*of_head, for_x, for_own) for of_head in parts]
            of_x = torch.cat([part for part, _ in found]) if for_x else None
            of_own = torch.stack([part for _, part in found]) if for_own else of_own
        return of_x, of_own, of_biases, None, None


def _is_large_and_depthwise(geometry: Geometry, x: Tensor, own: Tensor) -> bool:
    """Whether these are depthwise weights whose gradient oneDNN is slow at: for large ones it has no kernel of its own,
    and pads each to 16 times 16 channels."""
    return (
        not geometry.transposed
        and geometry.groups == x.shape[1] == own.shape[1]
        and max(own.shape[3:]) > 4
        and x.dtype == torch.float32
        and torch._C._get_mkldnn_enabled()
    )


def _depthwise(geometry: Geometry, gradient: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """The gradient of depthwise weights, (n, channels, 1, *kernel).

    Place i of a kernel gets the sum over p of x[stride p + dilation i - padding] gradient[p], of each sample and
    channel. That is a depthwise convolution, too: the gradient is the kernel, and stride and dilation change places.
    """
    samples = x.reshape(1, -1, *x.shape[2:])
    kernels = gradient.reshape(-1, 1, *gradient.shape[2:])
    swapped = geometry._replace(stride=geometry.dilation, dilation=geometry.stride, groups=len(kernels))
    found = swapped.convolve(samples, kernels, None)
    for dim, size in enumerate(own.shape[3:], start=2):
        found = found.narrow(dim, 0, size)
    return found.reshape(len(own), -1, *own.shape[1:]).sum(1)


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
    return _formatted(tensor, channels_last(other))


def _formatted(tensor: Tensor, last: bool) -> Tensor:
    return tensor.contiguous(memory_format=_FORMATS[tensor.dim()] if last else torch.contiguous_format)


def _is_channels_last(tensor: Tensor) -> bool:
    last = _FORMATS.get(tensor.dim())
    if last is None or tensor.is_contiguous():
        return False
    # Batched tensors don't tell.
    told = torch.compiler.is_compiling() or not is_batched(tensor)
    return told and tensor.is_contiguous(memory_format=last)
