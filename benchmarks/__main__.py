"""What LTE costs, measured against what one would take instead: `python -m benchmarks step|memory|merge|startup`.

Each prints one table in Markdown; `python -m benchmarks step --help` has its choices, and `--quick` is a run of seconds
that shows that it works and measures nothing. `docs/benchmarks/` has results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import memory, merge, startup, step

COMMANDS = {"step": step.main, "memory": memory.main, "merge": merge.main, "startup": startup.main}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the benchmarks."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name not in COMMANDS:
        known = name in ("-h", "--help")
        print(__doc__ if known else f"There are the benchmarks {', '.join(COMMANDS)}; received {name!r}.")
        sys.exit(0 if known else 2)
    COMMANDS[name](rest)


if __name__ == "__main__":
    main()
