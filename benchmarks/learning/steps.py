"""How far weights move in steps of AdamW, through heads and at full rank: `python -m benchmarks.learning.steps`.

It checks what docs/equations.md derives under "How large a step is". A small ViT has trained at full rank for a while;
then each way goes on from there on the same batches, with fresh moments and a constant learning rate, and merges once.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learning.methods import METHODS
from benchmarks.learning.settings import Settings, resolved, with_changes
from benchmarks.learning.tasks import TASKS, Batch, Data
from examples.demo import hardware

BASE: Settings = {
    "task": {"name": "vit", "patch": 14, "depth": 2},
    "method": {"name": "lte", "rank": "1/4", "heads": 1, "merge_every": 1000},
    "weight_decay": 0.0,
}
# What differs from BASE.
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("full rank", {"method": "full"}),
    ("one head", {}),
    ("one head, rank 4", {"method.rank": 4}),
    ("one head, rank 30", {"method.rank": 30}),
    ("one head, s = 1", {"method.scale": 1.0}),
    ("one head, s = 4", {"method.scale": 4.0}),
    ("one head, A 4 times as large, s = 1/2", {"extra": {"size_of_a": 4.0}}),
    ("2 heads", {"method.heads": 2}),
    ("8 heads", {"method.heads": 8}),
    ("32 heads", {"method.heads": 32}),
    ("2 heads of the whole batch each", {"method.heads": 2, "extra": {"same_data": True}}),
    ("8 heads of the whole batch each", {"method.heads": 8, "extra": {"same_data": True}}),
    ("8 replicas at full rank", {"method": "local", "method.heads": 8, "method.merge_every": 1000}),
]
OTHER_SAMPLES = "full rank, on other samples"


def moved(settings: Settings, model: nn.Module, batches: Sequence[Batch], seed: int) -> dict[str, Tensor]:
    """How the weights that heads would train change in steps on these batches, over the learning rate.

    Args:
        settings: in full.
        model: from where; it stays as it is.
        batches: one for each step.
        seed: of heads.
    """
    model = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2 and min(p.shape) > 10}
    method = METHODS[settings["method"]["name"]](model, settings, TASKS[settings["task"]["name"]].loss, seed)
    for batch in batches:
        if settings["extra"].get("same_data"):
            batch = tuple(t.repeat(settings["method"]["heads"], *[1] * (t.dim() - 1)) for t in batch)
        method.step(batch)
    method.finish()
    end = dict(model.named_parameters())
    return {name: (end[name].detach() - before) / settings["lr"] for name, before in start.items()}


def rms(change: Mapping[str, Tensor]) -> float:
    """Root mean square over all numbers of all weights."""
    return math.sqrt(sum(float(t.square().sum()) for t in change.values()) / sum(t.numel() for t in change.values()))


def cosine(change: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of the angle between two changes."""
    count = sum(t.numel() for t in change.values())
    dot = sum(float((t * other[name]).sum()) for name, t in change.items())
    return dot / (rms(change) * rms(other) * count)


def rows(data: Data, before: int, steps: int, seed: int) -> list[tuple[str, float, float, float]]:
    """Of each way: its name, the rms of the change by one step and by all steps, and the cosine of the latter to that
    of full rank.

    Args:
        data: of the task.
        before: steps at full rank at the start.
        steps: of each way after that.
        seed: of all that is drawn.
    """
    full = resolved(with_changes(BASE, {"method": "full"}))
    task = TASKS[full["task"]["name"]]
    torch.manual_seed(seed)
    model = task.model(full["task"])
    generator = torch.Generator().manual_seed(seed)
    count = before + 2 * steps
    epochs = math.ceil(count * full["batch"] / len(data.train[0]))
    order = torch.cat([torch.randperm(len(data.train[0]), generator=generator) for _ in range(epochs)])
    batches = [tuple(t[own] for t in data.train) for own in order[: count * full["batch"]].split(full["batch"])]
    first = METHODS["full"](model, full, task.loss, seed)
    for batch in batches[:before]:
        first.step(batch)
    own, others = batches[before : before + steps], batches[before + steps :]
    of_full = moved(full, model, own, seed)
    found = []
    for name, changes in [*WAYS, (OTHER_SAMPLES, {"method": "full"})]:
        settings = resolved(with_changes(BASE, changes))
        samples = others if name == OTHER_SAMPLES else own
        several = moved(settings, model, samples, seed)
        found.append((name, rms(moved(settings, model, samples[:1], seed)), rms(several), cosine(several, of_full)))
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.learning.steps", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--before", type=int, default=200, help="steps at full rank at the start (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of each way, after that (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    settings = resolved(BASE)
    data = TASKS[settings["task"]["name"]].data(settings["task"], options.data)
    print(
        f"|  | 1 step, rms / η | {options.steps} steps, rms / η | cosine to full rank |\n| --- | ---: | ---: | ---: |"
    )
    for name, one, several, angle in rows(data, options.before, options.steps, options.seed):
        print(f"| {name} | {one:.2f} | {several:.2f} | {angle:.2f} |", flush=True)
    where = f"after {options.before} steps, batch {settings['batch']}, seed {options.seed}"
    print(f"\nη = {settings['lr']}, {where}. {hardware()}, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
