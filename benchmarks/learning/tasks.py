"""What the study trains: models, data and metrics. All data is in memory, and nothing is augmented."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from examples.data import read_idx

Batch = tuple[Tensor, ...]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """Samples along dimension 0 of every tensor."""

    train: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    """A model, what it is trained on, and what is asked of it.

    Attributes:
        options: what can be chosen, with defaults; `dim` is the width that ranks may be fractions of.
        data: makes the data from the options and the folder of Fashion-MNIST.
        model: makes a model in torch's random state.
        loss: of a model on a batch, the mean over its samples.
        metric: its name.
        measure: the metric on the test data.
        higher_is_better: what a good metric is.
        start: trains a new model beforehand; None where it is trained from scratch.
    """

    options: Options
    data: Callable[[Options, Path], Data]
    model: Callable[[Options], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    metric: str
    measure: Callable[[nn.Module, Batch], float]
    higher_is_better: bool
    start: Callable[[nn.Module, Options, Path], None] | None = None


@lru_cache(maxsize=1)
def _fashion_mnist(root: Path) -> Data:
    def read(split: str) -> Batch:
        try:
            images = read_idx(next(root.glob(f"{split}-images-idx3-ubyte*")))
            labels = read_idx(next(root.glob(f"{split}-labels-idx1-ubyte*")))
        except StopIteration:
            raise FileNotFoundError(
                f"The four idx-ubyte files of Fashion-MNIST must lie in one folder; received {root}, which lacks those"
                f" of {split}. Give --data, or install Debian's package dataset-fashion-mnist."
            ) from None
        return (images.float().unsqueeze(1) / 255 - 0.286) / 0.353, labels.long()

    return Data(read("train"), read("t10k"))


def _images(options: Options, root: Path) -> Data:
    return _fashion_mnist(root)


def _of_classes(data: Data, classes: range) -> Data:
    def part(batch: Batch) -> Batch:
        chosen = (batch[1] >= classes.start) & (batch[1] < classes.stop)
        return tuple(t[chosen] for t in batch)

    return Data(part(data.train), part(data.test))


@lru_cache(maxsize=1)
def _second_half(root: Path) -> Data:
    return _of_classes(_fashion_mnist(root), range(5, 10))


def _other_images(options: Options, root: Path) -> Data:
    return _second_half(root)


def _know_the_first_half(model: nn.Module, options: Options, root: Path) -> None:
    """Train at full rank on classes 0 to 4."""
    images, labels = _of_classes(_fashion_mnist(root), range(5)).train
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(options["epochs_before"]):
        for chosen in torch.randperm(len(images)).split(256):
            optimizer.zero_grad()
            _cross_entropy(model, (images[chosen], labels[chosen])).backward()
            optimizer.step()


def _vit(options: Options) -> nn.Module:
    net = VisionTransformer(
        img_size=28,
        in_chans=1,
        num_classes=10,
        patch_size=options["patch"],
        embed_dim=options["dim"],
        depth=options["depth"],
        num_heads=options["attention_heads"],
        class_token=False,
        global_pool="avg",
    )
    # Positions that are not trained, and no class token: these two are all that heads which share a device would share.
    # Without them, heads in one forward learn exactly as on devices of their own.
    side = 28 // options["patch"]
    with torch.no_grad():
        assert isinstance(net.pos_embed, nn.Parameter)
        net.pos_embed.copy_(build_sincos2d_pos_embed([side, side], options["dim"], interleave_sin_cos=True))
    net.pos_embed.requires_grad_(False)
    return net


def _mixer(options: Options) -> nn.Module:
    return MlpMixer(
        num_classes=10,
        img_size=28,
        in_chans=1,
        patch_size=options["patch"],
        num_blocks=options["depth"],
        embed_dim=options["dim"],
    )


def _resnet(options: Options) -> nn.Module:
    dim = options["dim"]
    channels = (dim // 8, dim // 4, dim // 2, dim)
    block: Any = BasicBlock
    return ResNet(block, (1, 1, 1, 1), num_classes=10, in_chans=1, channels=channels)


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def _accuracy(model: nn.Module, test: Batch) -> float:
    parts = zip(*(t.split(2000) for t in test), strict=True)
    return 100 * sum(int((model(x).argmax(-1) == y).sum()) for x, y in parts) / len(test[1])


class Block(nn.Module):
    """A transformer's block with causal attention."""

    def __init__(self, dim: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.attention_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, context: int, dim: int, depth: int, attention_heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, attention_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                # GPT-2's, with what adds to the residual stream smaller.
                nn.init.normal_(
                    param, std=0.02 / (math.sqrt(2 * depth) if name.endswith(("proj.weight", "fc2.weight")) else 1)
                )

    def forward(self, x: Tensor) -> Tensor:
        # Looked up for every sample: a table looked up once for all would be shared by the heads of a device.
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        return self.head(self.norm(self.blocks(self.token(x) + self.position(positions))))


def _gpt(options: Options) -> nn.Module:
    return GPT(options["context"], options["dim"], options["depth"], options["attention_heads"])


@lru_cache(maxsize=1)
def _python_sources(context: int, test_windows: int) -> Data:
    """Windows of context + 1 bytes of the standard library without its tests; of every 20 files one is for the test."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = sorted(p for p in folder.rglob("*.py") if not outside & set(p.relative_to(folder).parts))

    def windows(chosen: list[Path]) -> Batch:
        content = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in chosen)), dtype=torch.uint8)
        # Each window's last byte is the next one's first, so that every byte is predicted once.
        return (content.unfold(0, context + 1, context),)

    train, test = windows([p for i, p in enumerate(files) if i % 20]), windows(files[::20])
    every = max(1, len(test[0]) // test_windows)
    return Data((train[0].contiguous(),), (test[0][::every][:test_windows].contiguous(),))


def _bytes(options: Options, root: Path) -> Data:
    return _python_sources(options["context"], options["test_windows"])


def _next_byte(model: nn.Module, batch: Batch) -> Tensor:
    windows = batch[0].long()
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def _bits_per_byte(model: nn.Module, test: Batch) -> float:
    losses = [float(_next_byte(model, (part,))) * len(part) for part in test[0].split(500)]
    return sum(losses) / len(test[0]) / math.log(2)


@lru_cache(maxsize=4)
def _regression(dim: int, target_rank: int, samples: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, dim, target_rank, generator=generator)
    target = left @ right.T / math.sqrt(dim * target_rank)  # rows of norm 1, about
    x = torch.randn(samples + 1000, dim, generator=generator)
    return Data((x[:samples], x[:samples] @ target.T), (x[samples:], x[samples:] @ target.T))


def _least_squares(options: Options, root: Path) -> Data:
    return _regression(options["dim"], options["target_rank"], options["samples"])


def _linear(options: Options) -> nn.Module:
    layer = nn.Linear(options["dim"], options["dim"], bias=False)
    # What is to be learned has the target's rank.
    nn.init.zeros_(layer.weight)
    return layer


def _squares(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


@torch.no_grad()
def _error(model: nn.Module, test: Batch) -> float:
    """Mean square error as a share of the target's mean square."""
    return float(_squares(model, test) / test[1].square().mean())


def _classifier(model: Callable[[Options], nn.Module], **options: Any) -> Task:
    return Task(options, _images, model, _cross_entropy, "accuracy (%)", _accuracy, higher_is_better=True)


TASKS: dict[str, Task] = {
    "vit": _classifier(_vit, dim=64, depth=4, attention_heads=4, patch=7),
    # A model that knows half of the classes learns the others.
    "fine-tuning": Task(
        {"dim": 64, "depth": 2, "attention_heads": 4, "patch": 14, "epochs_before": 3},
        _other_images,
        _vit,
        _cross_entropy,
        "accuracy (%)",
        _accuracy,
        higher_is_better=True,
        start=_know_the_first_half,
    ),
    "mixer": _classifier(_mixer, dim=64, depth=4, patch=7),
    "resnet": _classifier(_resnet, dim=128),
    "gpt": Task(
        {"dim": 64, "depth": 2, "attention_heads": 4, "context": 64, "test_windows": 2000},
        _bytes,
        _gpt,
        _next_byte,
        "bits per byte",
        _bits_per_byte,
        higher_is_better=False,
    ),
    "least-squares": Task(
        {"dim": 32, "target_rank": 32, "samples": 51200},
        _least_squares,
        _linear,
        _squares,
        "error",
        _error,
        higher_is_better=False,
    ),
}
