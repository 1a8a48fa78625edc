"""Fused optimizers go through a parameter, its gradient and its moments number by number, as they lie in memory. On a
GPU they refuse what lies otherwise than its parameter; on a CPU they take the wrong numbers together, unseen."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lte import Explorer, LTEConfig
from tests.modules import clone, make_net, train_step

PERIOD, STEPS = 3, 9


class Images(nn.Module):
    """Convolutions in channels last, of which the first is too thin to factor."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1), nn.ReLU()
        self.body = nn.Sequential(*convolutions, nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Clamped(Images):
    """It writes to the weight of its thin convolution in each step."""

    def forward(self, x: Tensor) -> Tensor:
        self.body[0].weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (8,), generator=generator)


def trained(
    fused: bool, kind: type[nn.Module] = Images, stops_after: int | None = None, outer: bool = False, **chosen: Any
) -> dict[str, Tensor]:
    """Weights in the end, of a run that may go on from a checkpoint in its midst.

    Args:
        fused: whether the optimizer is, or the outer one.
        kind: of network.
        stops_after: so many steps.
        outer: whether there is an outer optimizer.
        chosen: for `LTEConfig`.
    """
    if outer:
        chosen["outer_optimizer"] = partial(torch.optim.AdamW, lr=0.01, fused=fused)

    def begin() -> tuple[Any, Any, Explorer]:
        net = make_net(kind)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused and not outer)
        config = LTEConfig(**{"heads": 1, "merge_every": PERIOD, "rank": 4, "execution": "batched", **chosen})
        return net, optimizer, Explorer(net, optimizer, config)

    net, optimizer, explorer = begin()
    for step in range(STEPS):
        if step == stops_after:
            file = io.BytesIO()
            torch.save((net.state_dict(), explorer.state_dict()), file)
            file.seek(0)
            weights, state = torch.load(file)
            explorer.close()
            net, optimizer, explorer = begin()
            net.load_state_dict(weights)
            explorer.load_state_dict(state)
        train_step(explorer, net, optimizer, batch(step))
    explorer.finish()
    return clone(net.state_dict())


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"heads": 4},
        {"heads": 4, "execution": "sequential"},
        {"stops_after": 5},
        {"stops_after": 5, "heads": 4},
        {"grow_heads": {4: 4}},
        {"grow_heads": {4: 4}, "execution": "sequential"},
        {"full_rank_steps": 3, "heads": 4},
        {"heads": 4, "kind": Clamped},
        {"outer": True},
        {"outer": True, "stops_after": 5},
    ],
    ids=str,
)
def test_what_they_hold_lies_in_memory_as_its_parameter_does(chosen: dict[str, Any]) -> None:
    torch.testing.assert_close(trained(True, **chosen), trained(False, **chosen), rtol=0, atol=1e-14)
