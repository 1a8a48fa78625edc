"""Finding out, in the first steps, which weights can't be factored, as they are used or written elsewhere, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from lightning_lte.product import is_batched

USED = "it is used outside its layer, too"
ASKED_FOR = "something asks for its gradient with torch.autograd.grad"
WRITTEN = "something else than merges writes to it"
HOOKED = "gradient hooks are registered on it"

# Elements of a weight that a checksum takes at a time, as int64: they fit in a core's cache, and elsewhere in 256 MiB.
PIECE, PIECE_ELSEWHERE = 2**17, 2**25
# Odd numbers of 64 bits, those of SplitMix64 (Steele et al. 2014).
_MIXERS = -0x61C8864680B583EB, -0x40A7B892E31B1A47

# Sums of the same gradients in another order differ by rounding.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Trial:
    """Watches one factored weight W through the first steps.

    While it lasts, W enters its layer's forward undetached, so that autograd computes its whole gradient. If all of
    that comes through the layer, it is thrown away at once. If some comes from elsewhere (W is tied by hand, used as a
    tensor, or given to `torch.autograd.grad`), or if anyone writes to W (masks, normalisation, teachers that follow
    their students), W can't be factored, and has just the gradient that it needs to be trained directly from this very
    step on.

    Args:
        weight: W.

    Attributes:
        reason: why W can't be factored, once that is known.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.reason: str | None = None
        self._through_layer: Tensor | None = None
        self._captures = 0
        self._version, self._sum = weight._version, int(checksum(weight))
        self._handles = [
            weight.register_hook(self._on_gradient),
            weight.register_post_accumulate_grad_hook(self._on_accumulated),
        ]

    def watched(self) -> Tensor:
        """W for a forward of its layer."""
        # As if outside of all transforms of torch.func: a hook on what is made inside never sees the step's gradient.
        with temporarily_clear_interpreter_stack():
            view = self.weight.view_as(self.weight)
        if view.requires_grad:
            view.register_hook(self._on_layer)
        return view

    def end(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._through_layer = None

    def _on_layer(self, gradient: Tensor | None) -> None:
        # None from functions that stop gradients. Batched for torch.autograd.grad, of which W's own hook tells.
        if gradient is None or is_batched(gradient):
            return
        gradient = gradient.detach()
        self._through_layer = gradient if self._through_layer is None else self._through_layer + gradient

    def _on_gradient(self, _: Tensor | None) -> None:
        # It comes before accumulation, and without one from torch.autograd.grad.
        self._captures += 1

    @torch.no_grad()
    def _on_accumulated(self, weight: Tensor) -> None:
        self._captures -= 1
        gradient, through_layer = weight.grad, self._through_layer
        if gradient is None:  # from functions that stop gradients
            return
        if self._captures:
            self.reason = ASKED_FOR
        elif self._is_written():
            self.reason = WRITTEN
        elif has_hooks(self.weight, self):
            self.reason = HOOKED
        elif through_layer is None or not _close(gradient.detach(), through_layer):
            self.reason = USED
        else:
            # Each weight's is let go as soon as it is complete, so that no two are held at once.
            weight.grad = self._through_layer = None

    def conclude(self) -> str | None:
        """Why W can't be factored, or None, when a step is about to be taken."""
        if self.reason is None and self._captures:
            self.reason = ASKED_FOR
        if self.reason is None and self.weight.grad is not None:
            self.reason = "something sets its gradient"
        if self.reason is None and self._is_written():
            self.reason = WRITTEN
        return self.reason

    def accept_writes(self) -> None:
        """Take W as it is now: after a merge, or where heads go on from it."""
        self._version, self._sum = self.weight._version, int(checksum(self.weight))
        if self.reason == WRITTEN:
            # Its gradient was left there, for a replica. Whether W is used elsewhere, the next backward shows.
            self.reason = self.weight.grad = self._through_layer = None

    def _is_written(self) -> bool:
        # Writes to `weight.data` go past autograd and show in the bits alone.
        return self.weight._version != self._version or int(checksum(self.weight)) != self._sum


def has_hooks(param: Tensor, trial: Trial | None = None) -> bool:
    """Whether anyone has registered hooks on a parameter's gradient, but for its trial."""
    hooks = {*(param._backward_hooks or ()), *(param._post_accumulate_grad_hooks or ())}
    return bool(hooks - (set() if trial is None else {handle.id for handle in trial._handles}))


def checksum(weight: Tensor) -> Tensor:
    """A number that changes when the bits of a weight or their places do, as a tensor on its device.

    It is taken a few rows at a time. Torch makes a copy in int64 of all that it sums, which would be two times a weight
    in float32, and allocators don't give back all that they lent for a moment.
    """
    # Larger numbers as several of 32 bits: in a sum of 64, the signs of an even number of them would add up to nothing.
    bits = {1: torch.uint8, 2: torch.int16}.get(weight.element_size(), torch.int32)
    weight = weight.detach().reshape(weight.shape or (1,))
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    if not weight.numel():
        return total
    piece = PIECE if weight.device.type == "cpu" else PIECE_ELSEWHERE
    rows = max(1, piece * len(weight) // weight.numel())
    columns: Tensor | None = None
    for first in range(0, len(weight), rows):
        some = weight[first : first + rows].flatten(1) if weight.dim() > 1 else weight[first : first + rows, None]
        some = some.contiguous().view(bits).to(torch.int64)
        own = some.sum(0)
        columns = own if columns is None else columns.add_(own)
        total += _weighted(some.sum(1), first)
    assert columns is not None
    # Twice, so that a number counts an odd number of times, by its row and its column.
    return total + 2 * _weighted(columns, 0)


def _weighted(sums: Tensor, first: int) -> Tensor:
    """Their sum, each times an odd number that looks drawn by chance and depends on its place alone.

    With places themselves, 1, 2, 3 and 4, signs that change in a row of four add up to nothing once in eight times.
    """
    numbers = torch.arange(first + 1, first + 1 + len(sums), device=sums.device) * _MIXERS[0]
    numbers = (numbers ^ (numbers >> 29)) * _MIXERS[1]
    return (sums * (numbers ^ (numbers >> 32) | 1)).sum()


def _close(a: Tensor, b: Tensor) -> bool:
    if a.layout == b.layout == torch.strided and a.is_set_to(b):
        return True  # one gradient, which needs no difference of its size
    # Not finite, as with the first scales of a gradient scaler: it proves nothing, and the next backward will.
    difference = (a - b).norm()
    return not difference.isfinite() or bool(difference <= _TOLERANCE.get(a.dtype, 1e-5) * a.norm())
