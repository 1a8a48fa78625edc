"""What a run needs beside the merged weights to go on exactly where it stopped: dictionaries out, dictionaries in.

The dictionaries hold tensors and plain values only, so `torch.load(..., weights_only=True)` reads them. Tensors that
differ between heads or devices have these as dimension 0, over all devices in the order of ranks.
"""

from __future__ import annotations

import random
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lte import device_state
from lightning_lte.buffers import put_back_
from lightning_lte.optimizers import COUNTS, laid_out, place_counts
from lightning_lte.report import listed
from lightning_lte.rows import Rows
from lightning_lte.shards import like, put_, whole

if TYPE_CHECKING:
    from lightning_lte.explorer import Explorer
    from lightning_lte.heads import Factors
    from lightning_lte.replicas import Replica
    from lightning_lte.transport import Transport

VERSION = 1

# What of a state is equal on all devices, but for flights, of which all but the rows are.
EQUAL = ("outer", "remainders", "bases")

State = dict[str, Any]


def gather_state(local: State, transport: Transport) -> State | None:
    """Everything of all devices, on rank 0; None on the others. A collective: every device has to call it.

    Args:
        local: this device's `local_state`.
        transport: to the other devices.
    """
    # What is equal on all devices need not travel.
    equal: State = {} if transport.rank == 0 else {key: {} for key in EQUAL}
    within = transport.within
    if within is not None:
        equal["generators"] = within.gather(local["generators"])
    gathered = transport.gather({**local, **equal})
    if gathered is None:
        return None
    parts = {key: [own[key] for own in gathered] for key in local}
    return {
        **gathered[0],
        **{key: _joined(parts[key]) for key in ("factors", "replicas", "statistics", "wire_errors", "left")},
        "flights": [_joined_flight(each) for each in zip(*parts["flights"], strict=True)],
        "optimizers": [_joined(list(each)) for each in zip(*parts["optimizers"], strict=True)],
        "holders": [holders(each) for each in zip(*parts["optimizers"], strict=True)],
        "late": dict(ChainMap(*parts["late"])),
        "buffers": parts["buffers"],
        "own": parts["own"],
        "tried": parts["tried"],
        # The first of the devices that share out a head has those of all of them.
        "generators": parts["generators"] if within is None else [s for own in parts["generators"] for s in own or ()],
    }


def holders(parts: Sequence[Collection[str]]) -> dict[str, list[int]]:
    """Which devices have moments of what others have none of, as it had no gradient there yet: experts, for instance.

    Args:
        parts: of each device, the names of what an optimizer has moments of.

    Returns:
        The numbers of these devices by name, of what some of them lack.
    """
    names = {name: [device for device, own in enumerate(parts) if name in own] for part in parts for name in part}
    return {name: devices for name, devices in names.items() if len(devices) < len(parts)}


def scatter_state(explorer: Explorer, state: Mapping[str, Any]) -> str:
    """Take this device's part of what `gather_state` returned; all checks come before the first change.

    Args:
        explorer: who takes it.
        state: as `check_shape` wants it, with tensors that have rows, or `Rows` in their place, of which those of this
            device are read alone, and all of what has to be merged.

    Returns:
        What could not be laid out as it was, a sentence or two for the user; empty if all was. All devices see the
        whole state, so they come to the same without a word to each other.

    Raises:
        ValueError: the state is of other heads, ranks or targets.
    """
    _take_roles(explorer, state)
    _take_clocks(explorer, state)
    layout = _Layout(explorer.config.heads, explorer.transport.world_size, explorer.transport.rank)
    merged: dict[str, list[str]] = {"replica": [], "running statistic": []}
    with torch.no_grad():
        for f in explorer.injection.factors.values():
            _take_factors(f, state, layout, explorer.config.decays_weights)
        if explorer.outer is not None:
            explorer.outer.load_state_dict(explorer.injection.factors.values(), state["outer"])
        for replica in explorer.injection.replicas:
            _take_replica(replica, state, layout, merged["replica"])
        buffers = dict(explorer.module.named_buffers())
        for name, value in state["buffers"][layout.device_of_first_head(len(state["buffers"]))].items():
            if name in buffers:
                put_back_(buffers[name], value)
        _take_statistics(explorer, state, layout, merged["running statistic"])
    averaged, anew = _scatter_moments(explorer, state, layout)
    _restore_flights(explorer, state["flights"], layout, merged)
    merged["replica"] += [name for name in averaged if name not in merged["replica"]]
    explorer.guard.accept_writes()
    explorer.late = dict(state["late"])
    kept, devices = explorer.statistics.copies(), state["devices"]
    left_out = [name for name in _differing_buffers(state) if name not in kept] if layout.leaves_out(devices) else []
    told = _told(devices, layout.world_size, merged, left_out)
    if anew:
        told += (
            " What optimizers keep in lists of tensors belongs to the heads of one device, and can't be dealt out anew:"
            f" what they knew of {listed(anew)} was left out."
        )
    if state["outer"] and explorer.outer is None:
        told += " The checkpoint has the state of an outer optimizer, and this run has none: it was left out."
    if state["left"] and not explorer.config.decays_weights:
        told += (
            " In the checkpoint weight decay was that of weights: what it took off since their last merge was left out."
        )
    return told.strip()


def _take_roles(explorer: Explorer, state: Mapping[str, Any]) -> None:
    """Have as many heads as there were, in the same weights, and share the device as they did; or raise before that."""
    lost = {name: why for name, why in state["made_replicas"].items() if name not in explorer.made_replicas}
    _check(explorer, state, lost)
    if lost:
        explorer.make_replicas(lost)
    # Heads that are drawn from now on are those that the run would have had.
    explorer.config = replace(explorer.config, seed=state["seed"])
    for f in explorer.injection.factors.values():
        f.seed = explorer.config.seed
    if state["heads"] > explorer.config.heads:
        explorer.grow(state["heads"], "as in the checkpoint")
    if explorer.execution == "auto" and state["execution"] != "auto":
        go = explorer.go_sequential if state["execution"] == "sequential" else explorer.go_batched
        go("as in the checkpoint")
        explorer.tried = _tried(state, explorer.transport)
    # Heads got copies of what was trained then, which may be frozen now: it is thawed as training goes on.
    apart = {name for name, saved in state["replicas"].items() if len(saved["value"]) != state["devices"]}
    if any(replica.name in apart and replica.stack is None for replica in explorer.injection.replicas):
        explorer.split_again(apart, in_turn=explorer.execution == "sequential")


def _tried(state: Mapping[str, Any], transport: Transport) -> dict[str, bool] | None:
    """What was tried of batches on this device; on another number of devices, what was proved on any of them."""
    rows = state["tried"]
    if None in rows:
        return None
    if len(rows) == transport.world_size:
        return dict(rows[transport.rank])
    return {structure: True for own in rows for structure, proved in own.items() if proved}


def _take_clocks(explorer: Explorer, state: Mapping[str, Any]) -> None:
    same = state["stagger"] == explorer.config.stagger
    for clock, saved in zip(explorer.clocks, state["clocks"], strict=True):
        clock.load_state_dict(saved)
        if not same:
            clock.groups_left = 0
    if same:
        explorer.load_groups(state["groups"])


def _take_factors(f: Factors, state: Mapping[str, Any], layout: _Layout, decays: bool) -> None:
    """Take what a weight's heads are, and what they have not merged yet.

    Args:
        f: of the weight.
        state: of all heads.
        layout: of this run.
        decays: whether weight decay pulls W in this run.
    """
    for key, tensor in _factor_tensors(f).items():
        put_(tensor, layout.mine(state["factors"][f.name][key], f.count))
    f.all_A = None
    f.merged_step = state["merged_steps"][f.name]
    f.refreshed, f.anchored = state["refreshed"][f.name], state["anchored"][f.name]
    left = state["left"].get(f.name) if decays else None
    if left is not None:
        rows = left["value"][:]
        f.left = float(rows[layout.rank] if len(rows) == layout.world_size else rows.mean())
    _take_remainder(f, state["remainders"].get(f.name))
    lost = state["wire_errors"].get(f.name)
    f.error = None
    if lost is not None:
        rows = lost["value"]
        same = len(rows) == layout.world_size
        # What all devices have lost together is what counts.
        own = rows[layout.rank] if same else sum(rows[i] for i in range(len(rows))) / layout.world_size
        f.error = own.to(f.A.device, copy=True)


def _take_remainder(f: Factors, saved: Tensor | None) -> None:
    """What W in half precision could not hold, of a run whose precision may have been another."""
    if f.remainder is None:
        if saved is not None:
            f.add(saved.to(f.A.device))
    elif saved is None:
        f.remainder.zero_()
    else:
        f.remainder.copy_(saved)


def _take_replica(replica: Replica, state: Mapping[str, Any], layout: _Layout, merged: list[str]) -> None:
    """Take the copies of a replica; `merged` gets its name if one copy has to stand for several that differed."""
    if replica.name in state["spared"]:
        if replica.stack is not None:
            replica.stack.copy_(replica.param.expand_as(replica.stack))
        return
    rows, copies = state["replicas"][replica.name]["value"], len(replica.copies)
    if layout.must_merge(rows, copies):
        merged.append(replica.name)
        rows = layout.mean(rows)
    own = layout.mine(rows, copies)
    put_(replica.trained, own if replica.stack is not None else own[0])
    if replica.stack is not None and len(rows) == state["devices"]:
        # The devices trained it in place: the module's own has what the first of them had, and no mean.
        replica.param.copy_(layout.mean(rows)[0])


def _take_statistics(explorer: Explorer, state: Mapping[str, Any], layout: _Layout, merged: list[str]) -> None:
    """Take all running statistics; `merged` as in `_take_replica`. The module's buffers have to be loaded before."""
    statistics = {}
    for name, copies in explorer.statistics.copies().items():
        rows = _statistic_rows(state, name)
        if rows is None:
            continue
        if layout.must_merge(rows, copies):
            merged.append(name)
            rows = layout.mean(rows)
        statistics[name] = layout.mine(rows, copies)
    explorer.statistics.load_rows(statistics)


def _scatter_moments(explorer: Explorer, state: Mapping[str, Any], layout: _Layout) -> tuple[list[str], list[str]]:
    """Give the optimizers what they know of this device's heads; returns the names of what was averaged for it, and of
    what they start anew."""
    stacked, averaged, anew = explorer.per_head, [], []
    before = layout.devices_before(state["devices"])
    own_states = own_state(state, layout.world_size, layout.rank)
    for optimizer, saved_fields, of_some, own_kept in zip(
        explorer.optimizers, state["optimizers"], state["holders"], own_states, strict=True
    ):
        held = explorer.substitution.held(optimizer)
        device_state.put_what_is_of_all(optimizer, own_kept)
        for name in held.keys() - saved_fields.keys():
            explorer.substitution.drop_state(optimizer, held[name])
        for name, fields in saved_fields.items():
            param = held.get(name)
            if param is None:
                continue
            having = [device for device in of_some.get(name, before) if device in before]
            if not having:
                explorer.substitution.drop_state(optimizer, param)
                continue
            if not device_state.goes_on(param, name, own_kept, state["devices"] == layout.world_size):
                explorer.substitution.drop_state(optimizer, param)
                anew.append(name)
                continue
            had_heads = any(isinstance(value, Mapping) and "heads" in value for value in fields.values())
            here: State = {}
            for key, value in fields.items():
                if not isinstance(value, Mapping):
                    here[key] = value
                    continue
                [(whose, rows)] = value.items()
                # What a device trained in place has moments of its shape, and these are of each of its heads.
                of_heads = whose == "heads" or (not had_heads and key not in COUNTS and _has_shape_of(param, rows))
                if name in of_some and key in COUNTS:
                    rows = torch.stack([rows[having[0]]] * layout.world_size)  # others have counted nothing
                copies = explorer.count if param in stacked and of_heads else 1
                if layout.must_merge(rows, copies) and name not in averaged:
                    averaged.append(name)
                own = layout.mine(rows, copies)
                own = own if param in stacked and of_heads else own[0]
                # Counts of steps stay where the optimizer made them: on the CPU, unless it is fused or capturable.
                counts = own.dim() == 0 and (param.dim() > 0 or key in COUNTS)
                own = own.clone() if counts else own.to(param.device).clone()
                here[key] = laid_out(like(param, own), param)
            here |= device_state.taken(param, name, own_kept)
            place_counts(optimizer, param, here)
            explorer.substitution.set_state(optimizer, param, here)
    return averaged, anew


def _has_shape_of(param: nn.Parameter, rows: Tensor | Rows) -> bool:
    """Whether there is a number for each of a head's; a row is read for it."""
    return rows[:1].shape[1:] == param.shape[1:]


def own_state(state: Mapping[str, Any], world_size: int, rank: int) -> list[State]:
    """What each optimizer kept on a device alone, on the one that held the first head of device `rank`."""
    own: list[State] = state["own"][_Layout(state["heads"], world_size, rank).device_of_first_head(len(state["own"]))]
    return own


class _Layout:
    """How the heads sit on the devices of this run.

    Args:
        heads: N.
        world_size: devices.
        rank: number of this device.
    """

    def __init__(self, heads: int, world_size: int, rank: int) -> None:
        self.heads, self.world_size, self.rank = heads, world_size, rank

    def mine(self, rows: Tensor | Rows, copies: int) -> Tensor:
        """This device's `rows_for`."""
        return rows_for(rows, self.heads, self.world_size, self.rank, copies)

    def must_merge(self, rows: Tensor | Rows, copies: int) -> bool:
        """Whether one copy would have to stand for several rows that differ."""
        if len(rows) == copies * self.world_size or copies * self.world_size == self.heads:
            return False
        own = rows[:].repeat_interleave(self.heads // len(rows), dim=0).unflatten(0, (self.world_size, -1))
        return not torch.equal(own, own[:, :1].expand_as(own))

    def mean(self, rows: Tensor | Rows) -> Tensor:
        """The mean over all heads, once for each device. Counts have none: they are the first one's."""
        rows = rows[:]
        mean = _mean(rows) if rows.is_floating_point() or rows.is_complex() else rows[:1]
        return mean.expand(self.world_size, *rows.shape[1:])

    def devices_before(self, devices: int) -> range:
        """Which of the devices of the run that was saved held heads that this one has."""
        return range(self.device_of_first_head(devices), -(-(self.rank + 1) * devices // self.world_size))

    def device_of_first_head(self, devices: int) -> int:
        """Which of the devices of the run that was saved held this one's first head."""
        return self.rank * devices // self.world_size

    def leaves_out(self, devices: int) -> bool:
        """Whether some of the devices of the run that was saved are no device's `device_of_first_head`."""
        return devices > self.world_size


def _restore_flights(
    explorer: Explorer, flights: Sequence[State], layout: _Layout, merged: Mapping[str, list[str]]
) -> None:
    """Put merges on their way again that had not landed."""
    explorer.flights = []
    statistics = explorer.statistics.copies()
    copies: dict[str, dict[str, int]] = {
        "factors": {f.name: explorer.count for f in explorer.injection.factors.values()},
        "replicas": {r.name: len(r.copies) for r in explorer.injection.replicas},
        "statistics": statistics,
    }
    # What was merged has to be compared with the mean of what was there when the merge started.
    means = {*merged["replica"], *merged["running statistic"]}
    for flight in flights:
        rows = {
            kind: {
                name: {
                    key: layout.mine(layout.mean(rows) if name in means else rows, copies[kind][name])
                    for key, rows in own.items()
                }
                for name, own in named.items()
            }
            for kind, named in flight["merge"]["rows"].items()
        }
        explorer.restore_flight({**flight, "merge": {**flight["merge"], "rows": rows}})


def rows_for(rows: Tensor | Rows, heads: int, world_size: int, rank: int, copies: int) -> Tensor:
    """Cut out the rows of a device.

    Args:
        rows: (R, ...), one row for each head, or for each device of the run that was saved.
        heads: N.
        world_size: devices of this run.
        rank: number of this device.
        copies: rows a device holds in this run: n, one for each local head, or 1.

    Returns:
        (copies, ...): the saved rows as they are where the layout is the same, else each head's row, or their mean
        where a device holds one row for all of its heads.
    """
    if len(rows) == copies * world_size:
        return rows[rank * copies : (rank + 1) * copies]
    # A row stands for so many heads; the first and the last may stand for some of other devices.
    local, each = heads // world_size, heads // len(rows)
    start, end = rank * local // each, -(-(rank + 1) * local // each)
    own = rows[start:end].repeat_interleave(each, dim=0)[rank * local - start * each :][:local]
    if len(own) == copies:
        return own
    return _mean(own) if own.is_floating_point() or own.is_complex() else own[:1]


def _mean(rows: Tensor) -> Tensor:
    """(1, ...): the mean, accumulated in float32 or better; of rows that are all the same, these to the bit."""
    if torch.equal(rows, rows[:1].expand_as(rows)):
        return rows[:1]
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide).mean(0, keepdim=True).to(rows.dtype)


def _statistic_rows(state: Mapping[str, Any], name: str) -> Tensor | Rows | None:
    """A running statistic of every head, or of every device; None if all heads had the one in the state_dict."""
    if name in state["statistics"]:
        rows: Tensor | Rows = state["statistics"][name]["value"]
        return rows
    found = [own for own in state["buffers"] if name in own]
    return Rows([(1, lambda own=own: own[name].unsqueeze(0)) for own in found]) if found else None  # type: ignore[misc]


def _differing_buffers(state: Mapping[str, Any]) -> list[str]:
    first, *others = state["buffers"]
    return [n for n, value in first.items() if not all(n in own and torch.equal(value, own[n]) for own in others)]


def _told(devices: int, world_size: int, merged: Mapping[str, list[str]], left: list[str]) -> str:
    """What is said of replicas, running statistics and buffers that could not go on as they were."""
    sentences = []
    some = [_counted(what, names) for what, names in merged.items() if names]
    if some:
        sentences.append(
            f"In this checkpoint, of {_counted('device', devices)}, heads have copies of {' and of '.join(some)} that"
            f" differ; here, on {_counted('device', world_size)}, they share them. So these were merged first: averaged"
            " over all heads, and their optimizer moments over the heads that share them."
        )
    if left:
        sentences.append(
            f"{_counted('buffer', left)} differed between the {devices} devices of the checkpoint: each device here"
            " goes on with those of the one that held its first head."
        )
    return " ".join(sentences)


def _counted(what: str, found: list[str] | int) -> str:
    """ "1 device", or "2 buffers (a, b)"."""
    count = found if isinstance(found, int) else len(found)
    names = "" if isinstance(found, int) else f" ({listed(found)})"
    return f"{count} {what}{'s' * (count != 1)}{names}"


def generators() -> State:
    """The states of the random streams of this process, as plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: State = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generators(state: Mapping[str, Any]) -> None:
    """The inverse of `generators`."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def local_state(explorer: Explorer, closing: bool = False, moved: Collection[str] = ()) -> State:
    """What this device holds; on one device, all that `scatter_state` needs. Where devices share out a head, a
    collective of theirs, and each has all of it.

    Args:
        explorer: whose state it is.
        closing: leave out merges that have not landed, and may never do: heads still have what they took.
        moved: names of still replicas that were written since devices last told each other; the same on all of them.
    """
    # What came into an optimizer after the last batch. The run that goes on has it from the start.
    explorer.adopt()
    # Before all else, as an exchange leaves in `Factors.error` what rounding takes.
    flights = [] if closing else [flight.state_dict() for flight in explorer.flights]
    injection = explorer.injection
    stacked = explorer.per_head
    optimizers, own = [], []
    for optimizer in explorer.optimizers:
        fields: State = {}
        states, held = explorer.substitution.states(optimizer), explorer.substitution.held(optimizer)
        for name, param in held.items():
            if param in states:
                kept = {key: value for key, value in states[param].items() if not device_state.is_own(value)}
                fields[name] = {key: _saved(param, value, param in stacked) for key, value in kept.items()}
        optimizers.append(fields)
        groups = explorer.substitution.plain_state(optimizer)["param_groups"]
        own.append(device_state.device_state(held, states, groups, optimizer))
    factors = injection.factors.values()
    several = explorer.transport.world_size > 1
    decaying = factors if explorer.config.decays_weights else ()
    # The state_dict has these. There may be many of them, as of a backbone.
    spared = [r.name for r in injection.replicas if r.still and r.name not in moved]
    nothing = torch.empty(1, 0, device="cpu")
    copies = {r.name: nothing if r.name in spared else _whole_copies(r) for r in injection.replicas}
    left = {f.name: {"value": torch.tensor([float(f.left)], dtype=torch.float64, device="cpu")} for f in decaying}
    return {
        "version": VERSION,
        "heads": explorer.config.heads,
        "devices": explorer.transport.world_size,
        "shard": explorer.config.shard,
        "seed": explorer.config.seed,
        "after_merge": explorer.config.after_merge,
        "freeze_a": explorer.config.freeze_a,
        "full_rank": explorer.full_rank,
        "optimizer_kinds": [type(optimizer).__name__ for optimizer in explorer.optimizers],
        # One head on its own proves nothing for several.
        "execution": explorer.execution if explorer.count > 1 else "auto",
        "tried": None if explorer.tried is None else dict(explorer.tried),
        "clocks": [clock.state_dict() for clock in explorer.clocks],
        "made_replicas": dict(explorer.made_replicas),
        "late": dict(explorer.late),
        "moving": explorer.moving,
        "weights": {f.name: _description(f) for f in factors},
        "outer": explorer.outer.state_dict(f.name for f in factors) if explorer.outer else {},
        "left": left,
        "wire_errors": {f.name: {"value": f.error.cpu().unsqueeze(0)} for f in factors if f.error is not None},
        "flights": flights,
        "stagger": explorer.config.stagger,
        "groups": explorer.groups_by_name(),
        "merged_steps": {f.name: f.merged_step for f in factors},
        "refreshed": {f.name: f.refreshed for f in factors},
        "anchored": {f.name: f.anchored for f in factors},
        "remainders": {f.name: f.remainder.cpu() for f in factors if f.remainder is not None},
        "base": [explorer.config.base, explorer.config.base_copy],
        "bases": {f.name: f.rounded.state_dict() for f in factors if f.rounded},
        "factors": {f.name: {k: whole(t.detach()).cpu() for k, t in _factor_tensors(f).items()} for f in factors},
        "replicas": {name: {"value": value} for name, value in copies.items()},
        "spared": spared,
        "statistics": {name: {"value": rows} for name, rows in explorer.statistics.rows().items()},
        "optimizers": optimizers,
        # On one device the state_dict has them.
        "buffers": {n: b.detach().cpu() for n, b in explorer.module.named_buffers()} if several else {},
        "own": own,
        "generators": generators(),
    }


def _description(factors: Factors) -> dict[str, Any]:
    """What has to be the same in a run that goes on with the heads of a weight."""
    shape, parts = list(factors.weight.shape), factors.matrices.count
    return {"rank": factors.rank, "scale": factors.scale, "shape": shape, "parts": parts}


def _factor_tensors(factors: Factors) -> dict[str, Tensor]:
    named = {"A": factors.A, "B": factors.B, "anchor_A": factors.anchor_A, "anchor_B": factors.anchor_B}
    return {key: tensor for key, tensor in named.items() if tensor is not None}


def _whole_copies(replica: Replica) -> Tensor:
    rows = whole(replica.trained.detach()).cpu()
    return rows.unsqueeze(0) if replica.stack is None else rows


def _saved(param: nn.Parameter, value: Any, per_head: bool) -> Any:
    """One entry of an optimizer's state: a tensor says whose its rows are, all else is kept as it is."""
    if not isinstance(value, Tensor):
        return value
    value = whole(value.detach()).cpu()
    if value.is_sparse:  # as momentum of sparse gradients is, which is as good dense: rows have to be cut out
        value = value.to_dense()
    # The factors of some optimizers' moments have the heads as dimension 0, too.
    if per_head and value.dim() == param.dim() and value.shape[0] == param.shape[0]:
        return {"heads": value}
    return {"devices": value.unsqueeze(0)}


def _joined(parts: Sequence[State]) -> State:
    """Put the rows of all devices below each other, zeros for those that lack a name; keep the first one's of what has
    no rows."""
    joined: State = {}
    for name, first in {name: own for part in reversed(parts) for name, own in part.items()}.items():
        joined[name] = {}
        for key, value in first.items():
            found = [part[name][key] if name in part else _blank(value) for part in parts]
            if isinstance(value, Mapping):
                value = {whose: torch.cat([own[whose] for own in found]) for whose in value}
            elif isinstance(value, Tensor):
                value = torch.cat(found)
            joined[name][key] = value
    return joined


def _blank(value: Any) -> Any:
    """Zeros in the place of tensors."""
    if isinstance(value, Mapping):
        return {whose: _blank(rows) for whose, rows in value.items()}
    return torch.zeros_like(value) if isinstance(value, Tensor) else value


def _joined_flight(parts: Sequence[State]) -> State:
    """A merge that had not landed, from what all devices have of it."""
    merges = [part["merge"] for part in parts]
    rows = {kind: _joined([merge["rows"][kind] for merge in merges]) for kind in merges[0]["rows"]}
    return {**parts[0], "merge": {**merges[0], "rows": rows}}


def check_version(state: Mapping[str, Any]) -> None:
    """Raise if what a checkpoint has for heads was written by a version that is yet to come.

    Raises:
        ValueError: with both versions.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"This version of lightning-lte reads heads of version {VERSION}; the checkpoint has version {version}."
            " Update lightning-lte."
        )


def check_shape(state: Mapping[str, Any]) -> None:
    """Raise if what a checkpoint has for heads is damaged, or is of a version that is yet to come.

    Raises:
        ValueError: with what is missing.
    """
    check_version(state)

    def need(holds: bool, what: str) -> None:  # asserts are left out by python -O
        if not holds:
            raise ValueError(what)

    try:
        version = state.get("version")
        need(version == VERSION, f"version {version!r}")
        heads, devices = state["heads"], state["devices"]
        for name, weight in state["weights"].items():
            factors = state["factors"][name]
            keys = {"A", "B"} if state["after_merge"] == "reset" else {"A", "B", "anchor_A", "anchor_B"}
            keys -= {"anchor_A"} if state["freeze_a"] else set()
            need(set(factors) == keys, f"factors of {name}")
            need(all(len(rows) == heads for rows in factors.values()), f"factors of {name}")
            need(all(key in weight for key in ("rank", "scale", "shape", "parts")), f"weight {name}")
        for name, replica in state["replicas"].items():
            need(len(replica["value"]) in (heads, devices), f"replica {name}")
        for optimizer in state["optimizers"]:
            for name, fields in optimizer.items():
                for value in fields.values():
                    rows = value.items() if isinstance(value, Mapping) else ()
                    need(all(len(r) == (heads if w == "heads" else devices) for w, r in rows), f"moments of {name}")
        for clock in state["clocks"]:
            need(all(isinstance(clock[key], int) for key in ("step", "merges", "last_merge")), "clocks")
        for key in (
            "shard",
            "seed",
            "made_replicas",
            "late",
            "moving",
            "spared",
            "statistics",
            "outer",
            "full_rank",
            "wire_errors",
            "flights",
            "stagger",
            "groups",
            "merged_steps",
            "refreshed",
            "anchored",
            "left",
            "remainders",
            "base",
            "bases",
            "holders",
            "own",
            "buffers",
            "generators",
            "execution",
            "tried",
            "optimizer_kinds",
        ):
            need(key in state, key)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"What the checkpoint has for heads is damaged ({type(error).__name__}: {error}). Load its weights and"
            ' start fresh heads: model.load_state_dict(torch.load(path)["state_dict"]), then fit without ckpt_path.'
        ) from error


def _check(explorer: Explorer, state: Mapping[str, Any], lost: Mapping[str, str]) -> None:
    config = explorer.config
    here = {f.name: _description(f) for f in explorer.injection.factors.values() if f.name not in lost}
    there = state["weights"]
    problems = []
    if state["heads"] not in (config.heads, *config.grow_heads.values()):
        later = f", grow_heads={dict(config.grow_heads)}" if config.grow_heads else ""
        problems.append(f"heads={state['heads']} there, heads={config.heads}{later} here")
    if state["after_merge"] != config.after_merge:
        problems.append(f"after_merge={state['after_merge']!r} there, after_merge={config.after_merge!r} here")
    if state["freeze_a"] != config.freeze_a:
        problems.append(f"freeze_a={state['freeze_a']} there, freeze_a={config.freeze_a} here")
    if state["flights"] and state["stagger"] != config.stagger:
        problems.append(f"stagger={state['stagger']} there, with merges on their way, stagger={config.stagger} here")
    if state["full_rank"] and not explorer.full_rank and any(clock.step for clock in explorer.clocks):
        problems.append("heads have not begun there, and have here")
    kinds = [type(optimizer).__name__ for optimizer in explorer.optimizers]
    if state["optimizer_kinds"] != kinds:
        problems.append(f"optimizers {', '.join(state['optimizer_kinds'])} there, {', '.join(kinds)} here")
    only_there, only_here = [n for n in there if n not in here], [n for n in here if n not in there]
    if only_there:
        problems.append(f"factored there and not here: {listed(only_there)}")
    if only_here:
        problems.append(f"factored here and not there: {listed(only_here)}")
    for key in ("rank", "scale", "shape", "parts"):
        differ = [n for n in here if n in there and there[n][key] != here[n][key]]
        if differ:
            problems.append(f"{key} {there[differ[0]][key]} there, {here[differ[0]][key]} here, for {listed(differ)}")
    replicas = {replica.name for replica in explorer.injection.replicas}
    if config.replicas != "freeze":
        replicas |= {explorer.injection.roles[w].name for w, f in explorer.injection.factors.items() if f.name in lost}
    if not problems and replicas != set(state["replicas"]):
        problems.append(f"replicas {listed(sorted(set(state['replicas']) ^ replicas))} on one side only")
    if problems:
        raise ValueError(
            "A checkpoint's heads go on only in a run with the same heads. The checkpoint (there) and this run (here)"
            " differ:\n  "
            + "\n  ".join(problems)
            + "\nResume with the checkpoint's settings, or load its weights and start fresh heads:"
            ' model.load_state_dict(torch.load(path)["state_dict"]), then fit without ckpt_path.'
        )
