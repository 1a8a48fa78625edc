"""The memory of a training step through heads, by default one: `python -m benchmarks memory`.

Each way to train runs in a process of its own: what it holds is counted, and peaks are measured, on a CPU as the
resident set beyond what the process had before. Full rank under DDP holds its gradients a second time, in buckets;
under FSDP2 a device holds its share of everything, and one block whole. These two are computed from what was counted.

There is a peak of starting up, with the first steps, in which weights are watched, and one of steps and merges after
them. On a CPU each is measured twice: as the C library's allocator has it, which keeps much of what was freed, and with
glibc "in use", where its threshold for mappings (`MALLOC_MMAP_THRESHOLD_`) is so low that it gives back what was freed.

With `--devices K` nothing is computed: K processes on the CPU, which talk over gloo, train at full rank under torch's
DDP and FSDP2, with one head on each, and as one group that shares out one head. Each figure is that of the process that
has most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bound import uses
from benchmarks.command import NAMED, check
from benchmarks.step import Heads, Plain
from benchmarks.subject import Subject
from benchmarks.table import Row, setting, table
from lightning_lte import Transport
from lightning_lte.execution import run
from lightning_lte.sharding import Sharding, blocks
from lightning_lte.shards import local

# One head of rank 64 on each device, a ViT-L: weights, gradients and moments, over full rank's.
GOAL = 0.40
# For FSDP2, where it is computed.
DEVICES = 8
# Ways to train on several devices: at full rank, and with "keep" or "reset".
FULL_RANK = DDP, FSDP2 = "under DDP", "under FSDP2"
SHARED = "one head that all share out"
HEADS = "a head on each device", SHARED
# What a device has when a backward ends.
HELD = ("weights", "gradients", "buckets", "moments", "factors", "anchors")
# Two in which weights are watched, and moments are made; then as many as come before a merge, and after it.
SETTLING, STEPS = 2, 2
# glibc: bytes from which on a block is mapped by itself, and given back when it is freed.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Counts = dict[str, float]


def count(way: str, options: Any) -> Counts:
    """Train in one way, and count bytes. With several devices, each of them has to call it.

    Args:
        way: "full rank", "keep" or "reset"; with several devices as `ways` has them.
        options: of the command.

    Returns:
        Bytes by what they are for.
    """
    alone = options.devices == 1
    device = torch.device("cuda" if torch.cuda.is_available() and alone else "cpu")
    rank = 0 if alone else dist.get_rank()
    subject = Subject.of(options.model)
    batch = subject.batch(options.batch, device, options.seed + rank)
    before = _begin_peak(device)
    trained = _make(way, subject, options, device, rank)
    model = trained.model
    for _ in range(SETTLING):
        trained.step(batch)
    counts: Counts = {"weights": _bytes(model.parameters()), "peak of starting up": _peak(device) - before}
    _begin_peak(device)
    for _ in range(STEPS):
        trained.step(batch)
    factors: list[Any] = []
    copies: list[Tensor] = []  # of replicas of which each head has its own
    if isinstance(trained, Heads):
        trained.explorer.merge()
        factors = list(trained.explorer.injection.factors.values())
        copies = [r.stack for r in trained.explorer.injection.replicas if r.stack is not None]
        counts["weights"] += _bytes(copies)
        counts["in turns"] = float(trained.explorer.execution == "sequential")
    for _ in range(STEPS):
        trained.step(batch)
    counts["peak of steps and merges"] = _peak(device) - before

    counts["factors"] = _bytes(t for f in factors for t in (f.A, f.B))
    counts["anchors"] = _bytes(t for f in factors for t in (f.anchor_A, f.anchor_B) if t is not None)
    states = trained.optimizer.state
    counts["moments"] = _bytes(t for state in states.values() for t in state.values() if isinstance(t, Tensor))
    counts["moments of factored weights"] = _bytes(t for f in factors for t in states.get(f.weight, {}).values())
    own = [t for f in factors for t in (f.A, f.B, f.anchor_A, f.anchor_B) if t is not None]
    counts |= _of_a_step(trained, batch, [*model.parameters(), *model.buffers(), *own, *copies])
    counts["gradients of factored weights"] = _bytes(f.weight.grad for f in factors if f.weight.grad is not None)
    counts["largest of a head over its weight"] = max(
        (t.numel() / f.count / f.weight.numel() for f in factors for t in (f.A, f.B)), default=0.0
    )
    if factors and alone:
        found = uses(trained.explorer.injection, model, lambda: subject.loss(model, batch))  # type: ignore[union-attr]
        counts["rank-sized activations"] = sum(use.tokens * use.rank * 4 for use in found)
    counts["largest block"] = max(_bytes(block.parameters()) for block in blocks(model) or [model])
    if isinstance(model, DistributedDataParallel):
        # As it has told the sizes of its buckets since its first step.
        sizes = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
        counts["buckets"] = float(sum(int(size) for size in str(sizes).split(",")))
    counts["held"] = sum(counts.get(key, 0.0) for key in HELD)
    return counts


def _make(way: str, subject: Subject, options: Any, device: torch.device, rank: int) -> Plain | Heads:
    """A model that trains in one way; each process makes all of it first, as scripts do that were written for one."""
    model = subject.model(device, options.seed)
    what, _, how = way.partition(", ")
    if how == DDP:
        model = DistributedDataParallel(model)
    elif how == FSDP2:
        mesh = init_device_mesh(device.type, (options.devices,))
        for unit in (*blocks(model), model):
            fsdp.fully_shard(unit, mesh=mesh)
    if what == "full rank":
        return Plain(model, subject.loss, device)
    transport = Transport(options.devices, rank)
    if how == SHARED:
        transport = Transport.sharing(options.devices, options.devices, rank)
        Sharding(model, transport, device)
    after_merge: Any = what
    heads = max(options.heads, transport.world_size)
    return Heads(model, subject.loss, device, heads, options.rank, after_merge, options.seed, transport=transport)


def ways(options: Any) -> list[str]:
    """Those to train on several devices."""
    return [
        *(f"full rank, {how}" for how in FULL_RANK),
        *(f"{after_merge}, {how}" for after_merge in options.after_merge for how in HEADS),
    ]


def _of_a_step(trained: Plain | Heads, batch: Any, held: Iterable[Tensor]) -> Counts:
    """Bytes of gradients, and of what a forward keeps for its backward and nobody else holds."""
    known = {local(t).untyped_storage().data_ptr() for t in held}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        if isinstance(trained, Heads):
            loss = run(trained.explorer, lambda own: trained.loss(trained.model, own), batch)
        else:
            loss = trained.loss(trained.model, batch)
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    kept.clear()
    if isinstance(trained, Heads):
        with trained.explorer.backward():
            loss.backward()
        trained.explorer.after_backward()
    else:
        loss.backward()
    params = {p for group in trained.optimizer.param_groups for p in group["params"]} | set(trained.model.parameters())
    return {"activations": float(activations), "gradients": _bytes(p.grad for p in params if p.grad is not None)}


def _bytes(tensors: Iterable[Tensor]) -> float:
    """Of this device's parts, where devices share tensors out."""
    return float(sum(local(t).nbytes for t in tensors))


def _begin_peak(device: torch.device) -> float:
    """Let `_peak` count from now on, where the system can; bytes now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):  # it takes a kernel that has it
            Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        # A process inherits the maximum that getrusage tells from the one that started it.
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _apart(way: str, options: Any) -> Counts:
    """What is counted in a process of its own, or in several: the most that one of them has."""
    command = [sys.executable]
    if options.devices > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.devices}"]
    command += ["-m", "benchmarks", "memory", "--one", way, "--model", options.model]
    command += ["--batch", str(options.batch), "--rank", str(options.rank), "--seed", str(options.seed)]
    command += ["--threads", str(options.threads), "--devices", str(options.devices), "--heads", str(options.heads)]

    def counted(**more: str) -> Counts:
        environment = os.environ | more
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        found: Counts = json.loads(done.stdout.splitlines()[-1])
        return found

    counts = counted()
    on_cpu = options.devices > 1 or not torch.cuda.is_available()
    # One process shows in a quick run that this works, too; several take long to start.
    skipped = options.quick and options.devices > 1
    if platform.libc_ver()[0] == "glibc" and on_cpu and not skipped:
        mapped = counted(**MAPPED)
        counts |= {f"{name}, in use": mapped[name] for name in _peaks(mapped)}
    return counts


def _here(way: str, options: Any) -> None:
    """Count in this process, and print it; if it is one of several, the first prints the most that one of them has."""
    if options.devices == 1:
        print(json.dumps(count(way, options)))
        return
    dist.init_process_group("gloo")
    every = Transport(options.devices, dist.get_rank()).gather(count(way, options))
    if every is not None:
        print(json.dumps({name: max(counts[name] for counts in every) for name in every[0]}), flush=True)
    dist.destroy_process_group()
    # Python's own end would abort some processes under FSDP2: gloo's threads still hold tensors then.
    os._exit(0)


def rows_of(way: str, own: Counts, full: Counts, options: Any) -> list[Row]:
    """What a device with heads holds, over what full rank does."""
    name = Subject.of(options.model).name
    what = f"{name}, batch {options.batch}, heads {options.heads}, rank {options.rank}, {way}"
    what += ", in turns" if own["in turns"] else ""
    whole = full["weights"] + full["gradients"] + full["moments"]
    held = own["held"]
    sharded = whole / DEVICES + 2 * full["largest block"]

    def row(figure: str, above: float, below: float, **more: Any) -> Row:
        return Row(what, figure, [above / below], f"{above / 2**20:.0f} MiB", **more)

    large = options.model.startswith("vit_large") and options.rank == 64 and options.heads == 1
    of_weights = {"weights": own["weights"], **{k: own[k] for k in ("factors", "anchors", "gradients", "moments")}}
    return [
        row("all but activations / full rank's", held, whole, goal=GOAL if large else None),
        *(row(f"{name} / all of full rank's", value, whole) for name, value in of_weights.items()),
        row("all but activations / full rank's under DDP, computed", held, whole + full["gradients"]),
        row(f"all but activations / full rank's under FSDP2 on {DEVICES} devices, computed", held, sharded),
        *(
            Row(what, f"{key} / all of full rank's", [own[key] / whole], "0 MiB" if not own[key] else "", goal=0.0)
            for key in ("gradients of factored weights", "moments of factored weights")
        ),
        Row(what, "largest tensor of a head / its weight", [own["largest of a head over its weight"]], goal=0.999),
        row(
            "activations / full rank's",
            own["activations"],
            full["activations"],
            bound=1 + own["rank-sized activations"] / full["activations"],
            within=1.0,
        ),
        *(row(f"{name} / full rank's", own[name], full[name]) for name in _peaks(own)),
    ]


def rows_of_devices(found: dict[str, Counts], options: Any) -> list[Row]:
    """What a device has in each way to train, over what it has at full rank."""
    rows, name = [], Subject.of(options.model).name
    for way, own in found.items():
        what = f"{name}, batch {options.batch}, rank {options.rank}, {options.devices} devices, {way}"
        figures = {"all but activations": "held"} | {name: name for name in _peaks(own)}
        for figure, key in figures.items():
            for how in FULL_RANK:
                other = f"full rank, {how}"
                if other != way:
                    ratio = own[key] / found[other][key]
                    rows.append(Row(what, f"{figure} / full rank's {how}", [ratio], f"{own[key] / 2**20:.0f} MiB"))
    return rows


def parts(way: str, own: Counts) -> str:
    """What a device holds in one way, in words."""
    held = ", ".join(f"{own[key] / 2**20:.0f} of {key}" for key in HELD if own.get(key))
    return f"- {way}: {held}; {own['activations'] / 2**20:.0f} that a forward keeps for its backward."


def _peaks(counts: Counts) -> list[str]:
    return [name for name in counts if name.startswith("peak")]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Count, and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks memory", description=__doc__)
    parser.add_argument("--model", default="vit_large_patch16_224", help=f"{NAMED} (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples on a device (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=1, help="on one device (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--after-merge", nargs="+", default=["keep", "reset"], choices=["keep", "reset"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="other defaults, which show in seconds that it works")
    parser.add_argument(
        "--devices", type=int, default=1, help="processes that train together, on the CPU (default: %(default)s)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(model="test_vit", batch=2, rank=4, after_merge=["keep"])
        options = parser.parse_args(arguments)
    check(parser, options)
    if options.heads > 1 and options.devices > 1:
        parser.error(f"--heads is for one device; received {options.heads} with --devices {options.devices}")
    torch.set_num_threads(options.threads)
    if options.one:
        _here(options.one, options)
        return []
    start = time.perf_counter()
    if options.devices > 1:
        found = {way: _apart(way, options) for way in ways(options)}
        rows = rows_of_devices(found, options)
        remark = "\n".join(["What a device holds, in MiB:\n", *(parts(way, own) for way, own in found.items()), "\n"])
    else:
        full = _apart("full rank", options)
        rows = [row for way in options.after_merge for row in rows_of(way, _apart(way, options), full, options)]
        peaks = "; ".join(f"{name} {full[name] / 2**20:.0f} MiB" for name in _peaks(full))
        remark = (
            f"Full rank, AdamW: {full['held'] / 2**20:.0f} MiB of weights, gradients and moments,"
            f" {full['activations'] / 2**20:.0f} MiB of activations; {peaks}. "
        )
    print(f"{table(rows)}\n\n{remark}{setting(options.seed, start)}")
    return rows
