"""How many optimizer steps and merges have been done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Clock:
    """Counts steps and merges. All devices count alike, so that they merge together without asking each other.

    A step is a call of an optimizer's step. It counts even where AMP's gradient scaler skips the update, since one
    device may skip where another does not. With several optimizers the one that stepped most often is the clock.

    Args:
        optimizers: how many optimizers there are.

    Attributes:
        merges: merges done.
        last_merge: the value of `step` at the last merge, 0 before the first.
    """

    def __init__(self, optimizers: int = 1) -> None:
        self._steps = [0] * optimizers
        self.merges = 0
        self.last_merge = 0

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return max(self._steps)

    def tick(self, optimizer: int = 0) -> bool:
        """Count a step of an optimizer; whether `step` moved on."""
        before = self.step
        self._steps[optimizer] += 1
        return self.step > before

    def merged(self) -> None:
        """Count a merge."""
        self.merges += 1
        self.last_merge = self.step

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"steps": list(self._steps), "merges": self.merges, "last_merge": self.last_merge}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        steps: Sequence[int] = state["steps"]
        self._steps = list(steps)
        self.merges, self.last_merge = state["merges"], state["last_merge"]
