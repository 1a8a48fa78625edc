"""The study of how well heads learn.

    python -m benchmarks.learning                          # which tables there are
    python -m benchmarks.learning vit-first                # run what is missing, then print
    python -m benchmarks.learning heads --print            # print what is there
    python -m benchmarks.learning heads --plot docs/learning

Start it in several terminals to use several cores: no run is done twice. Stop it when you like: finished runs are kept.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.learning import report, table
from benchmarks.learning.cache import Cache
from benchmarks.learning.settings import flattened
from benchmarks.learning.training import trained


def work(rows: table.Table, cache: Cache, seeds: Sequence[int], data: Path) -> int:
    """Do the runs that are missing and that no other process does; returns how many failed."""
    failed = 0
    # A first impression of all rows comes before the second seed of any.
    todo = [(seed, row) for seed in seeds for row in rows.rows]
    for number, (seed, row) in enumerate(todo, 1):
        if cache.get(row, seed) is not None:
            continue
        with cache.lock(row, seed) as mine:
            # Another process may have done it since it was looked for.
            if not mine or cache.get(row, seed) is not None:
                continue
            begin = time.perf_counter()
            try:
                result = trained(row.settings, seed, data)
            except Exception:
                # The next ones may do better; what was wrong with this one is for a person to see.
                failed += 1
                print(f"{row.label}, seed {seed}, {flattened(row.settings)} failed:", file=sys.stderr)
                traceback.print_exc()
                continue
            cache.put(row, seed, result)
        outcome = result["diverged"] or f"{result['metric_name']} {result['metric']}"
        print(
            f"{number}/{len(todo)} {row.label} {row.digest}-{seed}: {outcome}, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    return failed


def main(args: Sequence[str] | None = None) -> int:
    """Run, print or plot a table; returns how many runs failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help="names in tables/, or paths of YAML files")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/learning"), help="where results are kept (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="the folder of Fashion-MNIST's four files (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, help="run nothing, and write pictures to this folder")
    options = parser.parse_args(args)
    if not options.tables:
        print(
            "\n".join(
                f"{name}: {len(found.rows)} rows. {found.title}"
                for name in table.names()
                for found in [table.load(name)]
            )
        )
        return 0
    torch.set_num_threads(options.threads)
    cache = Cache(options.root)
    failed = 0
    for name in options.tables:
        rows = table.load(name)
        if not (options.print or options.plot):
            failed += work(rows, cache, range(options.seeds), options.data)
        found = report.lines(rows, cache, options.seeds)
        if options.plot:
            print("\n".join(str(path) for path in report.plot(rows, found, options.plot, Path(name).stem)))
        else:
            print(report.markdown(rows, found, options.seeds))
            print()
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
