"""Changing the class of a user's layer in place, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_lte.heads import Factors
from lightning_lte.switch import Switch

# The attribute lives in the layer's __dict__, outside PyTorch's registries: state_dict() and parameters() never see it.
_STATE = "_lte"


@dataclass
class LayerState:
    """What a layer knows of its heads.

    Attributes:
        switch: which heads act, shared by all layers of the model.
        factors: of the layer's weight, or None if that is not factored.
        stacks: parameter name -> (n, *shape), a replica for each local head; filled only where n > 1.
    """

    switch: Switch
    factors: Factors | None = None
    stacks: dict[str, nn.Parameter] = field(default_factory=dict)


class HeadedLayer(nn.Module):
    """Base of the classes that layers take on while they are trained through heads.

    Pickle and deepcopy give a layer of the user's own class without heads: modules sit in hparams and in EMA callbacks.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(original_class(self))
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != _STATE})
        # Protocol 2 and above insist on the class of `self`; the older form names the class it makes.
        return plain.__reduce_ex__(1)


def state_of(layer: nn.Module) -> LayerState:
    """The state that `enter` gave to a layer."""
    state: LayerState = layer.__dict__[_STATE]
    return state


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the user wrote."""
    return type(layer).__bases__[1] if isinstance(layer, HeadedLayer) else type(layer)


_classes: dict[tuple[type, type], type] = {}


def enter(layer: nn.Module, headed: type[HeadedLayer], state: LayerState) -> None:
    """Change `layer` in place to a subclass of `headed` and of its own class, under its own class's name."""
    own = type(layer)
    if (headed, own) not in _classes:
        _classes[headed, own] = type(
            own.__name__, (headed, own), {"__module__": own.__module__, "__doc__": own.__doc__}
        )
    layer.__class__ = _classes[headed, own]
    layer.__dict__[_STATE] = state


def leave(layer: nn.Module) -> None:
    """The inverse of `enter`."""
    layer.__class__ = original_class(layer)
    layer.__dict__.pop(_STATE, None)


def slices(layer: nn.Module, x: Tensor, count: int) -> Tensor:
    """View x (batch, ..., features) as (n, batch / n * ..., features), a slice for each head.

    Raises:
        ValueError: dimension 0 can't be dealt out evenly.
    """
    if x.dim() < 2 or x.shape[0] % count:
        raise ValueError(
            f"In batched execution dimension 0 of every layer's input is split evenly over the {count} local heads;"
            f" {type(layer).__name__} received shape {tuple(x.shape)}. Use execution='sequential', a batch size that"
            f" is a multiple of {count}, or one head per device."
        )
    return x.reshape(count, -1, x.shape[-1])
