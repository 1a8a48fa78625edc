"""When to merge: a schedule answers "merge now?" from integers alone."""

from __future__ import annotations

from abc import ABC, abstractmethod


class MergeSchedule(ABC):
    """Answers "merge now?" after every optimizer step. It holds no state, so a resumed run gets the same answers."""

    @abstractmethod
    def due(self, step: int, last_merge: int) -> bool:
        """Say whether to merge now.

        Args:
            step: optimizer steps done since training began, counted from 1.
            last_merge: the value of `step` at the last merge, 0 before the first.
        """

    def delay(self, group: int, groups: int) -> int:
        """Steps that a group of weights waits after a merge is due, where groups merge in turn.

        Args:
            group: number of the group, from 0.
            groups: how many there are.
        """
        return group


class Every(MergeSchedule):
    """Merge whenever `period` optimizer steps have passed since the last merge (T in the paper).

    Raises:
        TypeError: `period` is not an integer.
        ValueError: `period` is below 1.
    """

    def __init__(self, period: int = 10) -> None:
        if isinstance(period, bool) or not isinstance(period, int):
            raise TypeError(
                f"merge_every must be a whole number of optimizer steps or a MergeSchedule; received {period!r}."
                " Give an int such as merge_every=10."
            )
        if period < 1:
            raise ValueError(
                f"merge_every must be at least 1 optimizer step; received {period}."
                " Give merge_every=1 to merge after every step."
            )
        self.period = period

    def due(self, step: int, last_merge: int) -> bool:
        return step - last_merge >= self.period

    def delay(self, group: int, groups: int) -> int:
        """Groups are spread evenly over the period."""
        return group * self.period // groups

    def __repr__(self) -> str:
        return f"Every({self.period})"


def as_schedule(merge_every: int | MergeSchedule) -> MergeSchedule:
    """Turn what the user gave as `merge_every` into a schedule.

    Raises:
        TypeError, ValueError: see `Every`.
    """
    return merge_every if isinstance(merge_every, MergeSchedule) else Every(merge_every)
