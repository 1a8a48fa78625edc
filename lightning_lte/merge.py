"""The merge: W <- W + mean over all heads of delta, replicas <- their mean, then anchors or a reset."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lte.config import LTEConfig
from lightning_lte.heads import Factors
from lightning_lte.replicas import Replicas
from lightning_lte.running_statistics import RunningStatistics
from lightning_lte.transport import Transport

States = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class MergeRecord:
    """What happened at one merge.

    Attributes:
        step: optimizer steps done.
        merges: merges done, this one included.
        time_s: seconds the merge took on this device.
        bytes_sent: bytes this device sent for it.
        restarted: numbers of the heads, over all devices, that were left out because they were not finite.
        delta_norm: Frobenius norm of what was added to all factored weights, or None if it was not asked for.
        disagreement: sqrt(mean_h |delta_h|^2 / |mean delta|^2 - 1), the spread of the heads' deltas relative to their
            mean: 0 if all heads learned the same, sqrt(N - 1) if they learned orthogonal things. None if not asked for
            or if nothing was learned.
    """

    step: int
    merges: int
    time_s: float
    bytes_sent: int
    restarted: tuple[int, ...]
    delta_norm: float | None
    disagreement: float | None


def merge(
    factors: Sequence[Factors],
    replicas: Replicas,
    statistics: RunningStatistics,
    states: States,
    transport: Transport,
    config: LTEConfig,
    *,
    step: int,
    merges: int,
    measure: bool = True,
) -> MergeRecord:
    """Merge all heads of all devices into the base weights.

    Args:
        factors: of the weights to merge.
        replicas: to merge with them.
        statistics: running statistics to average.
        states: of the optimizers, by what they train; a reset or a restart changes moments.
        transport: to the other devices.
        config: the user's choices.
        step: optimizer steps done.
        merges: merges done before this one.
        measure: whether to compute the norm and the disagreement.

    Raises:
        FloatingPointError: no head is finite. W stays as it was.
    """
    start, sent = time.perf_counter(), transport.bytes_sent
    for f in factors:
        if f.merging_from is not None and f.weight._version != f.merging_from:
            # An earlier try was interrupted after it had written W.
            _settle(f, states, config, None, merges + 1)
    count = replicas.count
    local = _finite(factors, replicas)
    device = local.device
    good_all = transport.stack(local.to(torch.uint8)).bool()
    good = good_all[transport.rank * count : (transport.rank + 1) * count]
    good_total = int(good_all.sum())
    if good_total == 0:
        raise FloatingPointError(
            f"At the merge after step {step} no head of {len(good_all)} has finite factors, so there is nothing to"
            " merge; the base weights stay as they were at the merge before. Lower the learning rate or `alpha`, or"
            " clip gradients, and go on from the last checkpoint."
        )
    good = good.to(device)
    wide = torch.promote_types(factors[0].weight.dtype, torch.float32) if factors else torch.float32
    squared_mean = torch.zeros((), device=device, dtype=wide)
    squared_heads = torch.zeros((), device=device, dtype=wide)
    bad, restarted = ~good, tuple(int(h) for h in (~good_all).nonzero().flatten())
    for group in _groups(factors, transport):
        if measure:
            for f in group:
                squared_heads += f.squared_norms(good).to(wide)
        deltas = _summed(group, good, good_all, transport)
        for f, delta in zip(group, deltas, strict=True):
            delta /= good_total
            if measure:
                squared_mean += delta.square().sum().to(wide)
            # Settled at once, so that a merge that was interrupted can be run again: this weight's delta is zero then.
            f.merging_from = f.weight._version
            f.add(delta)
            _settle(f, states, config, bad if restarted else None, merges + 1)
    if config.replicas == "merge":
        replicas.merge(transport, good, good_total)
        if restarted:
            _restart_replicas(replicas, states, bad)
    statistics.merge(transport)

    norm = disagreement = None
    if measure:
        transport.sum_([squared_heads])
        norm = float(squared_mean.sqrt())
        if norm > 0:
            disagreement = max(0.0, float(squared_heads / good_total / squared_mean) - 1) ** 0.5
    return MergeRecord(
        step, merges + 1, time.perf_counter() - start, transport.bytes_sent - sent, restarted, norm, disagreement
    )


@torch.no_grad()
def add_mean_deltas(factors: Sequence[Factors], transport: Transport) -> None:
    """Write W <- W + mean over all heads of delta for some weights, whose heads are not needed any more."""
    for group in _groups(factors, transport):
        everyone = torch.ones(group[0].count, dtype=torch.bool, device=group[0].A.device)
        heads = group[0].count * transport.world_size
        everywhere = torch.ones(heads, dtype=torch.bool, device=everyone.device)
        for f, delta in zip(group, _summed(group, everyone, everywhere, transport), strict=True):
            f.add(delta / heads)


def dense_is_cheaper(factors: Factors, world_size: int) -> bool:
    """Which payload moves fewer bytes per device in a ring: the dense mean delta or the factors of all heads.

    With anchors a head sends them beside its factors. The dense sum travels in float32 or better.
    """
    wide = torch.promote_types(factors.weight.dtype, torch.float32).itemsize
    pairs = 1 if factors.anchor_A is None else 2
    local = pairs * (factors.A.nbytes + factors.B.nbytes)
    # 2 b (w - 1) / w bytes of an all-reduce against (w - 1) times the local factors, kept in whole numbers.
    return 2 * factors.weight.numel() * wide <= world_size * local


def _finite(factors: Sequence[Factors], replicas: Replicas) -> Tensor:
    """(n,) bool: whether a local head is finite."""
    checks = [f.finite() for f in factors]
    others = replicas.finite()
    checks += [] if others is None else [others]
    return torch.stack(checks).all(0) if checks else torch.ones(replicas.count, dtype=torch.bool)


# Weights are merged a few at a time, which bounds the memory for their dense deltas.
_GROUP_BYTES = 64 * 2**20


def _groups(factors: Sequence[Factors], transport: Transport) -> list[list[Factors]]:
    if transport.world_size == 1:
        return [[f] for f in factors]
    groups: list[list[Factors]] = [[]]
    size = 0
    for f in factors:
        if groups[-1] and size + f.weight.numel() * 4 > _GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(f)
        size += f.weight.numel() * 4
    return groups


def _summed(group: list[Factors], good: Tensor, good_all: Tensor, transport: Transport) -> list[Tensor]:
    """Every weight's delta summed over all good heads of all devices, bit-equal on all devices."""
    if transport.world_size == 1:
        return [f.summed_delta(good) for f in group]
    dense = {id(f): f.summed_delta(good) for f in group if dense_is_cheaper(f, transport.world_size)}
    transport.sum_(list(dense.values()))
    return [dense[id(f)] if id(f) in dense else _summed_from_all(f, good_all, transport) for f in group]


def _summed_from_all(factors: Factors, good_all: Tensor, transport: Transport) -> Tensor:
    A, B = (transport.stack(t.detach())[good_all.to(t.device)] for t in factors.current())
    return factors.sum_of_products(A, B)


def _settle(f: Factors, states: States, config: LTEConfig, bad: Tensor | None, merges: int) -> None:
    """Let heads go on from the merged weight: new anchors, or a reset; `bad` heads, (n,) bool, start anew."""
    if bad is not None:
        f.restart(bad, redraw=True, merges=merges)
        for p in (f.A, f.B):
            _zero_moments(p, states.get(p, {}), bad)
    if config.after_merge == "reset":
        others = torch.ones(f.count, dtype=torch.bool, device=f.A.device) if bad is None else ~bad
        f.restart(others, redraw=config.reset_a == "redraw", merges=merges)
        for p in (f.A, f.B):
            _prune_moments(p, states.get(p, {}), config.reset_moments)
    f.settle()
    f.merging_from = None


def _restart_replicas(replicas: Replicas, states: States, bad: Tensor) -> None:
    for replica in replicas:
        which = bad if replica.stack is not None else bad.any().expand(1)
        _zero_moments(replica.trained, states.get(replica.trained, {}), which)


def _zero_moments(param: nn.Parameter, state: Mapping[str, Any], heads: Tensor) -> None:
    for key, value in state.items():
        # The step count of a scalar parameter has its shape, too.
        if isinstance(value, Tensor) and value.shape == param.shape and key != "step":
            if len(heads) > 1:
                value[heads] = 0
            elif bool(heads):
                value.zero_()


def _prune_moments(param: nn.Parameter, state: Mapping[str, Any], fraction: float) -> None:
    """Zero a fraction of each head's moments, the smallest first, and all moments of an element together.

    An element with a first moment and no second one would make a step of any size.
    """
    moments = [v for v in state.values() if isinstance(v, Tensor) and v.shape == param.shape]
    if not moments or not fraction:
        return
    # Second moments, where there are some, say how large the gradients of an element are.
    size = next((m for m in reversed(moments) if bool((m >= 0).all())), moments[0]).abs().flatten(1)
    smallest = size.topk(round(fraction * size.shape[1]), dim=1, largest=False).indices
    for moment in moments:
        moment.view(len(moment), -1).scatter_(1, smallest, 0)
