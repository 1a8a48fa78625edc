"""Kills workers of a run again and again, and checks that it ends as one that nobody disturbed.

    python -m benchmarks.soak --kills 20
    python -m benchmarks.soak --kills 20 --checkpoint sharded

Two processes train a small network under `torchrun --max-restarts`, and save a checkpoint every other step. In each
life of the run one of them gets SIGKILL at a random moment: between two steps, at any time in a step, while a
checkpoint is being written, or right before it gets its name. torchrun starts all anew, and they go on from the last
checkpoint. At the end the weights, and everything that a checkpoint has of the heads, must be bit-equal to those of a
run without kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import LTEStrategy
from lightning_lte.resumable import CheckpointKind

SAVE_EVERY = 2  # steps
MOMENTS = ("between steps", "in a step", "while writing", "before renaming")
# Steps from the start of a life to its kill. A life that is too short to save leaves the next one where it was.
LIFE = (1, 8)


class Net(LightningModule):
    """Draws random numbers, and has all there is to resume: factors, replicas of each head, one that heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(12, 24), nn.LayerNorm(24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 24), nn.Linear(24, 4)
        )
        self.gain = nn.Parameter(torch.ones(12))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0] * self.gain), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Batches:
    """A batch is a function of the step and the rank, and the loader knows where it was: resuming is exact."""

    def __init__(self, steps: int, rank: int) -> None:
        self.steps, self.rank, self.step = steps, rank, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.step < self.steps:
            generator = torch.Generator().manual_seed(1000 * self.rank + self.step)
            x = torch.randn(16, 12, generator=generator)
            self.step += 1
            yield x, x[:, :4].argmax(1)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Kill(Callback):
    """Kills this process once, at a moment that depends on the seed and the life alone."""

    def __init__(self, folder: Path, seed: int, life: int, rank: int) -> None:
        chance = random.Random(f"{seed}/{life}")
        self.moment = chance.choice(MOMENTS)
        # Rank 0 writes checkpoints, alone or with the others.
        self.victim = chance.randrange(2) if self.moment in MOMENTS[:2] else 0
        self.steps, self.delay_s = chance.randint(*LIFE), chance.uniform(0, 0.02)
        self.folder, self.life, self.mine = folder, life, rank == self.victim
        self.at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at = trainer.global_step + self.steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.mine or trainer.global_step < self.at:
            return
        if self.moment == "between steps":
            self.now()
        elif self.moment == "in a step":
            threading.Timer(self.delay_s, self.now).start()
        elif self.moment == "before renaming":
            os.replace = lambda *_: self.now()
        else:
            # Half of the file's bytes are on the disk when it happens.
            save = torch.save

            def half(value: Any, file: Any, **choices: Any) -> None:
                save(value, file, **choices)
                if hasattr(file, "name"):  # what travels between processes goes through torch.save, too
                    file.truncate(file.tell() // 2)
                    self.now()

            torch.save = half  # type: ignore[assignment]
        self.mine = False

    def now(self) -> None:
        told = {"life": self.life, "rank": self.victim, "step": self.at, "moment": self.moment}
        with open(self.folder / "kills.jsonl", "a") as file:
            file.write(json.dumps(told) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def work(folder: Path, steps: int, kills: int, seed: int, checkpoint: CheckpointKind = "gathered") -> None:
    """What a worker does."""
    torch.set_num_threads(1)
    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    seed_everything(0, verbose=False)
    # The only checkpoint is overwritten again and again, so that one half written would be the end of the run.
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=SAVE_EVERY)
    callbacks: list[Callback] = [keep]
    if life < kills:
        callbacks.append(Kill(folder, seed, life, rank))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=LTEStrategy(heads=4, merge_every=3, rank=2, execution="batched", checkpoint=checkpoint),
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), Batches(steps, rank), ckpt_path="last")


def launch(
    folder: Path, steps: int, kills: int, seed: int, timeout_s: float, checkpoint: CheckpointKind = "gathered"
) -> dict[str, Any]:
    """Run the workers under torchrun; returns the last checkpoint.

    Raises:
        RuntimeError: torchrun gave up, with the end of what it wrote.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={kills}", "-m", "benchmarks.soak", "--work", str(folder)]
    command += [f"--steps={steps}", f"--kills={kills}", f"--seed={seed}", f"--checkpoint={checkpoint}"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    root = str(Path(__file__).parents[1])
    # With a store that outlives restarts, gloo and NCCL find the addresses of the dead in it (pytorch/pytorch#135712).
    env = {**inherited, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=timeout_s)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"torchrun gave up:\n{done.stderr[-5000:]}")
    return read(folder / "last.ckpt")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint that is a file, or a directory, of which Lightning's command makes a file."""
    if path.is_dir():
        whole = path.with_name("whole.pt")
        command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", str(path)]
        subprocess.run([*command, f"--output_file={whole}"], check=True, capture_output=True)
        path = whole
    return torch.load(path, weights_only=True)


def killed(folder: Path) -> list[dict[str, Any]]:
    """What was killed, in order."""
    path = folder / "kills.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints are not equal to the bit."""
    if isinstance(a, Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [where]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list):
        if len(a) != len(b):
            return [where]
        return [found for i, own in enumerate(a) for found in differences(own, b[i], f"{where}/{i}")]
    return [] if a == b else [where]


def soak(
    folder: Path, kills: int, seed: int, steps: int, timeout_s: float, checkpoint: CheckpointKind = "gathered"
) -> list[dict[str, Any]]:
    """Run once without kills and once with; returns the kills.

    Raises:
        AssertionError: the two differ, or there were fewer kills.
    """
    results = []
    for name, times in (("undisturbed", 0), ("killed", kills)):
        (folder / name).mkdir()
        results.append(launch(folder / name, steps, times, seed, timeout_s, checkpoint))
    found = killed(folder / "killed")
    assert len(found) == kills, f"{len(found)} kills of {kills}: give more steps"
    assert not killed(folder / "undisturbed")
    assert results[0]["global_step"] == results[1]["global_step"] == steps
    for key in [key for key in results[0] if key == "state_dict" or key.startswith("lte")]:
        differ = differences(results[0][key], results[1][key], key)
        assert not differ, f"these differ from the undisturbed run: {differ}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how often (20)")
    parser.add_argument("--steps", type=int, help="steps of the run (8 for each kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    kinds = get_args(CheckpointKind)
    parser.add_argument("--checkpoint", choices=kinds, default=kinds[0], help="of the strategy (gathered)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = 8 * arguments.kills if arguments.steps is None else arguments.steps
    if arguments.work is not None:
        work(arguments.work, steps, arguments.kills, arguments.seed, arguments.checkpoint)
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        timeout_s = 120.0 * (arguments.kills + 1)
        found = soak(Path(folder), arguments.kills, arguments.seed, steps, timeout_s, arguments.checkpoint)
        for kill in found:
            print("life {life}: rank {rank} at step {step}, {moment}".format(**kill))
        print(f"{len(found)} kills in {time.monotonic() - start:.0f} s; the result is bit-equal to that without kills")


if __name__ == "__main__":
    main()
