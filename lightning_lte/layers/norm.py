"""Normalisation layers with an affine part for each head: y_h = w_h * normalised(x_h) + b_h.

w_h and b_h are replicas, or in the paper's form for vectors w + s * (B_h A_h - B'_h A'_h) with a vector B_h and a
scalar A_h.

nn.LayerNorm and nn.RMSNorm scale the last dimensions, nn.GroupNorm and nn.InstanceNorm the channels. Batch norm is not
here: it takes statistics over the samples of all heads, so with it heads take turns.
"""

from __future__ import annotations

from typing import Any

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
)

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
            return super().forward(input)
        own: Any = self
        if state.head is None:
            check_slices(self, input, state.count)
        elif isinstance(self, _INSTANCE) and input.dim() == own._get_no_batch_dim():
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if isinstance(self, nn.LayerNorm):
            y = functional.layer_norm(input, own.normalized_shape, None, None, own.eps)
        elif isinstance(self, nn.RMSNorm):
            y = functional.rms_norm(input, own.normalized_shape, None, own.eps)
        elif isinstance(self, nn.GroupNorm):
            y = functional.group_norm(input, own.num_groups, None, None, own.eps)
        else:
            y = functional.instance_norm(input, eps=own.eps)
        y = y.unflatten(0, (state.count, -1))
        for name, combine in (("weight", Tensor.mul), ("bias", Tensor.add)):
            shared: Tensor | None = getattr(self, name, None)
            if shared is not None:
                y = combine(y, self._aligned(_affine(state, name, shared), y.dim()))
        return y.flatten(0, 1)

    def _aligned(self, own: Tensor, dims: int) -> Tensor:
        """(n or 1, *shape) so that it meets (n, batch, ...) in the dimensions that are scaled."""
        if isinstance(self, _CHANNELS):
            return own.view(own.shape[0], 1, -1, *[1] * (dims - 3))
        return own.view(own.shape[0], *[1] * (dims - own.dim()), *own.shape[1:])


def _affine(state: LayerState, name: str, shared: Tensor) -> Tensor:
    """A weight or bias for every head that acts, (n, *shape), or one for all of them, (1, *shape)."""
    factors = state.factors.get(name)
    if factors is None:
        own = state.stack(name)
        return shared.unsqueeze(0) if own is None else own
    A, B = factors.acting(state.head)
    return factors.base() + factors.scale * (B @ A).view(-1, *shared.shape)
