"""Conv1D of Hugging Face's transformers, the linear layer of GPT-2, whose weight is laid out as (in, out).

Factored, y_h = x_h W + s * x_h (B_h A_h - B'_h A'_h)^T + b_h, with A_h (r, in) and B_h (out, r) as in nn.Linear.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lightning_lte.heads import Matrices
from lightning_lte.layers.base import HeadedLayer, acting_state, check_not_split, computes_as, without_heads
from lightning_lte.layers.linear import project


class HeadedConv1D(HeadedLayer):
    """A Conv1D with heads. transformers is not needed: who has such a layer has imported it."""

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        return kind is not None and computes_as(layer, kind)

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        if key != "weight":
            return "a bias"
        check_not_split(layer, parts, "whose weight is laid out as (in, out)")
        inside, out = layer.weight.shape  # type: ignore[misc]
        return Matrices(out, inside, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        state = acting_state(self)
        if state is None:
            y: Tensor = without_heads(HeadedConv1D, self, x)
            return y
        layer: Any = self
        factors, own = state.factors.get("weight"), state.stack("weight")
        weight = layer.weight if factors is None else factors.base()
        return project(self, x, weight.mT, layer.bias, factors, None if own is None else own.mT, state.stack("bias"))
