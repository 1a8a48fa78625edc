"""When what is merged: the clocks of the optimizers, groups of weights, and merges on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lte.clock import Clock
from lightning_lte.config import LTEConfig
from lightning_lte.decay import Decay
from lightning_lte.flight import Flight
from lightning_lte.heads import Factors
from lightning_lte.merge import Merge, MergeRecord, combined, verify
from lightning_lte.optimizers import check_optimizers, check_writes, moments
from lightning_lte.outer import OuterOptimizer
from lightning_lte.replicas import Replicas
from lightning_lte.rounded import Rounded
from lightning_lte.schedule import as_schedule
from lightning_lte.shards import is_shared_out, local
from lightning_lte.stopwatch import Stopwatch
from lightning_lte.trainees import Trainees
from lightning_lte.transport import Transport


class Merging(Trainees):
    """Merges what the heads of a module have learned, when it is due.

    Args:
        module: the user's.
        optimizers: over its parameters.
        config: the user's choices.
        transport: to other devices.

    Attributes:
        clocks: steps and merges done, for each optimizer.
        last_record: what happened at the last merge.
        outer: the outer optimizer, or None.
        flights: merges that have started and not landed.
        merging: whether a merge has begun and not ended.
        records: those of merges that nobody has taken yet, the youngest last.
        flags: what devices tell each other at merges: each is 0 or 1, by what it means.
        groups: parameter -> number of the group that it merges with.

    Raises:
        TypeError, ValueError: what `LTEConfig.local_heads`, `check_optimizers`, `Decay`, `inject`, `check_stacks` and
            `check_modes` refuse.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Optimizer], config: LTEConfig, transport: Transport
    ) -> None:
        self.transport = transport
        self._decay: Decay | None = None
        _check_sharing(optimizers, config, transport)
        count = config.local_heads(transport.world_size)
        self._schedule = as_schedule(config.merge_every)
        check_optimizers(optimizers, config.most_heads // transport.world_size)
        if config.after_merge == "reset" or config.refresh:
            check_writes(optimizers)
        # Merges on their way must not get mixed up with what devices exchange meanwhile.
        self._beside = transport.beside() if config.overlap else transport
        if config.decays_weights:
            self._decay = Decay(optimizers, lambda: self.injection.factors.values())
        try:
            super().__init__(module, optimizers, config, count, transport.rank * count)
        except BaseException:
            self._leave_decay()
            raise
        self.clocks = [Clock() for _ in self.optimizers]
        self.last_record: MergeRecord | None = None
        self.outer = None if config.outer_optimizer is None else OuterOptimizer(config.outer_optimizer)
        self.flights: list[Flight] = []
        self.records: deque[MergeRecord] = deque(maxlen=1000)
        # Those of single merges that `_noted` has not combined yet.
        self._done: list[MergeRecord] = []
        self.flags = {"late": False, "taken": False, "buffers": False, "terminated": False, "requeue": False}
        self.groups: dict[nn.Parameter, int] = {}
        self._counted_bytes = self._ddp_bytes = 0
        self._reduced: set[nn.Parameter] = set()
        self.merging = False
        # Names of moments of each optimizer, once they are asked for.
        self._moments: list[set[str] | None] | None = None

    def give_back(self) -> None:
        self._leave_decay()
        super().give_back()

    def _leave_decay(self) -> None:
        if self._decay is not None:
            self._decay.close()

    @property
    def clock(self) -> Clock:
        """The clock of the first optimizer."""
        return self.clocks[0]

    @property
    def merges(self) -> int:
        """Merges done, for all optimizers together."""
        return sum(clock.merges for clock in self.clocks)

    @property
    def unmerged(self) -> bool:
        """Whether heads have learned something since the last merge, or have what rounding took at it."""
        return bool(self.flights) or any(map(self._is_unmerged, range(len(self.clocks))))

    def _is_unmerged(self, number: int) -> bool:
        """`unmerged`, of what one optimizer trains and has landed."""
        return self.clocks[number].unmerged or any(map(self._has_residual, self._factors_of(number)))

    def _has_residual(self, f: Factors) -> bool:
        """Whether a merge is worthwhile for what rounding took alone. An outer optimizer would make a step of full size
        for it, by its momentum."""
        return self.outer is None and f.has_residual

    @property
    def merges_before_validation(self) -> bool:
        """Whether the schedule wants a `merge` before each validation, which whoever validates has to call."""
        return self._schedule.before_validation

    @property
    def where(self) -> str:
        """How far training is, for messages."""
        return f"after step {max(clock.step for clock in self.clocks)} and merge {self.merges}"

    @torch.inference_mode(False)  # what a merge makes lasts, and training goes on with it
    def merge(self, measure: bool = True, everything: bool = False) -> MergeRecord:
        """Merge now, inside `torch.inference_mode` too. A collective: every device has to call it.

        With several optimizers, what each of them trains is merged if it is `unmerged`; or all, if nothing is.

        Args:
            measure: whether to compute what `MergeRecord` calls norm and disagreement. The same on all devices.
            everything: merge what all optimizers train, which devices have to that stopped at different steps.

        Returns:
            One record for all of these merges.

        Raises:
            RuntimeError, FloatingPointError: see `step`.
        """
        self.select(None)  # an exception may have come in the turn of a head
        if self.full_rank:
            # Heads and replicas have nothing of what the weights have learned.
            self.take_weights({w.name for w in self._watched()})
        self._land_all(self.flights)
        numbers = [number for number in range(len(self.clocks)) if self._is_unmerged(number) and not everything]
        if everything:
            # They may have stopped on both sides of an exchange of A, which is sent once, and at a merge or after it.
            for f in self.injection.factors.values():
                f.all_A, f.merged_step = None, -1
        for number in numbers or range(len(self.clocks)):
            self._start(number, None, measure, overlap=0)
            self.clocks[number].settled()
        record = self._noted()
        assert record is not None
        return record

    def round_bases(self, saved: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Have forwards read base weights in low precision from now on, where the user chose so.

        Args:
            saved: by name, what `Rounded.state_dict` gave; those that are not in it are rounded.
        """
        choice, copy = self.config.base, self.config.base_copy
        new = [] if choice == "float32" else [f for f in self.injection.factors.values() if f.rounded is None]
        new = [f for f in new if self.injection.roles[f.weight].rounds]
        for f in new:
            f.rounded = Rounded(f.weight, choice, copy, self.transport, (saved or {}).get(f.name))
        if new:
            self.guard.accept_writes()

    def gather_bases(self) -> None:
        """Give the user's parameters the whole of weights whose rows are sharded. A collective."""
        if self.sharded:
            with self.transport.meeting(f"the gathering of sharded weights {self.where}"):
                restore_bases(self.sharded, exactly=True)

    @property
    def sharded(self) -> list[Factors]:
        """Those of weights whose rows are sharded now."""
        return [f for f in self.injection.factors.values() if f.rounded is not None and f.rounded.copy == "sharded"]

    def _before_merge(self) -> None:
        """Called before a merge starts."""

    def _hear(self, flags: Mapping[str, Tensor]) -> None:
        """Called with the flags of all devices, (devices,) bool, as soon as they are known."""

    def _merge_if_due(self, number: int, measure: bool) -> MergeRecord | None:
        """Land and start what is due after a step of an optimizer."""
        clock = self.clocks[number]
        self._land_all(f for f in self.flights if f.number == number and clock.step >= f.lands_at)
        groups = self.config.stagger
        if self._schedule.due(clock.step, clock.last_merge):
            while clock.groups_left:  # the last round was too short for all
                self._merge_next(number, measure)
            clock.begin(groups)
        while clock.groups_left:
            delay = self._schedule.delay(groups - clock.groups_left, groups)
            if clock.step < clock.last_merge + delay:
                break
            self._merge_next(number, measure)
        return self._noted()

    def _merge_next(self, number: int, measure: bool) -> None:
        """Merge the next group of the weights that one optimizer trains."""
        clock, groups = self.clocks[number], self.config.stagger
        self._start(number, groups - clock.groups_left, measure, self.config.overlap)
        clock.groups_left -= 1
        if groups == 1:
            clock.last_whole = clock.step

    def _start(self, number: int, group: int | None, measure: bool, overlap: int) -> None:
        """Merge a group of the weights that one optimizer trains, or let it start on its way.

        Args:
            number: of the optimizer.
            group: of its weights; None for all.
            measure: see `step`.
            overlap: steps until it lands.
        """
        clock = self.clocks[number]
        self._land_all(f for f in self.flights if f.number == number and group in (None, f.group))
        again, self.merging = self.merging, True
        waits = Stopwatch(self._device if measure else torch.device("cpu"))
        with self.transport.meeting(f"merge {self.merges + 1}, after step {clock.step}"):
            if not again:  # an interrupted merge has written itself
                self._before_merge()
                if not overlap:
                    with waits.running():
                        heard = self.transport.stack(self._told())
                    self._hear_of(heard)
            merge = self._made_merge(number, group, clock.step, self.merges, measure, apart=overlap > 0)
            if overlap:
                merge.flags = self._told()
                merge.start(self._states())
                last = self.flights[-1] if self.flights else None
                self.flights.append(Flight(merge, number, group or 0, clock.step + overlap, last, device=self._device))
            else:
                record = self._unless_refused(lambda: merge.run(self._states(), self.outer))
                waited = waits.seconds
                self._done.append(replace(record, time_s=record.time_s + waited, wait_s=record.wait_s + waited))
                self._after_merge(merge)
        for f in merge.factors:
            f.merged_step, f.left = clock.step, 1.0
        clock.merged()
        self.merging = False

    def _made_merge(self, number: int, group: int | None, step: int, merges: int, measure: bool, apart: bool) -> Merge:
        factors, replicas = self._grouped(number, group)
        if group is None:
            # An outer optimizer would move weights that have learned nothing since.
            factors = [f for f in factors if f.merged_step < self.clocks[number].step or self._has_residual(f)]
        return Merge(
            factors,
            replicas,
            self.statistics.of(number if group in (None, 0) else -1),
            self._beside if apart else self.transport,
            self.config,
            step=step,
            merges=merges,
            measure=measure,
            others=[f for f in self.injection.factors.values() if all(f is not own for own in factors)],
            other_replicas=self.injection.replicas.besides(replicas),
            exact=group is None,
            device=self._device,
        )

    def restore_flight(self, state: Mapping[str, Any]) -> None:
        """Put a merge on its way again that had started and not landed; see `Flight.state_dict`."""
        number, group, saved = state["number"], state["group"], state["merge"]
        merge = self._made_merge(number, group, saved["step"], saved["number"] - 1, saved["measure"], apart=True)
        merge.load_state_dict(saved)
        # What devices told in the run before, maybe of other things.
        merge.flags = merge.flags.new_zeros(len(merge.flags), len(self.flags))
        self.flights.append(Flight(merge, number, group, state["lands_at"], exchanged=True))

    def _land_all(self, flights: Iterable[Flight]) -> None:
        for flight in list(flights):
            if any(flight is own for own in self.flights):
                self._land(flight)

    def _land(self, flight: Flight) -> None:
        """Land a merge. That lands others, too, if heads start anew or roles change."""
        self.merging = True
        with self.transport.meeting(f"merge {flight.merge.number}, which started after step {flight.merge.step}"):
            with flight.merge.waiting():
                flight.wait()
            record = self._unless_refused(lambda: flight.merge.land(self._states(), self.outer))
            flight.wait_for_training()
            self.flights.remove(flight)
            self._done.append(record)
            self._after_merge(flight.merge)
            self._hear_of(flight.merge.flags)
        self.merging = False

    def _told(self) -> Tensor:
        """What this device tells the others, or what those tell that share out a head with it, (1, flags) uint8."""
        told = torch.tensor(list(self.flags.values()), dtype=torch.bool, device=self._device)
        return self.transport.any_within(told).to(torch.uint8).unsqueeze(0)

    def _hear_of(self, told: Tensor) -> None:
        heard = told.bool().cpu().unbind(1)
        self._hear(dict(zip(self.flags, heard, strict=True)))

    def tell(self) -> None:
        """Tell each other the flags now, where no merge does. A collective."""
        with self.transport.meeting(f"what devices tell each other {self.where}"):
            self._hear_of(self.transport.stack(self._told()))

    def _unless_refused(self, merge: Callable[[], MergeRecord]) -> MergeRecord:
        try:
            return merge()
        except FloatingPointError:
            self.merging = False  # no weight was written, on no device
            raise

    def _after_merge(self, merge: Merge) -> None:
        if merge.restarted:
            # What is on its way of these heads was taken before they start anew.
            self._land_all(self.flights)
            self.merging = True  # those have ended, and this has not
            merge.restart_elsewhere(self._states())
        self.guard.accept_writes()
        every = self.config.verify_every
        if every and merge.number % every == 0:
            verify(list(self.injection.factors.values()), self.transport, merge.number, merge.step)

    def _noted(self) -> MergeRecord | None:
        """One record for all merges since the one before, with the bytes of all steps since then."""
        if not self._done:
            return None
        records, self._done = self._done, []
        sent = self.transport.bytes_sent + (self._beside.bytes_sent if self.config.overlap else 0)
        self.last_record = combined(records, bytes_sent=sent - self._counted_bytes, ddp_bytes=self._ddp_bytes)
        self._counted_bytes, self._ddp_bytes = sent, 0
        self.records.append(self.last_record)
        return self.last_record

    def _count_step(self, number: int) -> None:
        """Count a step of an optimizer, and what data-parallel training would have sent for it."""
        self.clocks[number].step += 1
        for param in () if self.full_rank else self.borrowed[number]:
            # What the other optimizer's last merge left is not all any more.
            clock, f = self.clocks[self.trained_by[param]], self.injection.factors.get(param)
            clock.last_whole = min(clock.last_whole, clock.step - 1)
            if f is not None:
                f.merged_step = min(f.merged_step, clock.step - 1)
        if self.transport.world_size > 1:
            # Users may freeze for a while what DDP reduces all the same.
            own = [p for p, trainer in self.trained_by.items() if trainer == number]
            self._reduced.update(p for p in own if p.requires_grad)
            self._ddp_bytes += self.transport.bytes_of_sum(sum(local(p).nbytes for p in own if p in self._reduced))

    @property
    def _device(self) -> torch.device:
        # That of W may be the CPU, see `Rounded`.
        return next(iter(self.injection.factors.values())).A.device

    def _states(self) -> dict[Tensor, Any]:
        """Moments, by what optimizers train."""
        if self._moments is None:
            self._moments = [moments(optimizer) for optimizer in self.optimizers]
        found: dict[Tensor, Any] = {}
        for optimizer, names in zip(self.optimizers, self._moments, strict=True):
            for p, state in self.substitution.states(optimizer).items():
                found[p] = state if names is None else {key: value for key, value in state.items() if key in names}
        return found

    def _factors_of(self, number: int) -> list[Factors]:
        return [f for f in self.injection.factors.values() if self.trained_by[f.weight] == number]

    def _grouped(self, number: int, group: int | None) -> tuple[list[Factors], Replicas]:
        """What a group of the parameters that one optimizer trains is made of; all of them for None."""
        params = [p for p, own in self.trained_by.items() if own == number]
        if group is not None:
            self._deal(params)
            params = [p for p in params if self.groups[p] == group]
        own = set(params)
        return [f for f in self._factors_of(number) if f.weight in own], self.injection.replicas.of(params)

    def groups_by_name(self) -> dict[str, int]:
        """`groups` for a checkpoint."""
        return {self._names[p]: group for p, group in self.groups.items() if p in self._names}

    def load_groups(self, groups: Mapping[str, int]) -> None:
        """The inverse of `groups_by_name`."""
        self.groups = {p: groups[name] for p, name in self._names.items() if name in groups}

    def _deal(self, params: Sequence[nn.Parameter]) -> None:
        """Deal parameters into groups of about one size, once: a merge of some of them may be on its way."""
        if all(p in self.groups for p in params):
            return
        total, before, stagger = sum(p.numel() for p in params), 0, self.config.stagger
        dealt = any(p in self.groups for p in params)
        for p in params:
            # By its middle, so that a large one in the end does not leave a group empty. What came later is put last.
            group = stagger - 1 if dealt else (2 * before + p.numel()) * stagger // (2 * total)
            self.groups.setdefault(p, group)
            before += p.numel()


def _check_sharing(optimizers: Sequence[Optimizer], config: LTEConfig, transport: Transport) -> None:
    """Raise if the parameters, the configuration and the transport don't agree on who shares out what.

    Raises:
        ValueError: with rule, value and remedy.
    """
    size = 1 if transport.within is None else transport.within.world_size
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    shared = sum(is_shared_out(p) for p in params)
    if size != config.shard or shared != (len(params) if size > 1 else 0):
        raise ValueError(
            "With shard=k, groups of k devices share out all trained parameters, which are those of the module after"
            f" `Sharding`; received shard={config.shard}, groups of {size}, and {shared} of {len(params)} parameters"
            " of the optimizers shared out. Give Transport.sharing(k, ...), use `Sharding` before optimizers are made,"
            " and train only what the module has."
        )


def restore_bases(factors: Iterable[Factors], exactly: bool) -> None:
    """Have forwards read W itself again, from the user's parameters.

    Args:
        factors: of the weights.
        exactly: whether sharded rows are gathered, a collective; else W is what this device knows alone.
    """
    for f in factors:
        if f.rounded is not None:
            f.rounded.restore(f.rounded.exact() if exactly else None)
            f.rounded = None
