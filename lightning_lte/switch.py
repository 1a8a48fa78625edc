"""Which of the local heads act in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Position = int | Literal["all"] | None


class Switch:
    """One switch shared by all layers of a model.

    Args:
        count: n, the number of local heads.
        device: of the layers' parameters.

    Attributes:
        count: see above.
        left_out: layers that compute without heads for now, as their inputs are not the batch.
        acting: which heads act: "all", "one", or None while none does.
        number: (1,), that of the head that acts alone, for compiled code: see `layers.base.LayerState.head`.
    """

    def __init__(self, count: int, device: torch.device | None = None) -> None:
        self.count = count
        self.left_out: set[nn.Module] = set()
        self._device = device or torch.device("cpu")
        self._numbers: list[torch.Tensor] = []
        self.position = None

    @property
    def position(self) -> Position:
        """None while no head acts and every layer shows its merged weight; "all" while dimension 0 of every layer's
        input is n equal slices, one for each head; a number while that head acts alone."""
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        self._position: Position = position
        self.acting: Literal["all", "one"] | None = "all" if position == "all" else None if position is None else "one"
        while len(self._numbers) < self.count:  # of heads there may be more in the end
            self._numbers.append(torch.tensor([len(self._numbers)], device=self._device))
        self.number = self._numbers[position if isinstance(position, int) else 0]

    @contextmanager
    def at(self, position: Position) -> Iterator[None]:
        """Hold a position inside a `with` block."""
        before, fast = self.position, torch.backends.mha.get_fastpath_enabled()
        try:
            self.position = position
            # In eval mode nn.TransformerEncoder has a path that uses its layers' weights without calling the layers.
            torch.backends.mha.set_fastpath_enabled(fast and position is None)
            yield
        finally:
            self.position = before
            torch.backends.mha.set_fastpath_enabled(fast)
