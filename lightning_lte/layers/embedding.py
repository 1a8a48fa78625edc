"""nn.Embedding and its plain subclasses.

A weight (V, d) of V vectors is seen as one matrix, so B_h (V, r) has a row for each index and A_h (r, d) is shared by
all of them:

    y_h = W[i] + s * (B_h[i] A_h - B'_h[i] A'_h)

Rows of B_h start at zero, and that of `padding_idx` stays there, as it gets no gradient.

Only the rows that are looked up are read, of factors and of anchors; of the size of B is its gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.float32 import HALF
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
from lightning_lte.product import (
    PairAndAnchors,
    are_plain,
    as_one,
    backward_of,
    is_batched,
    keep,
    kept_by,
    pairs,
    scaled_gradient,
    without_autocast,
)
from lightning_lte.span import span


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
        if factors is not None and are_plain(input, factors.weight, factors.A):
            with span("heads"):
                own_factors, again = factors.acting_and_anchors(state.head)
                scales = factors.scale, factors.gradient_scale
                return _FactoredEmbedding.apply(input, factors.base(), *own_factors, *scales, own.padding_idx, again)
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


class _FactoredEmbedding(torch.autograd.Function):
    """W[i] + s * (B_h[i] A_h - B'_h[i] A'_h): (*shape, d), for i (*shape) with the indices of the n heads below each
    other. As `product.product` does, it computes no gradient of anchors; autocast leaves it wide, as torch's own."""

    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        anchor_A: Tensor | None,
        anchor_B: Tensor | None,
        scale: float,
        gradient_scale: int,
        padding_idx: int | None,
        again: Callable[[], PairAndAnchors] | None,
    ) -> Tensor:
        ctx.scale, ctx.gradient_scale, ctx.padding_idx = scale, gradient_scale, padding_idx
        keep(ctx, index, None, (A, B, anchor_A, anchor_B), None, again)
        rows = _in_tables(index, B)
        anchored = None if anchor_B is None else _looked_up(rows, anchor_B)
        y = functional.embedding(index, weight)
        of_heads = y.view(*rows.shape, y.shape[-1])
        with without_autocast(y.device.type):
            chosen = pairs(A, _looked_up(rows, B), anchor_A, anchored)
            # In half precision what is added is rounded once. Elsewhere, to put them together takes longer.
            for first, second in [as_one(chosen)] if y.dtype in HALF else chosen:
                of_heads.baddbmm_(second, first, alpha=scale)
        return y

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, _, (A, B, *_), _ = kept_by(ctx)
        _, for_weight, for_A, for_B = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or is_batched(gradient):
            # A derivative of this one has to see where all comes from, and is scaled once more.
            A, B = (scaled_gradient(t, ctx.gradient_scale) for t in (A, B))
        rows, size = _in_tables(index, B), ctx.scale * ctx.gradient_scale
        own = gradient.reshape(*rows.shape, gradient.shape[-1])
        of_weight = of_A = of_B = None
        if for_A:
            of_A = (_looked_up(rows, B) * size).mT @ own
        if for_B:
            of_rows = (own @ A.mT) * size
            if ctx.padding_idx is not None:
                of_rows = of_rows.masked_fill((index == ctx.padding_idx).view(*rows.shape, 1), 0)
            of_B = _scattered(of_rows, rows, B.shape[0] * B.shape[1]).view(B.shape)
        if for_weight:
            padding = -1 if ctx.padding_idx is None else ctx.padding_idx
            of_weight = _scattered(gradient, index, B.shape[1], padding)
        return None, of_weight, of_A, of_B, *(None,) * 6


def _in_tables(index: Tensor, tables: Tensor) -> Tensor:
    """(n, rows): which rows of tables (n, V, .) an index (*shape) names, where the tables lie below each other."""
    count, size = tables.shape[:2]
    own = index.reshape(count, index.numel() // count)
    return own if count == 1 else own + torch.arange(0, count * size, size, device=own.device).unsqueeze(1)


def _looked_up(rows: Tensor, tables: Tensor) -> Tensor:
    """(n, rows, .) of tables (n, V, .)."""
    return functional.embedding(rows, tables.reshape(-1, tables.shape[-1]))


def _scattered(gradient: Tensor, index: Tensor, size: int, padding_idx: int = -1) -> Tensor:
    """The gradient (size, .) of a table from that of what was looked up."""
    whole: Tensor = torch.ops.aten.embedding_dense_backward(gradient, index, size, padding_idx, False)
    return whole
