"""Checkpoints as directories, to which each device writes what it has itself, through `torch.distributed.checkpoint`.

    last.ckpt/
      meta.pt             what is no tensor of the module or of heads, plain, from rank 0
      .metadata           torch's index of the tensors
      __0_0.distcp ...    the tensors, a file of each device's

The tensors are the state_dict under "model" and, under "lte_shards", those of `checkpoint.local_state`: of each device
under its rank, and under "equal" what all of them have alike, which one of them writes. So no device gathers what
others have; they tell each other names and shapes. It is the layout of Lightning's FSDP strategy, so that its
`consolidate_checkpoint` makes a plain file of it, from which runs go on, too. In a plain loop:

    save({"state_dict": model.state_dict()}, explorer.local_state(), explorer.weight_names, path, transport)

    checkpoint = load(path)
    model.load_state_dict(checkpoint["state_dict"])
    explorer.load_state_dict(checkpoint["lte"])
"""

from __future__ import annotations

import io
import os
import warnings
from collections import ChainMap
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_lte import files
from lightning_lte.checkpoint import EQUAL, check_version, holders
from lightning_lte.rows import Part, Rows
from lightning_lte.transport import Transport

SHARDS = "lte_shards"
_EQUAL = "equal"
# What is no tensor, or of no shape that others would have, is written as bytes.
_PLAINLY = ("generators", "own")

State = dict[str, Any]
# Keys from the outside in. Those of lists are numbers as strings.
Path = tuple[str, ...]

_K = TypeVar("_K", bound=Hashable)


def save(
    checkpoint: Mapping[str, Any], own: State | None, equal: Collection[str], path: str, transport: Transport
) -> None:
    """Write a checkpoint, all or nothing: a reader finds what was there before, or all of it. Every device has to call
    it, with a path on a disk that all of them see.

    Args:
        checkpoint: Lightning's, without heads.
        own: this device's `checkpoint.local_state`; None if nothing of heads is kept.
        equal: names in the state_dict of what is equal on all devices, and is written by any one of them; rank 0
            writes all else of it.
        path: of the directory.
        transport: to the other devices.

    Raises:
        IsADirectoryError: there is a directory that is no checkpoint.
        RuntimeError: a device could not write.
    """
    weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    tensors: State = {"model": {n: value for n, value in weights.items() if transport.rank == 0 or n in equal}}
    rest = {**checkpoint, "state_dict": {n: v for n, v in checkpoint["state_dict"].items() if n not in weights}}
    if own is not None:
        plainly = {key: own[key] for key in _PLAINLY}
        own = {key: value for key, value in own.items() if key not in plainly}
        rest["lte"] = _without_tensors(own)
        plain = transport.gather({key: rest["lte"][key] for key in ("optimizers", "late", "tried")})
        if plain is not None:
            of_each = list(zip(*(own["optimizers"] for own in plain), strict=True))
            rest["lte"]["optimizers"] = [{n: v for own in reversed(each) for n, v in own.items()} for each in of_each]
            rest["lte"]["holders"] = [holders(each) for each in of_each]
            rest["lte"]["late"] = dict(ChainMap(*(own["late"] for own in plain)))
            rest["lte"]["tried"] = [own["tried"] for own in plain]
        tensors[SHARDS] = _dealt(own, str(transport.rank))
        for key, value in plainly.items():
            _put(tensors[SHARDS], (str(transport.rank), key), _as_tensor(value))
    partial_path = files.partial_of(path)
    _first(transport, partial(_make_room, path))
    try:
        with warnings.catch_warnings():
            # On one device there is no process group, which torch warns of.
            warnings.filterwarnings("ignore", message="torch.distributed is .*assuming the intent is to save")
            save_shards(tensors, storage_writer=FileSystemWriter(partial_path), process_group=transport.group)
    except CheckpointException as error:
        raise RuntimeError(
            f"The checkpoint {path} could not be written; what was there is there yet. {error}"
        ) from error
    _first(transport, partial(_finish, rest, path))


def load(path: str, heads: bool = True, weights_only: bool | None = None) -> State:
    """Read a checkpoint: what a file would have, with `Rows` in the place of the tensors of heads.

    Devices don't talk to each other here.

    Args:
        path: of the directory.
        heads: whether what is kept of heads is wanted.
        weights_only: of `torch.load`, for what is no tensor.

    Raises:
        ValueError: the directory is no checkpoint, or a file of it is not there or too short.
    """
    if not files.is_directory_of_shards(path):
        raise ValueError(
            f"A directory that is a checkpoint has {files.META} and {files.INDEX} in it; received {path}, which lacks"
            " one of them. Give the path of a checkpoint."
        )
    shards = _Shards(path)
    checkpoint: State = torch.load(os.path.join(path, files.META), map_location="cpu", weights_only=weights_only)
    checkpoint["state_dict"] = {**shards.weights(), **checkpoint.get("state_dict", {})}
    state = checkpoint.pop("lte", None)
    if heads and state is not None:
        checkpoint["lte"] = _assembled(state, shards.parts())
    return checkpoint


def unite(checkpoint: State) -> State:
    """Let a file that Lightning's `consolidate_checkpoint` made have heads as one that was never in parts."""
    shards = checkpoint.pop(SHARDS, None)
    if shards is not None:
        found = ((path, (len(t) if t.dim() else 0, partial(_itself, t))) for path, t in _tensors(shards))
        checkpoint["lte"] = _assembled(checkpoint["lte"], found)
    return checkpoint


class Lazy(Mapping[_K, Any]):
    """A mapping whose values are read when they are asked for."""

    def __init__(self, reads: Mapping[_K, Callable[[], Any]]) -> None:
        self._reads = reads

    def __getitem__(self, key: _K) -> Any:
        return self._reads[key]()

    def __iter__(self) -> Iterator[_K]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


class _Shards:
    """The tensors of a checkpoint.

    Args:
        path: of the directory.
    """

    def __init__(self, path: str) -> None:
        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._check(path)
        # torch's name of each -> its keys.
        self._paths: dict[str, tuple[str | int, ...]] = self._metadata.planner_data

    def weights(self) -> State:
        """The tensors of the state_dict."""
        found = self.read([name for name, path in self._paths.items() if path[0] == "model"])
        return {str(self._paths[name][1]): value for name, value in found.items()}

    def parts(self) -> Iterator[tuple[Path, Part]]:
        """Everything of heads, by its keys below `SHARDS`, to be read later."""
        for name, path in self._paths.items():
            if path[0] == SHARDS:
                size = self._empty(name, device="meta").shape
                yield tuple(map(str, path[1:])), (size[0] if len(size) else 0, partial(self._read_one, name))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some, by torch's names, each on the CPU."""
        state: dict[str, Any] = {name: self._empty(name) for name in names}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
        return state

    def _read_one(self, name: str) -> Tensor:
        return self.read([name])[name]

    def _empty(self, name: str, device: str = "cpu") -> Tensor:
        known = self._metadata.state_dict_metadata[name]
        assert isinstance(known, TensorStorageMetadata)
        return torch.empty(known.size, dtype=known.properties.dtype, device=device)

    def _check(self, path: str) -> None:
        """Raise before anything is read if some of it is missing."""
        ends: dict[str, int] = {}
        for stored in self._metadata.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, end in ends.items():
            file = os.path.join(path, name)
            size = os.path.getsize(file) if os.path.isfile(file) else -1
            if size < end:
                what = "is not there" if size < 0 else f"has {size} of {end} bytes"
                raise ValueError(
                    f"A checkpoint of several devices must have the files of all of them; received {path}, in which"
                    f" {name} {what}. Copy the directory as a whole, to a disk that all devices see; or go on from"
                    " another checkpoint."
                )


def _assembled(state: State, found: Iterable[tuple[Path, Part]]) -> State:
    """What `checkpoint.gather_state` returns, with `Rows` for tensors that have rows of all devices.

    Args:
        state: all of it that is no tensor; it is filled up.
        found: the tensors, by device and keys.

    Raises:
        ValueError: it is of a version that is yet to come.
    """
    check_version(state)
    rows: dict[Path, dict[int, Part]] = {}
    for path, part in found:
        if path[0] == _EQUAL:
            _put(state, path[1:], part[1]())
        else:
            rows.setdefault(path[1:], {})[int(path[0])] = part
    buffers: list[dict[str, Callable[[], Tensor]]] = [{} for _ in range(state["devices"])]
    for keys, parts in rows.items():
        if keys[0] in _PLAINLY:
            state[keys[0]] = Lazy({device: partial(_as_value, read) for device, (_, read) in parts.items()})
        elif keys[0] == "buffers":
            for device, (_, read) in parts.items():
                buffers[device][keys[1]] = read
        else:
            if keys[0] == "optimizers" and keys[2] in state["holders"][int(keys[1])]:
                count, read = next(iter(parts.values()))
                zeros = count, partial(_zeros_like, read)
                parts = {**dict.fromkeys(range(state["devices"]), zeros), **parts}
            _put(state, keys, Rows([parts[device] for device in sorted(parts)]))
    state["buffers"] = [Lazy(own) for own in buffers]
    return state


def _dealt(own: State, device: str) -> State:
    """The tensors of a device's state, those that all devices have alike and those of its own."""
    dealt: State = {}
    for path, tensor in _tensors(own):
        equal = path[0] in EQUAL or (path[0] == "flights" and path[3] != "rows")
        _put(dealt, (_EQUAL if equal else device, *path), tensor)
    return dealt


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(inner, (*path, str(key)))


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_tensors(inner) for key, inner in value.items() if not isinstance(inner, Tensor)}
    return [_without_tensors(inner) for inner in value] if isinstance(value, list) else value


def _put(tree: Any, path: Iterable[Any], value: Any) -> None:
    """Put a value to its place, in dictionaries that are made where there are none."""
    *outer, last = path
    for key in outer:
        tree = tree[int(key)] if isinstance(tree, list) else tree.setdefault(key, {})
    tree[last] = value


def _zeros_like(read: Callable[[], Tensor]) -> Tensor:
    """In the place of the rows of a device that has none."""
    return torch.zeros_like(read())


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _as_tensor(value: Any) -> Tensor:
    """Plain values as bytes: beside rank 0 none is written that is no tensor."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _as_value(read: Callable[[], Tensor]) -> Any:
    """The inverse of `_as_tensor`."""
    return torch.load(io.BytesIO(read().numpy().tobytes()), weights_only=True)


def _make_room(path: str) -> None:
    files.check_place(path)
    files.delete(files.partial_of(path))
    os.makedirs(files.partial_of(path))


def _finish(rest: State, path: str) -> None:
    files.save(rest, os.path.join(files.partial_of(path), files.META))
    files.place(path)


def _first(transport: Transport, act: Callable[[], None]) -> None:
    """Have rank 0 do something that the others wait for; if it fails, all raise."""
    error: Exception | None = None
    if transport.rank == 0:
        try:
            act()
        except Exception as caught:
            error = caught
    told = {} if error is None else {"rank 0": f"{type(error).__name__}: {error}"}
    told = transport.union(told)
    if error is not None:
        raise error
    if told:
        raise RuntimeError(f"Rank 0 could not write a checkpoint: {told['rank 0']}")
