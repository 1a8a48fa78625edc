"""Tables of runs, kept as YAML in `tables/`.

    title: Heads and rank
    base: {task: vit, method: lte, lr: 0.003}      # for all rows; dotted names for what is inside: method.rank
    grids:
      - name: full rank                            # a label
        set: {method: full}
        axes: {lr: [0.001, 0.003]}                 # a row for each combination
      - name: LTE
        axes: {method.heads: [8, 32], "method.rank,method.scale": [[8, 2.0], [16, 1.0]]}
      - name: by hand
        rows: [{method.heads: 4}, {method.heads: 4, lr: 0.001}]

`over: lr` beside the title has pictures show the metric over the learning rate, and not curves of training.

`task: vit` is short for `task.name: vit` without other options, and so is `method: lte`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.settings import Settings, digest, resolved, with_changes

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Row:
    """A configuration, which runs once for each seed.

    Attributes:
        label: the name of its grid.
        settings: in full.
        digest: their name.
    """

    label: str
    settings: Settings
    digest: str


@dataclass(frozen=True)
class Table:
    """A list of rows, no two of them alike.

    Attributes:
        title: for people.
        rows: in order.
        over: the setting that pictures show the metric over; None for curves of training.
    """

    title: str
    rows: list[Row]
    over: str | None = None


def names() -> list[str]:
    """Of all tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Table:
    """A table by its name in `tables/`, or by the path of its file.

    Raises:
        FileNotFoundError: there is none, with those that are.
        ValueError: see `resolved`.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        raise FileNotFoundError(f"A table must be a file, or one of {names()}; received {name!r}.")
    return parsed(yaml.safe_load(path.read_text()), path.stem)


def parsed(content: Mapping[str, Any], name: str = "") -> Table:
    """A table from what its file holds."""
    base = with_changes({}, content.get("base", {}))
    rows: dict[str, Row] = {}
    for grid in content["grids"]:
        unknown = sorted(grid.keys() - {"name", "set", "axes", "rows"})
        if unknown:
            raise ValueError(f"A grid has name, set, axes and rows; received {unknown}.")
        start = with_changes(base, grid.get("set", {}))
        for changes in _combinations(grid.get("axes", {})):
            for row in grid.get("rows", [{}]):
                settings = with_changes(with_changes(start, changes), row)
                row_digest = digest(settings)
                rows.setdefault(row_digest, Row(grid.get("name", ""), resolved(settings), row_digest))
    return Table(content.get("title", name), list(rows.values()), content.get("over"))


def _combinations(axes: Mapping[str, list[Any]]) -> list[Settings]:
    """One dictionary of dotted names for each combination; names joined by commas change together."""
    choices = []
    for key, values in axes.items():
        together = [part.strip() for part in key.split(",")]
        choices.append([dict(zip(together, v if len(together) > 1 else [v], strict=True)) for v in values])
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*choices)]
