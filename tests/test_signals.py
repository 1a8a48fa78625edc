"""Clusters ask runs by signals to save, to be started again, and to end; devices are steps apart then."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_lte import LTEStrategy
from tests.modules import RANK, Module, Slices, clone, sgd, trainer
from tests.processes import run

PERIOD, STEPS = 5, 12


class Slurm(SLURMEnvironment):
    """SLURM, as far as its signal goes; the processes are the tests'."""

    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    def global_rank(self) -> int:
        return int(os.environ.get("RANK", 0))

    local_rank = global_rank

    def node_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])


class Signalled(Module):
    """Gets a signal in the middle of a step."""

    def __init__(self, signum: int, at: int | None) -> None:
        super().__init__(optimizer=sgd)
        self.signum, self.at = signum, at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == self.at:
            self.at = None  # heads that take turns run a step several times
            signal.raise_signal(self.signum)
        return loss


def _requeued(folder: str, devices: int, at: list[int], choices: dict[str, Any]) -> tuple[Any, ...]:
    """Weights of a run that SLURM warns after steps `at`, and of one that goes on from what was saved then; the step of
    that, and what SLURM was asked."""
    asked: list[Any] = []

    def fit(path: str | None, when: int | None) -> dict[str, Tensor]:
        module = Signalled(signal.SIGUSR1, when)
        strategy = LTEStrategy(2 * devices, PERIOD, rank=RANK, **choices)
        environment = Slurm(auto_requeue=True, requeue_signal=signal.SIGUSR1)
        t = trainer(strategy, devices=devices, max_steps=STEPS, plugins=[environment], default_root_dir=folder)
        t.fit(module, Slices(devices, t.global_rank), ckpt_path=path)
        return clone(module.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "7")
        patch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        patch.setattr(signal_connector, "call", lambda command, **_: asked.append(command) or 0)
        rank = int(os.environ.get("RANK", 0)) if devices > 1 else 0
        whole = fit(None, at[rank])
        [saved] = Path(folder).glob("hpc_ckpt_*.ckpt")
        again = fit(str(saved), None)
    step = torch.load(saved, weights_only=True)["lte"]["clocks"][0]["step"]
    return whole, again, step, asked


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_a_run_on_slurm_is_saved_after_the_batch_and_goes_on_exactly(tmp_path: Path, execution: str) -> None:
    whole, again, step, asked = _requeued(str(tmp_path), 1, [7], {"execution": execution})
    assert step == 8 and asked == [["scontrol", "requeue", "7"]]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_is_told_to_terminate_at_once_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(signal_connector, "call", lambda *args, **kwargs: 0)

    class Both(Signalled):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            if self.global_step == self.at:
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    environment = Slurm(auto_requeue=True, requeue_signal=signal.SIGUSR1)
    t = trainer(LTEStrategy(rank=RANK), max_steps=STEPS, plugins=[environment], default_root_dir=tmp_path)
    with pytest.raises(SIGTERMException):
        t.fit(Both(signal.SIGUSR1, 7), Slices(1, 0))
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["lte"]["clocks"][0]["step"] == t.global_step == 8


@pytest.mark.parametrize(("choices", "at", "step"), [({}, [6, 8], 10), ({"full_rank_steps": 4}, [1, 1], 2)])
def test_devices_that_are_steps_apart_are_saved_after_the_merge_that_tells_them(
    tmp_path: Path, choices: dict[str, Any], at: list[int], step: int
) -> None:
    results = run(_requeued, 2, str(tmp_path), 2, at, choices, group=False)
    for rank, (whole, again, saved, asked) in enumerate(results):
        assert saved == step and asked == [["scontrol", "requeue", "7"]] * (rank == 0)
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def _terminated() -> tuple[bool, dict[str, Tensor]]:
    """All are told to terminate while one waits in a merge for another, which is in the middle of a step."""

    class Late(Callback):
        def on_train_batch_start(self, t: Any, *_: Any) -> None:
            if t.global_step == PERIOD - 1 and t.global_rank == 0:
                time.sleep(0.5)
                signal.raise_signal(signal.SIGTERM)

    module = Module(optimizer=sgd)
    t = trainer(LTEStrategy(2, PERIOD, rank=RANK), devices=2, max_steps=STEPS, callbacks=[Late()])
    with pytest.raises(SIGTERMException):
        t.fit(module, Slices(2, t.global_rank))
    return t.global_step == PERIOD, clone(module.state_dict())


def test_a_signal_to_terminate_meets_no_merge_of_other_devices() -> None:
    (ended, first), (other_ended, other) = run(_terminated, 2, group=False)
    assert ended and other_ended
    assert all(torch.equal(first[name], other[name]) for name in first)
