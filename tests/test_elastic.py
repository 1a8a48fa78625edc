"""Workers that are killed, and the files that were being written then."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor

from benchmarks import soak
from lightning_lte import LTEStrategy, files
from lightning_lte.lightning_pytorch import AtomicCheckpointIO
from tests.modules import RANK, Module, loader, trainer
from tests.processes import run

_context = multiprocessing.get_context("forkserver")

# ---- files


def save_and_die(path: str, moment: str) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    files.save({"value": torch.zeros(1000)}, path)
    if moment == "before renaming":
        os.replace = die  # type: ignore[assignment]
    else:
        save = torch.save

        def half(value: Any, file: Any) -> None:
            save(value, file)
            file.truncate(file.tell() // 2)
            die()

        torch.save = half  # type: ignore[assignment]
    files.save({"value": torch.ones(1000)}, path)


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_process_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="died without a word"):
        run(save_and_die, 1, str(path), moment, group=False)
    assert torch.load(path, weights_only=True)["value"].sum() == 0
    # What it left has a name that no search for checkpoints finds, and the next one writes over it.
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.partial"}
    files.save({"value": torch.ones(1000)}, str(path))
    assert torch.load(path, weights_only=True)["value"].sum() == 1000
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def save_for_ever(path: str) -> None:
    number = 0
    while True:
        number += 1
        files.save({"value": torch.full((500_000,), float(number))}, path)


def test_a_checkpoint_is_whole_whenever_its_process_is_killed(tmp_path: Path) -> None:
    chance, path, seen = random.Random(0), tmp_path / "last.ckpt", set()
    for _ in range(10):
        path.unlink(missing_ok=True)
        process = _context.Process(target=save_for_ever, args=(str(path),), daemon=True)
        process.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        value = torch.load(path, weights_only=True)["value"]
        assert len(value) == 500_000 and bool((value == value[0]).all())
        seen.add(float(value[0]))
    assert len(seen) > 1  # at different times


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    files.save({"value": 1}, str(tmp_path / "last.ckpt"))
    with pytest.raises(Exception, match="pickle"):
        files.save({"value": lambda: 0}, str(tmp_path / "last.ckpt"))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt") == {"value": 1}


class OfTheUser(TorchCheckpointIO):
    pass


def test_checkpoints_are_atomic_unless_the_user_has_another_way(tmp_path: Path) -> None:
    assert type(trainer(LTEStrategy(4)).strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(trainer("lte").strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(trainer(LTEStrategy(4), plugins=[OfTheUser()]).strategy.checkpoint_io) is OfTheUser
    late = trainer(LTEStrategy(4, rank=RANK), plugins=[AsyncCheckpointIO()], max_steps=2)
    late.fit(Module(), loader())
    late.save_checkpoint(tmp_path / "sub" / "late.ckpt")
    assert type(late.strategy.checkpoint_io.checkpoint_io) is AtomicCheckpointIO
    late.strategy.checkpoint_io.teardown()  # waits for it
    assert torch.load(tmp_path / "sub" / "late.ckpt", weights_only=True)["lte"]["heads"] == 4


def test_files_elsewhere_than_on_a_disk_are_lightnings_to_write() -> None:
    AtomicCheckpointIO().save_checkpoint({"value": torch.ones(3)}, "memory://somewhere/last.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint("memory://somewhere/last.ckpt", weights_only=True)
    assert loaded["value"].sum() == 3


# ---- torchrun with restarts


def undisturbed(folder: str, steps: int) -> None:
    soak.work(Path(folder), steps, kills=0, seed=0)


def test_a_run_whose_workers_are_killed_ends_as_one_that_nobody_disturbed(tmp_path: Path) -> None:
    """Real processes under torchrun; `benchmarks/soak.py` kills more of them."""
    steps, kills, seed = 12, 2, 8
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    run(undisturbed, 2, str(tmp_path / "undisturbed"), steps, group=False, timeout_s=120)
    expected = torch.load(tmp_path / "undisturbed" / "last.ckpt", weights_only=True)
    got = soak.launch(tmp_path / "killed", steps, kills, seed, timeout_s=170)
    found = soak.killed(tmp_path / "killed")
    assert [(kill["life"], kill["rank"]) for kill in found] == [(0, 0), (1, 1)], json.dumps(found)
    assert got["global_step"] == expected["global_step"] == steps
    for key in ("state_dict", "lte"):
        assert not soak.differences(expected[key], got[key], key)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills(tmp_path: Path) -> None:
    found = soak.soak(tmp_path, kills=20, seed=1, steps=160, timeout_s=2500)
    assert {kill["moment"] for kill in found} == set(soak.MOMENTS) and {kill["rank"] for kill in found} == {0, 1}


def test_differences_are_found() -> None:
    one: dict[str, Any] = {"a": [torch.ones(2), 1], "b": {"c": 2}}
    other: dict[str, Any] = {"a": [torch.zeros(2), 1], "b": {"c": 3}}
    assert soak.differences(one, one) == [] and soak.differences(one, other) == ["/a/0", "/b/c"]
    assert isinstance(one["a"][0], Tensor)
