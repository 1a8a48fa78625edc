"""Heads that take turns in a step that steps optimizers by itself, as in manual optimization.

n heads are n workers, and each of them runs the whole of the user's step on its own part of the batch. But their
factors lie in one optimizer. So every head runs until it wants to step an optimizer and waits there. When all heads
have come to that point the optimizer steps once, for all of them, and they go on. One head runs at a time, each in a
thread of its own, since a function can't be left and entered again in any other way.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte.execution import check_parts, combined
from lightning_lte.explorer import Explorer
from lightning_lte.layers.base import STATE
from lightning_lte.rehearsal import HOOKS, REGISTRIES

# What is not a head's own: PyTorch's registries but for hooks, and what layers know of their heads.
_SHARED = REGISTRIES | {STATE}

Closure = Callable[[], Any]
# What modules have beside parameters, buffers and modules, by name.
Attributes = dict[nn.Module, dict[str, Any]]


class _Abandoned(BaseException):
    """Ends a head's thread where it waits; not an Exception, which the user's step may catch."""


@dataclass(frozen=True)
class _Wish:
    """A step that a head waits for.

    Attributes:
        optimizer: that is to step.
        closure: of the head; None if it has none.
        step: makes the optimizer step, for all heads; takes a closure that runs those of all heads, or None.
    """

    optimizer: Optimizer
    closure: Closure | None
    step: Callable[[Closure | None], Any]


class _Turn:
    """One head's run through the user's step.

    Attributes:
        head: its number on this device.
        gradients: what it has accumulated, while other heads run: of a tensor with a row per head its own row.
        flags: `requires_grad` of all parameters as the head has set them.
        attributes: of the module and those inside it, as the head has set them.
        dtype: torch's default one, which all threads share, as the head has set it.
        wish: the step it waits for.
        output: what the step returned.
        done: whether the step has ended.
    """

    def __init__(self, head: int, run: Callable[[], Any]) -> None:
        self.head = head
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.flags: dict[nn.Parameter, bool] = {}
        self.attributes: Attributes = {}
        self.dtype = torch.get_default_dtype()
        self.wish: _Wish | None = None
        self.output: Any = None
        self.done = False
        self._run = run
        self._error: BaseException | None = None
        self._answer: Any = None
        self._runs_closure = self._abandoned = False
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        context, device = contextvars.copy_context(), torch.get_default_device()
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self.thread = threading.Thread(
            target=context.run, args=(self._work, device, stream), name=f"lte-head-{head}", daemon=True
        )
        self.thread.start()

    def _work(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._resumed.acquire()
        try:
            if not self._abandoned:
                # What torch keeps for each thread.
                torch.set_default_device(device if device.type != "cpu" else None)
                if stream is not None:
                    torch.cuda.set_stream(stream)  # and its device
                self.output = self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done, self.wish = True, None
            self._paused.release()

    def go_on(self, answer: Any = None, *, closure: bool = False) -> Any:
        """Let the head run to its next step or to its end; or let it run its closure, and return what that returns.

        Raises:
            BaseException: what the head's step raised.
        """
        self._answer, self._runs_closure = answer, closure
        self._resumed.release()
        try:
            self._paused.acquire()
        except BaseException:
            # Ctrl-C reaches the main thread. The head has to arrive somewhere before the module is tidied up.
            self._paused.acquire()
            raise
        if self._error is not None:
            raise self._error
        return self._answer

    def wait(self, optimizer: Optimizer, closure: Closure | None, step: Callable[[Closure | None], Any]) -> Any:
        """Wait until the optimizer has made its step; called in the head's thread. Returns what the step returned.

        Args:
            optimizer: that the head wants to step.
            closure: of the head, or None.
            step: makes the optimizer step for all heads; called in the main thread, of one of the heads.
        """
        if self._abandoned:
            raise _Abandoned  # the user's step has caught it once, and goes on
        self.wish = _Wish(optimizer, closure, step)
        while True:
            self._paused.release()
            self._resumed.acquire()
            if self._abandoned:
                raise _Abandoned
            if not self._runs_closure:
                self.wish = None
                return self._answer
            assert closure is not None
            self._answer = closure()

    def abandon(self) -> None:
        """End the thread where it waits."""
        if not self.done:
            self._abandoned = True
            self._resumed.release()
            self.thread.join()


class Lockstep:
    """Runs the user's step for every local head, and steps each optimizer once for all of them.

    Args:
        explorer: whose heads act.
    """

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._turns: list[_Turn] = []
        self._per_head: set[nn.Parameter] = set()

    @property
    def current(self) -> _Turn | None:
        """The turn of the thread that asks; None outside of turns."""
        thread = threading.current_thread()
        return next((turn for turn in self._turns if turn.thread is thread), None)

    def run(self, step: Callable[[Any], Any], parts: Sequence[Any]) -> Any:
        """Run the step on each head's part of the batch; returns what `execution.combined` makes of the outputs.

        Raises:
            ValueError: there are more or fewer parts than heads.
            RuntimeError: heads want to step different optimizers, or not equally often.
        """
        check_parts(self._explorer, parts)
        self._per_head = self._explorer.per_head
        gradients, flags, attributes = self._take()
        self._turns = [_Turn(head, partial(step, part)) for head, part in enumerate(parts)]
        try:
            for turn in self._turns:
                turn.flags, turn.attributes = flags, attributes
                turn.gradients = {p: self._own(p, g, turn.head).clone() for p, g in gradients.items()}
            answer: Any = None
            while True:
                for turn in self._turns:
                    with self._at(turn):
                        turn.go_on(answer)
                if all(turn.done for turn in self._turns):
                    break
                with _default_dtype(self._turns[0]):
                    answer = self._step([turn.wish for turn in self._turns])
            first = self._turns[0]
            self._put(self._together(), first.flags, first.attributes)
            return combined([turn.output for turn in self._turns])
        except BaseException:
            self._put({}, flags, attributes)
            raise
        finally:
            for turn in self._turns:
                turn.abandon()
            self._turns = []

    def _step(self, wishes: Sequence[_Wish | None]) -> Any:
        first = wishes[0]
        if first is None or any(other is None or other.optimizer is not first.optimizer for other in wishes):
            names = ["none" if wish is None else type(wish.optimizer).__name__ for wish in wishes]
            raise RuntimeError(
                f"The {len(wishes)} heads of a device share its optimizers, so each has to step the same ones, equally"
                f" often; after the same number of steps in this batch they came to step {', '.join(names)} (in the"
                " order of heads). Let it not depend on the data whether an optimizer steps, or use one head per"
                " device."
            )
        explorer = self._explorer

        def closure() -> Any:
            self._take()
            values = []
            for turn in self._turns:
                with self._at(turn):
                    values.append(turn.go_on(closure=True))
            self._put(self._together())
            return combined(values)

        self._put(self._together())
        used = explorer.used_up(first.optimizer)
        result = first.step(None if any(wish is None or wish.closure is None for wish in wishes) else closure)
        # The step has used the gradients of the heads' own; parameters keep theirs until the user zeroes them. And what
        # turned out to be no good for heads has lost them.
        self._per_head = explorer.per_head
        kept = self._params().keys() - used - explorer.used_up(first.optimizer)
        for turn in self._turns:
            turn.gradients = {p: g for p, g in turn.gradients.items() if p in kept}
        self._take()
        return result

    @contextmanager
    def _at(self, turn: _Turn) -> Iterator[None]:
        """Let the module be as the head knows it."""
        self._put({p: self._in_row(p, g, turn.head) for p, g in turn.gradients.items()}, turn.flags, turn.attributes)
        try:
            with self._explorer.turn(turn.head), _default_dtype(turn):
                yield
        finally:
            self._explorer.collect_gradients()
            gradients, turn.flags, turn.attributes = self._take()
            turn.gradients = {p: self._own(p, g, turn.head) for p, g in gradients.items()}

    def _params(self) -> dict[nn.Parameter, None]:
        explorer = self._explorer
        held = [p for optimizer in explorer.optimizers for p in explorer.substitution.held(optimizer).values()]
        return dict.fromkeys([*explorer.module.parameters(), *held])

    def _take(self) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, bool], Attributes]:
        """Take gradients away, and note flags and attributes."""
        params = self._params()
        gradients = {p: p.grad for p in params if p.grad is not None}
        for p in gradients:
            p.grad = None
        attributes = {
            module: {n: dict(value) if n in HOOKS else value for n, value in vars(module).items() if n not in _SHARED}
            for module in self._explorer.module.modules()
        }
        return gradients, {p: p.requires_grad for p in params}, attributes

    def _put(
        self,
        gradients: dict[nn.Parameter, Tensor],
        flags: dict[nn.Parameter, bool] | None = None,
        attributes: Attributes | None = None,
    ) -> None:
        """The inverse of `_take`."""
        for p, gradient in gradients.items():
            p.grad = gradient
        for p, flag in (flags or {}).items():
            p.requires_grad_(flag)
        for module, own in (attributes or {}).items():
            for name in vars(module).keys() - own.keys() - _SHARED:
                del vars(module)[name]
            for name, value in own.items():
                if name in HOOKS:
                    # In place: the handle of a hook knows this very registry.
                    vars(module)[name].clear()
                    vars(module)[name].update(value)
                else:
                    vars(module)[name] = value

    def _together(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of all heads: rows below each other, and of what they share the mean."""
        together: dict[nn.Parameter, Tensor] = {}
        for p in dict.fromkeys(p for turn in self._turns for p in turn.gradients):
            own = [turn.gradients.get(p) for turn in self._turns]
            if p in self._per_head:
                together[p] = torch.stack([torch.zeros_like(p[0]) if g is None else g for g in own])
            else:
                # Not `sum`, which begins with 0: no number can be added to a sparse gradient.
                together[p] = reduce(torch.add, [g for g in own if g is not None]) / len(own)
        return together

    def _own(self, p: nn.Parameter, gradient: Tensor, head: int) -> Tensor:
        # A copy, so that the other heads' rows are let go.
        return gradient[head].clone() if p in self._per_head else gradient

    def _in_row(self, p: nn.Parameter, gradient: Tensor, head: int) -> Tensor:
        if p not in self._per_head:
            return gradient
        rows = torch.zeros_like(p)
        rows[head] = gradient
        return rows


@contextmanager
def _default_dtype(turn: _Turn) -> Iterator[None]:
    """Let torch's default dtype be as the head knows it, which some precisions of Lightning's change for a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(turn.dtype)
    try:
        yield
    finally:
        turn.dtype = torch.get_default_dtype()
        torch.set_default_dtype(before)
