"""Workers that are killed, and the files that were being written then."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
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
    with pytest.raises(Exception, match="local object"):
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


def undisturbed(folder: str, steps: int, checkpoint: Any) -> None:
    soak.work(Path(folder), steps, kills=0, seed=0, checkpoint=checkpoint)


@pytest.mark.parametrize("checkpoint", ["gathered", "sharded"])
def test_a_run_whose_workers_are_killed_ends_as_one_that_nobody_disturbed(tmp_path: Path, checkpoint: Any) -> None:
    """Real processes under torchrun; `benchmarks/soak.py` kills more of them."""
    steps, kills, seed = 12, 2, 8
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    run(undisturbed, 2, str(tmp_path / "undisturbed"), steps, checkpoint, group=False, timeout_s=120)
    expected = soak.read(tmp_path / "undisturbed" / "last.ckpt")
    got = soak.launch(tmp_path / "killed", steps, kills, seed, 170, checkpoint)
    found = soak.killed(tmp_path / "killed")
    assert [(kill["life"], kill["rank"]) for kill in found] == [(0, 0), (1, 1)], json.dumps(found)
    assert got["global_step"] == expected["global_step"] == steps
    kept = {key for key in got if key == "state_dict" or key.startswith("lte")}
    assert len(kept) == 2 + (checkpoint == "sharded")
    for key in kept:
        assert not soak.differences(expected[key], got[key], key)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("checkpoint", ["gathered", "sharded"])
def test_twenty_kills(tmp_path: Path, checkpoint: Any) -> None:
    found = soak.soak(tmp_path, kills=20, seed=1, steps=160, timeout_s=2500, checkpoint=checkpoint)
    assert {kill["moment"] for kill in found} == set(soak.MOMENTS) and {kill["rank"] for kill in found} == {0, 1}


SHRINKING = """
    import glob
    import os
    import sys
    import time
    import torch
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from benchmarks.soak import Batches, Net
    from lightning_lte import LTEStrategy

    class Slow(Callback):
        def on_train_batch_end(self, trainer, *args):
            time.sleep(0.3)

    folder, resume = sys.argv[1:]
    saved = sorted(glob.glob(f"{folder}/step=*.ckpt"), key=lambda name: int(name.rpartition("=")[2][:-5]))
    rank = int(os.environ["RANK"])
    with open(f"{folder}/{os.environ['WORLD_SIZE']}-{rank}.pid", "w") as file:
        file.write(str(os.getpid()))
    torch.set_num_threads(1)
    seed_everything(0)
    keep = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        strategy=LTEStrategy(heads=4, merge_every=3, rank=2, execution="batched"),
        max_steps=STEPS,
        callbacks=[keep, Slow()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), Batches(STEPS, rank), ckpt_path=resume or (saved[-1] if saved else None))
"""


def eventually(found: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_rest_goes_on_without_a_node_that_is_gone(tmp_path: Path) -> None:
    """Two nodes of one process each; the second is killed, and the first goes on with all heads."""
    script, out, steps = tmp_path / "script.py", tmp_path / "out", 14
    out.mkdir()
    script.write_text(textwrap.dedent(SHRINKING).replace("STEPS", str(steps)))
    root = str(Path(__file__).parents[1])
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--max-restarts=3"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=shrink"]
    nodes += ["--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"]

    def start(*more: str, folder: Path, resume: str) -> subprocess.Popen[str]:
        whole = [*command, *more, str(script), str(folder), resume]
        log = open(folder / f"log-{time.monotonic_ns()}.txt", "w")
        return subprocess.Popen(whole, env=env, stdout=log, stderr=log, text=True, start_new_session=True)

    first = start(*nodes, folder=out, resume="")
    time.sleep(1)
    second = start(*nodes, folder=out, resume="")
    try:
        eventually((out / "step=4.ckpt").exists, 90)
        gone = next(int(f.read_text()) for f in out.glob("2-*.pid") if parent_of(int(f.read_text())) == second.pid)
        os.kill(second.pid, signal.SIGKILL)
        os.kill(gone, signal.SIGKILL)
        assert first.wait(200) == 0
    finally:
        for process in (first, second):
            process.kill()
    end = torch.load(out / f"step={steps}.ckpt", weights_only=True)
    assert end["global_step"] == steps and end["lte"]["devices"] == 1
    # The last that both nodes wrote together is what the first went on from.
    saved = {int(f.stem[5:]): f for f in out.glob("step=*.ckpt")}
    both = [n for n, f in saved.items() if torch.load(f, weights_only=True)["lte"]["devices"] == 2]
    again = tmp_path / "again"
    again.mkdir()
    alone = start("--standalone", folder=again, resume=str(saved[max(both)]))
    assert alone.wait(100) == 0
    expected = torch.load(again / f"step={steps}.ckpt", weights_only=True)
    assert not soak.differences(expected["lte"]["clocks"], end["lte"]["clocks"])
    for key in ("factors", "replicas", "optimizers"):
        assert not soak.differences(expected["lte"][key], end["lte"][key], key)
    assert not soak.differences(expected["state_dict"], end["state_dict"])


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_differences_are_found() -> None:
    one: dict[str, Any] = {"a": [torch.ones(2), 1], "b": {"c": 2}}
    other: dict[str, Any] = {"a": [torch.zeros(2), 1], "b": {"c": 3}}
    assert soak.differences(one, one) == [] and soak.differences(one, other) == ["/a/0", "/b/c"]
    assert isinstance(one["a"][0], Tensor)
