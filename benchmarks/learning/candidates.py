"""What might become an option of the package, tried in the study first: `extra: {name: value}` in a table.

A candidate changes how heads learn through the hooks below. Those that win move into the package, and leave here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.learning.tasks import Batch
from lightning_lte import Explorer, Piecewise
from lightning_lte.heads import Factors, Pair
from lightning_lte.merge import MergeRecord
from lightning_lte.product import as_one


class Candidate:
    """One idea, with its value from the table. All hooks do nothing by default.

    Args:
        value: from the table.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def configure(self, choices: dict[str, Any], model: nn.Module) -> None:
        """Change the arguments of `LTEConfig`, before there are heads."""

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        """Change the heads, or the optimizer's groups, before the first step."""

    def arrange(self, batch: Batch, heads: int) -> Batch:
        """The batch that heads get slices of."""
        return batch

    def before_step(self, explorer: Explorer, optimizer: torch.optim.Optimizer, step: int) -> None:
        """After backward and clipping, before the optimizer's step; `step` counts from 0."""

    def after_step(self, explorer: Explorer, optimizer: torch.optim.Optimizer, record: MergeRecord | None) -> None:
        """After a step, and the merge that was due, if one was."""


class OrthogonalHeads(Candidate):
    """Heads share the input space: while there is room, the rows of all heads' A are orthogonal to each other."""

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        if not self.value:
            return
        for f in explorer.injection.factors.values():
            rank, width = f.A.shape[-2:]
            heads = max(1, min(f.count, width // rank))
            for first in range(0, f.count, heads):
                own = slice(first, min(first + heads, f.count))
                rows = f.A.detach()[own].movedim(0, -3).flatten(-3, -2)  # (*lead, heads * rank, in)
                rows = torch.linalg.qr(rows.double().mT).Q.mT * math.sqrt(width / rank)
                drawn = rows.unflatten(-2, (-1, rank)).movedim(-3, 0).to(f.A)
                with torch.no_grad():
                    f.A[own] = drawn
            f.settle()


class SameStart(Candidate):
    """All heads start with the same A (the paper's Figure 8)."""

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        if not self.value:
            return
        with torch.no_grad():
            for f in explorer.injection.factors.values():
                f.A.copy_(f.A[:1].expand_as(f.A).clone())
                f.settle()


class SameData(Candidate):
    """All heads see the first one's slice of every batch (the paper's Figure 8), and the rest is left out."""

    def arrange(self, batch: Batch, heads: int) -> Batch:
        if not self.value:
            return batch
        return tuple(t[: len(t) // heads].repeat(heads, *[1] * (t.dim() - 1)) for t in batch)


class Periods(Candidate):
    """Periods that change along the run: optimizer step -> period from then on."""

    def configure(self, choices: dict[str, Any], model: nn.Module) -> None:
        choices["merge_every"] = Piecewise({int(step): period for step, period in self.value.items()})


class GrowingHeads(Candidate):
    """Few heads at first: optimizer step -> how many there are from then on. Those of the end come from `heads`."""

    def configure(self, choices: dict[str, Any], model: nn.Module) -> None:
        steps = {int(step): heads for step, heads in self.value.items()}
        choices["heads"] = steps.pop(0)
        choices["grow_heads"] = steps


class SignAgreement(Candidate):
    """Of each number of a weight, the mean over the heads whose deltas have the sign of the sum (as TIES merges)."""

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        if not self.value:
            return
        for f in explorer.injection.factors.values():

            def agreed(pairs: Sequence[Pair], f: Factors = f) -> torch.Tensor:
                A, B = as_one(pairs)
                deltas = torch.stack([f.matrices.as_weight(b @ a, f.weight.shape) for a, b in zip(A, B, strict=True)])
                agree = deltas.sign() == deltas.sum(0).sign()
                mean = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
                return f.scale * len(A) * mean  # a merge divides by the heads

            f.sum_of_products = agreed  # type: ignore[method-assign]


class WeightedHeads(Candidate):
    """Heads weigh by how sure their gradient is of them, from the second moments v of Adam, in place of 1/N each.

    "noise": one number for each head and weight, 1 / mean v of B: a head whose gradient is noisier counts less.
    "fisher": one for each number of the weight, the outer product of the means of v over B's and A's rank, as
    Fisher-weighted averaging has it (arXiv 2111.09832): what a head's loss depends on more is taken from it more.
    """

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        if self.value not in ("noise", "fisher"):
            raise ValueError(f"weighted_heads must be 'noise' or 'fisher'; received {self.value!r}.")
        for f in explorer.injection.factors.values():

            def weighted(pairs: Sequence[Pair], f: Factors = f) -> torch.Tensor:
                A, B = as_one(pairs)
                rows = optimizer.state[f.B]["exp_avg_sq"].mean(-1, keepdim=True)  # (heads, *lead, out, 1)
                if self.value == "noise":
                    weights = 1 / rows.mean(-2, keepdim=True).clamp_min(1e-30)
                else:
                    columns = optimizer.state[f.A]["exp_avg_sq"].mean(-2, keepdim=True)  # (heads, *lead, 1, in)
                    weights = rows * columns + 1e-30
                share = weights / weights.sum(0)
                # A merge divides by the heads.
                sum_of_deltas = f.scale * len(A) * (share * (B @ A)).sum(0)
                return f.matrices.as_weight(sum_of_deltas, f.weight.shape)

            f.sum_of_products = weighted  # type: ignore[method-assign]


class LearningRates(Candidate):
    """Learning rates of their own: {A: times, B: times, replicas: times} that of the schedule."""

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        factors = list(explorer.injection.factors.values())
        kinds = {id(f.A): "A" for f in factors} | {id(f.B): "B" for f in factors}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        chosen = [(p, self.value.get(kinds.get(id(p), "replicas"), 1.0)) for p in params]
        before: dict[torch.Tensor, torch.Tensor] = {}

        # A step of AdamW is proportional to its learning rate, so that it can be stretched afterwards.
        def remember(*_: Any) -> None:
            before.update({p: p.detach().clone() for p, times in chosen if times != 1})

        @torch.no_grad()
        def stretch(*_: Any) -> None:
            for p, times in chosen:
                if times != 1:
                    p.copy_(torch.lerp(before[p], p, times))

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(stretch)


class SizeOfA(Candidate):
    """A so many times as large, and s as many times smaller: B learns as before, and A more slowly."""

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        for f in explorer.injection.factors.values():
            f.scale /= self.value
            with torch.no_grad():
                f.A.mul_(self.value)
            f.settle()


class FreshAdam(Candidate):
    """Adam starts anew at every merge, with its count of steps, so that no step is larger than its learning rate."""

    def after_step(self, explorer: Explorer, optimizer: torch.optim.Optimizer, record: MergeRecord | None) -> None:
        if record is None or not self.value:
            return
        for f in explorer.injection.factors.values():
            for param in f.trained.values():
                for value in optimizer.state[param].values():
                    value.zero_()


class NarrowFrames(Candidate):
    """Where a weight has fewer outputs than inputs, B starts semi-orthogonal, and A at zero.

    The start spans a subspace of the narrower side, of which it covers more. s and the size of the start change so that
    the first steps are as large as those of a frame on the other side with s = 2.
    """

    def start(self, explorer: Explorer, optimizer: torch.optim.Optimizer) -> None:
        if not self.value:
            return
        for f in explorer.injection.factors.values():
            rows, columns = f.B.shape[-2], f.A.shape[-1]
            if rows >= columns:
                continue
            generator = torch.Generator().manual_seed(len(f.name) + rows)
            with torch.no_grad():
                drawn = torch.randn(f.B.shape, generator=generator, dtype=torch.float64)
                f.B.copy_(torch.linalg.qr(drawn).Q * math.sqrt(rows / f.rank))
                f.A.zero_()
            f.settle()


CANDIDATES: dict[str, type[Candidate]] = {
    "orthogonal_heads": OrthogonalHeads,
    "same_start": SameStart,
    "same_data": SameData,
    "periods": Periods,
    "growing_heads": GrowingHeads,
    "sign_agreement": SignAgreement,
    "weighted_heads": WeightedHeads,
    "learning_rates": LearningRates,
    "size_of_a": SizeOfA,
    "fresh_adam": FreshAdam,
    "narrow_frames": NarrowFrames,
}


def made(extra: dict[str, Any]) -> list[Candidate]:
    """The candidates that a table names.

    Raises:
        ValueError: one is not known.
    """
    unknown = sorted(extra.keys() - CANDIDATES.keys())
    if unknown:
        raise ValueError(f"extra must name candidates, {sorted(CANDIDATES)}; received {unknown}.")
    return [CANDIDATES[name](value) for name, value in extra.items()]
