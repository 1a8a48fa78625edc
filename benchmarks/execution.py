"""What heads cost that share one device: `python -m benchmarks.execution`.

All figures are ratios of times within one run. In every round each variant runs once, on a GPU several times in a row,
in turning order, so that what else the machine does falls on all of them alike. With one thread of a CPU, time is what
the process has of the processor, and waiting for other processes is not in it; else it is time on the wall.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.command import NAMED, check
from benchmarks.subject import Loss, Subject
from benchmarks.times import Seconds, counts_processor_time, in_a_row, timed, timed_alone
from examples.demo import hardware
from lightning_lte import Explorer, LTEConfig
from lightning_lte.batch import Layout
from lightning_lte.execution import decide, run

RANK = 16
# No merge falls into a step that is timed; merges are timed by themselves.
NEVER = 10**9
# In the first two steps weights are watched, and moments are made, which costs more than all that follow.
WARM_UP = 3
# The most that a ratio may be.
LIMITS = {"sequential: forward + backward": 1.3, "proof: samples through the model": 2.0}


@dataclass
class Row:
    """One ratio in all rounds.

    Attributes:
        model: its name.
        heads: n, local heads.
        what: what is divided by what.
        ratios: one for each round.
    """

    model: str
    heads: int
    what: str
    ratios: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the rounds lie."""
        if len(self.ratios) == 1:
            return self.ratios[0], self.ratios[0]
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    @property
    def limit(self) -> float | None:
        """The most that the median may be, where there is a requirement."""
        return next((limit for start, limit in LIMITS.items() if self.what.startswith(start)), None)


class FullRank:
    """A model that trains without heads.

    Args:
        subject: the model and its loss.
        device: that it trains on.
        seed: of its weights.
    """

    def __init__(self, subject: Subject, device: torch.device, seed: int) -> None:
        self.device, self.loss = device, subject.loss
        self.model, self.optimizer = make(subject, device, seed)

    def forward(self, batch: Any) -> Seconds:
        """A forward pass as training has it, recorded for a backward that does not come."""
        with timed(self.device) as forward:
            self.loss(self.model, batch)
        return Seconds([forward])

    def step(self, batch: Any) -> Seconds:
        """A training step on a batch."""
        return self.steps_on([batch])

    def steps_on(self, parts: Sequence[Any]) -> Seconds:
        """A forward and a backward on each part, one after the other, and one step of the optimizer."""
        total = Seconds()
        for number, part in enumerate(parts):
            with timed(self.device) as forward:
                loss = self.loss(self.model, part)
            with timed(self.device) as backward:
                loss.backward()
            total.spans_forward.append(forward)
            total.spans_backward.append(backward)
            if number < len(parts) - 1:
                # As a pass by itself has it: nothing to add to.
                self.optimizer.zero_grad()
        with timed(self.device) as step:
            self.optimizer.step()
            self.optimizer.zero_grad()
        total.spans_step.append(step)
        return total


def step_of(explorer: Explorer, optimizer: Optimizer, loss_of: Loss, batch: Any, device: torch.device) -> Seconds:
    """A training step of a model that trains through local heads, as examples/plain_loop.py has it."""
    with timed(device) as forward:
        loss = run(explorer, lambda own: loss_of(explorer.module, own), batch)
    with timed(device) as backward:
        with explorer.backward():
            loss.backward()
        explorer.after_backward()
    with timed(device) as step:
        optimizer.step()
        optimizer.zero_grad()
        explorer.step()
    return Seconds([forward], [backward], [step])


class WithHeads:
    """A model that trains through local heads.

    Args:
        subject: the model and its loss.
        heads: n.
        execution: how they share the device; "auto" for a proof.
        device: that it trains on.
        seed: of its weights and its heads.

    Attributes:
        passed: samples that went through the model in the last proof.
    """

    def __init__(
        self,
        subject: Subject,
        heads: int,
        execution: Literal["batched", "sequential", "auto"],
        device: torch.device,
        seed: int,
    ) -> None:
        self.device, self.heads, self.loss = device, heads, subject.loss
        self.model, self.optimizer = make(subject, device, seed)
        config = LTEConfig(heads, NEVER, rank=RANK, execution=execution, seed=seed)
        self.explorer = Explorer(self.model, self.optimizer, config)
        self.passed = 0

    def step(self, batch: Any) -> Seconds:
        """A training step on a batch."""
        return step_of(self.explorer, self.optimizer, self.loss, batch, self.device)

    def merge(self) -> float:
        """Seconds of a merge of what was learned, without the norms that only loggers ask for."""
        with timed_alone(self.device) as merge:
            self.explorer.merge(measure=False)
        return merge.seconds

    def proof(self, batch: Any) -> Seconds:
        """The proof on a batch, as if it were the first one."""
        step = Counting(self.loss, self.model, batch)
        parts = Layout(batch).split(batch, self.heads)
        with timed_alone(self.device) as seconds:
            decide(self.explorer, step, batch, parts)
        self.passed = step.samples
        return Seconds([seconds])


class Counting:
    """A step that counts the samples that go through the model.

    Args:
        loss: of a batch.
        model: on its device.
        batch: such as it will be given, or slices of it.

    Attributes:
        samples: so far.
    """

    def __init__(self, loss: Loss, model: nn.Module, batch: Any) -> None:
        self._loss, self._model, self._layout = loss, model, Layout(batch)
        self.samples = 0

    def __call__(self, batch: Any) -> Tensor:
        self.samples += self._layout.size(batch)
        return self._loss(self._model, batch)


def measure(
    subject: Subject, heads: int, batch: Any, rounds: int, device: torch.device, seed: int
) -> tuple[list[Row], float, str]:
    """All ratios of one model with n local heads.

    Args:
        subject: the model and its loss.
        heads: n.
        batch: which n divides.
        rounds: in each of which every variant runs once.
        device: that all train on.
        seed: of the weights and of the heads.

    Returns:
        The ratios, the median seconds of a full-rank step, and the execution that the proof allows.
    """
    full = FullRank(subject, device, seed)
    in_turn = WithHeads(subject, heads, "sequential", device, seed)
    fresh = WithHeads(subject, heads, "auto", device, seed)
    fresh.proof(batch)
    layout = Layout(batch)
    parts = layout.split(batch, heads)
    assert parts is not None

    variants: dict[str, Callable[[], Seconds]] = {
        "full": lambda: in_a_row(lambda: full.step(batch), device),
        "parts": lambda: in_a_row(lambda: full.steps_on(parts), device),
        "sequential": lambda: in_a_row(lambda: in_turn.step(batch), device),
        "forward": lambda: in_a_row(lambda: full.forward(batch), device),
        "proof": lambda: fresh.proof(batch),
    }
    for _ in range(WARM_UP):
        in_turn.step(batch)
    if fresh.explorer.execution == "batched":
        together = WithHeads(subject, heads, "batched", device, seed)
        variants["batched"] = lambda: in_a_row(lambda: together.step(batch), device)
        for _ in range(WARM_UP):
            together.step(batch)
    for variant in variants.values():
        variant()
    in_turn.merge()

    rows: dict[str, Row] = {}

    def note(what: str, above: float, below: float) -> None:
        rows.setdefault(what, Row(subject.name, heads, what)).ratios.append(above / below)

    full_steps = []
    for number in range(rounds):
        # Each finds the machine as the one before has left it, so the order turns.
        order = list(variants)[:: 1 if number % 2 == 0 else -1]
        done = {key: variants[key]() for key in order}
        whole, plain, turns = done["full"], done["parts"], done["sequential"]
        full_steps.append(whole.whole)
        each = f"{heads} plain passes on 1/{heads} of the batch"
        note(f"sequential: forward / {each}", turns.forward, plain.forward)
        note(f"sequential: backward / {each}", turns.backward, plain.backward)
        note(f"sequential: forward + backward / {each}", turns.both, plain.both)
        note("sequential: optimizer step / full rank's", turns.step, plain.step)
        if "batched" in done:
            note("batched: forward / full rank's", done["batched"].forward, whole.forward)
            note("batched: backward / full rank's", done["batched"].backward, whole.backward)
            note("batched: optimizer step / full rank's", done["batched"].step, whole.step)
            note("batched: whole step / full rank's", done["batched"].whole, whole.whole)
        note("a merge / full rank's whole step", in_turn.merge(), whole.whole)
        note("proof: samples through the model / batch", fresh.passed, layout.size(batch))
        note("proof: time / full rank's forward", done["proof"].forward, done["forward"].forward)
    return list(rows.values()), statistics.median(full_steps), fresh.explorer.execution


def make(subject: Subject, device: torch.device, seed: int) -> tuple[nn.Module, Optimizer]:
    """A model with the same weights for the same seed, and its optimizer."""
    model = subject.model(device, seed)
    return model, AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)


def table(rows: Sequence[Row]) -> str:
    """The ratios as Markdown."""
    lines = ["| model | heads | ratio | median | quartiles | at most |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    for row in rows:
        first, third = row.quartiles
        limit = "" if row.limit is None else f"{row.limit:g}"
        lines.append(
            f"| {row.model} | {row.heads} | {row.what} | {row.median:.2f} | {first:.2f} to {third:.2f} | {limit} |"
        )
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> list[Row]:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.execution", description=__doc__)
    parser.add_argument("--batch", type=int, default=16, help="samples, a multiple of all heads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", default=["vit_small_patch32_224", "resnet18"], help=NAMED)
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8], help="default: 4 8")
    # Several threads wait for each other in every operation, and so for whatever else the machine does.
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(args)
    check(parser, options)

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    rows: list[Row] = []
    remarks = []
    for name in options.models:
        subject = Subject.of(name)
        batch = subject.batch(options.batch, device, options.seed)
        for heads in options.heads:
            found, full_s, verdict = measure(subject, heads, batch, options.rounds, device, options.seed)
            rows += found
            remarks.append(f"{name}, {heads} heads: the proof says {verdict}; a full-rank step takes {full_s:.2f} s.")
            gc.collect()
    print(table(rows))
    print()
    print("\n".join(remarks))
    print(
        f"Batch {options.batch}, rank {RANK}, AdamW, {options.rounds} rounds, seed {options.seed},"
        f" {'processor' if counts_processor_time(device) else 'wall'} time; torch {torch.__version__}, timm"
        f" {timm.__version__}; {hardware()}; {time.perf_counter() - start:.0f} s in all, {time.process_time():.0f} s of"
        " the processor."
    )
    return rows


if __name__ == "__main__":
    main()
