"""A small network for tables: three layers of width 256 over 64 numbers, with layer norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

NUMBERS, WIDTH, CLASSES = 64, 256, 10


def model() -> nn.Module:
    """With random weights."""
    layers: list[nn.Module] = []
    for inside in (NUMBERS, WIDTH, WIDTH):
        layers += [nn.Linear(inside, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def batch(samples: int) -> tuple[Tensor, Tensor]:
    """Random rows and labels."""
    return torch.randn(samples, NUMBERS), torch.randint(0, CLASSES, (samples,))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])
