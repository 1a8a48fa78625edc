"""Buffers that training writes to are those of the first device at merges, as under DistributedDataParallel."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport
from tests.modules import IN, RANK, Module, Net, loader, make_data, sgd, train_step, trainer
from tests.processes import run

PERIOD, STEPS = 3, 8


class Centered(Net):
    """Its center follows the data, and it counts its forwards from the fifth on; a table stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(IN))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.arange(3.0))
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        with torch.no_grad():
            self.center.mul_(0.5).add_(x.mean(0), alpha=0.5)
            if self.forwards > 4:
                self.count += 1
        return super().forward(x - self.center)


def centers(broadcast: bool, choices: dict[str, Any]) -> list[tuple[list[float], int]]:
    """Center and count after each step, and in the end."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    torch.manual_seed(0)
    net = Centered().double()
    optimizer = sgd(net.parameters())
    config = LTEConfig(2, PERIOD, rank=RANK, execution="batched", **choices)
    explorer = Explorer(net, optimizer, config, transport)
    explorer.buffers.shared = broadcast
    seen = []
    for step in range(STEPS):
        train_step(explorer, net, optimizer, make_data(8, seed=10 * step + transport.rank))
        seen.append((net.center.tolist(), int(net.count)))
    explorer.finish()
    assert net.table.tolist() == [0, 1, 2]
    return [*seen, (net.center.tolist(), int(net.count))]


@pytest.mark.parametrize("choices", [{}, {"overlap": 1}], ids=str)
def test_devices_have_the_buffers_of_the_first_at_merges(choices: dict[str, Any]) -> None:
    first, second = run(centers, 2, True, choices)
    lands = PERIOD + choices.get("overlap", 0)
    for step, (mine, other) in enumerate(zip(first, second, strict=True), 1):
        merged = step in (lands, lands + PERIOD, STEPS + 1)
        assert (mine[0] == other[0]) == merged, step
    assert first[-1][1] == second[-1][1] == STEPS - 4
    alone, _ = run(centers, 2, False, choices)
    assert [own[0] for own in first] == [own[0] for own in alone]  # the first device goes on as it was


def test_devices_may_keep_their_own_buffers() -> None:
    first, second = run(centers, 2, False, {})
    assert all(mine[0] != other[0] for mine, other in zip(first, second, strict=True))


def test_a_buffer_that_nobody_writes_to_does_not_travel() -> None:
    """The trial of the first batch puts all of them back, and so does a checkpoint."""
    net = Centered().double()
    optimizer = sgd(net.parameters())
    explorer = Explorer(net, optimizer, LTEConfig(2, PERIOD, rank=RANK))
    train_step(explorer, net, optimizer, make_data(8))
    assert explorer.execution == "sequential"  # as a center is one of the whole batch
    assert explorer.buffers.found().keys() == {"center"}

    state = explorer.state_dict()
    state["buffers"] = [{name: buffer.clone() for name, buffer in net.named_buffers()}]  # as of several devices
    other = Centered().double()
    other.load_state_dict(net.state_dict())
    resumed = Explorer(other, sgd(other.parameters()), LTEConfig(2, PERIOD, rank=RANK))
    resumed.load_state_dict(state)
    assert resumed.buffers.found() == {}


def under_lightning(broadcast: bool) -> list[float]:
    class Own(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return super().training_step((x + self.global_rank, y), batch_idx)

    module = Own(Centered().double(), sgd)
    t = trainer(LTEStrategy(2, PERIOD, rank=RANK, broadcast_buffers=broadcast), devices=2, max_epochs=1)
    t.fit(module, loader(16 * 10))
    return copy.deepcopy(module.net.center.tolist())


@pytest.mark.parametrize("broadcast", [True, False])
def test_ddps_argument_chooses(broadcast: bool) -> None:
    first, second = run(under_lightning, 2, broadcast, group=False, timeout_s=120)
    assert all(math.isfinite(value) for value in first) and (first == second) == broadcast
