"""Layers that know heads: one file for each kind, and the table that finds the class for a user's layer."""

from __future__ import annotations

from torch import nn

from lightning_lte.layers.attention import HeadedMultiheadAttention
from lightning_lte.layers.base import HeadedLayer
from lightning_lte.layers.conv import HeadedConv
from lightning_lte.layers.conv_transpose import HeadedConvTranspose
from lightning_lte.layers.embedding import HeadedEmbedding
from lightning_lte.layers.geometric import HeadedGeometricLinear
from lightning_lte.layers.gpt2 import HeadedConv1D
from lightning_lte.layers.linear import HeadedLinear
from lightning_lte.layers.norm import HeadedNorm

KINDS: tuple[type[HeadedLayer], ...] = (
    HeadedLinear,
    HeadedGeometricLinear,
    HeadedConv1D,
    HeadedConv,
    HeadedConvTranspose,
    HeadedEmbedding,
    HeadedMultiheadAttention,
    HeadedNorm,
)


def headed_class(layer: nn.Module) -> type[HeadedLayer] | None:
    """The class that a layer takes on while it has heads, or None for a kind that is not known."""
    return next((kind for kind in KINDS if kind.knows(layer)), None)
