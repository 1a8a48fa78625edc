"""How long something takes, by the time of the device that computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the times of blocks.

    A GPU computes later than it is told to, and the host waits in a block for all that it had to do before, too. So its
    times are between events that it notes as it comes to them, in the stream that is current then.

    Args:
        device: whose time counts.
        clock: of the host, in seconds, for a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._laps: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """For a block whose time counts."""
        start = self._now()
        yield
        self._laps.append((start, self._now()))

    @property
    def seconds(self) -> float:
        """Of all blocks. It waits for a GPU, if that has not come to their ends."""
        return sum(self._between(*lap) for lap in self._laps)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000  # of milliseconds
