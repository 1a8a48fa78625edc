"""Training a module through heads, without Lightning: what the strategy and a plain PyTorch loop share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte import checkpoint, merge
from lightning_lte.clock import Clock
from lightning_lte.config import LTEConfig
from lightning_lte.gradients import clip_grad_norm_, scale_gradient
from lightning_lte.guard import Guard, check_optimizers
from lightning_lte.injection import inject
from lightning_lte.merge import MergeRecord
from lightning_lte.report import Report
from lightning_lte.schedule import as_schedule
from lightning_lte.substitution import Substitution
from lightning_lte.transport import Transport


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
        clock: steps and merges done.
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

        trained = {p for opt in self.optimizers for group in opt.param_groups for p in group["params"]}
        self.injection = inject(module, trained, config, count=self.count, first=self.transport.rank * self.count)
        self._names = {p: n for n, p in module.named_parameters()}
        frozen = {entry.name for entry in self.report.entries if entry.role == "frozen"}
        self._frozen = [p for p, name in self._names.items() if name in frozen]
        self.substitution = Substitution(self.optimizers, self._replacements(), self._names)
        self._closed: checkpoint.State | None = None
        self._note_optimizers()
        self._scaled: set[nn.Parameter] = set()
        self._scale_gradients()
        self.guard = self._new_guard()
        self.clock = Clock(len(self.optimizers))
        self.last_record: MergeRecord | None = None
        self.merging = False

    @property
    def report(self) -> Report:
        return self.injection.report

    @property
    def per_head(self) -> set[nn.Parameter]:
        """What is trained and has the local heads as dimension 0."""
        factors = [p for f in self.injection.factors.values() for p in (f.A, f.B)]
        return {*factors, *(r.stack for r in self.injection.replicas if r.stack is not None)}

    @property
    def unmerged(self) -> bool:
        """Whether heads have learned something since the last merge."""
        return self.clock.step > self.clock.last_merge

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

    def after_backward(self, synchronise: bool = True) -> None:
        """Check the gradients; with `replicas="step"`, average those of replicas over devices.

        Args:
            synchronise: False on all but the last of several backwards that accumulate.

        Raises:
            RuntimeError: see `Guard.after_backward`.
        """
        self.guard.after_backward()
        if self.config.replicas == "step" and synchronise:
            self.injection.replicas.average_gradients(self.transport)

    def clip_grad_norm_(self, max_norm: float, optimizer: Optimizer | None = None) -> Tensor:
        """Clip each local head's gradient by its own 2-norm; returns the (n,) norms before.

        Args:
            max_norm: the largest norm of a head.
            optimizer: whose parameters; None for all.
        """
        chosen = self.optimizers if optimizer is None else [optimizer]
        params = [p for opt in chosen for group in opt.param_groups for p in group["params"]]
        return clip_grad_norm_(
            params, self.per_head, max_norm, self.count, self.transport, synchronised=self.config.replicas == "step"
        )

    def step(self, optimizer: Optimizer | None = None, measure: bool = True) -> MergeRecord | None:
        """Count an optimizer's step, and merge if that is due. Call it after every step of an optimizer.

        Args:
            optimizer: which one stepped; may be left out if there is one.
            measure: whether a merge computes what `MergeRecord` calls norm and disagreement.

        Raises:
            RuntimeError: something else than a merge wrote to a factored weight.
            FloatingPointError: a merge found no finite head.
        """
        optimizer = self.optimizers[0] if optimizer is None else optimizer
        self.guard.check_uses()
        self.guard.check_writes()
        hidden = self.per_head
        for group in optimizer.param_groups:
            for param in group["params"]:
                # Code that zeroes the gradients of module.parameters() would not reach these.
                if param in hidden:
                    param.grad = None
        for param in self._frozen:
            param.grad = None
        if not self.clock.tick(self.optimizers.index(optimizer)):
            return None
        if self._schedule.due(self.clock.step, self.clock.last_merge):
            return self.merge(measure)
        return None

    def merge(self, measure: bool = True) -> MergeRecord:
        """Merge now. A collective: every device has to call it.

        Raises:
            RuntimeError, FloatingPointError: see `step`.
        """
        self.guard.check_writes()
        self.merging = True
        self.last_record = merge.merge(
            self.injection,
            {p: state for opt in self.optimizers for p, state in self.substitution.states(opt).items()},
            self.transport,
            self.config,
            step=self.clock.step,
            merges=self.clock.merges,
            measure=measure,
        )
        self.clock.merged()
        self.merging = False
        self.guard.accept_writes()
        return self.last_record

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
            self.injection.split_replicas(self.config)
            self.substitution.replace(self._replacements())
            self._scale_gradients()
            self.guard = self._new_guard()
        self.execution = "sequential"
        self.report.notes.append(f"{self.count} heads share this device in turn (sequential): {reason}.")

    def go_batched(self, reason: str) -> None:
        """Have all local heads run in one forward from now on.

        Args:
            reason: why, for the report.
        """
        self.execution = "batched"
        self.report.notes.append(f"{self.count} heads share this device in one forward (batched): {reason}.")

    def state_dict(self) -> checkpoint.State | None:
        """All that is needed beside the module's and the optimizers' own state; see `checkpoint.gather_state`."""
        local = self._closed or checkpoint.local_state(self)
        return checkpoint.gather_state(self, local)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; see `checkpoint.scatter_state`."""
        checkpoint.scatter_state(self, state)

    def _replacements(self) -> dict[nn.Parameter, dict[str, nn.Parameter]]:
        replacements: dict[nn.Parameter, dict[str, nn.Parameter]] = {param: {} for param in self._frozen}
        for param, f in self.injection.factors.items():
            replacements[param] = {f"{self._names[param]}.A": f.A, f"{self._names[param]}.B": f.B}
        for replica in self.injection.replicas:
            if replica.stack is not None:
                replacements[replica.param] = {replica.name: replica.stack}
        return replacements

    def _note_optimizers(self) -> None:
        per_head = {p for f in self.injection.factors.values() for p in (f.A, f.B)}
        for number, optimizer in enumerate(self.optimizers):
            held = set(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
            if not held & per_head:
                kind = type(optimizer).__name__
                self.report.notes.append(f"Optimizer {number} ({kind}) holds no heads: it trains no factored weight.")

    def _scale_gradients(self) -> None:
        if self.count > 1:
            for param in self.per_head - self._scaled:
                scale_gradient(param, self.count)
                self._scaled.add(param)

    def _new_guard(self) -> Guard:
        hidden = {r.name: r.param for r in self.injection.replicas if r.stack is not None}
        return Guard(self.injection.factors.values(), hidden)
