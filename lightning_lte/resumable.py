"""What the strategy keeps in checkpoints, and how a run goes on from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch.optim import Optimizer

from lightning_lte import checkpoint as checkpoints
from lightning_lte import files, sharded
from lightning_lte.device_state import with_own_settings
from lightning_lte.explorer import Explorer
from lightning_lte.report import Report
from lightning_lte.sharding import Sharding
from lightning_lte.transport import Transport

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object

# Whether rank 0 gathers what devices have of heads and writes one file, or each writes its own into a directory.
CheckpointKind = Literal["gathered", "sharded"]


class Resumable(_Base):
    """The part of the strategy that saves and resumes; see `checkpoint` for what is in the dictionaries.

    Args:
        checkpoint: what it writes, see `CheckpointKind`.
        **kwargs: what `DDPStrategy` takes.

    Raises:
        ValueError: there is no such kind, or a `checkpoint_io` was given that it has no use for.
    """

    # The package of Lightning's that the class is for, and what writes its files.
    package: ModuleType
    checkpoint_io_class: type[files.AtomicFiles]

    def __init__(self, checkpoint: CheckpointKind = "gathered", **kwargs: Any) -> None:
        if checkpoint not in get_args(CheckpointKind):
            raise ValueError(
                f"checkpoint must be one of 'gathered', 'sharded'; received {checkpoint!r}. Give checkpoint='gathered'"
                " for one file, or 'sharded' for a directory to which each device writes what it has."
            )
        self._checkpoint = checkpoint
        super().__init__(**kwargs)
        if self._checkpoint_io is not None:
            self._check_checkpoint_io(self._checkpoint_io)
        self._explorer: Explorer | None = None
        self._transport = Transport()
        self._sharding: Sharding | None = None
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
        self._check_checkpoint_io(io)
        self._checkpoint_io = io

    def _check_checkpoint_io(self, io: CheckpointIO) -> None:
        """Raise for what would write one file of what devices don't gather.

        Raises:
            ValueError: with the plugin.
        """
        if self._checkpoint == "sharded" and type(io) is not self.package.plugins.io.TorchCheckpointIO:
            raise ValueError(
                "With checkpoint='sharded' each device writes into a directory by itself, without a CheckpointIO;"
                f" received {type(io).__name__}. Leave it out, or give checkpoint='gathered'."
            )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The settings of the user's param groups; the heads' moments are in checkpoint["lte"].

        Before heads begin it is what it always is.
        """
        if self._explorer is None or self._explorer.full_rank:
            return super().optimizer_state(optimizer)
        return self._explorer.substitution.plain_state(self._bare(optimizer))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's own, whole; a collective where devices share it out, or rows of base weights."""
        if self._sharding is not None:
            return self._sharding.state_dict()
        return super().lightning_module_state_dict() if self._explorer is None else self._explorer.module_state()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        trains = self._explorer is not None and any(clock.step for clock in self._explorer.clocks)
        if trains and "optimizer_states" in checkpoint:
            # LearningRateFinder trains within `fit`, and goes back: as a run does that is resumed.
            self._begin_anew()
        if str(self.precision_plugin.precision) == "64-true":
            # Lightning converts the module later, and would round in between what the checkpoint has of its weights.
            self.precision_plugin.convert_module(self._module)
        if self._sharding is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            self._sharding.load_state_dict(checkpoint["state_dict"], strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        explorer, transport = self._explorer, self._transport
        if transport.devices != self.world_size:  # no `fit` has made one
            transport = Transport(self.world_size, self.global_rank, timeout=self._timeout)
        path = self._shared_path(filepath, storage_options) if self._checkpoint == "sharded" else None
        with transport.meeting(f"a checkpoint {'outside training' if explorer is None else explorer.where}"):
            own = self._own_state() if "optimizer_states" in checkpoint else None
            if path is not None:
                equal = () if explorer is None else explorer.weight_names
                sharded.save(checkpoint, own, equal, path, transport)
                return
            state = None if own is None else checkpoints.gather_state(own, transport)
        if state is not None:
            checkpoint["lte"] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _shared_path(self, filepath: Any, storage_options: Any) -> str:
        """Where all devices write to: rank 0's path.

        Raises:
            ValueError: it is not on a disk.
        """
        path = files.local_path(self.broadcast(filepath))
        if path is None or storage_options is not None:
            raise ValueError(
                "With checkpoint='sharded' all devices write into a directory on a disk that all of them see; received"
                f" {filepath} and storage_options={storage_options!r}. Give a path on such a disk, or"
                " checkpoint='gathered'."
            )
        return path

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of either kind, whichever lies there."""
        path = files.local_path(checkpoint_path)
        if path is not None and os.path.isdir(path):
            return sharded.load(path, self._module.trainer.state.fn == "fit", weights_only)
        return sharded.unite(super().load_checkpoint(checkpoint_path, weights_only))

    def _own_state(self) -> checkpoints.State | None:
        """What this device has of the heads."""
        if self._explorer is not None:
            return self._explorer.local_state()
        if self._finished is None:
            return None
        state, versions = self._finished
        if versions != [p._version for p in self._module.parameters()]:
            self._warn(
                "The weights have changed since `fit`, so this checkpoint keeps nothing of the heads, which belong to"
                " the weights as they were: a run that goes on from it starts fresh heads."
            )
            return None
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        explorer = self._explorer
        assert explorer is not None
        state = checkpoint.get("lte")
        transport = explorer.transport
        own = None
        if state is not None:
            checkpoints.check_shape(state)
            own = checkpoints.own_state(state, transport.world_size, transport.rank)
        for number, (optimizer, saved) in enumerate(
            zip(explorer.optimizers, checkpoint["optimizer_states"], strict=False)
        ):
            if own is not None:
                # Rank 0 has written its settings, and an optimizer may have found others here.
                saved = {**saved, "param_groups": with_own_settings(saved["param_groups"], own[number])}
            if not explorer.substitution.load_plain_state(optimizer, saved, goes_on=state is not None):
                self._warn(
                    f"The param groups of {type(optimizer).__name__} in the checkpoint are not like those of this run,"
                    " so their settings (learning rate and the like) were not taken over."
                )
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
        devices, streams = state["devices"] * state["shard"], state["generators"]
        # On another number of devices there is no telling whose stream goes on where.
        self._generators = streams[self.global_rank] if devices == self.world_size else {}
        if devices != self.world_size:
            self._say(
                f"The checkpoint was written on {devices} device{'s' * (devices > 1)}, and this run has"
                f" {self.world_size}: heads, moments and clocks go on as they were, and random streams start anew."
            )
        if undecided and explorer.execution != "auto":
            self._announce()

    def _begin_anew(self) -> None:
        """Take the heads out and put new ones in."""
        raise NotImplementedError

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
