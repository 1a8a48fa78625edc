"""torch's own functions that change gradients, made to reach heads.

`torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)` and `module.zero_grad()` are common in training code, and
heads are not among `module.parameters()`: they would clip, or zero, everything but them, without a word.

A gradient scaler, `scaler.unscale_(optimizer)`, changes what the optimizer holds, and so has to come after all that
changes that: a weight that is found to be no good for heads has a gradient, too, of the scaled loss.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from lightning_lte.explorer import Explorer

_NORM, _VALUE = clip_grad.clip_grad_norm_, clip_grad.clip_grad_value_


@contextmanager
def gradient_functions_reach_heads(explorer: Explorer, scaler: GradScaler | None) -> Iterator[None]:
    """Exchange the functions while the block runs, in torch and in all modules that have imported them by name.

    Where heads are meant, `clip_grad_norm_` knows the 2-norm alone, and raises ValueError for others.

    Args:
        explorer: whose heads are meant where parameters of its module are; for others all is as always.
        scaler: whose user calls `Explorer.after_backward` or `Explorer.before_step` first; None for no such one.
    """

    # None in the end: who has taken one of these for keeps, as a module that is imported meanwhile, gets torch's own
    # afterwards, and does not keep the heads.
    active: Explorer | None = explorer
    # As they are now: others may have exchanged them since.
    zero_before, unscale_before = nn.Module.zero_grad, GradScaler.unscale_

    def norm(
        parameters: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        params = _as_list(parameters)
        if active is None or not active.trains_in_place_of(params):
            return _NORM(params, max_norm, norm_type, error_if_nonfinite, foreach)
        if float(norm_type) != 2.0:
            raise ValueError(
                f"Each head is clipped by its 2-norm; received norm_type={norm_type!r}. Leave it out, or clip by value."
            )
        norms = active.clip_grad_norm_(float(max_norm), params=params)
        if error_if_nonfinite and not bool(norms.isfinite().all()):
            raise RuntimeError(
                f"The norms of the heads' gradients must be finite, as error_if_nonfinite=True was given; received"
                f" {norms.tolist()}."
            )
        return norms.max()

    def value(parameters: Any, clip_value: float, *args: Any, **kwargs: Any) -> None:
        params = _as_list(parameters)
        if active is not None:
            active.collect_gradients()
            params = active.trained_for(params)
        _VALUE(params, clip_value, *args, **kwargs)

    def zero(self: nn.Module, set_to_none: bool = True) -> None:
        zero_before(self, set_to_none)
        if active is not None and active.trains_in_place_of(self.parameters()):
            active.collect_gradients()
            for param in active.trained_for(self.parameters()):
                param.grad = None

    def unscale(self: GradScaler, optimizer: Optimizer) -> None:
        bare = getattr(optimizer, "_optimizer", optimizer)  # in Lightning's own class
        if active is not None and self is not scaler and self.is_enabled():
            if any(bare is own for own in active.optimizers):
                active.before_step()
        unscale_before(self, optimizer)

    exchanged: dict[Any, Any] = {_NORM: norm, _VALUE: value}
    package = __name__.partition(".")[0]
    places = [
        (module, name, function)
        for key, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and key.partition(".")[0] != package
        for name, function in list(vars(module).items())
        if function is _NORM or function is _VALUE
    ]
    for module, name, function in places:
        setattr(module, name, exchanged[function])
    nn.Module.zero_grad = zero  # type: ignore[method-assign]
    GradScaler.unscale_ = unscale  # type: ignore[method-assign]
    try:
        yield
    finally:
        active = None
        nn.Module.zero_grad = zero_before  # type: ignore[method-assign]
        GradScaler.unscale_ = unscale_before  # type: ignore[method-assign]
        for module, name, function in places:
            setattr(module, name, function)


def _as_list(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)
