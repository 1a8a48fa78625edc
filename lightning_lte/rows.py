"""Rows of several devices that are read from where they lie when they are asked for, and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# How many rows a device has, and what reads them: (rows, ...).
Part = tuple[int, Callable[[], Tensor]]


class Rows:
    """The rows of all devices below each other, as a tensor would have them; each part is read anew for each question.

    Args:
        parts: one for each device, in the order of ranks.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def __len__(self) -> int:
        return sum(count for count, _ in self._parts)

    def __getitem__(self, chosen: int | slice) -> Tensor:
        """A row, or (rows, ...) of several; only the devices that have some of them are read."""
        if isinstance(chosen, int):
            return self[chosen : chosen + 1][0]
        start, stop, step = chosen.indices(len(self))
        assert step == 1
        found, before = [], 0
        for count, read in self._parts:
            low, high = max(start - before, 0), min(stop - before, count)
            if low < high:
                found.append(read()[low:high])
            before += count
        return found[0] if len(found) == 1 else torch.cat(found)

    def dim(self) -> int:
        """Dimensions, with that of rows."""
        return self[:1].dim()
