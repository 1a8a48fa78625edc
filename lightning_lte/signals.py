"""What a cluster asks of a run by signals, done when no device is in the middle of a step."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from lightning_lte.explorer import Explorer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Signals:
    """Answers signals for all devices alike, between two batches.

    Lightning does so at once, inside the signal's handler. On SLURM's request to requeue that is a checkpoint: in the
    middle of a step, and a collective, while devices are steps apart and some of them wait in a merge. So it waits
    until a merge has told all devices, and then until the batch has ended; on one device for the latter alone. Before
    heads begin devices tell each other after each batch. On SIGTERM it is a broadcast, which meets other devices'
    merges likewise, and is left out: merges tell who was told to terminate.

    Args:
        trainer: whose signals they are; its handlers are not registered yet.
        explorer: whose devices tell each other.
    """

    def __init__(self, trainer: Trainer, explorer: Explorer) -> None:
        self._trainer, self._explorer = trainer, explorer
        self._connector: Any = trainer._signal_connector
        self._loop: Any = trainer.fit_loop.epoch_loop
        self._several = explorer.transport.devices > 1
        self._closed = False
        self._requeue: Any = self._connector._slurm_sigusr_handler_fn
        self._advanced = self._loop.on_advance_end
        self._exchanged: list[tuple[Any, str]] = []
        environment: Any = trainer._accelerator_connector.cluster_environment
        if getattr(environment, "auto_requeue", False):
            self._exchange(self._connector, "_slurm_sigusr_handler_fn", self._on_requeue)
            self._exchange(self._loop, "on_advance_end", self._between_batches)
        if self._several:
            self._exchange(self._connector, "_sigterm_notifier_fn", self._on_terminate)
            # Lightning asks all devices before every batch whether one was told to terminate. Between merges devices
            # don't talk; they ask each other when they merge.
            self._exchange(self._loop, "_broadcast_sigterm_tensor", lambda: None)

    def close(self) -> None:
        """Leave all to Lightning again."""
        self._closed = True
        while self._exchanged:
            owner, name = self._exchanged.pop()
            vars(owner).pop(name, None)

    def _exchange(self, owner: Any, name: str, function: Any) -> None:
        setattr(owner, name, function)
        self._exchanged.append((owner, name))

    def _on_requeue(self, signum: int, frame: Any) -> None:
        if self._closed:  # and Lightning's own answers, or that of heads that have begun anew
            self._connector._slurm_sigusr_handler_fn(signum, frame)
            return
        self._explorer.flags["requeue"] = True

    def _on_terminate(self, *_: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._connector.received_sigterm:
            launcher.kill(signal.SIGTERM)
        self._connector.received_sigterm = True

    def _between_batches(self, *args: Any) -> None:
        if self._explorer.terminated if self._several else self._connector.received_sigterm:
            self._requeue_if_asked()  # now, as Lightning leaves from there
        self._advanced(*args)
        self._requeue_if_asked()

    def _requeue_if_asked(self) -> None:
        explorer = self._explorer
        if self._several and explorer.full_rank:
            explorer.tell()
        if explorer.requeue if self._several else explorer.flags["requeue"]:
            explorer.requeue = explorer.flags["requeue"] = False
            self._requeue(signal.SIGUSR1, None)
