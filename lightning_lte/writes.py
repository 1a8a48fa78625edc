"""What an operation of torch writes to, for modes that look at each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, as its schema says.

    Args:
        func: as `__torch_dispatch__` receives it.
        args, kwargs: its arguments.
    """
    found: list[Tensor] = []
    if func._schema.is_mutable:
        for where, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[where] if where < len(args) else kwargs.get(argument.name)  # `out` comes by its name
                found += [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)]
    return found
