"""What torch allocates on the CPU while something runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak(function: Callable[[], object], folder: Path) -> int:
    """Bytes that were allocated at once, at most, beyond those there were before.

    Of the allocator's own events, so that what operators make inside counts, too, and what the system does with freed
    memory does not.

    Args:
        function: what runs.
        folder: for the profiler's file.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held: dict[int, int] = {}
    most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[address] = size
        else:
            held.pop(address, None)
        most = max(most, sum(held.values()))
    return most
