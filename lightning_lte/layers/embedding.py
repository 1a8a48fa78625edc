"""nn.Embedding and its plain subclasses.

A weight (V, d) of V vectors is seen as one matrix, so B_h (V, r) has a row for each index and A_h (r, d) is shared by
all of them:

    y_h = W[i] + s * (B_h[i] A_h - B'_h[i] A'_h)

Rows of B_h start at zero, and that of `padding_idx` stays there, as it gets no gradient.
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
    check_not_split,
    check_slices,
    computes_as,
    in_shape,
    without_heads,
)


class HeadedEmbedding(HeadedLayer):
    """An embedding with heads."""

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        return computes_as(layer, nn.Embedding)

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        check_not_split(layer, parts, "which is no projection")
        own: Any = layer
        if own.max_norm is not None:
            return "max_norm rewrites it in every forward"
        if own.sparse:
            return "its gradients are sparse"
        if own.scale_grad_by_freq:
            return "scale_grad_by_freq scales the gradient of each of its rows"
        return Matrices.of(own.weight)

    def least_dims(self) -> int:
        return 1

    def forward(self, input: Tensor) -> Tensor:
        state = acting_state(self)
        if state is None:
            y: Tensor = without_heads(HeadedEmbedding, self, input)
            return y
        own: Any = self
        if state.head is None:
            check_slices(self, input, state.count, dims=1)
        own_weight = state.stack("weight")
        factors = state.factors.get("weight")
        if factors is None and own_weight is None:
            return super().forward(input)
        index = input.reshape(state.count, input.numel() // state.count)
        if factors is None:
            assert own_weight is not None
            y = _rows(own, index, own_weight)
        else:
            A, B = factors.acting(state.head)
            y = functional.embedding(index, factors.base(), own.padding_idx)
            # Autocast would narrow a product that began with y, which it leaves wide.
            y = torch.add(y, torch.bmm(_rows(own, index, B), A).to(y.dtype), alpha=factors.scale)
        return in_shape(y, *input.shape, y.shape[-1])


def _rows(layer: Any, index: Tensor, tables: Tensor) -> Tensor:
    """Look up index (n, rows) in tables (n, V, .), each head in its own: (n, rows, .)."""
    looked_up = [
        functional.embedding(i, table, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq)
        for i, table in zip(index, tables, strict=True)
    ]
    return torch.stack(looked_up)
