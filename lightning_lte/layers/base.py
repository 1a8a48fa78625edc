"""Changing the class of a user's layer in place, and back; what all kinds of layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lte.heads import Factors, Matrices
from lightning_lte.rounded import Rounded
from lightning_lte.switch import Switch

# The attribute lives in the layer's __dict__, outside PyTorch's registries: state_dict() and parameters() never see it.
STATE = "_lte"


# Where a parameter sits: (module, name in the module, parameter).
Slot = tuple[nn.Module, str, nn.Parameter]


@dataclass
class LayerState:
    """What a layer knows of its heads. Parameters go by their names in the layer, such as "weight".

    Attributes:
        switch: which heads act, shared by all layers of the model.
        factors: factored weight -> its factors.
        stacks: replica -> (n, *shape), one for each local head; filled only where n > 1.
        users: replica -> the user's own parameter, whose `requires_grad` counts for all of them.
        slots: where the factored weights sit.
        user_slots: where `users` sit.
    """

    switch: Switch
    factors: dict[str, Factors] = field(default_factory=dict)
    stacks: dict[str, nn.Parameter] = field(default_factory=dict)
    users: dict[str, nn.Parameter] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    user_slots: list[Slot] = field(default_factory=list)

    @property
    def head(self) -> int | Tensor | None:
        """The local head that acts alone, or None while all act.

        Inside torch.compile its number is a tensor (1,): for each value of a plain one there would be another graph.
        """
        switch = self.switch
        if torch.compiler.is_compiling():
            return switch.number if switch.acting == "one" else None
        position = switch.position
        return None if position == "all" else position

    def stack(self, key: str) -> Tensor | None:
        """What each head has in place of a parameter while all act; None while the layer's own is meant."""
        own = self.stacks.get(key) if self.switch.acting == "all" else None
        if own is None or key not in self.users or self.users[key].requires_grad:
            return own
        # What users freeze for a while (toggled optimizers do) must not learn meanwhile.
        return own.detach()

    @property
    def count(self) -> int:
        """How many heads share the input: n while all act, else 1."""
        return self.switch.count if self.switch.acting == "all" else 1


class HeadedLayer(nn.Module):
    """Base of the classes that layers take on while they are trained through heads.

    Pickle and deepcopy give a layer of the user's own class without heads: modules sit in hparams and in EMA callbacks.

    Attributes:
        of_vectors: whether what it factors are vectors, which have factors only where the user asks for them.
        multiplies: whether it does nothing with `weight` but multiply its input by it, which a weight in low precision
            allows.
    """

    of_vectors: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False

    @classmethod
    def knows(cls, layer: nn.Module) -> bool:
        """Whether this class computes what the user's layer computes, and can hold heads or replicas for it."""
        raise NotImplementedError

    @classmethod
    def matrices(cls, layer: nn.Module, key: str, parts: int) -> Matrices | str:
        """How the parameter `key` of a layer is seen for factors, in `parts` of equal size; or why it has none.

        Raises:
            ValueError: it can't be split into these parts.
        """
        return f"{original_class(layer).__name__} is not a layer that can be factored"

    def least_dims(self) -> int:
        """Dimensions that an input with samples outermost has at least."""
        return 2

    def of_the_batch(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Those of the arguments of a forward that have the batch as dimension 0."""
        return (args[0] if args else next(iter(kwargs.values())),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(original_class(self))
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != STATE})
        for key, weight in self._released().items():
            shown = nn.Parameter(weight, self._parameters[key].requires_grad)  # type: ignore[union-attr]
            plain.__dict__["_parameters"] = {**plain.__dict__["_parameters"], key: shown}
        # Protocol 2 and above insist on the class of `self`; the older form names the class it makes.
        return plain.__reduce_ex__(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, weight in self._released().items():
            destination[prefix + key] = weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A parameter that shows NaN has no memory to load into. It gives way for the time to one that has.
        unshown = self._unshown()
        empty = {key: torch.empty(r.shape, dtype=r.dtype, device=r.device) for key, r in unshown.items()}
        places = {key: nn.Parameter(e, unshown[key].weight.requires_grad) for key, e in empty.items()}
        self._parameters.update(places)
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            for key, rounded in unshown.items():
                # With assign=True the user's own tensor is there now, as it is in every other layer.
                if self._parameters[key] is places[key]:
                    self._parameters[key] = rounded.weight
                    if places[key]._version:
                        rounded.write(places[key].detach())

    def _released(self) -> dict[str, Tensor]:
        """The weights that the layer's own parameters don't show while forwards read them in low precision."""
        # On the CPU, as on the device there is no room for all of them.
        return {key: rounded.merged().cpu() for key, rounded in self._unshown().items()}

    def _unshown(self) -> dict[str, Rounded]:
        """What has the weights of the layer's own parameters that show NaN."""
        state: LayerState | None = self.__dict__.get(STATE)
        factors = {} if state is None else state.factors
        rounded = {key: f.rounded for key, f in factors.items() if f.rounded is not None and f.rounded.released}
        return {key: r for key, r in rounded.items() if self._parameters.get(key) is r.weight}


def check_not_split(layer: nn.Module, parts: int, why: str) -> None:
    """Raise if the user wants parts of a weight that has none.

    Raises:
        ValueError: with rule, value and remedy.
    """
    if parts > 1:
        raise ValueError(
            f"split is for fused projections of nn.Linear and convolutions; received {parts} parts for a"
            f" {original_class(layer).__name__}, {why}. Leave it out."
        )


def computes_as(layer: nn.Module, *kinds: type[nn.Module], methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether a layer is one of `kinds` or a plain subclass: one that computes as they do, from registered parameters.

    Args:
        layer: the user's.
        kinds: classes of torch.
        methods: what computes, and must not be overridden.
    """
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    return (
        kind is not None
        and all(getattr(type(layer), m) is getattr(kind, m) and m not in layer.__dict__ for m in methods)
        # Parametrizations, pruning and the older weight_norm take parameters out and put tensors in their place.
        and not hasattr(layer, "parametrizations")
        and all(name in layer._parameters for name in ("weight", "bias") if hasattr(layer, name))
    )


def state_of(layer: nn.Module) -> LayerState:
    """The state that `enter` gave to a layer."""
    state: LayerState = layer.__dict__[STATE]
    return state


def acting_state(layer: nn.Module) -> LayerState | None:
    """The state of a layer that has to compute otherwise than its own class does, in this forward; else None."""
    # A layer made by `type(self)(...)` in code of the user's has the class and no state.
    state: LayerState | None = layer.__dict__.get(STATE)
    if state is None or state.switch.acting is None or not (state.factors or state.switch.acting == "all"):
        return None
    if state.switch.left_out and layer in state.switch.left_out:
        return None
    # torch.func.functional_call, pruning and parametrizations put other tensors in a weight's place, and mean them.
    # (Not looked at inside torch.compile, which would guard each of them.)
    if not torch.compiler.is_compiling():
        # The replicas of a head that acts alone are put in their users' places by whoever runs it.
        slots = state.slots if state.head is not None else state.slots + state.user_slots
        if any(module._parameters.get(key) is not param for module, key, param in slots):
            return None
    return state


def without_heads(headed: type[HeadedLayer], layer: nn.Module, *args: Any) -> Any:
    """What the forward of a layer's own class computes.

    Args:
        headed: whose forward asks for it.
        layer: with heads, or one that has left them: who has kept its bound `forward` (`layer.forward = wrapped(
            layer.forward)`) calls that of `headed` for good.
        *args: of the forward.
    """
    if isinstance(layer, headed):
        return super(headed, layer).forward(*args)
    return type(layer).forward(layer, *args)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    cls = type(layer)
    return cls.__bases__[1] if cls in _classes.values() else cls


_classes: dict[tuple[type, type], type] = {}


def made_class(headed: type[HeadedLayer], own: type[nn.Module]) -> type:
    """A subclass of both, under the own class's name.

    Raises:
        TypeError: the own class can't be extended.
    """
    if (headed, own) not in _classes:
        _classes[headed, own] = type(
            own.__name__, (headed, own), {"__module__": own.__module__, "__doc__": own.__doc__}
        )
    return _classes[headed, own]


def enter(layer: nn.Module, headed: type[HeadedLayer], state: LayerState) -> None:
    """Change `layer` in place to a subclass of `headed` and of its own class, under its own class's name."""
    layer.__class__ = made_class(headed, type(layer))
    layer.__dict__[STATE] = state
    find_slots(layer, state)


def find_slots(layer: nn.Module, state: LayerState) -> None:
    """Note where the parameters sit that a layer's state has something for."""
    # A weight that devices share out is another tensor in forwards anyway: it is whole there.
    own = {path: f for path, f in state.factors.items() if f.shard is f.weight}
    state.slots = [_slot(layer, path, f.weight) for path, f in own.items()]
    state.user_slots = [_slot(layer, path, param) for path, param in state.users.items()]


def _slot(layer: nn.Module, path: str, param: nn.Parameter) -> Slot:
    name, _, key = path.rpartition(".")
    return layer.get_submodule(name), key, param


def leave(layer: nn.Module) -> None:
    """The inverse of `enter`."""
    cls = type(layer)
    if cls in _classes.values():
        layer.__class__ = original_class(layer)
    elif issubclass(cls, HeadedLayer):
        # Someone else has changed the class since, to a subclass of ours made on the fly (parametrizations do).
        cls.__bases__ = tuple(b.__bases__[1] if b in _classes.values() else b for b in cls.__bases__)
    layer.__dict__.pop(STATE, None)


def check_slices(layer: nn.Module, x: Tensor, count: int, dims: int = 2) -> None:
    """Raise if dimension 0 of an input can't be dealt out evenly to `count` heads.

    Args:
        layer: for the message.
        x: its input.
        count: heads.
        dims: dimensions that an input with samples outermost has at least.

    Raises:
        ValueError: with rule, value and remedy.
    """
    if x.dim() < dims or x.shape[0] % count:
        raise ValueError(
            f"In batched execution dimension 0 of every layer's input is split evenly over the {count} local heads;"
            f" {type(layer).__name__} received shape {tuple(x.shape)}. Use execution='sequential', a batch size that"
            f" is a multiple of {count}, or one head per device."
        )


def in_shape(y: Tensor, *shape: int) -> Tensor:
    """What a layer has just computed, in another shape and not as a view, as torch's own layers return it: blocks that
    devices share out lose their gradients where users write to a view (x += block(x))."""
    result: Tensor = torch.ops.aten._unsafe_view(y.contiguous(), shape)
    return result


def add_per_head(y: Tensor, own: Tensor) -> Tensor:
    """Add to y (batch, channels, ...) what each head has for every channel, own (n, channels)."""
    count = own.shape[0]
    # Under autocast y has fewer bits than the replica, and must not be widened by it.
    own = own.to(y.dtype).view(count, 1, -1, *[1] * (y.dim() - 2))
    return (y.unflatten(0, (count, -1)) + own).flatten(0, 1)
