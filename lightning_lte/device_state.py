"""What optimizers keep on one device alone: all but the tensors that have a row for each head, or for each device.

That is numbers, settings that an optimizer finds by itself, and containers of tensors, such as past gradients or a
preconditioner for each dimension. Devices need not agree in any of it, and none of it can be dealt out anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte.optimizers import wrapped_optimizers
from lightning_lte.shards import whole

State = dict[str, Any]

_PLAIN = (bool, int, float, complex, str, type(None))


def device_state(
    held: Mapping[str, nn.Parameter],
    states: Mapping[Tensor, Any],
    groups: Sequence[Mapping[str, Any]],
    optimizer: Optimizer,
) -> State:
    """What an optimizer keeps on this device alone.

    Args:
        held: what it trains, by name.
        states: of what it trains.
        groups: its param groups; parameters and their names are left out.
        optimizer: it.

    Returns:
        "states", "shapes" of the parameters that they belong to, "groups", and what it keeps for all of them: "of_all"
        in its state, under names, such as MADGRAD's count of steps, and "besides" elsewhere, where its own `state_dict`
        has more than torch's, or hooks of it add to that.
    """
    own: State = {}
    for name, param in held.items():
        own[name] = {key: _on_cpu(value) for key, value in states.get(param, {}).items() if is_own(value)}
    own = {name: kept for name, kept in own.items() if kept}
    settings = [
        {k: _on_cpu(v) for k, v in g.items() if k not in ("params", "param_names") and _is_plain(v)} for g in groups
    ]
    shapes = {name: list(held[name].shape) for name in own}
    state: Any = optimizer.state
    of_all = {key: _on_cpu(value) for key, value in state.items() if isinstance(key, str) and _is_plain(value)}
    besides = {key: _on_cpu(value) for key, value in _besides(optimizer).items()}
    return {"states": own, "shapes": shapes, "groups": settings, "of_all": of_all, "besides": besides}


def _besides(optimizer: Optimizer) -> State:
    # Those that wrap another one may not be constructed as torch's.
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    if type(optimizer).state_dict is Optimizer.state_dict and not hooks:
        return {}
    if wrapped_optimizers(optimizer):
        return {}  # the state of the one inside is not in checkpoints, as the report says
    own = optimizer.state_dict()
    return {key: value for key, value in own.items() if key not in ("state", "param_groups") and _is_plain(value)}


def put_what_is_of_all(optimizer: Optimizer, own: Mapping[str, Any]) -> None:
    """Give an optimizer again what it kept for all that it trains."""
    of_all, besides = (_each(own[key], torch.clone) for key in ("of_all", "besides"))
    state: Any = optimizer.state
    if besides:
        # In its own way. What it has of parameters comes elsewhere, and others know its groups.
        groups = optimizer.param_groups
        optimizer.load_state_dict({**besides, "state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
        optimizer.state, optimizer.param_groups = state, groups
    state.update(of_all)


def is_own(value: Any) -> bool:
    """Whether an entry of an optimizer's state is a device's own, and can be kept."""
    return not isinstance(value, Tensor) and _is_plain(value)


def goes_on(param: nn.Parameter, name: str, own: Mapping[str, Any], same_devices: bool) -> bool:
    """Whether a parameter can have again what an optimizer kept of it, wherever that was.

    Numbers may be another device's; containers of tensors belong to the very heads of one device.
    """
    containers = [value for value in own["states"].get(name, {}).values() if _has_tensors(value)]
    return not containers or (same_devices and own["shapes"][name] == list(param.shape))


def taken(param: nn.Parameter, name: str, own: Mapping[str, Any]) -> State:
    """What an optimizer kept of a parameter, where the parameter is."""
    kept: State = own["states"].get(name, {})
    return {key: _each(value, lambda tensor: tensor.to(param.device, copy=True)) for key, value in kept.items()}


def with_own_settings(groups: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> list[State]:
    """Param groups of the first device with the settings that another one had."""
    return [{**group, **_placed(kept, group)} for group, kept in zip(groups, own["groups"], strict=False)]


def _placed(kept: Mapping[str, Any], group: Mapping[str, Any]) -> State:
    return {k: v.to(group[k].device) if isinstance(group.get(k), Tensor) else v for k, v in kept.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is made of what `torch.load(..., weights_only=True)` reads."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) in (dict, OrderedDict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return isinstance(value, Tensor) or type(value) in _PLAIN


def _has_tensors(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor) or any(map(_has_tensors, inner))


def _on_cpu(value: Any) -> Any:
    return _each(value, lambda tensor: whole(tensor.detach()).cpu())


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with each of the tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, _each(inner, change)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_each(inner, change) for inner in value)
    return value
