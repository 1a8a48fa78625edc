"""What is trained in place of the user's parameters, and what optimizers and the module show of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lte.buffers import Buffers
from lightning_lte.config import LTEConfig
from lightning_lte.gradients import scale_gradient
from lightning_lte.guard import Guard, Watched
from lightning_lte.heads import Factors
from lightning_lte.injection import eject, inject
from lightning_lte.optimizers import check_modes, check_stacks, wrapped_optimizers
from lightning_lte.report import Report
from lightning_lte.roles import REMOVE_HOOKS
from lightning_lte.running_statistics import RunningStatistics
from lightning_lte.substitution import Substitution
from lightning_lte.trial import HOOKED, WRITTEN, Trial


class Trainees:
    """The heads and replicas of a module, in the place of its parameters in optimizers and layers.

    Args:
        module: the user's.
        optimizers: over its parameters.
        config: the user's choices.
        count: n, local heads.
        first: number of the first local head.

    Attributes:
        injection: the module with its heads.
        substitution: what optimizers hold.
        guard: watches the parameters that heads train in place of the user's own.
        statistics: running statistics of the module.
        buffers: its other buffers.
        trained_by: user's parameter -> number of the optimizer that trains it, the first one that holds it.
        borrowed: for each optimizer, what it holds that is merged by the clock of another one.
        frozen: what an optimizer holds and `replicas="freeze"` leaves as it is.
        gradient_scale: what gradients of single heads are multiplied by: n, as local heads share the mean of their
            losses; 1 where each of them runs backward on a loss of its own.
        full_rank: whether heads have not begun, and the user's own parameters are trained.
        made_replicas: what lost its heads while training ran, and why.

    Raises:
        ValueError: see `inject`, `check_stacks` and `check_modes`; the module and the optimizers are as they were then.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Optimizer], config: LTEConfig, count: int, first: int
    ) -> None:
        self.module, self.optimizers, self.config, self.count = module, list(optimizers), config, count
        self.trained_by: dict[nn.Parameter, int] = {}
        for number, optimizer in enumerate(self.optimizers):
            for param in _params(optimizer):
                self.trained_by.setdefault(param, number)
        self.borrowed: list[set[nn.Parameter]] = [set() for _ in self.optimizers]
        self._note_borrowed()
        self.made_replicas: dict[str, str] = {}
        self._gradient_scale = count
        self.full_rank = config.full_rank_steps > 0
        self._begun = False
        self._scaled: set[nn.Parameter] = set()
        self._names = {p: n for n, p in module.named_parameters()}
        try:
            self.injection = inject(module, list(self.trained_by), config, count=count, first=first)
            kept = {*self.injection.factors, *(replica.param for replica in self.injection.replicas)}
            self.frozen = [p for p in self.trained_by if p not in kept]
            # Heads that share a device may have replicas of their own, too, from the first batch on.
            several = count > 1 or bool(config.grow_heads)
            replicas = [replica.param for replica in self.injection.replicas] if several else []
            check_stacks(self.optimizers, self.injection.factors.keys())
            check_modes(self.optimizers, {*self.injection.factors, *replicas})
            self.substitution = Substitution(self.optimizers, self._replacements(), self._names)
            self._note_optimizers()
            self._scale_gradients()
            self.statistics = RunningStatistics(module, self.trained_by)
            self.buffers = Buffers(module, self.statistics.copies())
            if config.execution == "sequential" and count > 1:
                self.statistics.split(count)
            self.guard = Guard(self._watched())
            if self.full_rank:
                self.substitution.rest()
                # Loading a state meanwhile means that of the user's own parameters.
                self.substitution.forget()
            else:
                self._begin_trials()
        except BaseException:
            eject(module)
            if hasattr(self, "substitution"):
                self.substitution.undo()
            raise

    @property
    def report(self) -> Report:
        """Which role each parameter has and why."""
        return self.injection.report

    @property
    def per_head(self) -> set[nn.Parameter]:
        """What is trained and has the local heads as dimension 0."""
        factors = [p for f in self.injection.factors.values() for p in f.trained.values()]
        return {*factors, *(r.stack for r in self.injection.replicas if r.stack is not None)}

    def used_up(self, optimizer: Optimizer) -> set[nn.Parameter]:
        """What loses its gradient as an optimizer has stepped: of what it trains, all that is each head's own.

        Code that zeroes the gradients of `module.parameters()` would not reach that.

        What another optimizer trains, too, keeps its gradient: that one may step on it as well.
        """
        used = self.per_head.intersection(self.substitution.held(optimizer).values())
        others = [own for own in self.optimizers if own is not optimizer]
        return used.difference(*(self.substitution.held(own).values() for own in others))

    def act(self) -> None:
        """Show the optimizers what they train. What came into their groups since is trained as a replica.

        The first time, the module's parameters are taken as they are now: hooks before training may have loaded them.
        Nothing is done before heads begin.
        """
        if self.full_rank:
            return
        self._note_borrowed()
        self.substitution.act()
        if not self._begun:
            self._begun = True
            self.take_weights(self.guard.changed())
        self.adopt()

    def adopt(self) -> None:
        """Train what came into the optimizers' groups since as replicas. Nothing is done before heads begin."""
        if self.full_rank:
            return
        # Made once: for each parameter anew, it would cost the square of their number in every batch.
        per_head = self.per_head
        for number, optimizer in enumerate(self.optimizers):
            for param in _params(optimizer):
                if param not in self.trained_by and param not in per_head:
                    self.trained_by[param] = number
                    if self.config.replicas != "freeze":
                        name = self._names.get(param, f"outside.{len(self.trained_by)}")
                        self.injection.adopt(name, param)
                        self.substitution.names[param] = name

    def _note_borrowed(self) -> None:
        if len(self.optimizers) == 1:
            return  # this runs at every batch
        for number, optimizer in enumerate(self.optimizers):
            self.borrowed[number].update(p for p in _params(optimizer) if self.trained_by.get(p, number) != number)

    def begin_heads(self) -> None:
        """Train through heads from now on, which go on from the weights as they are."""
        self.full_rank = False
        for param in self.trained_by:
            param.grad = None
        self.take_weights({w.name for w in self._watched()})
        self.statistics.begin()
        self._begin_trials()
        self.substitution.forget()
        self.act()

    def _begin_trials(self) -> None:
        for f in self.injection.factors.values():
            # FSDP puts gradients into weights that it has shared out itself, past the hooks of a trial. One that is
            # used elsewhere has a gradient all the same, which `Guard` finds. So has one that is frozen by now, and
            # thawed later.
            if f.shard is f.weight and f.weight.requires_grad:
                f.trial = Trial(f.weight)

    def rest(self) -> None:
        """Show the optimizers the user's own parameters; between batches, for those who look."""
        self.substitution.rest()

    def trained_for(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What is trained in place of parameters that the module shows: factors, replicas, or they themselves."""
        if self.full_rank:
            return list(params)
        stacks = {shown: replica.trained for replica in self.injection.replicas for shown in replica.shown}
        trained: list[nn.Parameter] = []
        for param in params:
            f = self.injection.factors.get(param)
            trained += [stacks.get(param, param)] if f is None else f.trained.values()
        return trained

    def trains_in_place_of(self, params: Iterable[nn.Parameter]) -> bool:
        """Whether something else is trained in place of any of these, or they are what heads train."""
        params = list(params)
        if not self.per_head.isdisjoint(params):
            return True  # as optimizers hold them
        trained = self.trained_for(params)
        return len(trained) != len(params) or any(a is not b for a, b in zip(trained, params, strict=True))

    @property
    def gradient_scale(self) -> int:
        """What gradients of single heads are multiplied by; see above."""
        return self._gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, scale: int) -> None:
        self._gradient_scale = scale
        for f in self.injection.factors.values():
            f.gradient_scale = scale

    def split_replicas(self) -> None:
        """Give each local head replicas and running statistics of its own, as heads that take turns may have."""
        self.injection.split_replicas()
        self.statistics.split(self.count)
        self.show_exchanged()

    def split_again(self, names: Collection[str], in_turn: bool) -> None:
        """Give each local head replicas of its own, as it had them before; see `Injection.split_again`."""
        self.injection.split_again(names, in_turn)
        self.show_exchanged()

    def show_exchanged(self) -> None:
        """Have optimizers and the guard know what is trained now, and its gradients scaled."""
        self.substitution.replace(self._replacements())
        self._scale_gradients()
        self.guard.watch(self._watched())

    def collect_gradients(self) -> None:
        """Hand on what backward left at the replicas of heads that took turns."""
        self.injection.replicas.collect_gradients(self.gradient_scale)

    def give_back(self) -> None:
        """Give the module and the optimizers back."""
        self.injection.eject()
        self.substitution.undo()

    def select(self, head: int | None) -> None:
        """Let the module show what one head has in place of its own replicas and running statistics; None undoes it."""
        self.injection.replicas.select(head)
        self.statistics.select(head)

    def _before_demotion(self, factors: Sequence[Factors]) -> None:
        """Called before factors of weights are given up."""

    def make_replicas(self, reasons: Mapping[str, str]) -> None:
        """Train parameters themselves, once for all local heads, that turn out to be no good for heads.

        Args:
            reasons: name of a factored weight, or of a replica of which each head has its own -> why.

        Raises:
            RuntimeError: no factored weight would be left.
        """
        chosen = [f for f in self.injection.factors.values() if f.name in reasons]
        if chosen and len(chosen) == len(self.injection.factors):
            why = "; ".join(f"{f.name} ({reasons[f.name]})" for f in chosen)
            raise RuntimeError(
                f"LTE needs at least one weight that can be factored; none is left after the first steps, as all are"
                f" used or written elsewhere: {why}. Train this module with another strategy; or, if the loss has a"
                " penalty on the parameters, leave that to the optimizer's weight_decay."
                + (f" {REMOVE_HOOKS}" if any(reasons[f.name] == HOOKED for f in chosen) else "")
                + ("" if any(f.took_part for f in chosen) else " (Forwards have to run inside `explorer.heads()`.)")
            )
        self._before_demotion(chosen)
        self.collect_gradients()
        self.substitution.rest()
        for f in chosen:
            if self.injection.make_replica(f.weight, reasons[f.name]) is None:
                self.frozen.append(f.weight)
            self.substitution.restore(f.weight)
        for replica in self.injection.replicas:
            if replica.name in reasons:
                # Also before heads have copies of their own, as in a run that goes on and has not had its trial yet.
                replica.shared = True
                if replica.stack is not None:
                    self.injection.share(replica)
                    self.substitution.restore(replica.param)
        self.substitution.replace(self._replacements())
        self.guard.watch(self._watched())
        self.made_replicas.update(reasons)

    def with_neighbours(self, reasons: dict[str, str]) -> dict[str, str]:
        """Add the replicas of modules all of whose weights are written from outside.

        Those of a momentum teacher may not change in the first steps, and are written all the same.
        """
        names = {weight: self._names[weight] for weight in self.injection.factors}
        written = {names[w] for w, f in self.injection.factors.items() if reasons.get(f.name) == WRITTEN}
        wholly = {
            prefix
            for name in written
            for prefix in _prefixes(name)
            if all(other in written for other in names.values() if other.startswith(prefix))
        }
        own = [r.name for r in self.injection.replicas if r.stack is not None and r.name not in reasons]
        return {**reasons, **{n: WRITTEN for n in own if any(n.startswith(prefix) for prefix in wholly)}}

    def take_weights(self, names: Collection[str]) -> None:
        """Have heads go on from the user's parameters as they are now, for those that were written."""
        with torch.no_grad():
            for f in self.injection.factors.values():
                if f.name in names:
                    if f.rounded is not None and not f.rounded.released:
                        # The user's parameter is on the CPU, and what forwards read is not.
                        f.rounded.write(f.weight.to(f.rounded.device))
                    f.settle()
                    f.anchored = "float32"
                    f.left = 1.0
                    # Of the weight that was.
                    f.error = None
                    if f.remainder is not None:
                        f.remainder.zero_()
                    if f.anchor_B is None:
                        f.B.zero_()
            for replica in self.injection.replicas:
                if replica.name in names and replica.stack is not None:
                    replica.stack.copy_(replica.param.expand_as(replica.stack))
        self.guard.accept_writes()

    def _replacements(self) -> dict[nn.Parameter, dict[str, nn.Parameter]]:
        replacements: dict[nn.Parameter, dict[str, nn.Parameter]] = {param: {} for param in self.frozen}
        for param, f in self.injection.factors.items():
            replacements[param] = {f"{self._names[param]}.{key}": own for key, own in f.trained.items()}
        for replica in self.injection.replicas:
            if replica.stack is not None:
                replacements[replica.param] = {replica.name: replica.stack}
        return replacements

    def _note_optimizers(self) -> None:
        factored = {self.trained_by[weight] for weight in self.injection.factors}
        for number, optimizer in enumerate(self.optimizers):
            if number not in factored:
                kind = type(optimizer).__name__
                self.report.notes.append(
                    f"Optimizer {number} ({kind}) holds no heads: it trains no factored weight. If it should, lower"
                    " `rank`, or change target_modules or exclude_modules; the reasons are above."
                )
            inner = [type(wrapped).__name__ for wrapped in wrapped_optimizers(optimizer)]
            if inner:
                self.report.notes.append(
                    f"Optimizer {number} wraps {', '.join(inner)}, whose own state checkpoints don't keep: a resumed"
                    " run starts it anew."
                )

    def _scale_gradients(self) -> None:
        self.gradient_scale = self._gradient_scale
        stacks = {r.stack for r in self.injection.replicas if r.stack is not None}
        for stack in stacks - self._scaled:
            scale_gradient(stack, lambda: self.gradient_scale)
        self._scaled = stacks

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


def _prefixes(name: str) -> list[str]:
    """Names of the modules around a parameter, each with its dot: "a.b.weight" is in "a." and "a.b."."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) + "." for i in range(len(parts))]
