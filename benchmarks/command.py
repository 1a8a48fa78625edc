"""What the commands of `python -m benchmarks` have in common."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.subject import Subject
from benchmarks.table import Row, setting, table
from benchmarks.times import counts_processor_time

# What a model may be.
NAMED = "a name in timm, or the path of a Python file, see benchmarks/subject.py"
# Choices that are numbers: one, or several.
_NUMBERS = ("batch", "heads", "rank", "ranks", "depth", "rounds", "threads", "devices")


def of_one_model(
    name: str,
    description: str | None,
    measure: Callable[[Any, torch.device], list[Row]],
    rounds: int,
    arguments: Sequence[str] | None,
) -> list[Row]:
    """Measure one model through heads, and print the table.

    Args:
        name: of the command.
        description: for its help.
        measure: makes the rows from the choices and the device.
        rounds: the default.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=description)
    parser.add_argument("--model", default="vit_base_patch16_224", help=f"{NAMED} (default: %(default)s)")
    parser.add_argument("--depth", type=int, help="blocks of the model, for a quicker run (default: its own)")
    parser.add_argument("--batch", type=int, default=32, help="samples, a multiple of the heads (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--after-merge", default="keep", choices=["keep", "reset"], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; with 1, processor time is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="other defaults, which show in seconds that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(model="test_vit", batch=4, heads=2, rounds=2)
        options = parser.parse_args(arguments)
    check(parser, options)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    rows = measure(options, device)
    show(rows, options, device, start)
    return rows


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with one of the parser's messages where the choices leave nothing to measure.

    Args:
        parser: of the command.
        options: what it was given, of `model` or `models`, `depth`, `batch`, `heads` ... those that the command has.
    """
    given = vars(options).items()
    chosen = {key: value if isinstance(value, list) else [value] for key, value in given if value is not None}
    for key in _NUMBERS:
        if any(number < 1 for number in chosen.get(key, ())):
            parser.error(f"--{key} must be at least 1; received {', '.join(map(str, chosen[key]))}")
    # Others take turns, and there is nothing to prove: what is measured would be something else.
    if any(options.batch % heads for heads in chosen.get("heads", ())):
        received = ", ".join(map(str, chosen["heads"]))
        parser.error(f"--batch must be a multiple of all --heads; received {options.batch} and {received}")
    for name in chosen.get("model", []) + chosen.get("models", []):
        try:
            Subject.of(name, vars(options).get("depth"))
        except ValueError as error:
            parser.error(str(error))


def show(rows: Sequence[Row], options: Any, device: torch.device, start: float) -> None:
    """Print the table, and what it was made with since `time.perf_counter()` was `start`."""
    print(table(rows))
    clock = "processor" if counts_processor_time(device) else "wall"
    print(f"\nAdamW, {options.rounds} rounds, {clock} time. {setting(options.seed, start)}")
