"""What a GPU may do otherwise than a CPU.

    python -m pytest tests/test_gpu.py

Where there is no GPU, tests that compare it with the CPU compare the CPU with itself, which shows only that they run,
and those of CUDA itself are skipped.
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import Explorer, LTEConfig, LTEStrategy
from lightning_lte.execution import run
from tests import processes
from tests.modules import (
    CLASSES,
    IN,
    RANK,
    Kinds,
    Module,
    Net,
    Slices,
    adamw_of_large_eps,
    after_backward,
    clone,
    make_data,
    make_net,
    needs_fully_shard,
    sgd,
    train_step,
    trainer,
)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
# What torch.compile makes code for a GPU with.
needs_compiler = pytest.mark.skipif(
    not (GPU and has_triton() and (shutil.which("cc") or shutil.which("clang"))), reason="needs Triton and a C compiler"
)
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

HEADS, PERIOD = 4, 3
IMAGES = 2 * 6 * 6 + 5


def batches(count: int = 10, width: int = IMAGES) -> DataLoader:
    return DataLoader(TensorDataset(*make_data(16 * count, width=width)), batch_size=16)


def fitted(
    module: LightningModule,
    data: Any,
    steps: int = 8,
    on: str = DEVICE.type,
    ckpt_path: Path | None = None,
    **choices: Any,
) -> Any:
    """Train, and return the Trainer.

    Args:
        module: what to train.
        data: its batches.
        steps: of the optimizer.
        on: a device's type.
        ckpt_path: of a checkpoint to go on from.
        choices: for the Trainer those that it knows, and the others for the strategy.
    """
    known = ("precision", "plugins", "devices", "callbacks")
    of_trainer = {key: choices.pop(key) for key in known if key in choices}
    strategy = LTEStrategy(**{"heads": HEADS, "merge_every": PERIOD, "rank": RANK, **choices})
    t = trainer(strategy, accelerator=on, max_steps=steps, enable_checkpointing="callbacks" in of_trainer, **of_trainer)
    t.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return t


# ---- the same as on a CPU


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"heads": 1},
        {"heads": 1, "after_merge": "reset"},
        {"execution": "sequential"},
        {"after_merge": "reset", "reset_a": "redraw", "reset_moments": 0.5},
        {"freeze_a": True},
        {"norms": "vector-scalar", "embeddings": "replica"},
        {"refresh": 1},
        {"weight_decay": "weights"},
        {"overlap": 1},
        {"stagger": 2},
        {"grow_heads": {4: 8}},
        {"verify_every": 1},
        {"full_rank_steps": 2},
        {"outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    ],
    ids=str,
)
def test_layers_of_all_kinds_learn_the_same(chosen: dict[str, Any]) -> None:
    ends = []
    for device in ("cpu", DEVICE.type):
        module = Module(make_net(Kinds), adamw_of_large_eps)
        fitted(module, batches(), on=device, **chosen)
        ends.append(clone(module.cpu().state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("copy", ["cpu", "sharded"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_weights_in_low_precision_learn_the_same(kind: Any, copy: Any) -> None:
    ends = []
    for device in ("cpu", DEVICE.type):
        module = Module(make_net(), sgd)
        fitted(module, batches(width=IN), on=device, base=kind, base_copy=copy)
        ends.append(clone(module.cpu().state_dict()))
    # A number halfway between two steps may be rounded to either.
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


class Recurrent(nn.Module):
    """cuDNN moves the weights of a recurrent network together whenever it finds others in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x[:, :72].unflatten(1, (12, 6))))[0][:, -1])


class Checkpointed(Kinds):
    """On a GPU autograd runs forwards once more in a thread of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


class Scaled(Kinds):
    """With a parameter without dimensions, and convolutions in channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("execution", ["auto", "sequential"])
@pytest.mark.parametrize("kind", [Recurrent, Checkpointed, Scaled])
def test_models_of_all_kinds_learn_the_same(kind: type[nn.Module], execution: str) -> None:
    ends = []
    for device in ("cpu", DEVICE.type):
        module = Module(make_net(kind), adamw_of_large_eps)
        fitted(module, batches(), on=device, execution=execution)
        ends.append(clone(module.cpu().state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-8)


def fused(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01, eps=1e-5, fused=True)


def by_tensors(params: Any) -> Optimizer:
    """As a CUDA graph wants it, with a learning rate that it follows."""
    params = list(params)
    lr = torch.tensor(0.01, device=params[0].device, dtype=torch.float64)
    return torch.optim.AdamW(params, lr=lr, eps=1e-5, capturable=params[0].is_cuda)


@pytest.mark.parametrize("chosen", [{"grow_heads": {4: 8}}, {"weight_decay": "weights"}], ids=str)
@pytest.mark.parametrize("optimizer", [fused, by_tensors])
def test_optimizers_with_kernels_of_their_own_learn_the_same(optimizer: Any, chosen: dict[str, Any]) -> None:
    ends = []
    for device in ("cpu", DEVICE.type):
        module = Module(make_net(), optimizer)
        fitted(module, batches(width=IN), on=device, **chosen)
        ends.append(clone(module.cpu().state_dict()))
    # What counts steps, and corrections by it, are in float32 in some of them.
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


# ---- defaults


class Images(nn.Module):
    """Convolutions in float32 take TF32 on a GPU, which differs between a batch and its slices."""

    def __init__(self) -> None:
        super().__init__()
        first, norm, second = nn.Conv2d(2, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.Conv2d(32, 32, 3, stride=2)
        self.body = nn.Sequential(first, norm, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(128, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :72].unflatten(1, (2, 6, 6)).float())


class Sequences(nn.Module):
    """cuDNN draws the dropout of recurrent networks by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x[:, :72].unflatten(1, (12, 6)).float()))[0][:, -1])


class Words(nn.Module):
    """Attention has kernels of its own in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.words((x.abs() * 6).long().clamp(0, 11))).mean(1))


class Deep(Words):
    """In half precision, rounding adds up over the layers to several percent."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.block = nn.TransformerEncoder(block, 12, nn.LayerNorm(32), enable_nested_tensor=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", [Images, Sequences, Words, Deep])
def test_heads_share_the_forward(kind: type[nn.Module], precision: Any) -> None:
    t = fitted(Module(make_net(kind).float(), sgd), batches(), precision=precision)
    assert "in one forward (batched): proved" in str(t.strategy.report())


# ---- precision


class Losses(Module):
    """Keeps its losses, on its device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(make_net().to(dtype), adamw_of_large_eps)
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0].to(self.net.first.weight.dtype)), batch[1])
        self.losses.append(loss.detach())
        return loss


@pytest.mark.parametrize("chosen", [{}, {"heads": 1}, {"after_merge": "reset"}, {"execution": "sequential"}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_run_in_each_precision_follows_that_in_float64(precision: Any, chosen: dict[str, Any]) -> None:
    runs = []
    for own in ("64-true", precision):
        module = Losses(torch.float64 if own == "64-true" else torch.float32)
        more: dict[str, Any] = {"precision": own}
        if own == "16-mixed":  # with a scale that overflows in no step
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
            more = {"plugins": [MixedPrecision(own, DEVICE.type, scaler)]}
        fitted(module, batches(2, width=IN), steps=30, **more, **chosen)
        runs.append([float(loss) for loss in module.losses])
    tolerance = {"32-true": 1e-3, "16-mixed": 0.01, "bf16-mixed": 0.05, "bf16-true": 0.05}[precision]
    assert runs[1] == pytest.approx(runs[0], abs=tolerance)
    third = len(runs[0]) // 3
    assert sum(runs[0][-third:]) < sum(runs[0][:third])


# ---- resuming


class Dropping(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x.float())))
        return self.out(nn.functional.dropout(torch.tanh(self.second(x)), 0.2))


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"heads": 1},
        {"execution": "sequential"},
        {"overlap": 1},
        {"precision": "bf16-mixed"},
        {"base": "int8"},
        {"base": "int8", "base_copy": "error-feedback"},
    ],
    ids=str,
)
def test_a_run_goes_on_bit_by_bit(chosen: dict[str, Any], tmp_path: Path) -> None:
    def start() -> Any:
        seed_everything(1, verbose=False)
        return Module(make_net(Dropping).float(), adamw_of_large_eps)

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5)
    whole = start()
    fitted(whole, Slices(1, 0), callbacks=[keep], **chosen)
    resumed = start()
    fitted(resumed, Slices(1, 0), ckpt_path=tmp_path / "step=5.ckpt", **chosen)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


# ---- several devices


def trained_on_two(chosen: dict[str, Any]) -> dict[str, Tensor]:
    module = Module(make_net(), sgd)
    on = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    fitted(module, batches(20, width=IN), on=on, devices=2, **chosen)
    return clone(module.cpu().state_dict())


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"replicas": "step"},
        {"overlap": 1},
        {"wire": "int8"},
        {"wire": "bfloat16", "payload": "factors"},
        {"base": "int8", "base_copy": "sharded"},
        {"checkpoint": "sharded", "verify_every": 1},
        # Two communicators at work at once.
        {"overlap": 1, "replicas": "step"},
        pytest.param({"heads": 1, "shard": 2}, marks=needs_fully_shard),
    ],
    ids=str,
)
def test_two_devices_end_with_the_same_weights(chosen: dict[str, Any]) -> None:
    """With NCCL where there are two GPUs, else with gloo."""
    first, second = processes.run(trained_on_two, 2, chosen, group=False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first["net.second.weight"], make_net().second.weight)


# ---- CUDA


def made(net: nn.Module, optimizer: Callable[..., Optimizer], **chosen: Any) -> tuple[Explorer, Optimizer]:
    opt = optimizer(net.parameters())
    config = LTEConfig(**{"heads": HEADS, "merge_every": PERIOD, "rank": RANK, "execution": "batched", **chosen})
    return Explorer(net, opt, config), opt


@pytest.fixture
def no_waiting() -> Iterator[Callable[[bool], None]]:
    yield lambda refused: torch.cuda.set_sync_debug_mode("error" if refused else "default")
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        (Net, {}),
        (Net, {"heads": 1}),
        (Net, {"execution": "sequential"}),
        (Net, {"after_merge": "reset"}),
        (Net, {"base": "int8"}),
        (Net, {"weight_decay": "weights"}),
        (Kinds, {}),
        (Kinds, {"execution": "sequential"}),
    ],
    ids=str,
)
def test_no_step_between_merges_waits(
    kind: type[nn.Module], chosen: dict[str, Any], precision: Any, no_waiting: Callable
) -> None:
    net = make_net(kind).float().to(DEVICE)
    explorer, optimizer = made(net, partial(torch.optim.AdamW, weight_decay=0.1), merge_every=10, **chosen)
    x, y = make_data(16, width=IN if kind is Net else IMAGES)
    x, y = x.float().to(DEVICE), y.to(DEVICE)
    for step in range(9):
        no_waiting(step > 2)  # before that, weights are watched
        samples = 15 if step == 5 else 3 if step == 6 else 16
        with torch.autocast("cuda", precision, enabled=precision is not None):
            loss = run(explorer, lambda own: cross_entropy(net(own[0]), own[1]), (x[:samples], y[:samples]))
        with explorer.backward():
            loss.backward()
        after_backward(explorer, optimizer, clip=1.0)
    no_waiting(False)


@needs_gpu
def test_what_a_merge_finds_the_gpu_at_is_none_of_its_time() -> None:
    net = make_net().float().to(DEVICE)
    explorer, optimizer = made(net, sgd)
    for seed in range(2 * PERIOD):
        x, y = make_data(16, seed=seed)
        if seed == 2 * PERIOD - 1:
            torch.cuda._sleep(2 * 10**9)  # cycles, a second or so
        train_step(explorer, net, optimizer, (x.float().to(DEVICE), y.to(DEVICE)))
    assert explorer.merges == 2 and explorer.last_record is not None
    assert 0 < explorer.last_record.time_s < 0.3


@needs_gpu
@pytest.mark.parametrize("chosen", [{}, {"heads": 1}, {"after_merge": "reset"}, {"refresh": 1}], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_a_cuda_graph_of_the_step_goes_on_through_merges(chosen: dict[str, Any], half: bool) -> None:
    """As docs/assumptions.md has it: captured after the first two steps, with the optimizer's step."""
    ends = []
    for captures in (False, True):
        net = make_net().float().to(DEVICE)
        capturable = partial(torch.optim.AdamW, lr=0.01, eps=1e-5, capturable=True)
        explorer, optimizer = made(net, capturable, **chosen)
        x, y = torch.empty(16, IN, device=DEVICE), torch.empty(16, dtype=torch.int64, device=DEVICE)

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=half), explorer.heads():  # noqa: B023
                loss = cross_entropy(net(x), y)  # noqa: B023
            loss.backward()
            explorer.after_backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for number in range(11):
            own_x, own_y = make_data(16, seed=number)
            x.copy_(own_x)
            y.copy_(own_y)
            if captures and number == 4:
                with torch.cuda.graph(graph):  # which computes nothing
                    step()
            if captures and number >= 4:
                graph.replay()
            else:
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):  # as captures are
                    step()
                torch.cuda.current_stream().wait_stream(aside)
            optimizer.zero_grad()
            explorer.step()
        explorer.finish()
        ends.append(clone(net.state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3 if half else 1e-5, atol=1e-4 if half else 1e-6)


@needs_compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("chosen", [{}, {"heads": 1}, {"after_merge": "reset"}, {"base": "int8"}], ids=str)
def test_what_is_compiled_learns_the_same_and_is_compiled_once(chosen: dict[str, Any], mode: str) -> None:
    ends = []
    for compiles in (False, True):
        torch._dynamo.reset()
        net = make_net().float().to(DEVICE)
        forward = torch.compile(net, mode=mode, fullgraph=True) if compiles else net
        explorer, optimizer = made(net, adamw_of_large_eps, **chosen)
        for number in range(10):
            x, y = make_data(16, seed=number)
            with torch._dynamo.config.patch(error_on_recompile=number > PERIOD):
                train_step(explorer, forward, optimizer, (x.float().to(DEVICE), y.to(DEVICE)))
        explorer.finish()
        ends.append(clone(net.state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_the_allocator_holds_weights_factors_and_moments_and_no_more(after_merge: Any) -> None:
    wide = 1024
    before = allocated()
    net = nn.Sequential(*(nn.Linear(wide, wide, bias=False) for _ in range(4))).to(DEVICE)
    explorer, optimizer = made(net, torch.optim.AdamW, after_merge=after_merge, rank=8)
    batch = torch.randn(16, wide, device=DEVICE), torch.randint(wide, (16,), device=DEVICE)
    for _ in range(2 * PERIOD + 1):
        train_step(explorer, net, optimizer, batch)
    held = allocated() - before
    weights = 4 * wide * wide * 4
    factors = 4 * HEADS * 8 * 2 * wide * 4
    # Factors, two moments, and anchors; the batch comes on top, and what is rounded to blocks. Gradients would be twice
    # as much as is allowed for that.
    expected = weights + factors * (4 if after_merge == "keep" else 3)
    assert expected <= held < expected + factors // 2


def allocated() -> int:
    """Bytes on the GPU, without the workspaces of its matrix products: one for each thread and stream, of 32 MiB."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()
