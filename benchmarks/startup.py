"""What it takes until the first step, and to go on from a checkpoint: `python -m benchmarks startup`."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from benchmarks.command import of_one_model
from benchmarks.execution import NEVER, Counting
from benchmarks.subject import Subject
from benchmarks.table import Row
from benchmarks.times import timed_alone
from lightning_lte import Explorer, LTEConfig
from lightning_lte.execution import run

# Seconds that injecting heads and resuming may take.
INJECTING_S, RESUMING_S = 5.0, 10.0
# Forward passes over the batch that the proof may take.
PASSES = 2.0


def measure(options: Any, device: torch.device) -> list[Row]:
    """The rows of one configuration."""
    subject = Subject.of(options.model, options.depth)
    batch = subject.batch(options.batch, device, options.seed)
    config = LTEConfig(options.heads, NEVER, rank=options.rank, after_merge=options.after_merge, seed=options.seed)
    injecting, resuming, passes, firsts = [], [], [], []

    def explorer_over(model: nn.Module) -> tuple[Explorer, AdamW]:
        optimizer = AdamW(model.parameters(), lr=1e-4)
        return Explorer(model, optimizer, config), optimizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        for number in range(options.rounds):
            model = subject.model(device, options.seed)
            with timed_alone(device) as watch:
                explorer, optimizer = explorer_over(model)
            injecting.append(watch.seconds)
            if number == 0:
                step = Counting(subject.loss, model, batch)
                subject.loss(model, batch)
                with timed_alone(device) as first:
                    loss = run(explorer, step, batch)
                # All but the step's own.
                passes.append(step.samples / options.batch - 1)
                with timed_alone(device) as second:
                    run(explorer, step, batch)
                firsts.append(first.seconds / second.seconds - 1)
                with explorer.backward():
                    loss.backward()
                explorer.after_backward()
                optimizer.step()
                explorer.step()
                torch.save({"state_dict": model.state_dict(), "lte": explorer.state_dict()}, path)
            del explorer, optimizer
            fresh = subject.model(device, options.seed)
            with timed_alone(device) as watch:
                saved = torch.load(path, weights_only=True)
                fresh.load_state_dict(saved["state_dict"])
                explorer, optimizer = explorer_over(fresh)
                explorer.load_state_dict(saved["lte"])
            resuming.append(watch.seconds)
            del saved, explorer, optimizer, fresh
    what = f"{subject.described}, batch {options.batch}, heads {options.heads}, rank {options.rank}"

    def row(figure: str, seconds: list[float], allowed: float) -> Row:
        return Row(what, figure, [s / allowed for s in seconds], f"{statistics.median(seconds):.2f} s", goal=1.0)

    return [
        row(f"injecting heads / {INJECTING_S:g} s", injecting, INJECTING_S),
        row(f"loading a checkpoint and going on / {RESUMING_S:g} s", resuming, RESUMING_S),
        Row(what, "samples through the model in the proof / batch", passes, goal=PASSES),
        Row(what, "the proof / a forward through heads", firsts),
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and print the table."""
    return of_one_model("startup", __doc__, measure, 3, arguments)
