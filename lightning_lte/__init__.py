"""Train networks from scratch through parallel low-rank heads: LoRA-the-Explorer as a Lightning strategy."""

from lightning_lte.config import LTEConfig
from lightning_lte.explorer import Explorer
from lightning_lte.merge import MergeRecord
from lightning_lte.schedule import At, BeforeValidation, Every, Growing, MergeSchedule, Piecewise, When
from lightning_lte.transport import Transport

# Projects that import `pytorch_lightning` take these two from `lightning_lte.pytorch_lightning`.
try:
    from lightning_lte.lightning_pytorch import LTECallback, LTEStrategy
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    from lightning_lte.pytorch_lightning import LTECallback, LTEStrategy  # type: ignore[assignment]

__version__ = "0.1.0"

__all__ = [
    "At",
    "BeforeValidation",
    "Every",
    "Explorer",
    "Growing",
    "LTECallback",
    "LTEConfig",
    "LTEStrategy",
    "MergeRecord",
    "MergeSchedule",
    "Piecewise",
    "Transport",
    "When",
]
