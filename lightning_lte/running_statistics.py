"""Running statistics of normalisation layers: each head's own while heads take turns, averaged at merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lte.heads import finite_rows, of_good
from lightning_lte.transport import Transport

_KEYS = ("running_mean", "running_var", "num_batches_tracked")
# Of how many samples running statistics are, as normalisers of observations call it. Alone, it may be anything's.
_COUNT = "count"


@dataclass
class _Statistic:
    """One buffer.

    Attributes:
        name: in the user's module.
        module: the buffer is module.`key`.
        buffer: the user's own, which holds the mean as of the last merge where heads have their own.
        turn: number of the local head whose own the module shows; None while it shows the user's.
        own: one for each local head; empty while they share the user's.
        trained_by: number of the optimizer that trains the layer, and with whose merges it is averaged: one of another
            may come between a layer's forward and its backward.
        version: autograd's count of writes to the buffer, after the last of ours.
        written: a copy of the buffer, after the last write of ours; None while heads share it.
    """

    name: str
    module: nn.Module
    key: str
    buffer: Tensor
    trained_by: int = 0
    own: list[Tensor] = field(default_factory=list)
    turn: int | None = None
    version: int = 0
    written: Tensor | None = None

    def accept(self) -> None:
        """Take the buffer as it is for written by us."""
        self.version = self.buffer._version
        self.written = self.buffer.clone() if self.own else None

    @torch.no_grad()
    def give(self) -> None:
        """Give every head what the user's buffer has."""
        for own in self.own:
            own.copy_(self.buffer)
        self.accept()

    def follow(self) -> None:
        """Take the tensor that the module has, where the user's code has put another one there: the head's own in its
        turn, else one for all heads."""
        if isinstance(self.module, torch.jit.ScriptModule):
            return  # which keeps the buffers it was compiled with
        now = self.module._buffers.get(self.key)
        if now is None or now is (self.buffer if self.turn is None else self.own[self.turn]):
            return
        if self.turn is None:
            self.buffer = now
            self.give()
        else:
            self.own[self.turn] = now.detach().clone()  # merges write to it


class RunningStatistics:
    """All running statistics of a module.

    Args:
        module: the user's.
        trained_by: parameter -> number of the optimizer that trains it.
    """

    def __init__(self, module: nn.Module, trained_by: Mapping[nn.Parameter, int] | None = None) -> None:
        self._statistics: list[_Statistic] = []
        for name, layer in module.named_modules():
            buffers = dict(layer.named_buffers(recurse=False))  # of scripted modules, `_buffers` is no dictionary
            keys = [key for key in _KEYS if key in buffers]
            found = {key: buffers[key] for key in [*keys, _COUNT] if keys and key in buffers}
            number = _trainer_of(module, name, trained_by or {}) if found else 0
            self._statistics += [_Statistic(f"{name}.{k}".lstrip("."), layer, k, b, number) for k, b in found.items()]
        # While a merge lasts: those averaged, with their copies as they were; their sums, then counts of finite ones.
        self._taken: list[tuple[_Statistic, Tensor | None]] = []
        self._sums: list[Tensor] = []

    def of(self, number: int) -> RunningStatistics:
        """Those of layers that one optimizer trains."""
        some = RunningStatistics(nn.Module())
        some._statistics = [s for s in self._statistics if s.trained_by == number]
        return some

    def split(self, count: int) -> None:
        """Give each local head its own."""
        for s in self._statistics:
            if isinstance(s.module, torch.jit.ScriptModule):
                continue  # which keeps the buffers it was compiled with
            s.follow()
            s.own = s.own or [s.buffer.clone() for _ in range(count)]
            s.accept()

    def begin(self) -> None:
        """Have all heads go on from the user's buffers as they are now. (Batch norm counts no writes to them.)"""
        for s in self._statistics:
            s.follow()
            if s.own:
                s.give()

    def grow(self, factor: int) -> None:
        """Put `factor` heads in the place of each, which all go on with what that head had."""
        for s in self._statistics:
            s.own = [own.clone() for own in s.own for _ in range(factor)]

    def select(self, head: int | None) -> None:
        """Let the module see one head's own in place of its buffers; None undoes it."""
        for s in self._statistics:
            s.follow()
            if s.own:
                writes = s.buffer._version - s.version
                # Swapped out and in again, as averaged weights are for a validation, they are as they were.
                if writes == 1 or (writes and s.written is not None and not torch.equal(s.buffer, s.written)):
                    # Someone else has reset or loaded them, and means every head's.
                    s.give()
                s.version = s.buffer._version
                s.module._buffers[s.key] = s.buffer if head is None else s.own[head]
                s.turn = head

    @torch.no_grad()
    def take(self, transport: Transport, apart: bool) -> None:
        """Sum over the local heads, in float32 or better, leaving out those that are not finite: they would spoil all
        others.

        Args:
            transport: to the other devices.
            apart: whether they change before `land`, so that a copy of them is needed.
        """
        for s in self._statistics:
            s.follow()
        averaged = [s for s in self._statistics if s.buffer.is_floating_point()]
        self._taken, self._sums = [], []
        if averaged and (transport.devices > 1 or any(s.own for s in averaged)):
            stacks = [torch.stack(s.own or [s.buffer]) for s in averaged]
            finite = [finite_rows(stack) for stack in stacks]
            wide = [torch.promote_types(stack.dtype, torch.float32) for stack in stacks]
            sums = [of_good(*own).sum(0, dtype=dtype) for *own, dtype in zip(stacks, finite, wide, strict=True)]
            self._sums = [*sums, torch.stack([ok.sum() for ok in finite]).to(torch.float32)]
            self._taken = [(s, stack if apart else None) for s, stack in zip(averaged, stacks, strict=True)]

    def exchange(self, transport: Transport) -> None:
        """Sum over all devices. A collective: every device has to call it."""
        transport.sum_(self._sums)
        # Each device has seen samples of its own, also where several share out a head.
        transport.sum_within_(self._sums)

    @torch.no_grad()
    def land(self) -> None:
        """Replace all by their means; what they have seen since then stays."""
        if self._taken:
            *sums, counts = self._sums
            for (s, before), total, count in zip(self._taken, sums, counts, strict=True):
                mean = torch.where(count > 0, total / count, s.buffer)
                for i, own in enumerate(s.own or [s.buffer]):
                    if before is None:
                        own.copy_(mean)
                    else:
                        # Heads that have been given their own since then all began with the one that there was.
                        start = before[min(i, len(before) - 1)]
                        own.copy_(mean + (own - start).nan_to_num(0, 0, 0))
                s.buffer.copy_(mean if s.own else s.buffer)
        for s in self._statistics:
            if s.own and not s.buffer.is_floating_point():
                s.buffer.copy_(s.own[0])
                s.give()
            s.accept()
        self._taken, self._sums = [], []

    def taken_state(self) -> dict[str, dict[str, Tensor]]:
        """What a merge has exchanged and not landed: sums over all heads, and the local ones as they were."""
        if not self._taken:
            return {"totals": {}, "counts": {}, "before": {}}
        *sums, counts = self._sums
        named = [s.name for s, _ in self._taken]
        return {
            "totals": {name: total.cpu() for name, total in zip(named, sums, strict=True)},
            "counts": {name: count.cpu() for name, count in zip(named, counts, strict=True)},
            "before": {s.name: before.cpu() for s, before in self._taken if before is not None},
        }

    def load_taken_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `taken_state`."""
        taken = [s for s in self._statistics if s.name in state["totals"]]
        self._taken = [(s, state["before"][s.name].to(s.buffer.device, copy=True)) for s in taken]
        self._sums = [state["totals"][s.name].to(s.buffer.device, copy=True) for s in taken]
        if taken:
            self._sums.append(torch.stack([state["counts"][s.name] for s in taken]).to(taken[0].buffer.device))

    def rows(self) -> dict[str, Tensor]:
        """What local heads have of their own, by name: (n, *shape)."""
        return {s.name: torch.stack(s.own).cpu() for s in self._statistics if s.own}

    def copies(self) -> dict[str, int]:
        """How many of each there are on this device, by name: n where local heads have their own, else 1."""
        return {s.name: max(1, len(s.own)) for s in self._statistics}

    @torch.no_grad()
    def load_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Take (copies, *shape) of each. The buffers that are not heads' own have to be loaded before."""
        for s in self._statistics:
            if s.name in rows:
                for own, saved in zip(s.own or [s.buffer], rows[s.name], strict=True):
                    own.copy_(saved)
                # Or the next turn would take the buffers for written by someone who means every head's.
                s.accept()


def _trainer_of(module: nn.Module, name: str, trained_by: Mapping[nn.Parameter, int]) -> int:
    """Number of the optimizer that trains a layer, or the innermost module around it of which anything is trained."""
    while True:
        numbers = [trained_by[p] for p in module.get_submodule(name).parameters() if p in trained_by]
        if numbers or not name:
            return min(numbers, default=0)
        name = name.rpartition(".")[0]
