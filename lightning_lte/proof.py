"""Proving on real data that one forward over all heads' slices is the same as a forward for each head."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lte.layers.base import HeadedLayer

# Rounding differs between rows of one matrix product, and more so in half precision.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2


def reason_against_batched(
    module: nn.Module,
    step: Callable[[Any], Tensor | None],
    batch: Any,
    parts: Sequence[Any],
    heads: Callable[[], AbstractContextManager[None]],
    head: Callable[[int], AbstractContextManager[None]],
) -> str | None:
    """Why batched execution would be wrong for this module on this batch; None if it is proved right.

    Three things have to hold:
    1. No batch norm takes statistics over the slices of several heads.
    2. What a layer with heads receives while all heads act on the whole batch is, along dimension 0, what it receives
       while each acts alone on its slice. So the layer sees samples outermost, no sample reaches another head's slice,
       and the layers before it compute the same in both ways.
    3. The loss of the batch is the mean of the losses of its slices.

    The module runs in eval mode, once on the batch and once on each slice, which costs two forward
    passes over the batch. Its parameters, buffers and plain attributes, and the random streams, are put back.

    Args:
        module: with heads.
        step: the user's step: takes a batch and returns the loss.
        batch: a real batch, on the device.
        parts: its slices, one for each local head, in order.
        heads: a context in which all local heads act.
        head: a context in which one acts alone.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            return f"{name} ({type(layer).__name__}) takes statistics over the batch"
    try:
        with untouched(module) as again:
            module.eval()
            with heads():
                seen, loss = _watch(module, partial(step, batch))
            half = any(x.dtype in (torch.float16, torch.bfloat16) for _, x in seen)
            tolerance = _HALF_TOLERANCE if half else _TOLERANCE
            seen_alone, losses = [], []
            for number, part in enumerate(parts):
                again()
                with head(number):
                    seen_part, loss_part = _watch(module, partial(step, part))
                seen_alone.append(seen_part)
                losses.append(loss_part)
            reason = _compare_inputs(seen, seen_alone, tolerance)
            if reason is not None:
                return reason
    except Exception as error:
        return f"it could not be tried: {type(error).__name__}: {error}"
    if loss is None or any(own is None for own in losses):
        return "the step returned no loss on the first batch"
    mean = torch.stack([own.detach().float() for own in losses if own is not None]).mean()
    if not torch.isclose(loss.detach().float(), mean, rtol=tolerance, atol=1e-6):
        return (
            f"the loss of the batch ({float(loss):.6g}) is not the mean of the losses of the heads' slices"
            f" ({float(mean):.6g})"
        )
    return None


_Seen = list[tuple[str, Tensor]]


def _watch(module: nn.Module, run: Callable[[], Any]) -> tuple[_Seen, Any]:
    """Run and keep what every layer with heads receives of the batch, call by call."""
    seen: _Seen = []
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, HeadedLayer):

            def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                assert isinstance(layer, HeadedLayer)
                seen.extend((name, x.detach().clone()) for x in layer.of_the_batch(*args, **kwargs))

            handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        loss = run()
        return seen, loss.detach() if isinstance(loss, Tensor) else loss
    finally:
        for handle in handles:
            handle.remove()


def _compare_inputs(together: _Seen, alone: list[_Seen], tolerance: float) -> str | None:
    if any([name for name, _ in own] != [name for name, _ in together] for own in alone):
        return "the layers that are called depend on the data"
    for (name, x), *own in zip(together, *alone, strict=True):
        parts = [part for _, part in own]
        fits = all(part.shape == (x.shape[0] // len(parts), *x.shape[1:]) for part in parts)
        if not (fits and x.shape[0] % len(parts) == 0 and _close(torch.cat(parts), x, tolerance)):
            return (
                f"{name} does not see the batch outermost in dimension 0 (its input has shape {tuple(x.shape)}), or"
                " samples mix before it"
            )
    return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= tolerance * (b.abs() + b.square().mean().sqrt())).all())


@contextmanager
def untouched(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Undo what a block does to a module's attributes, buffers and modes and to the random streams.

    Yields a function that does so at once, for a block that runs several times from the same start.
    """
    kept = [(m, m.training, _kept_attributes(m), _kept(m._buffers)) for m in module.modules()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    torch_stream, python_stream, numpy_stream = torch.get_rng_state(), random.getstate(), np.random.get_state()
    device_streams = [(d, torch.cuda.get_rng_state(d)) for d in devices]

    @torch.no_grad()
    def again() -> None:
        for m, _, attributes, buffers in kept:
            for key in set(m.__dict__) - set(attributes):
                del m.__dict__[key]
            m.__dict__.update({key: restore() for key, restore in attributes.items() if key != "training"})
            buffers()
        torch.set_rng_state(torch_stream)
        random.setstate(python_stream)
        np.random.set_state(numpy_stream)
        for device, state in device_streams:
            torch.cuda.set_rng_state(state, device)

    try:
        yield again
    finally:
        again()
        for m, training, _, _ in kept:
            m.training = training


# PyTorch's registries: parameters, modules and hooks. Buffers are kept by themselves.
_REGISTRIES = frozenset(vars(nn.Module()))


def _kept_attributes(module: nn.Module) -> dict[str, Callable[[], Any]]:
    return {
        key: partial(_same, value) if key in _REGISTRIES else _kept(value) for key, value in module.__dict__.items()
    }


def _same(value: Any) -> Any:
    return value


def _kept(value: Any) -> Callable[[], Any]:
    """A function that returns `value` as it is now: containers and tensors are put back in place, so that whoever else
    holds them sees it too. Objects of other kinds are taken to be constant."""
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or value.is_inference():
            return partial(_same, value)
        saved, version = value.detach().clone(), value._version
        return lambda: value if value._version == version else value.copy_(saved)
    if isinstance(value, dict) and type(value) in (dict, OrderedDict, defaultdict):
        return partial(_refill_dict, value, {k: _kept(v) for k, v in value.items()})
    if type(value) in (list, deque):
        return partial(_refill_list, value, [_kept(v) for v in value])
    if type(value) is set:
        return partial(_refill_set, value, set(value))
    return partial(_same, value)


def _refill_dict(value: dict[Any, Any], items: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    value.clear()
    value.update({k: restore() for k, restore in items.items()})
    return value


def _refill_list(value: Any, items: list[Callable[[], Any]]) -> Any:
    value.clear()
    value.extend(restore() for restore in items)
    return value


def _refill_set(value: set[Any], items: set[Any]) -> set[Any]:
    value.clear()
    value.update(items)
    return value
