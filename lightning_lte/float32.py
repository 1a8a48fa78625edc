"""Computing in float32, whatever fewer bits are allowed or asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

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
    may be what the user's code takes for half precision.

    Attributes:
        used: whether there was anything to widen.
        narrow: whether an operation has no float32, and was computed in half precision after all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = self.narrow = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Whoever has operations of their own knows what they are for; and a view has to stay one.
        if func.namespace != "aten" or func.is_view:
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        # Few operations read another dtype than that of what they write to.
        dtype = written[0].dtype if written and written[0].is_floating_point() else torch.float32
        widened: list[Any] = []

        def widen(value: Any) -> Any:
            if isinstance(value, torch.dtype) and value in HALF:
                widened.append(value)
                return torch.float32
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
                if (value.dtype in HALF or dtype in HALF) and all(value is not own for own in written):
                    widened.append(value)
                    return value.to(dtype)
            return value

        wide_args, wide_kwargs = tree_map(widen, (args, kwargs))
        if not widened:
            return func(*args, **kwargs)
        self.used = True
        try:
            return func(*wide_args, **wide_kwargs)
        except (NotImplementedError, RuntimeError):
            if written:
                raise
            self.narrow = True
            return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found: list[Tensor] = []
    if func._schema.is_mutable:
        for where, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[where] if where < len(args) else kwargs.get(argument.name)
                found += [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)]
    return found
