"""Training a module through heads, without Lightning: what the strategy and a plain PyTorch loop share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte import checkpoint, merge
from lightning_lte.clock import Clock
from lightning_lte.config import LTEConfig
from lightning_lte.gradients import clip_grad_norm_, scale_gradient
from lightning_lte.guard import Guard, Watched
from lightning_lte.injection import inject
from lightning_lte.merge import MergeRecord
from lightning_lte.optimizers import check_optimizers
from lightning_lte.report import Report, listed
from lightning_lte.schedule import as_schedule
from lightning_lte.substitution import Substitution
from lightning_lte.transport import Transport
from lightning_lte.trial import Trial

# Steps after which an optimizer that never steps is waited for no longer.
_SETTLING_STEPS = 20
# Seconds that devices wait for each other's word on the first steps.
_SETTLING_TIMEOUT_S = 1800.0


class Explorer:
    """Gives heads to a module and trains them in place of its weights.

        explorer = Explorer(model, optimizer, LTEConfig(heads=8, merge_every=10))
        for x, y in loader:
            with explorer.heads():
                loss = cross_entropy(model(x), y)
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
        count: n, local heads.
        clocks: steps and merges done, for each optimizer.
        made_replicas: weights that lost their heads in the first steps, and why.
        merging: whether a merge has begun and not ended.
        execution: how local heads share the device: "batched", "sequential", or "auto" while it is not decided.
        report: which role each parameter has and why.

    Raises:
        TypeError, ValueError: what `LTEConfig.local_heads`, `check_optimizers` and `inject` refuse; the module and
            the optimizers are as they were then.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        config: LTEConfig,
        transport: Transport | None = None,
    ) -> None:
        self.module, self.config = module, config
        self.transport = transport or Transport()
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self.count = config.local_heads(self.transport.world_size)
        self.execution = config.execution if self.count > 1 else "batched"
        self._schedule = as_schedule(config.merge_every)
        check_optimizers(self.optimizers, self.count)

        # User's parameter -> number of the optimizer that trains it, the first one that holds it.
        self._trained_by: dict[nn.Parameter, int] = {}
        for number, optimizer in enumerate(self.optimizers):
            for param in _params(optimizer):
                self._trained_by.setdefault(param, number)
        first = self.transport.rank * self.count
        self.injection = inject(module, list(self._trained_by), config, count=self.count, first=first)
        self._names = {p: n for n, p in module.named_parameters()}
        kept = {*self.injection.factors, *(replica.param for replica in self.injection.replicas)}
        self._frozen = [p for p in self._trained_by if p not in kept]
        self.substitution = Substitution(self.optimizers, self._replacements(), self._names)
        self._closed: checkpoint.State | None = None
        self._note_optimizers()
        self._scaled: set[nn.Parameter] = set()
        self._scale_gradients()
        self.guard = Guard(self._watched())
        for f in self.injection.factors.values():
            f.trial = Trial(f.weight)
        self.made_replicas: dict[str, str] = {}
        self.clocks = [Clock() for _ in self.optimizers]
        self.last_record: MergeRecord | None = None
        self.merging = False

    @property
    def report(self) -> Report:
        return self.injection.report

    @property
    def clock(self) -> Clock:
        """The clock of the first optimizer."""
        return self.clocks[0]

    @property
    def merges(self) -> int:
        """Merges done, for all optimizers together."""
        return sum(clock.merges for clock in self.clocks)

    @property
    def unmerged(self) -> bool:
        """Whether heads have learned something since the last merge."""
        return any(clock.unmerged for clock in self.clocks)

    @property
    def per_head(self) -> set[nn.Parameter]:
        """What is trained and has the local heads as dimension 0."""
        factors = [p for f in self.injection.factors.values() for p in (f.A, f.B)]
        return {*factors, *(r.stack for r in self.injection.replicas if r.stack is not None)}

    @contextmanager
    def heads(self) -> Iterator[None]:
        """Let all local heads act in forwards inside the block, each on its slice of dimension 0."""
        with self.injection.switch.at("all" if self.count > 1 else 0):
            yield

    @contextmanager
    def head(self, index: int) -> Iterator[None]:
        """Let one local head act alone in forwards inside the block, with its own replicas."""
        with self.injection.switch.at(index), self.injection.replicas.of_head(index):
            yield

    def follow_backward(self, loss: Tensor, index: int) -> None:
        """Let a local head act while its loss's graph runs backward, where activation checkpointing runs forwards.

        Call it for the losses of all local heads, in the order of their forwards, and run the backward inside
        `backward`. Autograd works through the youngest graph first, one head's after the other's.
        """

        def enter(_: Tensor) -> None:
            self.injection.switch.position = index
            self.injection.replicas.select(index)

        loss.register_hook(enter)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Put back what `follow_backward` did when the block ends."""
        try:
            with self.injection.switch.at(self.injection.switch.position):
                yield
        finally:
            self.injection.replicas.select(None)

    def act(self) -> None:
        """Show the optimizers what they train. New in their groups: what came there since is trained as a replica."""
        self.substitution.act()
        for number, optimizer in enumerate(self.optimizers):
            for param in _params(optimizer):
                if param not in self._trained_by and param not in self.per_head:
                    self._trained_by[param] = number
                    if self.config.replicas != "freeze":
                        name = self._names.get(param, f"outside.{len(self._trained_by)}")
                        self.injection.adopt(name, param)
                        self.substitution.names[param] = name

    def rest(self) -> None:
        """Show the optimizers the user's own parameters; between batches, for those who look."""
        self.substitution.rest()

    def after_backward(self, synchronise: bool = True, settle: bool = True) -> None:
        """Check the gradients; with `replicas="step"`, average those of replicas over devices.

        Args:
            synchronise: False on all but the last of several backwards that accumulate.
            settle: whether to call `settle`; False where that is done when the step is taken.

        Raises:
            RuntimeError: see `settle` and `Guard.check_uses`.
        """
        self.injection.replicas.collect_gradients()
        if synchronise and settle:
            self.settle()
        self.guard.check_uses()
        self.guard.check_starved()
        if self.config.replicas == "step" and synchronise:
            self.injection.replicas.average_gradients(self.transport)

    def settle(self) -> None:
        """In the first two steps of every optimizer, take heads away from what turns out to be no good for them.

        That is, from weights that are used or written elsewhere than by their layers and merges; later that is an
        error. Call it between backward and the optimizer's step; `after_backward` does.

        Raises:
            RuntimeError: no factored weight is left.
        """
        if not self._is_settling:
            return
        reasons = self.transport.union(self.guard.found(), _SETTLING_TIMEOUT_S)
        if not reasons:
            return
        self.make_replicas(reasons)
        if self.transport.rank == 0:
            by_reason: dict[str, list[str]] = {}
            for name, reason in reasons.items():
                by_reason.setdefault(reason, []).append(name)
            why = "; ".join(f"{listed(names)} ({reason})" for reason, names in by_reason.items())
            warnings.warn(f"Trained without heads, as replicas: {why}.", stacklevel=2)

    def clip_grad_norm_(self, max_norm: float, optimizer: Optimizer | None = None) -> Tensor:
        """Clip each local head's gradient by its own 2-norm; returns the (n,) norms before.

        Args:
            max_norm: the largest norm of a head.
            optimizer: whose parameters; None for all.
        """
        chosen = self.optimizers if optimizer is None else [optimizer]
        params = [p for opt in chosen for p in self.substitution.held(opt).values()]
        return clip_grad_norm_(
            params, self.per_head, max_norm, self.count, self.transport, synchronised=self.config.replicas == "step"
        )

    def step(self, optimizer: Optimizer | None = None, measure: bool = True) -> MergeRecord | None:
        """Count an optimizer's step, and merge what it trains if that is due. Call it after every step of an optimizer.

        Args:
            optimizer: which one stepped; may be left out if there is one.
            measure: whether a merge computes what `MergeRecord` calls norm and disagreement.

        Raises:
            RuntimeError: something else than a merge wrote to a factored weight.
            FloatingPointError: a merge found no finite head.
        """
        number = 0 if optimizer is None else self.optimizers.index(optimizer)
        clock = self.clocks[number]
        if not self._is_settling:
            self.guard.check_uses()
            self.guard.check_writes()
        hidden = self.per_head
        for param in self.substitution.held(self.optimizers[number]).values():
            # Code that zeroes the gradients of module.parameters() would not reach these.
            if param in hidden:
                param.grad = None
        for param in self._frozen:
            param.grad = None
        clock.step += 1
        if not self._is_settling:
            for f in self.injection.factors.values():
                f.end_trial()
        if self._schedule.due(clock.step, clock.last_merge):
            return self._merge(number, measure)
        return None

    def merge(self, measure: bool = True) -> MergeRecord:
        """Merge now. A collective: every device has to call it.

        With several optimizers, what each of them trains is merged if it made a step since its last merge; or all, if
        none did.

        Returns:
            The record of the last of these merges.

        Raises:
            RuntimeError, FloatingPointError: see `step`.
        """
        numbers = [number for number, clock in enumerate(self.clocks) if clock.unmerged]
        for number in numbers or range(len(self.clocks)):
            record = self._merge(number, measure)
        return record

    def finish(self) -> None:
        """Merge what is not merged yet, and give the module and the optimizers back."""
        if self.unmerged:
            self.merge()
        self.close()

    def close(self) -> None:
        """Give the module and the optimizers back without a merge. `state_dict` stays available."""
        self._closed = checkpoint.local_state(self)
        self.injection.eject()
        self.substitution.undo()

    def go_sequential(self, reason: str) -> None:
        """Have each local head run by itself from now on, with replicas of its own.

        Args:
            reason: why, for the report.
        """
        if self.execution != "sequential" or any(r.stack is None for r in self.injection.replicas):
            self.injection.split_replicas()
            self.substitution.replace(self._replacements())
            self._scale_gradients()
            self.guard.watch(self._watched())
        self.execution = "sequential"
        self.report.notes.append(f"{self.count} heads share this device in turn (sequential): {reason}.")

    def go_batched(self, reason: str) -> None:
        """Have all local heads run in one forward from now on.

        Args:
            reason: why, for the report.
        """
        self.execution = "batched"
        self.report.notes.append(f"{self.count} heads share this device in one forward (batched): {reason}.")

    def make_replicas(self, reasons: Mapping[str, str]) -> None:
        """Train parameters themselves, once for all local heads, that turn out to be no good for heads. A collective.

        What heads have learned since the last merge is merged first.

        Args:
            reasons: name of a factored weight, or of a replica of which each head has its own -> why.

        Raises:
            RuntimeError: no factored weight would be left.
        """
        chosen = [f for f in self.injection.factors.values() if f.name in reasons]
        if len(chosen) == len(self.injection.factors):
            why = "; ".join(f"{f.name} ({reasons[f.name]})" for f in chosen)
            raise RuntimeError(
                f"LTE needs at least one weight that can be factored; none is left after the first steps, as all are"
                f" used or written elsewhere: {why}. Train this module with another strategy."
            )
        if self.unmerged:
            merge.add_mean_deltas(chosen, self.transport)
        self.substitution.rest()
        for f in chosen:
            if self.injection.make_replica(f.weight, reasons[f.name]) is None:
                self._frozen.append(f.weight)
            self.substitution.restore(f.weight)
        for replica in self.injection.replicas:
            if replica.name in reasons and replica.stack is not None:
                self.injection.share(replica)
                self.substitution.restore(replica.param)
        self.substitution.replace(self._replacements())
        self.guard.watch(self._watched())
        self.made_replicas.update(reasons)

    def state_dict(self) -> checkpoint.State | None:
        """All that is needed beside the module's and the optimizers' own state; see `checkpoint.gather_state`."""
        local = self._closed or checkpoint.local_state(self)
        return checkpoint.gather_state(self, local)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; see `checkpoint.scatter_state`."""
        self.act()
        checkpoint.scatter_state(self, state)
        for f in self.injection.factors.values():
            f.end_trial()

    def _merge(self, number: int, measure: bool) -> MergeRecord:
        """Merge what one optimizer trains."""
        if not self._is_settling:
            self.guard.check_writes(look_at_bits=True)
        clock = self.clocks[number]
        self.merging = True
        self.last_record = merge.merge(
            [f for f in self.injection.factors.values() if self._trained_by[f.weight] == number],
            self.injection.replicas.of(p for p, own in self._trained_by.items() if own == number),
            self.module,
            {p: state for opt in self.optimizers for p, state in self.substitution.states(opt).items()},
            self.transport,
            self.config,
            step=clock.step,
            merges=self.merges,
            measure=measure,
        )
        clock.merged()
        self.merging = False
        self.guard.accept_writes()
        return self.last_record

    @property
    def _is_settling(self) -> bool:
        """Whether roles may still change: until every optimizer has made two steps, or one of them many."""
        steps = [clock.step for clock in self.clocks]
        return min(steps) < 2 and max(steps) < _SETTLING_STEPS

    def _replacements(self) -> dict[nn.Parameter, dict[str, nn.Parameter]]:
        replacements: dict[nn.Parameter, dict[str, nn.Parameter]] = {param: {} for param in self._frozen}
        for param, f in self.injection.factors.items():
            replacements[param] = {f"{self._names[param]}.A": f.A, f"{self._names[param]}.B": f.B}
        for replica in self.injection.replicas:
            if replica.stack is not None:
                replacements[replica.param] = {replica.name: replica.stack}
        return replacements

    def _note_optimizers(self) -> None:
        factored = {self._trained_by[weight] for weight in self.injection.factors}
        for number, optimizer in enumerate(self.optimizers):
            if number not in factored:
                kind = type(optimizer).__name__
                self.report.notes.append(f"Optimizer {number} ({kind}) holds no heads: it trains no factored weight.")

    def _scale_gradients(self) -> None:
        if self.count > 1:
            for param in self.per_head - self._scaled:
                scale_gradient(param, self.count)
                self._scaled.add(param)

    def _watched(self) -> list[Watched]:
        """What heads train in place of the user's own."""
        found = []
        for weight, f in self.injection.factors.items():
            owner = self.injection.roles[weight].owner
            found.append(Watched(f.name, weight, owner.module, owner.module_name, owner.key, f))
        for replica in self.injection.replicas:
            if replica.stack is not None:
                owner = replica.owners[0]
                found.append(Watched(replica.name, replica.param, owner.module, owner.module_name, owner.key))
        return found


def _params(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]
