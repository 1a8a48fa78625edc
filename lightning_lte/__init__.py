"""Train networks from scratch through parallel low-rank heads: LoRA-the-Explorer as a Lightning strategy."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lte.callback import LTECallback
from lightning_lte.config import LTEConfig
from lightning_lte.explorer import Explorer
from lightning_lte.merge import MergeRecord
from lightning_lte.schedule import Every, MergeSchedule
from lightning_lte.strategy import LTEStrategy
from lightning_lte.transport import Transport

__version__ = "0.1.0"

__all__ = [
    "Every",
    "Explorer",
    "LTECallback",
    "LTEConfig",
    "LTEStrategy",
    "MergeRecord",
    "MergeSchedule",
    "Transport",
]

StrategyRegistry.register(
    "lte", LTEStrategy, description="Parallel low-rank heads with periodic merges (LoRA-the-Explorer)", override=True
)
