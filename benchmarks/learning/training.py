"""One run of the study: a configuration and a seed in, a result out."""

from __future__ import annotations

import copy
import functools
import math
import os
import platform
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.learning.methods import METHODS, Method
from benchmarks.learning.settings import Settings
from benchmarks.learning.tasks import TASKS, Batch, Task
from examples.demo import hardware
from lightning_lte.metrics import effective_rank

POINTS = 50  # of a loss curve
# Effective ranks are those of gradients of so many training samples, and of weights with so many rows and columns.
RANK_SAMPLES, RANK_WIDTH = 512, 32


def factor(step: int, steps: int, warmup: int) -> float:
    """The learning rate's share of its peak: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trained(settings: Settings, seed: int, data_root: Path) -> dict[str, Any]:
    """Train once.

    Args:
        settings: in full.
        seed: of the model's start, of the order of samples, and of heads.
        data_root: the folder of Fashion-MNIST.

    Returns:
        What is kept in the cache, plain values only. With "ranks", evaluations have mean effective ranks: of the
        gradient at full rank of some training samples, of weights, and of what was added to them.
    """
    task = TASKS[settings["task"]["name"]]
    data = task.data(settings["task"], data_root)
    torch.manual_seed(seed)
    model = task.model(settings["task"])
    if task.start is not None:
        task.start(model, settings["task"], data_root)
    start = copy.deepcopy(model) if settings["ranks"] else None
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    method: Method = METHODS[settings["method"]["name"]](model, settings, task.loss, seed)

    size, batch = len(data.train[0]), settings["batch"]
    per_epoch = size // batch
    steps = round(settings["epochs"] * per_epoch)
    evaluate_at = {round(steps * (i + 1) / settings["evaluations"]) for i in range(settings["evaluations"])} - {steps}
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0)
    losses: list[torch.Tensor] = []
    curve: list[dict[str, float]] = []
    evaluations: list[dict[str, float | None]] = []
    diverged: str | None = None

    def evaluate() -> None:
        with method.evaluated() as evaluated:
            measured = task.measure(evaluated, data.test)
            found = {} if start is None else effective_ranks(task, evaluated, start, data.train)
        point = {"samples": method.steps * batch, "bytes": method.sent}
        evaluations.append({**point, "metric": measured if math.isfinite(measured) else None, **found})

    for step in range(steps):
        # The last samples of an epoch that are no full batch are left out: all methods see the same.
        if step % per_epoch == 0:
            order = torch.randperm(size, generator=generator)
        method.set_lr(factor(step, steps, settings["warmup"]))
        chosen = order[step % per_epoch * batch :][:batch]
        try:
            losses.append(method.step(tuple(t[chosen] for t in data.train)))
        except FloatingPointError as error:
            diverged = f"step {step}: {error}"
            break
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            mean = float(torch.stack(losses).mean())
            losses = []
            if not math.isfinite(mean):
                diverged = f"step {step}: the loss is {mean}"
                break
            curve.append({"samples": (step + 1) * batch, "bytes": method.sent, "loss": mean})
        if step + 1 in evaluate_at:
            evaluate()
    if diverged is None:
        try:
            method.finish()
            evaluate()
        except FloatingPointError as error:
            diverged = f"at the end: {error}"
    last = curve[-5:]
    return {
        "settings": settings,
        "seed": seed,
        "metric_name": task.metric,
        "metric": None if diverged else evaluations[-1]["metric"],
        "loss": sum(point["loss"] for point in last) / len(last) if last and not diverged else None,
        "diverged": diverged,
        "parameters": parameters,
        "steps": method.steps,
        "samples": method.steps * batch,
        "bytes": method.sent,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "notes": method.notes,
        "curve": curve,
        "evaluations": evaluations,
        "hardware": hardware(),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "commit": commit(),
        },
    }


def effective_ranks(task: Task, evaluated: nn.Module, start: nn.Module, train: Batch) -> dict[str, float]:
    """Mean effective ranks of a model's weights, of what was added to them since the start, and of their gradient.

    Args:
        task: whose loss it is.
        evaluated: the model as it is now, merged.
        start: the model as it was; it stays so.
        train: samples, of which the first ones are taken.
    """
    plain = copy.deepcopy(start)
    plain.load_state_dict(evaluated.state_dict())
    task.loss(plain, tuple(t[:RANK_SAMPLES] for t in train)).backward()
    pairs = [(now, then) for now, then in zip(plain.parameters(), start.parameters(), strict=True) if now.dim() > 1]
    pairs = [(now, then) for now, then in pairs if min(now.flatten(1).shape) >= RANK_WIDTH]
    of: dict[str, list[Tensor | None]] = {
        "gradient_rank": [now.grad for now, _ in pairs],
        "weight_rank": [now.detach() for now, _ in pairs],
        "learned_rank": [(now - then).detach() for now, then in pairs],
    }
    return {key: statistics.mean(effective_rank(t) for t in tensors if t is not None) for key, tensors in of.items()}


@functools.lru_cache
def commit() -> str:
    """Of the repository, with a mark if files differ from it."""
    command = ["git", "-C", os.fspath(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
