"""What layers with heads give can be written to in place, as what torch's own layers give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte import Explorer, LTEConfig
from lightning_lte.execution import run

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": lambda y: functional.relu(y, inplace=True),
    "sum": lambda y: y.add_(1.0),
    "written element": lambda y: y.index_fill_(0, torch.tensor([0]), 0.0),
    "written view": lambda y: (y.view(-1).mul_(0.5), y)[1],
}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("way", ["one", "all", "turns", "low precision"])
@pytest.mark.parametrize("write", IN_PLACE)
def test_what_a_layer_gives_can_be_written_to_in_place(write: str, way: str, rows: int) -> None:
    """As `nn.ReLU(inplace=True)` does. With few rows the layer is a base product and another one, with many it has an
    effective weight for each head."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 16), nn.Linear(16, 12), nn.Conv2d(12, 8, 1), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    for layer in net:
        nn.init.normal_(layer.bias) if hasattr(layer, "bias") else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    heads, base = (1 if way == "one" else 2), ("bfloat16" if way == "low precision" else "float32")
    execution = "sequential" if way == "turns" else "batched"
    explorer = Explorer(net, optimizer, LTEConfig(heads, 100, rank=1, execution=execution, base=base))
    x = torch.randn(2 * rows, 20, dtype=torch.float64)

    def forward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        y = change(net[1](change(net[0](x))))
        return net[4](net[3](change(net[2](y[:, :, None, None]))))

    def gradients(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        optimizer.zero_grad()
        loss = run(explorer, lambda own: forward(own, change).square().mean(), x)
        with explorer.backward():
            loss.backward()
        explorer.after_backward()
        return [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    for _ in range(3):  # weights are watched in the first steps, and rounded then
        gradients(IN_PLACE[write])
        optimizer.step()
        explorer.step()
    found = [gradients(IN_PLACE[write]), gradients(lambda y: IN_PLACE[write](y.clone()))]
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)
