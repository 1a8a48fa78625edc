"""Giving heads to the layers of the user's module, and taking them away."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from lightning_lte.config import LTEConfig
from lightning_lte.heads import Factors
from lightning_lte.layers import headed_class
from lightning_lte.layers.base import LayerState, enter, leave
from lightning_lte.replicas import Replica, Replicas
from lightning_lte.report import Entry, Report
from lightning_lte.roles import Role, decide
from lightning_lte.switch import Switch


@dataclass
class Injection:
    """A module with heads. `eject` undoes it."""

    module: nn.Module
    switch: Switch
    factors: dict[nn.Parameter, Factors]
    replicas: Replicas
    report: Report
    layers: list[nn.Module]

    def split_replicas(self, config: LTEConfig) -> None:
        """Give each local head its own copy of every replica, which sequential execution allows for all of them."""
        for replica in self.replicas:
            if config.replicas == "merge" and replica.stack is None and replica.param.requires_grad:
                replica.split(self.switch.count)
                self.report.entry(replica.name).copies = self.switch.count

    def eject(self) -> None:
        """Give every layer its own class back."""
        for layer in self.layers:
            leave(layer)
        self.layers = []


def inject(
    module: nn.Module, trained: Collection[nn.Parameter], config: LTEConfig, *, count: int = 1, first: int = 0
) -> Injection:
    """Give heads to every layer of `module` that can be factored. All checks come before the first change.

    Args:
        module: the user's.
        trained: the parameters that optimizers hold; only these get heads or become replicas.
        config: the user's choices.
        count: n, local heads.
        first: number of the first local head.

    Raises:
        ValueError: see `decide`.
    """
    switch = Switch(count)
    factors: dict[nn.Parameter, Factors] = {}
    replicas = Replicas(count)
    states: dict[nn.Module, LayerState] = {}
    report = Report()
    for role in decide(module, trained, config):
        copies = 0
        if role.kind == "factored":
            names = role.owner.names
            factors[role.param] = Factors(
                role.owner.weight_name,
                role.param,
                rank=config.rank_of(*names),
                scale=config.scale_of(*names),
                count=count,
                first=first,
                seed=config.seed or 0,
                init=config.init,
                keep=config.after_merge == "keep",
                matrices=role.matrices,
            )
            state = states.setdefault(role.owner.layer, LayerState(switch))
            state.factors[role.owner.layer_key] = factors[role.param]
            copies = count
        elif role.kind == "replica":
            replica = Replica(role.name, role.param, list(role.owners))
            replicas.add(replica)
            copies = 1
            if config.replicas == "merge" and count > 1 and role.param.requires_grad:
                known = _tells_heads_apart(role, config)
                if known or config.execution == "sequential":
                    replica.split(count)
                    copies = count
                if known:
                    assert replica.stack is not None
                    state = states.setdefault(role.owner.layer, LayerState(switch))
                    state.stacks[role.owner.layer_key] = replica.stack
        report.entries.append(Entry(role.name, tuple(role.param.shape), role.kind, role.reason, copies))
    for layer, state in states.items():
        headed = headed_class(layer)
        assert headed is not None
        enter(layer, headed, state)
    return Injection(module, switch, factors, replicas, report, list(states))


def _tells_heads_apart(role: Role, config: LTEConfig) -> bool:
    """Whether the layer of a replica can use one for each head in one forward."""
    excluded = config.excludes(*role.owner.names)
    return len(role.owners) == 1 and headed_class(role.owner.layer) is not None and not excluded
