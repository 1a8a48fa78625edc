"""nn.Conv1d, nn.Conv2d, nn.Conv3d and their plain subclasses.

A weight (out, in / g, *k) of g groups is seen as g matrices (out / g, in / g * k). Factored, A_h is a convolution of
the same kernel, stride, padding and dilation into g * r channels, and B_h one of kernel 1 from there:

    y_h = conv(x_h; W) + s * conv1(conv(x_h; A_h); B_h) - s * conv1(conv(x_h; A'_h); B'_h) + b_h

All local heads run in one convolution with n * g groups, in which head h has the channels from h * in on. Where the
kernel's patches don't overlap, they are the rows of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.heads import Matrices
from lightning_lte.layers.base import (
    HeadedLayer,
    acting_state,
    add_per_head,
    check_not_split,
    check_slices,
    computes_as,
)
from lightning_lte.layers.linear import project

_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


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
            return super().forward(input)
        own: Any = self
        bias: Tensor | None = own.bias
        n, kernel = state.count, own.kernel_size
        own_bias, own_weight = state.stack("bias"), state.stack("weight")
        if state.head is None:
            check_slices(self, input, n, dims=len(kernel) + 2)
        if own_bias is not None:
            bias = None
        factors = state.factors.get("weight")
        added = bias if own_bias is None else own_bias
        # Several heads in one convolution with as many groups are slow, in plain operations as well.
        if factors is not None and _takes_patches(own, input) and (n > 1 or factors.applies(input, own.weight, added)):
            y = project(self, _patches(own, input), factors.base().flatten(1), bias, factors, None, own_bias)
            y = y.unflatten(1, _counts(own, input)).movedim(-1, 1)
            return y if _channels_last(input) or _channels_last(own.weight) else y.contiguous()
        if factors is not None:
            A, B = factors.acting(state.head)
            inner = _convolve(own, side_by_side(input, n), A.reshape(-1, own.in_channels // own.groups, *kernel), n)
            # With parts in place of groups, the parts read the same input and have inner channels of their own.
            parts = factors.matrices.count
            B = B.reshape(-1, B.shape[-1], *[1] * len(kernel))
            y = _CONVOLUTIONS[len(kernel)](inner, B, groups=n * parts)
            base = own._conv_forward(input, factors.base(), bias)
            y = torch.add(base, below_each_other(y, n), alpha=factors.scale)
        elif own_weight is not None:
            y = below_each_other(_convolve(own, side_by_side(input, n), own_weight.flatten(0, 1), n), n)
            y = y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(kernel))
        else:
            y = own._conv_forward(input, own.weight, bias)
        return y if own_bias is None else add_per_head(y, own_bias)


def _convolve(layer: Any, x: Tensor, weight: Tensor, count: int) -> Tensor:
    """The layer's convolution with another weight, for `count` heads side by side in the channels."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    convolution = _CONVOLUTIONS[len(layer.kernel_size)]
    y: Tensor = convolution(x, weight, None, layer.stride, padding, layer.dilation, count * layer.groups)
    return y


def _takes_patches(layer: Any, x: Tensor) -> bool:
    """Whether a convolution is a linear layer of patches that don't overlap, as those that embed images are.

    As a convolution with n times as many groups, n heads would be slow, as a linear layer they are not.
    """
    return (
        x.dim() == len(layer.kernel_size) + 2
        and layer.kernel_size == layer.stride
        and layer.groups == 1
        and layer.padding in ("valid", (0,) * len(layer.kernel_size))
        and set(layer.dilation) == {1}
    )


def _counts(layer: Any, x: Tensor) -> list[int]:
    """How many patches there are in each direction."""
    return [size // kernel for size, kernel in zip(x.shape[2:], layer.kernel_size, strict=True)]


def _patches(layer: Any, x: Tensor) -> Tensor:
    """The patches of all samples, flat: (batch, patches, in * k)."""
    dims = len(layer.kernel_size)
    for dim, (number, kernel) in enumerate(zip(_counts(layer, x), layer.kernel_size, strict=True)):
        x = x.narrow(2 + 2 * dim, 0, number * kernel).unflatten(2 + 2 * dim, (number, kernel))
    places, inside = [2 + 2 * d for d in range(dims)], [3 + 2 * d for d in range(dims)]
    return x.permute(0, *places, 1, *inside).flatten(1 + dims).flatten(1, dims)


def _channels_last(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)


def side_by_side(x: Tensor, count: int) -> Tensor:
    """(n * b, channels, *size) as (b, n * channels, *size): the heads' samples next to each other in the channels."""
    return x if count == 1 else x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)


def below_each_other(y: Tensor, count: int) -> Tensor:
    """The inverse of `side_by_side`."""
    return y if count == 1 else y.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)
