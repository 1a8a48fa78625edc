"""Layers that know heads: one file for each kind, and the table that finds the class for a user's layer."""

from __future__ import annotations

from torch import nn

from lightning_lte.layers import linear, norm
from lightning_lte.layers.base import HeadedLayer


def headed_class(layer: nn.Module) -> type[HeadedLayer] | None:
    """The class that a layer takes on while it has heads, or None for a kind that is not known."""
    if linear.can_be_headed(layer):
        return linear.HeadedLinear
    if norm.can_be_headed(layer):
        return norm.HeadedLayerNorm
    return None
