"""Weight decay that pulls W towards zero, as users mean it, and not the factors of its heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lte.heads import Factors
from lightning_lte.optimizers import decays_apart
from lightning_lte.shards import local


class Decay:
    """Turns the weight decay of factors into that of their weights.

    A step of AdamW is p <- (1 - c) p - update, with c = lr * weight_decay. After it, factors are divided by 1 - c, so
    that nothing is left of it but an update that is c larger, a thousandth at most as a rule; and the next merge writes
    W <- product of (1 - c) over the steps since the last * W + mean delta. With merges at every step that is AdamW's
    own decay of W.

    Args:
        optimizers: the user's, which have passed `check_decay`.
        factors: gives those that are trained now.
    """

    def __init__(self, optimizers: Sequence[Optimizer], factors: Callable[[], Iterable[Factors]]) -> None:
        self._factors = factors
        self._stepping: set[Optimizer] = set()
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        self._hooks += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def close(self) -> None:
        """Leave optimizers' steps alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping.add(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # The step of a class calls that of its base, which has the hooks, too.
        if optimizer not in self._stepping:
            return
        self._stepping.discard(optimizer)
        owners = {p: f for f in self._factors() for p in f.trained.values()}
        # Kernels that look for infinities of a gradient scaler themselves leave a step out without a word.
        left_out = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            taken = group["lr"] * group.get("weight_decay", 0)
            if not isinstance(taken, Tensor) and not taken:
                continue
            if left_out is not None:
                taken = taken * (1 - left_out)
            # What has no gradient was not stepped.
            stepped = [p for p in group["params"] if p in owners and p.grad is not None]
            if stepped:
                torch._foreach_div_([local(p) for p in stepped], 1 - taken)
            for f in {id(owners[p]): owners[p] for p in stepped}.values():
                f.left = f.left * (1 - taken)


def check_decay(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose weight decay is more than lr * weight_decay of a parameter, taken off at each step.

    Raises:
        ValueError: with rule, value and remedy.
    """
    for optimizer in optimizers:
        if not decays_apart(optimizer):
            raise ValueError(
                "With weight_decay='weights', an optimizer must take lr * weight_decay of a parameter off at each step,"
                f" whatever its gradient, as AdamW does, and SGD without momentum; received {type(optimizer).__name__}"
                f" with weight_decay={_decays(optimizer)}, which mixes it with gradients. Choose AdamW, for instance,"
                " set its weight_decay to 0, or give weight_decay='factors'."
            )


def _decays(optimizer: Optimizer) -> str:
    return ", ".join(str(d) for d in sorted({float(g.get("weight_decay", 0)) for g in optimizer.param_groups} - {0.0}))
