"""How long things take, on a CPU or on a GPU.

A GPU computes later than it is told to, and training does not wait for it. So its times are between events that it
notes as it comes to them, and they are read in the end: while steps are timed, the host runs ahead of the device as far
as it can. Where it can't, as it takes longer than the device, that is in the times, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lightning_lte.stopwatch import Stopwatch

# On a GPU steps are timed so many in a row. So many before them find it idle, or the host further ahead than the steps
# before would let it be.
IN_A_ROW, LEAD = 10, 3


def counts_processor_time(device: torch.device) -> bool:
    """Whether a process's time on the processor is what it takes where nothing else runs."""
    return device.type == "cpu" and torch.get_num_threads() == 1


@contextmanager
def timed(device: torch.device) -> Iterator[Stopwatch]:
    """What a block takes."""
    watch = Stopwatch(device, time.process_time if counts_processor_time(device) else time.perf_counter)
    with watch.running():
        yield watch


@contextmanager
def timed_alone(device: torch.device) -> Iterator[Stopwatch]:
    """`timed` for what is done once and not in a row, with all that the host does: the device is idle as it begins."""
    wait(device)
    with timed(device) as watch:
        yield watch


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Seconds:
    """Times of a training step, or of several. They are read when they are asked for.

    Attributes:
        spans_forward: of the forward, with the loss.
        spans_backward: of the backward, with what LTE looks at after it.
        spans_step: of the optimizer's step, with what LTE does after it.
        steps: how many these are of.
    """

    spans_forward: list[Stopwatch] = field(default_factory=list)
    spans_backward: list[Stopwatch] = field(default_factory=list)
    spans_step: list[Stopwatch] = field(default_factory=list)
    steps: int = 1

    @property
    def forward(self) -> float:
        """Seconds of a step's forward, in the mean."""
        return self._of(self.spans_forward)

    @property
    def backward(self) -> float:
        """Likewise of its backward."""
        return self._of(self.spans_backward)

    @property
    def step(self) -> float:
        """Likewise of the optimizer."""
        return self._of(self.spans_step)

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def whole(self) -> float:
        """The whole step."""
        return self.both + self.step

    def _of(self, spans: Sequence[Stopwatch]) -> float:
        return sum(watch.seconds for watch in spans) / self.steps


def in_a_row(step: Callable[[], Seconds], device: torch.device) -> Seconds:
    """A step, and on a GPU the mean of several in a row, as training has them."""
    if device.type != "cuda":
        return step()
    wait(device)
    for _ in range(LEAD):
        step()
    done = [step() for _ in range(IN_A_ROW)]
    return Seconds(
        [span for own in done for span in own.spans_forward],
        [span for own in done for span in own.spans_backward],
        [span for own in done for span in own.spans_step],
        IN_A_ROW,
    )
