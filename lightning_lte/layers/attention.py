"""nn.MultiheadAttention, and with it nn.TransformerEncoderLayer and nn.TransformerDecoderLayer.

Its projections are factored as those of nn.Linear are, the packed one as three matrices, for queries, keys and values:

    q_h = W_q x_h + s * (B_qh A_qh - B'_qh A'_qh) x_h + b_qh,    and so on for k_h, v_h and the output.

torch's own forward takes whole weights only, and a whole weight for each head is what heads are to save. So the
attention between the projections is written out here, with what torch does in the places where it matters: masks are
added, `bias_k` and `bias_v` come before the zeros of `add_zero_attn`, and dropout acts on the weights.
("Heads" here are those of LTE; the attention's own are called `num_heads`.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.heads import Matrices
from lightning_lte.layers.base import (
    HeadedLayer,
    LayerState,
    acting_state,
    check_not_split,
    check_slices,
    computes_as,
    without_heads,
)
from lightning_lte.layers.linear import project

_PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OWN = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", *_PARTS)


class HeadedMultiheadAttention(HeadedLayer):
    """An attention with heads."""

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        return (
            computes_as(layer, nn.MultiheadAttention)
            # Pruning and parametrizations take parameters out and put tensors in their place.
            and all(name in layer._parameters or getattr(layer, name) is None for name in _OWN)
            and computes_as(layer.out_proj, nn.Linear)  # type: ignore[arg-type]
        )

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        if "weight" not in key:
            return "a bias"
        check_not_split(layer, parts, "whose packed projection is split by itself")
        return Matrices.of(layer.get_parameter(key), 3 if key == "in_proj_weight" else 1)

    def least_dims(self) -> int:
        return 3

    def of_the_batch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        own_mask = attn_mask if attn_mask is not None and attn_mask.dim() == 3 else None
        return tuple(x for x in (query, key, value, key_padding_mask, own_mask) if x is not None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        state = acting_state(self)
        if state is None:
            choices = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            plain: tuple[Tensor, Tensor | None] = without_heads(
                HeadedMultiheadAttention, self, query, key, value, *choices
            )
            return plain
        own: Any = self
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "is_causal=True says that attn_mask is causal; received attn_mask=None. Give the mask, as"
                " nn.MultiheadAttention needs it without heads, too, or is_causal=False."
            )
        alike = query is key and key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not own.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if state.head is None:
            check_slices(self, query, state.count, dims=3)

        inputs = (query,) if alike and own.in_proj_weight is not None else (query, key, value)
        q, k, v = _projections(own, state, *inputs)  # (batch, length, embed_dim)
        # As torch does: what is said to be causal is not looked at, unless weights or padding need it.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _mask(own, q, k, attn_mask, key_padding_mask)
        if own.bias_k is not None:
            k = torch.cat([k, _bias_row(state, own, "bias_k", k)], dim=1)
            v = torch.cat([v, _bias_row(state, own, "bias_v", v)], dim=1)
        q, k, v = (x.unflatten(-1, (own.num_heads, own.head_dim)).transpose(1, 2) for x in (q, k, v))
        if own.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))

        dropout = own.dropout if own.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = (q / math.sqrt(own.head_dim)) @ k.mT
            weights = (weights if mask is None else weights + mask).softmax(-1)
            weights = functional.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2).flatten(2)
        factors = state.factors.get("out_proj.weight")
        weight = own.out_proj.weight if factors is None else factors.base()
        own_weight, own_bias = state.stack("out_proj.weight"), state.stack("out_proj.bias")
        y = project(self, y, weight, own.out_proj.bias, factors, own_weight, own_bias)

        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if own.batch_first else y.transpose(0, 1)), weights


def _projections(layer: Any, state: LayerState, *inputs: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values, (batch, length, embed_dim) each; of a packed projection also from one input for all."""
    if len(inputs) == 1:
        factors = state.factors.get("in_proj_weight")
        weight = layer.in_proj_weight if factors is None else factors.base()
        own = state.stack("in_proj_weight"), state.stack("in_proj_bias")
        return project(layer, inputs[0], weight, layer.in_proj_bias, factors, *own).chunk(3, -1)
    biases, own_biases = _chunks(layer.in_proj_bias, 0), _chunks(state.stack("in_proj_bias"), 1)
    packed = layer.in_proj_weight is not None
    keys = ("in_proj_weight",) * 3 if packed else _PARTS
    all_factors = [state.factors.get(key) for key in keys]
    if packed:
        first = all_factors[0]
        weights = _chunks(layer.in_proj_weight if first is None else first.base(), 0)
        own_weights = _chunks(state.stack("in_proj_weight"), 1)
    else:
        weights = [getattr(layer, key) if f is None else f.base() for key, f in zip(keys, all_factors, strict=True)]
        own_weights = [state.stack(key) for key in keys]
    return [
        project(layer, x, weight, bias, factors, own_weight, own_bias, i if packed else None)
        for i, (x, weight, bias, factors, own_weight, own_bias) in enumerate(
            zip(inputs, weights, biases, all_factors, own_weights, own_biases, strict=True)
        )
    ]


def _chunks(packed: Tensor | None, dim: int) -> Sequence[Any]:
    return (None, None, None) if packed is None else packed.chunk(3, dim)


def _mask(layer: Any, q: Tensor, k: Tensor, attn: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Both masks as one to be added: (batch or 1, num_heads or 1, length of q or 1, length of k and what follows)."""
    mask = None
    if attn is not None:
        mask = _additive(attn, q.dtype)
        mask = mask.view(1, 1, *mask.shape) if mask.dim() == 2 else mask.unflatten(0, (-1, layer.num_heads))
    if padding is not None:
        rows = _additive(padding, q.dtype).view(k.shape[0], 1, 1, -1)
        mask = rows if mask is None else mask + rows
    added = (layer.bias_k is not None) + layer.add_zero_attn
    return mask if mask is None else functional.pad(mask, (0, added))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _bias_row(state: LayerState, layer: Any, name: str, like: Tensor) -> Tensor:
    """bias_k or bias_v for every sample: (batch, 1, embed_dim)."""
    shared: Tensor = getattr(layer, name)
    own = state.stack(name)
    if own is not None:
        rows = own.flatten(1).unsqueeze(1)  # (n, 1, embed_dim)
        return rows.repeat_interleave(like.shape[0] // state.count, dim=0).to(like.dtype)
    return shared.expand(like.shape[0], 1, -1).to(like.dtype)
