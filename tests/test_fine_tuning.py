"""Training that goes on from trained weights, as the README has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_lte import LTEStrategy
from tests.modules import CLASSES, RANK, WIDTH, Module, Recorder, clone, loader, make_data, make_net, trainer
from tests.oracle import Oracle

HEADS, PERIOD, MORE = 4, 3, 2 * CLASSES
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


class Pretrained(Module):
    """A module that Lightning can make from a checkpoint alone."""

    def __init__(self) -> None:
        super().__init__(make_net())


@pytest.fixture(scope="module", params=["full rank", "heads", "in the middle of a period"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run."""
    path = tmp_path_factory.mktemp("trained") / "trained.ckpt"
    strategy: Any = "auto" if request.param == "full rank" else LTEStrategy(2, 3, rank=2)

    def save(t: Any, _: Any) -> None:
        if t.global_step == (4 if request.param == "in the middle of a period" else 6):
            t.save_checkpoint(path)

    trainer(strategy, max_steps=6, callbacks=[Recorder(save)]).fit(Pretrained(), loader(160))
    return path


def with_other_classes(path: Path) -> Module:
    module = Pretrained.load_from_checkpoint(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module.net.out = nn.Linear(WIDTH, MORE).double()
    return module


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of twice as many classes, so that the old classifier could not learn them."""
    data = [make_data(8 * HEADS, seed=50 + step) for step in range(8)]
    return [(x, y + CLASSES * (x[:, 0] > 0)) for x, y in data]


@pytest.mark.parametrize("execution", ["auto", "sequential"])
def test_heads_go_on_from_the_weights_with_another_classifier(trained: Path, execution: Any) -> None:
    """As the oracle does from the same weights."""
    module = with_other_classes(trained)
    saved = torch.load(trained, weights_only=True)["state_dict"]
    for name in ("net.first.weight", "net.second.weight", "net.norm.weight", "net.first.bias"):
        assert torch.equal(module.state_dict()[name], saved[name])
        assert not torch.equal(saved[name], Pretrained().state_dict()[name]), f"{name} was not trained before"
    plain = copy.deepcopy(module.net)
    oracle: list[Oracle] = []

    def make_oracle(t: Any, m: Any) -> None:
        explorer = t.strategy.explorer
        starts = {f.name.removeprefix("net."): f.A.detach() for f in explorer.injection.factors.values()}
        assert set(starts) == {"first", "second", "out"}  # the new classifier is large enough for factors
        oracle.append(Oracle(plain, starts, scale=2.0, period=PERIOD, optimizer=m.make_optimizer))
        x, _ = make_data(8, seed=99)
        with explorer.head(0), torch.no_grad():
            assert torch.equal(m.net(x), plain(x)), "a head does not start from the trained weights"

    look = Recorder(lambda t, m: None)
    look.on_train_start = make_oracle  # type: ignore[method-assign]
    strategy = LTEStrategy(HEADS, PERIOD, rank=RANK, execution=execution)
    trainer(strategy, max_epochs=1, callbacks=[look]).fit(
        module,
        DataLoader(batches(), batch_size=None),  # type: ignore[arg-type]
    )
    for x, y in batches():
        oracle[0].step(list(zip(x.chunk(HEADS), y.chunk(HEADS), strict=True)), cross_entropy)
    for name, value in oracle[0].finish().state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, **TOLERANCE)
    assert module.net(make_data(2)[0]).shape == (2, MORE)


def test_frozen_weights_stay_as_they_were_trained(trained: Path) -> None:
    module = with_other_classes(trained)
    module.net.first.requires_grad_(False)
    module.make_optimizer = lambda params: torch.optim.AdamW((p for p in params if p.requires_grad), lr=0.01)
    before = clone(module.state_dict())
    strategy = LTEStrategy(HEADS, PERIOD, rank=RANK)
    trainer(strategy, max_epochs=1).fit(module, DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    assert strategy.report().entry("net.first.weight").role == "untouched"
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {"net.first.weight", "net.first.bias"}
