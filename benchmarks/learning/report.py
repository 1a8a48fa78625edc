"""A table of the study from what is in the cache: as Markdown, and as pictures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.cache import Cache
from benchmarks.learning.settings import flattened
from benchmarks.learning.table import Row, Table
from benchmarks.learning.tasks import TASKS, Task

Result = dict[str, Any]
# What a run is compared in: these are equal for a row and its control.
SAME = ("task", "batch", "epochs")
# Effective ranks of evaluations, by what they are of.
RANKS = {"gradient_rank": "rank of the gradient", "weight_rank": "rank of W", "learned_rank": "rank of W − W₀"}


@dataclass
class Line:
    """A row with the results of its seeds, as far as there are any."""

    row: Row
    results: dict[int, Result]

    @property
    def metrics(self) -> dict[int, float]:
        """By seed, of runs that did not diverge."""
        return {seed: r["metric"] for seed, r in self.results.items() if r["metric"] is not None}

    @property
    def is_control(self) -> bool:
        """Whether it is ordinary training."""
        return self.row.settings["method"]["name"] == "full"

    def mean_curve(self, kept: str, value: str) -> list[dict[str, float]]:
        """Over seeds that did not diverge: points of the "curve" or the "evaluations", with one of their values."""
        points = zip(*(r[kept] for r in self.results.values() if r["metric"] is not None), strict=False)
        keys = ("samples", "bytes", value)
        return [{k: statistics.mean(p[k] for p in together) for k in keys} for together in points]

    def mean(self, key: str) -> float | None:
        """Over seeds."""
        values = [r[key] for r in self.results.values() if r[key] is not None]
        return statistics.mean(values) if values else None


def lines(table: Table, cache: Cache, seeds: int) -> list[Line]:
    """All rows of a table."""
    found = []
    for row in table.rows:
        results = {seed: cache.get(row, seed) for seed in range(seeds)}
        found.append(Line(row, {seed: r for seed, r in results.items() if r is not None}))
    return found


def control_of(line: Line, others: Sequence[Line]) -> Line | None:
    """The best full-rank row of the same task, batch and epochs; all of its seeds must be there."""
    same = [
        other
        for other in others
        if other.is_control and other.metrics and all(other.row.settings[k] == line.row.settings[k] for k in SAME)
    ]
    if not same:
        return None
    sign = 1 if TASKS[line.row.settings["task"]["name"]].higher_is_better else -1
    most = max(len(other.metrics) for other in same)
    return max((o for o in same if len(o.metrics) == most), key=lambda o: sign * statistics.mean(o.metrics.values()))


def markdown(table: Table, found: Sequence[Line], seeds: int) -> str:
    """The table, with what its runs have in common below it."""
    flat = [flattened(line.row.settings) for line in found]
    differing = _differing(flat)
    ranks = _ranks(found)
    metrics = sorted({TASKS[f["task.name"]].metric for f in flat})
    head = ["", *(_short(name, differing) for name in differing), " / ".join(metrics), "± sd", "Δ full rank"]
    head += ["± sd of Δ", "last loss", *(RANKS[key] for key in ranks), "MB sent", "CPU s", "seeds"]
    text = [f"### {table.title}", "", "| " + " | ".join(head) + " |"]
    text.append("| --- |" + " ---: |" * (len(head) - 1))
    for line, own in zip(found, flat, strict=True):
        cells = [line.row.label or own["method.name"], *(_cell(own.get(name, "")) for name in differing)]
        control = control_of(line, found)
        values = list(line.metrics.values())
        # Errors may be of any size.
        kind = ".2f" if TASKS[own["task.name"]].higher_is_better else "#.4g"
        cells += [f"{statistics.mean(values):{kind}}" if values else "", _spread(values, kind)]
        if control is None or not values:
            cells += ["", ""]
        elif control is line:
            cells += ["control", ""]
        else:
            # A seed fixes the model's start and the order of samples, so that differences are taken within seeds.
            both = line.metrics.keys() & control.metrics.keys()
            differences = [line.metrics[seed] - control.metrics[seed] for seed in sorted(both)]
            cells += [f"{statistics.mean(differences):+{kind}}" if both else "", _spread(differences, kind)]
        loss, sent, seconds = line.mean("loss"), line.mean("bytes"), line.mean("cpu_seconds")
        cells += ["" if loss is None else f"{loss:.4g}", *(_course(line, key) for key in ranks)]
        cells += ["" if sent is None else f"{sent / 1e6:.4g}"]
        diverged = sum(r["diverged"] is not None for r in line.results.values())
        cells += ["" if seconds is None else f"{seconds:.0f}", f"{len(line.results)}"]
        cells[-1] += f" ({diverged} diverged)" if diverged else ""
        text.append("| " + " | ".join(cells) + " |")
    text += ["", *_remarks(found, flat, seeds)]
    return "\n".join(text)


def _ranks(found: Sequence[Line]) -> list[str]:
    """Which of the ranks were measured."""
    measured = {key for line in found for r in line.results.values() for e in r["evaluations"] for key in e}
    return [key for key in RANKS if key in measured]


def _course(line: Line, key: str) -> str:
    """What a rank is at the first evaluation, at one in the middle and at the last."""
    points = line.mean_curve("evaluations", key)
    chosen = sorted({0, len(points) // 2, len(points) - 1}) if points else []
    return ", ".join(f"{points[i][key]:.1f}" for i in chosen)


def _remarks(found: Sequence[Line], flat: Sequence[dict[str, Any]], seeds: int) -> list[str]:
    common = {k: v for k, v in flat[0].items() if all(k in f and f[k] == v for f in flat)} if flat else {}
    # Ranks are measured, and change nothing of a run.
    common.pop("ranks", None)
    remarks = ["All rows: " + ", ".join(f"{k} {_cell(v)}" for k, v in common.items()) + "."]
    missing = sum(seeds - len(line.results) for line in found)
    if missing:
        remarks.append(f"**{missing} of {seeds * len(found)} runs are missing.**")
    results = [r for line in found for r in line.results.values()]
    notes = Counter(note for r in results for note in r["notes"])
    if notes:
        remarks.append("Runs: " + "; ".join(f"{note} ({count})" for note, count in sorted(notes.items())) + ".")
    if results:
        machines = Counter(r["hardware"] for r in results)
        versions: dict[str, list[str]] = {}
        for r in results:
            of = ", ".join(f"{k} {v}" for k, v in r["versions"].items() if k != "commit")
            commit = r["versions"].get("commit", "unknown")
            if commit not in versions.setdefault(of, []):
                versions[of].append(commit)
        told = (f"{of}, commits {', '.join(commits)}" for of, commits in versions.items())
        remarks.append(f"Seeds 0 to {seeds - 1}. {'; '.join(machines)}. {'; '.join(told)}.")
    remarks.append(
        "Mean over seeds; sd is the sample standard deviation. Δ: to the best full-rank row of the table of the same"
        " task, batch and epochs, within seeds. Last loss: training loss, mean over the last tenth. MB sent: by each"
        " device, if each has one head or replica, computed; one head is on one device, which sees the whole batch."
    )
    return remarks


def plot(table: Table, found: Sequence[Line], folder: Path, name: str, most: int = 14) -> list[Path]:
    """Pictures, one file for each task: loss and metric, over samples and over bytes; or the metric over a setting.

    Args:
        most: rows in a picture of curves, and 10 if there are no more labels; the best of each label come first.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task_name in sorted({line.row.settings["task"]["name"] for line in found}):
        own = [line for line in found if line.row.settings["task"]["name"] == task_name and line.metrics]
        if not own:
            continue
        figure = (
            _curves(own, TASKS[task_name], most) if table.over is None else _over(own, TASKS[task_name], table.over)
        )
        figure.suptitle(f"{table.title} ({task_name})")
        paths.append(folder / f"{name}-{task_name}.png")
        figure.savefig(paths[-1], dpi=110)
        pyplot.close(figure)
    return paths


def _curves(found: Sequence[Line], task: Task, most: int) -> Any:
    """Loss and metric, over samples and over bytes."""
    from matplotlib import pyplot, ticker

    own = sorted(found, key=lambda o: statistics.mean(o.metrics.values()), reverse=task.higher_is_better)
    first = {id(o) for o in {o.row.label: o for o in reversed(own)}.values()}
    # Of controls, those that others are compared with.
    own = [o for o in own if not o.is_control or control_of(o, found) is o or id(o) in first]
    own = sorted(own, key=lambda o: id(o) not in first)[: min(most, max(len(first), 10))]
    shown = [("curve", "loss", "training loss"), ("evaluations", "metric", f"test {task.metric}")]
    shown += [("evaluations", key, RANKS[key]) for key in _ranks(own)]
    size = (12, 4 * len(shown))
    figure, axes = pyplot.subplots(len(shown), 2, figsize=size, sharey="row", constrained_layout=True)
    named = Counter(line.row.label for line in own)
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for line, label, colour in zip(own, _labels(own, "method.name"), colours, strict=False):
        # A name that stands for one line says enough.
        drawn = {"label": line.row.label if named[line.row.label] == 1 else label, "color": colour}
        for row, (key, value, _) in enumerate(shown):
            points = line.mean_curve(key, value)
            for column, over in enumerate(("samples", "bytes")):
                x = [p[over] / (1 if over == "samples" else 1e6) for p in points]
                axes[row, column].plot(x, [p[value] for p in points], marker="." if row else None, **drawn)
    # What comes before the first merges would leave no room for the rest.
    finals = [statistics.mean(line.metrics.values()) for line in own]
    span = max(finals) - min(finals) or 1.0
    low, high = (1.0, 0.1) if task.higher_is_better else (0.1, 1.0)
    axes[1, 0].set_ylim(min(finals) - low * span, max(finals) + high * span)
    for column, over in enumerate(("samples", "MB sent by each device")):
        axes[-1, column].set_xlabel(over)
    for row, (_, _, name) in enumerate(shown):
        axes[row, 0].set_ylabel(name)
        axes[row, 1].set_xscale("log")
        axes[row, 1].xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[row, 1].xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes[row, 1].xaxis.set_minor_formatter(ticker.NullFormatter())
        for column in range(2):
            axes[row, column].grid(alpha=0.3)
    # Below, as labels may be longer than a picture is wide.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize="x-small")
    return figure


def _over(found: Sequence[Line], task: Task, setting: str) -> Any:
    """The metric over a setting, a line for each combination of the others; its best point is marked."""
    from matplotlib import pyplot

    groups: dict[str, list[tuple[float, float]]] = {}
    for line, label in zip(found, _labels(found, "method.name", setting), strict=True):
        x = flattened(line.row.settings)[setting]
        groups.setdefault(label, []).append((x, statistics.mean(line.metrics.values())))
    figure, axes = pyplot.subplots(figsize=(7, 5), constrained_layout=True)
    for label, points in groups.items():
        best = (max if task.higher_is_better else min)(points, key=lambda point: point[1])
        (drawn,) = axes.plot(*zip(*sorted(points), strict=True), marker=".", label=label)
        axes.plot(*best, marker="*", markersize=14, color=drawn.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xlabel(setting)
    axes.set_ylabel(f"test {task.metric}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _labels(found: Sequence[Line], *without: str) -> list[str]:
    """What tells lines apart in a picture, less some settings."""
    flats = [flattened(line.row.settings) for line in found]
    differing = [n for n in _differing(flats) if n not in without]
    return [
        f"{line.row.label or flat['method.name']}: "
        + ", ".join(f"{n.split('.')[-1]} {_cell(flat[n])}" for n in differing if n in flat)
        for line, flat in zip(found, flats, strict=True)
    ]


def _differing(flat: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which rows differ. One that only some methods have counts if it differs among these."""
    names = list(dict.fromkeys(name for own in flat for name in own))
    return [n for n in names if len({json.dumps(own[n], sort_keys=True) for own in flat if n in own}) > 1]


def _short(name: str, names: Sequence[str]) -> str:
    """A setting's name without the method's prefix, unless another one is called so."""
    short = name.removeprefix("method.")
    return name if short in names else short


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_cell(v)}" for k, v in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _spread(values: Sequence[float], kind: str) -> str:
    return f"{statistics.stdev(values):{kind}}" if len(values) > 1 else ""
