"""A U-Net (Ronneberger et al. 2015) of three levels with group norms, which labels the pixels of images of 64 x 64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = 64, 128, 256
CLASSES = 4


class UNet(nn.Module):
    """Images (batch, 3, h, w) to scores (batch, classes, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        levels = list(zip((3, *WIDTHS), WIDTHS, strict=False))
        self.down = nn.ModuleList(block(inside, out) for inside, out in levels)
        self.up = nn.ModuleList(nn.ConvTranspose2d(out, inside, 2, 2) for inside, out in reversed(levels[1:]))
        self.merge = nn.ModuleList(block(out, inside) for inside, out in reversed(levels[1:]))
        self.out = nn.Conv2d(WIDTHS[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else functional.max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), kept.pop()], 1))
        scores: Tensor = self.out(x)
        return scores


def block(inside: int, out: int) -> nn.Sequential:
    """Two convolutions of 3 x 3."""
    layers: list[nn.Module] = []
    for channels in (inside, out):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
    return nn.Sequential(*layers)


def model() -> nn.Module:
    """With random weights."""
    return UNet()


def batch(samples: int) -> tuple[Tensor, Tensor]:
    """Random images and labels of their pixels."""
    return torch.randn(samples, 3, 64, 64), torch.randint(0, CLASSES, (samples, 64, 64))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])
