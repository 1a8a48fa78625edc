"""Giving heads to the layers of the user's module, and taking them away."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_lte.config import LTEConfig
from lightning_lte.heads import Factors
from lightning_lte.layers import headed_class
from lightning_lte.layers.base import HeadedLayer, LayerState, enter, find_slots, leave, made_class
from lightning_lte.replicas import Replica, Replicas
from lightning_lte.report import Entry, Report
from lightning_lte.roles import Role, decide, is_of_own_class
from lightning_lte.shards import SharedFactors, is_shared_out
from lightning_lte.switch import Switch
from lightning_lte.trial import has_hooks


@dataclass
class Injection:
    """A module with heads. `eject` undoes it.

    Attributes:
        module: the user's.
        config: the user's choices.
        switch: which heads act.
        replicas: all that is trained and not factored.
        roles: parameter of the module -> its role at the start.
        factors: factored weight -> its factors.
        report: what became of every parameter.
        states: layer with heads -> its state.
    """

    module: nn.Module
    config: LTEConfig
    switch: Switch
    replicas: Replicas
    roles: dict[nn.Parameter, Role] = field(default_factory=dict)
    factors: dict[nn.Parameter, Factors] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    states: dict[nn.Module, LayerState] = field(default_factory=dict)

    def split_replicas(self) -> None:
        """Give each local head its own copy of every replica, which heads that take turns allow for all of them."""
        for replica in self.replicas:
            if replica.stack is None and not replica.shared and self._may_split(replica.param):
                self._split(replica)

    def split_again(self, names: Collection[str], in_turn: bool) -> None:
        """Give each local head its own copy of replicas of which it had one before, of those that are frozen now, too.

        Args:
            names: of these replicas.
            in_turn: whether heads take turns, so that all replicas can be told apart.
        """
        for replica in self.replicas:
            if replica.name in names and replica.stack is None and replica.param in self.roles:
                self._tell_apart(replica, self.roles[replica.param], in_turn, frozen=True)
        self._enter_layers()

    def grow(self, factor: int, heads: int) -> dict[nn.Parameter, nn.Parameter]:
        """Put `factor` local heads in the place of each; see `Factors.grow` and `Replica.grow`.

        Args:
            factor: g.
            heads: N over all devices from now on.

        Returns:
            What was trained -> what is trained in its place, for all that has the local heads as dimension 0. A replica
            that the one head of a device has trained in place has a copy for each head from now on, as at the start.
        """
        alone = self.switch.count == 1
        self.switch.count = self.replicas.count = self.switch.count * factor
        exchanged: dict[nn.Parameter, nn.Parameter] = {}
        for weight, f in self.factors.items():
            exchanged |= f.grow(factor, heads)
            self.report.entry(self.roles[weight].name).copies = f.count
        for replica in self.replicas:
            if replica.stack is not None:
                old, owner = replica.stack, self.roles[replica.param].owner
                replica.grow(factor)
                exchanged[old] = replica.stack
                self.report.entry(replica.name).copies = replica.count
                state = self.states.get(owner.layer)
                if state is not None and owner.layer_key in state.stacks:
                    state.stacks[owner.layer_key] = replica.stack
            elif alone and not replica.shared:
                self._tell_apart(replica, self.roles[replica.param], in_turn=False)
        self._enter_layers()
        return exchanged

    def make_replica(self, weight: nn.Parameter, reason: str) -> Replica | None:
        """Take the factors of a weight away, and train it as a replica; None if replicas are not trained.

        The local heads share it: who uses or writes it elsewhere knows of one only.

        Args:
            weight: a factored one.
            reason: for the report.
        """
        role = self.roles[weight]
        self.factors.pop(weight).end_trial()
        state = self.states[role.owner.layer]
        del state.factors[role.owner.layer_key]
        state.slots = [slot for slot in state.slots if slot[2] is not weight]
        self._leave_if_plain(role.owner.layer)
        entry = self.report.entry(role.name)
        entry.role, entry.reason, entry.copies = "frozen", reason, 0
        if self.config.replicas == "freeze":
            return None
        entry.role, entry.copies = "replica", 1
        replica = Replica(role.name, role.param, list(role.owners), shared=True)
        self.replicas.add(replica)
        return replica

    def share(self, replica: Replica) -> None:
        """Let the local heads share a replica of which each has its own."""
        replica.join()
        self.report.entry(replica.name).copies = 1
        owner = self.roles[replica.param].owner
        state = self.states.get(owner.layer)
        if state is not None and owner.layer_key in state.stacks:
            del state.stacks[owner.layer_key], state.users[owner.layer_key]
            state.user_slots = [slot for slot in state.user_slots if slot[2] is not replica.param]
            self._leave_if_plain(owner.layer)

    def adopt(self, name: str, param: nn.Parameter) -> Replica:
        """Train a parameter that came into an optimizer while training ran as a replica, shared by the local heads."""
        replica = Replica(name, param, [], shared=True)
        self.replicas.add(replica)
        if all(entry.name != name for entry in self.report.entries):
            self.report.entries.append(Entry(name, tuple(param.shape), "", ""))
        entry = self.report.entry(name)
        entry.role, entry.reason, entry.copies = "replica", "came into an optimizer while training ran", 1
        return replica

    def eject(self) -> None:
        """Give every layer its own class back."""
        eject(self.module)
        for f in self.factors.values():
            f.end_trial()
        self.states = {}

    def _leave_if_plain(self, layer: nn.Module) -> None:
        state = self.states[layer]
        if not (state.factors or state.stacks):
            leave(layer)
            del self.states[layer]

    def _add_replica(self, role: Role, in_turn: bool) -> None:
        owner = role.owner
        # Hooks on a parameter, a class of its own, and sparse gradients, are of the user's own parameter alone.
        shared = has_hooks(role.param) or is_of_own_class(role.param) or getattr(owner.module, "sparse", False)
        # Scripted modules keep the parameters they were compiled with.
        shared = shared or any(isinstance(o.module, torch.jit.ScriptModule) for o in role.owners)
        replica = Replica(role.name, role.param, list(role.owners), shared, still=not role.param.requires_grad)
        self.replicas.add(replica)
        self.report.entry(role.name).copies = 1
        self._tell_apart(replica, role, in_turn)

    def _tell_apart(self, replica: Replica, role: Role, in_turn: bool, frozen: bool = False) -> None:
        """Give each local head its own copy of a replica, if its layer can tell them apart, or heads take turns."""
        owner = role.owner
        if self._may_split(role.param, frozen) and not replica.shared:
            known = isinstance(owner.layer, HeadedLayer) or headed_class(owner.layer) is not None
            extensible = known and _extensible(owner.layer)
            tells_apart = extensible and len(role.owners) == 1 and not self.config.excludes(*owner.names)
            if tells_apart or in_turn:
                self._split(replica)
            if tells_apart:
                assert replica.stack is not None
                state = self.states.setdefault(owner.layer, LayerState(self.switch))
                state.stacks[owner.layer_key], state.users[owner.layer_key] = replica.stack, role.param

    def _enter_layers(self) -> None:
        """Have every layer with a state compute with it."""
        for layer, state in self.states.items():
            if isinstance(layer, HeadedLayer):
                find_slots(layer, state)
                continue
            headed = headed_class(layer)
            assert headed is not None
            enter(layer, headed, state)

    def _may_split(self, param: nn.Parameter, frozen: bool = False) -> bool:
        return self.config.replicas == "merge" and self.switch.count > 1 and (param.requires_grad or frozen)

    def _split(self, replica: Replica) -> None:
        replica.split(self.switch.count)
        self.report.entry(replica.name).copies = self.switch.count


def eject(module: nn.Module) -> None:
    """Give every layer of a module its own class back."""
    for layer in module.modules():
        if isinstance(layer, HeadedLayer):
            leave(layer)


def _extensible(layer: nn.Module) -> bool:
    headed = headed_class(layer)
    try:
        return isinstance(layer, HeadedLayer) or made_class(headed, type(layer)) is not None  # type: ignore[arg-type]
    except TypeError:
        return False


def inject(
    module: nn.Module, trained: Sequence[nn.Parameter], config: LTEConfig, *, count: int = 1, first: int = 0
) -> Injection:
    """Give heads to every layer of `module` that can be factored. All checks come before the first change.

    Args:
        module: the user's.
        trained: the parameters that optimizers hold, in the same order on all devices; only these get heads or become
            replicas. Those that are not the module's become replicas, too.
        config: the user's choices.
        count: n, local heads.
        first: number of the first local head.

    Raises:
        ValueError: see `decide`.
    """
    roles = decide(module, set(trained), config)
    device = next((param.device for param in trained), None)
    injection = Injection(module, config, Switch(count, device), Replicas(count), {role.param: role for role in roles})
    for role in roles:
        injection.report.entries.append(Entry(role.name, tuple(role.param.shape), role.kind, role.reason))
        if role.kind == "factored":
            owner = role.owner
            kind: Any = Factors
            if is_shared_out(role.param):
                kind = partial(SharedFactors, place=(owner.module, owner.key))
            f = kind(
                owner.weight_name,
                role.param,
                rank=role.rank,
                scale=config.scale_of(*owner.names),
                count=count,
                first=first,
                seed=config.seed,
                init=config.init,
                keep=config.after_merge == "keep",
                refresh=config.refresh,
                freeze_a=config.freeze_a,
                matrices=role.matrices,
            )
            injection.factors[role.param] = f
            injection.states.setdefault(owner.layer, LayerState(injection.switch)).factors[owner.layer_key] = f
            injection.report.entry(role.name).copies = count
        elif role.kind == "replica":
            injection._add_replica(role, config.execution == "sequential")
    for i, param in enumerate(p for p in dict.fromkeys(trained) if p not in injection.roles):
        if config.replicas != "freeze":
            injection.adopt(f"outside.{i}", param)
            injection.report.entry(f"outside.{i}").reason = "an optimizer holds it, and the module does not"
    injection._enter_layers()
    return injection
