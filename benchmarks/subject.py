"""What a benchmark measures: a model of timm's with random images, or a model of your own.

A model of your own is a Python file with three functions, whose path stands for its name:

    def model() -> nn.Module                           # with random weights, on the CPU
    def batch(samples: int) -> Any                     # as a loader gives it, with so many samples
    def loss(model: nn.Module, batch: Any) -> Tensor   # a mean over samples

For a LightningModule, `loss` returns what `training_step` does: the loss, or a mapping that has it under "loss".
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional

FUNCTIONS = ("model", "batch", "loss")

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model, batches for it, and its loss.

    Attributes:
        name: in timm, or the path of a file.
        depth: blocks of a model of timm's; None for its own number.
        loss: the mean loss of a batch.
    """

    name: str
    depth: int | None
    loss: Loss
    _model: Callable[[], nn.Module]
    _batch: Callable[[int], Any]

    @classmethod
    @cache
    def of(cls, name: str, depth: int | None = None) -> Subject:
        """The one of a name. A file is read once.

        Raises:
            ValueError: there is none, a function is missing, or the model takes no depth; with the remedy.
        """
        if name.endswith(".py"):
            if depth is not None:
                raise ValueError(f"--depth is for models of timm's; received {depth} for {name}")
            return cls(Path(name).stem, None, **_functions(Path(name)))
        if not timm.is_model(name):
            raise ValueError(
                f"no model of timm's has the name {name!r}; timm.list_models() has those there are. For a model of your"
                " own give the path of a Python file, which ends in .py"
            )
        chosen: dict[str, Any] = {}
        if depth is not None:
            chosen["depth"] = depth
            try:
                with torch.device("meta"):
                    timm.create_model(name, **chosen)
            except TypeError:
                message = f"--depth is for models that take one, as ViTs do; received {depth} for {name}"
                raise ValueError(message) from None
        return cls(name, depth, _cross_entropy, lambda: timm.create_model(name, **chosen), lambda n: _images(name, n))

    @property
    def described(self) -> str:
        """The name and the depth."""
        return self.name if self.depth is None else f"{self.name} of depth {self.depth}"

    def model(self, device: torch.device, seed: int) -> nn.Module:
        """The model in train mode, with the same weights for the same seed."""
        torch.manual_seed(seed)
        return self._model().to(device).train()

    def batch(self, samples: int, device: torch.device, seed: int) -> Any:
        """A batch of so many samples, the same one for the same seed."""
        torch.manual_seed(seed)
        return move_data_to_device(self._batch(samples), device)


def _functions(path: Path) -> dict[str, Any]:
    """The functions of a file, as `Subject` has them."""
    if not path.is_file():
        raise ValueError(f"a model of your own is a Python file; there is none at {path}")
    spec = importlib.util.spec_from_file_location(f"benchmarks.subject.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle ask there
    spec.loader.exec_module(module)
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise ValueError(
            f"the file of a model has the functions {', '.join(FUNCTIONS)}, see benchmarks/subject.py; {path} has no"
            f" {', '.join(missing)}"
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = module.loss(model, batch)
        found = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(found, Tensor) or found.numel() != 1:
            received = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(output)[:100]
            raise ValueError(
                f'`loss` of {path} must return a tensor with one number, or a mapping that has it under "loss";'
                f" received {received}. Return a mean over samples"
            )
        return found

    return {"loss": loss, "_model": module.model, "_batch": module.batch}


def _images(name: str, samples: int) -> tuple[Tensor, Tensor]:
    """Random images of the size that a model of timm's is for, and random labels."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return torch.randn(samples, *config.input_size), torch.randint(0, config.num_classes, (samples,))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])
