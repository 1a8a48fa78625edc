"""A number of heads that grows along the run: each head becomes several, of which the first is what it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lte.optimizers import laid_out, magnitude_names

if TYPE_CHECKING:
    from lightning_lte.explorer import Explorer


def check_growth(heads: int, grow_heads: Any) -> dict[int, int]:
    """What the user gave as `grow_heads`, in the order of steps.

    Args:
        heads: N at the start.
        grow_heads: optimizer step -> N from that step on.

    Raises:
        TypeError, ValueError: with rule, value and remedy.
    """
    example = f"grow_heads={{1000: {2 * heads}}}"
    rule = "grow_heads must map optimizer steps, 1 or later, to numbers of heads"
    grow_heads = {} if grow_heads is None else grow_heads
    if not isinstance(grow_heads, Mapping):
        raise TypeError(f"{rule}; received {grow_heads!r}. Give a dict such as {example}.")
    for number in (number for pair in grow_heads.items() for number in pair):
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(f"{rule}; received {number!r} in {grow_heads!r}. Give {example}, for instance.")
    plan = {int(step): int(number) for step, number in sorted(grow_heads.items())}
    before = heads
    for step, number in plan.items():
        if step < 1:
            raise ValueError(f"{rule}; received {plan}. Give heads={number} for the start.")
        if number <= before or number % before:
            raise ValueError(
                f"Each number in grow_heads must be a multiple of the one before, as each head becomes equally many;"
                f" received {number} heads from step {step} on, after {before}. Give {2 * before}, for instance."
            )
        before = number
    return plan


@torch.no_grad()
def spread(rows: Tensor, factor: int) -> Tensor:
    """(n, ...) as (n * factor, ...): each row in the first place of its `factor` places, and zeros in the others."""
    wider = rows.new_zeros(len(rows) * factor, *rows.shape[1:])
    wider[::factor] = rows.detach()
    return wider


def grow(explorer: Explorer, heads: int) -> None:
    """Train through more heads from now on, between two merges. No device says a word to another.

    Head h of N becomes the heads h g to h g + g - 1 of g N. So every device keeps what it has, and the same heads come
    about wherever they sit. Of these the first is head h as it was. The others start from W: with B = 0, an A of their
    own, and the replicas and running statistics of head h.

    Args:
        explorer: whose heads; nothing is unmerged.
        heads: g N.

    Raises:
        ValueError: it is no multiple of N.
    """
    check_growth(explorer.config.heads, {1: heads})
    config = explorer.config
    factor, alone = heads // config.heads, explorer.count == 1
    explorer.collect_gradients()
    explorer.rest()
    kept = [magnitude_names(optimizer) for optimizer in explorer.optimizers]
    factors = {p for f in explorer.injection.factors.values() for p in f.trained.values()}
    in_place = [(r, r.param.grad) for r in explorer.injection.replicas if r.stack is None and r.param.grad is not None]
    exchanged = explorer.injection.grow(factor, heads)
    explorer.statistics.grow(factor)
    for old, new in exchanged.items():
        fresh = old in factors
        if old.grad is not None:
            new.grad = spread(old.grad, factor) if fresh else old.grad.repeat_interleave(factor, dim=0)
        explorer.substitution.move(
            old,
            new,
            lambda number, state, old=old, fresh=fresh: _grown(state, old, factor, kept[number] if fresh else None),  # type: ignore[misc]
        )
    explorer.config = replace(config, heads=heads, grow_heads={s: n for s, n in config.grow_heads.items() if n > heads})
    explorer.count = explorer.gradient_scale = explorer.count * factor
    explorer.show_exchanged()
    if alone:
        explorer.execution = config.execution
        if config.execution == "sequential":
            explorer.split_replicas()
        for replica, gradient in in_place:
            if replica.stack is not None:
                replica.stack.grad = laid_out(gradient.expand_as(replica.stack), replica.stack)
    elif config.execution == "auto" and explorer.execution == "batched":
        # What is proved for some slices of a batch is proved for these.
        explorer.execution, explorer.tried = "auto", {}


def _grown(state: Mapping[str, Any], old: nn.Parameter, factor: int, kept: Collection[str] | None) -> dict[str, Any]:
    """What an optimizer knows of a parameter with a row for each head, for `factor` times as many heads.

    A stack has one count of steps, and a head that starts in its midst is as old to the optimizer as all others: Adam
    takes moments of zero for means over as many steps, and with a second moment of zero it would make steps of 3 to 6
    times the learning rate. So such a head has the second moments of the head that it came from, which saw the same
    layer and the same kind of data, and a first moment of zero. Of an optimizer that can't be tried it has both.

    Args:
        state: for the parameter as it was.
        old: the parameter as it was.
        factor: g.
        kept: names of what fresh heads take over from the head they came from; None for all.
    """
    return {
        key: value
        if not isinstance(value, Tensor) or value.shape != old.shape or not value.dim()
        else value.repeat_interleave(factor, dim=0)
        if kept is None or key in kept
        else spread(value, factor)
        for key, value in state.items()
    }
