"""Training a module through heads, without Lightning: what the strategy and a plain PyTorch loop share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte import checkpoint
from lightning_lte.batch import Layout
from lightning_lte.config import LTEConfig
from lightning_lte.gradients import clip_grad_norm_
from lightning_lte.growth import grow
from lightning_lte.guard import Guard, Watched
from lightning_lte.heads import Factors
from lightning_lte.merge import MergeRecord, add_mean_deltas
from lightning_lte.merging import Merging, restore_bases
from lightning_lte.replicas import average_gradients
from lightning_lte.report import excluding, listed
from lightning_lte.shards import whole
from lightning_lte.transport import Transport
from lightning_lte.trial import WRITTEN, checksum

# Steps after which an optimizer that never steps is waited for no longer.
_SETTLING_STEPS = 20


class Explorer(Merging):
    """Gives heads to a module and trains them in place of its weights.

        explorer = Explorer(model, optimizer, LTEConfig(heads=8, merge_every=10))
        for batch in loader:
            loss = execution.run(explorer, lambda own: cross_entropy(model(own[0]), own[1]), batch)
            with explorer.backward():
                loss.backward()
            explorer.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            explorer.step()
        explorer.finish()

    Args:
        module: the user's, on its device and in its dtype.
        optimizers: one or several over the module's parameters. In their param groups each factored weight gives way
            to the factors of its heads, until `finish` or `close`.
        config: the user's choices.
        transport: to other devices; None for this one alone.

    Attributes:
        config: the user's choices; of `heads` and `grow_heads`, what holds now.
        count: n, local heads. It may grow as a batch begins: in `execution.run`, `heads` or `act`.
        clocks: steps and merges done, for each optimizer.
        outer: the outer optimizer, or None.
        flights: merges that have started and not landed.
        merging: whether a merge has begun and not ended.
        layouts: how batches are laid out, one for each structure that was seen.
        execution: how local heads share the device: "batched", "sequential", or "auto" while it is not decided.
        tried: whether one forward was proved right for all local heads, by the structure of batches; None where it is
            taken to be right for all.
        report: which role each parameter has and why.
        late: names of what heads turned out in the middle of a period not to train, with the reason, and of replicas
            that want no gradient and are written, for all devices to hear of at the next merge.
        terminated: whether a device has told at the last merge that it is to end.
        requeue: whether a device has told that it is to save a checkpoint and be started again later.
        on_growth: called when the number of heads has grown, for whoever has to know; None for nobody.

    Raises:
        TypeError, ValueError: what `LTEConfig.local_heads`, `check_optimizers`, `check_writes`, `Decay`, `inject`,
            `check_stacks` and `check_modes` refuse, or a `shard` that the transport and the parameters don't have; the
            module and the optimizers are as they were then.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        config: LTEConfig,
        transport: Transport | None = None,
    ) -> None:
        chosen = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        super().__init__(module, chosen, config, transport or Transport())
        self.execution = config.execution if self.count > 1 else "batched"
        self.tried: dict[str, bool] | None = None if config.execution == "batched" else {}
        self.layouts: list[Layout] = []
        self._closed: checkpoint.State | None = None
        self._starved_known = self._averaged = False
        self.late: dict[str, str] = {}
        self._still = Guard(self._watched_still())
        self._taken = self.terminated = self.requeue = False
        self.on_growth: Callable[[], None] | None = None
        self._taken_at = -2
        self._asked_at: list[int] | None = None

    def heads(self) -> AbstractContextManager[None]:
        """A context in whose forwards all local heads act, each on its slice of dimension 0.

        Raises:
            RuntimeError: it has not been decided whether that is right for the module.
        """
        self._begin_if_due()
        if self.full_rank:
            return nullcontext()
        if self.execution == "auto":
            raise RuntimeError(
                "Whether one forward may serve all local heads has to be tried on a batch; received execution='auto'"
                " and no trial. Use `execution.run(explorer, step, batch)`, which tries it, or give execution='batched'"
                " if every layer sees the batch outermost in dimension 0 and the loss is a mean over samples."
            )
        return self.all_heads()

    def _begin_if_due(self) -> None:
        if self.full_rank and max(clock.step for clock in self.clocks) >= self.config.full_rank_steps:
            for clock in self.clocks:
                clock.settled()
            self.begin_heads()
        if self.growth_due:
            if self.unmerged:
                self.merge()
            step = max(clock.step for clock in self.clocks)
            self.grow(self.config.heads_at(step), f"after step {step}")

    @property
    def growth_due(self) -> bool:
        """Whether the number of heads grows before the next batch. Until then all is as it was."""
        if not self.config.grow_heads or self.full_rank or self.injection.switch.position is not None:
            return False
        return self.config.heads_at(max(clock.step for clock in self.clocks)) > self.config.heads

    def grow(self, heads: int, reason: str) -> None:
        """Train through more heads from now on, straight after a merge; see `growth.grow`.

        Args:
            heads: over all devices, a multiple of the number until now.
            reason: when or why, for the report.

        Raises:
            ValueError: it is no such multiple.
        """
        before = self.config.heads
        grow(self, heads)
        self.report.notes.append(f"The number of heads grew from {before} to {heads}: {reason}.")
        if self.on_growth is not None:
            self.on_growth()

    def act(self) -> None:
        self._begin_if_due()
        if not (self.full_rank or self._is_settling):
            # Forwards are to see weights that were written since the last step, straight after a merge, too: replicas
            # of the heads' own and weights in low precision would show what was there before. Who averages weights runs
            # an epoch without steps, for running statistics of them.
            found = self.guard.found(settling=False, look_at_bits=False)
            if found:
                self._takes_all(found)
        super().act()

    def take_weights(self, names: Collection[str]) -> None:
        super().take_weights(names)
        self._still.accept_writes()

    def all_heads(self) -> AbstractContextManager[None]:
        """The context of `heads`, for a trial."""
        return self.injection.switch.at("all" if self.count > 1 else 0)

    @contextmanager
    def head(self, index: int) -> Iterator[None]:
        """Let one local head act alone in forwards inside the block, with its own replicas."""
        with self.injection.switch.at(index):
            try:
                self.select(index)
                yield
            finally:
                self.select(None)

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """`head`, around the user's step or a part of it."""
        replicas = self.injection.replicas
        before = replicas.rows(index) if self._is_settling else {}
        with self.head(index):
            yield
        replicas.hand_on(index, before)

    def follow_backward(self, loss: Tensor, index: int) -> None:
        """Let a local head act while its loss's graph runs backward, where activation checkpointing runs forwards.

        Call it for the losses of all local heads, in the order of their forwards, and run the backward inside
        `backward`. Autograd works through the youngest graph first, one head's after the other's.
        """

        def enter(_: Tensor) -> None:
            self.injection.switch.position = index
            self.select(index)

        loss.register_hook(enter)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Let heads act in a backward, where activation checkpointing runs forwards; see `follow_backward`, too.

        Raises:
            RuntimeError: heads took turns, and one has written in place to what the backward of an earlier one needs.
        """
        switch = self.injection.switch
        batched = self.execution == "batched" and not self.full_rank
        try:
            with self.all_heads() if batched else switch.at(switch.position):
                try:
                    yield
                except RuntimeError as error:
                    in_turn = self.count > 1 and isinstance(switch.position, int)  # see `follow_backward`
                    if not in_turn or "modified by an inplace operation" not in str(error):
                        raise
                    raise RuntimeError(
                        "Heads that take turns run the step once each before one backward for all of them, so a step"
                        " may not write in place to a parameter or another tensor that the backward of an earlier head"
                        f" needs; received such a write: {str(error).partition(' Hint:')[0]} Write to it once for each"
                        " batch, in on_train_batch_start of a LightningModule, or use one head per device."
                    ) from error
        finally:
            # A batch that the heads don't divide is dealt out in turn in batched execution, too.
            self.select(None)

    def after_backward(self, synchronise: bool = True, settle: bool = True) -> None:
        """Look at the gradients; with `replicas="step"`, average those of replicas over devices.

        Args:
            synchronise: False on all but the last of several backwards that accumulate.
            settle: whether to look for what heads can't train; False where `before_step` does so.

        Raises:
            RuntimeError: see `settle`.
        """
        if self.full_rank:
            if synchronise and settle:
                self._average_gradients()
            return
        self.collect_gradients()
        if synchronise and settle:
            self.settle()
        if settle and not self._is_settling:
            self._look(look_at_bits=False)
        if len(self.optimizers) == 1 and not self._starved_known:
            # With several optimizers, a backward of one says nothing of what the others train.
            self._starved_known = True
            self.guard.check_starved()
        if self.config.replicas == "step" and synchronise:
            self._average_gradients()
            self._averaged = True

    def settle(self) -> None:
        """In the first two steps of every optimizer, take heads away from what turns out to be no good for them.

        That is, from weights that are used or written elsewhere than by their layers and merges; they are trained
        without heads from this very step on. What is found later loses its heads then, or at the next merge where there
        are several devices. Call it between backward and the optimizer's step; `after_backward` does.

        Raises:
            RuntimeError: no factored weight is left.
        """
        if not self._is_settling:
            return
        steps = [clock.step for clock in self.clocks]
        if self.transport.devices > 1 and steps == self._asked_at:
            return  # devices need not run closures, or backwards, equally often
        self._asked_at = steps
        found = self.guard.found(settling=True)
        if self.transport.devices == 1 and self._takes_all(found):
            return
        with self.transport.meeting(f"the look at the first gradients {self.where}"):
            self._demote(self.transport.union(found))

    def before_step(self) -> None:
        """Settle roles and gradients where optimizers step without `after_backward`, as in manual optimization."""
        if self.full_rank:
            self._average_gradients()
            return
        self.collect_gradients()
        self.settle()
        if not self._is_settling:
            self._look(look_at_bits=False)
        if self.config.replicas == "step" and not self._averaged:
            self._average_gradients()

    def clip_grad_norm_(
        self, max_norm: float, optimizer: Optimizer | None = None, params: Iterable[nn.Parameter] | None = None
    ) -> Tensor:
        """Clip each local head's gradient by its own 2-norm; returns the (n,) norms before.

        Args:
            max_norm: the largest norm of a head.
            optimizer: whose parameters; None for all.
            params: parameters of the user's; None for all that the optimizer holds.
        """
        chosen = self.optimizers if optimizer is None else [optimizer]
        if self.full_rank:
            held = [p for opt in chosen for group in opt.param_groups for p in group["params"]]
            return nn.utils.clip_grad_norm_(held if params is None else params, max_norm).expand(self.count)
        self.collect_gradients()
        if params is not None:
            trained = self.trained_for(params)
        else:
            trained = [p for opt in chosen for p in self.substitution.held(opt).values()]
        position = self.injection.switch.position
        return clip_grad_norm_(
            trained,
            self.per_head,
            max_norm,
            self.count,
            self.transport,
            acting=position if isinstance(position, int) else None,
            synchronised=self.config.replicas == "step",
        )

    def step(self, optimizer: Optimizer | None = None, measure: bool = True) -> MergeRecord | None:
        """Count an optimizer's step, and merge what it trains if that is due. Call it after every step of an optimizer.

        Args:
            optimizer: which one stepped; may be left out if there is one.
            measure: whether a merge computes what `MergeRecord` calls norm and disagreement. The same on all devices.

        Raises:
            ValueError: with several optimizers, none was named.
            RuntimeError: no factored weight is left; or weights were written on some devices only.
            FloatingPointError: a merge found no finite head; or one that is not, with `bad_heads="stop"`.
        """
        if optimizer is None and len(self.optimizers) > 1:
            raise ValueError(
                f"With several optimizers each has a clock of its own; received a step of none of the"
                f" {len(self.optimizers)}. Give explorer.step(optimizer)."
            )
        number = 0 if optimizer is None else self.optimizers.index(optimizer)
        clock = self.clocks[number]
        self._averaged = False
        if not self._is_settling:
            self._look(look_at_bits=False)
        for param in self.used_up(self.optimizers[number]):
            param.grad = None
        for param in self.frozen:
            param.grad = None
        self._count_step(number)
        if self.full_rank:
            clock.settled()
            return None
        if not self._is_settling:
            for f in self.injection.factors.values():
                f.end_trial()
            self.round_bases()
        return self._merge_if_due(number, measure)

    def finish(self) -> None:
        """Merge what is not merged yet, and give the module and the optimizers back.

        What heads have learned in steps that nobody counted is merged, too, with a warning.

        Raises:
            RuntimeError, FloatingPointError: see `step`. The module and the optimizers are given back all the same.
        """
        try:
            if self.unmerged or self._moved_uncounted():
                self.merge()
            self.gather_bases()
        finally:
            self.close(keep_state=not self.transport.lost)

    def level(self) -> None:
        """Give all devices the first one's replicas and buffers, where they differ. A collective.

        At the end of training callbacks may have put in what they averaged along the run on each device by itself; the
        first one's is what checkpoints have of it.
        """
        if self.transport.world_size == 1 or self.transport.within is not None:
            return
        known = {r.name: r.param.data for r in self.injection.replicas if r.param in self.injection.roles}
        kept = self.statistics.copies()
        buffers = self.module.named_buffers()
        known |= {name: own for name, own in buffers if name in kept or self.buffers.shared}
        values = [known[n] for n in sorted(known) if known[n].layout == torch.strided and not known[n].is_nested]
        if not values:
            return
        with self.transport.meeting(f"the end of training {self.where}"):
            own = torch.stack([checksum(value).to(self._device) for value in values]).unsqueeze(0)
            everywhere = self.transport.stack(own)
            differ = (everywhere != everywhere[:1]).any(0).tolist()
            self.transport.broadcast_(list(compress(values, differ)))

    def _moved_uncounted(self) -> bool:
        """Whether heads of any device have learned something though no step was counted since the last merge."""
        if self.full_rank:
            return False
        # Heads with a residual are elsewhere than their anchors in any case.
        factors = [f for f in self.injection.factors.values() if not f.has_residual]
        moved = torch.tensor([any(f.moved() for f in factors)], device=self._device)
        if not bool(self.transport.stack(self.transport.any_within(moved).to(torch.uint8)).any()):
            return False
        warnings.warn(
            f"The heads have learned something since the last merge, but no step was counted ({self.where}), so merges"
            " that were due did not come. It is merged now. Step an optimizer with its own `step`; in a loop without"
            " Lightning, call explorer.step() after it.",
            stacklevel=3,
        )
        return True

    def close(self, keep_state: bool = True) -> None:
        """Give the module and the optimizers back without a merge.

        No device waits for another for it: weights whose rows are sharded are left rounded, with a warning, unless
        `gather_bases` came before.

        Args:
            keep_state: whether `state_dict` stays available; False where devices that share out a head can't meet.
        """
        if self._closed is not None:
            return
        try:
            # An exception may have come in the turn of a head.
            self.select(None)
            if keep_state:
                self._closed = checkpoint.local_state(self, closing=True)
        finally:
            lost = [f.name for f in self.sharded] if self.transport.world_size > 1 else []
            restore_bases(self.injection.factors.values(), exactly=False)
            self.give_back()
            if lost:
                warnings.warn(
                    f"Training ended where the devices could not meet, so these weights, whose rows are sharded, stay"
                    f" rounded to {self.config.base}: {listed(lost)}. The last checkpoint has them exactly.",
                    stacklevel=2,
                )

    def go_sequential(self, reason: str) -> None:
        """Have each local head run by itself from now on, with replicas of its own.

        Args:
            reason: why, for the report.
        """
        if self.execution != "sequential" or any(r.stack is None for r in self.injection.replicas):
            self.split_replicas()
        self.execution = "sequential"
        self.report.notes.append(f"{self.count} heads share this device in turn (sequential): {reason.rstrip('.')}.")

    def go_batched(self, reason: str) -> None:
        """Have all local heads run in one forward from now on.

        Args:
            reason: why, for the report.
        """
        self.execution = "batched"
        self.report.notes.append(
            f"{self.count} heads share this device in one forward (batched): {reason.rstrip('.')}."
        )

    def share_layers(self, layers: Collection[nn.Module]) -> None:
        """Have all local heads share layers whose input is not the batch, on all devices if on one."""
        reasons: dict[str, str] = {}
        for layer in layers:
            state = self.injection.states[layer]
            names = [f.name for f in state.factors.values()]
            names += [r.name for r in self.injection.replicas if any(r.stack is own for own in state.stacks.values())]
            reasons.update({name: "its layer's input is not the batch" for name in names})
        with self.transport.meeting("the trial of the first batch"):
            reasons = self.transport.union(reasons)
        if reasons:
            self.make_replicas(reasons)

    def state_dict(self) -> checkpoint.State | None:
        """All that is needed beside the module's and the optimizers' own state; see `checkpoint.gather_state`."""
        with self.transport.meeting(f"a checkpoint {self.where}"):
            return checkpoint.gather_state(self.local_state(), self.transport)

    def local_state(self) -> checkpoint.State:
        """This device's part of `state_dict`; once this is closed, as it was then. A collective until then."""
        if self._closed is not None:
            return self._closed
        moved = self._still.changed()
        if self._watched_still():
            moved = set(self.transport.union(dict.fromkeys(moved, WRITTEN)))
        return checkpoint.local_state(self, moved=moved)

    @property
    def weight_names(self) -> set[str]:
        """Names of the factored weights in the module, those that are tied included, that all devices have alike."""
        named = self.module.named_parameters(remove_duplicate=False)
        # `module_state` has those whose rows are sharded on rank 0 alone.
        alike = self.injection.factors.keys() - {f.weight for f in self.sharded}
        return {name for name, param in named if param in alike}

    def module_state(self) -> dict[str, Any]:
        """The module's `state_dict` with base weights in full on rank 0. A collective: every device has to call it.

        `module.state_dict()` is the same but for weights whose rows are sharded, which it shows as forwards read them.
        """
        state = self.module.state_dict()
        for f in self.sharded:
            with self.transport.meeting(f"a checkpoint {self.where}"):
                exact = f.exact()
            if self.transport.rank == 0:
                state[self._names[f.weight]] = exact.cpu()
        return state

    def exact_weights(self) -> Iterator[Tensor]:
        """Copies of all factored weights, each (out, in) or of its convolution's shape, whole and in full precision.

        One after the other, as a device need not have room for all. A collective: every device has to go through them.
        """
        with self.transport.meeting(f"a look at the weights {self.where}"):
            for f in self.injection.factors.values():
                yield f.exact() if f.shard is f.weight else whole(f.weight.detach())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; see `checkpoint.scatter_state`."""
        checkpoint.check_shape(state)
        for flight in self.flights:
            flight.wait()  # its exchange reads what is written here, and is not to meet those of the merges to come
        if self.full_rank and not state["full_rank"]:
            self.begin_heads()
        self.act()
        told = checkpoint.scatter_state(self, state)
        self._stir(state["moving"])
        self.late = self._stirred(self.late)
        self._still.accept_writes()
        # The weights are those of the state, whoever wrote them, and its merges are counted anew.
        self._taken, self._taken_at = False, -2
        if told and self.transport.rank == 0:
            warnings.warn(told, stacklevel=2)
        for f in self.injection.factors.values():
            f.merged_at = 0
        if not (self.full_rank or self._is_settling):
            for f in self.injection.factors.values():
                f.end_trial()
            same = state["base"] == [self.config.base, self.config.base_copy]
            self.round_bases(state["bases"] if same else None)

    def _average_gradients(self) -> None:
        """Average over devices the gradients of replicas, or of all parameters before heads begin.

        These are then equal on all devices, infinite ones too, so that gradient scalers, which look at them afterwards,
        stay equal as well. Those of replicas alone don't see to that: scalers look at the factors of a device, too.
        """
        if self.transport.world_size > 1:
            params = self.trained_by if self.full_rank else (r.param for r in self.injection.replicas)
            with self.transport.meeting(f"the averaging of gradients {self.where}"):
                average_gradients([p for p in params if p.requires_grad], self.transport)

    @property
    def _is_settling(self) -> bool:
        """Whether roles may still change: until every optimizer has made two steps, or one of them many."""
        steps = [clock.step - self.config.full_rank_steps for clock in self.clocks]
        return min(steps) < 2 and max(steps) < _SETTLING_STEPS

    def _look(self, look_at_bits: bool) -> None:
        """Look for what heads can't train, after the first steps."""
        found = self.guard.found(settling=False, look_at_bits=look_at_bits)
        self._refuse_if_shared_out(found)
        if not found or self._takes_all(found):
            return
        if self.transport.world_size == 1:
            self._demote(found)
        else:
            self.late.update(found)
            for w in self._watched():
                if w.name in found:
                    w.param.grad = None

    def _watched_still(self) -> list[Watched]:
        """Replicas that devices have in common as long as nobody writes to them."""
        if self.transport.world_size == 1:
            return []
        still = [(r.name, r.param, r.owners[0]) for r in self.injection.replicas if r.still]
        return [Watched(name, param, own.module, own.module_name, own.key) for name, param, own in still]

    @property
    def moving(self) -> list[str]:
        """Names of replicas that want no gradient and are averaged all the same, as somebody writes to them."""
        return [r.name for r in self.injection.replicas if not (r.still or r.param.requires_grad)]

    def _stirred(self, found: Mapping[str, str]) -> dict[str, str]:
        """Have merges average those of `found` that were still; returns the others. Devices know all of it alike."""
        still = {r.name for r in self.injection.replicas if r.still}
        self._stir(still & found.keys())
        return {name: reason for name, reason in found.items() if name not in still}

    def _stir(self, names: Collection[str]) -> None:
        for replica in self.injection.replicas:
            replica.still &= replica.name not in names
        self._still.watch(self._watched_still())

    def _before_merge(self) -> None:
        if not self._is_settling:
            self._look(look_at_bits=True)
        self.late.update(dict.fromkeys(self._still.changed(), WRITTEN))
        buffers = self.transport.devices > 1 and bool(self.buffers.found())
        self.flags.update(late=bool(self.late), taken=self._taken, buffers=buffers)
        self._taken = False

    def _hear(self, flags: Mapping[str, Tensor]) -> None:
        """Let all devices act alike on what some of them found."""
        taken, late = flags["taken"], flags["late"]
        if taken.any() and not taken.all():
            raise RuntimeError(
                "Whoever writes to all weights has to do so on all devices alike; they were written on ranks"
                f" {taken.nonzero().flatten().tolist()} only. Write them in a hook that runs on every rank."
            )
        self.terminated = bool(flags["terminated"].any())
        self.requeue |= bool(flags["requeue"].any())
        if self.transport.devices > 1:
            told = bool(flags["buffers"].any())
            written = self.transport.union(self.buffers.found()) if told else {}
            self.buffers.take_first(self.transport, written)
        if late.any():
            found, self.late = self.late, {}
            self._demote(self._stirred(self.transport.union(found)))

    def _demote(self, reasons: dict[str, str]) -> None:
        self._refuse_if_shared_out(reasons)
        if not reasons:
            return
        reasons = self.with_neighbours(reasons)
        self.make_replicas(reasons)
        if self.transport.rank == 0:
            by_reason: dict[str, list[str]] = {}
            for name, reason in reasons.items():
                by_reason.setdefault(reason, []).append(name)
            why = "; ".join(f"{listed(names)} ({reason})" for reason, names in by_reason.items())
            frozen = self.config.replicas == "freeze"
            what = "Not trained any more, as replicas are frozen" if frozen else "Trained without heads, as replicas"
            warnings.warn(f"{what}: {why}.", stacklevel=2)

    def _refuse_if_shared_out(self, reasons: Mapping[str, str]) -> None:
        """Raise where roles can't change any more, as devices share out the weights."""
        if reasons and self.transport.within is not None:
            why = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
            raise RuntimeError(
                f"With shard=k, weights with heads must be used by their layers and written by merges alone; these are"
                f" not: {why}. Give {excluding(list(reasons))}; or train without `shard`."
            )

    def _takes_all(self, found: Mapping[str, str]) -> bool:
        """Whether all weights were written at once, and heads go on from them."""
        # Who does so again and again leaves heads nothing to learn.
        if not self.guard.all_written(found) or self.merges <= self._taken_at + 1:
            return False
        warnings.warn(
            "All weights were written from outside, as by loading others: heads go on from them, and what they had"
            " learned since the last merge is gone.",
            stacklevel=2,
        )
        # A merge on its way is one of the weights as they were.
        for flight in self.flights:
            flight.wait()
        self.flights = []
        self.take_weights({w.name for w in self._watched()})
        self._taken, self._taken_at = True, self.merges
        return True

    def _before_demotion(self, factors: Sequence[Factors]) -> None:
        # What heads have learned since the last merge is not to be lost, in a step that is not counted yet, too: a
        # collective.
        self._land_all(self.flights)
        if factors:
            add_mean_deltas(factors, self.transport, self.config.decays_weights)
        restore_bases(factors, exactly=True)
