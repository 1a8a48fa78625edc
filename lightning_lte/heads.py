"""The factors and anchors of one weight, for all heads of a device, and their arithmetic."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lightning_lte.config import Init


class Factors:
    """The factors of one weight W (out, in) for n local heads.

    While it trains, head h sees the effective weight W + s * (B_h A_h - B'_h A'_h), where the anchors A', B' are
    the factors as they were at the last merge (design: `keep`, paper appendix A.2). With `reset` the anchor product is
    zero at all times (Algorithm 1), so no anchors are stored.

    Args:
        name: name of the layer that owns W; heads are drawn from it.
        weight: W, (out, in). It enters the forward detached and is written by merges alone.
        rank: r.
        scale: s.
        count: n, local heads.
        first: number of the first local head among all heads.
        seed: see `LTEConfig.seed`.
        init: see `LTEConfig.init`.
        keep: whether anchors are needed.

    Attributes:
        A: (n, rank, in), trained.
        B: (n, out, rank), trained, zero at the start, so that the effective weight starts as W.
        anchor_A, anchor_B: shapes as A and B, or None with `reset`.
        remainder: (out, in) float32, what W in a half-precision dtype could not hold of the merges so far; else None.
        took_part: whether a forward that records gradients has used the factors.
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
    ) -> None:
        out_features, in_features = weight.shape
        self.name, self.weight, self.rank, self.scale = name, weight, rank, scale
        self.first, self.seed, self.init = first, seed, init
        self.A = nn.Parameter(weight.detach().new_empty(count, rank, in_features))
        self.B = nn.Parameter(weight.detach().new_zeros(count, out_features, rank))
        with torch.no_grad():
            self.A.copy_(self.draw())
        self.anchor_A = self.A.detach().clone() if keep else None
        self.anchor_B = self.B.detach().clone() if keep else None
        half = weight.dtype in (torch.float16, torch.bfloat16)
        self.remainder = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32) if half else None
        self.took_part = False

    @property
    def count(self) -> int:
        """n, the number of local heads."""
        return self.A.shape[0]

    def draw(self, merges: int = 0) -> Tensor:
        """A fresh A for every local head, (n, rank, in), on the CPU.

        It depends on (seed, layer name, head number, merges) alone, and the user's random stream is left untouched.
        """
        in_features = self.weight.shape[1]
        normal = torch.stack(
            [
                torch.randn(
                    in_features,
                    self.rank,
                    generator=_generator(self.seed, self.name, head, merges),
                    # The user's default dtype and device must not change what is drawn.
                    dtype=torch.float32,
                    device="cpu",
                )
                for head in range(self.first, self.first + self.count)
            ]
        )
        if self.init == "orthogonal":
            drawn = torch.linalg.qr(normal).Q * math.sqrt(in_features / self.rank)
        elif self.init == "kaiming":
            drawn = normal * math.sqrt(2 / in_features)
        else:
            drawn = normal * math.sqrt(2 / (in_features + self.rank))
        return drawn.mT

    def apply(self, base: Tensor, x: Tensor) -> Tensor:
        """Add every head's product to the base product, slice by slice.

        Args:
            base: (n, rows, out), W x of the detached W.
            x: (n, rows, in).
        """
        self._note()
        A, B = self.current()
        return torch.baddbmm(base, torch.bmm(x, A.mT), B.mT, alpha=self.scale)

    def apply_one(self, base: Tensor, x: Tensor, head: int) -> Tensor:
        """Add one head's product: base (..., out), x (..., in)."""
        self._note()
        A, B = self.current(head)
        return base + nn.functional.linear(nn.functional.linear(x, A), B) * self.scale

    def _note(self) -> None:
        # Only written, never read: torch.compile would guard what forwards read.
        if torch.is_grad_enabled():
            self.took_part = True

    def current(self, head: int | None = None) -> tuple[Tensor, Tensor]:
        """The pair whose product is B A - B' A': stacked [A - A'; A'] and [B, B - B'], of one local head or of all.

        Differences are taken before products: straight after a merge the product is exactly zero, and small deltas
        don't drown in the rounding of B A.
        """
        which = slice(None) if head is None else head
        A, B = self.A[which], self.B[which]
        if self.anchor_A is None or self.anchor_B is None:
            return A, B
        anchor_A, anchor_B = self.anchor_A[which], self.anchor_B[which]
        return torch.cat([A - anchor_A, anchor_A], dim=-2), torch.cat([B, B - anchor_B], dim=-1)

    @torch.no_grad()
    def effective(self, head: int) -> Tensor:
        """W + s * (B A - B' A') of a local head, (out, in)."""
        A, B = self.current(head)
        return self.weight + self.scale * (B @ A)

    @torch.no_grad()
    def summed_delta(self, good: Tensor) -> Tensor:
        """s * sum over good local heads of (B A - B' A'), (out, in), accumulated in float32 or better.

        Products are summed, never factors. `good` is (n,) bool.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        A, B = self.current()
        A, B = A[good].to(dtype), B[good].to(dtype)
        # One matrix product whose inner dimension runs over heads and ranks: sum_h B_h A_h.
        return self.scale * (B.transpose(0, 1).flatten(1) @ A.flatten(0, 1))

    @torch.no_grad()
    def squared_norms(self, good: Tensor) -> Tensor:
        """Sum over good local heads of the squared Frobenius norm of the delta, through (2r, 2r) Gram matrices."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        A, B = self.current()
        A, B = A[good].to(dtype), B[good].to(dtype)
        return self.scale**2 * ((A @ A.mT) * (B.mT @ B)).sum().clamp_min(0)

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Write W <- W + delta. In half precision, what W can't hold is carried to the next merge."""
        if self.remainder is None:
            self.weight.add_(delta.to(self.weight.dtype))
            return
        exact = self.weight.float() + self.remainder + delta
        self.weight.copy_(exact)
        self.remainder.copy_(exact - self.weight.float())

    @torch.no_grad()
    def finite(self) -> Tensor:
        """(n,) bool: whether a local head's factors are finite."""
        return self.A.isfinite().all(-1).all(-1) & self.B.isfinite().all(-1).all(-1)

    @torch.no_grad()
    def settle(self) -> None:
        """After a merge with `keep`: anchors <- factors, so that every head's effective weight is exactly W."""
        if self.anchor_A is not None and self.anchor_B is not None:
            self.anchor_A.copy_(self.A)
            self.anchor_B.copy_(self.B)

    @torch.no_grad()
    def restart(self, heads: Tensor, *, redraw: bool, merges: int = 0) -> None:
        """Let the heads chosen by `heads`, (n,) bool, start from W again: B <- 0, and A drawn anew if `redraw`."""
        self.B[heads] = 0
        if redraw:
            self.A[heads] = self.draw(merges).to(self.A)[heads]


def _generator(seed: int, name: str, head: int, merges: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{head}/{merges}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
