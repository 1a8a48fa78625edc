"""Deciding what each parameter of the user's module becomes, and giving heads to its layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from lightning_lte.config import LTEConfig, matches
from lightning_lte.heads import Factors
from lightning_lte.layers import headed_class, linear
from lightning_lte.layers.base import LayerState, enter, leave
from lightning_lte.replicas import Owner, Replica, Replicas
from lightning_lte.switch import Switch


@dataclass(frozen=True)
class Entry:
    """The role of one parameter and the reason for it.

    Attributes:
        name: in the user's module.
        shape: of the user's parameter.
        role: "factored", "replica", "frozen" (by `replicas="freeze"`) or "untouched" (no optimizer holds it).
        reason: why.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str


@dataclass
class Report:
    """Which role each parameter has and why. `str()` has a line for every parameter, `summary()` a line for every kind.

    Attributes:
        entries: one for every parameter, in the module's order.
        notes: sentences about the run as a whole, such as how local heads share the device.
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(e.name, "x".join(map(str, e.shape)) or "scalar", e.role, e.reason) for e in self.entries]
        return "\n".join([_table([("parameter", "shape", "role", "why"), *rows]), *self.notes])

    def summary(self) -> str:
        """Parameters whose names differ in numbers alone share a line."""
        groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
        for e in self.entries:
            shape = "x".join(map(str, e.shape)) or "scalar"
            groups[re.sub(r"\d+", "*", e.name), shape, e.role, e.reason].append(e.name)
        rows = [
            (n if len(g) > 1 else g[0], str(len(g)), shape, role, why) for (n, shape, role, why), g in groups.items()
        ]
        return "\n".join([_table([("parameter", "count", "shape", "role", "why"), *rows]), *self.notes])


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
        ValueError: a pattern that matches nothing, nothing to train, nothing to factor.
    """
    trained = set(trained)
    owners: dict[nn.Parameter, list[Owner]] = defaultdict(list)
    names: dict[nn.Parameter, str] = {}
    inside_attention = {
        id(child)
        for m in module.modules()
        if isinstance(m, nn.MultiheadAttention)
        for child in m.modules()
        if child is not m
    }
    for module_name, owner in module.named_modules():
        for key, param in owner._parameters.items():
            if param is not None:
                owners[param].append(Owner(owner, module_name, key))
                names.setdefault(param, f"{module_name}.{key}" if module_name else key)
    _check_patterns(module, config)
    if not any(p.requires_grad and p in trained for p in names):
        raise ValueError(
            "LTE needs parameters to train; none of the module's parameters requires a gradient and is held by an"
            " optimizer. Return an optimizer over self.parameters() from configure_optimizers."
        )

    report, kinds = Report(), {}
    for param, name in names.items():
        role, reason = _role(param, owners[param], trained, config, inside_attention)
        kinds[param] = role
        report.entries.append(Entry(name, tuple(param.shape), role, reason))
    if "factored" not in kinds.values():
        seen = "\n".join(f"  {e.name}: {e.reason}" for e in report.entries[:20])
        raise ValueError(
            "LTE needs at least one weight that can be factored; found none among"
            f" {len(report.entries)} parameters. Lower `rank`, or change target_modules or exclude_modules."
            f" The reasons were:\n{seen}"
        )

    switch = Switch(count)
    factors: dict[nn.Parameter, Factors] = {}
    replicas = Replicas(count)
    states: dict[nn.Module, LayerState] = {}
    for param, role in kinds.items():
        owner = owners[param][0]
        if role == "factored":
            factors[param] = Factors(
                owner.module_name,
                param,
                rank=config.rank_of(owner.module_name),
                scale=config.scale_of(owner.module_name),
                count=count,
                first=first,
                seed=config.seed or 0,
                init=config.init,
                keep=config.after_merge == "keep",
            )
            states.setdefault(owner.module, LayerState(switch)).factors = factors[param]
        elif role == "replica":
            replica = Replica(names[param], param, owners[param])
            replicas.add(replica)
            known = (
                len(owners[param]) == 1
                and headed_class(owner.module)
                and id(owner.module) not in inside_attention
                and not any(matches(p, owner.module_name) for p in config.exclude_modules)
            )
            per_head = config.replicas == "merge" and count > 1 and param.requires_grad
            if per_head and (known or config.execution == "sequential"):
                replica.split(count)
                if known:
                    assert replica.stack is not None
                    states.setdefault(owner.module, LayerState(switch)).stacks[owner.key] = replica.stack
    for layer, state in states.items():
        headed = headed_class(layer)
        assert headed is not None
        enter(layer, headed, state)
    return Injection(module, switch, factors, replicas, report, list(states))


def _role(
    param: nn.Parameter,
    owners: list[Owner],
    trained: Collection[nn.Parameter],
    config: LTEConfig,
    inside_attention: set[int],
) -> tuple[str, str]:
    if param not in trained:
        return "untouched", "requires no gradient" if not param.requires_grad else "no optimizer holds it"
    other = "frozen" if config.replicas == "freeze" else "replica"
    owner = owners[0]
    if not param.requires_grad:
        return other, "requires no gradient now; trained in place if that changes"
    if len(owners) > 1:
        return other, "tied: shared by " + " and ".join(o.module_name or "the module" for o in owners)
    if not linear.can_be_headed(owner.module) or owner.key != "weight":
        kind = type(owner.module)
        if isinstance(owner.module, nn.Linear) and owner.key == "weight":
            return other, f"{kind.__name__} computes otherwise than nn.Linear"
        return other, "a bias" if owner.key == "bias" else f"{kind.__name__} is not a layer that can be factored"
    if id(owner.module) in inside_attention:
        return other, "nn.MultiheadAttention uses it without calling the layer"
    if not param.is_floating_point():
        return other, f"dtype {param.dtype}"
    if not config.wants(owner.module_name):
        excluded = any(matches(p, owner.module_name) for p in config.exclude_modules)
        return other, "named by exclude_modules" if excluded else "not named by target_modules"
    rank, (out_features, in_features) = config.rank_of(owner.module_name), param.shape
    if rank * (in_features + out_features) >= in_features * out_features:
        return other, f"thin: factors of rank {rank} would be no smaller"
    return "factored", f"rank {rank}, scale {config.scale_of(owner.module_name):g}"


def _check_patterns(module: nn.Module, config: LTEConfig) -> None:
    layers = {name: m for name, m in module.named_modules() if name}
    problems = []
    for argument in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument) or ():
            found = [name for name in layers if matches(pattern, name)]
            if not found:
                problems.append(f"  {argument} {pattern!r} matches no module")
            elif argument != "exclude_modules" and not any(linear.can_be_headed(layers[name]) for name in found):
                kinds = sorted({type(layers[name]).__name__ for name in found})
                problems.append(f"  {argument} {pattern!r} matches only {', '.join(kinds)}, which can't be factored")
    if problems:
        some = [name for name, layer in layers.items() if linear.can_be_headed(layer)]
        raise ValueError(
            "Every pattern must match a layer that can be factored; these don't:\n"
            + "\n".join(problems)
            + f"\nLayers that can be: {', '.join(some[:12]) or 'none'}{' ...' if len(some) > 12 else ''}."
            " A pattern is a regular expression for the whole name or its end from a dot on."
        )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
