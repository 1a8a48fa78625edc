"""What a run needs beside the merged weights to go on exactly where it stopped: dictionaries out, dictionaries in.

The dictionaries hold tensors and plain values only, so `torch.load(..., weights_only=True)` reads them. Tensors that
differ between heads or devices have these as dimension 0, over all devices in the order of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lte.report import listed

if TYPE_CHECKING:
    from lightning_lte.explorer import Explorer

VERSION = 1

State = dict[str, Any]


def gather_state(explorer: Explorer, local: State) -> State | None:
    """Everything of all devices, on rank 0; None on the others. A collective: every device has to call it.

    Args:
        explorer: whose state it is.
        local: this device's `local_state`.
    """
    gathered = explorer.transport.gather(local)
    if gathered is None:
        return None
    first = gathered[0]
    return {
        "version": VERSION,
        "heads": explorer.config.heads,
        "devices": explorer.transport.world_size,
        "after_merge": explorer.config.after_merge,
        # One head on its own proves nothing for several.
        "execution": explorer.execution if explorer.count > 1 else "auto",
        "clocks": first["clocks"],
        "made_replicas": first["made_replicas"],
        "weights": first["weights"],
        "remainders": first["remainders"],
        "factors": _joined([own["factors"] for own in gathered]),
        "replicas": _joined([own["replicas"] for own in gathered]),
        "optimizers": [_joined(list(each)) for each in zip(*(own["optimizers"] for own in gathered), strict=True)],
        "buffers": [own["buffers"] for own in gathered],
        "generators": [own["generators"] for own in gathered],
    }


def scatter_state(explorer: Explorer, state: Mapping[str, Any]) -> None:
    """Take this device's part of what `gather_state` returned; all checks come before the first change.

    Raises:
        ValueError: the state is of other heads, ranks, targets or a newer version.
    """
    lost = {name: why for name, why in state["made_replicas"].items() if name not in explorer.made_replicas}
    _check(explorer, state, lost)
    if lost:
        explorer.make_replicas(lost)
    if explorer.execution == "auto" and state["execution"] != "auto":
        go = explorer.go_sequential if state["execution"] == "sequential" else explorer.go_batched
        go("as in the checkpoint")
    for clock, saved_clock in zip(explorer.clocks, state["clocks"], strict=True):
        clock.load_state_dict(saved_clock)
    heads, transport = explorer.config.heads, explorer.transport

    def mine(rows: Tensor, copies: int) -> Tensor:
        return rows_for(rows, heads, transport.world_size, transport.rank, copies)

    with torch.no_grad():
        for f in explorer.injection.factors.values():
            saved = state["factors"][f.name]
            for key, tensor in _factor_tensors(f).items():
                tensor.copy_(mine(saved[key], f.count))
            if f.remainder is not None:
                f.remainder.copy_(state["remainders"][f.name])
        for replica in explorer.injection.replicas:
            own = mine(state["replicas"][replica.name]["value"], len(replica.copies))
            replica.trained.copy_(own if replica.stack is not None else own[0])
        buffers = dict(explorer.module.named_buffers())
        for name, value in state["buffers"][min(transport.rank, len(state["buffers"]) - 1)].items():
            if name in buffers:
                buffers[name].copy_(value)
    stacked = explorer.per_head
    for optimizer, saved_fields in zip(explorer.optimizers, state["optimizers"], strict=True):
        held = explorer.substitution.held(optimizer)
        for name, fields in saved_fields.items():
            param = held.get(name)
            if param is None:
                continue
            copies = explorer.count if param in stacked else 1
            state_here = {key: _restored(param, value, mine, copies) for key, value in fields.items()}
            explorer.substitution.set_state(optimizer, param, state_here)
    explorer.guard.accept_writes()


def rows_for(rows: Tensor, heads: int, world_size: int, rank: int, copies: int) -> Tensor:
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
    if len(rows) != copies * world_size:
        rows = rows.repeat_interleave(heads // len(rows), dim=0)
    own = rows.tensor_split(world_size)[rank]
    if len(own) == copies:
        return own
    return own.mean(0, keepdim=True) if own.is_floating_point() else own[:1]


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


def local_state(explorer: Explorer) -> State:
    """What this device holds."""
    injection, rank = explorer.injection, explorer.transport.rank
    stacked = explorer.per_head
    optimizers = []
    for optimizer in explorer.optimizers:
        fields: State = {}
        states = explorer.substitution.states(optimizer)
        for name, param in explorer.substitution.held(optimizer).items():
            if param in states:
                fields[name] = {key: _saved(param, value, param in stacked) for key, value in states[param].items()}
        optimizers.append(fields)
    factors = injection.factors.values()
    several = explorer.transport.world_size > 1
    return {
        "clocks": [clock.state_dict() for clock in explorer.clocks],
        "made_replicas": dict(explorer.made_replicas),
        "weights": {f.name: {"rank": f.rank, "scale": f.scale, "shape": list(f.weight.shape)} for f in factors},
        "remainders": {f.name: f.remainder.cpu() for f in factors if f.remainder is not None} if rank == 0 else {},
        "factors": {f.name: {k: t.detach().cpu() for k, t in _factor_tensors(f).items()} for f in factors},
        "replicas": {replica.name: {"value": replica.copies.cpu()} for replica in injection.replicas},
        "optimizers": optimizers,
        # On one device the state_dict has them.
        "buffers": {n: b.detach().cpu() for n, b in explorer.module.named_buffers()} if several else {},
        "generators": generators(),
    }


def _factor_tensors(factors: Any) -> dict[str, Tensor]:
    named = {"A": factors.A, "B": factors.B, "anchor_A": factors.anchor_A, "anchor_B": factors.anchor_B}
    return {key: tensor for key, tensor in named.items() if tensor is not None}


def _saved(param: nn.Parameter, value: Any, stacked: bool) -> Any:
    if isinstance(value, Tensor) and value.shape == param.shape and value.dim():
        return value.detach().cpu() if stacked else value.detach().cpu().unsqueeze(0)
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _restored(param: nn.Parameter, value: Any, mine: Any, copies: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() and value.shape[-param.dim() :] == param.shape and value.dim() == param.dim() + 1:
        return mine(value, 1)[0].to(param.device)
    if value.dim() == param.dim() and value.shape[1:] == param.shape[1:] and copies == param.shape[0]:
        return mine(value, copies).to(param.device).clone()
    return value.clone()


def _joined(parts: Sequence[State]) -> State:
    """Concatenate along dimension 0 the tensors that have one; keep rank 0's of all else."""
    joined: State = {}
    for name in parts[0]:
        joined[name] = {}
        for key, value in parts[0][name].items():
            tensors = [part[name][key] for part in parts if name in part]
            joined[name][key] = torch.cat(tensors) if isinstance(value, Tensor) and value.dim() else value
    return joined


def _check(explorer: Explorer, state: Mapping[str, Any], lost: Mapping[str, str]) -> None:
    if state.get("version", 0) > VERSION:
        raise ValueError(
            f"This version of lightning-lte reads heads of version {VERSION}; the checkpoint has version"
            f" {state['version']}. Update lightning-lte."
        )
    config = explorer.config
    here = {
        f.name: {"rank": f.rank, "scale": f.scale, "shape": list(f.weight.shape)}
        for f in explorer.injection.factors.values()
        if f.name not in lost
    }
    there = state["weights"]
    problems = []
    if state["heads"] != config.heads:
        problems.append(f"heads={state['heads']} there, heads={config.heads} here")
    if state["after_merge"] != config.after_merge:
        problems.append(f"after_merge={state['after_merge']!r} there, after_merge={config.after_merge!r} here")
    if len(state["optimizers"]) != len(explorer.optimizers):
        problems.append(f"{len(state['optimizers'])} optimizers there, {len(explorer.optimizers)} here")
    only_there, only_here = [n for n in there if n not in here], [n for n in here if n not in there]
    if only_there:
        problems.append(f"factored there and not here: {listed(only_there)}")
    if only_here:
        problems.append(f"factored here and not there: {listed(only_here)}")
    for key in ("rank", "scale", "shape"):
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
