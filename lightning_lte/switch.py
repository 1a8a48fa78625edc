"""Which of the local heads act in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn


class Switch:
    """One switch shared by all layers of a model.

    Attributes:
        count: n, the number of local heads.
        left_out: layers that compute without heads for now, as their inputs are not the batch.
        position: None while no head acts and every layer shows its merged weight; "all" while dimension 0 of every
            layer's input is n equal slices, one for each head; a number while that head acts alone.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.position: int | Literal["all"] | None = None
        self.left_out: set[nn.Module] = set()

    @contextmanager
    def at(self, position: int | Literal["all"] | None) -> Iterator[None]:
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
