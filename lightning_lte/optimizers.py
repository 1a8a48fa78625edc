"""Which optimizers can train heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer


def check_optimizers(optimizers: Sequence[Optimizer], count: int) -> None:
    """Refuse optimizers whose update is not per element: they would mix the heads of a device, or need matrices.

    Args:
        optimizers: the user's.
        count: n, local heads.

    Raises:
        TypeError: an optimizer that isn't one.
        ValueError: an optimizer that mixes elements.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"LTE trains with torch optimizers; received {optimizer!r}. Return a torch.optim.Optimizer."
            )
        name = type(optimizer).__name__
        if isinstance(optimizer, LBFGS) or name == "Muon" or (count > 1 and not acts_per_element(optimizer)):
            raise ValueError(
                f"With {count} heads on a device the optimizer must update each element by itself, as SGD, Adam, AdamW"
                f" and Adagrad do; received {name}, which mixes them. Choose another optimizer"
                + (", or one head per device." if count > 1 and name not in ("LBFGS", "Muon") else ".")
            )


def acts_per_element(optimizer: Optimizer) -> bool:
    """Whether two matrices stacked in one parameter are updated as they are in two.

    An optimizer of the same class and settings is tried on six random numbers. One that can't be made from its
    settings alone gets the benefit of the doubt.
    """
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 2, 3, 4, generator=generator, dtype=torch.float64).unbind()
    for gradient in gradients:
        gradient[1] *= 100  # so that norms over both matrices show
    try:
        stacked = _trained(optimizer, [start.clone()], [[g] for g in gradients])
        single = _trained(optimizer, list(start.clone().unbind()), [list(g.unbind()) for g in gradients])
    except Exception:
        return True
    return torch.allclose(stacked[0], torch.stack(single), rtol=1e-6, atol=1e-9)


def _trained(like: Optimizer, starts: list[Any], gradients: list[list[Any]]) -> list[torch.Tensor]:
    params = [nn.Parameter(s) for s in starts]
    constructor: Any = type(like)
    twin: Optimizer = constructor(params, **like.defaults)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        twin.step()
    return [p.detach() for p in params]
