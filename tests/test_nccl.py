"""What devices exchange where the backend sends tensors of GPUs alone, as NCCL does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, Transport, product, transport
from lightning_lte.execution import run
from tests import processes
from tests.another_device import Elsewhere, another_device, move_
from tests.modules import Kinds, after_backward, make_data, make_net

STEPS, PERIOD = 5, 3
CHOICES: list[dict[str, Any]] = [
    {},
    {"payload": "factors", "overlap": 2, "stagger": 2},
    {"wire": "int8", "verify_every": 1},
    {"wire": "bfloat16", "payload": "factors", "execution": "sequential"},
    {"replicas": "step", "full_rank_steps": 2},
    {"after_merge": "reset", "reset_a": "redraw", "execution": "auto"},
    {"weight_decay": "weights", "grow_heads": {3: 8}},
    {"freeze_a": True, "payload": "factors"},
]


class Nccl:
    """torch.distributed, with collectives over gloo that refuse what is on the CPU; it notes what they were."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_backend(self, group: Any = None) -> str:
        return "nccl"

    def all_reduce(self, tensor: Tensor, group: Any = None) -> None:
        dist.all_reduce(self._held("all_reduce", tensor), group=group)

    def all_gather(self, parts: list[Tensor], tensor: Tensor, group: Any = None) -> None:
        held = self._held("all_gather", tensor)
        dist.all_gather([self._held("part", part) for part in parts], held, group=group)

    def all_to_all_single(self, output: Tensor, tensor: Tensor, group: Any = None) -> None:
        held = self._held("all_to_all", tensor)
        dist.all_to_all_single(self._held("output", output), held, group=group)

    def broadcast(self, tensor: Tensor, src: int, group: Any = None) -> None:
        dist.broadcast(self._held("broadcast", tensor), src=src, group=group)

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Elsewhere):
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        self.calls.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        return tensor.held


class Counting(Kinds):
    """With a buffer that training writes to, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.statistics = nn.BatchNorm1d(80, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        self.statistics.train()(x.detach())
        return super().forward(x)


def trained() -> list[tuple[list[str], dict[str, Tensor]]]:
    rank, found = dist.get_rank(), []
    for chosen in CHOICES:
        nccl = Nccl()
        patches = pytest.MonkeyPatch()
        patches.setattr(transport, "dist", nccl)
        patches.setattr(product, "applies", lambda x, *_: x.dtype == torch.float64)
        with patches.context(), another_device():
            devices = Transport(2, rank)
            net = move_(make_net(Counting))
            devices.broadcast_([*net.parameters(), *net.buffers()])
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
            config = LTEConfig(**{"heads": 4, "merge_every": PERIOD, "rank": 3, "execution": "batched", **chosen})
            explorer = Explorer(net, optimizer, config, devices)
            for step in range(STEPS):
                x, y = (Elsewhere(t) for t in make_data(8, seed=2 * step + rank, width=80))
                loss = run(explorer, lambda own, net=net: cross_entropy(net(own[0]), own[1]), (x, y))
                with explorer.backward():
                    loss.backward()
                after_backward(explorer, optimizer, clip=1.0)
            explorer.finish()
        patches.undo()
        found.append((nccl.calls, {name: t.held.clone() for name, t in net.state_dict().items()}))
    return found


@pytest.mark.timeout(300)
def test_devices_send_nothing_that_is_on_the_cpu_and_all_of_them_the_same() -> None:
    first, second = processes.run(trained, 2, timeout_s=240)
    for chosen, (calls, weights), (others, other) in zip(CHOICES, first, second, strict=True):
        # In the order of calls, which NCCL takes for granted. What travels meanwhile has a communicator of its own.
        assert (sorted(calls) if "overlap" in chosen else calls) == (sorted(others) if "overlap" in chosen else others)
        assert len(calls) >= 10
        torch.testing.assert_close(weights, other, rtol=0, atol=0)
