"""LTE as its authors' released code computes it, written from its description: what this package is measured against.

A layer computes y_h = W x_h + b + s * B_h A_h x_h - s * B'_h A'_h x_h: two low-rank passes, of the factors as they are
and as they were at the last merge, each scaled and added to, or subtracted from, the output elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lte import Explorer


class ReleasedLinear(nn.Module):
    """A linear layer with the factors of n heads, which share the batch.

    Args:
        layer: whose weight is frozen and whose bias is shared by all heads.
        heads: n.
        rank: of the factors.
        scale: s.
    """

    old_A: Tensor
    old_B: Tensor

    def __init__(self, layer: nn.Linear, heads: int, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.heads, self.scale = layer, heads, scale
        layer.weight.requires_grad_(False)
        out, inside = layer.weight.shape
        self.A = nn.Parameter(layer.weight.new_empty(heads, rank, inside).normal_(std=inside**-0.5))
        self.B = nn.Parameter(layer.weight.new_zeros(heads, out, rank))
        self.register_buffer("old_A", self.A.detach().clone())
        self.register_buffer("old_B", self.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        rows = x.reshape(self.heads, math.prod(x.shape[:-1]) // self.heads, x.shape[-1])
        now = torch.bmm(torch.bmm(rows, self.A.mT), self.B.mT).reshape(y.shape)
        before = torch.bmm(torch.bmm(rows, self.old_A.mT), self.old_B.mT).reshape(y.shape)
        return y + self.scale * now - self.scale * before


def as_released(make: Callable[[], nn.Module], explorer: Explorer, rank: int, scale: float) -> nn.Module:
    """A model with released layers for the linear layers that an explorer has given heads to. All else, attention's own
    weights too, is trained as it is, once for all heads.

    Args:
        make: makes the model.
        explorer: over such a model.
        rank: of the factors.
        scale: s.
    """
    model = make()
    # Not those whose weight another layer reads, such as the output of nn.MultiheadAttention.
    chosen = {
        role.owner.module_name
        for weight, role in explorer.injection.roles.items()
        if weight in explorer.injection.factors and role.owner.layer is role.owner.module
    }
    for name, layer in list(model.named_modules()):
        if name in chosen and isinstance(layer, nn.Linear):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, ReleasedLinear(layer, explorer.count, rank, scale))
    return model
