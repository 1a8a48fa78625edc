"""A device that this machine has not: tensors that say they are there, and let the CPU compute.

Operations refuse what a GPU refuses, such as operands on two devices, so that code that mixes them up is found where
there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Of all devices but the CPU, autograd computes for this one alone in the thread that asks for it, as there is none.
DEVICE = torch.device("meta")

# Take tensors of two devices.
_COPIES = ("aten._to_copy.", "aten.copy_.")
# Take no number of the CPU's among tensors of another device.
_TOGETHER = ("aten.cat.", "aten.stack.")
# The host waits for their results: values, or how many there are.
_WAITS = ("aten._local_scalar_dense.", "aten.is_nonzero.", "aten.equal.", "aten.nonzero.", "aten.masked_select.")
_INDEX = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")


class Elsewhere(Tensor):
    """A tensor on `DEVICE`.

    Attributes:
        held: the same on the CPU.
        waits: names of operations, in the order in which they made the host wait for the device.
    """

    held: Tensor
    waits: ClassVar[list[str]] = []
    is_meta = False

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        self.waits.append("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't make an array of a tensor on {DEVICE}")


def move_(module: nn.Module) -> nn.Module:
    """Put new parameters and buffers on `DEVICE` in the places of a module's own."""
    for owner in module.modules():
        for name, param in owner._parameters.items():
            if param is not None:
                owner._parameters[name] = nn.Parameter(Elsewhere(param.detach().clone()), param.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = Elsewhere(buffer.clone())
    return module


@contextmanager
def another_device() -> Iterator[None]:
    """Let operations make tensors on `DEVICE` where they are asked for it."""
    with _MadeOfValues(), _Everywhere():
        yield


class _Everywhere(TorchDispatchMode):
    """For operations none of whose operands is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _MadeOfValues(TorchFunctionMode):
    """torch.tensor and its like make a tensor, and copy it, where no dispatch mode sees the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    name, asked = str(func), kwargs.get("device")
    operands = _tensors((args, tuple(kwargs.values())))
    there = [t for t in operands if isinstance(t, Elsewhere)]
    if there and not name.startswith(_COPIES):
        _check_together(func, args, operands)
    makes_there = bool(there) if asked is None else _is_there(asked)
    if name.startswith("aten.copy_."):
        makes_there = isinstance(args[0], Elsewhere)
    # In either direction: the host waits until the device has done all that came before.
    source = args[1] if name.startswith("aten.copy_.") else args[0] if args else None
    across = name.startswith(_COPIES) and isinstance(source, Elsewhere) != makes_there
    if across or (there and (name.startswith(_WAITS) or _by_mask(name, args))):
        Elsewhere.waits.append(name)
    generator = kwargs.get("generator")
    if generator is not None and _is_there(generator.device) != makes_there:
        raise RuntimeError(f"{name}: expected a generator on {asked}, but found one on {generator.device}")

    values, more = _mapped(args, _held), {key: _mapped(value, _held) for key, value in kwargs.items()}
    result = func(*values, **({**more, "device": "cpu"} if _is_there(asked) else more))
    if not makes_there:
        return result
    known = {id(t.held): t for t in there}
    return _mapped(result, lambda t: known[id(t)] if id(t) in known else Elsewhere(t))


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Elsewhere) else tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value of an operation's with other tensors in it."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(v, change) for v in value) if type(value) in (list, tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    """Those in a value of an operation's."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if type(value) in (list, tuple) else []


def _check_together(func: Any, args: Any, operands: list[Tensor]) -> None:
    """Raise where a GPU's operation would: a number of the CPU's may take part, and so may its indices."""
    name = str(func)
    indices = _tensors(args[1]) if name.startswith(_INDEX) and isinstance(args[0], Elsewhere) else []
    alone = [t for t in operands if not isinstance(t, Elsewhere) and not any(t is i for i in indices)]
    written = func._schema.is_mutable and not isinstance(args[0], Elsewhere) and isinstance(args[0], Tensor)
    if written or any(t.dim() or name.startswith(_TOGETHER) for t in alone):
        shapes = [tuple(t.shape) for t in operands]
        raise RuntimeError(f"{name}: expected all tensors on one device; found {DEVICE} and cpu, of shapes {shapes}")


def _by_mask(name: str, args: Any) -> bool:
    """Whether it has to count the elements of a mask."""
    return name.startswith(_INDEX) and any(t.dtype == torch.bool for t in _tensors(args[1]))
