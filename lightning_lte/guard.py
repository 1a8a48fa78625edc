"""What would give a wrong answer without a word, found while training runs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_lte.heads import Factors
from lightning_lte.report import listed


class Guard:
    """Watches the base weights and the factors.

    Args:
        factors: of all factored weights.
        hidden: name -> user's parameter that a per-head replica stands in for.
    """

    def __init__(self, factors: Collection[Factors], hidden: dict[str, nn.Parameter]) -> None:
        self._factors = list(factors)
        self._hidden = hidden
        self._seen_backward = False
        self._versions: list[int] = []
        for param in self._bases():
            # Gradients from before training would look like those of a use outside the layer.
            param.grad = None
        self.accept_writes()

    def _bases(self) -> list[nn.Parameter]:
        return [f.weight for f in self._factors] + list(self._hidden.values())

    def accept_writes(self) -> None:
        """Take the base weights as they are now: after a merge or after loading a checkpoint."""
        self._versions = [f.weight._version for f in self._factors]

    def check_writes(self) -> None:
        """Raise if anyone but a merge wrote to a base weight.

        Raises:
            RuntimeError: with the names of the weights.
        """
        written = [f.name for f, v in zip(self._factors, self._versions, strict=True) if f.weight._version != v]
        if written:
            raise RuntimeError(
                f"Only merges may write to factored weights, and something else wrote to {listed(written)} (masks,"
                " normalisation, copies from another network, re-initialisation and loading weights do so). Train it"
                f" as a replica: exclude_modules={written!r}."
            )

    def check_uses(self) -> None:
        """Raise if a base weight got a gradient.

        Raises:
            RuntimeError: with the names of the weights.
        """
        used = [f.name for f in self._factors if f.weight.grad is not None]
        used += [name.rpartition(".")[0] for name, param in self._hidden.items() if param.grad is not None]
        if used:
            used = sorted(set(used))
            raise RuntimeError(
                "Heads act where a layer is called, and these weights got a gradient from a use elsewhere (tied to"
                f" another layer, or used as a tensor): {listed(used)}. Train them as replicas:"
                f" exclude_modules={used!r}."
            )

    def after_backward(self) -> None:
        """Check uses; on the first call, warn of factors that took part in the forward and got no gradient.

        Raises:
            RuntimeError: see `check_uses`.
        """
        self.check_uses()
        if not self._seen_backward:
            self._seen_backward = True
            starved = [f.name for f in self._factors if f.took_part and f.A.requires_grad and f.A.grad is None]
            if starved:
                warnings.warn(
                    f"The heads of {listed(starved)} took part in the first step, but got no gradient: they don't"
                    " learn. If that is not meant, a custom autograd function may differentiate with respect to"
                    f" self.parameters() alone, which heads are not part of; then exclude_modules={starved!r}.",
                    stacklevel=2,
                )


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
