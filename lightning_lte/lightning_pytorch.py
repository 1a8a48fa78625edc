"""The strategy and the callback for `lightning.pytorch`, which `lightning_lte` itself exports if that is installed."""

from __future__ import annotations

import lightning.pytorch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_lte.callback import HeadsCallback
from lightning_lte.files import AtomicFiles
from lightning_lte.strategy import HeadsStrategy


class LTECallback(HeadsCallback, Callback):
    __doc__ = HeadsCallback.__doc__


class AtomicCheckpointIO(AtomicFiles, TorchCheckpointIO):
    __doc__ = AtomicFiles.__doc__


class LTEStrategy(HeadsStrategy, DDPStrategy):
    __doc__ = HeadsStrategy.__doc__

    package = lightning.pytorch
    callback_class = LTECallback
    checkpoint_io_class = AtomicCheckpointIO


StrategyRegistry.register(
    "lte", LTEStrategy, description="Parallel low-rank heads with periodic merges (LoRA-the-Explorer)", override=True
)
