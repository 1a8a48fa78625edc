"""The command line and the YAML files, as users run them."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_lte
from lightning_lte import cli
from lightning_lte.schedule import as_schedule

EXAMPLES = Path(__file__).parents[1] / "examples"
BRIEF = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.strategy.merge_every=2",
]


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what Lightning's CLI writes there is taken back after the test.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    # Lightning's CLI warns if it has both.
    monkeypatch.setattr("sys.argv", ["lightning-lte"])


def brief(config: str, tmp_path: Path) -> list[str]:
    return ["fit", f"--config={EXAMPLES / config}", *BRIEF, f"--trainer.logger.save_dir={tmp_path}"]


def metrics(folder: Path) -> dict[str, list[str]]:
    [path] = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


def test_digits_yaml_with_overrides(tmp_path: Path) -> None:
    made = cli.run([*brief("digits.yaml", tmp_path), "--trainer.strategy.heads=16"])

    assert isinstance(made.trainer.strategy, lightning_lte.LTEStrategy)
    assert made.trainer.global_step == 3
    # One merge after two steps, and one at the end for the third.
    assert [float(v) for v in metrics(tmp_path)["lte/merges"]] == [1, 2]
    assert [path.name for path in tmp_path.rglob("curves.png")] == ["curves.png"]
    assert type(made.model.net.blocks[0].mlp.fc1) is torch.nn.Linear


def test_an_outer_optimizer_comes_from_yaml(tmp_path: Path) -> None:
    outer = tmp_path / "outer.yaml"
    outer.write_text(
        "trainer:\n  strategy:\n    class_path: lightning_lte.LTEStrategy\n    init_args:\n      heads: 4\n"
        "      overlap: 1\n      stagger: 2\n      wire: int8\n      base: bf16\n"
        "      outer_optimizer:\n        class_path: torch.optim.SGD\n"
        "        init_args:\n          lr: 0.5\n          momentum: 0.9\n"
    )
    made = cli.run([*brief("digits.yaml", tmp_path), f"--config={outer}", "--trainer.strategy.merge_every=2"])
    strategy = made.trainer.strategy
    assert isinstance(strategy, lightning_lte.LTEStrategy) and strategy.config.outer_optimizer is not None
    assert (strategy.config.wire, strategy.config.base) == ("int8", "bfloat16")
    optimizer = strategy.config.outer_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.9


def test_the_console_script_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-lte", *brief("digits.yaml", tmp_path)])

    # pip's script is sys.exit(main()), where anything but None or 0 is a failure.
    assert cli.main() is None
    assert len(list(tmp_path.rglob("curves.png"))) == 1


def test_heads_of_an_override_reach_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heads must be at least 1; received 0"):
        cli.run([*brief("digits.yaml", tmp_path), "--trainer.strategy.heads=0"])


def test_the_same_yaml_in_a_cli_of_ones_own(tmp_path: Path) -> None:
    made = LightningCLI(args=brief("digits.yaml", tmp_path))

    assert isinstance(made.trainer.strategy, lightning_lte.LTEStrategy)
    assert float(metrics(tmp_path)["lte/merges"][-1]) == 2


def test_the_strategy_is_preset(tmp_path: Path) -> None:
    config = tmp_path / "short.yaml"
    config.write_text("model: examples.vit.ViTClassifier\ndata: examples.data.DigitsDataModule\n")

    made = cli.run(["fit", f"--config={config}", *BRIEF, f"--trainer.default_root_dir={tmp_path}"])

    assert isinstance(made.trainer.strategy, lightning_lte.LTEStrategy)


NESTED = "also: {class_path: lightning_lte.Every, init_args: {period: 2}}"


@pytest.mark.parametrize(
    ("merge_every", "shown", "merges"),
    [
        ("{class_path: lightning_lte.Growing, init_args: {first: 1, factor: 2, last: 9}}", "Growing(1, 2.0, 9)", 2),
        ("{class_path: lightning_lte.Piecewise, init_args: {periods: {0: 1, 2: 3}}}", "Piecewise({0: 1, 2: 3})", 2),
        (
            f"{{class_path: lightning_lte.BeforeValidation, init_args: {{{NESTED}}}}}",
            "BeforeValidation(also=Every(2))",
            2,
        ),
        ("tests.test_schedule.powers_of_two", "When(powers_of_two)", 3),
    ],
)
def test_schedules_in_a_yaml(merge_every: str, shown: str, merges: int, tmp_path: Path) -> None:
    config = tmp_path / "scheduled.yaml"
    text = (EXAMPLES / "digits.yaml").read_text()
    config.write_text(text.replace("merge_every: 10", f"merge_every: {merge_every}"))
    args = [argument for argument in BRIEF if "merge_every" not in argument]

    made = cli.run(["fit", f"--config={config}", *args, f"--trainer.logger.save_dir={tmp_path}"])

    assert repr(as_schedule(made.trainer.strategy.config.merge_every)) == shown
    assert len(metrics(tmp_path)["lte/merges"]) == merges  # in three steps, with that at the end


def test_heads_that_grow_in_a_yaml(tmp_path: Path) -> None:
    config = tmp_path / "growing.yaml"
    text = (EXAMPLES / "digits.yaml").read_text()
    assert text.count("heads: 8") == 1
    config.write_text(text.replace("heads: 8", "grow_heads: {1: 8, 2: 16}\n      heads: 4"))

    made = cli.run(["fit", f"--config={config}", *BRIEF, f"--trainer.logger.save_dir={tmp_path}"])

    assert made.trainer.strategy.config.grow_heads == {1: 8, 2: 16}
    assert [float(v) for v in metrics(tmp_path)["lte/heads"]] == [4, 8, 16]


@pytest.mark.parametrize("command_line", [cli.run, lambda args: LightningCLI(args=args)])
def test_an_unknown_key_is_named(command_line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES / "digits.yaml").read_text()
    config = tmp_path / "misspelt.yaml"
    config.write_text(text.replace("merge_every: 10", "merge_evry: 10"))

    with pytest.raises(SystemExit) as exit_:
        command_line(["fit", f"--config={config}"])

    assert exit_.value.code == 2
    assert "merge_evry" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fashion_mnist_yaml_with_a_root_of_ones_own(ending: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 5000 + 3 * 32), ("t10k", 32)):
        write_idx(root / f"{split}-images-idx3-ubyte{ending}", random.integers(256, size=(count, 28, 28)))
        write_idx(root / f"{split}-labels-idx1-ubyte{ending}", random.integers(10, size=count))

    cli.run([*brief("fashion_mnist.yaml", tmp_path), f"--data.root={root}", "--data.batch_size=32"])

    assert float(metrics(tmp_path)["lte/merges"][-1]) == 2
    assert len(list(tmp_path.rglob("curves.png"))) == 1


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write unsigned bytes in the format of MNIST's files, gzipped if the name says so."""
    header = np.array([0x0800 + values.ndim, *values.shape], dtype=">i4")
    content = header.tobytes() + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
