"""Samples per second and bytes on a slow network: two processes in two network namespaces, joined by a limited link.

    python -m benchmarks.network --rate 100mbit      # as root

Each row of the table is a way to train; `benchmarks.training` has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.namespaces import INTERFACE, Joined, joined
from benchmarks.training import DEVICES, ROWS, Row

# Ethernet, IP and TCP headers of 66 bytes for each segment of 1448. An interface counts packets as it gets them: the
# kernel hands over up to 64 KiB with one header, unless the limit on the rate has cut them into segments before.
_OVERHEAD_ON_THE_WIRE = 66 / 1448


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="100mbit", help="of the link, each way, as tc takes it; 'none' for no limit")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="longest wait in the queue of the link")
    parser.add_argument("--model", default="vit_small_patch32_224", help="of timm's")
    parser.add_argument("--batch", type=int, default=32, help="samples per device and step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, a multiple of the period")
    parser.add_argument("--period", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="how often to go through all rows")
    parser.add_argument("--rows", nargs="+", default=[r.key for r in ROWS], choices=[r.key for r in ROWS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="for one row")
    parser.add_argument("--out", type=Path, help="file for all readings, JSON")
    parser.add_argument("--table", type=Path, help="print the table of such a file again, and measure nothing")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        training.serve()
        return
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.steps % args.period:
        parser.error(f"--steps must be a multiple of the period, {args.period}; received {args.steps}.")
    if args.period <= max(r.options.get("overlap", 0) for r in ROWS):
        parser.error(f"--period must be longer than the rows' overlap of 5 steps; received {args.period}.")
    # So that the namespaces are removed, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = measure(args)
    print(table(results))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all rows; what was measured is saved after each, in case a later one fails."""
    results: dict[str, Any] = {"setup": _setup(args), "runs": []}
    remaining = [row for _ in range(args.rounds) for row in ROWS if row.key in args.rows]
    count = len(remaining)
    with joined(None if args.rate == "none" else args.rate, args.latency_ms) as link:
        results["setup"]["shaping"] = link.shaping or "no limit"
        while remaining:
            with _servers(link) as servers:
                while remaining:
                    row, start = remaining.pop(0), time.perf_counter()
                    # A port that the row before may still hold is not taken again.
                    port = 29400 + count - len(remaining)
                    try:
                        results["runs"].append({"row": row.key, "devices": run_row(row, args, servers, port)})
                    except RuntimeError as error:
                        print(error, file=sys.stderr, flush=True)
                        break  # new servers: a process may wait for ever for one that is gone
                    print(f"{row.key}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                    if args.out:
                        args.out.parent.mkdir(parents=True, exist_ok=True)
                        args.out.write_text(json.dumps(results))
    return results


@contextmanager
def _servers(link: Joined) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process in each namespace that waits for rows to train; they and what they started end with the block."""
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for device, name in enumerate(link.names):
            environment = {
                **os.environ,
                "MASTER_ADDR": link.addresses[0],
                "NODE_RANK": str(device),
                "LOCAL_RANK": "0",
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONWARNINGS": "ignore",
            }
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.network", "--serve"]
            pipe = subprocess.PIPE
            servers.append(
                subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, start_new_session=True, bufsize=0)
            )
        yield servers
    finally:
        for server in servers:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def run_row(
    row: Row, args: argparse.Namespace, servers: Sequence[subprocess.Popen[bytes]], port: int
) -> list[dict[str, Any]]:
    """Train in both namespaces at the same time; returns the readings of both.

    Raises:
        RuntimeError: a process failed; what it said went to the standard error.
        TimeoutError: a process was not done in time.
    """
    options = {key: getattr(args, key) for key in ("model", "batch", "steps", "period", "rank", "seed")}
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{device}.json" for device in range(DEVICES)]
        waiting: dict[Any, int] = {}
        for device, server in enumerate(servers):
            assert server.stdin is not None and server.stdout is not None
            task = json.dumps({"row": row.key, "options": options, "out": str(outs[device]), "port": port})
            server.stdin.write(task.encode() + b"\n")
            waiting[server.stdout] = device
        deadline = time.monotonic() + args.timeout_s
        while waiting:
            ready = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise TimeoutError(f"{row.key} was not done in {args.timeout_s:g} s. Give more with --timeout-s.")
            for pipe in ready:
                line = pipe.readline().decode()
                status = training.status_of(line)
                if not line or status:
                    raise RuntimeError(f"Device {waiting[pipe]} failed in row {row.key}; what it said is above.")
                if status == 0:
                    del waiting[pipe]
        return [json.loads(out.read_text()) for out in outs]


def summary(row: Row, runs: list[list[dict[str, Any]]], batch: int, period: int) -> dict[str, Any]:
    """What the table says of a row.

    Args:
        row: which.
        runs: the readings of both devices, for each round.
        batch: samples per device and step.
        period: steps between merges; the window over which time is taken, for rows that have a period.
    """
    window = period if row.periodic else 1
    first = row.warm_up(period) - 1
    speeds, sent, computed, cpu_s, others = [], [], [], [], []
    stood_s = waited_s = all_s = 0.0
    for devices in runs:
        series = [device["readings"][first:] for device in devices]
        steps = len(series[0]) - 1
        for start in range(0, steps, window):
            pairs = [(s[start], s[start + window]) for s in series]
            speeds.append(sum(window * batch / (end["s"] - begin["s"]) for begin, end in pairs))
        own = sum(s[-1]["own_cpu_s"] - s[0]["own_cpu_s"] for s in series)
        cpu_s.append(own / steps / len(series))
        all_together = statistics.mean(s[-1]["busy_cpu_s"] - s[0]["busy_cpu_s"] for s in series)
        seconds = statistics.mean(s[-1]["s"] - s[0]["s"] for s in series)
        stood_s += sum(reading["stood_s"] for s in series for reading in s[1:])
        waited_s += sum(reading["waited_s"] for s in series for reading in s[1:])
        all_s += seconds * len(series)
        others.append(max(0.0, all_together - own) / seconds)
        sent += [(s[-1]["sent"] - s[0]["sent"]) / steps for s in series]
        computed += [(s[-1]["computed"] - s[0]["computed"]) / steps for s in series]
    known = training.computed_bytes(row, runs[0][0]["parameters"], period)
    return {
        "speed": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "windows": len(speeds),
        "sent": statistics.mean(sent),
        "computed": statistics.mean(computed) if known is None else known,
        "cpu_s": statistics.mean(cpu_s),
        "stood": stood_s / all_s,
        "waited": waited_s / all_s,
        "others": statistics.mean(others),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    setup, runs = results["setup"], results["runs"]
    summaries = {}
    for row in ROWS:
        own = [run["devices"] for run in runs if run["row"] == row.key]
        if own:
            summaries[row] = summary(row, own, setup["batch"], setup["period"])
    ddp = next((s for row, s in summaries.items() if row.key == "ddp"), None)
    lines = [
        "| row | samples/s | slowest to fastest | x DDP | bytes/step/device counted | computed | counted / computed"
        " | x DDP bytes | stood still for merges (waited) | CPU s/step | cores taken by others |",
        "| --- |" + " ---: |" * 10,
    ]
    for row, s in summaries.items():
        more = f"{s['speed'] / ddp['speed']:.2f}" if ddp else "–"
        ratio = f"{s['sent'] / s['computed']:.3f}" if s["computed"] else "–"
        still = f"{s['stood']:.1%} ({s['waited']:.1%})" if row.kind == "lte" else "–"
        fewer = f"1/{ddp['sent'] / s['sent']:.1f}" if ddp and s["sent"] else "–"
        lines.append(
            f"| {row.name} | {s['speed']:.2f} | {s['slowest']:.2f} to {s['fastest']:.2f} ({s['windows']}) | {more}"
            f" | {s['sent']:,.0f} | {s['computed']:,.0f} | {ratio} | {fewer} | {still}"
            f" | {s['cpu_s']:.2f} | {s['others']:.2f} |"
        )
    versions = ", ".join(f"{name} {value}" for name, value in setup["versions"].items())
    lines += [
        "",
        f"{setup['model']} ({runs[0]['devices'][0]['parameters']:,} parameters), {setup['batch']} samples a device,"
        f" period {setup['period']}, rank {setup['rank']}, seed {setup['seed']}; {DEVICES} processes of one thread.",
        f"Link: veth, MTU 1500, {setup['shaping']}, both ends.",
        f"Hardware: {setup['hardware']}. Versions: {versions}.",
        "samples/s: of both devices together, the median over windows (one step, or one period where steps differ;"
        " their number is in brackets). CPU s: of one device's process. Bytes: sent through the interface; as many are"
        f" received. With a header for every segment they are {_OVERHEAD_ON_THE_WIRE:.1%} more than what is sent; an"
        " interface that is given larger packets counts fewer headers.",
    ]
    return "\n".join(lines)


def _setup(args: argparse.Namespace) -> dict[str, Any]:
    setup = {key: getattr(args, key) for key in ("rate", "model", "batch", "steps", "period", "rank", "seed")}
    return {**setup, "hardware": hardware(), "versions": versions()}


def hardware() -> str:
    """The processor and its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {name}"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "Linux": platform.release().split("-")[0],
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "timm", "lightning-lte")},
    }


if __name__ == "__main__":
    main()
