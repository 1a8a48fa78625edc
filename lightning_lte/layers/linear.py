"""nn.Linear and its plain subclasses.

Factored, y_h = W x_h + s * (B_h A_h - B'_h A'_h) x_h + b_h for the slice x_h of head h. A fused projection that is
split into parts has factors for each part of its rows. Thin layers are not factored: they have a weight for each head,
y_h = W_h x_h + b_h.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.heads import Factors, Matrices
from lightning_lte.layers.base import (
    STATE,
    HeadedLayer,
    LayerState,
    acting_state,
    check_slices,
    computes_as,
    in_shape,
    state_of,
    without_heads,
)


class HeadedLinear(HeadedLayer):
    """A linear layer with heads."""

    multiplies: ClassVar[bool] = True

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        return computes_as(layer, nn.Linear)

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        return Matrices.of(layer.weight, parts) if key == "weight" else "a bias"  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        state = acting_state(self)
        if state is None:
            return HeadedLinear._merged(self, input)  # self may have left its heads: see `without_heads`
        own: Any = self
        factors = state.factors.get("weight")
        if input.is_nested or input.layout != torch.strided:
            return _of_one_head(self, input, factors)
        weight = own.weight if factors is None or factors.rounded is not None else factors.base()
        return project(self, input, weight, own.bias, factors, state.stack("weight"), state.stack("bias"))

    def _merged(self, input: Tensor) -> Tensor:
        """What the layer computes without heads: from the user's own weight, wherever it is."""
        own: Any = self
        state: LayerState | None = self.__dict__.get(STATE)
        factors = None if state is None else state.factors.get("weight")
        rounded = None if factors is None else factors.rounded
        if rounded is None or own._parameters.get("weight") is not rounded.weight:
            y: Tensor = without_heads(HeadedLinear, self, input)
            return y
        weight = rounded.merged() if rounded.released else own.weight.to(input.device)
        return functional.linear(input, weight, own.bias)


def _of_one_head(layer: Any, x: Tensor, factors: Factors | None) -> Tensor:
    """x W^T + s * x (B A - B' A')^T + b of the head that acts alone, for inputs that have no slices: sparse and nested
    ones. It takes plain operations, one after the other, which torch has for these, too.

    Args:
        layer: the layer with heads whose input x is.
        x: (..., in), in any layout.
        factors: of the weight, or None.

    Raises:
        ValueError: all heads act.
    """
    state = state_of(layer)
    if state.head is None:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ValueError(
            f"In batched execution dimension 0 of every layer's input is split evenly over the {state.count} local"
            f" heads, which takes dense tensors; {type(layer).__name__} received a {kind} one. Use"
            " execution='sequential', or one head per device."
        )
    assert factors is not None  # or the layer would compute as its own class does
    A, B = (t[0] for t in factors.acting(state.head))
    if A.dim() == 3:  # parts of a projection, each of which has factors of its own
        A, B = A.flatten(0, 1), torch.block_diag(*B)
    y = functional.linear(functional.linear(x, A), B)
    return functional.linear(x, factors.cast(factors.base()), layer.bias) + factors.scale * y


def project(
    layer: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors | None,
    own_weight: Tensor | None,
    own_bias: Tensor | None,
    part: int | None = None,
) -> Tensor:
    """x (batch, ..., in) W^T + b with the heads that act: (batch, ..., out).

    Args:
        layer: the layer with heads whose input x is.
        x: dimension 0 is the batch while all heads act; else the shape is free.
        weight: (out, in), the user's own, or the base of its factors.
        bias: (out,), the user's own, or None.
        factors: of the weight, or None.
        own_weight: (n, out, in) in place of the weight, or None.
        own_bias: (n, out) in place of the bias, or None.
        part: which of the matrices of `factors` the weight is; None where it is all of them.
    """
    state = state_of(layer)
    added = bias if own_bias is None else own_bias
    if state.head is None:
        check_slices(layer, x, state.count)
    if factors is not None and x.is_contiguous() and factors.applies(x, weight, added, part):
        return factors.multiply(x, weight, added, state.head, part)
    rows = x.reshape(state.count, math.prod(x.shape[:-1]) // state.count, x.shape[-1])
    if factors is not None and factors.applies(rows, weight, added, part):
        y = factors.multiply(rows, weight, added, state.head, part)
        return in_shape(y, *x.shape[:-1], weight.shape[0])
    if own_bias is not None:
        bias = None
    if factors is not None:
        rounded = factors.rounded
        y = functional.linear(rows, factors.cast(weight), bias) if rounded is None else rounded.product(rows, bias)
        y = factors.apply(y, rows, state.head, part)
    elif own_weight is not None:
        y = rows @ own_weight.mT
        y = y if bias is None else y + bias.to(y.dtype)
    else:
        y = functional.linear(rows, weight, bias)
    if own_bias is not None:
        # Under autocast y has fewer bits than the bias, and must not be widened by it.
        y = y + own_bias.unsqueeze(1).to(y.dtype)
    return in_shape(y, *x.shape[:-1], y.shape[-1])
