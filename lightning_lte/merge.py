"""The merge: W <- W + outer step of the mean delta of all heads, replicas <- their mean, then anchors or a reset."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lte.config import LTEConfig
from lightning_lte.heads import Factors, finite_rows
from lightning_lte.moments import States, elementwise_moments, moments_of, prune_moments, zero_moments
from lightning_lte.outer import OuterOptimizer
from lightning_lte.payload import Payload, grouped
from lightning_lte.replicas import Replicas
from lightning_lte.report import listed
from lightning_lte.running_statistics import RunningStatistics
from lightning_lte.span import span
from lightning_lte.stopwatch import Stopwatch
from lightning_lte.transport import Transport
from lightning_lte.wire import Wire


@dataclass(frozen=True)
class MergeRecord:
    """What happened at one merge.

    Attributes:
        step: optimizer steps done when it started.
        merges: merges done, this one included.
        time_s: seconds that training stood still for the merge on this device; of a GPU, by its own time. But where no
            norm was asked for, nobody waits for a GPU, and these are the host's.
        wait_s: seconds of these that it waited for what other devices send.
        bytes_sent: bytes this device sent since the merge before; it received as many. See `Transport`.
        ddp_bytes: bytes that data-parallel training would have sent in the same steps, one all-reduce of all trained
            parameters for each.
        restarted: numbers of the heads, over all devices, that were left out because they were not finite.
        delta_norm: Frobenius norm of the mean delta of all factored weights, or None if it was not asked for.
        disagreement: sqrt(mean_h |delta_h|^2 / |mean delta|^2 - 1), the spread of the heads' deltas relative to their
            mean: 0 if all heads learned the same, sqrt(N - 1) if they learned orthogonal things. None if not asked for
            or if nothing was learned.
        heads: how many there were, over all devices.
    """

    step: int
    merges: int
    time_s: float
    wait_s: float
    bytes_sent: int
    ddp_bytes: int
    restarted: tuple[int, ...]
    delta_norm: float | None
    disagreement: float | None
    heads: int


class Merge:
    """One merge, from its start to its landing.

    `run` does all of it at once, with the memory of a few weights at a time. To let training go on meanwhile, call
    `start`, then `exchange`, which alone communicates, in another thread, and in the end `land`: heads then go on from
    the merged weights with what they have learned since the start.

    Attributes:
        restarted: numbers of the heads, over all devices, that were not finite, once it has exchanged which are.
        flags: what else devices tell each other with it, (1, flags) uint8, and after the exchange (devices, flags).

    Args:
        factors: of the weights to merge.
        replicas: to merge with them.
        statistics: running statistics to average.
        transport: to the other devices.
        config: the user's choices.
        step: optimizer steps done.
        merges: merges done before this one.
        measure: whether to compute the norm and the disagreement.
        others: factors of weights that merge at other times. A head is bad if they are not finite, too; it starts anew
            in all of them, by `restart_elsewhere`.
        other_replicas: likewise replicas. All heads take their mean then, ahead of time, with `replicas="merge"`.
        exact: whether it travels in full precision, and with all that rounding took before: no other merge follows.
        device: where it is computed; None for that of the factors.
    """

    def __init__(
        self,
        factors: Sequence[Factors],
        replicas: Replicas,
        statistics: RunningStatistics,
        transport: Transport,
        config: LTEConfig,
        *,
        step: int,
        merges: int,
        measure: bool = True,
        others: Sequence[Factors] = (),
        other_replicas: Replicas | None = None,
        exact: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._others, self._other_replicas = others, other_replicas or Replicas(replicas.count)
        self._wire: Wire = "float32" if exact else config.wire
        self.factors, self.replicas, self.statistics = factors, replicas, statistics
        self._transport, self._config, self._measure = transport, config, measure
        self.step, self.number = step, merges + 1
        self._device: torch.device = device or (factors[0].A.device if factors else torch.device("cpu"))
        # Read where the host waits for the device anyway.
        watched = self._device if measure else torch.device("cpu")
        self._stands, self._waits = Stopwatch(watched), Stopwatch(watched)
        self.flags = torch.zeros(1, 0, dtype=torch.uint8, device=self._device)
        self._sent_before = transport.bytes_sent
        # What weight decay has left of each weight: on this device, and once it is exchanged the mean over devices.
        self._left = torch.ones(len(factors), dtype=torch.float64, device=self._device)
        self._squared_mean = self._squared_heads = torch.zeros((), dtype=torch.float32, device=self._device)

    def run(self, states: States, outer: OuterOptimizer | None = None) -> MergeRecord:
        """All at once.

        Args:
            states: moments in the optimizers, by what they train, which a reset or a restart changes.
            outer: steps the weights; None for the plain sum.

        Raises:
            FloatingPointError: no head is finite; or some are not, and `bad_heads="stop"` was given. All devices raise
                it, and W stays as it was.
        """
        with self._stands.running():
            with span("merge start"):
                self._find_good(states)
            with span("merge exchange"):
                self._exchange_good()
            self._check_good()
            for group in grouped(self.factors, self._transport):
                with span("merge start"):
                    self._measure_heads(group)
                    payload = self._payload(group)
                    payload.take(self._good)
                with span("merge exchange"), self._waits.running():
                    payload.exchange()
                with span("merge land"):
                    self._land_weights(payload, states, outer)
            with span("merge start"):
                self._take_rest(apart=False)
            with span("merge exchange"), self._waits.running():
                self._exchange_rest()
            with span("merge land"):
                norm, disagreement = self._finish(states)
        return self._record(norm, disagreement)

    def start(self, states: States) -> None:
        """Take what the heads have learned until now."""
        with span("merge start"), self._stands.running():
            self._find_good(states)
            self._measure_heads(self.factors)
            self._together = self._payload(self.factors, apart=True)
            self._together.take(self._good)
            self._take_rest(apart=True)

    def exchange(self) -> None:
        """Communicate. A collective: every device has to call it."""
        with span("merge exchange"):
            self._exchange_good()
            self._together.exchange()
            self._exchange_rest()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which training stands still until the exchange is done."""
        with self._stands.running(), self._waits.running():
            yield

    def land(self, states: States, outer: OuterOptimizer | None = None) -> MergeRecord:
        """Write what was merged; see `run`."""
        with span("merge land"), self._stands.running():
            self._settle_interrupted(states)
            self._check_good()
            self._land_weights(self._together, states, outer)
            norm, disagreement = self._finish(states)
        return self._record(norm, disagreement)

    def state_dict(self) -> dict[str, Any]:
        """All of it between `exchange` and `land`: what is equal on all devices, and under "rows" what is of the local
        heads, or of this device, and has them as dimension 0."""
        payload, replicas = self._together.state_dict(self._good_all), self.replicas.taken_state()
        statistics = self.statistics.taken_state()
        rows = {name: {"value": before} for name, before in replicas.pop("before").items()}
        statistic_rows = {name: {"value": before} for name, before in statistics.pop("before").items()}
        return {
            "step": self.step,
            "number": self.number,
            "measure": self._measure,
            "good": self._good_all.cpu(),
            "flags": self.flags.cpu(),
            "left": self._left.cpu(),
            "squared_heads": self._squared_heads.cpu(),
            "totals": payload["totals"],
            "wires": payload["wires"],
            "replicas": replicas,
            "statistics": statistics,
            "rows": {"factors": payload["merged"], "replicas": rows, "statistics": statistic_rows},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, in place of `start` and `exchange`."""
        first = self._transport.rank * self.replicas.count
        self._good_all = state["good"].to(self._device)
        self.flags = state["flags"].to(self._device)
        self._left = state["left"].to(self._device)
        self._good = self._good_all[first : first + self.replicas.count]
        self._squared_heads = state["squared_heads"].to(self._device)
        rows = state["rows"]
        self._together = self._payload(self.factors, apart=True)
        self._together.load_state_dict({**state, "merged": rows["factors"]})
        self._mean_replicas = self._config.replicas == "merge"
        before = {name: own["value"] for name, own in rows["replicas"].items()}
        self.replicas.load_taken_state({**state["replicas"], "before": before})
        before = {name: own["value"] for name, own in rows["statistics"].items()}
        self.statistics.load_taken_state({**state["statistics"], "before": before})

    # ---- heads that are not finite

    def _settle_interrupted(self, states: States) -> None:
        """Finish what an earlier try left half done: it was interrupted after it had written W."""
        for f in self.factors:
            if f.merging_from is not None and f.shard._version != f.merging_from:
                f.anchored = "float32"
                _settle(f, states, self._config, None, self.number)

    def _find_good(self, states: States) -> None:
        self._settle_interrupted(states)
        good = _finite(self.factors, self.replicas, states, self._device)
        good = good & _finite(self._others, self._other_replicas, states, self._device)
        self._good = ~self._transport.any_within(~good)
        if self._config.decays_weights:
            self._left = _taken_left(self.factors, self._device)

    def _exchange_good(self) -> None:
        # Of another stream than this may run in: they must live until what reads them here has run.
        self._sent = self.flags, self._left
        self._good_all = self._transport.stack(self._good.to(torch.uint8)).bool()
        if self.flags.numel():
            self.flags = self._transport.stack(self.flags)
        if self._config.decays_weights:
            self._left = _mean_left(self._left, self._transport)

    def _check_good(self) -> None:
        # All that the host waits for, once and not for each weight.
        good = self._good_all.tolist()
        self._good_total = sum(good)
        self.restarted = tuple(head for head, own in enumerate(good) if not own)
        left = self._left if self._config.decays_weights else torch.ones(len(self.factors), device="cpu")
        self._left_of = _named(self.factors, left)
        if self._good_total == 0:
            raise FloatingPointError(
                f"At the merge after step {self.step} no head of {len(self._good_all)} has finite factors, replicas and"
                " optimizer moments, so there is nothing to merge; the base weights stay as they were at the merge"
                " before. Lower the learning rate or `alpha`, or clip gradients, and go on from the last checkpoint."
            )
        if self.restarted and self._config.bad_heads == "stop":
            raise FloatingPointError(
                f"At merge {self.number}, after step {self.step}, heads {', '.join(map(str, self.restarted))} of"
                f" {len(self._good_all)} are not finite in their factors, replicas or optimizer moments, and"
                " bad_heads='stop' was given; the base weights stay as they were at the merge before. Lower the"
                " learning rate or `alpha`, or clip gradients, and go on from the last checkpoint; or give"
                " bad_heads='restart', which leaves such heads out and lets them start again."
            )

    # ---- weights

    def _payload(self, factors: Sequence[Factors], apart: bool = False) -> Payload:
        return Payload(factors, self._transport, self._wire, self._config.payload, apart)

    def _measure_heads(self, factors: Sequence[Factors]) -> None:
        if self._measure:
            self._squared_heads = sum((f.squared_norms(self._good) for f in factors), self._squared_heads)

    def _land_weights(self, payload: Payload, states: States, outer: OuterOptimizer | None) -> None:
        bad = ~self._good if self.restarted else None
        for f in payload.factors:
            # Settled one by one, so that a merge that was interrupted can be run, or landed, again.
            if f.merged_at == self.number:
                continue
            delta = payload.total(f, self._good_all) / self._good_total
            if self._measure:
                self._squared_mean = self._squared_mean.to(delta) + delta.norm().square()
            f.merging_from, f.merging = f.shard._version, payload.merged(f)
            # An outer optimizer would move what is frozen, by its momentum or its decay.
            if outer is None or not (f.weight.requires_grad or bool(delta.any())):
                f.add(delta, self._left_of[f.name])
            else:
                outer.step(f, delta, self._left_of[f.name])
            f.anchored = payload.wire_of(f)
            _settle(f, states, self._config, bad, self.number)

    # ---- all else

    def _take_rest(self, apart: bool) -> None:
        self._mean_replicas = self._config.replicas == "merge"
        if self._mean_replicas:
            self.replicas.take(self._transport, self._good, apart)
        self.statistics.take(self._transport, apart)

    def _exchange_rest(self) -> None:
        if self._mean_replicas:
            self.replicas.exchange(self._transport)
        self.statistics.exchange(self._transport)
        if self._measure:
            self._transport.sum_([self._squared_heads])

    def _finish(self, states: States) -> tuple[float | None, float | None]:
        """Land what is no weight; returns the norm and the disagreement."""
        if self._mean_replicas:
            self.replicas.land(self._good_total)
            if self.restarted:
                _restart_replicas(self.replicas, states, ~self._good)
        self.statistics.land()
        _mend_shared_moments(self.replicas, states)
        if not self._measure:
            return None, None
        self._transport.sum_within_([self._squared_mean])
        norm = float(self._squared_mean.sqrt())
        if not norm > 0:
            return norm, None
        ratio = float(self._squared_heads) / self._good_total / norm**2
        return norm, max(0.0, ratio - 1) ** 0.5

    def _record(self, norm: float | None, disagreement: float | None) -> MergeRecord:
        return MergeRecord(
            step=self.step,
            merges=self.number,
            time_s=self._stands.seconds,
            wait_s=self._waits.seconds,
            bytes_sent=self._transport.bytes_sent - self._sent_before,
            ddp_bytes=0,
            restarted=self.restarted,
            delta_norm=norm,
            disagreement=disagreement,
            heads=len(self._good_all),
        )

    def restart_elsewhere(self, states: States) -> None:
        """Let heads that were not finite start anew in what merges at other times, too; or these would be spoilt again.

        Call it if there are some, which all devices know, when this has landed and all else that is on its way. A
        collective.
        """
        for f in self._others:
            _restart(f, states, ~self._good, self.number)
        if self._config.replicas == "merge":
            # Not the bad heads alone: a device may have nothing else that is finite.
            self._other_replicas.take(self._transport, self._good, apart=False)
            self._other_replicas.exchange(self._transport)
            self._other_replicas.land(self._good_total)
            _restart_replicas(self._other_replicas, states, ~self._good)
            _mend_shared_moments(self._other_replicas, states)


def verify(factors: Sequence[Factors], transport: Transport, number: int, step: int) -> None:
    """Raise if base weights are not bit-equal on all devices. A collective: every device has to call it.

    Args:
        factors: of the weights.
        transport: to the other devices.
        number: of the merge, for the message.
        step: optimizer steps done, for the message.

    Raises:
        RuntimeError: with the names of the weights.
    """
    if transport.world_size == 1 or not factors:
        return
    sums = transport.stack(torch.stack([f.checksum() for f in factors]).unsqueeze(0))
    differ = (sums != sums[:1]).any(0).tolist()
    if any(differ):
        names = [f.name for f, unlike in zip(factors, differ, strict=True) if unlike]
        raise RuntimeError(
            f"Base weights must be bit-equal on all devices after a merge; after merge {number} (step {step}) these are"
            f" not: {listed(names)}. Something else than merges writes to them on some devices, or the devices compute"
            " differently; go on from the last checkpoint."
        )


def combined(records: Sequence[MergeRecord], *, bytes_sent: int, ddp_bytes: int) -> MergeRecord:
    """One record for merges of different weights, with the bytes of all steps since the record before."""
    measured = [(r.delta_norm, r.disagreement or 0.0) for r in records if r.delta_norm is not None]
    norm = math.hypot(*(own for own, _ in measured)) if measured else None
    # Squares of heads' deltas add up over weights, as those of mean deltas do.
    apart = math.hypot(*(own * spread for own, spread in measured))
    return replace(
        records[-1],
        time_s=sum(record.time_s for record in records),
        wait_s=sum(record.wait_s for record in records),
        bytes_sent=bytes_sent,
        ddp_bytes=ddp_bytes,
        restarted=tuple(sorted({head for record in records for head in record.restarted})),
        delta_norm=norm,
        disagreement=apart / norm if norm else None,
    )


@torch.no_grad()
def add_mean_deltas(factors: Sequence[Factors], transport: Transport, decays: bool) -> None:
    """Write W <- W + mean over all finite heads of delta for some weights, whose heads are not needed any more.

    Args:
        factors: of the weights.
        transport: to the other devices.
        decays: whether weight decay pulls W.
    """
    left = _taken_left(factors, factors[0].A.device)
    of = _named(factors, _mean_left(left, transport) if decays else torch.ones_like(left))
    good = torch.stack([f.finite() for f in factors]).all(0)
    good_all = transport.stack(good.to(torch.uint8)).bool()
    heads = int(good_all.sum())
    for group in grouped(factors, transport) if heads else ():
        payload = Payload(group, transport)
        payload.take(good)
        payload.exchange()
        for f in group:
            delta = payload.total(f, good_all) / heads
            # A graph that is to run backward once more needs W as it is.
            if of[f.name] != 1 or bool(delta.any()):
                f.add(delta, of[f.name])


def _taken_left(factors: Sequence[Factors], device: torch.device) -> Tensor:
    """(weights,) float64: what weight decay has left of each weight on this device."""
    return torch.tensor([float(f.left) for f in factors], dtype=torch.float64, device=device)


def _named(factors: Sequence[Factors], left: Tensor) -> dict[str, float]:
    return dict(zip((f.name for f in factors), left.tolist(), strict=True))


def _mean_left(left: Tensor, transport: Transport) -> Tensor:
    """The mean over devices, as of deltas: they need not have made the same steps. A collective."""
    return transport.stack(left.unsqueeze(0)).mean(0)


def _finite(factors: Sequence[Factors], replicas: Replicas, states: States, device: torch.device) -> Tensor:
    """(n,) bool: whether a local head is finite: its factors, its replicas, and the optimizer's moments of both.

    A gradient that is finite and overflows when it is squared leaves the factors finite. But the second moment is
    infinite from then on, and the element would never learn again.
    """
    checks = [f.finite() for f in factors] + replicas.finite()
    trained = [p for f in factors for p in f.trained.values()]
    trained += [r.trained for r in replicas if r.count == replicas.count]
    for p in trained:
        checks += [finite_rows(m.reshape(replicas.count, -1)) for m in moments_of(p, states, replicas.count)]
    none = torch.ones(replicas.count, dtype=torch.bool, device=device)
    return torch.stack([none, *(own.to(device) for own in checks)]).all(0)


def _settle(f: Factors, states: States, config: LTEConfig, bad: Tensor | None, merges: int) -> None:
    """Let heads go on from the merged weight: new anchors, or a reset; `bad` heads, (n,) bool, start anew.

    What was merged is in `Factors.merging`, where it is not the factors as they are now.
    """
    merged = f.merging
    f.settle(merged)
    if bad is not None:
        _restart(f, states, bad, merges)
    if config.after_merge == "reset":
        others = torch.ones(f.count, dtype=torch.bool, device=f.A.device) if bad is None else ~bad
        f.restart(others, redraw=config.reset_a == "redraw", merges=merges)
        for p in f.trained.values():
            prune_moments(p, states, config.reset_moments)
    if f.refresh and merged is None:  # else they have learned something since: it was on its way when it was saved
        vectors = f.start_vectors_anew(merges)
        for name, param in f.trained.items():
            gradient = [] if param.grad is None else [param.grad]
            for tensor in (*gradient, *elementwise_moments(param, states)):
                tensor.index_fill_(-2 if name == "A" else -1, vectors.to(tensor.device), 0)
    f.merging_from, f.merging, f.merged_at = None, None, merges


def _restart(f: Factors, states: States, bad: Tensor, merges: int) -> None:
    # An A that is frozen is finite, and what travels between devices goes with it.
    f.restart(bad, redraw=not f.freeze_a, merges=merges)
    for p in f.trained.values():
        zero_moments(p, states, bad)


def _restart_replicas(replicas: Replicas, states: States, bad: Tensor) -> None:
    for replica in replicas:
        which = bad if replica.stack is not None else bad.any().expand(1)
        zero_moments(replica.trained, states, which)


def _mend_shared_moments(replicas: Replicas, states: States) -> None:
    """Zero moments that are not finite of replicas that local heads share: they are of no head that could be bad."""
    for replica in replicas:
        if replica.count < replicas.count:
            for moment in moments_of(replica.trained, states, 1):
                moment.nan_to_num_(0, 0, 0)
