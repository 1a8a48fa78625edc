"""Linear of PyTorch Geometric, the linear layer inside GCNConv, SAGEConv, GATConv and most of its other convolutions.

It computes as nn.Linear does, and is no subclass of it.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from lightning_lte.layers.base import computes_as
from lightning_lte.layers.linear import HeadedLinear


class HeadedGeometricLinear(HeadedLinear):
    """Such a layer with heads. torch_geometric is not needed: who has such a layer has imported it."""

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        kind = getattr(sys.modules.get("torch_geometric.nn.dense.linear"), "Linear", None)
        return kind is not None and computes_as(layer, kind)

    def forward(self, x: Tensor) -> Tensor:
        # Here the argument is called x: it may be given by its name.
        return HeadedLinear.forward(self, x)
