"""The Lightning strategy: where things sit, and in which order they happen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_lte import batch as batches
from lightning_lte import checkpoint as checkpoints
from lightning_lte import execution
from lightning_lte.callback import LTECallback
from lightning_lte.config import AfterMerge, Execution, Init, LTEConfig, ReplicaPolicy
from lightning_lte.explorer import Explorer
from lightning_lte.merge import MergeRecord
from lightning_lte.report import Report
from lightning_lte.schedule import MergeSchedule
from lightning_lte.transport import Transport, destroy_at_exit

# Seconds that devices wait for each other where training was interrupted and some of them may be gone.
_AGREE_TIMEOUT_S = 30.0


class LTEStrategy(DDPStrategy):
    """Trains a LightningModule through parallel low-rank heads (LoRA-the-Explorer, arXiv 2402.16828).

        Trainer(strategy=LTEStrategy(heads=32, merge_every=10))

    In `fit`, each linear layer's weight W gets `heads` pairs of factors, dealt out over the devices. The optimizers
    train these, each head on its own slice of the data, and every `merge_every` steps the mean of what the heads have
    learned is added to W. Between merges devices don't communicate. See `LTEConfig` for the symbols and reasons behind
    the arguments.

    Args:
        heads: N, over all devices, a multiple of their number. None means one per device.
        merge_every: T, optimizer steps between merges, or a `MergeSchedule`.
        rank: r, inner width of the factors.
        alpha: numerator of the scale s = alpha / r; None means s = 2.
        after_merge: "keep" factors and moments (the paper's appendix A.2) or "reset" B to zero (its Algorithm 1).
        reset_a: with "reset", "keep" A or "redraw" it.
        reset_moments: with "reset", the fraction of moments set to zero, the smallest first.
        target_modules: patterns of module names; only these are factored. None means every layer that can be.
        exclude_modules: patterns of module names that are not factored.
        rank_pattern: pattern of module names -> rank.
        alpha_pattern: pattern of module names -> alpha.
        split: pattern of module names -> parts of a fused projection that have factors of their own.
        replicas: trainable parameters that are not factored: "merge" averages them at merges, "step" their gradients
            at every step, "freeze" leaves them as they are.
        init: how A starts: "orthogonal", "kaiming" or "xavier".
        seed: heads are drawn from it, their layer's name and their number. None means Lightning's global seed, or 0.
        execution: how heads share a device: "batched" in one forward, "sequential" in turn, "auto" batched where that
            is proved right on the first batch.
        **kwargs: what `DDPStrategy` takes. Its arguments for the DistributedDataParallel wrapper have no effect.

    Raises:
        TypeError, ValueError: see `LTEConfig`.
    """

    strategy_name = "lte"

    def __init__(
        self,
        heads: int | None = None,
        merge_every: int | MergeSchedule = 10,
        *,
        rank: int = 16,
        alpha: float | None = None,
        after_merge: AfterMerge = "keep",
        reset_a: Literal["keep", "redraw"] = "keep",
        reset_moments: float = 0.0,
        target_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] = (),
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        split: Mapping[str, int] | None = None,
        replicas: ReplicaPolicy = "merge",
        init: Init = "orthogonal",
        seed: int | None = None,
        execution: Execution = "auto",
        **kwargs: Any,
    ) -> None:
        self._heads = heads
        self._choices: dict[str, Any] = {
            "merge_every": merge_every,
            "rank": rank,
            "alpha": alpha,
            "after_merge": after_merge,
            "reset_a": reset_a,
            "reset_moments": reset_moments,
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "rank_pattern": rank_pattern or {},
            "alpha_pattern": alpha_pattern or {},
            "split": split or {},
            "replicas": replicas,
            "init": init,
            "seed": seed,
            "execution": execution,
        }
        LTEConfig(heads=1 if heads is None else heads, **self._choices)
        super().__init__(**kwargs)
        without_effect = sorted(
            {*self._ddp_kwargs, *(k for k in ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper") if kwargs.get(k))}
            | ({"model_averaging_period"} if kwargs.get("model_averaging_period") else set())
        )
        if without_effect:
            rank_zero_warn(
                "LTE does not wrap the module in DistributedDataParallel, so these arguments have no effect:"
                f" {', '.join(without_effect)}. Leave them out."
            )
        self._explorer: Explorer | None = None
        self._finished: Explorer | None = None
        self._report: Report | None = None
        self._resume_state: Mapping[str, Any] | None = None
        self._synchronise = True
        self._checked_batch = False
        self.measure = True

    # ---- what users and the callback look at

    @property
    def config(self) -> LTEConfig:
        """The choices of this run; `heads=None` is resolved once the number of devices is known."""
        return LTEConfig(heads=self._heads or self._world_size, **self._choices)

    @property
    def explorer(self) -> Explorer | None:
        """The core at work; None outside `fit`."""
        return self._explorer

    @property
    def last_record(self) -> MergeRecord | None:
        """What happened at the last merge."""
        return self._explorer.last_record if self._explorer else None

    def report(self) -> Report:
        """Which role each parameter has and why.

        Raises:
            RuntimeError: no `fit` has set it up yet.
        """
        if self._report is None:
            raise RuntimeError("The report is made when `trainer.fit` sets up the model; call it after that has begun.")
        return self._report

    # ---- processes

    @property
    def _world_size(self) -> int:
        return self.num_nodes * max(1, self.num_processes)

    def _configure_launcher(self) -> None:
        # One process needs none; Lightning refuses notebooks where there is one.
        if self._world_size > 1:
            super()._configure_launcher()

    def setup_environment(self) -> None:
        if self.root_device.type == "mps":
            raise ValueError(
                "LTE runs on CPU and CUDA devices; received an MPS device, which Lightning's distributed strategies"
                " don't support. Give Trainer(accelerator='cpu', ...)."
            )
        self.config.local_heads(self._world_size)
        if self._world_size > 1:
            super().setup_environment()
            destroy_at_exit()
            return
        # What DDPStrategy does, less the process group and the seed that is set again for other processes.
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()

    # ---- setting up

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = model.trainer
        if self._world_size == 1:
            # Lightning takes every subclass of DDPStrategy for distributed, and would shuffle all training data.
            trainer._accelerator_connector.use_distributed_sampler = False
        if trainer.state.fn == TrainerFn.FITTING:
            # First, so that the callbacks after it see merged weights when training ends.
            own = [c for c in trainer.callbacks if isinstance(c, LTECallback)] or [LTECallback()]  # type: ignore[attr-defined]
            others = [c for c in trainer.callbacks if not isinstance(c, LTECallback)]  # type: ignore[attr-defined]
            trainer.callbacks[:] = [*own, *others]  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer) -> None:
        if self._world_size > 1 or trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        # What DDPStrategy does where it does not fit, less the process group.
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Give all devices rank 0's weights. The module is not wrapped: its gradients stay where they are."""
        module = self._module
        transport = Transport(self.world_size, self.global_rank)
        with torch.no_grad():
            transport.broadcast_([*module.parameters(), *module.buffers()])
        transport.bytes_sent = 0
        self._transport = transport

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self._module
        config = self.config
        if not module.automatic_optimization:
            _check_manual_optimization(config.local_heads(self.world_size), config.execution)
        explorer = Explorer(module, self.optimizers, config, self._transport)
        self._explorer, self._report, self._finished = explorer, explorer.report, None
        self._synchronise, self._checked_batch, self._resume_state = True, False, None
        if explorer.count > 1 and config.execution != "auto":
            how = explorer.go_batched if explorer.execution == "batched" else explorer.go_sequential
            how(f"execution={config.execution!r} was given")
        if explorer.count > 1 or config.replicas == "step":
            # Trainer(gradient_clip_val=...) and LightningModule.clip_gradients arrive here.
            self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]
        # Between batches optimizers show the user's own parameters, for callbacks that look each up by its name.
        explorer.rest()
        if explorer.execution != "auto":
            self._announce()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        assert self._explorer is not None
        self._explorer.act()

    def _announce(self) -> None:
        rank_zero_info(f"LTE trains through {self.config.heads} heads:\n{self.report().summary()}")

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self._explorer is not None
        self._explorer.clip_grad_norm_(float(clip_val), _bare(optimizer))

    # ---- a batch

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        explorer = self._explorer
        assert explorer is not None
        step = super().training_step
        if explorer.count == 1:
            with explorer.heads():
                return step(*args, **kwargs)
        batch, *rest = args
        self._check_batch(batch)

        def own_step(part: Any) -> STEP_OUTPUT:
            return step(part, *rest, **kwargs)

        if explorer.execution == "auto":
            with _silenced(self._module):
                execution.decide(explorer, own_step, batch)
            self._announce()
        if explorer.execution == "batched":
            even = batches.is_even(batch, explorer.count)
            if not even and not self._module.automatic_optimization:
                # The step steps optimizers by itself, so heads can't take turns.
                batch, even = batches.filled_up(batch, explorer.count), True
            if even:
                with explorer.heads():
                    return own_step(batch)
        return execution.run_in_turn(explorer, own_step, batch)

    def _check_batch(self, batch: Any) -> None:
        """Raise on the first batch if the local heads don't divide the batch of a device."""
        if self._checked_batch:
            return
        assert self._explorer is not None
        count, samples = self._explorer.count, batches.size(batch)
        loader = self._module.trainer.train_dataloader
        batch_size = samples
        if isinstance(loader, DataLoader) and loader.batch_size is not None:
            batch_size = loader.batch_size
        if samples > batch_size or (samples < batch_size and _length(loader) > samples):
            raise ValueError(
                "The samples of a batch must lie along dimension 0 of its tensors; received a first batch with"
                f" {samples} along it from a loader with batch_size={batch_size}. Use one head per device."
            )
        self._checked_batch = True
        if batch_size % count:
            above = -(-batch_size // count) * count
            raise ValueError(
                f"The batch of a device is split evenly over its {count} heads; received a batch size of {batch_size}."
                f" Give a multiple of {count}, such as batch_size={above}. (A smaller last batch of an epoch is fine.)"
            )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        explorer = self._explorer
        assert explorer is not None
        # Layers under activation checkpointing run forward again here.
        with explorer.heads() if explorer.execution == "batched" else nullcontext(), explorer.backward():
            loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        # In manual optimization several backwards may belong to one step.
        explorer.after_backward(self._synchronise, settle=self._module.automatic_optimization)
        return loss

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Hold back `replicas="step"` while gradients accumulate."""
        self._synchronise = False
        try:
            yield
        finally:
            self._synchronise = True

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        assert self._explorer is not None
        if not self._module.automatic_optimization:
            self._explorer.settle()
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._told(self._explorer.step(_bare(optimizer), self.measure))
        return output

    def _told(self, record: MergeRecord | None) -> None:
        if record is not None and record.restarted:
            rank_zero_warn(
                f"At merge {record.merges} (step {record.step}) heads {', '.join(map(str, record.restarted))} were not"
                " finite. They took no part in it and start again from the merged weights; lower the learning rate or"
                " alpha, or clip gradients, if this comes back."
            )

    # ---- the end of training

    def merge(self) -> MergeRecord:
        """Merge now. Every device has to call it.

        Raises:
            RuntimeError: outside `fit`.
        """
        if self._explorer is None:
            raise RuntimeError("There are heads to merge only while `trainer.fit` runs.")
        record = self._explorer.merge(self.measure)
        self._told(record)
        return record

    def final_merge(self) -> MergeRecord | None:
        """Merge what heads have learned since the last merge; None if there is nothing."""
        return self.merge() if self._explorer and self._explorer.unmerged else None

    def on_train_end(self) -> None:
        # LTECallback has done so already, unless a user took it away.
        self.final_merge()

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        explorer = self._explorer
        if explorer is None or not explorer.unmerged:
            return
        where = f"merge {explorer.merges}, steps {[clock.step for clock in explorer.clocks]}"
        if explorer.merging:
            # Devices that were in the midst of different exchanges can't start another.
            where += f", in a merge on rank {explorer.transport.rank}"
        if not explorer.transport.agree(where, _AGREE_TIMEOUT_S):
            warnings.warn(
                f"Training was interrupted at step {explorer.clock.step} and the devices could not meet for a last"
                f" merge: the weights are those of the merge at step {explorer.clock.last_merge}.",
                stacklevel=2,
            )
            return
        try:
            self.merge()
        except Exception as error:
            warnings.warn(
                f"The last merge after {type(exception).__name__} failed, and the weights are those of the merge at"
                f" step {explorer.clock.last_merge}: {error}",
                stacklevel=2,
            )

    def teardown(self) -> None:
        self._close()
        super().teardown()

    def _close(self) -> None:
        self.precision_plugin.__dict__.pop("clip_grad_by_norm", None)
        if self._explorer is not None:
            self._explorer.close()
            # `trainer.save_checkpoint` after `fit` is to be one that training can go on from.
            self._explorer, self._finished = None, self._explorer

    # ---- checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The settings of the user's param groups; the heads' moments are in checkpoint["lte"]."""
        if self._explorer is None:
            return super().optimizer_state(optimizer)
        return self._explorer.substitution.plain_state(_bare(optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        explorer = self._explorer or self._finished
        if explorer is not None and "optimizer_states" in checkpoint:
            state = explorer.state_dict()
            if state is not None:
                checkpoint["lte"] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        explorer = self._explorer
        assert explorer is not None
        for optimizer, saved in zip(explorer.optimizers, checkpoint["optimizer_states"], strict=False):
            if not explorer.substitution.load_plain_state(optimizer, saved):
                rank_zero_warn(
                    f"The param groups of {type(optimizer).__name__} in the checkpoint are not shaped like those of"
                    " this run, so their settings (learning rate and the like) were not taken over."
                )
        state = checkpoint.get("lte")
        if state is None:
            rank_zero_info(
                "This checkpoint was not written by LTE: its weights were loaded and heads start fresh from them; its"
                " optimizer state was not kept, for it belongs to the weights and not to heads."
            )
            return
        undecided = explorer.execution == "auto"
        explorer.load_state_dict(state)
        self._resume_state = state
        if undecided and explorer.execution != "auto":
            self._announce()

    @property
    def resumed(self) -> bool:
        """Whether this run goes on from a checkpoint of LTE."""
        return self._resume_state is not None

    def restore_generators(self) -> None:
        """Set the random streams to where the checkpoint has them, if that is of as many devices."""
        state = self._resume_state
        if state is not None and state["devices"] == self.world_size:
            checkpoints.set_generators(state["generators"][self.global_rank])

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def __repr__(self) -> str:
        text = f"LTEStrategy(heads={self._heads}, merge_every={self._choices['merge_every']!r})"
        if "pytorch_lightning" in sys.modules:
            # Its Trainer knows no strategy of `lightning.pytorch` and prints this in its message about a wrong one.
            text += (
                " [made for `lightning.pytorch`: import Trainer from there, a Trainer of the package"
                " `pytorch_lightning` takes no strategies of it]"
            )
        return text


def _check_manual_optimization(count: int, execution: Execution) -> None:
    if count > 1 and execution != "batched":
        raise ValueError(
            "With manual optimization training_step steps optimizers by itself, so heads on one device can't take turns"
            f" in it, and it can't be tried whether one forward may serve them all; received {count} heads per device"
            f" and execution={execution!r}. Use one head per device, or give execution='batched' if every layer sees"
            " the batch outermost in dimension 0 and the loss is a mean over samples."
        )


def _length(loader: Any) -> int:
    """Samples in an epoch of a loader; 0 where it can't tell."""
    try:
        return len(loader.sampler)
    except (AttributeError, TypeError):
        return 0


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


@contextmanager
def _silenced(module: LightningModule) -> Iterator[None]:
    """Let a module's logging calls do nothing."""
    names = ("log", "log_dict")
    for name in names:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)
