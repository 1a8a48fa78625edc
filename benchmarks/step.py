"""The time of a training step through heads that share one device: `python -m benchmarks step`.

All figures are ratios of times within one run, in which full rank, LTE and the released formulation take turns, so that
what else the machine does falls on all of them alike. On a GPU a turn is several steps in a row, and their mean counts.

No merge falls into a step: `python -m benchmarks merge` has it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.profiler import profile
from torch.utils._pytree import tree_map

from benchmarks.bound import Arithmetic, multiply_adds, uses
from benchmarks.command import check, show
from benchmarks.execution import NEVER, step_of
from benchmarks.released import as_released
from benchmarks.subject import Loss, Subject
from benchmarks.table import Row
from benchmarks.times import Seconds, in_a_row, timed
from lightning_lte import Explorer, LTEConfig, Transport

AfterMerge = Literal["keep", "reset"]
# As Lightning calls them. Those that are mixed run without a GradScaler, whose part is no larger for heads.
Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true"]
DTYPES: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
}

# In the first two steps weights are watched, and moments are made.
WARM_UP = 3
# The most that a step may be of what the arithmetic allows, on a CPU and on a GPU.
WITHIN = {"cpu": 1.3, "cuda": 1.15}
# One head on a device, over full rank.
ALONE = 0.95
# Over the released formulation, with 32 heads of rank 64.
OF_RELEASED = 0.8


class Plain:
    """A model that trains as torch does.

    Args:
        model: on its device.
        loss: of a batch.
        device: that it trains on.
        fused: whether its optimizer has a kernel of its own.
    """

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device, fused: bool = False) -> None:
        self.model, self.loss, self.device = model, loss, device
        self.optimizer = make_optimizer(model, fused)

    def step(self, batch: Any) -> Seconds:
        """A training step."""
        with timed(self.device) as forward:
            loss = self.loss(self.model, batch)
        with timed(self.device) as backward:
            loss.backward()
        with timed(self.device) as step:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return Seconds([forward], [backward], [step])


class Heads:
    """A model that trains through local heads.

    Args:
        model: on its device.
        loss: of a batch.
        device: that it trains on.
        heads: over all devices.
        rank: of the factors.
        after_merge: "keep" or "reset".
        seed: of the heads.
        execution: see `LTEConfig.execution`.
        fused: see `Plain`.
        transport: to other devices; None for this one alone. Where it shares out a head, so is the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        device: torch.device,
        heads: int,
        rank: int,
        after_merge: AfterMerge,
        seed: int,
        execution: Literal["auto", "batched"] = "auto",
        fused: bool = False,
        transport: Transport | None = None,
    ) -> None:
        self.model, self.loss, self.device = model, loss, device
        self.optimizer = make_optimizer(model, fused)
        shard = 1 if transport is None or transport.within is None else transport.within.world_size
        config = LTEConfig(
            heads, NEVER, rank=rank, after_merge=after_merge, execution=execution, shard=shard, seed=seed
        )
        self.explorer = Explorer(model, self.optimizer, config, transport)

    def step(self, batch: Any) -> Seconds:
        """A training step."""
        return step_of(self.explorer, self.optimizer, self.loss, batch, self.device)


def measure(
    subject: Subject, batch: Any, heads: int, rank: int, after_merge: AfterMerge, options: Any, device: torch.device
) -> list[Row]:
    """The rows of one configuration.

    Args:
        subject: the model and its loss.
        batch: which `heads` divides.
        heads: n.
        rank: of the factors.
        after_merge: "keep" or "reset".
        options: of the command.
        device: that all train on.
    """

    loss = subject.loss
    if options.precision.endswith("-mixed"):
        loss = torch.autocast(device.type, DTYPES[options.precision])(loss)

    def make() -> nn.Module:
        model = subject.model(device, options.seed)
        return model.to(DTYPES[options.precision]) if options.precision.endswith("-true") else model

    heads_in = partial(
        Heads,
        loss=loss,
        device=device,
        heads=heads,
        rank=rank,
        after_merge=after_merge,
        seed=options.seed,
        fused=options.fused,
    )
    plain = partial(Plain, loss=loss, device=device, fused=options.fused)
    lte, full = heads_in(make()), plain(make())
    found = uses(lte.explorer.injection, full.model, lambda: loss(full.model, batch))
    arithmetic = Arithmetic(found, multiply_adds(lambda: loss(full.model, batch).backward()))
    full.optimizer.zero_grad()
    bound = arithmetic.bound(after_merge == "keep")
    variants: dict[str, Callable[[], Seconds]] = {"full": lambda: full.step(batch), "lte": lambda: lte.step(batch)}
    if after_merge == "keep" and not options.no_released:
        released = plain(as_released(make, lte.explorer, rank, 2.0))
        variants["released"] = lambda: released.step(batch)
    if options.compile:
        # Each configuration has graphs of its own, with nothing left of those before.
        torch._dynamo.reset()
        full_compiled, lte_compiled = (kind(compiled(make(), options.compile)) for kind in (plain, heads_in))
        variants["full compiled"] = lambda: full_compiled.step(batch)
        variants["lte compiled"] = lambda: lte_compiled.step(batch)
    for variant in variants.values():
        for _ in range(WARM_UP):
            variant()
    rounds: list[dict[str, Seconds]] = []
    for number in range(options.rounds):
        # Each finds the machine as the one before has left it, so the order turns.
        order = list(variants)[:: 1 if number % 2 == 0 else -1]
        rounds.append({key: in_a_row(variants[key], device) for key in order})

    what = f"{subject.described}, batch {options.batch}, heads {heads}, rank {rank}, {after_merge}"
    what += ", in turns" if lte.explorer.execution == "sequential" else ""
    what += ", AdamW(fused=True)" if options.fused else ""
    what += "" if options.precision == "32-true" else f", {options.precision}"

    def row(figure: str, above: str, below: str, part: str = "whole", **more: Any) -> Row:
        ratios = [getattr(r[above], part) / r[below].whole for r in rounds]
        seconds = statistics.median(getattr(r[above], part) for r in rounds)
        return Row(what, figure, ratios, f"{seconds:.3f} s", **more)

    # Where the bound is below 1, heads may not be slower than full rank.
    most = ALONE if heads == 1 else 1.0 if bound < 1 else None
    rows = [
        row("LTE's step / full rank's", "lte", "full", bound=bound, goal=most, within=WITHIN[device.type]),
        row("LTE's optimizer / LTE's step", "lte", "lte", "step"),
        row("full rank's optimizer / full rank's step", "full", "full", "step"),
    ]
    if "released" in variants:
        goal = OF_RELEASED if (heads, rank) == (32, 64) else None
        rows.append(row("LTE's step / the released formulation's", "lte", "released", goal=goal))
    if options.compile:
        rows += [
            row("LTE's step / the same compiled, the speed-up", "lte", "lte compiled"),
            row("full rank's step / the same compiled, the speed-up", "full", "full compiled"),
            row("LTE's step / full rank's, both compiled", "lte compiled", "full compiled", bound=bound),
        ]
    if options.profile and rows[0].met is False:
        print(f"{what}:\n\n{profiled(lambda: lte.step(batch))}\n")
    return rows


def make_optimizer(model: nn.Module, fused: bool) -> AdamW:
    """For what a model trains."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05, fused=fused or None)


def _in(dtype: torch.dtype, leaf: Any) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def compiled(model: nn.Module, backend: str) -> nn.Module:
    """The model, which torch.compile makes one graph of at its first call."""
    model.compile(backend=backend, fullgraph=True)
    return model


def profiled(step: Callable[[], object], lines: int = 12) -> str:
    """What takes the time of a step, by torch's profiler."""
    with profile() as profiler:
        step()
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=lines, max_name_column_width=40))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks step", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch32_224", "vit_base_patch16_224"])
    parser.add_argument("--depth", type=int, help="blocks of the models, for a quicker run (default: their own)")
    parser.add_argument("--batch", type=int, default=32, help="samples, a multiple of all heads (default: %(default)s)")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--after-merge", nargs="+", default=["keep", "reset"], choices=["keep", "reset"])
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True) for all")
    parser.add_argument("--precision", choices=get_args(Precision), default="32-true", help="for all")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="time torch.compile, too")
    parser.add_argument("--no-released", action="store_true", help="leave the released formulation out")
    parser.add_argument("--profile", action="store_true", help="print a profile of what misses its goal")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; with 1, processor time is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="other defaults, which show in seconds that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(models=["test_vit"], batch=4, rounds=2, heads=[1, 2], ranks=[4])
        options = parser.parse_args(arguments)
    check(parser, options)

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    rows: list[Row] = []
    for name in options.models:
        subject = Subject.of(name, options.depth)
        batch = subject.batch(options.batch, device, options.seed)
        if options.precision.endswith("-true"):
            batch = tree_map(lambda leaf: _in(DTYPES[options.precision], leaf), batch)
        for heads in options.heads:
            for rank in options.ranks:
                for after_merge in options.after_merge:
                    found = measure(subject, batch, heads, rank, after_merge, options, device)
                    # Long runs get stopped.
                    print(*(" | ".join(row.cells) for row in found), sep="\n", file=sys.stderr, flush=True)
                    rows += found
                    gc.collect()
    show(rows, options, device, start)
    return rows
