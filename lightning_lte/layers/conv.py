"""nn.Conv1d, nn.Conv2d, nn.Conv3d and their plain subclasses.

A weight (out, in / g, *k) of g groups is seen as g matrices (out / g, in / g * k). Factored, A_h is a convolution of
the same kernel, stride, padding and dilation into g * r channels, and B_h one of kernel 1 from there:

    y_h = conv(x_h; W) + s * conv1(conv(x_h; A_h); B_h) - s * conv1(conv(x_h; A'_h); B'_h) + b_h

All local heads run in one convolution with n * g groups, in which head h has the channels from h * in on, or each in
one with its effective weight: see `factored_convolution.py`. Where the kernel's patches don't overlap, they can be
the rows of a linear layer.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.heads import Factors, Matrices
from lightning_lte.layers.base import (
    HeadedLayer,
    acting_state,
    check_not_split,
    check_slices,
    computes_as,
    without_heads,
)
from lightning_lte.layers.convolution import Geometry, channels_last
from lightning_lte.layers.factored_convolution import convolved
from lightning_lte.layers.linear import project
from lightning_lte.product import folds


class HeadedConv(HeadedLayer):
    """A convolution with heads."""

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        return computes_as(layer, nn.Conv1d, nn.Conv2d, nn.Conv3d, methods=("forward", "_conv_forward"))

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        if key != "weight":
            return "a bias"
        own: Any = layer
        if own.groups > 1:
            check_not_split(layer, parts, "which has factors for each of its groups")
        return Matrices.of(own.weight, max(parts, own.groups))

    def least_dims(self) -> int:
        return len(self.kernel_size) + 2  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        state = acting_state(self)
        if state is None:
            y: Tensor = without_heads(HeadedConv, self, input)
            return y
        own: Any = self
        n, kernel = state.count, own.kernel_size
        if state.head is None:
            check_slices(self, input, n, dims=len(kernel) + 2)
        factors, own_bias = state.factors.get("weight"), state.stack("bias")
        if factors is not None and _takes_patches(own, input, n, factors, own.bias if own_bias is None else own_bias):
            last = channels_last(input, own.weight)
            weight = factors.base().flatten(1)
            y = project(self, _patches(own, input, last), weight, own.bias, factors, None, own_bias)
            y = y.unflatten(1, _counts(own, input)).movedim(-1, 1)
            return y if last else y.contiguous()
        x, padding = _padded(own, input)
        return convolved(self, state, Geometry.of(own, padding), x)


def _padded(layer: Any, x: Tensor) -> tuple[Tensor, Any]:
    """The input with what the layer pads it with, and how many zeros its convolution is to pad it with by itself."""
    sides = layer._reversed_padding_repeated_twice  # from the last dimension on
    if layer.padding_mode != "zeros":
        return functional.pad(x, sides, mode=layer.padding_mode), 0
    if layer.padding != "same":
        return x, 0 if layer.padding == "valid" else layer.padding
    return (x, sides[::-2]) if sides[::2] == sides[1::2] else (functional.pad(x, sides), 0)


def _takes_patches(layer: Any, x: Tensor, count: int, factors: Factors, bias: Tensor | None) -> bool:
    """Whether a convolution is a linear layer of patches that don't overlap, as those that embed images are.

    As a convolution with n times as many groups, n heads would be slow, in plain operations as well; as a linear layer
    they are not. But on a CPU to lay out patches takes time, and what is laid out would be kept beside the input. With
    the channels last, patches of one place are laid out already. Of larger ones there may be so many that a convolution
    for each head, with its effective weight, takes less.
    """
    if not (
        x.dim() == len(layer.kernel_size) + 2
        and layer.kernel_size == layer.stride
        and layer.groups == 1
        and layer.padding in ("valid", (0,) * len(layer.kernel_size))
        and set(layer.dilation) == {1}
    ):
        return False
    applies = factors.applies(x, layer.weight, bias)
    if x.device.type == "cpu" and math.prod(layer.kernel_size) == 1:
        return channels_last(x) and (count > 1 or applies)
    if x.device.type == "cpu" and applies:
        # What a call takes by itself is not in the count of rows that decides, so they are counted once more per head.
        m, rows = factors.matrices, len(x) // count * math.prod(_counts(layer, x))
        return not folds(rows // count, m.out_features, m.in_features, layer.weight.dtype, factors.anchor_B is not None)
    return count > 1 or applies


def _counts(layer: Any, x: Tensor) -> list[int]:
    """How many patches there are in each direction."""
    return [size // kernel for size, kernel in zip(x.shape[2:], layer.kernel_size, strict=True)]


def _patches(layer: Any, x: Tensor, last: bool) -> Tensor:
    """The patches of all samples, flat: (batch, patches, in * k).

    Args:
        layer: whose they are.
        x: its input.
        last: whether x is taken apart, and so its gradient laid out, with the channels last.
    """
    dims, counts, first = len(layer.kernel_size), _counts(layer, x), 1 if last else 2
    x = x.movedim(1, -1) if last else x
    for dim, number, kernel in zip(range(first, first + 2 * dims, 2), counts, layer.kernel_size, strict=True):
        if x.shape[dim] != number * kernel:
            x = x.narrow(dim, 0, number * kernel)
        x = x.unflatten(dim, (number, kernel))
    places, inside = range(first, first + 2 * dims, 2), range(first + 1, first + 2 * dims, 2)
    return x.permute(0, *places, -1 if last else 1, *inside).flatten(1 + dims).flatten(1, dims)
