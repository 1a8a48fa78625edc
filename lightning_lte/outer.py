"""The outer optimizer: takes the mean delta of a merge for the negative gradient of the base weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte.heads import Factors
from lightning_lte.optimizers import MakeOptimizer, laid_out, place_counts


class OuterOptimizer:
    """Steps base weights at merges, each with an optimizer of its own, which all devices step alike.

    `torch.optim.SGD` with a learning rate of 1 is the plain sum W <- W + mean delta; with Nesterov momentum it is the
    outer step of DiLoCo (arXiv 2311.08105).

    Args:
        make: a class of torch's, or anything else that makes an optimizer from a list of parameters.
    """

    def __init__(self, make: MakeOptimizer) -> None:
        self._make = make
        self._optimizers: dict[str, tuple[nn.Parameter, Optimizer]] = {}

    def step(self, f: Factors, delta: Tensor, left: float = 1.0) -> None:
        """W <- left W + outer step, for the mean delta of all heads, in W's shape."""
        param, optimizer = self._of(f)
        if left != 1:
            param.data.mul_(left)
        param.grad = laid_out(-delta.to(param.dtype), param)
        optimizer.step()
        f.write(param.detach())
        # Only the state lasts: a copy of every weight is not kept.
        param.grad, param.data = None, param.new_empty(0)

    def state_dict(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The state for each weight: what is equal on all devices, on the CPU."""
        states = {}
        for name in names:
            if name in self._optimizers:
                param, optimizer = self._optimizers[name]
                state = optimizer.state.get(param, {})
                states[name] = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
        return states

    def load_state_dict(self, factors: Iterable[Factors], states: Mapping[str, Mapping[str, Any]]) -> None:
        """The inverse of `state_dict`."""
        self._optimizers = {}
        for f in factors:
            if f.name in states:
                param, optimizer = self._of(f)
                optimizer.state[param] = state = {
                    k: laid_out(v.to(param.device, copy=True), param) if isinstance(v, Tensor) and v.dim() else v
                    for k, v in states[f.name].items()
                }
                place_counts(optimizer, param, state)
                param.data = param.new_empty(0)

    def _of(self, f: Factors) -> tuple[nn.Parameter, Optimizer]:
        """A parameter that stands for W, with its value, and the optimizer that holds it."""
        exact = f.exact()
        if f.name not in self._optimizers:
            param = nn.Parameter(exact)
            self._optimizers[f.name] = (param, self._make([param]))
        param, optimizer = self._optimizers[f.name]
        param.data = exact
        return param, optimizer
