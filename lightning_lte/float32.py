"""Computing in float32, whatever fewer bits are allowed or asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_lte.writes import written

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_full_float32() -> Iterator[None]:
    """Compute float32 as such, whatever else is allowed for speed.

    On GPUs, TF32 has 10 bits of mantissa in place of 23; convolutions take it unless they are told otherwise, and
    matrix products where `torch.set_float32_matmul_precision` allows it.
    """
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    kinds = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    with ExitStack() as stack:
        for kind in kinds:
            stack.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
        # The older settings go with them, and are put back before them. torch refuses to read one that is at odds with
        # them, as it would be where the user chose by these alone; `torch.backends.cudnn.flags` and TunableOp do so.
        with suppress(RuntimeError):
            stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        with suppress(RuntimeError):
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield


class Widened(TorchDispatchMode):
    """Computes in float32 what would be computed in half precision, whether tensors are in it, autocast asks for it, or
    a cast.

    Tensors in half precision stay what they are, and are written to as such. What comes from them is float32, and so
    may be what the user's code takes for half precision. Operations that have no float32, as those of some packages for
    attention, get half precision.

    Attributes:
        narrow: whether an operation has no float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._half: torch.dtype | None = None
        self.narrow = False

    @property
    def used(self) -> bool:
        """Whether there was anything to widen."""
        return self._half is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # and has to stay one
            return func(*args, **kwargs)
        outputs = written(func, args, kwargs)
        if func.namespace != "aten":  # knows what its own dtypes are for
            wide_args, wide_kwargs = args, kwargs
        else:
            # Few operations read another dtype than that of what they write to.
            target = outputs[0].dtype if outputs and outputs[0].is_floating_point() else torch.float32
            wide_args, wide_kwargs = tree_map(partial(self._widened, target, outputs), (args, kwargs))
        try:
            return func(*wide_args, **wide_kwargs)
        except (NotImplementedError, RuntimeError, TypeError):
            if outputs or self._half is None:
                raise
            self.narrow = True
            narrow_args, narrow_kwargs = tree_map(partial(_narrowed, self._half), (args, kwargs))
            return func(*narrow_args, **narrow_kwargs)

    def _widened(self, target: torch.dtype, outputs: list[Tensor], value: Any) -> Any:
        """An argument of an operation, which is to read `target`."""
        if isinstance(value, torch.dtype) and value in HALF:
            self._half = value
            return torch.float32
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != target:
            for dtype in HALF:
                if dtype in (value.dtype, target) and all(value is not own for own in outputs):
                    self._half = dtype
                    return value.to(target)
        return value


def _narrowed(half: torch.dtype, value: Any) -> Any:
    return value.to(half) if isinstance(value, Tensor) and value.dtype == torch.float32 else value
