"""The preset with the paper's settings is the paper's algorithm, and what the user gives goes before."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import LTEConfig, LTEStrategy, cli
from lightning_lte.config import PRESETS
from lightning_lte.heads import Factors
from tests.modules import CLASSES, RANK, Module, Recorder, make_data, make_net, trainer
from tests.oracle import Oracle

HEADS, PERIOD, STEPS, WIDTH = 4, 3, 11, 12
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


class Transformer(nn.Module):
    """Layers that the paper speaks of: a fused qkv, other linear ones, a convolution, a norm and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embedding((x.abs() * 12).long().clamp(0, 39))
        q, k, v = self.qkv(self.norm(self.conv(words.mT).mT)).chunk(3, dim=-1)
        y = words + self.proj((q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v)
        return self.out(y.mean(1))


def small(params: Any) -> torch.optim.Optimizer:
    """A learning rate far below a full-rank one, as the paper's large scale wants it."""
    return torch.optim.AdamW(params, lr=1e-5, weight_decay=0.1)


def inside(f: Factors) -> str:
    """The name of a factored weight's layer in the net, which the LightningModule holds."""
    return f.name.removeprefix("net.")


def fit(strategy: LTEStrategy) -> tuple[nn.Module, nn.Module, list[Factors]]:
    """Train through the strategy and by the oracle: the two models, and the factors as they started."""
    net = make_net(Transformer)
    oracle: list[Oracle] = []
    starts: list[Factors] = []

    def make_oracle(t: Any, m: Any) -> None:
        factors = list(strategy.explorer.injection.factors.values())  # type: ignore[union-attr]
        starts.extend(copy.deepcopy(factors))
        config = strategy.config
        assert config.alpha is not None
        oracle.append(
            Oracle(
                plain,
                {inside(f): f.A.detach() for f in factors},
                scale=config.alpha / config.rank,
                period=PERIOD,
                optimizer=small,
                after_merge=config.after_merge,
            )
        )

    plain = copy.deepcopy(net)
    look = Recorder(lambda t, m: None)
    look.on_train_start = make_oracle  # type: ignore[method-assign]
    x, y = make_data(8 * HEADS * STEPS)
    data = DataLoader(TensorDataset(x, y), batch_size=8 * HEADS)
    trainer(strategy, max_epochs=1, callbacks=[look]).fit(Module(net, small), data)
    for own_x, own_y in data:
        oracle[0].step(list(zip(own_x.chunk(HEADS), own_y.chunk(HEADS), strict=True)), cross_entropy)
    return net, oracle[0].finish(), starts


@pytest.mark.parametrize("alpha", [{}, {"alpha": 8192.0}], ids=str)
@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_the_preset_is_the_papers_algorithm(after_merge: Any, execution: Any, alpha: dict[str, float]) -> None:
    """Appendix A.2 with "keep", Algorithm 1 with "reset", to rounding."""
    strategy = LTEStrategy(
        HEADS, PERIOD, preset="paper", rank=RANK, after_merge=after_merge, execution=execution, **alpha
    )
    before = make_net(Transformer).state_dict()
    net, expected, starts = fit(strategy)

    assert {inside(f): f.scale for f in starts} == dict.fromkeys(
        ("conv", "qkv", "proj"), alpha.get("alpha", 4096) / RANK
    )
    for name, value in expected.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} was not trained"
        torch.testing.assert_close(net.state_dict()[name], value, **TOLERANCE)


def test_heads_start_as_the_papers() -> None:
    *_, starts = fit(LTEStrategy(HEADS, PERIOD, preset="paper", rank=RANK))

    assert [tuple(f.A.shape) for f in starts if inside(f) == "qkv"] == [(HEADS, 3, RANK, WIDTH)]
    for f in starts:
        rows = f.A.detach().flatten(0, -3)
        semi_orthogonal = torch.eye(RANK).double() * f.matrices.in_features / RANK
        torch.testing.assert_close(rows @ rows.mT, semi_orthogonal.expand(len(rows), -1, -1), rtol=0, atol=1e-5)
        assert not f.B.any()
        assert len({tuple(row.flatten().tolist()) for row in rows}) == len(rows), "heads start alike"


def test_roles_are_those_of_the_paper() -> None:
    strategy = LTEStrategy(HEADS, PERIOD, preset="paper", rank=RANK)
    fit(strategy)
    roles = {entry.name: entry.role for entry in strategy.report().entries}
    factored = {name for name, role in roles.items() if role == "factored"}
    assert factored == {"net.conv.weight", "net.qkv.weight", "net.proj.weight"}
    assert set(roles.values()) == {"factored", "replica"}
    assert strategy.report().entry("net.embedding.weight").reason == "an embedding"


PAPERS = {"rank": 64, "alpha": 4096.0, "split": "qkv", "embeddings": "replica"}


@pytest.mark.parametrize(
    "choices",
    [
        {"rank": 16},
        {"alpha": 32.0},
        {"split": {}},
        {"split": {"fc": 2}},
        {"embeddings": "factors"},
        {"after_merge": "reset"},
        {"init": "xavier"},
    ],
    ids=str,
)
def test_what_the_user_gives_goes_before_the_preset(choices: dict[str, Any]) -> None:
    """Also where it is the package's own default."""
    config = LTEStrategy(8, preset="paper", **choices).config
    assert {name: getattr(config, name) for name in PAPERS | choices} == PAPERS | choices
    assert config.heads == 8


def test_without_the_preset_defaults_are_the_packages() -> None:
    assert LTEStrategy(8).config == LTEConfig(8)


def test_another_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of 'paper'; received 'article'\. Give preset='paper'"):
        LTEStrategy(8, preset="article")  # type: ignore[arg-type]


# What the paper does where the preset leaves the package's default.
AS_THE_DEFAULTS = {
    "merge_every": 10,
    "after_merge": "keep",
    "reset_a": "keep",
    "reset_moments": 0.0,
    "refresh": 0,
    "weight_decay": "factors",
    "replicas": "merge",
    "norms": "replica",
    "init": "orthogonal",
    "freeze_a": False,
    "outer_optimizer": None,
    "wire": "float32",
    "base": "float32",
    "full_rank_steps": 0,
    "grow_heads": {},
    "overlap": 0,
    "stagger": 1,
}
# Who, where and which; what the user's loss is; and what does not change what is learned.
NOT_OF_THE_PAPER = {"heads", "seed", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
NOT_OF_THE_PAPER |= {"loss_reduction", "execution", "payload", "verify_every", "bad_heads", "shard", "base_copy"}


def test_the_preset_has_a_word_on_every_option() -> None:
    """An option that comes belongs in one of the three, and in the preset if the paper's value is not the default."""
    assert {field.name for field in dataclasses.fields(LTEConfig)} == {*PAPERS, *AS_THE_DEFAULTS, *NOT_OF_THE_PAPER}
    assert PRESETS["paper"] == PAPERS


def test_the_preset_stays_the_papers_when_a_default_changes() -> None:
    """Such an option gets None for its default in LTEStrategy, and the paper's value in the preset."""
    config = LTEStrategy(8, preset="paper").config
    assert {name: getattr(config, name) for name in AS_THE_DEFAULTS} == AS_THE_DEFAULTS


@pytest.mark.parametrize("command_line", [cli.run, lambda args: LightningCLI(args=args)], ids=["ours", "ones own"])
def test_the_preset_in_a_yaml(command_line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what the command line writes there is taken back after the test
    monkeypatch.setattr("sys.argv", ["lightning-lte"])
    config = tmp_path / "paper.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  max_steps: 3\n  limit_val_batches: 0\n  enable_progress_bar: false\n"
        f"  default_root_dir: {tmp_path}\n"
        "  strategy:\n    class_path: lightning_lte.LTEStrategy\n"
        "    init_args:\n      heads: 8\n      preset: paper\n      rank: 16\n"
        "model: examples.vit.ViTClassifier\ndata: examples.data.DigitsDataModule\n"
    )
    made = command_line(["fit", f"--config={config}", "--trainer.strategy.after_merge=reset"])

    strategy = made.trainer.strategy
    chosen = strategy.config
    assert made.trainer.global_step == 3
    # The rank as given, though it is the package's default; and the rest as in the paper.
    assert (chosen.rank, chosen.alpha, chosen.split, chosen.embeddings) == (16, 4096.0, "qkv", "replica")
    assert (chosen.heads, chosen.after_merge) == (8, "reset")
    assert strategy.report().entry("net.blocks.0.attn.qkv.weight").reason == "rank 16, scale 256, in 3 parts"
