"""What a step does once for all heads while they take turns: its logs, and the steps of schedulers."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Log = Callable[..., None]
# Positional and keyword arguments.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def stepping_once(schedulers: Iterable[Any], is_first: Callable[[], bool]) -> Iterator[None]:
    """While heads take turns, have schedulers that the user's step steps make one step for all heads.

    Args:
        schedulers: of the trainer's optimizers.
        is_first: whether it is the turn of the first head, or of none.
    """
    with ExitStack() as stack:
        for scheduler in schedulers:
            step = scheduler.step

            def step_for_all(*args: Any, step: Callable[..., Any] = step, **kwargs: Any) -> Any:
                return step(*args, **kwargs) if is_first() else None

            own = vars(scheduler)
            if "step" in own:
                stack.callback(own.__setitem__, "step", step)
            else:
                stack.callback(own.pop, "step")
            own["step"] = step_for_all
        yield


@dataclass
class _Call:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)
    batch_size: int = 0
    metric: Metric | None = None
    inputs: list[Inputs] = field(default_factory=list)


class MeanLog:
    """Stands in for a module's `log` while heads take turns, and logs each value once, for all of them.

    Each head logs what it sees of its own slice. Handed on as they come, the last head's would stand for the step.

    Args:
        log: the module's own.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        parameters = list(inspect.signature(log).parameters.values())[2:]
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._calls: dict[str, _Call] = {}
        # By the id of the metric, as its hash changes with its state.
        self._inputs: dict[int, Inputs] = {}

    def __call__(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(value, Tensor | numbers.Number | Metric):
            self._log(name, value, *args, **kwargs)  # which refuses it
            return
        call = self._calls.setdefault(name, _Call())
        # By name, as far as `log` has names, whether the user gave them or not.
        kwargs |= zip(self._names, args, strict=False)
        call.args, call.kwargs = args[len(self._names) :], kwargs
        call.batch_size += kwargs.get("batch_size") or 0
        if not isinstance(value, Metric):
            call.values.append(value)
            return
        call.metric = value
        inputs = self._inputs.get(id(value))
        if inputs is not None and not any(inputs is own for own in call.inputs):
            call.inputs.append(inputs)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Note what the metrics in a module are called with."""

        def note(metric: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            # Without their graphs, which would live on until all heads had their turns.
            self._inputs[id(metric)] = tuple(map(_detached, args)), {k: _detached(v) for k, v in kwargs.items()}

        metrics = [m for m in module.modules() if isinstance(m, Metric)]
        hooks = [metric.register_forward_hook(note, with_kwargs=True) for metric in metrics]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def flush(self) -> None:
        """Log the means, or what else `reduce_fx` asks for; and metrics, which have seen all slices in the end."""
        for name, call in self._calls.items():
            metric = call.metric
            if metric is not None and call.inputs and call.kwargs.get("on_step") is not False:
                # What Lightning logs for a step: of the last slice, so far.
                metric._forward_cache = _of_batch(metric, call.inputs)
            value = _reduced(call.values, call.kwargs.get("reduce_fx", "mean")) if metric is None else metric
            kwargs = {**call.kwargs, **({"batch_size": call.batch_size} if call.batch_size else {})}
            self._log(name, value, *call.args, **kwargs)
        self._calls.clear()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _of_batch(metric: Metric, inputs: list[Inputs]) -> Any:
    """What a metric says of some slices alone. It is reset for that, as its own `forward` does, and then put back."""
    metrics = [m for m in metric.modules() if isinstance(m, Metric)]  # one may be made of others
    kept = [(m, dict(vars(m))) for m in metrics]
    update = metric.update if type(metric).forward is Metric.forward else metric.forward
    try:
        for m in metrics:
            for name, state in m.metric_state.items():
                if isinstance(state, list):
                    setattr(m, name, [])  # as a reset empties lists in place
            if not m.dist_sync_on_step:
                m.distributed_available_fn = _alone
            m.reset()
        with torch.no_grad():
            for args, kwargs in inputs:
                update(*args, **kwargs)
            return metric.compute()
    finally:
        for m, before in kept:
            vars(m).update(before)


def _alone() -> bool:
    return False


def _reduced(values: list[Any], reduce_fx: Any) -> Tensor:
    """The values of all heads in one, by any of the reductions that Lightning takes: names, torch's and Python's."""
    name = reduce_fx.lower() if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", None)
    # A head may log a number where others log tensors, which may be on another device than the CPU.
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    together = torch.stack([_as_floating(value, device) for value in values])
    return _REDUCTIONS.get(name, torch.mean)(together, dim=0)  # Lightning refuses others


def _as_floating(value: Any, device: torch.device | None) -> Tensor:
    """A value in the precision in which Lightning keeps it, on a device; None for the default."""
    value = torch.as_tensor(value, device=device).detach()
    if value.dtype in (torch.float32, torch.float64):
        return value
    return value.to(torch.promote_types(torch.get_default_dtype(), torch.float32))


_REDUCTIONS: dict[Any, Callable[..., Tensor]] = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}
