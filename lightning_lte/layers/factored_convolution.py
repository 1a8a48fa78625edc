"""The convolution of an input with one weight and the factors of its heads, and its gradient.

As in `lightning_lte/product.py`, which is for linear layers, none is computed for anchors. For the backward it keeps
what is there anyway, the input, W, factors and anchors, and beside them A_h x_h alone, which is of the rank's size.
Where heads have many places, each head's effective weight is made for the moment, and no A_h x_h is kept either. Where
it is so small that thin convolutions would take longer, its gradient is made for the moment, too, as there
dA = B^T dW and dB = dW A^T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lte.float32 import HALF
from lightning_lte.heads import Factors, Matrices
from lightning_lte.layers.base import LayerState, add_per_head
from lightning_lte.layers.convolution import (
    Geometry,
    below_each_other,
    convolve,
    convolve_each,
    gradient_of_bias,
    in_format_of,
    side_by_side,
)
from lightning_lte.product import (
    CACHE,
    PairAndAnchors,
    as_one,
    backward_of,
    cast,
    folds,
    is_batched,
    keep,
    kept_by,
    pairs,
    scaled_gradient,
    stacked,
    with_delta,
)
from lightning_lte.span import span

# Multiply-adds per rank and place of the kernel that take as long as one head's calls do.
_CALLS = 10**5


def convolved(layer: Any, state: LayerState, geometry: Geometry, x: Tensor) -> Tensor:
    """What a plain or a transposed convolution computes with the heads that act: (batch, out, *size).

    Args:
        layer: with heads.
        state: of the layer.
        geometry: of the layer.
        x: its input, with what the geometry does not pad.
    """
    factors, own_weight, own_bias = state.factors.get("weight"), state.stack("weight"), state.stack("bias")
    if factors is None and own_weight is not None:
        return convolve_each(geometry, x, layer.weight, own_weight, layer.bias if own_bias is None else own_bias)
    bias = layer.bias if own_bias is None else None
    if factors is None:
        y = geometry.convolve(x, layer.weight, bias)
    else:
        y = through_heads(geometry, x, bias, factors, state.head)
    return y if own_bias is None else add_per_head(y, own_bias)


def through_heads(
    geometry: Geometry, x: Tensor, bias: Tensor | None, factors: Factors, head: int | Tensor | None
) -> Tensor:
    """conv(x_h; W) + s * (conv(conv(x_h; A_h); B_h) - conv(conv(x_h; A'_h); B'_h)) + b: (batch, out, *size).

    Args:
        geometry: of the layer.
        x: (batch, in, *size), the heads' samples below each other.
        bias: (out,) or None.
        factors: of the layer's weight.
        head: see `Factors.apply`.
    """
    with span("heads"):
        weight = factors.base()
        pair_and_anchors, again = factors.acting_and_anchors(head)
        own = _Form(geometry, factors.matrices, weight.shape[2:], factors.scale, factors.gradient_scale)
        x = cast(x)  # once, for all convolutions of it
        if x.dim() != weight.dim() or not factors.applies(x, weight, bias):
            y = convolve(geometry, x, factors.cast(weight), bias)
            return torch.add(y, own.delta(x, *pair_and_anchors), alpha=own.scale)
        A, _, _, anchor_B = pair_and_anchors
        folded = own.folds(x, weight, anchor_B is not None, len(A))
        weight = weight if folded else cast(factors.cast(weight))
        y = _FactoredConvolution.apply(x, weight, cast(bias), *pair_and_anchors, own, again, folded)
        return y


@dataclass(frozen=True)
class _Form:
    """All of a convolution with heads but its tensors.

    Attributes:
        geometry: of the layer. Of the convolutions with A_h and with B_h one has it, and the other has kernel 1.
        matrices: how W is seen.
        kernel: its size.
        scale: s.
        gradient_scale: what the gradients of A and B are multiplied by; see `scaled_gradient`.
    """

    geometry: Geometry
    matrices: Matrices
    kernel: tuple[int, ...]
    scale: float
    gradient_scale: int

    @property
    def by_A(self) -> Geometry:
        """That of the convolution with A_h."""
        return self._pointwise if self.geometry.transposed else self.geometry

    @property
    def by_B(self) -> Geometry:
        """That of the convolution with B_h."""
        return self.geometry if self.geometry.transposed else self._pointwise

    @property
    def _pointwise(self) -> Geometry:
        # With parts in place of groups, the parts read the same input and have inner channels of their own.
        return Geometry.pointwise(len(self.kernel), self.matrices.count)

    def of_A(self, A: Tensor) -> Tensor:
        """A (n, *lead, rank, in) as a weight, the heads below each other."""
        kernel = (1,) * len(self.kernel) if self.geometry.transposed else self.kernel
        return A.reshape(math.prod(A.shape[:-1]), -1, *kernel)

    def of_B(self, B: Tensor) -> Tensor:
        """B (n, *lead, out, rank) as a weight, the heads below each other."""
        if not self.geometry.transposed:
            return B.reshape(-1, B.shape[-1], *[1] * len(self.kernel))
        return B.mT.reshape(math.prod(B.mT.shape[:-1]), -1, *self.kernel)

    def as_B(self, weight: Tensor, B: Tensor) -> Tensor:
        """The inverse of `of_B`, in the shape of B."""
        return weight.reshape(B.mT.shape).mT if self.geometry.transposed else weight.reshape(B.shape)

    def delta(self, x: Tensor, A: Tensor, B: Tensor, anchor_A: Tensor | None, anchor_B: Tensor | None) -> Tensor:
        """(B_h A_h - B'_h A'_h) x_h in plain operations."""
        A, B = (scaled_gradient(t, self.gradient_scale) for t in (A, B))
        A, B = (t.to(x.dtype) for t in stacked(A, B, anchor_A, anchor_B))
        inner = convolve(self.by_A, x, self.of_A(A), None, len(A))
        return below_each_other(self.by_B.of_heads(len(A)).convolve(inner, self.of_B(B), None), len(A))

    def folds(self, x: Tensor, weight: Tensor, anchored: bool, count: int) -> bool:
        """Whether effective weights pay, of which there is one convolution for each head.

        Elsewhere they pay as in linear layers. On a CPU they take more: oneDNN lays out each anew, in calls of its own.
        """
        if count > 1 and (x.device.type != "cpu" or self.geometry.is_slow(x[: len(x) // count], weight)):
            return False
        size = x.shape[2:] if self.geometry.transposed else self.geometry.size(x.shape[2:], self.kernel)
        rows = len(x) // count * math.prod(size)
        m = self.matrices
        if x.device.type != "cpu":
            return folds(rows, m.out_features, m.in_features, weight.dtype, anchored)
        calls = 0 if count == 1 else _CALLS * math.prod(self.kernel) // m.count
        thin = (3 if anchored else 2) * rows * (m.out_features + m.in_features)
        return weight.dtype not in HALF and thin >= 6 * m.out_features * m.in_features + calls

    def is_thin(self, x: Tensor, rank: int) -> bool:
        """Whether the gradient of a head's effective weight takes no longer than those of its factors alone.

        It takes m n multiply-adds for each place. They take 2 r (m + n) in thin convolutions, on a CPU as if r were
        what a register of 64 bytes holds, at least.
        """
        m, n = self.matrices.out_features, self.matrices.in_features
        return 2 * (max(rank, 64 // x.element_size()) if x.device.type == "cpu" else rank) * (m + n) >= m * n

    def effective(self, weight: Tensor, factors: PairAndAnchors, dtype: torch.dtype) -> Iterator[Tensor]:
        """W + s * (B_h A_h - B'_h A'_h) of one head after the other, as there need not be room for all, in a dtype."""
        A, *_ = factors
        # Those of small weights together: each operation takes its time.
        together = 1 if A.dim() == 4 else max(1, CACHE // (weight.numel() * weight.element_size()))
        for start in range(0, len(A), together):
            chosen = (None if t is None else t[start : start + together] for t in factors)
            first, second = (t.flatten(0, 1) if t.dim() == 4 else t for t in stacked(*chosen))  # type: ignore[arg-type]
            left, right = (first.mT, second.mT) if self.matrices.transposed else (second, first)
            base = weight.reshape(self.matrices.count, left.shape[1], -1)
            whole = with_delta(base.expand(len(left), -1, -1), right, left, self.scale, dtype)
            for own in whole.view(-1, *weight.shape):
                yield in_format_of(weight, own)


class _FactoredConvolution(torch.autograd.Function):
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
        own: _Form,
        again: Callable[[], PairAndAnchors] | None,
        folded: bool,
    ) -> Tensor:
        factors, count = (A, B, anchor_A, anchor_B), len(A)
        ctx.own, ctx.folds, ctx.shape = own, folded, weight.shape
        inner = None
        if ctx.folds:
            parts = zip(x.chunk(count), own.effective(weight, factors, x.dtype), strict=True)
            y: Any = _joined([own.geometry.convolve(part, each, bias) for part, each in parts])
        else:
            first, second = as_one(pairs(*factors))  # with A itself first, so that A x comes with it
            inner = own.by_A.of_heads(count).convolve(side_by_side(x, count), own.of_A(first.to(x.dtype)), None)
            delta = own.by_B.of_heads(count).convolve(inner, own.of_B(second.to(x.dtype)), None)
            y = own.geometry.convolve(x, weight, bias).add_(below_each_other(delta, count), alpha=own.scale)
            if first.shape != A.shape:  # of A alone
                inner = inner.unflatten(1, (-1, 2, A.shape[-2]))[:, :, 0].flatten(1, 2)
            inner = in_format_of(x, inner)
        # As a plain layer, whose W may be written to meanwhile if its input wants no gradient.
        kept = weight if any(ctx.needs_input_grad[:2]) else None
        keep(ctx, x, kept, factors, inner, again)
        return y

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors, inner = kept_by(ctx)
        of_bias = gradient_of_bias(gradient) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled() or is_batched(gradient):
            of_x, of_weight, of_A, of_B = _derived(ctx, gradient, x, weight, *factors)
        else:
            of_x, of_weight, of_A, of_B = _gradients(ctx, gradient, x, weight, factors, inner)
        return of_x, of_weight, of_bias, of_A, of_B, None, None, None, None, None


def _gradients(
    ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor | None, factors: PairAndAnchors, inner: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Those of x, the weight, A and B."""
    own: _Form = ctx.own
    for_x, for_weight = ctx.needs_input_grad[:2]
    A, B, *_ = factors
    count = len(A)
    if not ctx.folds:
        of_x, of_weight = own.geometry.backward(gradient, x, weight, for_x, for_weight)
        x, gradient = side_by_side(x, count), side_by_side(gradient, count)
        if of_x is not None:
            first, second = (t.to(x.dtype) for t in as_one(pairs(*factors)))
            assert inner is not None
            like = in_format_of(x, inner.new_empty(len(inner), first[..., 0].numel(), *inner.shape[2:]))
            of_inner, _ = own.by_B.of_heads(count).backward(gradient, like, own.of_B(second), True, False)
            delta, _ = own.by_A.of_heads(count).backward(of_inner, x, own.of_A(first), True, False)
            of_x.add_(below_each_other(delta, count), alpha=own.scale)
        return of_x, of_weight, *_of_pair(ctx, gradient, x, inner, A, B)
    of_weight = None
    if for_weight and weight is not None:
        of_weight = own.geometry.backward(gradient, x, torch.empty_like(weight, dtype=x.dtype), False, True)[1]
    effective = None if weight is None else own.effective(weight, factors, x.dtype)
    whole = any(ctx.needs_input_grad[3:5]) and own.is_thin(x, A.shape[-2])
    # One sample of each head is next to those of others where it lies.
    together = not whole and len(x) == count and own.geometry.groups == 1
    parts, learned = [], []
    for head, (own_x, own_gradient) in enumerate(zip(x.chunk(count), gradient.chunk(count), strict=True)):
        each = None
        if for_x or whole:
            each = x.new_empty(ctx.shape) if effective is None else next(effective)
        of_part, of_whole = own.geometry.backward(own_gradient, own_x, each, for_x, whole)
        parts.append(of_part)
        own_A, own_B = A[head : head + 1], B[head : head + 1]
        if whole:
            learned.append(_of_whole(ctx, of_whole, own_A, own_B))
        elif not together:
            inner = own.by_A.convolve(own_x, own.of_A(own_A).to(x.dtype), None)
            learned.append(_of_pair(ctx, own_gradient, own_x, inner, own_A, own_B))
    if together:
        x, gradient = side_by_side(x, count), side_by_side(gradient, count)
        inner = own.by_A.of_heads(count).convolve(x, own.of_A(A).to(x.dtype), None)
        return _joined(parts), of_weight, *_of_pair(ctx, gradient, x, inner, A, B)
    of_A, of_B = (_joined(each) for each in zip(*learned, strict=True))
    return _joined(parts), of_weight, of_A, of_B


def _of_pair(ctx: Any, gradient: Tensor, x: Tensor, inner: Tensor | None, A: Tensor, B: Tensor) -> list[Tensor | None]:
    """The gradients of A and B, of heads side by side."""
    own: _Form = ctx.own
    for_A, for_B = ctx.needs_input_grad[3:5]
    a, b = own.of_A(A).to(x.dtype), own.of_B(B).to(x.dtype)
    learning, of_b = own.by_B.of_heads(len(A)).backward(gradient, inner, b, for_A, for_B)
    _, of_a = own.by_A.of_heads(len(A)).backward(learning, x, a, False, for_A)
    size = own.scale * own.gradient_scale
    found = [None if of_a is None else of_a.reshape(A.shape), None if of_b is None else own.as_B(of_b, B)]
    # In the dtype of the factors: float16 has room for the gradients of a scaled loss, and for no more.
    return [None if t is None else t.to(A.dtype).mul_(size) for t in found]


def _of_whole(ctx: Any, of_whole: Tensor, A: Tensor, B: Tensor) -> list[Tensor | None]:
    """The gradients of A and B of one head, from that of its effective weight."""
    own: _Form = ctx.own
    for_A, for_B = ctx.needs_input_grad[3:5]
    size = own.scale * own.gradient_scale
    left = A if own.matrices.transposed else B
    matrices = of_whole.to(A.dtype).reshape(*A.shape[:-2], left.shape[-1 if own.matrices.transposed else -2], -1)
    matrices = matrices.mT if own.matrices.transposed else matrices
    return [(B.mT @ matrices).mul_(size) if for_A else None, (matrices @ A.mT).mul_(size) if for_B else None]


def _derived(ctx: Any, gradient: Tensor, *saved: Tensor | None) -> list[Tensor | None]:
    """As `_gradients`, in operations that can be differentiated, and have many gradients at once."""
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)] + [False, False]
    # Each by another name: what x was made from may have the same factors, if a layer has been used twice.
    twice = torch.is_grad_enabled()
    inputs = [
        t if t is None else t.view_as(t) if twice else t.detach().requires_grad_(w)
        for t, w in zip(saved, wanted, strict=True)
    ]
    x, weight, A, B, *anchors = inputs
    assert x is not None and A is not None and B is not None
    with torch.enable_grad():
        y = ctx.own.scale * ctx.own.delta(x, A, B, *anchors)
        if weight is not None:
            y = y + convolve(ctx.own.geometry, x, weight.to(x.dtype))
    asked = [t for t, w in zip(inputs, wanted, strict=True) if t is not None and w]
    found = iter(torch.autograd.grad(y, asked, gradient, create_graph=twice))
    return [next(found) if w else None for w in wanted[:4]]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Below each other."""
    whole = [part for part in parts if part is not None]
    return None if not whole else whole[0] if len(whole) == 1 else torch.cat(whole)
