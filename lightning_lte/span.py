"""Names for what a profiler shows of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def span(name: str) -> AbstractContextManager[Any]:
    """A block that torch.profiler shows as "lte::" and the name; nothing while no profiler runs.

    A span costs microseconds, of which a step has as many as it has layers, and torch.compile would warn of each.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(f"lte::{name}")
