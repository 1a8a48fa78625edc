"""What is logged while heads take turns is what one step on the whole batch would log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, MinMetric
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

from lightning_lte import LTEStrategy
from lightning_lte.turns import MeanLog, _of_batch
from tests.another_device import Elsewhere, another_device
from tests.modules import CLASSES, Module, Recorder, loader, trainer

HEADS, BATCH = 4, 12


class Logging(Module):
    """Logs what depends on the data alone, so that it is the same however heads share the device."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log_all(*batch)
        return super().training_step(batch, batch_idx)

    def log_all(self, x: Tensor, y: Tensor) -> None:
        raise NotImplementedError


def logged(module: Logging, heads: int) -> list[dict[str, float]]:
    """What was logged after each step, and at the end of the epoch."""
    execution: Any = "sequential" if heads > 1 else "auto"
    seen = Recorder(lambda t, _: {k: float(v) for k, v in t.callback_metrics.items()})
    t = trainer(LTEStrategy(heads, 2, rank=2, execution=execution), max_epochs=1, callbacks=[seen])
    t.fit(module, loader(3 * BATCH, BATCH))
    whole = [*seen.seen, {k: float(v) for k, v in t.callback_metrics.items()}]
    return [{k: v for k, v in own.items() if not k.startswith(("lte/", "loss"))} for own in whole]


class Metrics(Logging):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.f1 = MeanMetric(), MulticlassF1Score(CLASSES)
        self.auroc = MulticlassAUROC(CLASSES)  # keeps all it sees in lists
        self.both = MetricCollection([MulticlassF1Score(CLASSES, average="weighted"), MulticlassAUROC(CLASSES)])
        self.ratio = MeanMetric() / MinMetric()
        self.late = MeanMetric()

    def log_all(self, x: Tensor, y: Tensor) -> None:
        guess = x[:, :CLASSES].double().requires_grad_() * 2
        self.mean(y.double())
        self.f1(guess, y)
        self.auroc(guess, y)
        self.both(guess, y)
        self.ratio(y + 1.0)
        self.late.update(y.double())
        for name in ("mean", "f1", "auroc", "ratio", "late"):
            self.log(name, getattr(self, name), on_step=True, on_epoch=True)
        self.log_dict(self.both, on_step=True, on_epoch=True)
        self.mean(x.sum(1))
        self.log("another", self.mean)


def test_metrics_have_the_value_of_the_whole_batch_at_each_step_and_of_the_epoch_at_its_end() -> None:
    expected, found = logged(Metrics(), 1), logged(Metrics(), HEADS)
    assert {"mean_step", "f1_step", "auroc_step", "MulticlassAUROC_step", "ratio_step", "another"} <= found[0].keys()
    assert "late_step" not in found[0] and "late_epoch" in found[-1]
    assert found == [pytest.approx(own) for own in expected]


class Reductions(Logging):
    def log_all(self, x: Tensor, y: Tensor) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "sum": ("sum", "SUM", torch.sum, sum),
            "max": ("max", torch.max, max),
            "min": ("min", torch.min, min),
            "mean": ("mean", "avg", torch.mean),
        }
        for name, functions in choices.items():
            for i, function in enumerate(functions):
                value = getattr(torch, name)(x)
                self.log(f"{name}{i}", value, reduce_fx=function, on_step=True, on_epoch=True)
        self.log("third", torch.tensor(1 / 3, dtype=torch.float64), on_step=True)
        self.log("number", 3)
        self.log("positional", x.sum(), False, None, True, True, "sum")


def test_every_reduction_that_lightning_takes_is_made_and_float64_stays_exact() -> None:
    expected, found = logged(Reductions(), 1), logged(Reductions(), HEADS)
    assert len(found[0]) > 12 and found == [pytest.approx(own, rel=1e-12) for own in expected]
    assert found[0]["third"] == 1 / 3


def test_a_log_of_the_users_own_gets_what_it_was_given() -> None:
    class Passing(Reductions):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            super().log(name, value, *args, **kwargs)

    # What is positional here has no name, and is handed on as it came.
    assert logged(Passing(), HEADS)[-1].keys() == logged(Reductions(), 1)[-1].keys()


@pytest.mark.parametrize("value", ["text", None])
def test_what_lightning_does_not_log_is_refused_in_its_words(value: Any) -> None:
    class Wrong(Logging):
        def log_all(self, x: Tensor, y: Tensor) -> None:
            self.log("wrong", value)

    with pytest.raises(ValueError, match=r"self\.log\(wrong"):
        logged(Wrong(), HEADS)


def test_reductions_that_lightning_does_not_make_are_refused_in_its_words() -> None:
    class Wrong(Logging):
        def log_all(self, x: Tensor, y: Tensor) -> None:
            self.log("wrong", x.mean(), reduce_fx=torch.median)

    with pytest.raises(Exception, match=r"Only `self\.log\(\.\.\., reduce_fx=\{min,max,mean,sum\}\)` are supported"):
        logged(Wrong(), HEADS)


def test_a_metric_is_as_it_was_after_it_was_asked_about_a_batch() -> None:
    metric = CatMetric()
    metric.update(torch.arange(3.0))
    kept = metric.value
    inputs: Any = [((torch.tensor([5.0]),), {}), ((), {"value": torch.tensor([6.0])})]
    assert _of_batch(metric, inputs).tolist() == [5, 6]
    assert metric.value is kept and metric.compute().tolist() == [0, 1, 2] and metric.update_count == 1


@pytest.mark.parametrize("together", [False, True])
def test_metrics_talk_to_other_devices_at_a_step_only_where_they_are_told_to(together: bool) -> None:
    calls: list[Tensor] = []

    def gather(value: Tensor, group: Any) -> list[Tensor]:
        calls.append(value)
        return [value, value]

    choices: dict[str, Any] = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    metric = MeanMetric(dist_sync_on_step=together, **choices)
    assert float(_of_batch(metric, [((torch.tensor(3.0),), {})])) == 3
    assert bool(calls) == together


def test_metrics_that_are_not_logged_at_steps_are_not_asked() -> None:
    class Counting(MeanMetric):
        computed = 0

        def compute(self) -> Tensor:
            type(self).computed += 1
            return super().compute()

    def compute(**choices: Any) -> int:
        Counting.computed = 0
        log = MeanLog(lambda *_, **__: None)
        module = nn.ModuleDict({"metric": Counting()})
        with log.watching(module):
            module["metric"](torch.tensor(1.0))
            log("metric", module["metric"], **choices)
        log.flush()
        assert isinstance(module["metric"], Metric) and not module["metric"]._forward_hooks
        return Counting.computed

    assert compute() == 2 and compute(on_step=False) == 1


def test_numbers_and_tensors_of_another_device_have_one_mean() -> None:
    seen: list[Any] = []
    log = MeanLog(lambda name, value, batch_size=None: seen.append(value))
    with another_device():
        for value in (1.0, Elsewhere(torch.tensor(4.0)), torch.tensor(7)):
            log("x", value)
        log.flush()
    [mean] = seen
    assert isinstance(mean, Elsewhere) and mean.item() == 4
