"""Weight decay that pulls W towards zero, as users mean it, and not the factors of its heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    W <- mean over devices of the product of (1 - c) over the steps since the last * W + mean delta. Until then heads
    see W as it was. With merges at every step that is AdamW's own decay of W.

    Args:
        optimizers: the user's.
        factors: gives those that are trained now.

    Raises:
        ValueError: an optimizer decays in another way. One that does not decay yet is refused at its first step that
            does.
    """

    def __init__(self, optimizers: Sequence[Optimizer], factors: Callable[[], Iterable[Factors]]) -> None:
        self._factors = factors
        self._apart = {optimizer: decays_apart(optimizer) for optimizer in optimizers}
        for optimizer in optimizers:
            self._check(optimizer, any(not _is_none(group.get("weight_decay")) for group in optimizer.param_groups))
        # What a step that has begun takes off, for each group.
        self._taken: dict[Optimizer, list[float | Tensor]] = {}
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        self._hooks += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def close(self) -> None:
        """Leave optimizers' steps alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        taken = [_taken(group) for group in optimizer.param_groups]
        self._check(optimizer, any(not _is_none(own) for own in taken))
        most = max((own for own in taken if not isinstance(own, Tensor)), default=0)
        if most >= 1:
            raise ValueError(
                "With weight_decay='weights', lr * weight_decay must be below 1, or nothing is left of a weight;"
                f" received {most:g} for {type(optimizer).__name__}. Lower the learning rate or the weight decay."
            )
        # The step of a class may hide its decay from that of its base, which has the hooks, too.
        self._taken.setdefault(optimizer, taken)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        owners = {p: f for f in self._factors() for p in f.trained.values()}
        for group, taken in zip(optimizer.param_groups, self._taken.pop(optimizer, []), strict=False):
            if _is_none(taken):
                continue
            # Kernels that look for infinities of a gradient scaler themselves leave a step out without a word.
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is not None:
                # In float64: of 1 less a small decay, float32 would lose a part of that, or all of it.
                taken = taken * (found_inf.reshape(()) == 0).double()
            # What has no gradient was not stepped.
            stepped = [p for p in group["params"] if p in owners and p.grad is not None]
            if stepped:
                torch._foreach_div_([local(p) for p in stepped], 1 - taken)
            for f in {id(owners[p]): owners[p] for p in stepped}.values():
                f.left = f.left * (1 - taken)

    def _check(self, optimizer: Optimizer, decays: bool) -> None:
        """Refuse an optimizer that decays, and not apart from the gradient."""
        apart = self._apart[optimizer]
        if not decays or apart is True:
            return
        why = "which mixes it with gradients" if apart is False else f"whose step could not be tried ({apart})"
        given = sorted({float(group.get("weight_decay") or 0) for group in optimizer.param_groups} - {0.0})
        raise ValueError(
            "With weight_decay='weights', an optimizer must take lr * weight_decay of a parameter off at each step,"
            f" whatever its gradient, as AdamW does, and SGD without momentum; received {type(optimizer).__name__} with"
            f" weight_decay={', '.join(map(str, given))}, {why}. Choose AdamW, for instance, set its weight_decay to 0,"
            " or give weight_decay='factors'."
        )


def _taken(group: Mapping[str, Any]) -> float | Tensor:
    """lr * weight_decay of a param group: a number, or a float64 tensor without dimensions."""
    decay, lr = group.get("weight_decay"), group.get("lr")
    if decay is None or lr is None or _is_none(decay):
        return 0.0
    taken: float | Tensor = 1.0
    for number in (decay, lr):
        taken = taken * (number.double().reshape(()) if isinstance(number, Tensor) else float(number))
    return taken


def _is_none(decay: float | Tensor | None) -> bool:
    """Whether that is no decay, as far as can be told without waiting for a device."""
    return decay is None or (not isinstance(decay, Tensor) and not decay)
