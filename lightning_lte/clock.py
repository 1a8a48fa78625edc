"""How many steps of an optimizer and merges of what it trains have been done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Clock:
    """Counts the steps of one optimizer and the merges of the weights that it trains.

    All devices count alike, so that they merge together without asking each other. A step is a call of the optimizer's
    step. It counts even where AMP's gradient scaler skips the update, since one device may skip where another does not.

    Attributes:
        step: optimizer steps done.
        merges: merges done.
        last_merge: the value of `step` at the last merge, 0 before the first.
    """

    step: int = 0
    merges: int = 0
    last_merge: int = 0

    @property
    def unmerged(self) -> bool:
        """Whether there were steps since the last merge."""
        return self.step > self.last_merge

    def merged(self) -> None:
        """Count a merge."""
        self.merges += 1
        self.last_merge = self.step

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return {"step": self.step, "merges": self.merges, "last_merge": self.last_merge}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The inverse of `state_dict`."""
        self.step, self.merges, self.last_merge = state["step"], state["merges"], state["last_merge"]
