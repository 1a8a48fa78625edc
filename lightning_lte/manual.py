"""Manual optimization with heads that take turns: what Lightning counts and what heads share, once and not n times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte.explorer import Explorer
from lightning_lte.lockstep import Closure, Lockstep
from lightning_lte.optimizers import wrapped_optimizers
from lightning_lte.turns import stepping_once

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_MISSING = object()


class ManualOptimization:
    """Runs a `training_step` that steps optimizers by itself, once for every local head.

    Args:
        explorer: whose heads act.
        module: whose step it is.
    """

    def __init__(self, explorer: Explorer, module: LightningModule) -> None:
        self._explorer, self._module = explorer, module
        self._lockstep = Lockstep(explorer)
        self._counts: dict[Optimizer, tuple[Callable[[], None], Callable[[], None]]] = {}
        self._held_back: dict[nn.Parameter, Tensor] = {}

    @property
    def in_turn(self) -> bool:
        """Whether the thread that asks runs the step of a head."""
        return self._lockstep.current is not None

    def run(self, step: Callable[[Any], Any], parts: Sequence[Any]) -> Any:
        """Run the step on each head's part of the batch; see `Lockstep.run`."""
        with self._for_all_heads():
            return self._lockstep.run(step, parts)

    def step(
        self,
        optimizer: Optimizer,
        closure: Closure | None,
        step: Callable[[Closure | None], Any],
        counted: bool = True,
    ) -> Any:
        """Wait, in the turn of a head, until the optimizer has made its step for all heads.

        Args:
            optimizer: bare.
            closure: the head's, or None.
            step: makes the step; takes a closure for all heads, or None.
            counted: whether Lightning counts it, as it does those of its own optimizers.
        """
        turn = self._lockstep.current
        assert turn is not None
        if not counted:
            return turn.wait(optimizer, closure, step)
        before, after = self._counts[optimizer]

        def counting(closure: Closure | None) -> Any:
            before()
            result = step(closure)
            after()
            return result

        return turn.wait(optimizer, closure, counting)

    def hold_back(self, optimizer: Optimizer) -> None:
        """Have a head's own call of a bare optimizer's `step` do nothing, after it was done for all heads."""
        held = self._explorer.substitution.held(optimizer).values()
        self._held_back = {p: p.grad for p in held if p.grad is not None}
        for p in self._held_back:
            p.grad = None

    def give_back(self) -> None:
        """Undo `hold_back`."""
        for p, gradient in self._held_back.items():
            p.grad = gradient
        self._held_back = {}

    @contextmanager
    def _for_all_heads(self) -> Iterator[None]:
        """Let Lightning count, and schedulers make, one step for all heads; and optimizers zero what heads have of
        their own, too."""
        undo: list[Callable[[], Any]] = []

        def exchange(owner: Any, name: str, new: Any) -> None:
            before = vars(owner).get(name, _MISSING)
            undo.append(partial(vars(owner).pop, name) if before is _MISSING else partial(setattr, owner, name, before))
            setattr(owner, name, new)

        trainer = self._module.trainer
        for optimizer in trainer.strategy._lightning_optimizers:
            self._counts[optimizer._optimizer] = (optimizer._on_before_step, optimizer._on_after_step)
            exchange(optimizer, "_on_before_step", _nothing)
            exchange(optimizer, "_on_after_step", _nothing)
            all_of_it: tuple[Any, ...] = (optimizer, optimizer._optimizer, *wrapped_optimizers(optimizer._optimizer))
            for own in all_of_it:
                exchange(own, "zero_grad", partial(self._collected_before, own.zero_grad))
        try:
            with stepping_once([config.scheduler for config in trainer.lr_scheduler_configs], self._is_first):
                yield
        finally:
            while undo:
                undo.pop()()

    def _collected_before(self, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._explorer.collect_gradients()  # of a backward that Lightning knows nothing of
        zero_grad(*args, **kwargs)

    def _is_first(self) -> bool:
        turn = self._lockstep.current
        return turn is None or turn.head == 0


def _nothing() -> None:
    pass
