"""Checkpoints on a local disk, of which a half-written one is never seen under its name."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class AtomicFiles:
    """Writes local checkpoints beside their place and then moves them there; all else is that of Lightning's class.

    Lightning, too, writes a file elsewhere and moves it. But that is in the system's folder for temporary files, and a
    move from there to another file system is a copy: a process that is killed then leaves half a checkpoint in the
    place of the one before. Also, the bytes need not be in memory twice here.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        files, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(files, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
        else:
            save(checkpoint, local)


def save(value: Any, path: str) -> None:
    """What `torch.save` does, all or nothing: a reader finds what was there before, or all of `value`."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # One name for each path, so that what a killed process left is overwritten by the next.
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(value, file)
            file.flush()
            # Or a machine that fails may remember the new name and not what is in it.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise
