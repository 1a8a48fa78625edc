"""nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d and their plain subclasses.

A weight (in, out / g, *k) of g groups is seen as g matrices (out / g * k, in / g). Factored, A_h is a convolution of
kernel 1 into g * r channels, and B_h a transposed convolution of the layer's own kernel, stride and padding from there:

    y_h = convT(x_h; W) + s * convT(conv1(x_h; A_h); B_h) - s * convT(conv1(x_h; A'_h); B'_h) + b_h
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lightning_lte.heads import Matrices
from lightning_lte.layers.base import (
    HeadedLayer,
    acting_state,
    check_not_split,
    check_slices,
    computes_as,
    without_heads,
)
from lightning_lte.layers.convolution import Geometry
from lightning_lte.layers.factored_convolution import convolved


class HeadedConvTranspose(HeadedLayer):
    """A transposed convolution with heads."""

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        return computes_as(layer, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        if key != "weight":
            return "a bias"
        check_not_split(layer, parts, "whose weight has its inputs outermost")
        weight: Any = layer.weight
        groups: Any = layer.groups
        lead = () if groups == 1 else (groups,)
        return Matrices(math.prod(weight.shape[1:]), weight.shape[0] // groups, lead, transposed=True)

    def least_dims(self) -> int:
        return len(self.kernel_size) + 2  # type: ignore[arg-type]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        state = acting_state(self)
        if state is None:
            y: Tensor = without_heads(HeadedConvTranspose, self, input, output_size)
            return y
        own: Any = self
        kernel = own.kernel_size
        if state.head is None:
            check_slices(self, input, state.count, dims=len(kernel) + 2)
        extra = own._output_padding(input, output_size, own.stride, own.padding, kernel, len(kernel), own.dilation)
        return convolved(self, state, Geometry.of(own, own.padding, extra), input)
