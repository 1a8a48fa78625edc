"""What is worth watching of a merge, with units in the names."""

from __future__ import annotations

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
