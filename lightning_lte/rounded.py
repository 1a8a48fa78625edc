"""A base weight that forwards read in low precision, and the high-precision copy that merges write to.

The paper's optional step. Forwards read a rounded W~; W itself is kept where the device has no need of it whole:

    y_h = W~ x_h + s * (B_h A_h - B'_h A'_h) x_h,    W <- W + mean delta,    W~ <- rounded(W)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.product import are_plain, cast, is_captured
from lightning_lte.transport import Transport
from lightning_lte.trial import checksum

Base = Literal["float32", "bfloat16", "int8", "nf4"]
BaseCopy = Literal["cpu", "sharded", "error-feedback"]

# Numbers of W that share a scale in nf4: that of the paper on QLoRA (arXiv 2305.14314).
BLOCK = 64


def check_kernels(kind: Base) -> None:
    """Raise if what rounds to a precision is not installed.

    Raises:
        ModuleNotFoundError: with rule, value and remedy.
    """
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "Weights in 4 bits need the package bitsandbytes, which is not installed; received base='nf4'. Install it"
            " (pip install 'lightning-lte[quantized]'), or give base='int8'."
        )


def rounded(x: Tensor, kind: Base) -> list[Tensor]:
    """What is kept of a matrix x (rows, columns) in low precision.

    "bfloat16" rounds to it; "int8" rounds each row to 255 steps from minus its largest magnitude to plus that; "nf4"
    rounds every 64 numbers to the 16 levels of QLoRA, times their largest magnitude, with the kernels of bitsandbytes.
    """
    if kind == "bfloat16":
        return [x.to(torch.bfloat16)]
    if kind == "int8":
        wide = x.float()
        scale = _step(wide)
        return [(wide / scale).round().clamp(-127, 127).to(torch.int8), scale]
    from bitsandbytes.functional import quantize_4bit

    code, state = quantize_4bit(x.float().contiguous(), blocksize=BLOCK, quant_type=kind)
    return [code, state.absmax]


def unrounded(parts: Sequence[Tensor], kind: Base, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of `rounded`, a new tensor in the given dtype."""
    if kind == "bfloat16":
        return parts[0].to(dtype, copy=True)
    if kind == "int8":
        return (parts[0] * parts[1]).to(dtype)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    code, scales = parts
    # There are kernels for these.
    own = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    # As one row: bitsandbytes 0.50.2 gets rows wrong on CPUs that are no multiple of a block.
    state = QuantState(scales, shape=torch.Size([shape.numel()]), dtype=own, blocksize=BLOCK, quant_type=kind)
    row: Tensor = dequantize_4bit(code, state)
    return row.view(shape).to(dtype)


def stochastically_rounded(x: Tensor) -> list[Tensor]:
    """`rounded` to "int8", up or down by chance, so that the mean is x.

    The chance is drawn from the bits of x: all devices that have the same x draw alike, and so does a resumed run.
    """
    wide = x.float()
    scale = _step(wide)
    generator = torch.Generator(x.device).manual_seed(int(checksum(wide)) & (2**63 - 1))
    chance = torch.rand(wide.shape, generator=generator, dtype=torch.float32, device=x.device)
    return [(wide / scale + chance).floor().clamp(-127, 127).to(torch.int8), scale]


def _step(rows: Tensor) -> Tensor:
    """The size of a step in each row, (rows, 1)."""
    step = rows.abs().amax(1, keepdim=True) / 127
    return step.where(step > 0, 1)


class _ProductOfRounded(torch.autograd.Function):
    """x W~^T + b, for which autograd keeps the rounded weight and not what it is unrounded to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        kind: Base,
        shape: torch.Size,
        numbers: Tensor,
        scales: Tensor | None,
    ) -> Tensor:
        # One by one and in fixed places, as torch.compile wants it.
        parts = [numbers] if scales is None else [numbers, scales]
        ctx.kind, ctx.size, ctx.parts = kind, shape, parts
        return functional.linear(x, unrounded(parts, kind, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        dx = dy @ unrounded(ctx.parts, ctx.kind, ctx.size, dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None, None, None, None


class Rounded:
    """One base weight W, of shape (out, in), as it is kept while forwards read it in low precision.

    The user's parameter stays the object it is, with name, shape and dtype. What it shows depends on the copy:

    - "cpu": W exactly, on the CPU.
    - "sharded": NaN, which takes no memory. Each device keeps its share of the rows of W; `exact` gathers them.
    - "error-feedback": NaN. There is no copy; what rounding took from W is kept in int8, with a scale for each row,
      rounded up or down by chance. W is what both add up to: of a mean delta about a part in 254 of the largest
      rounding error of its row is lost or gained by chance at each merge, which averages out over merges.

    Args:
        weight: W.
        kind: what forwards read.
        copy: where W is kept.
        transport: to the devices that share the rows.
        parts: what `state_dict` gave, to go on from; None, or nothing in it, to round W.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        kind: Base,
        copy: BaseCopy,
        transport: Transport,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weight, self.kind, self.copy = weight, kind, copy
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._transport = transport
        self._parts: list[Tensor] = []
        self._error: list[Tensor] = []
        self._rows = weight.new_empty(0)
        exact = weight.detach()
        if copy == "cpu":
            # `to` gives W itself where the device is the CPU.
            weight.data = exact.to("cpu")
        else:
            # One NaN, shown in all places: whoever reads W past its layer notices.
            weight.data = exact.new_full((), torch.nan).expand(self.shape)
        if not parts:
            self._keep(exact)
        else:
            self._parts = [parts[key].to(self.device) for key in sorted(parts) if key.startswith("part")]
            self._error = [parts[key].to(self.device) for key in sorted(parts) if key.startswith("error")]

    @property
    def released(self) -> bool:
        """Whether the user's parameter shows NaN."""
        return self.copy != "cpu"

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """W~, a new tensor (out, in)."""
        return unrounded(self._read_parts(), self.kind, self.shape, dtype or self.dtype)

    def reader(self) -> Callable[[torch.dtype], Tensor]:
        """What makes W~ in a dtype, as it is now: a backward is to see what its forward has seen."""
        return partial(unrounded, self._read_parts(), self.kind, self.shape)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W~^T + b for x (..., in): (..., out), in the dtype of autocast, where that is on, or that of x."""
        x, bias = cast(x), cast(bias)
        if not (torch.compiler.is_compiling() or are_plain(x)):
            # What looks into operations wants plain ones, for which autograd keeps W~ whole.
            return functional.linear(x, self.read(x.dtype), bias)
        numbers, *scales = self._read_parts()
        y: Tensor = _ProductOfRounded.apply(x, bias, self.kind, self.shape, numbers, scales[0] if scales else None)
        return y

    def _read_parts(self) -> list[Tensor]:
        if not torch.compiler.is_compiling() and is_captured(self.device):
            raise RuntimeError(
                "All replays of a CUDA graph read the same memory, and merges put rounded weights in another place;"
                f" received the capture of a forward with base={self.kind!r}. Give base='float32', or leave graphs to"
                " torch.compile(mode='reduce-overhead')."
            )
        return self._parts

    def merged(self) -> Tensor:
        """W as well as this device knows it alone, a new tensor: rounded where the rows are sharded."""
        if self.copy == "cpu":
            return self.weight.detach().to(self.device, copy=True)
        if self.copy == "error-feedback":
            return (self.read(torch.float32) + unrounded(self._error, "int8", self.shape, torch.float32)).to(self.dtype)
        return self.read()

    @torch.no_grad()
    def exact(self) -> Tensor:
        """W, a new tensor; where rows are sharded, a collective: every device has to call it."""
        if self.copy != "sharded":
            return self.merged()
        return self._transport.stack(self._rows)[: self.shape[0]].clone()

    @torch.no_grad()
    def write(self, exact: Tensor) -> None:
        """W <- exact, which is equal on all devices."""
        # All is made first, and W written in the end: a merge that is interrupted before that runs again.
        self._keep(exact)
        if self.copy == "cpu":
            self.weight.copy_(exact)
        else:
            # For those who look whether W was written.
            torch.autograd.graph.increment_version(self.weight)

    def _keep(self, exact: Tensor) -> None:
        # Laid out as what a checkpoint gives back: products of a matrix in other strides are rounded otherwise.
        parts, error, rows = rounded(exact.contiguous(), self.kind), self._error, self._rows
        if self.copy == "sharded":
            share = -(-self.shape[0] // self._transport.world_size)
            own = exact[share * self._transport.rank :][:share]
            # All shares are of one size, for the exchange.
            rows = functional.pad(own, (0, 0, 0, share - len(own))).clone()
        elif self.copy == "error-feedback":
            error = stochastically_rounded(exact.float() - unrounded(parts, self.kind, self.shape, torch.float32))
        self._parts, self._error, self._rows = parts, error, rows

    def restore(self, exact: Tensor | None = None) -> None:
        """Give the user's parameter its values back, on its device.

        Args:
            exact: these; None for `merged`.
        """
        self.weight.data = self.merged() if exact is None else exact

    def checksum(self) -> Tensor:
        """A number, on the device, that changes when W does, as far as all devices know it."""
        shown = [] if self.released else [self.weight]
        return torch.stack([checksum(t.detach().to(self.device)) for t in (*self._parts, *self._error, *shown)]).sum()

    @property
    def read_bytes(self) -> int:
        """Bytes of W~."""
        return sum(t.nbytes for t in self._parts)

    @property
    def kept_bytes(self) -> int:
        """Bytes that the device holds of W beside it."""
        return sum(t.nbytes for t in (*self._error, self._rows))

    def state_dict(self) -> dict[str, Tensor]:
        """What can't be made from W again, on the CPU; empty where all can."""
        if self.copy != "error-feedback":
            return {}
        named = {"part": self._parts, "error": self._error}
        return {f"{key}{i}": t.cpu() for key, tensors in named.items() for i, t in enumerate(tensors)}
