"""What the callback tells loggers and the progress bar."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_lte import LTECallback, LTEStrategy
from lightning_lte import callback as module_callback
from lightning_lte.metrics import effective_rank
from tests.modules import RANK, Module, clone, loader, needs_fully_shard, sgd, trainer
from tests.processes import run

NAMES = {
    "lte/merges",
    "lte/heads",
    "lte/delta_norm",
    "lte/head_disagreement",
    "lte/merge_time_s",
    "lte/merge_wait_s",
    "lte/bytes_sent",
    "lte/bytes_received",
    "lte/ddp_bytes_sent",
    "lte/heads_restarted",
}


def fit(
    folder: Path, heads: int = 4, devices: int = 1, base: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[list[dict[str, str]], Trainer]:
    logger = CSVLogger(str(folder), name="", version="")
    strategy = LTEStrategy(heads, 3, rank=RANK, **(base or {}))
    t = trainer(strategy, devices=devices, max_steps=7, logger=logger, log_every_n_steps=1, **kwargs)
    t.fit(Module(optimizer=sgd), loader(160 * devices, 16))
    if t.global_rank != 0:
        return [], t
    with open(folder / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("lte/merges")], t


def test_every_merge_reaches_the_users_logger(tmp_path: Path) -> None:
    rows, _ = fit(tmp_path)
    assert [float(row["lte/merges"]) for row in rows] == [1, 2, 3]  # the last one at the end of training
    for row in rows:
        assert row.keys() >= NAMES
        assert float(row["lte/heads"]) == 4
        assert float(row["lte/delta_norm"]) > 0
        assert 0 <= float(row["lte/head_disagreement"])
        assert float(row["lte/bytes_sent"]) == 0
        assert float(row["lte/merge_time_s"]) > 0


def test_the_effective_rank_is_logged_where_it_is_asked_for(tmp_path: Path) -> None:
    ranks: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, t: Trainer, m: Any, *args: Any) -> None:
            ranks.append((effective_rank(m.net.first.weight) + effective_rank(m.net.second.weight)) / 2)

    rows, _ = fit(tmp_path, callbacks=[LTECallback(effective_rank=True), Look()])
    assert [float(row["lte/effective_rank"]) for row in rows[:2]] == pytest.approx([ranks[2], ranks[5]])
    assert ranks[0] == ranks[1] != ranks[2]  # of the weights as of the last merge


def _effective_ranks(folder: str, devices: int) -> list[list[float]]:
    found = []
    for kept in ("cpu", "sharded", "error-feedback"):
        base, own = {"base": "bfloat16", "base_copy": kept}, Path(folder, kept)
        rows, _ = fit(own, devices=devices, base=base, callbacks=[LTECallback(effective_rank=True)])
        found.append([float(row["lte/effective_rank"]) for row in rows])
    return found


@pytest.mark.parametrize("devices", [1, 2])
def test_the_effective_rank_is_that_of_weights_that_the_module_does_not_show(devices: int, tmp_path: Path) -> None:
    ranks = run(_effective_ranks, devices, str(tmp_path), devices, group=False)[0]
    assert len(ranks[0]) == 3 and ranks[0] == ranks[1]
    assert ranks[2] == pytest.approx(ranks[0], rel=1e-3)


def _effective_ranks_of_shared_out(folder: str) -> list[list[float]]:
    found = []
    for shard in (1, 2):
        own = Path(folder, str(shard))
        callbacks = [LTECallback(effective_rank=True)]
        rows, _ = fit(own, heads=2 // shard, devices=2, base={"shard": shard}, callbacks=callbacks)
        found.append([float(row["lte/effective_rank"]) for row in rows])
    return found


@needs_fully_shard
def test_the_effective_rank_is_that_of_weights_that_devices_share_out(tmp_path: Path) -> None:
    whole, shared_out = run(_effective_ranks_of_shared_out, 2, str(tmp_path), group=False)[0]
    # Of one head in place of two, so merges are others; a half of a weight has a rank of some 8 at most.
    assert shared_out == pytest.approx(whole, rel=0.1)


def test_nothing_is_decomposed_where_nobody_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_callback, "effective_rank", lambda weight: pytest.fail("decomposed"))
    callbacks: list[Callback] = [LTECallback(effective_rank=True)]
    trainer(LTEStrategy(4, 3, rank=RANK), max_steps=4, callbacks=callbacks).fit(Module(), loader(160, 16))


def test_the_steps_are_those_of_lightnings_own_metrics(tmp_path: Path) -> None:
    fit(tmp_path)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    by_step: dict[str, set[str]] = {}
    for row in rows:
        by_step.setdefault(row["step"], set()).update(key for key, value in row.items() if value)
    assert {"loss", "lte/merges"} <= by_step["2"] and {"loss", "lte/merges"} <= by_step["5"]


def test_the_norm_is_that_of_what_was_added(tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_start(self, t: Trainer, m: Any) -> None:
            states.append(clone(m.state_dict()))

        def on_train_batch_end(self, t: Trainer, m: Any, *args: Any) -> None:
            if t.global_step == 3:
                states.append(clone(m.state_dict()))

    rows, _ = fit(tmp_path, callbacks=[Keep()])
    added = [states[1][f"net.{n}.weight"] - states[0][f"net.{n}.weight"] for n in ("first", "second")]
    assert float(rows[0]["lte/delta_norm"]) == pytest.approx(math.sqrt(sum(float(a.square().sum()) for a in added)))


def test_the_progress_bar_shows_the_count_of_merges() -> None:
    seen: list[Any] = []

    class Bar(Callback):
        def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
            seen.append(t.progress_bar_metrics.get("lte/merges"))

    trainer(LTEStrategy(4, 3, rank=RANK), max_steps=7, callbacks=[Bar()]).fit(Module(), loader(160, 16))
    assert seen == [0, 0, 1, 1, 1, 2, 2]


def test_a_barebones_trainer_has_nothing_to_warn_of(recwarn: pytest.WarningsRecorder) -> None:
    class Quiet(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).square().mean()

    strategy = LTEStrategy(4, 3, rank=RANK)
    Trainer(barebones=True, accelerator="cpu", devices=1, max_steps=4, strategy=strategy).fit(Quiet(), loader(64))
    assert not [w for w in recwarn if "self.log" in str(w.message)]


def test_no_batch_copies_the_count_of_merges_to_the_device() -> None:
    """Lightning would copy a number there, for which a GPU is waited for; a tensor it keeps where it is."""
    logged: list[Any] = []

    class Watched(Module):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged.append((name, value))
            super().log(name, value, *args, **kwargs)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

    kept: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
            kept.append(t.fit_loop.epoch_loop._results["on_train_batch_end.lte/merges"].value)

    trainer(LTEStrategy(4, 3, rank=RANK), max_steps=4, callbacks=[Look()]).fit(Watched(), loader(160, 16))
    assert [name for name, _ in logged] == ["lte/merges"] * 4
    for value in (*(own for _, own in logged), *kept):
        assert isinstance(value, torch.Tensor) and value.device.type == "cpu"


def test_one_comes_by_itself_and_a_users_own_is_kept() -> None:
    t = trainer(LTEStrategy(4, rank=RANK), max_steps=1)
    t.fit(Module(), loader())
    t.fit(Module(), loader())
    assert sum(isinstance(c, LTECallback) for c in t.callbacks) == 1 and isinstance(t.callbacks[0], LTECallback)
    own = LTECallback()
    t = trainer(LTEStrategy(4, rank=RANK), max_steps=1, callbacks=[own])
    t.fit(Module(), loader())
    assert [c for c in t.callbacks if isinstance(c, LTECallback)] == [own]


def test_one_of_the_modules_own_comes_before_all_others_too() -> None:
    class Configured(Module):
        def configure_callbacks(self) -> Any:
            return [LTECallback(effective_rank=True)]

    class Last(Callback):
        def on_train_end(self, t: Trainer, module: Any) -> None:
            seen.append((t.strategy.explorer.unmerged, [type(c) for c in t.callbacks]))

    seen: list[Any] = []
    trainer(LTEStrategy(4, 3, rank=RANK), max_steps=4, callbacks=[Last()]).fit(Configured(), loader(64))
    assert seen == [(False, [LTECallback, Last])]


def test_without_the_strategy_it_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match="LTECallback watches LTEStrategy"):
        trainer("auto", max_steps=1, callbacks=[LTECallback()]).fit(Module(), loader())


def _fit_on_two(folder: str) -> list[dict[str, str]]:
    return fit(Path(folder), devices=2)[0]


def test_bytes_are_counted_on_two_devices(tmp_path: Path) -> None:
    rows = run(_fit_on_two, 2, str(tmp_path), group=False)[0]
    assert len(rows) == 3
    for row in rows:
        assert float(row["lte/bytes_received"]) == float(row["lte/bytes_sent"]) > 0
        assert 0 <= float(row["lte/merge_wait_s"]) <= float(row["lte/merge_time_s"])
    # The last merge came after one step, those before after three.
    ddp = [float(row["lte/ddp_bytes_sent"]) for row in rows]
    assert ddp[0] == ddp[1] == 3 * ddp[2] == 3 * sum(p.nbytes for p in Module().parameters())


def _logged_on_the_first(folder: str) -> tuple[bool, dict[str, torch.Tensor]]:
    first = os.environ["RANK"] == "0"
    strategy = LTEStrategy(2, 2, rank=RANK)
    logger = CSVLogger(folder, name="", version="") if first else False
    t = trainer(strategy, devices=2, max_epochs=1, logger=logger, log_every_n_steps=1)
    module = Module(optimizer=sgd)
    t.fit(module, loader(16 * 2 * 5, 16))
    return strategy.measure, clone(module.state_dict())


def test_a_logger_on_the_first_device_alone_is_enough(tmp_path: Path) -> None:
    (measures, own), (same, other) = run(_logged_on_the_first, 2, str(tmp_path), group=False)
    assert measures and same
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    with (tmp_path / "metrics.csv").open() as file:
        norms = [row["lte/delta_norm"] for row in csv.DictReader(file)]
    assert sum(bool(norm) for norm in norms) >= 2
