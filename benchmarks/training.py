"""The rows of the network benchmark, and the training of one of them in one process."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks.namespaces import INTERFACE
from lightning_lte import LTEStrategy
from lightning_lte.transport import Transport

DEVICES = 2
# Steps of PowerSGD and of post-local SGD that are plain data-parallel ones, so that they are over before timing starts.
# PowerSGD's error feedback needs at least 2.
_PLAIN_STEPS = 2
_ANSWER = "row-done"


@dataclass(frozen=True, eq=False)
class Row:
    """One way to train.

    Attributes:
        key: for the command line.
        name: for the table.
        kind: "none", "ddp" or "lte".
        alone: whether each device trains by itself, without any communication.
        periodic: whether steps differ within a period.
        options: for `LTEStrategy`.
    """

    key: str
    name: str
    kind: str
    alone: bool = False
    periodic: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def warm_up(self, period: int) -> int:
        """Steps before timing starts: as many merges are to end in the time measured as begin in it."""
        if self.kind != "lte":
            return _PLAIN_STEPS + 1
        overlap, stagger = self.options.get("overlap", 0), self.options.get("stagger", 1)
        return overlap + 1 if stagger == 1 else period + overlap + 1


ROWS = [
    Row("none", "none (each device alone, full rank)", "none", alone=True, periodic=False),
    Row("ddp", "DDP", "ddp", periodic=False),
    Row("ddp-fp16", "DDP, fp16 hook", "ddp", periodic=False),
    Row("ddp-powersgd", "DDP, PowerSGD hook, rank 1", "ddp", periodic=False),
    Row("post-local", "post-local SGD", "ddp"),
    Row("lte-alone", "LTE alone (no network)", "lte", alone=True),
    Row("lte-float32", "LTE float32", "lte"),
    Row("lte-bfloat16", "LTE bfloat16", "lte", options={"wire": "bfloat16"}),
    Row("lte-int8", "LTE int8", "lte", options={"wire": "int8"}),
    Row("lte-float32-overlap", "LTE float32, overlap 5", "lte", options={"overlap": 5}),
    Row("lte-int8-overlap", "LTE int8, overlap 5", "lte", options={"wire": "int8", "overlap": 5}),
    Row(
        "lte-int8-stagger",
        "LTE int8, stagger 5, overlap 2",
        "lte",
        options={"wire": "int8", "stagger": 5, "overlap": 2},
    ),
]


class Classifier(LightningModule):
    """A timm model under AdamW."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model: Any = timm.create_model(model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class SameBatch(Dataset[Any]):
    """One batch again and again: loading is to cost nothing."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        self._batch, self._steps = batch, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._batch


class HookedDDP(DDPStrategy):
    """Lightning registers communication hooks on GPUs only, although torch has them work on gloo, too."""

    def _register_ddp_hooks(self) -> None:
        if self._ddp_comm_hook is not None:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)


class Meter(Callback):
    """Reads clocks and counters after every step.

    Attributes:
        readings: one for the end of each step: seconds of the clock, CPU seconds of this process and of the machine,
            bytes that left and entered through the interface since the start, the bytes computed, and the seconds that
            the merge which ended in this step stood still and waited for the network.
    """

    def __init__(self, networked: bool) -> None:
        self._networked = networked
        self._record: Any = None
        self._computed = 0
        self.readings: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        strategy: Any = trainer.strategy
        stood_s = waited_s = 0.0
        record = getattr(strategy, "last_record", None)
        if record is not None and record is not self._record:
            # What the callback logs as lte/bytes_sent.
            self._record, self._computed = record, self._computed + record.bytes_sent
            stood_s, waited_s = record.time_s, record.wait_s
        state = getattr(strategy, "_ddp_comm_state", None)
        if isinstance(state, PowerSGDState):
            # Its own count of what is left of gradients, in float32.
            numbers = state.total_numel_after_compression
            self._computed = Transport(DEVICES).bytes_of_sum(4 * numbers)
        self.readings.append(
            {
                "s": time.perf_counter(),
                "own_cpu_s": time.process_time(),
                "busy_cpu_s": _busy_cpu_s(),
                "sent": _counter("tx_bytes") if self._networked else 0,
                "received": _counter("rx_bytes") if self._networked else 0,
                "packets": _counter("tx_packets") if self._networked else 0,
                "computed": self._computed,
                "stood_s": stood_s,
                "waited_s": waited_s,
            }
        )


def train(row: Row, options: dict[str, Any]) -> dict[str, Any]:
    """Train in this process as one device of two; returns the readings of the meter.

    Args:
        row: how.
        options: model, batch, steps, period, rank and seed.
    """
    torch.set_num_threads(1)
    seed_everything(options["seed"], verbose=False)
    module = Classifier(options["model"])
    size = module.model.default_cfg["input_size"]
    device = int(os.environ["NODE_RANK"])
    generator = torch.Generator().manual_seed(options["seed"] + device)
    images = torch.randn(options["batch"], *size, generator=generator)
    labels = torch.randint(module.model.num_classes, (options["batch"],), generator=generator)
    steps = row.warm_up(options["period"]) + options["steps"]
    meter = Meter(networked=not row.alone)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1 if row.alone else DEVICES,
        strategy=_strategy(row, options),
        max_steps=steps,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(SameBatch((images, labels), steps), batch_size=None))
    return {"readings": meter.readings, "parameters": sum(p.numel() for p in module.parameters())}


def computed_bytes(row: Row, parameters: int, period: int) -> float | None:
    """Bytes per step that each device should send, in float32; None if the meter counts them."""
    whole = Transport(DEVICES).bytes_of_sum(4 * parameters)
    known = {"none": 0.0, "ddp": whole, "ddp-fp16": whole / 2, "post-local": whole / period}
    return known.get(row.key)


def _strategy(row: Row, options: dict[str, Any]) -> Any:
    if row.kind == "none":
        return "auto"
    if row.kind == "lte":
        heads = 1 if row.alone else DEVICES
        return LTEStrategy(heads=heads, merge_every=options["period"], rank=options["rank"], **row.options)
    hooks: dict[str, dict[str, Any]] = {
        "ddp": {},
        "ddp-fp16": {"ddp_comm_hook": fp16_compress_hook},
        "ddp-powersgd": {
            "ddp_comm_state": PowerSGDState(
                process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=_PLAIN_STEPS
            ),
            "ddp_comm_hook": powerSGD_hook,
            # In one bucket: the hook starts what follows in callbacks, which gloo runs in another order on each device
            # if there are several, and then what one sends meets what another does not expect.
            "bucket_cap_mb": 4096,
        },
        "post-local": {
            # One device in each machine: there is nobody to share gradients with.
            "ddp_comm_state": PostLocalSGDState(
                process_group=None, subgroup=None, start_localSGD_iter=_PLAIN_STEPS, post_local_gradient_allreduce=False
            ),
            "ddp_comm_hook": post_localSGD_hook,
            "model_averaging_period": options["period"],
        },
    }
    return HookedDDP(process_group_backend="gloo", **hooks[row.key])


def _counter(name: str) -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/{name}").read_text())


def _busy_cpu_s() -> float:
    """CPU seconds that all processes and the kernel have used, since the machine started."""
    numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    # All but idle and iowait; steal is time that another machine took.
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def serve() -> None:
    """Train as the lines of the standard input say, each in a process of its own, and answer with its exit status.

    What takes long to import is imported once.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                task = json.loads(line)
                os.environ["MASTER_PORT"] = str(task["port"])
                row = next(r for r in ROWS if r.key == task["row"])
                Path(task["out"]).write_text(json.dumps(train(row, task["options"])))
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            # The process group has nothing to say any more, and could wait for a device that is gone.
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(f"{_ANSWER} {status}", flush=True)


def status_of(line: str) -> int | None:
    """The exit status that a line of `serve` holds; None if it is what the training printed."""
    return int(line.split()[1]) if line.startswith(_ANSWER) else None
