"""A merge on its way: its exchange runs in a thread of its own while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from lightning_lte.merge import Merge


@cache
def _stream_on(device: torch.device) -> torch.cuda.Stream:
    """One for all flights: torch has 32, and its allocator keeps blocks for each that was used."""
    return torch.cuda.Stream(device)


class Flight:
    """A merge that was started and has not landed.

    Args:
        merge: started, or restored with all that was exchanged.
        number: of the optimizer that trains its weights.
        group: of its weights.
        lands_at: the step of that optimizer after which it lands.
        after: the one that started before it, and exchanges before it: on all devices in the same order.
        exchanged: whether that has been done.
        devices: CUDA devices whose streams have to be kept in order.

    Attributes:
        merge, number, group, lands_at: see above.
    """

    def __init__(
        self,
        merge: Merge,
        number: int,
        group: int,
        lands_at: int,
        after: Flight | None = None,
        exchanged: bool = False,
        devices: Sequence[torch.device] = (),
    ) -> None:
        self.merge, self.number, self.group, self.lands_at = merge, number, group, lands_at
        self._error: BaseException | None = None
        self._device = devices[0] if devices else None
        self._stream = None if self._device is None else _stream_on(self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Python does not wait for it at its end: a device that is gone would keep it for ever.
        self._thread = threading.Thread(target=self._exchange, args=(after,), name="lte-merge", daemon=True)
        if exchanged:
            self._thread = threading.Thread()
        self._thread.start()

    def wait(self) -> float:
        """Wait until all devices have exchanged what they had to; returns the seconds that took.

        Raises:
            RuntimeError: the exchange failed.
        """
        start = time.perf_counter()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """What is needed to land it in another process. It waits for the exchange."""
        self.wait()
        places = {"number": self.number, "group": self.group, "lands_at": self.lands_at}
        return {**places, "merge": self.merge.state_dict()}

    def _exchange(self, after: Flight | None) -> None:
        try:
            if after is not None:
                after._thread.join()
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self.merge.exchange()
        except BaseException as error:
            self._error = error
