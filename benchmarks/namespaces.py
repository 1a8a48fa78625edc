"""Two network namespaces of Linux, joined by a link of a given rate."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# The name of the interface in both namespaces.
INTERFACE = "lte0"
_PREFIX = "lte-bench-"


@dataclass(frozen=True)
class Joined:
    """Two namespaces that can reach each other.

    Attributes:
        names: of the namespaces.
        addresses: of their ends of the link.
        shaping: what limits the rate, as `tc` takes it; None for no limit.
    """

    names: tuple[str, str]
    addresses: tuple[str, str]
    shaping: str | None


@contextmanager
def joined(rate: str | None, latency_ms: float = 50.0) -> Iterator[Joined]:
    """Make two namespaces joined by a veth pair; they are gone when the block ends, whatever happens in it.

    Args:
        rate: in the words of `tc`, such as "100mbit", limits each direction; None is as fast as the machine.
        latency_ms: how long a packet may wait for its turn before it is dropped. No delay is added.

    Raises:
        PermissionError: not root.
        RuntimeError: `ip` or `tc` refused; with what it said.
    """
    if os.geteuid() != 0:
        raise PermissionError("Network namespaces are made by root only; run this as root.")
    _remove_left_behind()
    names = (f"{_PREFIX}{os.getpid()}-0", f"{_PREFIX}{os.getpid()}-1")
    addresses = ("10.77.0.1", "10.77.0.2")
    shaping = None
    if rate is not None:
        # A bucket of 64 KiB lets the kernel hand over as many packets at once as it does to a real card; at high rates
        # it takes a millisecond's worth, or the timer can't keep up.
        burst = max(65536, int(bits_per_second(rate) / 8 / 1000))
        shaping = f"tbf rate {rate} burst {burst} latency {latency_ms:g}ms"
    try:
        for name in names:
            _run(f"ip netns add {name}")
        _run(f"ip link add {INTERFACE} netns {names[0]} type veth peer name {INTERFACE} netns {names[1]}")
        for name, address in zip(names, addresses, strict=True):
            _run(f"ip -n {name} addr add {address}/24 dev {INTERFACE}")
            _run(f"ip -n {name} link set lo up")
            _run(f"ip -n {name} link set {INTERFACE} up")
            if shaping:
                _run(f"ip netns exec {name} tc qdisc add dev {INTERFACE} root {shaping}")
        yield Joined(names, addresses, shaping)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def bits_per_second(rate: str) -> float:
    """What a rate such as "100mbit" means.

    Raises:
        ValueError: it is of another form.
    """
    for unit, size in {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * size
    raise ValueError(f"A rate is a number with kbit, mbit or gbit; received {rate!r}. Give 100mbit, for instance.")


def _remove_left_behind() -> None:
    """Remove the namespaces of runs that were killed before they could do so."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(_PREFIX)):
        if not os.path.exists(f"/proc/{name.removeprefix(_PREFIX).split('-')[0]}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{command}` failed: {done.stderr.strip()}")
