"""The strategy and the callback for `pytorch_lightning`, the same package under its older name.

    from lightning_lte.pytorch_lightning import LTEStrategy

Each of the two packages takes strategies and callbacks of its own only.
"""

from __future__ import annotations

import pytorch_lightning
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from lightning_lte.callback import HeadsCallback
from lightning_lte.files import AtomicFiles
from lightning_lte.strategy import HeadsStrategy


class LTECallback(HeadsCallback, Callback):  # type: ignore[misc]
    __doc__ = HeadsCallback.__doc__


class AtomicCheckpointIO(AtomicFiles, TorchCheckpointIO):
    __doc__ = AtomicFiles.__doc__


class LTEStrategy(HeadsStrategy, DDPStrategy):  # type: ignore[misc]
    __doc__ = HeadsStrategy.__doc__

    package = pytorch_lightning
    callback_class = LTECallback
    checkpoint_io_class = AtomicCheckpointIO


StrategyRegistry.register(
    "lte", LTEStrategy, description="Parallel low-rank heads with periodic merges (LoRA-the-Explorer)", override=True
)
