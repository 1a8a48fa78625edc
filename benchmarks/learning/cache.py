"""Results of runs, one JSON file for each configuration and seed, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.learning.settings import changed
from benchmarks.learning.table import Row


class Cache:
    """Keeps results in a folder.

    Args:
        root: the folder; it is made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, row: Row, seed: int) -> Path:
        """Where a result is kept."""
        return self.root / f"{row.digest}-{seed}.json"

    def get(self, row: Row, seed: int) -> dict[str, Any] | None:
        """A result, or None.

        Raises:
            ValueError: it was made when a default was another.
        """
        path = self.path(row, seed)
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        differing = changed(row.settings, result["settings"])
        if differing:
            raise ValueError(
                f"A default was changed since {path} was made: {differing}. Give the setting another name, or delete"
                " results that are no longer wanted."
            )
        return result

    def put(self, row: Row, seed: int, result: Mapping[str, Any]) -> None:
        """Keep a result: it is there as a whole, or not at all."""
        path = self.path(row, seed)
        partial = path.with_suffix(f".partial{os.getpid()}")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(path)

    @contextmanager
    def lock(self, row: Row, seed: int) -> Iterator[bool]:
        """Whether the run is this process's alone. The system gives the lock back when a process ends, however."""
        path = self.path(row, seed).with_suffix(".lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                yield False  # who had it before has just taken the file away
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
