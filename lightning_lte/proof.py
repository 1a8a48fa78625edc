"""Proving on real data that one forward over all heads' slices is the same as a forward for each head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lte.config import LossReduction
from lightning_lte.float32 import HALF, Widened, in_full_float32
from lightning_lte.layers.base import HeadedLayer, state_of
from lightning_lte.rehearsal import Determined, DrawsWithoutEnd, alike, not_compiled, untouched, without_zeros
from lightning_lte.report import listed

# Rounding differs between rows of one matrix product, and many times as much in half precision.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2


def reason_against_batched(
    module: nn.Module,
    step: Callable[[Any], Tensor | None],
    batch: Any,
    parts: Sequence[Any],
    *,
    heads: Callable[[], AbstractContextManager[None]],
    head: Callable[[int], AbstractContextManager[None]],
    factors: Iterable[Tensor],
    replicas: Iterable[tuple[Tensor, Tensor]],
    stacks: Iterable[Tensor],
    left_out: set[nn.Module],
    loss_reduction: LossReduction,
) -> str | None:
    """Why batched execution would be wrong for this module on this batch; None if it is proved right.

    Three things have to hold:
    1. No batch norm takes statistics over the slices of several heads.
    2. What a layer with heads receives while all heads act on the whole batch is, along dimension 0, what it receives
       while each acts alone on its slice. So the layer sees samples outermost, no sample reaches another head's slice,
       and the layers before it compute the same in both ways.
    3. The loss of the batch is the mean, or the sum, of the losses of its slices.

    The module runs in the mode it is in, in float32 without TF32, with every random draw replaced by a constant, once
    on the batch and once on each slice, which costs two forward passes over the batch. What half precision would round
    is kept in float32, too (`Widened`): rounding adds up from layer to layer, and looks like samples that mix. Where
    the step refuses that it runs as it is, and more is taken for rounding. What starts at zero is filled
    for the time, so that nothing is hidden behind it, and all heads are alike, so that what follows a layer whose input
    is not the batch can be judged before it is known to be one. Whatever the step changes is put back; see `untouched`.

    Args:
        module: with heads.
        step: the user's step: takes a batch and returns the loss.
        batch: a real batch, on the device.
        parts: its slices, one for each local head, in order.
        heads: a context in which all local heads act.
        head: a context in which one acts alone.
        factors: of the heads.
        replicas: pairs of what the heads have for a parameter, (n, *shape), and the parameter.
        stacks: all that has the heads as dimension 0.
        left_out: of the switch of the module's layers. In the end it has the layers whose input is not the batch (a
            table of positions, say); the others are proved right without heads in them.
        loss_reduction: see `LTEConfig.loss_reduction`.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            return f"{name} ({type(layer).__name__}) takes statistics over the batch"
    for widened in (Widened(), None):
        left_out.clear()
        try:
            zeros = without_zeros([*module.parameters(), *factors], replicas)
            with (
                zeros,
                alike(stacks),
                untouched(module) as again,
                not_compiled(),
                in_full_float32(),
                widened or nullcontext(),
            ):
                with heads(), Determined():
                    seen, loss = _watch(module, partial(step, batch), len(parts), left_out)
                alone = _watch_each(module, step, parts, head, again, left_out)
                half = any(x.dtype in HALF for _, x in seen) or (widened is not None and widened.narrow)
                tolerance = _HALF_TOLERANCE if half else _TOLERANCE
                reason = _compare_inputs(module, seen, [own for own, _ in alone], tolerance, left_out)
                if reason is not None:
                    return reason
            break
        except _HidesTheBatch as layer:
            return f"{layer} is called inside of torch.func.vmap, where it sees samples one by one"
        except DrawsWithoutEnd as draws:
            return str(draws)
        except Exception as error:
            if widened is None or not widened.used:
                return "it could not be tried: " + f"{type(error).__name__}: {error}".removesuffix(": ")
    losses = [own for _, own in alone]
    if not all(isinstance(own, Tensor) and own.numel() == 1 for own in (loss, *losses)):
        return "the step returned no loss on the first batch"
    if not all(own is not None and bool(own.isfinite()) for own in (loss, *losses)):
        return "the loss of the first batch is not finite, which proves nothing"
    each = torch.stack([own.detach().float().reshape(()) for own in losses if own is not None])
    reduced = each.sum() if loss_reduction == "sum" else each.mean()
    if loss is not None and not torch.isclose(loss.detach().float().reshape(()), reduced, rtol=tolerance, atol=1e-6):
        return (
            f"the loss of the batch ({float(loss):.6g}) is not the {loss_reduction} of the losses of the heads' slices"
            f" ({float(reduced):.6g})"
        )
    return None


_Seen = list[tuple[str, Tensor]]


class _HidesTheBatch(Exception):
    """A layer, by name, is called where the batch can't be seen, let alone be split."""


def _watch(module: nn.Module, run: Callable[[], Any], count: int, left_out: set[nn.Module]) -> tuple[_Seen, Any]:
    """Run and keep what every layer with heads receives of the batch, call by call.

    A layer whose input can't be the batch of `count` heads is left out from then on.
    """
    seen: _Seen = []
    watched: list[HeadedLayer] = []
    for name, layer in module.named_modules():
        if isinstance(layer, HeadedLayer):

            def forward(*args: Any, layer: HeadedLayer = layer, name: str = name, **kwargs: Any) -> Any:
                inputs = layer.of_the_batch(*args, **kwargs)
                if any(map(_is_mapped, inputs)):
                    raise _HidesTheBatch(name)
                if any(x.dim() < layer.least_dims() or x.shape[0] % count for x in inputs[:1]):
                    left_out.add(layer)
                seen.extend((name, x.detach().clone()) for x in inputs)
                return type(layer).forward(layer, *args, **kwargs)

            # No hook: models may call `layer.forward`, or hand it to a function that does.
            layer.__dict__["forward"] = forward
            watched.append(layer)
    try:
        loss = run()
        return seen, loss.detach() if isinstance(loss, Tensor) else loss
    finally:
        for layer in watched:
            del layer.__dict__["forward"]


def _watch_each(
    module: nn.Module,
    step: Callable[[Any], Tensor | None],
    parts: Sequence[Any],
    head: Callable[[int], AbstractContextManager[None]],
    again: Callable[[], None],
    left_out: set[nn.Module],
) -> list[tuple[_Seen, Any]]:
    """`_watch` each head alone on its slice, from the same start."""
    found = []
    for number, part in enumerate(parts):
        again()
        with head(number), Determined():
            found.append(_watch(module, partial(step, part), 1, left_out))
    return found


def _is_mapped(x: Tensor) -> bool:
    """Whether torch.func.vmap maps over a dimension of it, also inside of other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _compare_inputs(
    module: nn.Module, together: _Seen, alone: list[_Seen], tolerance: float, left_out: set[nn.Module]
) -> str | None:
    if any([name for name, _ in own] != [name for name, _ in together] for own in alone):
        return "the layers that are called depend on the data"
    split: set[str] = set()
    for (name, x), *own in zip(together, *alone, strict=True):
        parts = [part for _, part in own]
        if all(part.shape == x.shape and _close(part, x, tolerance) for part in parts):
            # The same for all heads, so not the batch.
            left_out.add(module.get_submodule(name))
            continue
        if not all(part.shape == (x.shape[0] // len(parts), *x.shape[1:]) for part in parts) or x.shape[0] % len(parts):
            return f"{name} does not see the batch outermost in dimension 0: its input has shape {tuple(x.shape)}"
        if not _close(torch.cat(parts), x, tolerance):
            return f"{name} does not see the batch outermost in dimension 0, or samples mix before it"
        split.add(name)
    factored = {name for name, _ in together if state_of(module.get_submodule(name)).factors}
    if split & factored and all(module.get_submodule(name) in left_out for name in factored):
        # As of a policy that plays a game in the step, too: shared by the heads, nothing would be left to them.
        return f"layers are called with the batch and with something else, too: {listed(sorted(factored))}"
    return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b but for `tolerance` times (|b| + the root mean square of b), element by element."""
    if not b.numel():
        return True
    if a.is_complex() or b.is_complex():
        # Real and imaginary parts side by side: neither is to be ignored.
        a, b = (torch.view_as_real(t.to(torch.complex128).resolve_conj()) for t in (a, b))
    if b.dtype not in (torch.float32, torch.float64) or a.dtype != b.dtype:
        a, b = a.double(), b.double()
    scale = torch.linalg.vector_norm(b, dtype=torch.float64) / math.sqrt(b.numel())
    if not bool(scale.isfinite()):
        # Masks have infinities, whose difference is not zero.
        odd = ~b.isfinite()
        return torch.equal(a[odd], b[odd]) and _close(a.masked_fill(odd, 0), b.masked_fill(odd, 0), tolerance)
    # In place and without a copy in more bits: over all layers, comparing took as long as the forward passes.
    excess = (a - b).abs_().sub_(b.abs().mul_(tolerance))
    return bool(excess.max() <= tolerance * scale)
