"""What merges of many local heads cost: `python -m benchmarks merge`.

A period is ten steps, a merge with the norms that loggers ask for, and its line in a logger's file. Measured are its
parts, each in every round: a step, what LTE does in it besides the model's own arithmetic, the merge, and the logging.
On a GPU a round has all steps of a period, and their mean counts: the first one finds nothing that the host has told
the device to do since the merge.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger

from benchmarks.command import of_one_model
from benchmarks.step import WARM_UP, Heads
from benchmarks.subject import Subject
from benchmarks.table import Row
from benchmarks.times import timed
from lightning_lte.execution import run
from lightning_lte.metrics import merge_metrics
from lightning_lte.stopwatch import Stopwatch

PERIOD = 10
# The largest share of the time that merging, logging and the callback may take.
SHARE = 0.03


def measure(options: Any, device: torch.device) -> list[Row]:
    """The rows of one configuration."""
    subject = Subject.of(options.model, options.depth)
    batch = subject.batch(options.batch, device, options.seed)
    model = subject.model(device, options.seed)
    lte = Heads(model, subject.loss, device, options.heads, options.rank, options.after_merge, options.seed)
    explorer = lte.explorer
    steps, merges, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder, flush_logs_every_n_steps=1)
        for number in range(WARM_UP + options.rounds):
            spans: dict[str, list[Stopwatch]] = defaultdict(list)
            in_a_row = PERIOD if device.type == "cuda" else 1
            for _ in range(in_a_row):
                with timed(device) as acting:
                    explorer.act()
                with timed(device) as step:
                    loss = run(explorer, lambda own: subject.loss(model, own), batch)
                    with explorer.backward():
                        loss.backward()
                with timed(device) as after:
                    explorer.after_backward()
                with timed(device) as optimizer:
                    lte.optimizer.step()
                    lte.optimizer.zero_grad()
                with timed(device) as looking:
                    explorer.step()
                    explorer.rest()
                spans["arithmetic"] += [step, optimizer]
                spans["always"] += [acting, after, looking]
            with timed(device) as merge:
                record = explorer.merge()
            with timed(device) as logging:
                logger.log_metrics({**merge_metrics(record)}, step=number)
            if number >= WARM_UP:
                now_and_then = (merge.seconds + logging.seconds) / PERIOD
                arithmetic, always = (
                    sum(watch.seconds for watch in spans[key]) / in_a_row for key in ("arithmetic", "always")
                )
                steps.append(arithmetic + always)
                merges.append(merge.seconds)
                shares.append((always + now_and_then) / (steps[-1] + now_and_then))
    what = f"{subject.described}, batch {options.batch}, heads {options.heads}, rank {options.rank}"
    what += f", {options.after_merge}"
    ratios = [merge / step for merge, step in zip(merges, steps, strict=True)]
    return [
        Row(what, "a merge / a step", ratios, f"{statistics.median(merges):.3f} s", goal=1.0),
        Row(what, f"merging, logging and all else of LTE / period of {PERIOD}", shares, "", goal=SHARE),
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and print the table."""
    return of_one_model("merge", __doc__, measure, 5, arguments)
