"""How often heads may merge on a given link: computed, for many devices with one head each.

python -m benchmarks.links --model vit_small_patch32_224 --step-s 2.8
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm
import torch

from benchmarks.namespaces import bits_per_second
from lightning_lte import Explorer, LTEConfig
from lightning_lte.heads import Factors
from lightning_lte.payload import is_dense, sizes
from lightning_lte.transport import Transport
from lightning_lte.wire import PayloadKind, Wire

FORMULA = """\
bytes a device sends at a merge = sum over weights sent dense of 2 b (w - 1) / w     (all-reduce of b bytes in a ring)
                                + sum over weights sent as factors of f (w - 1)      (all-gather of f bytes a device)
                                + 2 r (w - 1) / w for the r bytes of all replicas, in float32
smallest period T: 8 bytes / rate <= share * T * step    (w devices, one head each; no latency, no overlap)"""

# A link, and its rate in one direction.
LINKS = {
    "50 Mbit/s": "50mbit",
    "100 Mbit/s": "100mbit",
    "1 Gbit/s": "1gbit",
    "10 Gbit/s": "10gbit",
    "100 Gbit/s": "100gbit",
    # Of an H100: 450 GB/s each way.
    "NVLink 4": "3600gbit",
}
WIRES: tuple[Wire, ...] = get_args(Wire)


@dataclass(frozen=True)
class Sent:
    """What a device sends at a merge.

    Attributes:
        bytes: all of it.
        dense: how many weights are sent as dense mean deltas.
        weights: how many there are.
    """

    bytes: int
    dense: int
    weights: int

    @property
    def payload(self) -> str:
        """In a word."""
        if self.dense in (0, self.weights):
            return "dense" if self.dense else "factors"
        return f"{self.dense} of {self.weights} dense"


@dataclass(frozen=True)
class Model:
    """What of a model travels.

    Attributes:
        name: of timm's.
        factors: of all factored weights, one head.
        replica_bytes: of all that is not factored, in float32.
        trained_bytes: of all that full-rank training would send gradients of.
    """

    name: str
    factors: Sequence[Factors]
    replica_bytes: int
    trained_bytes: int

    def merge(self, devices: int, wire: Wire = "float32", kind: PayloadKind = "auto") -> Sent:
        """What each of so many devices sends at a merge."""
        ring = Transport(devices)
        sent, dense = ring.bytes_of_sum(self.replica_bytes), 0
        for factors in self.factors:
            whole, local = sizes(factors, wire)
            if is_dense(factors, devices, wire, kind):
                sent, dense = sent + ring.bytes_of_sum(whole), dense + 1
            else:
                sent += local * (devices - 1)
        return Sent(sent, dense, len(self.factors))


def described(name: str, rank: int) -> Model:
    """What of a timm model travels, if it is trained with the default targets."""
    module = timm.create_model(name)
    trained = sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
    explorer = Explorer(module, torch.optim.AdamW(module.parameters()), LTEConfig(heads=1, rank=rank))
    factors = list(explorer.injection.factors.values())
    replicas = sum(4 * r.param.numel() for r in explorer.injection.replicas)
    explorer.close()
    return Model(name, factors, replicas, trained)


def period(sent: int, rate: float, step_s: float, share: float) -> int:
    """The fewest steps between merges with which sending takes at most a share of the time of the steps.

    Args:
        sent: bytes at each merge.
        rate: of the link, bits per second.
        step_s: seconds of a step's computation.
        share: of the step.
    """
    return max(1, math.ceil(8 * sent / rate / (share * step_s)))


def table(
    model: Model,
    step_s: float,
    share: float = 0.05,
    devices: Sequence[int] = (8, 64, 512, 4096),
    kind: PayloadKind = "auto",
) -> str:
    """Markdown: the smallest period for every number of devices, link and wire, with what is sent for weights."""
    merges = {(w, wire): model.merge(w, wire, kind) for w in devices for wire in WIRES}
    lines = ["| devices | sent at a merge | " + " | ".join(WIRES) + " |", "| ---: | --- |" + " ---: |" * len(WIRES)]
    for w in devices:
        cells = [f"{merges[w, wire].bytes / 1e6:,.1f} MB ({merges[w, wire].payload})" for wire in WIRES]
        lines.append(f"| {w} | by each device | {' | '.join(cells)} |")
    lines += [
        "",
        "| link | devices | " + " | ".join(f"T, {wire}" for wire in WIRES) + " | DDP: sending, in steps |",
        "| --- | ---: |" + " ---: |" * (len(WIRES) + 1),
    ]
    for name, text in LINKS.items():
        rate = bits_per_second(text)
        for w in devices:
            cells = [f"{period(merges[w, wire].bytes, rate, step_s, share):,}" for wire in WIRES]
            ddp = 8 * Transport(w).bytes_of_sum(model.trained_bytes) / rate / step_s
            lines.append(f"| {name} | {w} | {' | '.join(cells)} | {ddp:,.3g} |")
    return "\n".join(lines)


def check(model: Model, results: dict[str, Any]) -> str:
    """Markdown: the computed bytes and times of merges beside those that `benchmarks.network` measured."""
    setup = results["setup"]
    rate = bits_per_second(setup["rate"])
    lines = [
        "| row | MB at a merge, computed | counted | seconds on the link, computed | waited, measured |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for wire in WIRES:
        runs = [run["devices"] for run in results["runs"] if run["row"] == f"lte-{wire}"]
        if not runs:
            continue
        sent = model.merge(len(runs[0]), wire).bytes
        counted, waited = [], []
        for devices in runs:
            readings = [device["readings"][-setup["steps"] - 1 :] for device in devices]
            merges = setup["steps"] // setup["period"]
            counted += [(r[-1]["sent"] - r[0]["sent"]) / merges for r in readings]
            # Devices wait for each other, too: the one that came last waited for the link alone.
            for step in zip(*readings, strict=True):
                waited += [min(own["waited_s"] for own in step)] if step[0]["waited_s"] else []
        lines.append(
            f"| LTE {wire} | {sent / 1e6:.2f} | {statistics.mean(counted) / 1e6:.2f} | {8 * sent / rate:.2f}"
            f" | {statistics.median(waited):.2f} |"
        )
    return "\n".join(lines)


def measured_step_s(name: str, batch: int, rank: int, steps: int = 5) -> float:
    """Seconds of a training step with one head in this process, with one thread; the median."""
    torch.set_num_threads(1)
    module: Any = timm.create_model(name)
    explorer = Explorer(module, torch.optim.AdamW(module.parameters()), LTEConfig(heads=1, rank=rank))
    images = torch.randn(batch, *module.default_cfg["input_size"])
    labels = torch.randint(module.num_classes, (batch,))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        with explorer.heads():
            loss = torch.nn.functional.cross_entropy(module(images), labels)
        with explorer.backward():
            loss.backward()
        explorer.after_backward()
        explorer.optimizers[0].step()
        explorer.optimizers[0].zero_grad()
        explorer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_small_patch32_224", help="of timm's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--step-s", type=float, help="seconds of a step's computation; without it, measured here")
    parser.add_argument("--batch", type=int, default=32, help="samples per device, where the step is measured")
    parser.add_argument("--share", type=float, default=0.05, help="of the step that communication may take")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--payload", default="auto", choices=get_args(PayloadKind))
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="compare with files of benchmarks.network")
    args = parser.parse_args(arguments)
    model = described(args.model, args.rank)
    for path in args.check:
        results = json.loads(path.read_text())
        print(f"{results['setup']['rate']}:\n\n{check(model, results)}\n")
    if args.check:
        return
    step_s = measured_step_s(args.model, args.batch, args.rank) if args.step_s is None else args.step_s
    print(f"{FORMULA}\n")
    print(f"{args.model}, rank {args.rank}, {step_s:.3g} s a step, communication at most {args.share:.0%} of it\n")
    print(table(model, step_s, args.share, args.devices, args.payload))


if __name__ == "__main__":
    main()
