"""Two small sets of images that fit into memory: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST

Split = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)


class ImagesInMemory(LightningDataModule):
    """Loaders over three splits that subclasses put into `train`, `val` and `test` in `setup`."""

    train: Split
    val: Split
    test: Split

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.train), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.val), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.test), batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()


def cut(images: Tensor, labels: Tensor, sizes: list[int], seed: int = 0) -> list[Split]:
    """Deal shuffled samples into splits of the given sizes; the rest becomes the last split."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([*sizes, len(labels) - sum(sizes)])
    return [(images[part], labels[part]) for part in parts]


def read_idx(path: Path) -> Tensor:
    """Read unsigned bytes in the format of MNIST's files, gzipped or not; torchvision reads them unzipped alone."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # Two zero bytes, the type (8 for unsigned bytes), the number of dimensions, then each as a big-endian integer.
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.copy()).view(shape)


class DigitsDataModule(ImagesInMemory):
    """The 1797 handwritten digits of 8x8 pixels that come with scikit-learn; nothing is downloaded.

    Args:
        batch_size: samples per batch on each device.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        self.val, self.test, self.train = cut((images - 4.9) / 6.0, labels, [180, 360])


class FashionMNISTDataModule(ImagesInMemory):
    """Fashion-MNIST: 28x28 pixels, 55000 images to train on, 5000 to validate and 10000 to test.

    Args:
        root: a folder that holds the four `idx-ubyte` files, gzipped or not (Debian's package `dataset-fashion-mnist`
            puts them into `/usr/share/datasets/fashion-mnist`), else where torchvision keeps its download.
        batch_size: samples per batch on each device.
    """

    def __init__(self, root: str = "data", batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.root = Path(root)

    def prepare_data(self) -> None:
        if not self._has_files():
            FashionMNIST(self.root, download=True)

    def setup(self, stage: str) -> None:
        self.val, self.train = cut(*self._read("train"), [5000])
        self.test = self._read("t10k")

    def _has_files(self) -> bool:
        return any(self.root.glob("train-images-idx3-ubyte*"))

    def _read(self, split: str) -> Split:
        if self._has_files():
            # Where a file lies there both gzipped and not, either will do.
            images = read_idx(next(self.root.glob(f"{split}-images-idx3-ubyte*")))
            labels = read_idx(next(self.root.glob(f"{split}-labels-idx1-ubyte*"))).long()
        else:
            dataset = FashionMNIST(self.root, train=split == "train")
            images, labels = dataset.data, dataset.targets
        return (images.float().unsqueeze(1) / 255 - 0.286) / 0.353, labels
