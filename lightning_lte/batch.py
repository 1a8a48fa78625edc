"""Dealing a batch out to heads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def size(batch: Any) -> int:
    """Samples in a batch: the length of dimension 0, which all its tensors have in common.

    Tensors, mappings, sequences and dataclasses may be nested. Numbers, None, tensors without dimensions and objects of
    other kinds can't tell.

    Raises:
        ValueError: no tensor, or tensors that differ, or an object of unknown kind.
    """
    sizes: set[int] = set()
    unknown: set[str] = set()

    def look(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.dim():
                sizes.add(leaf.shape[0])
        elif not isinstance(leaf, str | bytes | int | float | bool | complex | None):
            unknown.add(type(leaf).__name__)
        return leaf

    _map(look, batch)
    if len(sizes) != 1 or unknown:
        found = f"dimension 0 of sizes {sorted(sizes)}" if sizes else "no tensors"
        if unknown:
            found += f" and objects of kind {', '.join(sorted(unknown))}"
        raise ValueError(
            "Local heads share a device by splitting the batch along dimension 0, which must be the same for all"
            f" tensors in it; received a batch with {found}. Use one head per device."
        )
    return sizes.pop()


def split(batch: Any, count: int) -> list[Any]:
    """Cut a batch into `count` slices along dimension 0, as even as can be; none is empty.

    A batch of fewer samples than slices is repeated from its start: every sample is used, and no head goes without.
    """
    samples = size(batch)
    order = torch.arange(max(samples, count)) % samples
    return [_rows(batch, rows, samples) for rows in order.tensor_split(count)]


def is_even(batch: Any, count: int) -> bool:
    """Whether a batch can be cut into `count` slices of one size. What `size` can't measure is taken to be even."""
    try:
        return size(batch) % count == 0
    except ValueError:
        return True


def filled_up(batch: Any, count: int) -> Any:
    """Repeat samples from the start of a batch until `count` divides it."""
    samples = size(batch)
    return _rows(batch, torch.arange(-(-samples // count) * count) % samples, samples)


def _rows(batch: Any, rows: Tensor, samples: int) -> Any:
    index = rows.tolist()
    contiguous = index == list(range(index[0], index[0] + len(index)))

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        return leaf[index[0] : index[0] + len(index)] if contiguous else leaf[rows.to(leaf.device)]

    def take_strings(leaves: list[Any] | tuple[Any, ...]) -> Any:
        # A list of captions, say: one per sample.
        return type(leaves)(leaves[i] for i in index)

    return _map(take, batch, take_strings, samples)


def _map(
    function: Callable[[Any], Any], value: Any, strings: Callable[[Any], Any] | None = None, samples: int = -1
) -> Any:
    def deeper(inner: Any) -> Any:
        return _map(function, inner, strings, samples)

    if isinstance(value, Mapping):
        result: Any = copy.copy(value)
        for key in value:
            result[key] = deeper(value[key])
        return result
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(deeper, value))
    if type(value) in (list, tuple):
        if strings and len(value) == samples and all(isinstance(v, str | bytes | int | float) for v in value):
            return strings(value)
        return type(value)(map(deeper, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: deeper(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return function(value)
