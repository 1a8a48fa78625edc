"""The product of an input with one weight and the factors of its heads, and its gradient.

Autograd would find the same gradient from plain operations, and do more than is needed: it computes gradients for
anchors, too, which nobody asks for, and adds up copies of factors. Per weight (out m, in n) and token, in multiply-adds
forward and backward, the product below takes 2 m n + 5 r (m + n), or 3 r (m + n) without anchors; plain operations take
r (m + n) more with anchors. With many tokens per head it is cheaper to make each head's effective weight first, and
throw it away again: 2 m n + 2 r (m + n) and, for all tokens of a head together, 4 r m n, or half of it without anchors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    anchor_A: Tensor | None,
    anchor_B: Tensor | None,
    scale: float,
) -> Tensor:
    """y_h = W x_h + s * (B_h A_h - B'_h A'_h) x_h + b_h: (n, rows, out). Straight after a merge exactly W x_h + b_h.

    Args:
        x: (n, rows, in).
        weight: W, (out, in). It gets a gradient if it wants one.
        bias: (out,), or (n, out) with one for each head, or None.
        A: (n, rank, in).
        B: (n, out, rank).
        anchor_A, anchor_B: as A and B; None for none. They get no gradient.
        scale: s.
    """
    y: Tensor = _Product.apply(x, weight, bias, A, B, anchor_A, anchor_B, scale)
    return y


def applies(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor) -> bool:
    """Whether `product` may be used here, and not plain operations have to be.

    It is for plain tensors of one dtype in full precision: half precision would round a head's effective weight to
    nothing but W. Autocast, torch.compile, transforms of torch.func and forward-mode derivatives look into operations.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype in (torch.float32, torch.float64)
        and all(t is None or t.dtype == x.dtype for t in (weight, bias, A))
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, weight, A))
    )


def stacked(A: Tensor, B: Tensor, anchor_A: Tensor | None, anchor_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """[A - A'; A'] and [B, B - B'], whose product is B A - B' A'; A and B where there are no anchors, and A and B - B'
    where B alone has one.

    Differences are taken before products: straight after a merge the product is exactly zero, and small deltas don't
    drown in the rounding of B A.
    """
    if anchor_B is None:
        return A, B
    if anchor_A is None:
        return A, B - anchor_B
    return torch.cat([A - anchor_A, anchor_A], dim=-2), torch.cat([B, B - anchor_B], dim=-1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        anchor_A: Tensor | None,
        anchor_B: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.scale, ctx.folds = scale, _folds(x, weight)
        per_head = bias is not None and bias.dim() == 2
        inner: Tensor | None = None
        if ctx.folds:
            effective = _effective(weight, A, B, anchor_A, anchor_B, scale).mT
            y = torch.bmm(x, effective) if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, effective)
        else:
            if per_head:
                assert bias is not None
                y = bias.unsqueeze(1).repeat(1, x.shape[1], 1)
                y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.mT)
            else:
                y = functional.linear(x, weight, bias)
            first, second = _written(A, B, anchor_A, anchor_B)
            inner = torch.bmm(x, first.mT)
            y.baddbmm_(inner, second.mT, alpha=scale)
            if anchor_A is not None:
                inner = inner[..., : A.shape[1]] + inner[..., A.shape[1] :]  # x A^T
        ctx.per_head = per_head
        # As a plain layer, whose W may be written to meanwhile if its input wants no gradient.
        kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, A, B, anchor_A, anchor_B, inner)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # from functions that stop gradients
            return (None,) * 8
        x, weight, A, B, anchor_A, anchor_B, inner = ctx.saved_tensors
        for_x, for_weight, for_bias, for_A, for_B = ctx.needs_input_grad[:5]
        scale: float = ctx.scale
        of_x = of_weight = of_bias = of_A = of_B = None
        learning: Tensor | None = None
        if for_x and ctx.folds:
            of_x = torch.bmm(gradient, _effective(weight, A, B, anchor_A, anchor_B, scale))
        elif for_x:
            # Stacked again, and not kept: of many heads that is more than all else a backward needs.
            stack = stacked if torch.is_grad_enabled() else _written
            first, second = stack(A, B, anchor_A, anchor_B)
            both = torch.bmm(gradient, second) * scale
            of_x = torch.matmul(gradient, weight).baddbmm_(both, first)
            learning = both[..., : A.shape[1]]  # s * gradient B
        if for_A and learning is None:
            learning = torch.bmm(gradient, B) * scale
        if for_weight:
            of_weight = gradient.flatten(0, 1).mT @ x.flatten(0, 1)
        if for_bias:
            of_bias = gradient.sum(1 if ctx.per_head else (0, 1))
        if for_A:
            assert learning is not None
            of_A = torch.bmm(learning.mT, x)
        if for_B:
            # A derivative of this one has to see where it comes from.
            if inner is None or torch.is_grad_enabled():
                inner = torch.bmm(x, A.mT)
            of_B = torch.bmm(gradient.mT, inner * scale)
        return of_x, of_weight, of_bias, of_A, of_B, None, None, None


def _folds(x: Tensor, weight: Tensor) -> bool:
    """Whether a head has so many rows that its effective weight pays.

    By the count of multiply-adds it does from 4/3 m n / (m + n) rows on, or 2 m n / (m + n) without anchors. On a CPU
    both took the same time at about m n / (m + n) rows with one head, and at nearly twice as many with several.
    """
    out_features, in_features = weight.shape
    return x.shape[1] * (out_features + in_features) >= 2 * out_features * in_features


def _effective(
    weight: Tensor, A: Tensor, B: Tensor, anchor_A: Tensor | None, anchor_B: Tensor | None, scale: float
) -> Tensor:
    """W + s * (B A - B' A') of every head: (n, out, in)."""
    first, second = stacked(A, B, anchor_A, anchor_B)
    return torch.baddbmm(weight.expand(A.shape[0], *weight.shape), second, first, alpha=scale)


def _written(A: Tensor, B: Tensor, anchor_A: Tensor | None, anchor_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `stacked` returns, written in place once: it is done in every forward, for all heads' factors."""
    if anchor_A is None or anchor_B is None:
        return A, B
    count, rank, in_features = A.shape
    first = A.new_empty(count, 2 * rank, in_features)
    torch.sub(A, anchor_A, out=first[:, :rank])
    first[:, rank:] = anchor_A
    second = B.new_empty(count, B.shape[1], 2 * rank)
    second[:, :, :rank] = B
    torch.sub(B, anchor_B, out=second[:, :, rank:])
    return first, second
