"""The Lightning callback: watches merges and tells loggers and the progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_lte.metrics import effective_rank, merge_metrics

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Base
    from lightning.pytorch import LightningModule, Trainer

    from lightning_lte.strategy import HeadsStrategy
else:
    _Base = object


class HeadsCallback(_Base):
    """Logs every merge to the user's own loggers and shows the count of merges in the progress bar.

    `LTEStrategy` adds one by itself if the user gave none. The metrics are those of `merge_metrics`, at the step that
    Lightning's own metrics have. Merging does not depend on this callback.

    Args:
        effective_rank: whether to log `lte/effective_rank`, too, the mean effective rank of all factored weights as a
            merge leaves them, in full precision. It decomposes each of them on the first device, which takes long where
            they are large, and is left out where nobody logs.

    Raises:
        TypeError: on `fit` with another strategy.
    """

    def __init__(self, effective_rank: bool = False) -> None:
        super().__init__()
        self.effective_rank = effective_rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # By name, as the strategy imports this module.
        kinds = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        if stage == "fit" and "HeadsStrategy" not in kinds:
            raise TypeError(
                f"LTECallback watches LTEStrategy; received a Trainer with {type(trainer.strategy).__name__}. Give"
                " Trainer(strategy=LTEStrategy(...)), or leave the callback out."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        explorer = _strategy(trainer).explorer
        if explorer is None:
            return
        # The callbacks that come after this one see the user's own parameters in the optimizers.
        explorer.rest()
        if explorer.merges_before_validation and _validation_is_next(trainer):
            # Now already: a run that goes on from a checkpoint saved after this batch skips its validation.
            _strategy(trainer).merge_before_validation()
        if not trainer.barebones:  # where Lightning warns of each `log`
            # Lightning keeps a tensor where it is. It would copy a number to the module's device, and wait for that.
            merges = torch.tensor(float(explorer.merges), device="cpu")
            pl_module.log("lte/merges", merges, prog_bar=True, logger=False, batch_size=1)
        self._log_merges(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where the validation was not to be foreseen. Before callbacks that put averaged weights in for the validation.
        if hasattr(trainer.strategy, "merge_before_validation"):
            trainer.strategy.merge_before_validation()
            self._log_merges(trainer)
            explorer = _strategy(trainer).explorer
            if explorer is not None:
                explorer.guard.before_swaps()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The strategy puts this callback first, so that the others (weight averaging, checkpoints) see merged weights.
        _strategy(trainer).final_merge()
        self._log_merges(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Before the callbacks that save a checkpoint now, or raise an exception of their own.
        if hasattr(trainer.strategy, "end_after"):
            trainer.strategy.end_after(exception)

    def _log_merges(self, trainer: Trainer) -> None:
        explorer = _strategy(trainer).explorer
        while explorer is not None and explorer.records:
            metrics = merge_metrics(explorer.records.popleft())
            # All devices agree on whether one of them logs.
            if self.effective_rank and _strategy(trainer).measure and not explorer.records:
                decomposes = trainer.is_global_zero and bool(trainer.loggers)
                ranks = [effective_rank(weight) for weight in explorer.exact_weights() if decomposes]
                if ranks:
                    metrics["lte/effective_rank"] = sum(ranks) / len(ranks)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _validation_is_next(trainer: Trainer) -> bool:
    """Whether Lightning validates after the batch that has just ended."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _strategy(trainer: Trainer) -> HeadsStrategy:
    return trainer.strategy  # type: ignore[return-value]
