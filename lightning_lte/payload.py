"""What a merge sends for factored weights: dense deltas or factors, whichever is cheaper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lte import product
from lightning_lte.heads import Factors, Pair, of_good
from lightning_lte.transport import Transport
from lightning_lte.wire import PayloadKind, Wire, encoded_bytes

# Weights are merged a few at a time, which bounds the memory for their dense deltas.
GROUP_BYTES = 64 * 2**20


class Payload:
    """The deltas of some weights, from the local heads to their sum over all heads of all devices.

    `take` first, then `exchange`, which alone communicates and may run in another thread while training goes on, then
    `total` and `merged`.

    Args:
        factors: of the weights.
        transport: to the other devices.
        wire: how deltas or factors travel. In fewer bits than 32, factors are merged as they arrive, and the anchors
            become what was sent: what was lost to rounding stays in the head and is merged the next time. Anchors that
            were not, as after a merge in full precision, are sent in that. For dense deltas in int8 it is kept in
            `Factors.error`, and added the next time. Where A is frozen, B - B' travels alone, but for the first time,
            when A goes with it in full precision; B' then becomes B' and what was sent.
        kind: "dense", "factors", or "auto" for the one of fewer bytes.
        apart: whether factors change before the sums are used, so that a copy of them is needed.
    """

    def __init__(
        self,
        factors: Sequence[Factors],
        transport: Transport,
        wire: Wire = "float32",
        kind: PayloadKind = "auto",
        apart: bool = False,
    ) -> None:
        self.factors, self._transport, self._wire, self._apart = factors, transport, wire, apart
        world_size = transport.world_size
        # What sums in int8 have lost is added to a dense delta.
        self._dense = [
            f for f in factors if world_size == 1 or f.error is not None or is_dense(f, world_size, wire, kind)
        ]
        self._others = [f for f in factors if all(f is not other for other in self._dense)]
        self._wires = {f.name: wire for f in self._others}
        self._copies: dict[str, Pair] = {}
        self._deltas: list[Tensor] = []
        self._sent: list[list[Tensor]] = []
        # Anchors that are sent in full precision after that.
        self._anchors: dict[str, list[Tensor]] = {}
        # Of frozen factors: A of the local heads where not all devices have it, and what they had when this started.
        self._sent_A: dict[str, Tensor] = {}
        self._all_A: dict[str, Tensor] = {}
        self._stacked: list[list[Tensor]] = []

    def take(self, good: Tensor) -> None:
        """Take what the local heads have learned, of those that are good, (n,) bool."""
        self._deltas = [f.summed_delta(good) for f in self._dense]
        if self._apart:
            self._copies = {f.name: (f.A.detach().clone(), f.B.detach().clone()) for f in self.factors}
        self._anchors = {f.name: self._anchors_of(f) for f in self._others if self._rounds_anchors(f)}
        self._sent = [self._of(f) for f in self._others]
        frozen = [f for f in self._others if f.freeze_a]
        self._all_A = {f.name: f.all_A for f in frozen if f.all_A is not None}
        self._sent_A = {f.name: f.A.detach().clone() for f in frozen if f.all_A is None}
        if self._wire == "int8" and self._transport.world_size > 1:
            for f in self._dense:
                if f.error is None:
                    f.error = torch.zeros(f.shard.shape, dtype=torch.float32, device=f.A.device)
        else:
            for f, delta in zip(self._dense, self._deltas, strict=True):
                if f.error is not None:
                    delta += f.error
                    f.error = None

    def exchange(self) -> None:
        """Communicate. A collective: every device has to call it."""
        errors: Any = [f.error for f in self._dense] if self._wire == "int8" else None
        self._transport.sum_(self._deltas, self._wire, errors)
        # What was sent is kept: on CUDA it may be read only after this has returned.
        self._check_alike()
        flat = self._transport.stack_all([t for sent in self._sent for t in sent], self._wire)
        self._stacked = [[flat.pop(0) for _ in sent] for sent in self._sent]
        if self._anchors:
            exact = self._transport.stack_all([t for sent in self._anchors.values() for t in sent], "float32")
            for f, own in zip(self._others, self._stacked, strict=True):
                own += [exact.pop(0) for _ in self._anchors.get(f.name, ())]
        if self._sent_A:
            all_A = self._transport.stack_all(list(self._sent_A.values()), "float32")
            self._all_A.update(zip(self._sent_A, all_A, strict=True))

    def _check_alike(self) -> None:
        """Raise where devices would send different tensors, as anchors were changed on some of them since they merged.

        Others have told each other so before they send anything; a merge on its way can't.
        """
        if not self._apart or self._wire == "float32" or not self._others:
            return
        with_anchors = [[f.name in self._anchors for f in self._others]]
        own = torch.tensor(with_anchors, dtype=torch.uint8, device=self._others[0].A.device)
        all_ = self._transport.stack(own)
        if bool((all_ != all_[:1]).any()):
            raise RuntimeError(
                "Whoever writes to all weights has to do so on all devices alike; they were written on some ranks only"
                " since the last merge. Write them in a hook that runs on every rank."
            )

    def total(self, f: Factors, good_all: Tensor) -> Tensor:
        """s * sum over all good heads of B A - B' A', in the shape of a weight; bit-equal on all devices.

        Args:
            f: of the weight.
            good_all: (N,) bool, which of all heads are good.
        """
        for own, delta in zip(self._dense, self._deltas, strict=True):
            if own is f:
                return delta
        stacked = self._stacked[next(i for i, own in enumerate(self._others) if own is f)]
        good = good_all.to(f.A.device)
        if f.freeze_a:
            f.all_A = self._all_A[f.name]
            pairs = [(f.all_A, stacked[0].mT)]
        elif self._wire == "float32":
            pairs = [(stacked[0], stacked[1])]
        else:
            pairs = product.pairs(stacked[0], stacked[1].mT, stacked[2], stacked[3].mT)
        return f.sum_of_products([(of_good(A, good), of_good(B, good)) for A, B in pairs])

    def wire_of(self, f: Factors) -> Wire:
        """How the factors of a weight travel; "float32" if its dense delta does, as heads lose nothing by that."""
        return self._wires.get(f.name, "float32")

    def merged(self, f: Factors) -> Pair | None:
        """The factors of the local heads that were merged, where they are not those of now."""
        if self._wire != "float32":
            for own, stacked in zip(self._others, self._stacked, strict=True):
                if own is f:
                    local = slice(self._transport.rank * f.count, (self._transport.rank + 1) * f.count)
                    if f.freeze_a:
                        assert f.anchor_B is not None
                        return f.A.detach(), f.anchor_B + stacked[0].mT[local]
                    return stacked[0][local], stacked[1].mT[local]
        return self._copies.get(f.name)

    def state_dict(self, good_all: Tensor) -> dict[str, Any]:
        """What was exchanged, by the names of weights: sums that are equal on all devices, and the local heads' own."""
        merged = {f.name: self.merged(f) for f in self.factors}
        return {
            "totals": {f.name: self.total(f, good_all).cpu() for f in self.factors},
            "merged": {name: {"A": pair[0].cpu(), "B": pair[1].cpu()} for name, pair in merged.items() if pair},
            "wires": dict(self._wires),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._dense, self._others = list(self.factors), []
        self._deltas = [state["totals"][f.name].to(f.A.device) for f in self.factors]
        devices = {f.name: f.A.device for f in self.factors}
        self._wires = state["wires"]
        pairs = state["merged"].items()
        self._copies = {name: (p["A"].to(devices[name]), p["B"].to(devices[name])) for name, p in pairs}

    def _of(self, f: Factors) -> list[Tensor]:
        if f.freeze_a:
            return [f.current()[1].detach().mT]
        if self._wire == "float32":
            return [t.detach() for t in f.current()]
        A, B = self._copies.get(f.name, (f.A.detach(), f.B.detach()))
        return [A, B.mT, *(() if f.name in self._anchors else self._anchors_of(f))]

    def _anchors_of(self, f: Factors) -> list[Tensor]:
        # In int8 a row has a scale of its own: rows are to be long, here as of the factors.
        assert f.anchor_A is not None and f.anchor_B is not None
        return [f.anchor_A, f.anchor_B.mT]

    def _rounds_anchors(self, f: Factors) -> bool:
        """Whether the wire would take something from the anchors of a weight, as they have not come by it."""
        return self._wire != "float32" and not f.freeze_a and f.anchored not in (None, self._wire)


def is_dense(factors: Factors, world_size: int, wire: Wire = "float32", kind: PayloadKind = "auto") -> bool:
    """Whether the dense mean delta is sent, and not the factors of all heads: what moves fewer bytes in a ring.

    With anchors a head sends them beside its factors. Without (`reset`), and where vectors start anew, factors are sent
    in full precision alone, as what rounding takes from them would be lost; so would some of it be from frozen factors
    in half precision.
    """
    forgets = factors.anchor_B is None or factors.refresh > 0
    inexact = forgets or (factors.freeze_a and factors.remainder is not None)
    if wire != "float32" and inexact:
        return True
    if factors.shard is not factors.weight:
        return True  # of what devices share out, each sends its own rows
    if kind != "auto":
        return kind == "dense"
    dense, local = sizes(factors, wire)
    # 2 b (w - 1) / w bytes of an all-reduce against (w - 1) times the local factors, kept in whole numbers.
    return 2 * dense <= world_size * local


def sizes(factors: Factors, wire: Wire = "float32") -> tuple[int, int]:
    """Bytes of a weight's dense mean delta, and of the factors of the local heads, as they travel."""
    pairs = 2 if factors.anchor_A is not None else 1
    sent = (factors.B.mT,) if factors.freeze_a and not factors.refresh else (factors.A, factors.B.mT)
    if wire == "float32":
        # In its own dtype; the sum travels in float32 or better.
        dense = factors.weight.numel() * torch.promote_types(factors.weight.dtype, torch.float32).itemsize
        return dense, pairs * sum(t.nbytes for t in sent)
    rows = len(factors.weight)
    of_factors = sum(encoded_bytes(t.shape, wire) for t in sent)
    return encoded_bytes((rows, factors.weight.numel() // rows), wire), pairs * of_factors


def grouped(factors: Sequence[Factors], transport: Transport) -> list[list[Factors]]:
    """Deal weights into groups that are merged one after the other."""
    if transport.world_size == 1:
        return [[f] for f in factors]
    groups: list[list[Factors]] = [[]]
    size = 0
    for f in factors:
        if groups[-1] and size + f.shard.numel() * 4 > GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(f)
        size += f.shard.numel() * 4
    return groups
