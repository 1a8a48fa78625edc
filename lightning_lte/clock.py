"""How many steps of an optimizer and merges of what it trains have been done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass
class Clock:
    """Counts the steps of one optimizer and the merges of the weights that it trains.

    All devices count alike, so that they merge together without asking each other. A step is a call of the optimizer's
    step. It counts even where AMP's gradient scaler skips the update, since one device may skip where another does not.

    Attributes:
        step: optimizer steps done.
        merges: merges done.
        last_merge: the value of `step` when a merge was last due; before the first 0, or the step after which heads
            began.
        groups_left: groups of weights that have not merged since then; 0 where all merge together.
        last_whole: the value of `step` when all weights had just been merged.
    """

    step: int = 0
    merges: int = 0
    last_merge: int = 0
    groups_left: int = 0
    last_whole: int = 0

    @property
    def unmerged(self) -> bool:
        """Whether there were steps since all weights were merged."""
        return self.step > self.last_whole

    def begin(self, groups: int) -> None:
        """Merges of so many groups of weights are due from now on."""
        self.last_merge, self.groups_left = self.step, groups

    def merged(self) -> None:
        """Count a merge."""
        self.merges += 1

    def settled(self) -> None:
        """Note that all weights have just been merged."""
        self.last_merge = self.last_whole = self.step
        self.groups_left = 0

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The inverse of `state_dict`."""
        for key in asdict(self):
            setattr(self, key, state[key])
