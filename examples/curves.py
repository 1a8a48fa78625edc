"""A picture of what a CSV logger wrote."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]  # optimizer steps, values

# What is drawn, if it was logged: metric -> title.
PANELS = {
    "train/loss": "loss of training batches",
    "val/accuracy": "accuracy on validation data",
    "lte/delta_norm": "norm of the merged delta",
    "lte/head_disagreement": "disagreement of the heads",
}


class CurvesPicture(Callback):
    """At the end of `fit`, draws the CSV logger's curves into `curves.png` beside its `metrics.csv`."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and trainer.is_global_zero:
                logger.save()
                folder = Path(logger.log_dir)
                if (folder / "metrics.csv").exists():
                    draw({"": read(folder / "metrics.csv")}, folder / "curves.png")


def read(path: Path) -> dict[str, Curve]:
    """The curve of every metric in a CSV logger's file."""
    curves: dict[str, Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return curves


def draw(runs: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw the curves of one or more runs, a panel for every metric of `PANELS` that any of them logged.

    Args:
        runs: label -> curves by metric.
        path: the picture to write.
    """
    names = [name for name in PANELS if any(name in curves for curves in runs.values())]
    # Agg itself and not pyplot: it needs no screen, and leaves a notebook's choice of backend alone.
    figure = Figure(figsize=(4.5 * max(1, len(names)), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1, title=PANELS[name], xlabel="optimizer steps", ylabel=name)
        for color, (label, curves) in enumerate(runs.items()):
            if name in curves:
                # A mark shows a curve of a single point too.
                marker = "o" if len(curves[name][0]) < 3 else None
                axes.plot(*curves[name], label=label, color=f"C{color}", marker=marker, linewidth=1)
        if any(runs):
            axes.legend()
    figure.savefig(path, dpi=120)
