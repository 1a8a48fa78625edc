"""What would give a wrong answer without a word, found while training runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lte.heads import Factors
from lightning_lte.report import excluding, listed
from lightning_lte.shards import local
from lightning_lte.trial import HOOKED, USED, WRITTEN, checksum, has_hooks


@dataclass
class Watched:
    """A parameter of the user's that heads train in its place: a factored weight, or one with a replica for each head.

    Attributes:
        name: for the report.
        param: the user's.
        module: where it sits, as module.`key`.
        module_name: what excludes it.
        key: see `module`.
        factors: of a factored weight; None for others.
        version: autograd's count of writes to it, after the last merge.
        checksum: of its bits, after the last merge.
    """

    name: str
    param: nn.Parameter
    module: nn.Module
    module_name: str
    key: str
    factors: Factors | None = None
    version: int = 0
    checksum: int = 0

    def bits(self) -> Tensor:
        """A number that changes with the bits of what the parameter stands for, on the device that computes with it."""
        rounded = None if self.factors is None else self.factors.rounded
        if rounded is None:
            return checksum(local(self.param))
        # One that is nowhere in full shows NaN, whatever it is. One on the CPU is sent to the device in less time than
        # a thread of the CPU takes to look at all of it.
        return rounded.checksum() if rounded.released else checksum(self.param.detach().to(rounded.device))


class Guard:
    """Watches the parameters that heads train in place of the user's own.

    Args:
        watched: all of them.
    """

    def __init__(self, watched: Iterable[Watched]) -> None:
        self._watched: list[Watched] = []
        self._seen_backward = False
        self._unwritten: list[Watched] = []
        # Names of what was written to when `found` looked last, with other bits or with the same.
        self._touched: set[str] = set()
        self.watch(watched)

    def watch(self, watched: Iterable[Watched]) -> None:
        """Watch these from now on; those that were watched already are known as they were."""
        known = {w.param: w for w in self._watched}
        self._watched = list(watched)
        new = []
        for w in self._watched:
            before = known.get(w.param)
            if before is None:
                # Gradients from before would look like those of a use elsewhere.
                w.param.grad = None
                new.append(w)
            else:
                w.version, w.checksum = before.version, before.checksum
        self._accept(new)

    def accept_writes(self) -> None:
        """Take the parameters as they are now: after a merge or after loading a checkpoint."""
        self._accept(self._watched)

    def before_swaps(self) -> None:
        """Note what nobody has written to, before weights may be swapped for others, as for a validation."""
        self._unwritten = [w for w in self._watched if local(w.param)._version == w.version]

    def after_swaps(self) -> None:
        """Accept weights that nobody had written to before, and whose bits are what they were."""
        swapped = [w for w in self._unwritten if local(w.param)._version != w.version]
        self._accept([w for w, value in zip(swapped, _checksums(swapped), strict=True) if value == w.checksum])
        self._unwritten = []

    def found(self, settling: bool, look_at_bits: bool = True) -> dict[str, str]:
        """Names of what heads can't train, with the reason.

        Args:
            settling: whether these are the first steps, in which a write counts though it changes nothing (who clamps a
                parameter after each step writes to it); later on, weights may be swapped out and in again.
            look_at_bits: also for writes that went past autograd (`weight.data`).
        """
        reasons: dict[str, str] = {}
        self._touched = {w.name for w in self._watched if local(w.param)._version != w.version}
        changed = self._changed(look_at_bits) | (self._touched if settling else set())
        for w in self._watched:
            reason = WRITTEN if w.name in changed else USED if w.param.grad is not None else None
            if settling and w.factors is not None and w.factors.trial is not None:
                reason = w.factors.trial.conclude() or reason
            if has_hooks(w.param, None if w.factors is None else w.factors.trial):
                reason = HOOKED
            if w.module._parameters.get(w.key) is not w.param:
                reason = "another tensor was put in its place"
            if reason is not None:
                reasons[w.name] = reason
        return reasons

    def all_written(self, reasons: Mapping[str, str]) -> bool:
        """Whether that is so for all weights, as when a checkpoint is loaded or averaged weights are put in.

        Some may have been as they were written: those of a layer that is never used are.
        """
        factored = [w.name for w in self._watched if w.factors is not None]
        written = {name for name, reason in reasons.items() if reason == WRITTEN}
        alike = self._touched - reasons.keys()
        return len(factored) > 1 and not written.isdisjoint(factored) and written | alike >= set(factored)

    def changed(self) -> set[str]:
        """Names of parameters whose bits are not as they were accepted."""
        return self._changed(look_at_bits=True)

    def check_starved(self) -> None:
        """On the first call, warn of factors that took part in the forward and got no gradient."""
        if self._seen_backward:
            return
        self._seen_backward = True
        factors = [w.factors for w in self._watched if w.factors is not None]
        starved = [f.name for f in factors if f.took_part and f.weight.requires_grad and f.B.grad is None]
        if starved:
            warnings.warn(
                f"The heads of {listed(starved)} took part in the first step, but got no gradient: they don't learn."
                " If that is not meant, a custom autograd function may differentiate with respect to"
                f" self.parameters() alone, which heads are not part of; then {excluding(starved)}.",
                stacklevel=2,
            )

    def _accept(self, watched: list[Watched]) -> None:
        for w, value in zip(watched, _checksums(watched), strict=True):
            w.version, w.checksum = local(w.param)._version, value
            if w.factors is not None and w.factors.trial is not None:
                w.factors.trial.accept_writes()

    def _changed(self, look_at_bits: bool) -> set[str]:
        suspects = [w for w in self._watched if look_at_bits or local(w.param)._version != w.version]
        changed = set()
        for w, value in zip(suspects, _checksums(suspects), strict=True):
            if value != w.checksum:
                changed.add(w.name)
            else:
                # Swapped out and in again, as averaged weights are for validation.
                w.version = local(w.param)._version
        return changed


def _checksums(watched: list[Watched]) -> list[int]:
    bits = [w.bits() for w in watched]
    sums = [0] * len(bits)
    for device in {own.device for own in bits}:
        # One wait for the device, not one for each parameter.
        indices = [i for i, own in enumerate(bits) if own.device == device]
        for i, value in zip(indices, torch.stack([bits[i] for i in indices]).tolist(), strict=True):
            sums[i] = value
    return sums
