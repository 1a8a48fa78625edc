"""What optimizers keep of the gradients of heads and replicas: moments, that is, and what a merge does to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lte.shards import local

# Of optimizers, by what they train.
States = Mapping[Tensor, Mapping[str, Any]]


def moments_of(param: nn.Parameter, states: States, rows: int) -> list[Tensor]:
    """All that an optimizer keeps of the gradients of a parameter.

    Args:
        param: what it trains.
        states: moments in the optimizers, by what they train.
        rows: heads that have a row of the parameter each. Of a head alone, moments may have other shapes (Adafactor's).
    """
    # The step count of a scalar parameter has its shape, too.
    kept = [value for key, value in states.get(param, {}).items() if isinstance(value, Tensor) and key != "step"]
    # Those in 8 bits are codes, of which none need mean zero.
    kept = [value for value in kept if value.is_floating_point() or value.is_complex()]
    kept = [value for value in kept if value.shape == param.shape or (rows == 1 and value.dim() > 0)]
    # Momentum of sparse gradients is sparse, too.
    return [value._values() if value.is_sparse else local(value) for value in kept]


def elementwise_moments(param: nn.Parameter, states: States) -> list[Tensor]:
    """Those that have a number for each of the parameter's."""
    kept = [value for value in states.get(param, {}).values() if isinstance(value, Tensor)]
    return [value for value in kept if value.shape == param.shape and value.is_floating_point()]


def zero_moments(param: nn.Parameter, states: States, heads: Tensor) -> None:
    """Zero those of some heads, (n,) bool, with a row of the parameter each; or of all of it, (1,) bool."""
    for moment in moments_of(param, states, len(heads)):
        if len(heads) > 1:
            moment[heads] = 0
        elif bool(heads) and moment.shape == local(param).shape:
            moment.zero_()
        elif bool(heads):
            moment.nan_to_num_(0, 0, 0)


def prune_moments(param: nn.Parameter, states: States, fraction: float) -> None:
    """Zero a fraction of each head's moments, the smallest first, and all moments of an element together.

    An element with a first moment and no second one would make a step of any size.
    """
    moments = elementwise_moments(param, states)
    if not moments or not fraction:
        return
    # Second moments, where there are some, say how large the gradients of an element are. Which
    # these are the device finds out: the host would wait for each parameter's.
    size = moments[0]
    for moment in moments[1:]:
        size = moment.where((moment >= 0).all(), size)
    size = size.abs().flatten(1)
    smallest = size.topk(round(fraction * size.shape[1]), dim=1, largest=False).indices
    for moment in moments:
        moment.view(len(moment), -1).scatter_(1, smallest, 0)
