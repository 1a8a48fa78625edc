"""The examples run, and what the documentation says of the code is so."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

import lightning_lte
from examples import curves, demo, plain_loop
from examples.data import DigitsDataModule
from examples.vit import ViTClassifier
from lightning_lte import LTEConfig, transport
from lightning_lte.injection import inject
from lightning_lte.merge import Merge
from lightning_lte.running_statistics import RunningStatistics
from lightning_lte.transport import Transport

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what `seed_everything` writes there is taken back after the test.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("PL_GLOBAL_SEED")


def test_demo_compares_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, heads = demo.main(["--epochs=1", "--seed=3", f"--folder={tmp_path}"]).values()

    # The comparison is fair only if both saw the same.
    assert full.order == heads.order
    assert (
        full.test["test/accuracy"] != heads.test["test/accuracy"] or full.test["test/loss"] != heads.test["test/loss"]
    )
    assert full.trained == sum(p.numel() for p in ViTClassifier().parameters())
    assert full.moments == 2 * 4 * full.trained
    assert heads.moments == 2 * 4 * heads.trained
    assert (tmp_path / "curves.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    for word in ("seed 3", "Python", "torch", "cores", "test accuracy", "computed", "the same data in the same order"):
        assert word in printed


class _NobodyThere:
    """Stands in for torch.distributed on a device whose companions all have what it has."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_reduce(self, tensor: torch.Tensor, group: None) -> None:
        tensor.mul_(self.world_size)

    def all_gather(self, parts: list[torch.Tensor], tensor: torch.Tensor, group: None) -> None:
        for part in parts:
            part.copy_(tensor)


@pytest.mark.parametrize(("rank", "devices"), [(2, 2), (16, 2), (16, 8)])
def test_computed_bytes_are_those_a_merge_counts(rank: int, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ViTClassifier()
    config = LTEConfig(heads=devices, rank=rank)
    alone = inject(model, list(model.parameters()), config)
    monkeypatch.setattr(transport, "dist", _NobodyThere(devices))

    record = Merge(
        list(alone.factors.values()),
        alone.replicas,
        RunningStatistics(alone.module),
        Transport(devices),
        config,
        step=1,
        merges=0,
    ).run({})

    flags_and_norm = (devices - 1) * 1 + 8
    assert demo.bytes_per_merge(alone, devices) == pytest.approx(record.bytes_sent, abs=flags_and_norm)


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = plain_loop.main(["--epochs=1"])

    assert 0 <= accuracy <= 1
    assert "step 10" in capsys.readouterr().out


def test_curves_of_few_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/accuracy\n0,4,2.5,\n0,9,,0.25\n")

    read = curves.read(tmp_path / "metrics.csv")
    curves.draw({"": read}, tmp_path / "some.png")
    curves.draw({"": {}}, tmp_path / "none.png")

    assert read["train/loss"] == ([4], [2.5])
    assert read["val/accuracy"] == ([9], [0.25])
    assert (tmp_path / "some.png").exists() and (tmp_path / "none.png").exists()


def test_the_picture_needs_no_lte(tmp_path: Path) -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def training_step(self, batch: Any) -> torch.Tensor:
            loss = torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = CSVLogger(tmp_path)
    Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=logger,
        callbacks=[curves.CurvesPicture()],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Plain(), DigitsDataModule())

    assert (Path(logger.log_dir) / "curves.png").exists()


def test_functions_named_in_the_equations_exist() -> None:
    rows = [line for line in (DOCS / "equations.md").read_text().splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", row)}

    assert len(names) > 20
    for name in sorted(names):
        assert find(name), f"docs/equations.md names {name}, which is not in the package"


def test_the_api_page_has_all_that_is_public() -> None:
    page = (DOCS / "api.md").read_text()
    names = re.findall(r"^::: (\S+)$", page, re.M)
    for name in names:
        pkgutil.resolve_name(name)
    shown = {name.rpartition(".")[2] for name in [*names, *re.findall(r"heading: (\S+)", page)]}
    assert shown >= set(lightning_lte.__all__)


def find(name: str) -> bool:
    """Whether `module.Class.attribute` is in the package; attributes may be those that __init__ sets."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["lightning_lte", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                documented = re.search(rf"\b{part}\b", found.__doc__ or "")
                return isinstance(found, type) and bool(documented)
            found = getattr(found, part)
        return True
    return False


def test_equation_10_in_the_docs() -> None:
    seed_everything(0, verbose=False)
    s, eta = 2.0, 0.1
    A, B, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 7), (5, 3), (5, 7)))
    A.requires_grad_()
    B.requires_grad_()
    ((s * B @ A) * g).sum().backward()  # g is the gradient of the effective weight

    with torch.no_grad():
        assert A.grad is not None and B.grad is not None
        change = s * (B - eta * B.grad) @ (A - eta * A.grad) - s * B @ A
        g_hat = s**2 * (B @ B.mT @ g + g @ A.mT @ A) - s**3 * eta * g @ A.mT @ B.mT @ g

    torch.testing.assert_close(change, -eta * g_hat)
