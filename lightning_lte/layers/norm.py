"""Normalisation layers with an affine part for each head: y_h = w_h * normalised(x_h) + b_h.

w_h and b_h are replicas, or in the paper's form for vectors w + s * (B_h A_h - B'_h A'_h) with a vector B_h and a
scalar A_h.

nn.LayerNorm and nn.RMSNorm scale the last dimensions, nn.GroupNorm and nn.InstanceNorm the channels. Batch norm is not
here: it takes statistics over the samples of all heads, so with it heads take turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.float32 import HALF
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
from lightning_lte.layers.convolution import channels_last
from lightning_lte.product import are_plain, autocasts, backward_of, is_batched

# Subclasses that compute the same by a forward of their own.
_ALIKE = ("timm.layers.norm.LayerNorm",)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_CHANNELS = (nn.GroupNorm, *_INSTANCE)


class HeadedNorm(HeadedLayer):
    """A normalisation layer with a weight and a bias for each local head."""

    of_vectors = True

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        kind = type(layer)
        alike = f"{kind.__module__}.{kind.__qualname__}" in _ALIKE and not getattr(layer, "_fast_norm", False)
        return (
            (alike or computes_as(layer, nn.LayerNorm, nn.RMSNorm, *_CHANNELS))
            and layer._parameters.get("weight") is not None
            # Running statistics are shared by the heads of a device.
            and not getattr(layer, "track_running_stats", False)
        )

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        check_not_split(layer, parts, "whose weight is a vector")
        return Matrices(getattr(layer, key).numel(), 1)

    def forward(self, input: Tensor) -> Tensor:
        state = acting_state(self)
        if state is None or (state.head is not None and not state.factors):
            plain: Tensor = without_heads(HeadedNorm, self, input)
            return plain
        own: Any = self
        if state.head is None:
            check_slices(self, input, state.count)
        elif isinstance(self, _INSTANCE) and input.dim() == own._get_no_batch_dim():
            return self.forward(input.unsqueeze(0)).squeeze(0)
        shared: Tensor | None = getattr(self, "bias", None)
        weight, bias = _affine(state, "weight", own.weight), None if shared is None else _affine(state, "bias", shared)
        if isinstance(self, _CHANNELS):
            return self._of_channels(input, weight, bias, state.count)
        compute = partial(self._scaled, count=state.count)
        if not are_plain(input, weight):
            return compute(input, weight, bias)
        if _takes_long_in_calls(input, state.count) and self._is_layer_norm_in_one_dtype(input, weight, bias):
            return cast(Tensor, _ScaledLayerNorm.apply(input, weight, bias, compute, own.normalized_shape, own.eps))
        if isinstance(self, nn.RMSNorm):
            if input.dtype == weight.dtype and input.dtype not in HALF:
                eps = torch.finfo(input.dtype).eps if own.eps is None else own.eps
                return cast(Tensor, _ScaledRMSNorm.apply(input, weight, compute, eps))
        elif input.is_cpu:
            return self._one_by_one(input, weight, bias, state.count)
        return cast(Tensor, _ScaledNorm.apply(input, weight, bias, compute))

    def _of_channels(self, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        """What a norm of channels computes. Statistics are those of a sample and a group alone. So all samples can be
        one that has the channels of all of them, with a weight and bias for each, in torch's own operation."""
        # Channels last stay so, which torch's operation for them does on a CPU alone.
        if count == 1 or len(x) == 0 or (x.is_cpu and isinstance(self, nn.GroupNorm) and channels_last(x)):
            return self._one_by_one(x, weight, bias, count)
        samples, channels = x.shape[:2]

        def of_each(own: Tensor) -> Tensor:
            return own.unsqueeze(1).expand(count, samples // count, channels).reshape(-1)

        one = x.reshape(1, samples * channels, *x.shape[2:])
        y = self._norm(one, of_each(weight), None if bias is None else of_each(bias), samples)
        # Not as a view, to which users' writing in place would take longer.
        whole: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
        return whole

    def _is_layer_norm_in_one_dtype(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether it is torch's layer norm, all in one dtype. In half precision torch rounds once what comes out, and
        a CPU has that as fast; autocast has it in float32."""
        if not isinstance(self, nn.LayerNorm) or any(t.dtype != x.dtype for t in (weight, bias) if t is not None):
            return False
        return x.dtype not in HALF or not (x.is_cpu or autocasts(x.device.type))

    def _one_by_one(self, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        """What `_scaled` computes, one head after the other by torch's own operation, which keeps x alone, too. On CPUs
        what is scaled apart takes several times as long."""
        affine = zip(_of_each(weight, count), _of_each(bias, count), strict=True)
        parts = [self._norm(part, *own) for part, own in zip(x.chunk(count), affine, strict=True)]
        return parts[0] if count == 1 else torch.cat(parts)

    def _scaled(self, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        """What the layer computes, with the weight and bias of each of `count` heads: (n or 1, *shape)."""
        dims = x.dim() + 1
        weight, bias = _aligned(weight, dims), None if bias is None else _aligned(bias, dims)
        return _scaled(self._norm(x, None, None), weight, bias, count)

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, samples: int = 1) -> Tensor:
        """What the layer computes with another weight and bias, or without; of channels those of several `samples` side
        by side."""
        own: Any = self
        if isinstance(self, nn.LayerNorm):
            return functional.layer_norm(x, own.normalized_shape, weight, bias, own.eps)
        if isinstance(self, nn.RMSNorm):
            return functional.rms_norm(x, own.normalized_shape, weight, own.eps)
        if isinstance(self, nn.GroupNorm):
            # Not by functional.group_norm, which takes a sample with as many channels as groups for one of one number.
            return torch.group_norm(x, samples * own.num_groups, weight, bias, own.eps)
        return functional.instance_norm(x, weight=weight, bias=bias, eps=own.eps)


class _ScaledNorm(torch.autograd.Function):
    """`compute(x, weight, bias)`, which keeps x alone, as torch's norms do.

    Plain operations would keep x normalised beside it, as the gradient of the weight needs it. To compute it once more
    in the backward takes little time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, compute: Callable[..., Tensor]) -> Tensor:
        ctx.compute, ctx.autocast = compute, _autocast_of_now(x.device.type)
        ctx.save_for_backward(x, weight, bias)
        ctx.set_materialize_grads(False)
        y = compute(x, weight, bias)
        # Not as a view: what a function of ours returns as one, users can't write to.
        whole: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return whole

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_derived(ctx, ctx.saved_tensors, gradient), None


class _ScaledLayerNorm(torch.autograd.Function):
    """What `_ScaledNorm` is, with the gradients of a layer norm written out. The host is done with both passes in less
    than half of the time that autograd takes to find them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[..., Tensor],
        shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        ctx.compute, ctx.autocast = compute, _autocast_of_now(x.device.type)
        ctx.shape = shape
        y, mean, scale = torch.native_layer_norm(x.contiguous(), shape, None, None, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.set_materialize_grads(False)
        if bias is None:
            _over(weight, y).mul_(weight.unsqueeze(1))
        else:
            own = _over(max(weight, bias, key=len), y)
            torch.addcmul(bias.unsqueeze(1), own, weight.unsqueeze(1), out=own)
        return y

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(gradient):
            return *_derived(ctx, (x, weight, bias), gradient), None, None, None
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        of_x = of_weight = of_bias = None
        x, gradient = x.contiguous(), gradient.contiguous()
        if for_bias:
            of_bias = _over(bias, gradient).sum(1)
        if for_x:
            scaled = (_over(weight, gradient) * weight.unsqueeze(1)).view(gradient.shape)
            of_x, *_ = torch.ops.aten.native_layer_norm_backward(
                scaled, x, ctx.shape, mean, scale, None, None, [True, False, False]
            )
        if for_weight:
            normalised = (x - mean).mul_(scale)
            of_weight = _over(weight, normalised.mul_(gradient)).sum(1).to(weight.dtype)
        return of_x, of_weight, of_bias, None, None, None


class _ScaledRMSNorm(torch.autograd.Function):
    """What `_ScaledNorm` is, with the gradients of a root mean square norm written out. On CPUs, where torch puts it
    together from plain operations, that takes less than half of the time of torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, compute: Callable[..., Tensor], eps: float) -> Tensor:
        ctx.compute, ctx.autocast = partial(compute, bias=None), _autocast_of_now(x.device.type)
        ctx.set_materialize_grads(False)
        rows = _rows_over(weight, x)
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = scale.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        # Not as a view: see `_ScaledNorm`.
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.mul(rows, scale, out=_rows_over(weight, y)).mul_(weight.flatten(1).unsqueeze(1))
        return y

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(gradient):
            return *_derived(ctx, (x, weight), gradient), None, None
        for_x, for_weight = ctx.needs_input_grad[:2]
        of_x = of_weight = None
        rows, gradient = _rows_over(weight, x), _rows_over(weight, gradient)
        own = weight.flatten(1)
        product = gradient * rows
        if for_weight:
            of_weight = torch.bmm(scale.mT, product).view(weight.shape)
        if for_x:
            # Of the scale, which depends on all of a row.
            through = torch.bmm(product, own.unsqueeze(2)).mul_(scale.pow(3)).div_(-rows.shape[-1])
            of_x = torch.mul(gradient, own.unsqueeze(1), out=product).mul_(scale).addcmul_(rows, through).view(x.shape)
        return of_x, of_weight, None, None


def _over(own: Tensor, y: Tensor) -> Tensor:
    """y (batch, ..., *shape) with the samples that share a weight or bias, own (n or 1, *shape), below each other:
    (n or 1, ., *shape)."""
    shape = own.shape[1:]
    return y.view(len(own), math.prod(y.shape[: y.dim() - len(shape)]) // len(own), *shape)


def _rows_over(own: Tensor, y: Tensor) -> Tensor:
    """`_over` with what is normalised in one dimension: (n or 1, ., numbers of one weight)."""
    return _over(own, y.contiguous()).flatten(2)


def _derived(ctx: Any, inputs: Sequence[Tensor | None], gradient: Tensor) -> list[Tensor | None]:
    """The gradients of inputs that autograd finds for `ctx.compute`, which runs once more.

    Args:
        ctx: of a forward.
        inputs: what it computes from, x first: the first that the forward got.
        gradient: that came back.
    """
    wanted = ctx.needs_input_grad[: len(inputs)]
    # A derivative of this one has to see where all comes from.
    twice = torch.is_grad_enabled()
    if not twice:
        inputs = [t if t is None else t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    with torch.enable_grad(), ctx.autocast():
        y = ctx.compute(*inputs)
    chosen: list[Any] = list(compress(inputs, wanted))
    found = iter(torch.autograd.grad(y, chosen, gradient, create_graph=twice))
    return [next(found) if w else None for w in wanted]


def _takes_long_in_calls(x: Tensor, count: int) -> bool:
    """Whether the calls of `_one_by_one`, some 17 microseconds for each of `count` heads, take a CPU longer than to
    read and write x several times, which is a measurement. Other devices work on all heads at once."""
    return not x.is_cpu or x.numel() < 2**13 * (count - 2)


def _aligned(own: Tensor, dims: int) -> Tensor:
    """(n or 1, *shape) so that it meets (n, batch, ...) in the dimensions that are scaled."""
    return own.view(own.shape[0], *[1] * (dims - own.dim()), *own.shape[1:])


def _scaled(normalised: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """(batch, ...) times the weight of each of `count` heads, plus its bias.

    Both are (n, 1, ...), or (1, 1, ...) for one that all have; see `_aligned`.
    """
    y = normalised.unflatten(0, (count, -1))
    y = y * weight if bias is None else torch.addcmul(bias, y, weight)
    # Under autocast the input has fewer bits than weight and bias, and what comes out must not be widened by them.
    return y.flatten(0, 1).to(normalised.dtype)


def _autocast_of_now(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes autocast of a device what it is now, in a backward, where it is another."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)


def _of_each(own: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """A weight or bias (n or 1, *shape) for each of n heads."""
    if own is None or len(own) != count:
        return [None if own is None else own[0]] * count
    return own.unbind()


def _affine(state: LayerState, name: str, shared: Tensor) -> Tensor:
    """A weight or bias for every head that acts, (n, *shape), or one for all of them, (1, *shape)."""
    factors = state.factors.get(name)
    if factors is None:
        own = state.stack(name)
        # A view: torch 2.9 forgets the hooks of a parameter that a function keeps while activations are offloaded.
        return shared.unsqueeze(0) if own is None else own.view_as(own)
    A, B = factors.acting(state.head)
    return factors.base() + factors.scale * (B @ A).view(-1, *shared.shape)
