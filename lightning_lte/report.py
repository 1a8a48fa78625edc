"""What became of every parameter, in a form to read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Names in a sentence.
_MOST = 8


@dataclass
class Entry:
    """The role of one parameter and the reason for it.

    Attributes:
        name: in the user's module.
        shape: of the user's parameter.
        role: "factored", "replica", "frozen" (by `replicas="freeze"`) or "untouched" (no optimizer holds it).
        reason: why.
        copies: how many are trained on this device: the pairs of factors, or the copies of a replica, which is 1 for
            one that the local heads share; 0 for what is not trained.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str
    copies: int = 0


@dataclass
class Report:
    """Which role each parameter has and why. `str()` has a line for every parameter, `summary()` a line for every kind.

    Attributes:
        entries: one for every parameter, in the module's order.
        notes: sentences about the run as a whole, such as how local heads share the device.
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def entry(self, name: str) -> Entry:
        """The entry of a parameter.

        Raises:
            KeyError: the module has no such parameter.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def __str__(self) -> str:
        rows = [(e.name, _shape(e), e.role, str(e.copies), e.reason) for e in self.entries]
        return "\n".join([_table([("parameter", "shape", "role", "copies", "why"), *rows]), *self.notes])

    def summary(self) -> str:
        """Parameters whose names differ in numbers alone share a line."""
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for e in self.entries:
            groups[re.sub(r"\d+", "*", e.name), _shape(e), e.role, str(e.copies), e.reason].append(e.name)
        rows = [(n if len(g) > 1 else g[0], str(len(g)), *rest) for (n, *rest), g in groups.items()]
        return "\n".join([_table([("parameter", "count", "shape", "role", "copies", "why"), *rows]), *self.notes])


def _shape(entry: Entry) -> str:
    return "x".join(map(str, entry.shape)) or "scalar"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence; of many, the first few and how many more there are."""
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def excluding(names: Iterable[str]) -> str:
    """The argument that takes modules out, as code."""
    patterns = sorted({name if re.fullmatch(r"[\w.]+", name) else re.escape(name) for name in names})
    return f"exclude_modules={patterns!r}"
