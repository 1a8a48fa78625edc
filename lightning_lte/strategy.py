"""The Lightning strategy: where things sit, and in which order they happen.

It imports no package of Lightning's: there are two, `lightning.pytorch` and `pytorch_lightning`, and each takes
strategies of its own only. The modules of these names beside this one have a class for each.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte import advice, execution
from lightning_lte.batch import Layout, layout_of
from lightning_lte.callback import HeadsCallback
from lightning_lte.config import (
    AfterMerge,
    BadHeads,
    Embeddings,
    Execution,
    Init,
    LossReduction,
    LTEConfig,
    Norms,
    Preset,
    ReplicaPolicy,
    ResetA,
    Split,
    WeightDecay,
    preset_settings,
)
from lightning_lte.explorer import Explorer
from lightning_lte.loaders import first_layout
from lightning_lte.manual import ManualOptimization
from lightning_lte.merge import MergeRecord
from lightning_lte.optimizers import wrapped_optimizers
from lightning_lte.reach import gradient_functions_reach_heads
from lightning_lte.rehearsal import schedulers_untouched
from lightning_lte.requirements import (
    check_arguments,
    check_callbacks,
    check_optimization,
    check_sharing,
    check_training_step,
    check_validation,
)
from lightning_lte.resumable import CheckpointKind, Resumable
from lightning_lte.roles import check_made
from lightning_lte.rounded import Base, BaseCopy
from lightning_lte.schedule import MergeSchedule
from lightning_lte.sharding import Sharding
from lightning_lte.signals import Signals
from lightning_lte.transport import Transport, destroy_at_exit
from lightning_lte.turns import MeanLog, stepping_once
from lightning_lte.wire import PayloadKind, ShortDtype, Wire

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities.types import STEP_OUTPUT

# What Lightning calls, and uses parameters as a forward does.
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")

_OPTIMIZERS_STAY = "Heads train through the optimizers that `fit` began with"
_CHANGE_GROUPS = (
    "Change their `param_groups` in place, learning rates for instance, or call `fit` again: it goes on from the merged"
    " weights."
)

# Seconds that devices wait for each other where training was interrupted and some of them may be gone.
_AGREE_TIMEOUT_S = 30.0
_TELL_TIMEOUT_S = 1.0


class HeadsStrategy(Resumable):
    """Trains a LightningModule through parallel low-rank heads (LoRA-the-Explorer, arXiv 2402.16828).

        Trainer(strategy=LTEStrategy(heads=32, merge_every=10))

    In `fit`, each weight W that is large enough, of linear layers, convolutions, embeddings and attention, gets `heads`
    pairs of factors, dealt out over the devices. The optimizers train these, each head on its own slice of the data,
    and every `merge_every` steps the mean of what the heads have learned is added to W. Between merges devices don't
    communicate. See `LTEConfig` for the symbols and reasons behind the arguments.

    Args:
        heads: N, over all devices, a multiple of their number; at the start. None means one per device, or with `shard`
            one per group.
        merge_every: T, optimizer steps between merges; or a `MergeSchedule` (`At`, `Piecewise`, `Growing`,
            `BeforeValidation`), or a function (step, last_merge) -> bool.
        preset: "paper" for the paper's own settings: with `after_merge="keep"` its appendix A.2, with "reset" its
            Algorithm 1. It sets `rank`, `alpha`, `split` and `embeddings` where you give none; see `PRESETS`. Its scale
            s = 4096 / 64 is large, and goes with a learning rate of 0.01 to 0.1 of the full-rank one.
        rank: r, inner width of the factors; 16 if not given.
        alpha: numerator of the scale s = alpha / r; s = 2 if not given.
        after_merge: "keep" factors and moments (the paper's appendix A.2) or "reset" B to zero (its Algorithm 1).
        reset_a: with "reset", "keep" A or "redraw" it.
        freeze_a: train B alone, with A as it was drawn (LoRA-FA, not the paper's algorithm). See `LTEConfig` for what
            merges send then.
        reset_moments: with "reset", the fraction of moments set to zero, the smallest first.
        refresh: how many of the r vectors of each head start anew at each merge, one after the other.
        weight_decay: what the optimizers' weight decay pulls towards zero: "factors", or the "weights" at merges.
        target_modules: patterns of module names; only these are factored. None means every layer that can be.
        exclude_modules: patterns of module names that are not factored.
        rank_pattern: pattern of module names -> rank.
        alpha_pattern: pattern of module names -> alpha.
        split: pattern of module names -> parts of a fused projection that have factors of their own; or "qkv" for those
            of q, k and v. One matrix each if not given.
        replicas: trainable parameters that are not factored: "merge" averages them at merges, "step" their gradients
            at every step, "freeze" leaves them as they are.
        norms: weight and bias of normalisation layers: "replica", or "vector-scalar" factors.
        embeddings: "factors", as if not given, or a "replica".
        init: how A starts: "orthogonal", "kaiming" or "xavier".
        seed: heads are drawn from it, their layer's name and their number. None means Lightning's global seed, or 0. A
            run that goes on from a checkpoint goes on with that of the checkpoint.
        execution: how heads share a device: "batched" in one forward, "sequential" in turn, "auto" batched where that
            is proved right on the first batch.
        loss_reduction: whether the loss is a "mean" or a "sum" over samples.
        outer_optimizer: makes the optimizer that takes a merge's mean delta for the negative gradient of the base
            weights; None for the plain sum.
        wire: how merges of factored weights travel: "float32", "bfloat16" or "int8". Here and in `base`, "fp32" and
            "bf16" are short for the first two.
        payload: what travels: "dense" mean deltas, "factors", or "auto", whichever is fewer bytes.
        base: what forwards read of the base weights of linear layers: "float32" is W itself, or "bfloat16", "int8" or
            "nf4".
        base_copy: where W itself is kept meanwhile: "cpu", "sharded" over the devices, or nowhere: "error-feedback".
        full_rank_steps: optimizer steps of ordinary, synchronised training before heads begin.
        grow_heads: optimizer step -> number of heads from that step on, each a multiple of the one before.
        overlap: steps that training goes on while a merge travels; 0 waits for it.
        stagger: into how many groups weights are dealt that merge in turn.
        verify_every: merges between two proofs that base weights are bit-equal on all devices; None for none.
        bad_heads: heads that are not finite at a merge "restart" from the merged weights, or "stop" training.
        checkpoint: "gathered" on rank 0, which writes one file; or "sharded", where each device writes what it has
            into a directory that all of them see.
        shard: k, neighbouring devices that share out one head's work and memory with FSDP2.
        **kwargs: what `DDPStrategy` takes. Its arguments for the DistributedDataParallel wrapper have no effect, but
            for `broadcast_buffers=False`, which leaves each device its own buffers, if not its running statistics.

    Raises:
        TypeError, ValueError, ModuleNotFoundError: see `LTEConfig`; and for arguments that neither this class nor
            `DDPStrategy` has, and a `checkpoint` that is neither of the two.
    """

    strategy_name = "lte"
    # The callback of the package of Lightning's that the class is for.
    callback_class: type[HeadsCallback]

    def __init__(
        self,
        heads: int | None = None,
        merge_every: int | MergeSchedule | Callable[[int, int], bool] = 10,
        *,
        preset: Preset | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        after_merge: AfterMerge = "keep",
        reset_a: ResetA = "keep",
        freeze_a: bool = False,
        reset_moments: float = 0.0,
        refresh: int = 0,
        weight_decay: WeightDecay = "factors",
        target_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] = (),
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        split: Split | None = None,
        replicas: ReplicaPolicy = "merge",
        norms: Norms = "replica",
        embeddings: Embeddings | None = None,
        init: Init = "orthogonal",
        seed: int | None = None,
        execution: Execution = "auto",
        loss_reduction: LossReduction = "mean",
        outer_optimizer: Callable[[Iterable], Optimizer] | None = None,
        wire: Wire | ShortDtype = "float32",
        payload: PayloadKind = "auto",
        base: Base | ShortDtype = "float32",
        base_copy: BaseCopy = "cpu",
        full_rank_steps: int = 0,
        grow_heads: Mapping[int, int] | None = None,
        overlap: int = 0,
        stagger: int = 1,
        verify_every: int | None = None,
        bad_heads: BadHeads = "restart",
        checkpoint: CheckpointKind = "gathered",
        shard: int = 1,
        **kwargs: Any,
    ) -> None:
        idle = check_arguments(kwargs, HeadsStrategy.__init__, self.package.strategies.DDPStrategy.__init__)
        if idle:
            self._warn(
                "LTE does not wrap the module in DistributedDataParallel, so these arguments have no effect:"
                f" {', '.join(idle)}. Leave them out."
            )
        self._heads = heads
        # Command lines fill in all defaults, so what a preset sets is None where the user gave nothing.
        given = {"rank": rank, "alpha": alpha, "split": split, "embeddings": embeddings}
        settings = {**preset_settings(preset), **{name: v for name, v in given.items() if v is not None}}
        self._config = LTEConfig(
            heads=1 if heads is None else heads,
            merge_every=merge_every,
            after_merge=after_merge,
            reset_a=reset_a,
            freeze_a=freeze_a,
            reset_moments=reset_moments,
            refresh=refresh,
            weight_decay=weight_decay,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            rank_pattern={} if rank_pattern is None else rank_pattern,
            alpha_pattern={} if alpha_pattern is None else alpha_pattern,
            replicas=replicas,
            norms=norms,
            init=init,
            seed=0 if seed is None else seed,
            execution=execution,
            loss_reduction=loss_reduction,
            outer_optimizer=outer_optimizer,
            wire=cast(Wire, wire),
            payload=payload,
            base=cast(Base, base),
            base_copy=base_copy,
            full_rank_steps=full_rank_steps,
            grow_heads={} if grow_heads is None else grow_heads,
            overlap=overlap,
            stagger=stagger,
            verify_every=verify_every,
            bad_heads=bad_heads,
            shard=shard,
            **settings,
        )
        self._seed = seed
        super().__init__(checkpoint=checkpoint, **kwargs)
        self._undo: list[Callable[[], Any]] = []
        self._synchronise = True
        self._stepping = False
        # How deep each thread is in calls of `step` that go past Lightning.
        self._depth: dict[int, int] = {}
        self._manual: ManualOptimization | None = None
        self._split_batch: Callable[[Any, int], Sequence[Any]] | None = None
        self._interrupted = self._apart = False
        self._samples_known = False
        # Whether merges compute norms, as a device logs them: all of them agree on it, and `LTECallback` reads it.
        self.measure = True

    # ---- what users and the callback look at

    @property
    def config(self) -> LTEConfig:
        """The choices of this run; `heads=None` is resolved once the number of devices is known."""
        seed = _global_seed() if self._seed is None else self._config.seed
        return replace(self._config, heads=self._heads or self._groups, seed=seed)

    @property
    def explorer(self) -> Explorer | None:
        """The core at work; None outside `fit`."""
        return self._explorer

    @property
    def last_record(self) -> MergeRecord | None:
        """What happened at the last merge."""
        return self._explorer.last_record if self._explorer else None

    # ---- processes

    @property
    def _world_size(self) -> int:
        """Devices; `world_size` of Lightning's is known only once the environment is set up."""
        return self.num_nodes * max(1, self.num_processes)

    @property
    def _groups(self) -> int:
        """Groups of devices that share out one head's work: the devices themselves with shard=1."""
        return max(1, self._world_size // self._config.shard)

    @property
    def _most_local(self) -> int:
        """Heads of a device, where they are most."""
        return self.config.most_heads // self._groups

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
        check_sharing(self._config.shard, self._world_size, self._checkpoint, self.precision_plugin.precision)
        self.config.local_heads(self._groups)
        if self._module.trainer.state.fn == "fit":
            self._put_callback_first()  # now, as those of `LightningModule.configure_callbacks` have come
        if self._world_size > 1:
            try:
                super().setup_environment()
            except RuntimeError as error:
                lives = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
                if lives and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    raise RuntimeError(
                        "Processes that torchrun starts anew need a store of their own to meet; at restart"
                        f" {lives} they got that of those before, with addresses of the dead (pytorch/pytorch#135712)."
                        " Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, with --standalone or"
                        " --rdzv-backend=c10d."
                    ) from error
                raise
            destroy_at_exit()
            return
        # What DDPStrategy does, less the process group and the seed that is set again for other processes.
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()

    # Devices meet here, too: for checkpoints, for metrics, and when callbacks decide.

    def barrier(self, name: str | None = None) -> None:
        with self._meeting(f"a barrier of Lightning's ({name})"):
            super().barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._meeting("a broadcast of Lightning's"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        with self._meeting("a reduction of Lightning's"):
            return super().reduce(tensor, group, reduce_op)

    def _meeting(self, what: str) -> AbstractContextManager[None]:
        explorer = self._explorer
        return nullcontext() if explorer is None else explorer.transport.meeting(f"{what}, {explorer.where}")

    # ---- setting up

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = model.trainer
        check_validation(trainer, self._config, self._world_size)
        if trainer.state.fn == "fit":
            check_optimization(model, self._config, self._world_size, self.precision_plugin)
        if self._world_size == 1:
            # Lightning takes every subclass of DDPStrategy for distributed, and would shuffle all training data.
            trainer._accelerator_connector.use_distributed_sampler = False

    def _put_callback_first(self) -> None:
        """Add one if there is none. Those after it see merged weights when training ends."""
        callbacks: list[Any] = self._module.trainer.callbacks  # type: ignore[attr-defined]
        own = next((c for c in callbacks if isinstance(c, HeadsCallback)), None) or self.callback_class()
        callbacks[:] = [own, *(c for c in callbacks if not isinstance(c, HeadsCallback))]

    def setup(self, trainer: Trainer) -> None:
        shares = self._config.shard > 1
        if trainer.state.fn == "fit" or (self._world_size > 1 and not shares):
            super().setup(trainer)
            return
        # What DDPStrategy does where it does not fit, less the process group, or with the module shared out.
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        if shares:
            self._share_out()
        else:
            self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Give all devices rank 0's weights. The module is not wrapped: its gradients stay where they are."""
        if self._config.shard > 1:
            self._share_out()
            return
        module = self._module
        check_made(dict(module.named_parameters()))
        transport = Transport(self.world_size, self.global_rank, timeout=self._timeout)
        with torch.no_grad():
            transport.broadcast_([*module.parameters(), *module.buffers()])
        transport.bytes_sent = 0
        self._transport = transport

    def model_to_device(self) -> None:
        # A module that is shared out may be larger than a device: it goes there in parts.
        if self._config.shard == 1:
            super().model_to_device()

    def _share_out(self) -> None:
        """Give each device its part of rank 0's weights."""
        shard, timeout = self._config.shard, self._timeout
        self._transport = Transport.sharing(shard, self.world_size, self.global_rank, timeout)
        self._sharding = Sharding(self._module, self._transport, self.root_device, _STEPS)

    def setup_optimizers(self, trainer: Trainer) -> None:
        if self._explorer is not None:
            raise RuntimeError(f"{_OPTIMIZERS_STAY}; received a second call of setup_optimizers. {_CHANGE_GROUPS}")
        super().setup_optimizers(trainer)
        check_training_step(self._module, self.config, self._most_local)
        check_callbacks(trainer.callbacks, self.config, self.world_size)  # type: ignore[attr-defined]
        self._split_batch = getattr(self._module, "split_batch", None)
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Put heads into the module as it is now."""
        explorer = Explorer(self._module, self.optimizers, self.config, self._transport)
        explorer.buffers.shared = bool(self._ddp_kwargs.get("broadcast_buffers", True))
        self._explorer, self._report, self._finished = explorer, explorer.report, None
        self._synchronise, self._generators, self._interrupted, self._apart = True, None, False, False
        # The norms of a merge cost time, and nobody sees them without a logger. Some devices alone may have one.
        logs = {str(self.global_rank): "logs"} if trainer.loggers else {}
        with self._transport.meeting("the start of training"):
            self.measure = bool(self._transport.union(logs))
        self._manual = None
        self._share_device()
        explorer.on_growth = self._share_device
        self._hook_in(trainer, explorer)
        # Between batches optimizers show the user's own parameters, for callbacks that look each up by its name.
        explorer.rest()

    def _begin_anew(self) -> None:
        """Take the heads out and put new ones in, where a checkpoint is loaded into a run that trains already."""
        assert self._explorer is not None
        for flight in self._explorer.flights:
            flight.wait()
        while self._undo:
            self._undo.pop()()
        self._explorer.close(keep_state=False)
        self._begin(self._module.trainer)

    def _share_device(self) -> None:
        """Settle how local heads share the device, where no trial is to show it."""
        explorer, module, config = self._explorer, self._module, self.config
        assert explorer is not None
        if explorer.count > 1 and self._split_batch is not None:
            explorer.go_sequential("split_batch splits the batch")
        elif explorer.count > 1 and config.execution != "auto":
            how = explorer.go_batched if explorer.execution == "batched" else explorer.go_sequential
            how(f"execution={config.execution!r} was given")
        elif explorer.count > 1 and not module.automatic_optimization:
            explorer.go_sequential("in manual optimization the step can't be tried, as it steps optimizers by itself")
        if explorer.execution == "sequential" and not module.automatic_optimization:
            self._manual = ManualOptimization(explorer, module)
            explorer.gradient_scale = 1  # each head runs backward on a loss of its own
        if explorer.execution != "auto":
            self._announce()
        self._advise(advice.of_size(explorer.injection.factors.values(), explorer.config.heads))
        self._samples_known = False

    def _advise(self, text: str | None) -> None:
        if text is not None:
            self._warn(text)

    def _hook_in(self, trainer: Trainer, explorer: Explorer) -> None:
        """Have Lightning and torch reach the heads in places that know nothing of them, until `fit` ends."""
        undo = self._undo
        if self._most_local > 1 or explorer.config.replicas == "step":
            # Trainer(gradient_clip_val=...) and LightningModule.clip_gradients arrive here.
            self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]
            undo.append(lambda: self.precision_plugin.__dict__.pop("clip_grad_by_norm", None))
        reaching = gradient_functions_reach_heads(explorer, getattr(self.precision_plugin, "scaler", None))
        reaching.__enter__()
        undo.append(lambda: reaching.__exit__(None, None, None))
        for optimizer in explorer.optimizers:
            # One that it wraps may be stepped past it (SAM's second_step does so).
            for stepped in (optimizer, *wrapped_optimizers(optimizer)):
                before = stepped.register_step_pre_hook(partial(self._before_raw_step, optimizer))
                after = stepped.register_step_post_hook(partial(self._after_raw_step, optimizer))
                undo += [before.remove, after.remove]
        undo.append(Signals(trainer, explorer).close)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._resumes_mid_epoch:
            # Once more, after the loader's own draws.
            self._resumes_mid_epoch = False
            self._restore_generators()
        assert self._explorer is not None
        self._depth.clear()  # one that raised has not come back
        if self._explorer.growth_due and self._explorer.unmerged:
            self.merge()
        self._explorer.act()
        if not self._samples_known and not self._explorer.full_rank:
            self._samples_known = True
            self._advise_on_samples(batch)

    def _advise_on_samples(self, batch: Any) -> None:
        explorer = self._explorer
        assert explorer is not None
        try:
            samples = self._layout(batch).size(batch)
        except Exception:
            return  # one head, or a module that splits its batches, takes those that can't be counted, too
        if explorer.execution == "auto" and samples % explorer.count and self._world_size == 1:
            self._announce()  # no trial of this batch does, and the heads may divide none that come
        self._advise(advice.of_samples(samples * self._module.trainer.accumulate_grad_batches, explorer.count))

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self._explorer is not None
        self._explorer.clip_grad_norm_(float(clip_val), self._bare(optimizer))

    # ---- a batch

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        explorer = self._explorer
        assert explorer is not None
        step = super().training_step
        if explorer.config.grow_heads and not explorer.layouts and self._split_batch is None:
            # The first batch tells more than the last one of an epoch, and tells it before training.
            self._layout(args[0])
        if explorer.count == 1 or explorer.full_rank:
            with explorer.heads():
                return step(*args, **kwargs)
        batch, *rest = args

        def own_step(part: Any) -> STEP_OUTPUT:
            return step(part, *rest, **kwargs)

        if self._split_batch is None:
            self._layout(batch)
            return execution.run(
                explorer,
                own_step,
                batch,
                trial=self._trial,
                turns=self._logging_means,
                take_turns=self._take_turns,
                # A step that steps optimizers by itself and serves all heads is not to meet heads that take turns.
                fill_up=not self._module.automatic_optimization and explorer.execution == "batched",
            )
        with self._logging_means():
            return self._take_turns(explorer, own_step, self._split_batch(batch, explorer.count))

    def _take_turns(self, explorer: Explorer, step: Callable[[Any], Any], parts: Sequence[Any]) -> Any:
        if self._manual is not None:
            return self._manual.run(step, parts)
        with stepping_once(self._schedulers, lambda: explorer.injection.switch.position == 0):
            return execution.run_in_turn(explorer, step, parts)

    @contextmanager
    def _logging_means(self) -> Iterator[None]:
        """While heads take turns, log what they log once for all of them."""
        log = MeanLog(self._module.log)
        self._module.__dict__["log"] = log
        try:
            with log.watching(self._module):
                yield
        finally:
            self._module.__dict__.pop("log", None)
        log.flush()

    def _layout(self, batch: Any) -> Layout:
        explorer = self._explorer
        assert explorer is not None
        if not explorer.layouts:
            combined = self.package.utilities.combined_loader.CombinedLoader
            loader = self._module.trainer.train_dataloader
            explorer.layouts.append(first_layout(batch, loader, self._most_local, combined))
        return layout_of(batch, explorer.layouts)

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """While it is tried how local heads may share the device, let the module's logging do nothing."""
        module, trainer, explorer = self._module, self._module.trainer, self._explorer
        assert explorer is not None
        loggers, undecided = list(trainer.loggers), explorer.execution == "auto"
        for name in ("log", "log_dict"):
            module.__dict__[name] = lambda *args, **kwargs: None
        trainer.loggers = [self.package.loggers.logger.DummyLogger() for _ in loggers]
        try:
            with schedulers_untouched(self._schedulers, explorer.optimizers):
                yield
        finally:
            trainer.loggers = loggers
            for name in ("log", "log_dict"):
                module.__dict__.pop(name)
        if undecided:
            self._announce()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        explorer = self._explorer
        assert explorer is not None
        if self._manual is not None or explorer.full_rank:
            acting: AbstractContextManager[Any] = nullcontext()  # that of the head whose turn it is
        else:
            acting = explorer.backward()
        with acting:
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
        explorer = self._explorer
        assert explorer is not None
        if self._manual is not None and self._manual.in_turn:
            nothing = self.package.core.optimizer.do_nothing_closure

            def step_for_all(closure: Callable[[], Any] | None) -> Any:
                return self.optimizer_step(optimizer, closure or nothing, model, **kwargs)

            own = None if closure is nothing else closure
            return self._manual.step(self._bare(optimizer), own, step_for_all)
        if all(self._bare(optimizer) is not own for own in explorer.optimizers):
            raise RuntimeError(
                f"{_OPTIMIZERS_STAY}; received a step of another one, {type(optimizer).__name__}. {_CHANGE_GROUPS}"
            )
        if not self._module.automatic_optimization:
            explorer.before_step()
        self._stepping = True
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._stepping = False
        self._step(self._bare(optimizer))
        return output

    def _before_raw_step(self, optimizer: Optimizer, stepped: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._stepping or self._explorer is None:
            return None
        thread = threading.get_ident()
        self._depth[thread] = self._depth.get(thread, 0) + 1
        if self._depth[thread] > 1:
            return None  # the step of a class calls that of its base, which has the hooks, too
        if self._manual is not None and self._manual.in_turn:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")

            def step(closure: Callable[[], Any] | None) -> Any:
                return stepped.step() if closure is None else stepped.step(closure)

            self._manual.step(optimizer, closure, step, counted=False)
            self._manual.hold_back(optimizer)
            return (stepped,), {}
        self._explorer.act()
        self._explorer.before_step()
        return None

    def _after_raw_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Count a step that went past Lightning, as in manual optimization `optimizer.optimizer.step()` does.

        Args:
            optimizer: the user's.
        """
        if self._stepping or self._explorer is None:
            return
        thread = threading.get_ident()
        self._depth[thread] -= 1
        if self._depth[thread]:
            return
        if self._manual is not None and self._manual.in_turn:
            self._manual.give_back()
        else:
            self._step(optimizer)

    @property
    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self._module.trainer.lr_scheduler_configs]

    @property
    def _signals(self) -> Any:
        connector: Any = self._module.trainer._signal_connector
        return connector

    def _step(self, optimizer: Optimizer) -> None:
        assert self._explorer is not None
        # Devices tell each other at merges whether one was told to terminate.
        self._explorer.flags["terminated"] = bool(self._signals.received_sigterm)
        self._after_merge(self._explorer.step(optimizer, self.measure))

    def _after_merge(self, record: MergeRecord | None) -> None:
        self._warn_of_restarts(record)
        if self._explorer is not None and self._explorer.terminated:
            self._signals.received_sigterm = True

    def _warn_of_restarts(self, record: MergeRecord | None) -> None:
        if record is not None and record.restarted:
            self._warn(
                f"At merge {record.merges} (step {record.step}) heads {', '.join(map(str, record.restarted))} were not"
                " finite. They took no part in it and start again from the merged weights; lower the learning rate or"
                " alpha, or clip gradients, if this comes back. (bad_heads='stop' ends training in such a case.)"
            )

    # ---- the end of training

    def merge(self) -> MergeRecord:
        """Merge now. Every device has to call it.

        Raises:
            RuntimeError: outside `fit`.
        """
        if self._explorer is None:
            raise RuntimeError(
                "There are heads to merge only while `trainer.fit` runs; received a call of merge() outside of it. Call"
                " it in a hook of the LightningModule or of a callback."
            )
        record = self._explorer.merge(self.measure)
        self._after_merge(record)
        return record

    def merge_before_validation(self) -> None:
        """Merge what is not merged yet, if the schedule wants that before validations. Every device has to call it."""
        explorer = self._explorer
        if explorer is None or not explorer.merges_before_validation or not explorer.unmerged:
            return
        if not self._module.trainer.sanity_checking:
            self.merge()
            # A merge may have put factors into the optimizers.
            explorer.rest()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        # LTECallback has done so already, unless a user took it away.
        self.merge_before_validation()

    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._explorer is not None:
            self._explorer.guard.after_swaps()

    def final_merge(self) -> MergeRecord | None:
        """Merge what heads have learned since the last merge; None if there is nothing. No training follows."""
        record = self.merge() if self._explorer and self._explorer.unmerged else None
        if self._explorer is not None:
            self._explorer.gather_bases()
        return record

    def on_train_end(self) -> None:
        # LTECallback has done so already, unless a user took it away.
        self.final_merge()
        if self._explorer is not None:
            self._explorer.level()  # after callbacks, which may have put averaged weights in

    def on_exception(self, exception: BaseException) -> None:
        with suppress(Exception):
            super().on_exception(exception)
        # LTECallback has done so already, unless a user took it away.
        self.end_after(exception)

    def end_after(self, exception: BaseException) -> None:
        """Merge what can be merged and give the module back, as training ends with an exception.

        Nothing is raised here: Lightning's own teardown has to come to its turn.
        """
        self._interrupted = True
        for end in (lambda: self._last_merge_after(exception), self._close):
            try:
                end()
            except Exception as error:
                with suppress(Warning):
                    warnings.warn(f"After {type(exception).__name__}, another error came: {error}", stacklevel=2)

    def _last_merge_after(self, exception: BaseException) -> None:
        explorer = self._explorer
        if explorer is None or not (explorer.unmerged or self._world_size > 1):
            return
        # Devices may have stopped at different steps of the same period.
        where = f"merge {explorer.merges}"
        in_vain = explorer.merging or explorer.transport.lost
        if in_vain:
            # Devices that were in the midst of different exchanges can't start another. Who has waited for the others
            # in vain only lets them know.
            where += f", in a meeting on rank {explorer.transport.rank}"
        # A merge that was due and refused is none.
        record = explorer.last_record
        last = record.step if record else max(clock.last_whole for clock in explorer.clocks)
        weights = (
            f"the weights are those of the merge at step {last}" if last > 0 else "the weights are those of the start"
        )
        step = max(clock.step for clock in explorer.clocks)
        self._apart = not explorer.transport.agree(where, _TELL_TIMEOUT_S if in_vain else _AGREE_TIMEOUT_S)
        if self._apart:
            warnings.warn(
                f"Training was interrupted at step {step} and the devices could not meet for a last merge: {weights}.",
                stacklevel=2,
            )
            return
        try:
            self._warn_of_restarts(explorer.merge(self.measure, everything=True))
            explorer.gather_bases()
        except Exception as error:
            self._apart = explorer.transport.lost
            warnings.warn(
                f"The last merge after {type(exception).__name__} failed, and {weights}: {error}",
                stacklevel=2,
            )

    def teardown(self) -> None:
        if not self._interrupted:
            # A run that was resumed at its end has trained no batch, and never began to end.
            self.final_merge()
        self._close()
        super().teardown()

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()
        sharding, self._sharding = self._sharding, None
        if sharding is not None and self._interrupted and not self._apart:
            self._apart = not self._transport.agree("the end", _AGREE_TIMEOUT_S)
        together = sharding is None or not self._apart
        explorer, self._explorer = self._explorer, None
        state = None
        if explorer is not None:
            explorer.close(keep_state=together)
            # `trainer.save_checkpoint` after `fit` is to be one that training can go on from.
            if together:
                state = explorer.local_state()
        if not together:
            warnings.warn(
                "The devices could not meet to put the module together, so each has its part of the weights alone. Load"
                " the last checkpoint.",
                stacklevel=2,
            )
        elif sharding is not None:
            sharding.undo(() if explorer is None else explorer.optimizers)
        if state is not None:
            self._finished = (state, [p._version for p in self._module.parameters()])

    def __repr__(self) -> str:
        text = f"LTEStrategy(heads={self._heads}, merge_every={self._config.merge_every!r})"
        imports = {"lightning.pytorch": "lightning_lte", "pytorch_lightning": "lightning_lte.pytorch_lightning"}
        others = [name for name in imports if name != self.package.__name__ and name in sys.modules]
        if others:
            # A Trainer of the other package prints this in its message about a strategy that it does not know.
            text += (
                f" [made for `{self.package.__name__}`; a Trainer of `{others[0]}` takes"
                f" `from {imports[others[0]]} import LTEStrategy`]"
            )
        return text


def _global_seed() -> int:
    """The seed of Lightning's `seed_everything`, if that was called, else 0."""
    text = os.environ.get("PL_GLOBAL_SEED", "0")
    return int(text) if text.isdecimal() else 0
