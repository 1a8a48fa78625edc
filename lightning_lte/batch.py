"""Dealing a batch out to heads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lte.report import listed

Path = tuple[Any, ...]

REMEDY = (
    "Use one head per device, or define `split_batch(self, batch, heads)` in the LightningModule, which returns a batch"
    " for each head"
)


def copied(batch: Any) -> Any:
    """A copy of a batch, its containers and its tensors, that a step may write to."""

    def copied_leaf(_: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf.clone() if _is_table(leaf) else leaf
        return _in_class_of(leaf, leaf.detach().clone().requires_grad_(leaf.requires_grad))

    return _map(copied_leaf, batch, (), set())


def _unshared(tensor: Tensor) -> Tensor:
    """The same memory, whose writes autograd counts by themselves."""
    data = tensor.data
    vars(data).update(vars(tensor))
    return data


class Layout:
    """Where the samples lie in batches of one structure: with the same keys, and the same kinds of things under them.

    Tensors have them along dimension 0; lists and tuples that are as long as the batch, such as images of different
    sizes, captions or targets, have one for each sample. Mappings, sequences, named tuples and dataclasses may be
    nested, and so may tables of tensors (`TensorDict`, `tensorclass`), which are cut as one. Numbers, strings, None and
    tensors without dimensions belong to all samples.

    A list of tensors of different sizes may hold samples, or the parts of a batch, such as [inputs, targets] or the
    levels of a pyramid. It counts as one of samples where the loader's batch size or other tensors say so, and beside
    a list of mappings that is as long: the targets of object detection.

    Args:
        batch: the first one that is made so.
        expected: samples of whole batches, where the loader knows; else they are read off the tensors.
        former: of other batches of the run. What these have in common with this one tells how many samples it has.

    Attributes:
        expected: see above.
        structure: what the batches have in common, as text that is equal for those that are made alike alone.

    Raises:
        ValueError: it can't be told where the samples are.
    """

    def __init__(self, batch: Any, expected: int | None = None, former: Sequence[Layout] = ()) -> None:
        self.expected = expected
        rows = {path for layout in former for path in layout._rows}
        items = {path for layout in former for path in layout._items}
        sizes = {_size(v) for path, v in _leaves(batch) if path in rows and _has_rows(v)}
        sizes |= {len(v) for path, v in _leaves(batch, whole=items) if path in items and _is_list(v)}
        if sizes:
            parts = {path[:depth] for path in rows | items for depth in range(len(path))}
            found = _read(batch, sizes.pop(), True, rows | items, parts) if len(sizes) == 1 else None
        else:
            found = _first_read(batch, expected)
        if found is None:
            raise ValueError(
                "Local heads share a device by splitting the batch: its tensors must be dense and have the samples"
                " along dimension 0, and its lists one item for each sample, as many as its tensors or the loader's"
                f" batch_size say; received {_described(batch)}"
                + (f" from a loader with batch_size={expected}" if expected is not None else "")
                + f". {REMEDY}."
            )
        self._rows: set[Path] = found[0]
        self._items: set[Path] = found[1]
        self._kinds = self._kinds_in(batch)
        self.structure = repr(sorted(self._kinds, key=repr))

    def fits(self, batch: Any) -> bool:
        """Whether a batch has this structure, whatever its size."""
        return self._kinds_in(batch) == self._kinds

    def difference(self, other: Layout) -> str:
        """What batches of this structure have and those of another have not, and the other way round."""
        more, less = ({path for path, _ in a._kinds - b._kinds} for a, b in ((self, other), (other, self)))
        parts = [("with", more - less), ("without", less - more), ("with other kinds of things in", more & less)]
        return ", ".join(f"{word} {listed(sorted(map(_name, paths)))}" for word, paths in parts if paths)

    def size(self, batch: Any) -> int:
        """Samples in a batch.

        Raises:
            ValueError: it does not have one number of samples throughout, or another structure.
        """
        sizes = {self._length(path, leaf) for path, leaf in _leaves(batch, whole=self._items)} - {None}
        if len(sizes) != 1:
            raise ValueError(
                "A batch must be made as the first one is, of which it was found where samples are, and have one number"
                " of them throughout; received"
                f" {_described(batch)}. {REMEDY}."
            )
        return sizes.pop()  # type: ignore[return-value]

    def take(self, batch: Any, index: Sequence[int]) -> Any:
        """A batch of some samples, by their numbers."""
        # Not by a tensor of numbers: the host would wait until a device has it.
        runs = _runs(index)

        def take(path: Path, leaf: Any) -> Any:
            if path in self._rows and _is_table(leaf):
                # Of tensors of its own: a step may write to it.
                parts = [leaf[run] for run in runs]
                return parts[0].clone() if len(parts) == 1 else torch.cat(parts)
            if path in self._rows:
                # Autograd is to take slices for tensors of their own: a step may write to one that others lie beside.
                whole = leaf if leaf.requires_grad else _unshared(leaf)
                parts = [whole[run] for run in runs]
                return _in_class_of(leaf, parts[0] if len(parts) == 1 else torch.cat(parts))
            if path in self._items:
                return type(leaf)(leaf[i] for i in index)
            return leaf

        return _map(take, batch, (), self._items)

    def split(self, batch: Any, count: int, least: int = 1) -> list[Any]:
        """Cut a batch into `count` slices, as even as can be.

        A batch of too few samples is repeated from its start: every sample is used, and no head goes without.

        Args:
            batch: any of the run.
            count: slices.
            least: samples in each of them.
        """
        samples = self.size(batch)
        if samples == 0:
            return [batch] * count
        order = [i % samples for i in range(max(samples, count * least))]
        # The first have one more where `count` does not divide them.
        each, more = divmod(len(order), count)
        starts = [each * part + min(part, more) for part in range(count + 1)]
        parts = [self.take(batch, order[start:end]) for start, end in pairwise(starts)]
        return parts if len(order) == samples else list(map(copied, parts))

    def filled_up(self, batch: Any, count: int) -> Any:
        """Repeat samples from the start of a batch until `count` divides it."""
        samples = self.size(batch)
        if samples % count == 0:
            return batch
        return self.take(batch, [i % samples for i in range(samples + -samples % count)])

    def _length(self, path: Path, leaf: Any) -> int | None:
        if path in self._rows:
            return _size(leaf) if _has_rows(leaf) else -1
        if path in self._items:
            return len(leaf) if _is_list(leaf) else -1
        return -1 if _has_rows(leaf) else None

    def _kinds_in(self, batch: Any) -> set[tuple[Path, str]]:
        kinds: set[tuple[Path, str]] = set()
        for path, leaf in _leaves(batch, whole=self._items):
            kind = "rows" if _has_rows(leaf) else "items" if path in self._items and _is_list(leaf) else ""
            while not kind and path and type(path[-1]) is int:
                path = path[:-1]  # however many captions, or names of files, there are
            kinds.add((path, kind))
        return kinds


def layout_of(batch: Any, known: list[Layout]) -> Layout:
    """The layout of a batch: one of those known, or a new one, which is added to them.

    Raises:
        ValueError: it can't be told where the samples are.
    """
    found = next((layout for layout in known if layout.fits(batch)), None)
    if found is None:
        found = Layout(batch, known[0].expected if known else None, known)
        known.append(found)
    return found


def _runs(index: Sequence[int]) -> list[slice]:
    """Numbers as runs of those that follow each other."""
    starts = [i for i in range(len(index)) if not i or index[i] != index[i - 1] + 1]
    return [slice(index[start], index[end - 1] + 1) for start, end in pairwise([*starts, len(index)])]


def _first_read(batch: Any, expected: int | None) -> tuple[set[Path], set[Path]] | None:
    """`_read` a batch of which nothing is known but the loader's batch size, perhaps."""
    found = None if expected is None else _read(batch, expected, known=True)
    tensors, lists, targets = _lengths(batch)
    for candidates in (tensors, targets if tensors else lists):
        if found is None:
            # A collate function may leave samples out, but what has more than the loader gave holds other things.
            fit = [_read(batch, n) for n in candidates - {-1} if expected is None or n <= expected]
            fit = [read for read in fit if read is not None]
            found = fit[0] if len(fit) == 1 else None
    return found


def _read(
    batch: Any, samples: int, known: bool = False, lists: Collection[Path] = (), parts: Collection[Path] = ()
) -> tuple[set[Path], set[Path]] | None:
    """Paths of tensors with rows for samples and of lists with items for them; None if they don't fit.

    Args:
        batch: any.
        samples: as many as it would have.
        known: whether that is sure; if not, the outermost list is taken to hold other things than samples.
        lists: paths of what is known to have the samples: a list there that is as long has an item for each.
        parts: paths of containers that are known to have parts of the batch.
    """
    rows: set[Path] = set()
    items: set[Path] = set()

    def has_items(value: Any, path: Path) -> bool:
        return _is_list(value) and len(value) == samples and path not in parts

    def read(value: Any, path: Path) -> bool:
        if path in lists and has_items(value, path):
            items.add(path)
            return True
        if _has_rows(value):
            rows.add(path)
            return _size(value) == samples
        if isinstance(value, Tensor):
            return True
        children = _children(value)
        if children is None:
            return isinstance(value, str | bytes | int | float | bool | complex | np.generic | None)
        # Images beside a list of targets, one for each: as many as they have channels, or vectors as long, perhaps.
        if known and any(_has_an_item_for_each(child, samples) for _, child in children):
            for key, child in children:
                if has_items(child, (*path, key)):
                    items.add((*path, key))
            children = [(key, child) for key, child in children if (*path, key) not in items]
        if has_items(value, path) and (path or known):
            found = (set(rows), set(items))
            if not all(isinstance(item, Mapping) for item in value) or not value:
                if all(read(child, (*path, key)) for key, child in children) and (rows, items) != found:
                    return True
            rows.clear()
            rows.update(found[0])
            items.clear()
            items.update({*found[1], path})
            return True
        return all(read(child, (*path, key)) for key, child in children)

    return (rows, items) if read(batch, ()) and (rows or items) else None


def _is_list(value: Any) -> bool:
    return type(value) in (list, tuple)


def _is_list_of_mappings(value: Any) -> bool:
    return _is_list(value) and all(isinstance(v, Mapping) for v in value)


def _has_an_item_for_each(value: Any, samples: int) -> bool:
    """Whether a list is as long as the batch, and its items can't have rows for the samples: they are mappings, or
    tensors of other sizes."""
    if not _is_list(value) or len(value) != samples:
        return False
    sizes = {_size(item) for item in value if isinstance(item, Tensor) and item.dim()}
    return _is_list_of_mappings(value) or not sizes <= {samples}


def _is_table(value: Any) -> bool:
    """Whether tensors that have dimensions in common are one value, as in a `TensorDict` or a `tensorclass`.

    A `TensorDict` without such dimensions is a mapping like any other.
    """
    if isinstance(value, Tensor) or not hasattr(type(value), "batch_size"):
        return False
    common = value.batch_size
    return isinstance(common, torch.Size) and (len(common) > 0 or not isinstance(value, Mapping))


def _has_rows(value: Any) -> bool:
    return _is_table(value) or (isinstance(value, Tensor) and value.dim() > 0)


def _size(tensor: Any) -> int:
    """Rows of a tensor or a table; -1 of one that can't be cut: sparse, nested, or with nothing in common."""
    if _is_table(tensor):
        return tensor.batch_size[0] if tensor.batch_size else -1
    return -1 if tensor.is_nested or tensor.layout != torch.strided else tensor.shape[0]


def _in_class_of(whole: Tensor, part: Tensor) -> Tensor:
    """Give rows of a tensor its class and attributes, where slicing loses the class, as torchvision's `Mask` does."""
    if type(part) is type(whole):
        return part
    part = part.as_subclass(type(whole))
    part.__dict__.update(vars(whole))
    return part


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container, or None for something else."""
    if _is_table(value):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if _is_list(value) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Those that its `__init__` doesn't take, too: it may make them of what it takes.
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    return None


def _leaves(value: Any, path: Path = (), whole: Collection[Path] = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a batch with their paths, and the lists whose paths are in `whole`."""
    children = None if path in whole and _is_list(value) else _children(value)
    if children is None:
        yield path, value
    else:
        for key, child in children:
            yield from _leaves(child, (*path, key), whole)


def _lengths(batch: Any) -> tuple[set[int], set[int], set[int]]:
    """Lengths of dimension 0 of all tensors, of all lists but the outermost, and of those that lie beside a list of
    mappings as long."""
    tensors: set[int] = set()
    lists: set[int] = set()
    targets: set[int] = set()

    def look(value: Any, outermost: bool) -> None:
        if _has_rows(value):
            tensors.add(_size(value))
        if _is_list(value) and not outermost:
            lists.add(len(value))
        children = [child for _, child in _children(value) or ()]
        of_mappings = {len(child) for child in children if _is_list_of_mappings(child)}
        targets.update(of_mappings & {len(c) for c in children if _is_list(c) and not _is_list_of_mappings(c)})
        for child in children:
            look(child, False)

    look(batch, True)
    return tensors, lists, targets


def _map(function: Callable[[Path, Any], Any], value: Any, path: Path, whole: set[Path]) -> Any:
    """A copy of a batch with a function applied to its leaves, and to the lists whose paths are in `whole`."""
    children = None if path in whole else _children(value)
    if children is None:
        return function(path, value)
    new = {key: _map(function, child, (*path, key), whole) for key, child in children}
    if isinstance(value, Mapping):
        return _mapping_like(value, dict(children), new)
    if _is_list(value):
        return type(value)(new.values())
    if isinstance(value, tuple):
        return type(value)(*new.values())
    replaced = copy.copy(value)
    for key, child in new.items():
        object.__setattr__(replaced, key, child)
    return replaced


def _mapping_like(value: Any, old: dict[Any, Any], new: dict[Any, Any]) -> Any:
    """A copy of a mapping with other items, of its own class; a plain dict where there is no such copy.

    Args:
        value: the mapping.
        old: its items.
        new: those of the copy, under the same keys.
    """
    try:
        result = copy.copy(value)
        for key, item in new.items():
            result[key] = item
            if value[key] is not old[key]:
                # The copy keeps its items in the same place, as one does that wraps a dict.
                value[key] = old[key]
                return new
    except TypeError:  # one that can't be changed
        return new
    return result


def _name(path: Path) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)


def _described(batch: Any) -> str:
    """What a batch has in the way of samples, and where, for errors."""
    # By what it is, the places where it is.
    lengths: dict[int, list[str]] = {}
    uncut: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    plain = (Tensor, str, bytes, int, float, bool, complex, np.generic, type(None))
    for path, leaf in _leaves(batch):
        if _has_rows(leaf) and _size(leaf) != -1:
            lengths.setdefault(_size(leaf), []).append(_name(path))
        elif _has_rows(leaf):
            uncut.setdefault(_layout(leaf), []).append(_name(path))
        elif not isinstance(leaf, plain):
            unknown.setdefault(type(leaf).__name__, []).append(_name(path))
    where = "; ".join(f"{size} in {listed(names)}" for size, names in sorted(lengths.items()))
    found = [f"tensors with dimension 0 of sizes {sorted(lengths)}"] if lengths else []
    found = [f"{found[0]} ({where})"] if len(lengths) > 1 else found
    found += [f"{' and '.join(sorted(uncut))} tensors ({_places(uncut)})"] if uncut else []
    found = found or ["no tensors"]
    found += [f"objects of kind {', '.join(sorted(unknown))} ({_places(unknown)})"] if unknown else []
    return " and ".join(found)


def _places(found: dict[str, list[str]]) -> str:
    return listed([name for names in found.values() for name in names])


def _layout(tensor: Any) -> str:
    if _is_table(tensor):
        return f"{type(tensor).__name__} (batch_size {list(tensor.batch_size)}) of"
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
