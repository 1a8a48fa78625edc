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
        self._original = [[list(group["params"]) for group in opt.param_groups] for opt in self.optimizers]
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
        for group, original in zip(optimizer.param_groups, self._original[self.optimizers.index(optimizer)], strict=True):
            plain = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            if "param_names" in group:
                plain["param_names"] = [self.names.get(p, "") for p in original]
            groups.append({**plain, "params": list(range(index, index + len(original)))})
            index += len(original)
        return {"state": {}, "param_groups": groups}

    def load_plain_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
        """Take over the settings of param groups from a state_dict; False if its groups are not shaped like ours."""
        original = self._original[self.optimizers.index(optimizer)]
        groups = state["param_groups"]
        if [len(g["params"]) for g in groups] != [len(params) for params in original]:
            return False
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        return True

    def undo(self) -> None:
        """Give every group the parameters that the user put there."""
        for optimizer, originals in zip(self.optimizers, self._original, strict=True):
            for group, original in zip(optimizer.param_groups, originals, strict=True):
                trained = group["params"]
                group["params"] = original
                had_state = [optimizer.state.pop(p, None) is not None for p in trained if p not in set(original)]
                for param in original:
                    if any(had_state) and param not in optimizer.state:
                        _start_state(optimizer, group, param)
                if "param_names" in group:
                    group["param_names"] = [self.names.get(p, "") for p in original]


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
