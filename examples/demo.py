"""Trains one model twice, at full rank and through heads, and compares the two: `python -m examples.demo`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.optim import Optimizer

from examples.curves import Curve, draw, read
from examples.data import DigitsDataModule
from examples.vit import ViTClassifier
from lightning_lte import LTEConfig, LTEStrategy
from lightning_lte.injection import Injection, inject
from lightning_lte.payload import is_dense


@dataclass
class Outcome:
    """What one of the two runs gave.

    Attributes:
        test: name -> value of the test metrics.
        tested: samples that they are of.
        fit_s: seconds in `Trainer.fit`, validation included.
        trained: elements that the optimizers held on this device.
        moments: bytes of optimizer state on this device.
        order: a digest of all labels in the order in which they were trained on.
        curves: what was logged.
    """

    test: dict[str, float]
    tested: int
    fit_s: float
    trained: int
    moments: int
    order: str
    curves: dict[str, Curve] = field(repr=False)


class Watch(Callback):
    """Keeps the order of the data, and the size of what the optimizers hold while they train."""

    def __init__(self) -> None:
        self.order = hashlib.sha256()
        self.trained = self.moments = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.order.update(batch[1].cpu().numpy().tobytes())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.moments:  # which are made in the first step
            self.trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            # Adam's step counters are tensors of one element.
            states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
            self.moments = sum(v.nbytes for v in states if v.dim())


def main(args: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Run both and print how they compare."""
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="epochs of either run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="cumulative batch (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--merge-every", type=int, default=10, help="optimizer steps (default: %(default)s)")
    # README.md says what other learning rates give.
    parser.add_argument("--full-rank-lr", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--heads-lr", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for metrics and curves (%(default)s)")
    options = parser.parse_args(args)
    # Data in memory needs no workers, and Lightning's notes on devices and on its own products are not the point here.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    print("The same ViT on scikit-learn's digits, trained at full rank and through heads.")
    print(f"seed {options.seed}; {software()}; {hardware()}\n", flush=True)
    strategy = LTEStrategy(heads=options.heads, merge_every=options.merge_every, rank=options.rank)
    outcomes = {
        "full rank": train(options, "auto", options.full_rank_lr, "full_rank"),
        f"{options.heads} heads": train(options, strategy, options.heads_lr, "heads"),
    }
    print(f"\nWhat became of the parameters:\n{strategy.report().summary()}")
    picture = options.folder / "curves.png"
    draw({label: outcome.curves for label, outcome in outcomes.items()}, picture)
    print(f"\n{table(options, *outcomes.values())}\n\n{remarks(options, *outcomes.values())}\nCurves: {picture}")
    return outcomes


def train(options: argparse.Namespace, strategy: str | LTEStrategy, lr: float, name: str) -> Outcome:
    """Train and test one model."""
    # Both runs start from the same weights and see the same batches: LTE leaves the random stream alone.
    seed_everything(options.seed, verbose=False)
    model, data, watch = ViTClassifier(lr=lr), DigitsDataModule(options.batch_size), Watch()
    logger = CSVLogger(options.folder, name)
    trainer = Trainer(
        strategy=strategy,
        # LTE knows CPUs and CUDA devices; "auto" would find others too.
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=options.epochs,
        logger=logger,
        callbacks=[watch],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    fit_s = time.perf_counter() - start
    [test] = trainer.test(model, data, verbose=False)
    return Outcome(
        test=dict(test),
        tested=len(data.test[1]),
        fit_s=fit_s,
        trained=watch.trained,
        moments=watch.moments,
        order=watch.order.hexdigest(),
        curves=read(Path(logger.log_dir) / "metrics.csv"),
    )


def table(options: argparse.Namespace, full: Outcome, heads: Outcome) -> str:
    """The comparison as Markdown."""
    model = ViTClassifier()
    params = [p for p in model.parameters() if p.requires_grad]
    full_bytes = sum(p.nbytes for p in params)
    # One head of one device: what each of `heads` devices would hold.
    config = LTEConfig(heads=options.heads, merge_every=options.merge_every, rank=options.rank)
    alone = inject(model, params, config)
    one_head = sum(f.A.numel() + f.B.numel() for f in alone.factors.values())
    one_head += sum(r.param.numel() for r in alone.replicas)
    anchors = sum(f.A.nbytes + f.B.nbytes for f in alone.factors.values())
    n = options.heads
    rows = [
        ("", "full rank", f"{n} heads"),
        ("test accuracy", f"{full.test['test/accuracy']:.3f}", f"{heads.test['test/accuracy']:.3f}"),
        ("test loss", f"{full.test['test/loss']:.3f}", f"{heads.test['test/loss']:.3f}"),
        ("validation accuracy", *(f"{o.curves['val/accuracy'][1][-1]:.3f}" for o in (full, heads))),
        ("epochs until validation accuracy is 0.9", _epochs_until(full, 0.9), _epochs_until(heads, 0.9)),
        ("learning rate", f"{options.full_rank_lr:g}", f"{options.heads_lr:g}"),
        ("time of fit", f"{full.fit_s:.0f} s", f"{heads.fit_s:.0f} s"),
        ("trained parameters, this one device", f"{full.trained:,}", f"{heads.trained:,}"),
        ("optimizer moments, this one device", _bytes(full.moments), _bytes(heads.moments)),
        (f"trained parameters, each of {n} devices (computed)", f"{full.trained:,}", f"{one_head:,}"),
        (f"optimizer moments, each of {n} devices (computed)", _bytes(full.moments), _bytes(2 * 4 * one_head)),
        (f"anchors, each of {n} devices (computed)", _bytes(0), _bytes(anchors)),
        (
            f"sent per step, each of {n} devices (computed)",
            _bytes(all_reduce_bytes(full_bytes, n)),
            _bytes(bytes_per_merge(alone, n) / options.merge_every),
        ),
    ]
    alone.eject()
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"| {a.ljust(widths[0])} | {b.rjust(widths[1])} | {c.rjust(widths[2])} |" for a, b, c in rows]
    return "\n".join(
        [lines[0], f"| {'-' * widths[0]} | {'-' * (widths[1] - 1)}: | {'-' * (widths[2] - 1)}: |", *lines[1:]]
    )


def remarks(options: argparse.Namespace, full: Outcome, heads: Outcome) -> str:
    """What a reader has to know to judge the table."""
    p = full.test["test/accuracy"]
    order = "the same data in the same order" if full.order == heads.order else "the data in different orders"
    return (
        f"Both: {options.epochs} epochs in batches of {options.batch_size}, {order}, AdamW.\n"
        f"Computed, not measured: {options.heads} devices with one head each, float32, messages sent around a ring;"
        " full rank averages its gradients at every step,\n"
        f"heads send at every {options.merge_every}th step. The base weights, which every device holds as well, are not"
        " counted.\n"
        f"One run each, and other seeds differ; the standard error of an accuracy of {p:.2f} on {full.tested} test"
        f" images alone is {math.sqrt(p * (1 - p) / full.tested):.3f}."
    )


def all_reduce_bytes(payload: int, devices: int) -> float:
    """Bytes each device sends in a ring all-reduce."""
    return 2 * payload * (devices - 1) / devices


def bytes_per_merge(alone: Injection, devices: int) -> float:
    """Bytes each device sends at a merge of one head per device, by the rule that merges follow.

    The few bytes that say which heads are finite and how far they disagree are left out.
    """
    sent = 0.0
    for f in alone.factors.values():
        if is_dense(f, devices):
            sent += all_reduce_bytes(f.weight.numel() * 4, devices)
        else:
            sent += sum(t.nbytes for t in f.current()) * (devices - 1)
    return sent + all_reduce_bytes(sum(r.param.numel() * 4 for r in alone.replicas), devices)


def software() -> str:
    """Versions of what matters to the numbers."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"


def hardware() -> str:
    """What the runs trained on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _epochs_until(outcome: Outcome, accuracy: float) -> str:
    _, values = outcome.curves["val/accuracy"]
    return next((str(epoch) for epoch, value in enumerate(values, 1) if value >= accuracy), "not reached")


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
