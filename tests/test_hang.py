"""A device that hangs ends the others in time, with a word about where."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lightning_lte import LTEStrategy, Transport
from tests.modules import RANK, Module, Recorder, loader, sgd, trainer
from tests.processes import run

TIMEOUT_S = 3.0
# What comes on top of the timeout: words through the store, Lightning's teardown, and a machine that is busy.
ON_TOP_S = 12.0


class Hang(Callback):
    """Hangs one rank before a step."""

    def __init__(self, rank: int, step: int, how: str) -> None:
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_start(self, t: Trainer, *args: Any) -> None:
        if t.global_rank == self.rank and t.global_step == self.step:
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)


def hang(folder: str, rank: int, step: int, how: str, save: bool, store_port: int | None) -> None:
    """Train; the rank that does not hang notes how long its `fit` took from its last batch on, and lets it raise."""
    if store_port is not None:
        # Rank 0 holds the store, as with Lightning's own launcher.
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(store_port))
    last: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            last.append(time.monotonic())

    strategy = LTEStrategy(4, 3, rank=RANK, timeout=timedelta(seconds=TIMEOUT_S))
    callbacks: list[Callback] = [Hang(rank, step, how), Clock()]
    if save:
        callbacks.append(Recorder(lambda t, _: t.save_checkpoint(f"{folder}/5.ckpt") if t.global_step == 5 else None))
    t = trainer(strategy, devices=2, max_epochs=1, callbacks=callbacks)
    try:
        t.fit(Module(optimizer=sgd), loader(16 * 2 * 7, 16))
    finally:
        Path(folder, "seconds").write_text(str(time.monotonic() - last[-1]))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "step", "how", "save", "words"),
    [
        (1, 4, "asleep", False, ["At merge 2, after step 6,", "rank 1 (merge 1, after step 3)"]),
        (1, 3, "stopped", True, ["At a checkpoint after step 5 and merge 1,", "rank 1 (merge 1, after step 3)"]),
        (0, 4, "stopped", False, ["At merge 2, after step 6,", "Rank 0's process, which all ask"]),
        (1, 0, "asleep", False, ["At the trial of the first batch,"]),
        (1, 1, "stopped", False, ["At the look at the first gradients after step 1 and merge 0,"]),
    ],
)
def test_a_rank_that_hangs_ends_the_others_in_time_with_a_word_about_where(
    tmp_path: Path, rank: int, step: int, how: str, save: bool, words: list[str]
) -> None:
    # Where rank 0 is to hang it holds the store, as with Lightning's own launcher, and the store hangs, too.
    port = free_port() if rank == 0 else None
    with pytest.raises(RuntimeError, match=f"rank {1 - rank} raised") as error:
        run(hang, 2, str(tmp_path), rank, step, how, save, port, group=False, timeout_s=60)
    said = str(error.value)
    for word in (*words, f"within {TIMEOUT_S:g} s", f"rank {1 - rank} gave up", "go on from the last checkpoint"):
        assert word in said
    assert "The above exception was the direct cause" in said
    seconds = float((tmp_path / "seconds").read_text())
    assert TIMEOUT_S * 0.9 < seconds < TIMEOUT_S + ON_TOP_S


def _watched(backend: str) -> list[str]:
    import contextlib
    import io

    dist.get_backend = lambda *_: (
        backend
    )  # it ends the process itself when the time is out, before an error can say why
    said = io.StringIO()
    transport = Transport(dist.get_world_size(), dist.get_rank(), timeout=timedelta(seconds=1))
    with contextlib.redirect_stderr(said):
        with transport.meeting("merge 1, after step 3"):
            pass
        time.sleep(1.2)
        soon = said.getvalue()
        with transport.meeting("merge 2, after step 6"):
            time.sleep(1.2)
    return [soon, said.getvalue()]


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_with_nccl_the_word_comes_before_the_end(backend: str) -> None:
    for soon, later in run(_watched, 2, backend):
        assert soon == ""
        assert "At merge 2, after step 6, all devices have to meet within 1 s" in later


def _other_errors() -> None:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    with pytest.raises(RuntimeError, match="mine"), transport.meeting("merge 1"):
        raise RuntimeError("mine")
    with pytest.raises(FloatingPointError), transport.meeting("merge 1"):
        raise FloatingPointError
    # Of a collective of objects, say, which go through the memory of GPUs.
    within: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d", "torch": torch}
    exec("def gather_object(): raise torch.OutOfMemoryError('too large')", within)
    with pytest.raises(torch.OutOfMemoryError, match="too large"), transport.meeting("a checkpoint"):
        within["gather_object"]()
    assert not transport.lost


def test_other_errors_stay_as_they_are() -> None:
    run(_other_errors, 2)
