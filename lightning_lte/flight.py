"""A merge on its way: its exchange runs in a thread of its own while training goes on."""

from __future__ import annotations

import threading
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
        device: where it is computed; on CUDA its exchange has a stream of its own.

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
        device: torch.device | None = None,
    ) -> None:
        self.merge, self.number, self.group, self.lands_at = merge, number, group, lands_at
        self._error: BaseException | None = None
        self._device = device
        self._stream = _stream_on(device) if device is not None and device.type == "cuda" else None
        self.wait_for_training()
        # Python does not wait for it at its end: a device that is gone would keep it for ever.
        self._thread = threading.Thread(target=self._exchange, args=(after,), name="lte-merge", daemon=True)
        if exchanged:
            self._thread = threading.Thread()
        self._thread.start()

    def wait(self) -> None:
        """Wait until all devices have exchanged what they had to.

        Raises:
            RuntimeError: the exchange failed.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait_for_training(self) -> None:
        """Have the stream wait for what training has asked of the device until now.

        For when it starts; and when it has landed, as the stream's next exchange gets the memory that it lets go, and
        is not to write to it before training has read it.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to land it in another process. It waits for the exchange."""
        self.wait()
        places = {"number": self.number, "group": self.group, "lands_at": self.lands_at}
        return {**places, "merge": self.merge.state_dict()}

    def _exchange(self, after: Flight | None) -> None:
        try:
            if after is not None:
                after._thread.join()
            if self._stream is not None:
                # Not in a block, at whose end the thread would turn to device 0, where it began, and take memory there.
                torch.cuda.set_stream(self._stream)
            self.merge.exchange()
        except BaseException as error:
            self._error = error
