"""Small networks, LightningModules and data that tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import Explorer
from lightning_lte.checkpoint import gather_state
from lightning_lte.execution import run
from lightning_lte.merge import MergeRecord
from lightning_lte.sharding import OLDEST_TORCH

IN, WIDTH, CLASSES = 10, 16, 3

needs_fully_shard = pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason=f"shard=k needs torch {OLDEST_TORCH}")


class Net(nn.Module):
    """Two layers to factor, with bias and without, a norm, and a thin layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))


class ScaledNet(Net):
    """A net with a bare parameter, which one forward over all heads can't deal out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(IN))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


class Words(Net):
    """A net on words, the gradients of whose vectors are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, IN, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.words((x.abs() * 6).long().clamp(0, 11)).mean(1))


class Kinds(nn.Module):
    """Layers of every kind, each with factors and with replicas, on images and on an index."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 18, padding_idx=0)
        self.conv = nn.Conv2d(2, 12, 3, padding=1, stride=2, padding_mode="circular", bias=bias)
        self.groups = nn.Conv2d(12, 12, 3, groups=2, bias=bias)
        self.norm = nn.GroupNorm(3, 12)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2, bias=bias)
        self.sequence = nn.Conv1d(10, 12, 3, dilation=2, bias=bias)
        self.attention = nn.MultiheadAttention(12, 2, kdim=18, vdim=18, batch_first=True, bias=bias)
        self.block = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True, bias=bias)
        self.out = nn.Linear(12, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[:, : 2 * 6 * 6].unflatten(1, (2, 6, 6))
        y = torch.tanh(self.norm(self.groups(torch.tanh(self.conv(pixels)).repeat(1, 1, 2, 2))))
        y = self.sequence(self.up(y).flatten(2)).mT
        words = self.embedding((x[:, -5:].abs() * 6).long().clamp(0, 11))
        y = y + self.attention(y, words, words)[0]
        return self.out(self.block(y).mean(1))


FACTORED = ("first", "second")
RANK = 3


def make_net(kind: Callable[[], Any] = Net) -> Any:
    """The same net at every call, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


def make_data(samples: int, seed: int = 1, width: int = IN) -> tuple[Tensor, Tensor]:
    """Inputs (samples, width) in float64 and labels (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def loader(samples: int = 48, batch_size: int = 16, **kwargs: Any) -> DataLoader:
    """Batches of `make_data`, in order unless told otherwise."""
    return DataLoader(TensorDataset(*make_data(samples)), batch_size=batch_size, **kwargs)


class Slices:
    """The same samples for each head at each step wherever the heads sit, and resumable.

    Args:
        world_size: devices.
        rank: of this one.
        samples: of all heads in a step.
    """

    def __init__(self, world_size: int, rank: int, samples: int = 16) -> None:
        self.world_size, self.rank, self.samples, self.step = world_size, rank, samples, 0

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while self.step < len(self):
            batch = make_data(self.samples, seed=self.step)
            self.step += 1
            yield tuple(part.tensor_split(self.world_size)[self.rank] for part in batch)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def sgd(params: Iterable[nn.Parameter], lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def adamw_of_large_eps(params: Iterable[nn.Parameter]) -> Optimizer:
    """Some gradients are rounding alone, as those of a bias before a batch norm, or of attention's keys, which Adam's
    own eps would make much of."""
    return torch.optim.AdamW(params, lr=0.01, eps=1e-5)


def train_step(explorer: Explorer, net: nn.Module, opt: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    """A step of a plain loop, as the documentation has it."""
    loss = run(explorer, lambda own: cross_entropy(net(own[0]), own[1]), batch)
    with explorer.backward():
        loss.backward()
    after_backward(explorer, opt)


def backward(explorer: Explorer, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The first half of a step of a plain loop whose heads act at once, for what has a second half of its own."""
    with explorer.heads():
        loss = cross_entropy(net(x), y)
    loss.backward()
    explorer.after_backward()


def after_backward(explorer: Explorer, opt: Optimizer, clip: float | None = None) -> MergeRecord | None:
    """The rest of a step of a plain loop; returns the merge that was due, if one was."""
    explorer.after_backward()
    if clip is not None:
        explorer.clip_grad_norm_(clip)
    opt.step()
    opt.zero_grad()
    return explorer.step()


class Module(LightningModule):
    """A LightningModule that was never written for heads."""

    def __init__(self, net: nn.Module | None = None, optimizer: Callable[..., Optimizer] = adamw) -> None:
        super().__init__()
        self.net = make_net() if net is None else net
        self.make_optimizer = optimizer
        self.batch_sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.batch_sizes.append(len(batch[0]))
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Recorder(Callback):
    """Calls a function after each batch and keeps what it returns."""

    def __init__(self, look: Callable[[Trainer, Any], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(self.look(trainer, pl_module))


def trainer(strategy: Any, **kwargs: Any) -> Trainer:
    """A quiet Trainer on CPUs."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(strategy=strategy, **{**quiet, **kwargs})


def kept(t: Trainer) -> dict[str, Any]:
    """What a checkpoint after training would keep of the heads of all devices; empty but on rank 0."""
    strategy: Any = t.strategy
    return gather_state(strategy._own_state(), strategy._transport) or {}


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
