"""The factors and anchors of one weight, for all heads of a device, and their arithmetic."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lte import product
from lightning_lte.config import Init
from lightning_lte.float32 import HALF
from lightning_lte.growth import spread
from lightning_lte.rounded import Rounded
from lightning_lte.span import span
from lightning_lte.trial import Trial, checksum
from lightning_lte.wire import Wire

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Matrices:
    """How a weight is seen as one matrix (out, in), or as several side by side with factors of their own.

    Attributes:
        out_features: rows of each matrix.
        in_features: columns of each matrix.
        lead: () for one matrix, (g,) for g of them: groups of a convolution, parts of a fused projection.
        transposed: whether the weight is laid out as (in, out).
    """

    out_features: int
    in_features: int
    lead: tuple[int, ...] = ()
    transposed: bool = False

    @classmethod
    def of(cls, weight: Tensor, parts: int = 1) -> Matrices:
        """A weight (out, in, *rest) as a matrix (out, in * rest), or as `parts` equal ones below each other.

        Raises:
            ValueError: the parts don't divide the rows.
        """
        if weight.shape[0] % parts:
            raise ValueError(
                f"split must divide the rows of a weight into equal parts; received {parts} parts for a weight of shape"
                f" {tuple(weight.shape)}. Give a divisor of {weight.shape[0]}."
            )
        rows = weight.shape[0] // parts
        return cls(rows, math.prod(weight.shape[1:]), () if parts == 1 else (parts,))

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.lead)

    def thin(self, rank: int) -> bool:
        """Whether factors of this rank would be no smaller than the weight."""
        return rank * (self.in_features + self.out_features) >= self.in_features * self.out_features

    def as_weight(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Matrices (*lead, out, in) in the weight's own shape."""
        return (matrices.mT if self.transposed else matrices).reshape(shape)


class Factors:
    """The factors of one weight W for n local heads.

    While it trains, head h sees the effective weight W + s * (B_h A_h - B'_h A'_h), where the anchors A', B' are
    the factors as they were at the last merge (design: `keep`, paper appendix A.2). With `reset` the anchor product is
    zero at all times (Algorithm 1), so no anchors are stored.

    W is one matrix (out, in), or it is seen as several, and `lead` is () or how many: see `Matrices`.

    Args:
        name: name of the layer that owns W; heads are drawn from it.
        weight: W. It enters the forward detached and is written by merges alone.
        rank: r.
        scale: s.
        count: n, local heads.
        first: number of the first local head among all heads.
        seed: see `LTEConfig.seed`.
        init: see `LTEConfig.init`.
        keep: whether anchors are needed.
        refresh: see `LTEConfig.refresh`; one vector at least always lives on.
        freeze_a: whether A stays as it was drawn, and B alone is trained.
        matrices: how W is seen; None for a W that is a matrix (out, in).

    Attributes:
        A: (n, *lead, rank, in), trained, unless it is frozen.
        B: (n, *lead, out, rank), trained, zero at the start, so that the effective weight starts as W.
        trained: what optimizers hold of them, by name.
        anchor_A, anchor_B: shapes as A and B, or None with `reset`. An A that is frozen is its own anchor: None.
        anchored: how what became the anchors travelled, which is how they travel without loss; None before the first
            merge, as B' = 0 does so in any way.
        all_A: with frozen factors, A of all heads of all devices in their order, once a merge has exchanged them.
        remainder: float32 in W's shape, what W in a half-precision dtype could not hold of the merges so far, or None.
        rounded: W in low precision and its high-precision copy, while forwards read the former; else None.
        error: float32 in W's shape, what sums in int8 have lost so far on this device, or None.
        merging_from: while a merge writes to W, autograd's count of writes to it before; else None.
        merging: while a merge writes to W, the factors that it merges, where they are not those of now.
        merged_at: number of the last merge that wrote to W.
        merged_step: optimizer steps done when its last merge started; -1 before the first.
        trial: watches W through its first backward; None once that is over.
        took_part: whether a forward that records gradients, and is not compiled, has used the factors.
        gradient_scale: what gradients of A and B are multiplied by; see `product.scaled_gradient`.
        refreshed: how many vectors of each head have started anew so far.
        left: what weight decay has left of W since the last merge took it, for the next one to write; see `Decay`. A
            number, or a float64 tensor without dimensions where the learning rate is one.
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        *,
        rank: int,
        scale: float,
        count: int,
        first: int,
        seed: int,
        init: Init,
        keep: bool,
        refresh: int = 0,
        freeze_a: bool = False,
        matrices: Matrices | None = None,
    ) -> None:
        self.matrices = m = matrices or Matrices.of(weight)
        self.name, self.weight, self.rank, self.scale = name, weight, rank, scale
        self.first, self.seed, self.init, self.freeze_a = first, seed, init, freeze_a
        self.refresh, self.refreshed = min(refresh, rank - 1), 0
        first_A = self._drawn(count).expand(count, *m.lead, rank, m.in_features)
        self.A = nn.Parameter(self._shared(first_A), requires_grad=not freeze_a)
        self.B = nn.Parameter(self._shared(torch.zeros(count, *m.lead, m.out_features, rank, device="cpu")))
        self.trained = {"B": self.B} if freeze_a else {"A": self.A, "B": self.B}
        self.anchor_A = self.A.detach().clone() if keep and not freeze_a else None
        self.anchor_B = self.B.detach().clone() if keep else None
        half = weight.dtype in HALF
        self.remainder = torch.zeros_like(self.shard, dtype=torch.float32) if half else None
        self.rounded: Rounded | None = None
        self.error: Tensor | None = None
        self.anchored: Wire | None = None
        self.all_A: Tensor | None = None
        self.merging_from: int | None = None
        self.merging: Pair | None = None
        self.merged_at = 0
        self.merged_step = -1
        self.trial: Trial | None = None
        self.took_part = False
        self.gradient_scale = 1
        self.left: float | Tensor = 1.0
        self._cast = product.SharedCast()

    @property
    def count(self) -> int:
        """n, the number of local heads."""
        return self.A.shape[0]

    @property
    def shard(self) -> Tensor:
        """What this device holds of W, and writes at merges: all of it, unless devices share it out."""
        return self._own(self.weight)

    def _own(self, tensor: Tensor) -> Tensor:
        """What this device holds of a weight, a factor or an anchor, to be written to: all of it."""
        return tensor

    def _shared(self, value: Tensor) -> Tensor:
        """What this device keeps of a factor, in W's dtype and on its device: all of it."""
        return value.to(self.weight.device, self.weight.dtype, copy=True).contiguous()

    def draw(self, merges: int = 0) -> Tensor:
        """A fresh A for every local head, (n, *lead, rank, in), on the CPU.

        It depends on (seed, layer name, head number, merges) alone, and the user's random stream is left untouched.
        """
        return self._drawn(self.count, merges)

    def _drawn(self, count: int, occasion: int | str = 0, vectors: int | None = None) -> Tensor:
        return torch.stack([self._draw_one(head, occasion, vectors) for head in range(self.first, self.first + count)])

    def _draw_one(self, head: int, occasion: int | str, vectors: int | None = None) -> Tensor:
        """An A (*lead, rank, in), or as many of its vectors: (*lead, vectors, in)."""
        m = self.matrices
        generator = _generator(self.seed, self.name, head, occasion)
        # In float64 and one by one, so that rounding does not depend on where a head sits; and whatever the user's
        # default dtype and device are.
        shape = (*m.lead, m.in_features, vectors or self.rank)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if self.init == "orthogonal":
            drawn = torch.linalg.qr(drawn).Q * math.sqrt(m.in_features / self.rank)
        elif self.init == "kaiming":
            drawn = drawn * math.sqrt(2 / m.in_features)
        else:
            drawn = drawn * math.sqrt(2 / (m.in_features + self.rank))
        return drawn.mT.to(torch.float32)

    def base(self) -> Tensor:
        """W for a forward: detached, but while its trial lasts; a copy where it is in low precision."""
        if self.rounded is not None:
            return self.rounded.read()
        # torch.compile would make a graph for the trial and another one for all that follows.
        if torch.compiler.is_compiling() or self.trial is None:
            return self.weight.detach()
        return self.trial.watched()

    def cast(self, base: Tensor) -> Tensor:
        """`base`, or a view of it, for an operation that autocast has in fewer bits."""
        return self._cast(base, self.shard._version)

    def end_trial(self) -> None:
        """Take W detached from now on."""
        if self.trial is not None:
            self.trial.end()
            self.trial = None

    def apply(self, base: Tensor, x: Tensor, head: int | Tensor | None = None, part: int | None = None) -> Tensor:
        """Add every head's product to the base product, slice by slice.

        Args:
            base: (n, rows, out), W x of the detached W; with several matrices their outputs lie side by side in it.
            x: (n, rows, in).
            head: the local head that acts alone, with n = 1, its number or a tensor (1,) of it; None for all of them.
            part: which of several matrices alone is meant; None for all of them.
        """
        with span("heads"):
            A, B = self.acting(head, part)
            if A.dim() == 3:
                return torch.baddbmm(base, torch.bmm(x, A.mT), B.mT, alpha=self.scale)
            inner = torch.bmm(x, A.flatten(1, 2).mT).unflatten(-1, A.shape[1:3])  # (n, rows, lead, rank)
            y = (inner.transpose(1, 2) @ B.mT).transpose(1, 2)  # (n, rows, lead, out)
            return torch.add(base, y.flatten(-2), alpha=self.scale)

    def applies(self, x: Tensor, weight: Tensor, bias: Tensor | None, part: int | None = None) -> bool:
        """Whether `multiply` may be used here; see `product.applies`."""
        # With a frozen A plain operations do better: they keep no input for a backward.
        learns = self.A.requires_grad and (self.anchor_A is None) == (self.anchor_B is None)
        base = weight if self.rounded is None else None
        return learns and product.applies(x, base, bias, self._own(self.A))

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: int | Tensor | None = None,
        part: int | None = None,
    ) -> Tensor:
        """The base product and every head's own, slice by slice, in one operation: (n, rows, out).

        Args:
            x: (n, rows, in), or as `product.product` takes it.
            weight: the base, (out, in). Where it is in low precision, that is read in its place.
            bias: (out,), or (n, out) with one for each head, or None.
            head: see `apply`.
            part: see `apply`.
        """
        with span("heads"):
            factors, again = self.acting_and_anchors(head, part)
            base = weight if self.rounded is None else self.rounded.reader()
            return product.product(x, base, bias, *factors, self.scale, self.gradient_scale, again, self.cast)

    def acting_and_anchors(
        self, head: int | Tensor | None = None, part: int | None = None
    ) -> tuple[product.PairAndAnchors, Callable[[], product.PairAndAnchors] | None]:
        """A, B and the anchors of the heads that act, for an operation with a gradient of its own, and what gives them
        once more to a backward; None where a forward keeps them. See `apply`."""
        return self._acting(head, part), self._again(head, part)

    def _again(self, head: int | Tensor | None, part: int | None) -> Callable[[], product.PairAndAnchors] | None:
        """What gives `_acting` once more to a backward; None where a forward keeps it."""
        return None

    def acting(self, head: int | Tensor | None = None, part: int | None = None) -> Pair:
        """The pair of `current` with the heads that act as dimension 0, for use in a forward; see `apply`."""
        A, B, *anchors = self._acting(head, part)
        A, B = (product.scaled_gradient(t, self.gradient_scale) for t in (A, B))
        return product.stacked(A, B, *anchors)

    def _acting(self, head: int | Tensor | None, part: int | None) -> product.PairAndAnchors:
        # torch.compile refuses such writes inside of activation checkpointing.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.took_part = True
        # With all heads, as with the only one, what is there is taken as it is: the gradient of a slice is copied.
        if head is None or self.count == 1:
            return self._chosen(None if part is None else (slice(None), part))
        heads = head.to(self.A.device) if isinstance(head, Tensor) else slice(head, head + 1)
        return self._chosen(heads if part is None else (heads, part))

    def current(self, heads: int | Tensor | None = None) -> Pair:
        """The pair whose product is B A - B' A': stacked [A - A'; A'] and [B, B - B'], of one local head or of several.

        With a frozen A the product is (B - B') A, and half as wide.

        Args:
            heads: index of a local head, or of several; None for all of them.
        """
        return product.stacked(*self._chosen(heads))

    def _chosen(self, heads: int | slice | Tensor | tuple[slice | Tensor, int] | None) -> product.PairAndAnchors:
        """A, B and their anchors, of some of the local heads or of all, and of one of the matrices or of all."""
        A: Tensor = self.A
        B: Tensor = self.B
        anchor_A, anchor_B = self.anchor_A, self.anchor_B
        if heads is not None:
            A, B = A[heads], B[heads]
            anchor_A, anchor_B = (None if t is None else t[heads] for t in (anchor_A, anchor_B))
        if not self.weight.requires_grad:
            # What users freeze for a while (toggled optimizers do) must not learn meanwhile.
            A, B = A.detach(), B.detach()
        return A, B, anchor_A, anchor_B

    @torch.no_grad()
    def effective(self, head: int) -> Tensor:
        """W + s * (B A - B' A') of a local head, in W's shape."""
        A, B = self.current(head)
        with self._in_full_precision():
            return self.base().detach() + self.scale * self.matrices.as_weight(B @ A, self.weight.shape)

    @torch.no_grad()
    def summed_delta(self, good: Tensor) -> Tensor:
        """s * sum over good local heads of (B A - B' A'), in W's shape, accumulated in float32 or better.

        Products are summed, never factors. `good` is (n,) bool.
        """
        return self.sum_of_products(self._pairs(good))

    def _pairs(self, good: Tensor) -> list[Pair]:
        """`product.pairs` of the good local heads, in float32 or better."""
        factors = (None if t is None else of_good(t, good).to(self._wide) for t in self._chosen(None))
        return product.pairs(*factors)  # type: ignore[arg-type]

    @torch.no_grad()
    def sum_of_products(self, pairs: Sequence[Pair]) -> Tensor:
        """s * sum over heads and pairs of B A in W's shape; A is (heads, *lead, ., in) and B (heads, *lead, out, .)."""
        return self.matrices.as_weight(self._product(pairs), self.weight.shape)

    def _product(self, pairs: Sequence[Pair]) -> Tensor:
        """s * sum over heads and pairs of B A, (*lead, out, in)."""
        total: Tensor | None = None
        with self._in_full_precision():
            for A, B in pairs:
                # One matrix product whose inner dimension runs over heads and ranks: sum_h B_h A_h.
                A = A.to(self._wide).movedim(0, -3).flatten(-3, -2)
                B = B.to(self._wide).movedim(0, -2).flatten(-2)
                if total is None:
                    total = B @ A
                elif total.dim() == 2:
                    total.addmm_(B, A)
                else:
                    total.baddbmm_(B, A)
        assert total is not None
        return total.mul_(self.scale)

    @property
    def _wide(self) -> torch.dtype:
        """In which deltas are summed."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _in_full_precision(self) -> AbstractContextManager[Any]:
        # With manual optimization merges come inside of the user's training_step, which runs under autocast.
        return product.without_autocast(self.A.device.type)

    @torch.no_grad()
    def squared_norms(self, good: Tensor) -> Tensor:
        """Sum over good local heads of the squared Frobenius norm of the delta, through (r, r) Gram matrices."""
        pairs = self._pairs(good)
        total = torch.zeros((), dtype=self._wide, device=self.A.device)
        with self._in_full_precision():
            for i, (A, B) in enumerate(pairs):
                for C, D in pairs[: i + 1]:
                    inner = ((A @ C.mT) * (B.mT @ D)).sum()
                    total += inner if C is A else 2 * inner
        return self.scale**2 * total.clamp_min(0)

    @torch.no_grad()
    def add(self, delta: Tensor, left: float = 1.0) -> None:
        """Write W <- left W + delta. In half precision, what W can't hold is carried to the next merge."""
        if self.remainder is not None or self.rounded is not None:
            self.write(self.exact().mul_(left) + delta)
        elif left == 1:
            self.shard.add_(delta.to(self.weight.dtype))
        else:
            # In one write: see `merging_from`.
            self.shard.copy_(torch.add(delta.to(self.weight.dtype), self.shard, alpha=left))

    @torch.no_grad()
    def exact(self) -> Tensor:
        """A copy of W in float32 or better, with what a half-precision W could not hold.

        Where its rows are sharded it is a collective: every device has to call it.
        """
        if self.rounded is not None:
            return self.rounded.exact()
        return self.shard.detach().clone() if self.remainder is None else self.shard.float() + self.remainder

    @torch.no_grad()
    def write(self, exact: Tensor) -> None:
        """Write W <- exact. In half precision, what W can't hold is kept for the next merge."""
        if self.rounded is not None:
            self.rounded.write(exact)
            return
        self.shard.copy_(exact)
        if self.remainder is not None:
            self.remainder.copy_(exact - self.shard.float())

    def checksum(self) -> Tensor:
        """A number, on the device of the factors, that changes when the bits of W do."""
        return checksum(self.shard) if self.rounded is None else self.rounded.checksum()

    @property
    def has_residual(self) -> bool:
        """Whether rounding took something at the last merge, which stays here for the next one."""
        return self.error is not None or self.anchored not in (None, "float32")

    @torch.no_grad()
    def moved(self) -> bool:
        """Whether any head is elsewhere than at the last merge."""
        start_A = self._own(self.A) if self.anchor_A is None else self._own(self.anchor_A)
        B = self._own(self.B)
        start_B = torch.zeros_like(B) if self.anchor_B is None else self._own(self.anchor_B)
        return not (torch.equal(self._own(self.A), start_A) and torch.equal(B, start_B))

    @torch.no_grad()
    def finite(self) -> Tensor:
        """(n,) bool: whether a local head's factors are finite, and so small that their product can't overflow."""
        return self._finite(self.A, self.B)

    def _finite(self, A: Tensor, B: Tensor) -> Tensor:
        A, B = (t.abs().flatten(1).amax(1).to(self._wide) for t in (A, B))
        # No element of s B A is larger; and a factor that is not finite makes this so, times zero too.
        return (self.scale * self.rank * A * B).isfinite()

    @torch.no_grad()
    def settle(self, merged: Pair | None = None) -> None:
        """After a merge with `keep`: anchors <- the factors that were merged.

        Args:
            merged: these, shapes as A and B; None where they are the factors as they are now, which makes every head's
                effective weight exactly W.
        """
        A, B = merged or (self.A, self.B)
        if self.anchor_A is not None:
            self.anchor_A.copy_(A)
        if self.anchor_B is not None:
            self.anchor_B.copy_(B)

    @torch.no_grad()
    def restart(self, heads: Tensor, *, redraw: bool, merges: int = 0) -> None:
        """Let the heads chosen by `heads`, (n,) bool, start from W again: B <- 0, and A drawn anew if `redraw`."""
        # Not by masks as indices, whose elements the host would have to count.
        A, B = self._own(self.A), self._own(self.B)
        B.masked_fill_(_over_rows(heads, B), 0)
        if redraw:
            fresh = self._own(self._shared(self.draw(merges))).to(A)
            A.copy_(fresh.where(_over_rows(heads, A), A))
            self.all_A = None
        for factor, anchor in ((A, self.anchor_A), (B, self.anchor_B)):
            if anchor is not None:
                anchor = self._own(anchor)
                anchor.copy_(factor.where(_over_rows(heads, anchor), anchor))

    @torch.no_grad()
    def start_vectors_anew(self, merges: int) -> Tensor:
        """Let the next `refresh` of the r vectors of every head start from W again: a row of A drawn anew, and B = 0.

        Call it where nothing is unmerged.

        Args:
            merges: done so far; what is drawn depends on it.

        Returns:
            Which they are, (refresh,).
        """
        chosen = (self.refreshed + torch.arange(self.refresh, device=self.A.device)) % self.rank
        self.A[..., chosen, :] = self._drawn(self.count, f"refreshed at {merges}", self.refresh).to(self.A)
        self.B[..., chosen] = 0
        if self.anchor_A is not None:
            self.anchor_A[..., chosen, :] = self.A[..., chosen, :]
        if self.anchor_B is not None:
            self.anchor_B[..., chosen] = 0
        self.refreshed += self.refresh
        self.all_A = None
        return chosen

    @torch.no_grad()
    def grow(self, factor: int, heads: int) -> dict[nn.Parameter, nn.Parameter]:
        """Put `factor` heads in the place of each, between two merges: the first of them is the head as it was, and the
        others start from W as any head does, with B = 0 and an A of their own.

        Args:
            factor: g.
            heads: N over all devices from now on. What is drawn depends on it, for head 1 of 8 is another than head 1
                of 4, which has become head 2 of 8.

        Returns:
            {A as it was: A, B as it was: B}, of those that are trained.
        """
        A, B = spread(self.A, factor), spread(self.B, factor)
        self.first *= factor
        for i in (i for i in range(len(A)) if i % factor):
            A[i] = self._draw_one(self.first + i, f"of {heads}").to(A)
        if self.anchor_A is not None:
            anchor_A = A.clone()
            anchor_A[::factor] = self.anchor_A
            self.anchor_A = anchor_A
        if self.anchor_B is not None:
            self.anchor_B = spread(self.anchor_B, factor)
        if self.error is not None:
            # A sum over heads, from now on divided by more of them.
            self.error *= factor
        before, self.all_A = self.trained, None
        self.A, self.B = nn.Parameter(A, requires_grad=not self.freeze_a), nn.Parameter(B)
        self.trained = {key: {"A": self.A, "B": self.B}[key] for key in before}
        return {old: self.trained[key] for key, old in before.items()}


def of_good(rows: Tensor, good: Tensor) -> Tensor:
    """A row for each head, with zeros for those that are not good, (n,) bool: to leave these out, the host would have
    to wait until the device has counted them. On a CPU they are the rows themselves if all are good."""
    if good.device.type == "cpu" and bool(good.all()):
        return rows
    return rows.where(_over_rows(good, rows), 0)


def _over_rows(chosen: Tensor, rows: Tensor) -> Tensor:
    """(n,) bool as a mask of n rows (n, *)."""
    return chosen.view(-1, *[1] * (rows.dim() - 1))


def finite_rows(tensor: Tensor) -> Tensor:
    """(n,) bool: whether all numbers of each of n rows (n, *) are finite."""
    rows = tensor.unsqueeze(-1).flatten(1)
    if not rows.numel():
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    # The largest is if all are; to ask each of them takes many times as long on a CPU.
    return rows.abs().amax(1).isfinite()


def _generator(seed: int, name: str, head: int, occasion: int | str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{head}/{occasion}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
