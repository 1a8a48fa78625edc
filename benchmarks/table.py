"""The table that all benchmarks print."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import lightning
import timm
import torch

from examples.demo import hardware


@dataclass
class Row:
    """One figure, from all rounds.

    Attributes:
        configuration: of what was measured.
        figure: what is divided by what.
        ratios: one for each round, or one if it was counted.
        measured: the numerator's median with its unit, or "".
        bound: what the arithmetic allows; None where it says nothing.
        goal: the most that the median may be; None where nothing is required.
        within: the most that the median may be in bounds; None where nothing is required.
    """

    configuration: str
    figure: str
    ratios: list[float] = field(default_factory=list)
    measured: str = ""
    bound: float | None = None
    goal: float | None = None
    within: float | None = None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the goals are met; None if there are none."""
        goals = [self.goal, None if self.bound is None or self.within is None else self.bound * self.within]
        limits = [goal for goal in goals if goal is not None]
        return all(self.median <= limit for limit in limits) if limits else None

    @property
    def cells(self) -> list[str]:
        """What stands in the columns."""
        goals = [] if self.goal is None else [f"{self.goal:g}"]
        if self.within is not None:
            goals.append(f"{self.within:g} × bound")
        spread = f"{min(self.ratios):.3f} to {max(self.ratios):.3f}" if len(self.ratios) > 1 else ""
        return [
            self.configuration,
            self.figure,
            self.measured,
            f"{self.median:.3f}",
            spread,
            "" if self.bound is None else f"{self.bound:.3f}",
            "" if self.bound is None else f"{self.median / self.bound:.2f}",
            ", ".join(goals),
            {None: "", True: "yes", False: "no"}[self.met],
        ]


HEADER = ["configuration", "figure", "measured", "ratio", "spread", "bound", "ratio / bound", "goal", "met"]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown. The spread is from the least to the largest of all rounds."""
    lines = [HEADER, ["---", "---", *["---:"] * 5, "---", "---"], *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(seed: int, start: float) -> str:
    """What a table was made with: versions, hardware, and what else the machine did, since `time.perf_counter()` was
    `start`."""
    load = f", load {os.getloadavg()[0]:.0f} at the end" if hasattr(os, "getloadavg") else ""
    return (
        f"Seed {seed}; Python {platform.python_version()}, torch {torch.__version__},"
        f" lightning {lightning.__version__}, timm {timm.__version__}; {hardware()}{load};"
        f" {time.perf_counter() - start:.0f} s."
    )
