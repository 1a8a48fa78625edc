"""Checkpoints on a local disk, of which a half-written one is never seen under its name."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

# What a checkpoint that is a directory has beside its tensors, and torch's index of these.
META = "meta.pt"
INDEX = ".metadata"

# Of Linux's renameat2.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class AtomicFiles:
    """Writes local checkpoints beside their place and then moves them there; all else is that of Lightning's class.

    Lightning, too, writes a file elsewhere and moves it. But that is in the system's folder for temporary files, and a
    move from there to another file system is a copy: a process that is killed then leaves half a checkpoint in the
    place of the one before. Also, the bytes need not be in memory twice here.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        local = local_path(path)
        if storage_options is not None or local is None:
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
        else:
            save(checkpoint, local)

    def remove_checkpoint(self, path: Any) -> None:
        local = local_path(path)
        if local is not None and is_directory_of_shards(local):
            remove(local)
        else:
            super().remove_checkpoint(path)  # type: ignore[misc]


def local_path(path: Any) -> str | None:
    """Where that is on a local disk; None if it is elsewhere."""
    files, local = url_to_fs(str(path))
    return local if isinstance(files, LocalFileSystem) else None


def is_directory_of_shards(path: str) -> bool:
    """Whether that is a whole checkpoint to which each device has written what it has; see `sharded`."""
    return all(os.path.isfile(os.path.join(path, name)) for name in (META, INDEX))


def save(value: Any, path: str) -> None:
    """What `torch.save` does, all or nothing: a reader finds what was there before, or all of `value`.

    Raises:
        IsADirectoryError: see `check_place`.
    """
    check_place(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = partial_of(path)
    try:
        with open(partial, "wb") as file:
            torch.save(value, file)
            file.flush()
            # Or a machine that fails may remember the new name and not what is in it.
            os.fsync(file.fileno())
        place(path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise


def partial_of(path: str) -> str:
    """Where a checkpoint is while it is written.

    One name for each path, so that what a killed process left is overwritten by the next; and none that a search for
    checkpoints finds.
    """
    return f"{path}.partial"


def check_place(path: str) -> None:
    """Raise if a checkpoint would take the place of something that is none.

    Raises:
        IsADirectoryError: there is a directory that is no checkpoint.
    """
    if os.path.isdir(path) and not os.path.islink(path) and not is_directory_of_shards(path):
        raise IsADirectoryError(
            f"A checkpoint takes the place of another one only; received {path}, which is a directory and not a"
            " checkpoint. Choose another name, or remove it."
        )


def place(path: str) -> None:
    """Give what was written to `partial_of(path)` its name, in one step; what had the name before is removed.

    Raises:
        IsADirectoryError: see `check_place`.
    """
    check_place(path)
    partial = partial_of(path)
    directories = any(os.path.isdir(name) and not os.path.islink(name) for name in (partial, path))
    if not directories or not os.path.lexists(path):
        os.replace(partial, path)  # a file takes a file's place
        return
    if not _exchange(partial, path):
        # Not in one step. Who is killed in between leaves the former checkpoint under a name that
        # ModelCheckpoint still takes for "last" if it was.
        stem, ending = os.path.splitext(path)
        former = f"{stem}.former{ending}"
        delete(former)
        os.replace(path, former)
        os.replace(partial, path)
        delete(former)
    delete(partial)


def remove(path: str) -> None:
    """Remove a checkpoint, so that what is left of it when the process is killed is not taken for one."""
    partial = partial_of(path)
    delete(partial)
    os.replace(path, partial)
    delete(partial)


def delete(path: str) -> None:
    """Remove a file, a link or a directory, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            os.remove(path)


def _exchange(one: str, other: str) -> bool:
    """Swap two names in one step; False where the system or its disk can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0
