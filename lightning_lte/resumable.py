"""What the strategy keeps in checkpoints, and how a run goes on from them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_lte import checkpoint as checkpoints
from lightning_lte.explorer import Explorer
from lightning_lte.files import AtomicFiles
from lightning_lte.report import Report
from lightning_lte.transport import Transport

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class Resumable(_Base):
    """The part of the strategy that saves and resumes; see `checkpoint` for what is in the dictionaries."""

    # The package of Lightning's that the class is for, and what writes its files.
    package: ModuleType
    checkpoint_io_class: type[AtomicFiles]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._explorer: Explorer | None = None
        self._transport = Transport()
        # What a checkpoint saved after `fit` needs of the heads, and the weights that it belongs to.
        self._finished: tuple[checkpoints.State, list[int]] | None = None
        self._report: Report | None = None
        self._generators: Mapping[str, Any] | None = None
        self._resumes_mid_epoch = False

    def report(self) -> Report:
        """Which role each parameter has and why.

        Raises:
            RuntimeError: no `fit` has set it up yet.
        """
        if self._report is None:
            raise RuntimeError("The report is made when `trainer.fit` sets up the model; call it after that has begun.")
        return self._report

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes files: the user's own, or ours in the place of Lightning's, also where another wraps that."""
        lightnings: Any = self.package.plugins.io.TorchCheckpointIO
        chosen: Any = self._checkpoint_io
        if chosen is None or type(chosen) is lightnings:
            chosen = self._checkpoint_io = self.checkpoint_io_class()  # type: ignore[assignment]
        elif type(getattr(chosen, "checkpoint_io", self)) in (type(None), lightnings):
            chosen.checkpoint_io = self.checkpoint_io_class()
        return chosen

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The settings of the user's param groups; the heads' moments are in checkpoint["lte"].

        Before heads begin it is what it always is.
        """
        if self._explorer is None or self._explorer.full_rank:
            return super().optimizer_state(optimizer)
        return self._explorer.substitution.plain_state(self._bare(optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if "optimizer_states" in checkpoint:
            state = self._state_to_save()
            if state is not None:
                checkpoint["lte"] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _state_to_save(self) -> checkpoints.State | None:
        if self._explorer is not None:
            return self._explorer.state_dict()
        if self._finished is None:
            return None
        state, versions = self._finished
        if versions != [p._version for p in self._module.parameters()]:
            self._warn(
                "The weights have changed since `fit`, so this checkpoint keeps nothing of the heads, which belong to"
                " the weights as they were: a run that goes on from it starts fresh heads."
            )
            return None
        return checkpoints.gather_state(state, self._transport)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        explorer = self._explorer
        assert explorer is not None
        for optimizer, saved in zip(explorer.optimizers, checkpoint["optimizer_states"], strict=False):
            if not explorer.substitution.load_plain_state(optimizer, saved):
                self._warn(
                    f"The param groups of {type(optimizer).__name__} in the checkpoint are not like those of this run,"
                    " so their settings (learning rate and the like) were not taken over."
                )
        state = checkpoint.get("lte")
        if state is None and explorer.full_rank:
            super().load_optimizer_state_dict(checkpoint)
            return
        if state is None:
            self._say(
                "This checkpoint was not written by LTE: its weights were loaded and heads start fresh from them; its"
                " optimizer state was not kept, for it belongs to the weights and not to heads."
            )
            return
        undecided = explorer.execution == "auto"
        explorer.load_state_dict(state)
        if explorer.full_rank:
            super().load_optimizer_state_dict(checkpoint)
        explorer.rest()
        devices, streams = state["devices"], state["generators"]
        # On another number of devices there is no telling whose stream goes on where.
        self._generators = streams[self.global_rank] if devices == self.world_size else {}
        if devices != self.world_size:
            self._say(
                f"The checkpoint was written on {devices} device{'s' * (devices > 1)}, and this run has"
                f" {self.world_size}: heads, moments and clocks go on as they were, and random streams start anew."
            )
        if undecided and explorer.execution != "auto":
            self._announce()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._generators is None:
            return
        self._restore_generators()
        loop = self._module.trainer.fit_loop
        progress, fetcher = loop.epoch_loop.batch_progress, loop._data_fetcher
        self._resumes_mid_epoch = progress.current.ready > 0 and not progress.is_last_batch
        # A loader draws from the random stream when its iterator is made. Lightning has made the first one already,
        # and the uninterrupted run makes it here, unless an epoch is yet to be closed: then Lightning makes another.
        just_closed = loop.epoch_loop.restarted_on_train_batch_end
        yet_to_close = loop.restarted_mid_epoch and progress.is_last_batch and not just_closed
        if not self._resumes_mid_epoch and not yet_to_close and fetcher is not None:
            iter(fetcher)

    def _restore_generators(self) -> None:
        """Set the random streams to where the checkpoint has them."""
        if self._generators:
            checkpoints.set_generators(self._generators)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _announce(self) -> None:
        assert self._explorer is not None
        heads = self._explorer.config.heads
        # Begins on a line of its own: the progress bar may hold the one before.
        self._say(f"\nLTE trains through {heads} head{'s' * (heads > 1)}:\n{self.report().summary()}")

    def _bare(self, optimizer: Optimizer) -> Optimizer:
        wrapper = self.package.core.optimizer.LightningOptimizer
        return optimizer._optimizer if isinstance(optimizer, wrapper) else optimizer

    def _say(self, text: str) -> None:
        self.package.utilities.rank_zero.rank_zero_info(text)

    def _warn(self, text: str) -> None:
        self.package.utilities.rank_zero.rank_zero_warn(text)
