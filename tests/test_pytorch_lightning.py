"""The same for projects that import `pytorch_lightning`, which takes strategies and modules of its own only."""

from __future__ import annotations

import csv
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.modules import RANK, clone, loader, make_net, sgd
from tests.modules import Module as LightningsModule
from tests.modules import trainer as lightnings_trainer
from tests.processes import run

pl = pytest.importorskip("pytorch_lightning")

import lightning_lte  # noqa: E402
from lightning_lte.pytorch_lightning import LTECallback, LTEStrategy  # noqa: E402


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def fit(steps: int, strategy: Any, resume: Any = None, **kwargs: Any) -> tuple[Module, Any]:
    module = Module()
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": steps}
    t = pl.Trainer(strategy=strategy, **{**quiet, **kwargs})
    t.fit(module, loader(48 * t.world_size), ckpt_path=resume)
    return module, t


def reference(epochs: int, **choices: Any) -> dict[str, Tensor]:
    module = LightningsModule(optimizer=sgd)
    lightnings_trainer(lightning_lte.LTEStrategy(4, 2, rank=RANK, **choices), max_epochs=epochs).fit(module, loader())
    return clone(module.state_dict())


@pytest.mark.parametrize("execution", ["auto", "sequential"])
def test_it_trains_to_the_same_weights(execution: Any) -> None:
    module, t = fit(3, LTEStrategy(4, 2, rank=RANK, execution=execution))
    expected = reference(3, execution=execution)
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert type(module.net.first) is nn.Linear
    assert any(isinstance(c, LTECallback) for c in t.callbacks)


def test_it_logs_and_resumes(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(str(tmp_path), name="", version="")
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _ = fit(
        3, LTEStrategy(4, 2, rank=RANK), logger=logger, callbacks=[keep], enable_checkpointing=True, log_every_n_steps=1
    )
    with open(tmp_path / "metrics.csv") as file:
        assert [row["lte/merges"] for row in csv.DictReader(file) if row["lte/merges"]] == [
            "1.0",
            "2.0",
            "3.0",
            "4.0",
            "5.0",
        ]
    resumed, _ = fit(3, LTEStrategy(4, 2, rank=RANK), resume=tmp_path / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_name_lte_is_registered() -> None:
    assert type(pl.Trainer(strategy="lte", accelerator="cpu", devices=1, logger=False).strategy) is LTEStrategy


def _on_two() -> dict[str, Tensor]:
    return clone(fit(2, LTEStrategy(4, 2, rank=RANK), devices=2)[0].state_dict())


def test_it_trains_on_two_devices() -> None:
    first, second = run(_on_two, 2, group=False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_wrong_pairing_ends_in_a_sentence_that_names_the_import() -> None:
    with pytest.raises(Exception, match=r"takes `from lightning_lte\.pytorch_lightning import LTEStrategy`"):
        pl.Trainer(strategy=lightning_lte.LTEStrategy(4), accelerator="cpu", devices=1)
    with pytest.raises(Exception, match=r"takes `from lightning_lte import LTEStrategy`"):
        lightnings_trainer(LTEStrategy(4))


@pytest.mark.parametrize("missing", ["lightning", "pytorch_lightning"])
def test_either_package_may_be_missing(missing: str) -> None:
    code = f"""
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "{missing}":
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Missing())
    from lightning_lte import LTEStrategy
    print(LTEStrategy.package.__name__)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    expected = {"lightning": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}
    assert done.stdout.strip() == expected[missing], done.stderr[-2000:]
