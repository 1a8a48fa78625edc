"""What is worth watching of a merge, with units in the names."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lte.merge import MergeRecord


def merge_metrics(record: MergeRecord) -> dict[str, float]:
    """A merge as numbers for a logger. What was not measured is left out; see `MergeRecord` for the meanings."""
    metrics: dict[str, float | None] = {
        "lte/merges": record.merges,
        "lte/heads": record.heads,
        "lte/delta_norm": record.delta_norm,
        "lte/head_disagreement": record.disagreement,
        "lte/merge_time_s": record.time_s,
        "lte/merge_wait_s": record.wait_s,
        "lte/bytes_sent": record.bytes_sent,
        "lte/bytes_received": record.bytes_sent,
        "lte/ddp_bytes_sent": record.ddp_bytes,
        "lte/heads_restarted": len(record.restarted),
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}


@torch.no_grad()
def effective_rank(weight: Tensor) -> float:
    """exp(-sum_i p_i log p_i) of the normalised singular values p_i = sigma_i / sum_j sigma_j, as in the paper.

    From 1, if one direction has it all, to min(out, in), if all directions weigh alike. It costs a decomposition of the
    weight, in float32 or better.

    Args:
        weight: (out, in); of more dimensions, those after the first are taken together.

    Returns:
        The effective rank, without unit; 0 for a weight that is zero, and NaN for one that is not finite.

    Raises:
        ValueError: the weight has fewer than two dimensions.
    """
    if weight.dim() < 2:
        raise ValueError(
            f"An effective rank is that of a matrix; received a tensor of shape {tuple(weight.shape)}."
            " Give a weight of two dimensions or more."
        )
    if not weight.isfinite().all():
        return float("nan")
    matrix = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    sigma = torch.linalg.svdvals(matrix)
    if not sigma.any():
        return 0.0
    return float(torch.special.entr(sigma / sigma.sum()).sum().exp())
