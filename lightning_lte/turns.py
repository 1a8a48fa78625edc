"""What a module logs while heads take turns."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Log = Callable[..., None]


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: list[Any] = field(default_factory=list)
    batch_size: int = 0


class MeanLog:
    """Stands in for a module's `log` while heads take turns, and logs each value once, for all of them.

    Each head logs what it sees of its own slice. Handed on as they come, the last head's would stand for the step.

    Args:
        log: the module's own.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._calls: dict[str, _Call] = {}

    def __call__(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(value, Tensor | numbers.Number):
            self._log(name, value, *args, **kwargs)  # a metric, which has seen all slices in the end
            return
        call = self._calls.setdefault(name, _Call(args, kwargs))
        call.args, call.kwargs = args, kwargs
        call.values.append(value)
        call.batch_size += kwargs.get("batch_size") or 0

    def flush(self) -> None:
        """Log the means, or what else `reduce_fx` asks for."""
        for name, call in self._calls.items():
            values = torch.stack([torch.as_tensor(value).detach().float() for value in call.values])
            reduced = _REDUCTIONS.get(call.kwargs.get("reduce_fx", "mean"), _mean)(values)
            kwargs = {**call.kwargs, **({"batch_size": call.batch_size} if call.batch_size else {})}
            self._log(name, reduced, *call.args, **kwargs)
        self._calls.clear()


def _mean(values: Tensor) -> Tensor:
    return values.mean(0)


_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "sum": lambda v: v.sum(0),
    torch.sum: lambda v: v.sum(0),
    "max": lambda v: v.amax(0),
    torch.max: lambda v: v.amax(0),
    "min": lambda v: v.amin(0),
    torch.min: lambda v: v.amin(0),
}
