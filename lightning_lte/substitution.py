"""Putting factors and per-head replicas into the user's param groups, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class Substitution:
    """Replaces parameters in the param groups of the user's optimizers, in place and in order.

    Learning rate, weight decay and every other setting of a group carry over, and so do schedulers, which write to the
    same groups.

    Args:
        optimizers: the user's.
        replacements: user's parameter -> what the optimizer trains instead, by name; an empty dict takes the
            parameter out.
        names: user's parameter -> its name in the module.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        replacements: Mapping[nn.Parameter, Mapping[str, nn.Parameter]],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self.optimizers = list(optimizers)
        self.names = dict(names)
        self._original = [[_content(group) for group in opt.param_groups] for opt in self.optimizers]
        self.replace(replacements)

    def replace(self, replacements: Mapping[nn.Parameter, Mapping[str, nn.Parameter]]) -> None:
        """Replace parameters; those that are not held are left alone."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                names = group.get("param_names")
                params: list[nn.Parameter] = []
                new_names: list[str] = []
                for i, param in enumerate(group["params"]):
                    new = replacements.get(param)
                    if new is None:
                        params.append(param)
                        new_names.append(names[i] if names else self.names.get(param, ""))
                    else:
                        had_state = optimizer.state.pop(param, None) is not None
                        params.extend(new.values())
                        if had_state:
                            for p in new.values():
                                _start_state(optimizer, group, p)
                        new_names.extend(new)
                        self.names.update({p: n for n, p in new.items()})
                group["params"] = params
                if names:
                    group["param_names"] = new_names

    def held(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """What an optimizer trains now, by name."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return {self.names.get(p, f"unnamed.{i}"): p for i, p in enumerate(params)}

    def plain_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict in terms of the user's own parameters: its settings, and no moments."""
        index, groups = 0, []
        for group, original in zip(optimizer.param_groups, self._user_content(optimizer), strict=True):
            count = len(original["params"])
            groups.append({**group, **original, "params": list(range(index, index + count))})
            index += count
        return {"state": {}, "param_groups": groups}

    def load_plain_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
        """Take over the settings of param groups from a state_dict; False if its groups are not shaped like ours."""
        groups = state["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self._user_content(optimizer)]:
            return False
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        return True

    def undo(self) -> None:
        """Give every group the parameters that the user put there."""
        for optimizer in self.optimizers:
            for group, original in zip(optimizer.param_groups, self._user_content(optimizer), strict=True):
                trained, params = group["params"], original["params"]
                group.update(original)
                had_state = [optimizer.state.pop(p, None) is not None for p in trained if p not in set(params)]
                for param in params:
                    if any(had_state) and param not in optimizer.state:
                        _start_state(optimizer, group, param)

    def _user_content(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The content of each param group as the user put it there; of groups added since, as it is."""
        known = self._original[self.optimizers.index(optimizer)]
        return known + [_content(group) for group in optimizer.param_groups[len(known) :]]


def _content(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(group[key]) for key in ("params", "param_names") if key in group}


def _start_state(optimizer: Optimizer, group: Mapping[str, Any], param: nn.Parameter) -> None:
    """Give a parameter the state that some optimizers (Adagrad) make when they are constructed; most make it later."""
    settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    constructor: Any = type(optimizer)
    try:
        twin: Optimizer = constructor([{**settings, "params": [param]}], **optimizer.defaults)
    except Exception:
        return  # made from other arguments than its settings; torch's own Adagrad is not
    if param in twin.state:
        optimizer.state[param] = twin.state[param]
