"""Buffers that are not running statistics, such as centers and codebooks that move with the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from lightning_lte.transport import Transport


class Buffers:
    """The buffers of a module that training writes to, which devices have in common at merges.

    All take those of the first device, as `DistributedDataParallel` has them do in every forward: whatever a buffer is,
    training can go on from that, and often not from a mean (of queues, indices, flags).

    Args:
        module: the user's.
        others: names of buffers that are treated otherwise.

    Attributes:
        shared: whether devices have them in common; False leaves each device its own.
    """

    def __init__(self, module: nn.Module, others: Collection[str]) -> None:
        self._module, self._others = module, frozenset(others)
        self.shared = True
        self._seen = {name: (buffer, buffer._version) for name, buffer in self._own()}
        # Names of those that were written to on any device.
        self._written: set[str] = set()

    def found(self) -> dict[str, str]:
        """Names of those that were written to on this device, beside those that are known to be."""
        if not self.shared:
            return {}
        now = dict(self._own())
        same = {name for name, (buffer, version) in self._seen.items() if now.get(name) is buffer}
        same = {name for name in same if self._seen[name][1] == now[name]._version}
        return {name: "" for name in now.keys() - same - self._written}

    @torch.no_grad()
    def take_first(self, transport: Transport, found: Iterable[str]) -> None:
        """Take those of the first device. A collective: every device has to call it.

        Args:
            transport: to the other devices.
            found: what any device has found; the same on all of them.
        """
        self._written.update(found)
        now = dict(self._own())
        # Past autograd, which may need them for a backward of another optimizer.
        values = [now[name].data for name in sorted(self._written) if name in now]
        transport.broadcast_(values)
        if transport.within is not None:
            transport.within.broadcast_(values)

    def _own(self) -> list[tuple[str, Tensor]]:
        return [(name, buffer) for name, buffer in self._module.named_buffers() if name not in self._others]


@torch.no_grad()
def put_back_(buffer: Tensor, value: Tensor) -> None:
    """Write what a buffer had, or nothing if it has that yet: what is written to travels at each merge from then on."""
    comparable = buffer.layout == torch.strided and not buffer.is_nested
    if not (comparable and torch.equal(buffer, value.to(buffer.device, buffer.dtype))):
        buffer.copy_(value)
