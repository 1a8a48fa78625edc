"""When to merge: a schedule answers "merge now?" from integers alone."""

from __future__ import annotations

import inspect
import math
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class MergeSchedule(ABC):
    """Answers "merge now?" after every optimizer step. It holds no state, so a resumed run gets the same answers.

    Attributes:
        before_validation: whether to merge what is not merged yet before each validation, too. That is no question of
            steps, so `due` can't answer it: whoever runs the validation (`LTEStrategy`, or you in a plain loop) does.
    """

    before_validation: bool = False

    @abstractmethod
    def due(self, step: int, last_merge: int) -> bool:
        """Say whether to merge now.

        All devices have to get the same answer without asking each other, so it may depend on the arguments alone.

        Args:
            step: optimizer steps done since training began, counted from 1; those before heads begin
                (`full_rank_steps`) count, too.
            last_merge: the value of `step` at the last merge; before the first 0, or the step after which heads began.
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
        if isinstance(period, bool) or not isinstance(period, int | np.integer):
            raise TypeError(
                "merge_every must be a whole number of optimizer steps, a MergeSchedule or a function"
                f" (step, last_merge) -> bool; received {period!r}. Give an int such as merge_every=10."
            )
        if period < 1:
            raise ValueError(
                f"merge_every must be at least 1 optimizer step; received {period}."
                " Give merge_every=1 to merge after every step."
            )
        self.period = operator.index(period)

    def due(self, step: int, last_merge: int) -> bool:
        return step - last_merge >= self.period

    def delay(self, group: int, groups: int) -> int:
        """Groups are spread evenly over the period."""
        return group * self.period // groups

    def __repr__(self) -> str:
        return f"Every({self.period})"


class At(MergeSchedule):
    """Merge after given optimizer steps, and at no others.

    As with every schedule, a last merge comes when training ends.

    Args:
        steps: optimizer steps, counted from 1, in any order.

    Raises:
        TypeError: `steps` is not a list of integers.
        ValueError: there is none, or one is below 1.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        example = "At([100, 200, 400])"
        if isinstance(steps, str | bytes) or not isinstance(steps, Iterable):
            raise TypeError(f"The steps of At must be a list of whole numbers; received {steps!r}. Give {example}.")
        self.steps = tuple(sorted({_whole("A step of At", step, 1, example) for step in steps}))
        if not self.steps:
            raise ValueError(f"The steps of At must be one at least; received none. Give {example}.")
        self._steps = frozenset(self.steps)

    def due(self, step: int, last_merge: int) -> bool:
        return step in self._steps

    def __repr__(self) -> str:
        return f"At({list(self.steps)})"


class Piecewise(MergeSchedule):
    """Merge with a period that changes at given steps.

        Piecewise({0: 5, 1000: 20})  # after steps 5, 10, ..., 995, and then 1015, 1035, ...

    From step s on, until the next one that is given, a merge is due whenever that many steps have passed since the last
    one. So a longer period that begins while a shorter one runs prolongs it, and a shorter one ends it, at once if as
    many steps have passed.

    Args:
        periods: optimizer step s, 0 for the start -> period from s on, in optimizer steps.

    Raises:
        TypeError: not a mapping of integers to integers.
        ValueError: there is no period for the start, a step is below 0, or a period below 1.
    """

    def __init__(self, periods: Mapping[int, int]) -> None:
        example = "Piecewise({0: 5, 1000: 20})"
        if not isinstance(periods, Mapping):
            raise TypeError(
                f"The periods of Piecewise must map steps to periods; received {periods!r}. Give {example}."
            )
        self.periods = dict(
            sorted(
                (_whole("A step of Piecewise", step, 0, example), _whole("A period of Piecewise", period, 1, example))
                for step, period in periods.items()
            )
        )
        if 0 not in self.periods:
            raise ValueError(
                "The periods of Piecewise must say what holds from the start, step 0, on; received periods from"
                f" {list(self.periods)} on. Give {example}."
            )
        self._starts, self._lengths = list(self.periods), list(self.periods.values())

    def due(self, step: int, last_merge: int) -> bool:
        return step - last_merge >= self._lengths[bisect_right(self._starts, step) - 1]

    def __repr__(self) -> str:
        return f"Piecewise({self.periods})"


class Growing(MergeSchedule):
    """Merge with a period that grows from merge to merge by a factor, up to a last one.

        Growing(10, 1.5, 100)  # after steps 10, 25, 47, 81, ..., and in the end every 100

    For heads that are to meet often in the beginning, and later on rarely, which saves communication. Periods that are
    multiplied by `factor` at every merge add up to a geometric series, after whose first t steps the period is

        min(last, first + (factor - 1) t),   t = step of the last merge - start,   rounded to whole steps,

    and this is how it is computed: from the last merge alone, without counting merges. So the period also grows by the
    steps that were done where merges come between (by hand, or before validation). Without such, each period is
    `factor` times the one before to within one step.

    Args:
        first: the first period, in optimizer steps.
        factor: by what the period grows at each merge; 1 leaves it as it is.
        last: the longest period, in optimizer steps.
        start: optimizer steps after which periods begin to grow: as many as `full_rank_steps`, if there are some.

    Raises:
        TypeError: a number of steps is not an integer, or the factor not a number.
        ValueError: the first period is below 1, the last below the first, the factor below 1 or not finite, or the
            start below 0.
    """

    def __init__(self, first: int, factor: float, last: int, start: int = 0) -> None:
        example = "Growing(first=10, factor=1.5, last=100)"
        self.first = _whole("The first period of Growing", first, 1, example)
        self.last = _whole("The last period of Growing", last, 1, example)
        self.start = _whole("The start of Growing", start, 0, example)
        if isinstance(factor, bool) or not isinstance(factor, int | float | np.number):
            raise TypeError(f"The factor of Growing must be a number; received {factor!r}. Give {example}.")
        self.factor = float(factor)
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(
                f"The factor of Growing must be finite and at least 1, as periods don't shrink; received {factor}."
                f" Give {example}, or Piecewise for periods of any kind."
            )
        if self.last < self.first:
            raise ValueError(
                "The last period of Growing must be at least as long as the first; received"
                f" first={self.first}, last={self.last}. Give {example}."
            )

    def due(self, step: int, last_merge: int) -> bool:
        grown = self.first + (self.factor - 1) * max(0, last_merge - self.start)
        return step - last_merge >= round(min(self.last, grown))

    def __repr__(self) -> str:
        start = f", start={self.start}" if self.start else ""
        return f"Growing({self.first}, {self.factor}, {self.last}{start})"


class BeforeValidation(MergeSchedule):
    """Merge before each validation, so that it sees all that heads have learned; and besides by another schedule.

        BeforeValidation(also=50)  # the period of 50 steps begins anew at each validation

    Without it, a validation in the middle of a period sees the weights as of the last merge. The sanity check before
    training does not merge. In a plain loop call `explorer.merge()` before you validate: there the flag is yours to
    read, as `explorer.merges_before_validation`.

    Args:
        also: when to merge besides: what `merge_every` takes. None means at validations alone.

    Raises:
        TypeError, ValueError: see `as_schedule`.
    """

    before_validation = True

    def __init__(self, also: int | MergeSchedule | Callable[[int, int], bool] | None = None) -> None:
        self.also = None if also is None else as_schedule(also)

    def due(self, step: int, last_merge: int) -> bool:
        return self.also is not None and self.also.due(step, last_merge)

    def delay(self, group: int, groups: int) -> int:
        return group if self.also is None else self.also.delay(group, groups)

    def __repr__(self) -> str:
        return f"BeforeValidation({'' if self.also is None else f'also={self.also!r}'})"


class When(MergeSchedule):
    """Merge when a function of your own says so: what a function given as `merge_every` becomes.

    Args:
        function: takes `step` and `last_merge`, see `MergeSchedule.due`, and returns True or False. It must give the
            same answer for the same numbers, on every device and in a resumed run.

    Raises:
        TypeError: it can't be called with two numbers; or, when it is asked, its answer is no bool.
    """

    def __init__(self, function: Callable[[int, int], bool]) -> None:
        if not callable(function) or not _takes_two(function):
            raise TypeError(
                "A function that says when to merge must take (step, last_merge) and return a bool; received"
                f" {function!r}. Give, for instance, merge_every=lambda step, last_merge: step in (100, 200, 400)."
            )
        self.function = function

    def due(self, step: int, last_merge: int) -> bool:
        answer = self.function(step, last_merge)
        # `step % 10`, true at all other steps than one thinks, and a forgotten `return` are to be noticed.
        if not isinstance(answer, bool | np.bool_):
            raise TypeError(
                f"A function that says when to merge must return a bool; received {answer!r} from {self.function!r} at"
                f" step {step}. Return a comparison such as step - last_merge >= 10."
            )
        return bool(answer)

    def __repr__(self) -> str:
        return f"When({getattr(self.function, '__qualname__', repr(self.function))})"


def as_schedule(merge_every: int | MergeSchedule | Callable[[int, int], bool]) -> MergeSchedule:
    """Turn what the user gave as `merge_every` into a schedule.

    Raises:
        TypeError, ValueError: see `Every` and `When`.
    """
    if isinstance(merge_every, MergeSchedule):
        return merge_every
    if isinstance(merge_every, type):
        raise TypeError(
            f"merge_every must be a schedule and not a class; received the class {merge_every.__name__}. Make a"
            " schedule of it, such as merge_every=Every(10)."
        )
    return When(merge_every) if callable(merge_every) else Every(merge_every)


def _whole(name: str, value: Any, least: int, example: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number; received {value!r}. Give {example}, for instance.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; received {value}. Give {example}, for instance.")
    return operator.index(value)


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with two numbers; True where that can't be seen."""
    try:
        inspect.signature(function).bind(1, 0)
    except ValueError:  # a builtin without a signature
        return True
    except TypeError:
        return False
    return True
