"""What low-precision base weights cost in accuracy and save in memory.

    python -m benchmarks.base quality --data /usr/share/datasets/fashion-mnist
    python -m benchmarks.base memory

The first trains the Fashion-MNIST example through heads that read W in each precision, with the same seeds. What has
been trained is kept in a file, one line for each run, so that the command can be stopped and called again. The second
counts the bytes of weights, gradients and moments that a device holds for one head, in the tensors there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from examples.data import FashionMNISTDataModule
from examples.demo import hardware
from examples.vit import ViTClassifier
from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport
from lightning_lte.rounded import Base, BaseCopy, Rounded, rounded, unrounded

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_mnist.yaml"
# With "sharded" heads train as with "cpu", to the bit.
QUALITY: list[tuple[Base, BaseCopy]] = [
    ("float32", "cpu"),
    ("bfloat16", "cpu"),
    ("int8", "cpu"),
    ("nf4", "cpu"),
    ("nf4", "error-feedback"),
]
MEMORY: list[tuple[Base, BaseCopy]] = [
    ("float32", "cpu"),
    *((base, copy) for base in ("bfloat16", "int8", "nf4") for copy in ("cpu", "sharded", "error-feedback")),
]


def main(arguments: list[str] | None = None) -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality", help="accuracy of the Fashion-MNIST example")
    quality.add_argument("--data", default="data", help="folder of Fashion-MNIST (default: %(default)s)")
    quality.add_argument("--epochs", type=int, default=5, help="of training (default: %(default)s)")
    quality.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    quality.add_argument("--bases", nargs="+", default=sorted({b for b, _ in QUALITY}), help="(default: all)")
    quality.add_argument("--results", type=Path, default=Path("runs/base.jsonl"), help="(default: %(default)s)")
    quality.add_argument("--dim", type=int, default=128, help="width of the model (default: that of the example)")
    quality.add_argument("--depth", type=int, default=6, help="its blocks (default: those of the example)")
    quality.add_argument("--limit", type=int, default=None, help="batches in an epoch, for a quick look")
    quality.add_argument("--table", action="store_true", help="only print what has been trained")
    memory = commands.add_parser("memory", help="bytes on a device")
    memory.add_argument("--model", default="vit_large_patch16_224", help="of timm (default: %(default)s)")
    memory.add_argument("--rank", type=int, default=64, help="r (default: %(default)s)")
    memory.add_argument("--devices", type=int, default=8, help="that share the rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "memory":
        print(memory_table(options.model, options.rank, options.devices))
        return
    if not options.table:
        for seed in options.seeds:
            for base, copy in QUALITY:
                if base in options.bases:
                    train(base, copy, seed, options)
    print(quality_table([r for r in _lines(options.results) if _setup(options).items() <= r.items()], _setup(options)))


# ---- accuracy


def train(base: Base, copy: BaseCopy, seed: int, options: argparse.Namespace) -> None:
    """Train the example once and write the result down, unless that was done before."""
    key = {"base": base, "base_copy": copy, "seed": seed, **_setup(options)}
    if any(key.items() <= line.items() for line in _lines(options.results)):
        return
    example = yaml.safe_load(EXAMPLE.read_text())
    choices = example["trainer"]["strategy"]["init_args"]
    seed_everything(seed, verbose=False)
    module = ViTClassifier(**{**example["model"]["init_args"], "dim": options.dim, "depth": options.depth})
    data = FashionMNISTDataModule(**{**example["data"]["init_args"], "root": options.data})
    strategy = LTEStrategy(**choices, base=base, base_copy=copy)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=options.epochs,
        limit_train_batches=options.limit,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    names = [entry.name for entry in strategy.report().entries if entry.reason.endswith(base)]
    result = {
        **key,
        "weights": len(names),
        "accuracy": _accuracy(module, data),
        "rounded_accuracy": _accuracy(_rounded(module, names, base), data),
        "seconds": seconds,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file:
        print(json.dumps(result), file=file)
    print(json.dumps(result), flush=True)


@torch.no_grad()
def _rounded(module: ViTClassifier, names: Iterable[str], base: Base) -> ViTClassifier:
    """The module with what heads have read of these weights."""
    for name in names:
        weight = module.get_parameter(name)
        weight.copy_(unrounded(rounded(weight, base), base, weight.shape, weight.dtype))
    return module


@torch.no_grad()
def _accuracy(module: ViTClassifier, data: FashionMNISTDataModule) -> float:
    """On the test images, in percent."""
    data.setup("test")
    module.eval()
    right = [module(images).argmax(1) == labels for images, labels in data.test_dataloader()]
    return 100 * float(torch.cat(right).double().mean())


def _setup(options: argparse.Namespace) -> dict[str, Any]:
    """What is the same in all rows of a table."""
    return {k: getattr(options, k) for k in ("epochs", "dim", "depth", "limit")}


def quality_table(lines: list[dict[str, Any]], setup: dict[str, Any]) -> str:
    """Mean and spread over seeds, and the difference to float32 of the same seeds."""
    found = {(r["base"], r["base_copy"], r["seed"]): r for r in lines}
    rows = []
    for base, copy in QUALITY:
        own = [r for (b, c, _), r in found.items() if (b, c) == (base, copy)]
        if not own:
            continue
        pairs = [(r, found["float32", "cpu", r["seed"]]) for r in own if ("float32", "cpu", r["seed"]) in found]
        differences = [r["accuracy"] - plain["accuracy"] for r, plain in pairs]
        rows.append(
            [
                base,
                "" if base == "float32" else copy,
                str(len(own)),
                _spread([r["accuracy"] for r in own]),
                "" if base == "float32" else _spread(differences, sign="+"),
                "" if base == "float32" else _spread([r["rounded_accuracy"] for r in own]),
            ]
        )
    batches = "all" if setup["limit"] is None else setup["limit"]
    head = [
        f"{EXAMPLE.name}, width {setup['dim']}, {setup['depth']} blocks, {setup['epochs']} epochs of {batches} batches,"
        f" seeds {', '.join(str(s) for s in sorted({r['seed'] for r in lines}))}; {hardware()}, torch"
        f" {torch.__version__}. Mean over seeds, with the smallest and the largest.",
        "",
        "| base | copy | seeds | test accuracy of W, % | less float32's | test accuracy of rounded W, % |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def _spread(values: list[float], sign: str = "") -> str:
    """Mean, and the smallest and largest."""
    if not values:
        return ""
    return f"{statistics.mean(values):{sign}.2f} ({min(values):{sign}.2f} to {max(values):{sign}.2f})"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- memory


class Share(Transport):
    """Stands for the first of several devices, of which there is one: it receives nothing."""

    def stack(self, tensor: Tensor) -> Tensor:
        return tensor


def memory_table(name: str, rank: int, devices: int) -> str:
    """What one head of as many as there are devices holds, beside full rank's."""
    model = timm.create_model(name)
    total = full_rank_bytes(model)
    config = LTEConfig(1, rank=rank, init="kaiming", base="int8")
    explorer = Explorer(model, torch.optim.AdamW(model.parameters()), config)
    rows = [["full rank", "", _mb(total), "", "", "", _mb(total), "1.00", "0"]]
    for base, copy in MEMORY:
        held = held_bytes(explorer, base, copy, devices)
        on_device = sum(held.values()) - held["cpu"]
        cells = [_mb(held[key]) for key in ("read", "kept", "factors", "replicas")]
        shown = "" if base == "float32" else copy
        rows.append([base, shown, *cells, _mb(on_device), f"{on_device / total:.3f}", _mb(held["cpu"])])
    head = [
        f"{name}, rank {rank}, one head on each of {devices} devices, AdamW, float32: MB (10^6 bytes) on each device"
        f" between merges, without activations; torch {torch.__version__}",
        "",
        "| base | copy | W as it is read | W itself | factors, anchors, gradients, moments | replicas, likewise | sum"
        " | of full rank's | on the CPU |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def full_rank_bytes(model: nn.Module) -> int:
    """Weights, gradients and two moments."""
    return sum(4 * p.nbytes for p in model.parameters())


def held_bytes(explorer: Explorer, base: Base, copy: BaseCopy, devices: int) -> dict[str, int]:
    """Bytes on a device, and under "cpu" on its host.

    Those of W are counted in the tensors that `Rounded` makes of a weight of each shape. Gradients and moments are one
    and two tensors more for each that an optimizer trains.
    """
    held = dict.fromkeys(("read", "kept", "factors", "replicas", "cpu"), 0)
    of_shape: dict[torch.Size, Rounded] = {}
    for f in explorer.injection.factors.values():
        anchors = [t.nbytes for t in (f.anchor_A, f.anchor_B) if t is not None]
        held["factors"] += 4 * (f.A.nbytes + f.B.nbytes) + sum(anchors)
        shape = f.weight.shape
        if base == "float32" or not explorer.injection.roles[f.weight].rounds:
            held["read"] += f.weight.nbytes
            continue
        if shape not in of_shape:
            of_shape[shape] = Rounded(nn.Parameter(torch.randn(shape)), base, copy, Share(devices))
        held["read"] += of_shape[shape].read_bytes
        held["kept"] += of_shape[shape].kept_bytes
        held["cpu"] += 0 if of_shape[shape].released else f.weight.nbytes
    held["replicas"] = sum(4 * replica.copies.nbytes for replica in explorer.injection.replicas)
    return held


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    main()
