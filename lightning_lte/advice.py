"""What is known to go badly: a sentence for the user before much time is spent on it."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_lte.heads import Factors

PAGE = "docs/choosing.md"

# The fewest that were tried: 32 heads with 2 samples each learned as well as with 8, at the batch of each. Many heads
# lose by their number, whatever they see (`python -m benchmarks.learning samples`).
LEAST_SAMPLES = 2


def of_size(factors: Iterable[Factors], heads: int) -> str | None:
    """What to say where all heads together have too small a rank for a merge to change all of a weight; None if not.

    The paper's rule of size is that N r be larger than the widest layer. A layer's width is taken to be the smaller of
    its inputs and outputs, for no change of its weight has a higher rank. Where vectors start anew at each merge, many
    merges together have a higher one.

    Args:
        factors: of all weights.
        heads: N.
    """
    narrow = [f for f in factors if heads * f.rank < _width(f) and not f.refresh]
    if not narrow:
        return None
    f = max(narrow, key=_width)
    m = f.matrices
    return (
        "The ranks of all heads together should be at least the width of the widest layer, or a merge can change its"
        f" weight in some directions only; received heads={heads} of rank {f.rank}, and {f.name} has"
        f" {m.in_features} inputs and {m.out_features} outputs. Give more heads, a higher rank, or refresh=1: see"
        f" {PAGE}."
    )


def _width(f: Factors) -> int:
    return min(f.matrices.in_features, f.matrices.out_features)


def of_samples(samples: int, heads: int) -> str | None:
    """What to say where heads see fewer samples in a step than is known to go well; None if not.

    Args:
        samples: of a device in a step of the optimizer, over all batches whose gradients it accumulates.
        heads: n, local heads.
    """
    if samples >= LEAST_SAMPLES * heads:
        return None
    return (
        f"Each head should see at least {LEAST_SAMPLES} samples in a step, as fewer were never tried; received"
        f" {samples / heads:.3g}, as {samples} samples go to {heads} head{'s' * (heads > 1)} of this device. Give a"
        f" larger batch, fewer heads, or accumulate gradients: see {PAGE}."
    )
