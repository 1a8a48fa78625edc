"""Putting factors and per-head replicas into the user's param groups, and taking them out again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte.optimizers import first_state, laid_out


@dataclass
class _Swap:
    """What was changed in one param group.

    Attributes:
        params: the user's list, as it was.
        names: the user's names for them, if the group has any.
        inside: what was put there.
    """

    group: dict[str, Any]
    params: list[nn.Parameter]
    names: list[str] | None
    inside: set[nn.Parameter]


class Substitution:
    """Replaces parameters in the param groups of the user's optimizers, in place and in order.

    Learning rate, weight decay and every other setting of a group carry over, and so do schedulers, which write to the
    same groups. The lists of parameters are changed, not exchanged, so that an optimizer that holds on to one (LBFGS)
    sees it, too. While it rests, groups and states show the user's parameters alone: callbacks such as BaseFinetuning
    look each of them up by name. Who clears or loads an optimizer's state then means that of all it trains: what is
    hidden is forgotten, with a warning.

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
        self._replacements: dict[nn.Parameter, Mapping[str, nn.Parameter]] = {}
        self._swaps: list[list[_Swap]] = [[] for _ in self.optimizers]
        # States of what is inside, while the optimizer does not show them.
        self._states: list[dict[Tensor, Any]] = [{} for _ in self.optimizers]
        # While they rest: the state that each optimizer shows, and whether there was anything in it.
        self._shown: list[tuple[Any, bool] | None] = [None for _ in self.optimizers]
        # Optimizers that make their state when they are constructed expect it for the user's parameters again.
        self._had_state: list[set[nn.Parameter]] = [set() for _ in self.optimizers]
        self.replace(replacements)

    def replace(self, replacements: Mapping[nn.Parameter, Mapping[str, nn.Parameter]]) -> None:
        """Replace parameters, from now on; those that are not held are left alone."""
        self.rest()
        self._replacements.update(replacements)
        self.names.update({p: name for new in replacements.values() for name, p in new.items()})
        self.act()

    def restore(self, param: nn.Parameter) -> None:
        """Let the optimizer train a user's parameter itself again, while the substitution rests."""
        for new in self._replacements.pop(param, {}).values():
            for states in self._states:
                states.pop(new, None)
        self._start_again({param})

    def move(self, old: nn.Parameter, new: nn.Parameter, changed: Callable[[int, dict[str, Any]], Any]) -> None:
        """Let another parameter take over the state of one that was put in, while the substitution rests.

        Args:
            old: is put in no longer; give `replace` the new one.
            new: in its place.
            changed: makes the new state from the number of the optimizer and the old state.
        """
        self.names.pop(old, None)
        for number, states in enumerate(self._states):
            if old in states:
                states[new] = changed(number, states.pop(old))

    def act(self) -> None:
        """Put the replacements in. Does nothing where they are in."""
        for number, optimizer in enumerate(self.optimizers):
            self._forget_if_reset(number)
            self._shown[number] = None
            known = [swap.group for swap in self._swaps[number]]
            for group in optimizer.param_groups:
                if any(group is own for own in known) or not any(p in self._replacements for p in group["params"]):
                    continue
                outside, names = list(group["params"]), group.get("param_names")
                inside = {p: self._inside(p, None if names is None else names[i]) for i, p in enumerate(outside)}
                group["params"][:] = [new for own in inside.values() for new in own.values()]
                if names is not None:
                    group["param_names"] = [name for own in inside.values() for name in own]
                self._swaps[number].append(_Swap(group, outside, names, set(group["params"])))
                for param in outside:
                    state = optimizer.state.pop(param, None) if param in self._replacements else None
                    if state is not None:
                        self._had_state[number].add(param)
                        for new in self._replacements[param].values():
                            if new not in self._states[number]:
                                _start_state(optimizer, group, new, param, state)
            optimizer.state.update(self._states[number])
            self._states[number].clear()

    def rest(self) -> None:
        """Let the groups and states show what the user put there. Does nothing where they do."""
        ours = {p for new in self._replacements.values() for p in new.values()}
        for number, optimizer in enumerate(self.optimizers):
            for swap in self._swaps[number]:
                added = [p for p in swap.group["params"] if p not in swap.inside]
                swap.group["params"][:] = [*swap.params, *added]
                if swap.names is not None:
                    swap.group["param_names"] = swap.names
            self._swaps[number] = []
            for param in ours & optimizer.state.keys():
                self._states[number][param] = optimizer.state.pop(param)
            self._forget_if_reset(number)
            self._shown[number] = optimizer.state, bool(optimizer.state)

    def _forget_if_reset(self, number: int) -> None:
        """Forget the hidden states of an optimizer whose own was exchanged, as loading does it, or emptied meanwhile.

        An empty state that is cleared stays the same, and nothing tells of it.
        """
        optimizer, shown = self.optimizers[number], self._shown[number]
        if shown is None:
            return
        state, filled = shown
        if optimizer.state is state and (state or not filled):
            return
        self._shown[number] = optimizer.state, bool(optimizer.state)
        if self._states[number]:
            self._states[number].clear()
            kind = type(optimizer).__name__
            warnings.warn(
                f"The state of {kind} was cleared or loaded while training runs, so what it knew of the heads (moments"
                " and the like) is gone, too, and starts anew. If only settings were to change, write them to its"
                " param_groups.",
                stacklevel=2,
            )

    def forget(self) -> None:
        """Forget the states of what is inside, while the substitution rests."""
        for states in self._states:
            states.clear()
        self._start_again(self._replacements.keys())

    def undo(self) -> None:
        """Give every group the parameters that the user put there, for good, and forget the states of all others."""
        self.rest()
        self.forget()
        self._replacements = {}

    def _start_again(self, params: Collection[nn.Parameter]) -> None:
        """Give the user's parameters, which optimizers show again, a state where they had one from the start."""
        for number, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param in params and param in self._had_state[number] and param not in optimizer.state:
                        _start_state(optimizer, group, param)

    def held(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """What an optimizer trains, by name."""
        found: dict[str, nn.Parameter] = {}
        for group in self._user_content(optimizer):
            for param in group["params"]:
                new = self._replacements.get(param)
                found.update({self.names.get(param, f"unnamed.{len(found)}"): param} if new is None else new)
        return found

    def states(self, optimizer: Optimizer) -> dict[Tensor, Any]:
        """The state of everything that an optimizer trains, whether it rests or not."""
        number = self.optimizers.index(optimizer)
        self._forget_if_reset(number)
        shown = {param: state for param, state in optimizer.state.items() if isinstance(param, Tensor)}
        return {**shown, **self._states[number]}

    def set_state(self, optimizer: Optimizer, param: nn.Parameter, state: dict[str, Any]) -> None:
        """Give a parameter the state it had in a checkpoint."""
        number = self.optimizers.index(optimizer)
        hidden = not self._swaps[number] and any(
            param is new for own in self._replacements.values() for new in own.values()
        )
        (self._states[number] if hidden else optimizer.state)[param] = state

    def drop_state(self, optimizer: Optimizer, param: nn.Parameter) -> None:
        """Take a parameter's state away, as it had none in a checkpoint."""
        optimizer.state.pop(param, None)
        self._states[self.optimizers.index(optimizer)].pop(param, None)

    def plain_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict in terms of the user's own parameters: its settings, and no moments."""
        index, groups = 0, []
        for group, original in zip(optimizer.param_groups, self._user_content(optimizer), strict=True):
            count = len(original["params"])
            groups.append({**group, **original, "params": list(range(index, index + count))})
            index += count
        return {"state": {}, "param_groups": groups}

    def load_plain_state(self, optimizer: Optimizer, state: Mapping[str, Any], goes_on: bool = True) -> bool:
        """Take over the settings of param groups from a state_dict.

        Args:
            optimizer: one of ours.
            state: from `plain_state`, or of the user's own optimizer.
            goes_on: whether moments are taken over, too, and with them what optimizers keep in groups as they step,
                such as a count of steps.

        Returns:
            False if its groups are of another shape, or lack settings that the optimizer was constructed with.
        """
        groups = state["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self._user_content(optimizer)]:
            return False
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            # Optimizers that wrap another one may have no defaults, or have some that no group has.
            if (group.keys() & getattr(optimizer, "defaults", group).keys()) - saved.keys():
                return False
        content, of_schedulers = {"params", "param_names"}, {"initial_lr", "swa_lr"}
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            taken = saved.keys() - content
            if goes_on:
                for key in group.keys() - saved.keys() - content:
                    del group[key]
            else:
                taken &= group.keys() | of_schedulers
            group.update({key: saved[key] for key in taken})
        return True

    def _inside(self, param: nn.Parameter, name: str | None) -> Mapping[str, nn.Parameter]:
        new = self._replacements.get(param)
        return {self.names.get(param, "") if name is None else name: param} if new is None else new

    def _user_content(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The content of each param group as the user put it there."""
        swaps = self._swaps[self.optimizers.index(optimizer)]
        content = []
        for group in optimizer.param_groups:
            swap = next((swap for swap in swaps if swap.group is group), None)
            own: dict[str, Any] = {"params": list(group["params"] if swap is None else swap.params)}
            if "param_names" in group:
                own["param_names"] = list(group["param_names"] if swap is None else swap.names or ())
            content.append(own)
        return content


def _start_state(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    param: nn.Parameter,
    former: nn.Parameter | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Give a parameter its first state.

    One that has a copy of a former parameter for each head goes on with that parameter's state. All others have what
    some optimizers (Adagrad) make when they are constructed; most make it later.
    """
    if former is not None and state and param.shape[1:] == former.shape and param.dim() == former.dim() + 1:
        optimizer.state[param] = {
            key: laid_out(value.expand(len(param), *value.shape).clone(), param)
            if isinstance(value, Tensor) and value.shape == former.shape and key != "step"
            else copy.copy(value)
            for key, value in state.items()
        }
        return
    first = first_state(optimizer, group, param)
    if first:
        optimizer.state[param] = first
