"""A run that was interrupted ends exactly as one that was not, and its files are plain."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, LTEStrategy, checkpoint
from tests.modules import (
    IN,
    RANK,
    Module,
    Net,
    Recorder,
    Slices,
    Words,
    adamw,
    clone,
    kept,
    loader,
    make_data,
    make_net,
    sgd,
    train_step,
    trainer,
)
from tests.processes import run


class Noisy(Net):
    """A net that draws from every random stream in each step, and has a buffer that each device fills by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.mean().detach()
            x = nn.functional.dropout(x, 0.2) * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        return super().forward(x)


EPOCH = 5  # batches
EVERYTHING = ("optimizers", "factors", "replicas", "clocks", "generators", "buffers", "weights")


def train(
    folder: str,
    epochs: int,
    *,
    resume: str | None = None,
    execution: str = "batched",
    heads: int = 4,
    devices: int = 1,
    by_hand: int | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Fit with a merge every 3 steps and 5 steps an epoch, and return all there is at the end of the last epoch.

    After the step `by_hand` there is a merge that is not due.
    """
    seed_everything(7)  # the sampler's; the streams are to come from the checkpoint
    if resume is not None:
        for set_seed in (torch.manual_seed, random.seed, np.random.seed):
            set_seed(1234)
    strategy = LTEStrategy(heads, 3, rank=RANK, execution=execution, **choices)  # type: ignore[arg-type]
    keep = ModelCheckpoint(folder, filename=f"{{epoch}}-{epochs}", save_top_k=-1)
    merge = Recorder(lambda t, _: t.global_step == by_hand and strategy.explorer.merge())
    t = trainer(strategy, devices=devices, max_epochs=epochs, callbacks=[keep, merge], enable_checkpointing=True)
    module = Module(make_net(Noisy), adamw)
    data = loader(16 * EPOCH * devices, 16, shuffle=True)
    t.fit(module, data, ckpt_path=resume)
    saved = torch.load(keep.best_model_path, weights_only=True)
    return {"state_dict": saved["state_dict"], "lte": saved["lte"], "after": clone(module.state_dict())}


@pytest.mark.parametrize("heads", [1, 4])
def test_momentum_of_sparse_gradients_is_kept(tmp_path: Path, heads: int) -> None:
    """To rounding: their sums are taken in another order."""

    def fit(resume: str | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(str(tmp_path), filename="{step}", every_n_train_steps=4, save_top_k=-1)
        module = Module(make_net(Words), sgd)
        t = trainer(LTEStrategy(heads, 3, rank=RANK), max_steps=7, callbacks=[keep], enable_checkpointing=True)
        t.fit(module, Slices(1, 0), ckpt_path=resume)
        return clone(module.state_dict())

    whole = fit()
    torch.testing.assert_close(fit(str(tmp_path / "step=4.ckpt")), whole, rtol=1e-12, atol=1e-12)


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (own, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(own, other, f"{where}/{i}")
    else:
        assert a == b, where


class Transposed(Net):
    """A net with a parameter that lies in memory column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.eye(IN, dtype=torch.float64).T)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.turn)


def test_moments_lie_in_memory_as_before(tmp_path: Path) -> None:
    strides = []
    for steps, resume in ((2, None), (3, str(tmp_path / "step=2.ckpt"))):
        module = Module(make_net(Transposed), adamw)
        keep = ModelCheckpoint(str(tmp_path), filename="{step}", every_n_train_steps=2, save_top_k=-1)
        look = Recorder(lambda t, m: t.optimizers[0].state[m.net.turn]["exp_avg"].stride())
        t = trainer(LTEStrategy(1, 3, rank=RANK), max_steps=steps, callbacks=[keep, look], enable_checkpointing=True)
        t.fit(module, Slices(1, 0), ckpt_path=resume)
        strides.append(look.seen[-1])
    assert strides == [(1, IN), (1, IN)]


OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    ("heads", "execution", "choices"),
    [
        (4, "batched", {}),
        (4, "sequential", {}),
        (4, "auto", {}),
        (1, "auto", {}),
        (4, "batched", {"after_merge": "reset"}),
        (4, "batched", {"replicas": "freeze"}),
        (4, "batched", {"freeze_a": True}),
        (4, "sequential", {"freeze_a": True, "overlap": 3}),
        (1, "auto", {"freeze_a": True, "after_merge": "reset", "reset_a": "redraw"}),
        (2, "batched", {"replicas": "step"}),
        (4, "batched", {"outer_optimizer": OUTER}),
        (4, "batched", {"weight_decay": "weights"}),
        (2, "sequential", {"weight_decay": "weights", "overlap": 3}),
        (4, "batched", {"refresh": 2}),
        (2, "sequential", {"refresh": 1, "after_merge": "reset", "stagger": 2}),
        (4, "sequential", {"overlap": 3}),
        (1, "auto", {"overlap": 3}),
        (4, "batched", {"stagger": 2, "overlap": 3, "outer_optimizer": OUTER}),
        (4, "batched", {"stagger": 3, "after_merge": "reset"}),
        (4, "batched", {"full_rank_steps": 7}),
        (4, "sequential", {"full_rank_steps": 2}),
        (1, "auto", {"full_rank_steps": 5}),
    ],
)
def test_resuming_in_the_middle_of_a_period_equals_not_stopping(
    tmp_path: Path, heads: int, execution: str, choices: dict[str, Any]
) -> None:
    whole = train(str(tmp_path / "whole"), 3, heads=heads, execution=execution, **choices)
    train(str(tmp_path / "part"), 1, heads=heads, execution=execution, **choices)
    # After 5 steps with a merge every 3: in the middle of a period.
    [first] = (tmp_path / "part").glob("epoch=0*")
    saved = torch.load(first, weights_only=True)["lte"]
    [clock] = saved["clocks"]
    assert clock["step"] == 5
    if "full_rank_steps" in choices:
        assert saved["full_rank"] == (choices["full_rank_steps"] >= 5)
    else:
        assert (clock["merges"], clock["last_merge"]) == (choices.get("stagger", 1), 3)
    # The merge that started at step 3 lands at step 6.
    assert len(saved["flights"]) == ("overlap" in choices) * choices.get("stagger", 1)
    # What is drawn from now on is what would have been: the checkpoint's seed counts.
    rest = str(tmp_path / "rest")
    resumed = train(rest, 3, resume=str(first), heads=heads, execution=execution, seed=7, **choices)
    assert_equal(whole, resumed)


def _resume_on_two(folder: str, heads: int, choices: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = train(f"{folder}/whole", 3, heads=heads, devices=2, **choices)
    train(f"{folder}/part", 1, heads=heads, devices=2, **choices)
    [first] = Path(folder, "part").glob("epoch=0*")
    return whole, train(f"{folder}/rest", 3, resume=str(first), heads=heads, devices=2, **choices)


@pytest.mark.parametrize(
    ("heads", "choices"),
    [
        (2, {"broadcast_buffers": False}),
        (4, {}),
        (2, {"wire": "int8", "payload": "dense", "overlap": 3}),
        (4, {"weight_decay": "weights", "overlap": 3}),
        (4, {"refresh": 1, "freeze_a": True, "payload": "factors"}),
        (2, {"wire": "int8", "payload": "factors", "overlap": 3, "freeze_a": True}),
        (2, {"wire": "int8", "payload": "factors", "by_hand": 4}),
        (4, {"wire": "bfloat16", "payload": "factors", "stagger": 2, "overlap": 2, "outer_optimizer": OUTER}),
    ],
)
def test_resuming_on_two_processes_equals_not_stopping(tmp_path: Path, heads: int, choices: dict[str, Any]) -> None:
    results = run(_resume_on_two, 2, str(tmp_path), heads, choices, group=False, timeout_s=120)
    for whole, resumed in results:
        assert_equal(whole, resumed)
    for name, value in results[0][0]["after"].items():
        assert name == "net.seen" or torch.equal(value, results[1][0]["after"][name]), name
    # The devices had random streams and buffers of their own, and both were kept.
    buffers = results[0][0]["lte"]["buffers"]
    assert len(buffers) == 2
    assert choices.get("broadcast_buffers", True) or not torch.equal(buffers[0]["net.seen"], buffers[1]["net.seen"])


def test_a_run_whose_decay_is_of_factors_says_what_it_leaves_out(tmp_path: Path) -> None:
    train(str(tmp_path / "part"), 1, weight_decay="weights")
    [first] = (tmp_path / "part").glob("epoch=0*")
    with pytest.warns(UserWarning, match="what it took off since their last merge was left out"):
        train(str(tmp_path / "rest"), 2, resume=str(first))


def test_a_batch_in_the_middle_of_an_epoch_goes_on_with_the_right_random_streams(tmp_path: Path) -> None:
    """Lightning starts the loader anew, so all batches are the same here."""

    def fit(steps: int, resume: str | None = None) -> dict[str, Any]:
        seed_everything(3 if resume is None else 99)
        keep = ModelCheckpoint(tmp_path, filename=f"{{step}}-of-{steps}", every_n_train_steps=2, save_top_k=-1)
        t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=steps, callbacks=[keep], enable_checkpointing=True)
        module = Module(make_net(Noisy), adamw)
        x, y = (part[:16].repeat(10, *[1] * (part.dim() - 1)) for part in make_data(16))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
        t.fit(module, data, ckpt_path=resume)
        return torch.load(keep.best_model_path, weights_only=True)

    whole = fit(8)
    resumed = fit(8, str(tmp_path / "step=4-of-8.ckpt"))
    assert_equal({k: whole["lte"][k] for k in EVERYTHING}, {k: resumed["lte"][k] for k in EVERYTHING})
    assert_equal(whole["state_dict"], resumed["state_dict"])


# ---- plain files


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[Path, Module]:
    module = Module()
    path = tmp_path / "last.ckpt"

    def save(t: Any, _: Any) -> None:
        if t.global_step == 5:
            t.save_checkpoint(path)

    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=7, callbacks=[Recorder(save)])
    t.fit(module, loader(160, 16))
    return path, module


class Loadable(Module):
    def __init__(self) -> None:
        super().__init__()


def test_the_state_dict_is_the_users_own(fitted: tuple[Path, Module]) -> None:
    path, _ = fitted
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(Module().state_dict())
    loaded = Loadable.load_from_checkpoint(path, strict=True)
    assert_equal(dict(loaded.state_dict()), dict(saved["state_dict"]))


class WithHparams(Module):
    def __init__(self, net: nn.Module, width: int = 3) -> None:
        super().__init__(net)
        self.save_hyperparameters()


def test_modules_in_hparams_are_saved_without_heads(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=4, callbacks=[keep], enable_checkpointing=True)
    t.fit(WithHparams(make_net()), loader(160, 16))
    saved = torch.load(keep.best_model_path, weights_only=False)["hyper_parameters"]["net"]
    assert type(saved.first) is nn.Linear and "_lte" not in saved.first.__dict__
    WithHparams.load_from_checkpoint(keep.best_model_path, weights_only=False)


@pytest.mark.parametrize("strategy", ["auto", "lte"])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_reads_the_file_with_the_strategy_and_without(
    fitted: tuple[Path, Module], verb: str, strategy: str
) -> None:
    path, _ = fitted
    module = Module()
    result = getattr(trainer(strategy), verb)(module, loader(), ckpt_path=str(path))
    assert_equal(dict(module.state_dict()), dict(torch.load(path, weights_only=True)["state_dict"]))
    if verb != "predict":
        x, y = make_data(48)
        assert result[0]["val_loss"] == pytest.approx(float(cross_entropy(module.net(x), y)), rel=1e-4)


def test_a_plain_trainer_goes_on_from_our_file(fitted: tuple[Path, Module]) -> None:
    module = Module()
    trainer("auto", max_steps=8).fit(module, loader(160, 16), ckpt_path=str(fitted[0]))


def test_training_goes_on_from_a_file_saved_after_fit(tmp_path: Path) -> None:
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=7)
    t.fit(Module(), loader(160, 16))
    t.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    [clock] = saved["lte"]["clocks"]
    assert clock == {"step": 7, "merges": 3, "last_merge": 7, "groups_left": 0, "last_whole": 7}
    assert saved["lte"]["optimizers"][0]["net.first.weight.A"]["exp_avg"]["heads"].abs().sum() > 0
    again = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=10)
    merges = Recorder(lambda t, _: t.strategy.explorer.clock.merges)
    again.callbacks.append(merges)
    again.fit(Module(), loader(160, 16), ckpt_path=str(tmp_path / "after.ckpt"))
    assert merges.seen == [3, 3, 4]


def test_heads_start_fresh_from_a_plain_checkpoint_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = trainer("auto", max_steps=4)
    module = Module()
    plain.fit(module, loader(160, 16))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    start = Recorder(lambda t, m: None)
    seen: list[dict[str, Tensor]] = []
    start.on_train_start = lambda t, m: seen.append(clone(m.state_dict()))  # type: ignore[method-assign]
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=8, callbacks=[start])
    with caplog.at_level("INFO"):
        t.fit(Module(), loader(160, 16), ckpt_path=str(tmp_path / "plain.ckpt"))
    assert_equal(seen[0], clone(module.state_dict()))
    assert "optimizer state was not kept" in caplog.text


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"heads": 2}, ["heads=4 there", "heads=2 here"]),
        ({"rank": 2}, ["rank 3 there", "2 here"]),
        ({"exclude_modules": ["second"]}, ["factored there and not here: net.second"]),
        ({"alpha": 12.0}, ["scale 2.0 there", "4.0 here"]),
        ({"after_merge": "reset"}, ["'keep' there", "'reset' here"]),
        ({"freeze_a": True}, ["freeze_a=False there", "freeze_a=True here"]),
        ({"split": {"second": 4}}, ["parts 1 there, 4 here, for net.second"]),
    ],
)
def test_other_heads_are_refused_with_both_sides_and_the_way_out(
    fitted: tuple[Path, Module], choices: dict[str, Any], words: list[str]
) -> None:
    settings = {"heads": 4, "rank": RANK, **choices}
    t = trainer(LTEStrategy(merge_every=3, **settings), max_steps=8)
    with pytest.raises(ValueError) as error:
        t.fit(Module(), loader(160, 16), ckpt_path=str(fitted[0]))
    for word in [*words, "load its weights"]:
        assert word in str(error.value)


def test_weights_of_other_parts_are_refused_where_no_size_tells(fitted: tuple[Path, Module]) -> None:
    # As many parts as heads: each part would get what a head has.
    t = trainer(LTEStrategy(4, 3, rank=RANK, split={"second": 4}), max_steps=8)
    with pytest.raises(ValueError, match="parts 1 there, 4 here"):
        t.fit(Module(), loader(160, 16), ckpt_path=str(fitted[0]))


# ---- the same heads on other devices


class Masked(Module):
    """Samples meet where there is a mask, at first."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        x = batch["x"] - batch["x"].mean() if "mask" in batch and self.global_step < 3 else batch["x"]
        return cross_entropy(self.net(x), batch["y"])


class SometimesMasked(Slices):
    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield {"x": x, "y": y, **({"mask": x} if self.step % 2 == 0 else {})}


def _fit_masked(folder: str, kind: Any, devices: int, resume: str | None = None) -> tuple[dict[str, Tensor], Any]:
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    tried = Recorder(lambda t, m: dict(t.strategy.explorer.tried))
    t = trainer(
        LTEStrategy(4, 3, rank=RANK, checkpoint=kind),
        devices=devices,
        max_steps=7,
        callbacks=[tried, keep],
        enable_checkpointing=True,
    )
    module = Masked(make_net(), sgd)
    t.fit(module, SometimesMasked(devices, t.global_rank, 16 // devices), ckpt_path=resume)
    return clone(module.state_dict()), tried.seen[-1]


@pytest.mark.parametrize(("kind", "devices"), [("gathered", 1), ("sharded", 1), ("gathered", 2), ("sharded", 2)])
def test_what_was_tried_of_batches_is_kept(tmp_path: Path, kind: str, devices: int) -> None:
    """A trial of another batch might show other things, and heads would not go on as they did."""

    def fit(*args: Any) -> Any:
        args = (str(tmp_path), kind, devices, *args)
        return _fit_masked(*args) if devices == 1 else run(_fit_masked, devices, *args, group=False)[0]

    whole, tried = fit()
    assert list(tried.values()) == [True, False]
    resumed, tried_then = fit(str(tmp_path / "step=4.ckpt"))
    assert tried_then == tried
    assert_equal(whole, resumed)


def _fit_on(folder: str, devices: int, steps: int, resume: str | None) -> dict[str, Tensor]:
    t = trainer(LTEStrategy(4, 3, rank=RANK), devices=devices, max_steps=steps)
    module = Module(optimizer=sgd)
    t.fit(module, loader(160, 16), ckpt_path=resume)
    t.save_checkpoint(Path(folder, f"{devices}.ckpt"))
    return clone(module.state_dict())


def test_heads_of_two_devices_go_on_on_one(tmp_path: Path) -> None:
    states = run(_fit_on, 2, str(tmp_path), 2, 4, None, group=False)
    assert_equal(states[0], states[1])
    there = torch.load(tmp_path / "2.ckpt", weights_only=True)["lte"]
    seen: list[Any] = []
    look = Recorder(lambda t, m: None)
    look.on_train_start = lambda t, m: seen.append(copy.deepcopy(t.strategy.explorer.state_dict()))  # type: ignore[method-assign]
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=6, callbacks=[look])
    t.fit(Module(optimizer=sgd), loader(160, 16), ckpt_path=str(tmp_path / "2.ckpt"))
    for key in ("factors", "replicas", "clocks", "optimizers"):
        assert_equal(seen[0][key], there[key], key)


@pytest.mark.parametrize(("saved", "then"), [("sequential", "batched"), ("batched", "sequential")])
def test_heads_go_on_in_the_other_execution(tmp_path: Path, saved: str, then: str) -> None:
    """Both do the same here, so the rest of the run is the same, too."""

    def fit(execution: str, name: str, resume: str | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(tmp_path, filename=name, every_n_train_steps=5, save_top_k=-1)
        strategy = LTEStrategy(4, 3, rank=RANK, execution=execution)  # type: ignore[arg-type]
        t = trainer(strategy, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
        module = Module(optimizer=sgd)
        t.fit(module, loader(80, 16), ckpt_path=resume)
        return clone(module.state_dict())

    whole = fit(saved, "whole-{step}")
    resumed = fit(then, "rest-{step}", resume=str(tmp_path / "whole-step=5.ckpt"))
    torch.testing.assert_close(whole, resumed, rtol=1e-9, atol=1e-11)


def test_the_decision_is_kept_and_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=2)
    t.fit(Module(), loader(160, 16))
    t.save_checkpoint(tmp_path / "decided.ckpt")
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer(LTEStrategy(4, 3, rank=RANK), max_steps=4).fit(
            Module(), loader(160, 16), ckpt_path=tmp_path / "decided.ckpt"
        )
    assert caplog.text.count("LTE trains through 4 heads") == 1
    assert "(batched): as in the checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("rows", "heads", "world", "rank", "copies", "expected"),
    [
        ([0, 1, 2, 3], 4, 2, 1, 2, [2, 3]),  # one for each head, on fewer devices
        ([0, 1, 2, 3], 4, 1, 0, 4, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 4, 2, 1, 1, [2.5]),  # a device's heads share one from now on
        ([0, 1], 4, 1, 0, 4, [0, 0, 1, 1]),  # two devices' heads shared one each
        ([0, 1], 4, 2, 1, 1, [1]),
        ([0, 1], 4, 4, 3, 1, [1]),
    ],
)
def test_rows_find_their_device(
    rows: list[float], heads: int, world: int, rank: int, copies: int, expected: list[float]
) -> None:
    got = checkpoint.rows_for(torch.tensor(rows, dtype=torch.float64), heads, world, rank, copies)
    assert got.tolist() == expected


def test_a_plain_loop_goes_on_exactly_too() -> None:
    def steps(explorer: Explorer, opt: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            x, y = make_data(16, seed=step)
            with explorer.heads():
                loss = cross_entropy(explorer.module(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            explorer.step()

    def start() -> tuple[Explorer, torch.optim.Optimizer]:
        model = make_net()
        opt = adamw(model.parameters())
        return Explorer(model, opt, LTEConfig(4, 3, rank=RANK, execution="batched")), opt

    one, opt = start()
    steps(one, opt, range(5))
    weights, state = clone(one.module.state_dict()), copy.deepcopy(one.state_dict())
    steps(one, opt, range(5, 11))
    other, opt = start()
    other.module.load_state_dict(weights)
    assert state is not None
    other.load_state_dict(state)
    steps(other, opt, range(5, 11))
    assert_equal(clone(one.module.state_dict()), clone(other.module.state_dict()))
    assert_equal(one.state_dict()["optimizers"], other.state_dict()["optimizers"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("saved", "then"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2],
    ids=str,
)
def test_a_run_goes_on_in_another_precision(saved: torch.dtype, then: torch.dtype) -> None:
    def start(dtype: torch.dtype) -> tuple[Explorer, torch.optim.Optimizer]:
        model = make_net().to(dtype)
        opt = adamw(model.parameters())
        return Explorer(model, opt, LTEConfig(4, 3, rank=RANK, execution="batched")), opt

    one, opt = start(saved)
    for step in range(4):
        x, y = make_data(16, seed=step)
        train_step(one, one.module, opt, (x.to(saved), y))
    state, other = one.state_dict(), start(then)[0]
    assert state is not None
    other.module.load_state_dict(one.module.state_dict())
    other.load_state_dict(state)
    for weight, f in one.injection.factors.items():
        [own] = [g for g in other.injection.factors.values() if g.name == f.name]
        # What W in half precision can't hold goes on, too.
        torch.testing.assert_close(own.exact(), f.exact(), rtol=0, atol=0 if saved == then else 1e-2)
        if then == torch.float32:
            assert torch.equal(own.weight, f.exact()) and not torch.equal(own.weight, weight.float())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_module_that_the_trainer_converts_goes_on_exactly(tmp_path: Path, precision: Any) -> None:
    """It is in float32 until the trainer converts it, which is after weights are loaded."""

    class Casting(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step((batch[0].to(self.net.first.weight.dtype), batch[1]), batch_idx)  # type: ignore[arg-type]

    def fit(save: bool, resume: str | None = None) -> dict[str, Tensor]:
        module = Casting(make_net().float())
        look = Recorder(lambda t, _: save and t.global_step == 5 and t.save_checkpoint(tmp_path / "middle.ckpt"))
        t = trainer(LTEStrategy(1, 3, rank=RANK), max_steps=8, callbacks=[look], precision=precision)
        t.fit(module, Slices(1, 0), ckpt_path=resume)
        return clone(module.state_dict())

    assert_equal(fit(save=True), fit(save=False, resume=str(tmp_path / "middle.ckpt")))


def test_an_older_state_leaves_nothing_of_what_came_after() -> None:
    model = make_net()
    explorer = Explorer(model, adamw(model.parameters()), LTEConfig(4, 3, rank=RANK, execution="batched"))
    state = explorer.state_dict()
    assert state is not None
    for f in explorer.injection.factors.values():
        f.error = torch.ones_like(f.weight)
    explorer.load_state_dict(state)
    assert all(f.error is None for f in explorer.injection.factors.values())


# ---- what was found by attacking the package


class Scaled(Net):
    """A parameter without dimensions, as CLIP's logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class SaveAt(Callback):
    """Saves once, when a hook is called in an epoch."""

    def __init__(self, hook: str, path: Path, epoch: int = 1) -> None:
        def save(t: Trainer, *_: Any) -> None:
            if t.current_epoch == epoch and not t.sanity_checking and not path.exists():
                t.save_checkpoint(path)

        setattr(self, hook, save)


def fit_in_part(
    folder: str, make: Callable[[], Module], heads: int, devices: int = 1, execution: Any = "auto"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three epochs of three steps with a merge every 2; and the same after stopping when the first was over."""
    path = Path(folder, "first.ckpt")

    def fit(resume: Any, *callbacks: Callback) -> dict[str, Tensor]:
        module = make()
        strategy = LTEStrategy(heads, 2, rank=RANK, execution=execution)
        t = trainer(strategy, devices=devices, max_epochs=3, callbacks=list(callbacks))
        t.fit(module, loader(48 * devices), ckpt_path=resume)
        return clone(module.state_dict())

    return fit(None, SaveAt("on_train_epoch_end", path, epoch=0)), fit(path)


def scaled() -> Module:
    return Module(make_net(Scaled))


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "batched"), (4, "sequential")])
def test_a_parameter_without_dimensions_is_resumed_exactly(tmp_path: Path, heads: int, execution: str) -> None:
    assert_equal(*fit_in_part(str(tmp_path), scaled, heads, execution=execution))


@pytest.mark.parametrize("heads", [2, 4])
def test_a_parameter_without_dimensions_is_resumed_exactly_on_two_devices(tmp_path: Path, heads: int) -> None:
    for whole, resumed in run(fit_in_part, 2, str(tmp_path), scaled, heads, 2, group=False, timeout_s=120):
        assert_equal(whole, resumed)


@pytest.mark.parametrize("heads", [1, 4])
def test_what_shows_in_the_second_step_is_found_after_resuming_from_the_first(tmp_path: Path, heads: int) -> None:
    class Using(Module):
        """Uses a weight as a tensor from the second step on, whose gradient of this very step counts."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + (self.net.second.weight.square().mean() if self.trainer.global_step else 0)

    path = tmp_path / "first.ckpt"

    def fit(resume: Path | None) -> dict[str, Tensor]:
        save = Recorder(lambda t, _: t.global_step == 1 and t.save_checkpoint(path))
        module = Using(optimizer=sgd)
        t = trainer(LTEStrategy(heads, 3, rank=RANK), max_steps=5, callbacks=[save])
        t.fit(module, Slices(1, 0), ckpt_path=resume)
        return clone(module.state_dict())

    assert_equal(fit(None), fit(path))


class Later(Callback):
    """Puts parameters into the optimizer after a batch, and right away in a run that goes on from later on."""

    def __init__(self) -> None:
        self.added = False

    def state_dict(self) -> dict[str, bool]:
        return {"added": self.added}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.added = state["added"]

    def add(self, t: Trainer, module: Any) -> None:
        self.added = True
        t.optimizers[0].add_param_group({"params": list(module.net.first.parameters()), "lr": 0.003})

    def on_fit_start(self, t: Trainer, module: Any) -> None:
        if self.added:
            self.add(t, module)

    def on_train_batch_end(self, t: Trainer, module: Any, *args: Any) -> None:
        if t.global_step == 4:
            self.add(t, module)


class WithoutFirst(Module):
    def configure_optimizers(self) -> Any:
        return adamw(p for name, p in self.named_parameters() if "first" not in name)


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_parameters_that_come_into_an_optimizer_later_are_resumed_exactly(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "part.ckpt"

    def fit(resume: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        save = Recorder(lambda t, _: t.global_step == steps and resume is None and t.save_checkpoint(path))
        module = WithoutFirst()
        t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=8, callbacks=[Later(), save])
        t.fit(module, Slices(1, 0), ckpt_path=resume)
        return clone(module.state_dict()), kept(t)

    assert_equal(list(fit(None)), list(fit(path)))


def with_adafactor() -> Module:
    return Module(optimizer=lambda p: torch.optim.Adafactor(p, lr=0.01))


def test_moments_of_other_shapes_than_their_parameters_are_resumed(tmp_path: Path) -> None:
    for whole, resumed in run(fit_in_part, 2, str(tmp_path), with_adafactor, 2, 2, group=False, timeout_s=120):
        assert_equal(whole, resumed)


class Dropping(Module):
    """Draws random numbers in each step, so that the random stream shows in the weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((nn.functional.dropout(batch[0], 0.3), batch[1]), batch_idx)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("every", [1, 2])
def test_resuming_equals_not_stopping_wherever_it_was_saved(tmp_path: Path, hook: str, every: int) -> None:
    def fit(resume: Any = None, callbacks: Any = ()) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = Dropping()
        strategy = LTEStrategy(4, 4, rank=RANK, execution="batched")
        t = trainer(
            strategy,
            max_epochs=4,
            callbacks=list(callbacks),
            num_sanity_val_steps=0,
            check_val_every_n_epoch=every,
        )
        data = loader(16 * 5, shuffle=True)
        t.fit(module, data, loader(16), ckpt_path=resume)
        return clone(module.state_dict())

    path = tmp_path / "saved.ckpt"
    whole = fit(callbacks=[SaveAt(hook, path)])
    assert_equal(whole, fit(resume=path))


def test_resuming_from_the_last_batch_of_an_epoch_equals_not_stopping(tmp_path: Path) -> None:
    def fit(epochs: int, resume: Any = None) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = Dropping()
        keep = ModelCheckpoint(tmp_path, filename=f"{{step}}-{epochs}", every_n_train_steps=5, save_top_k=-1)
        strategy = LTEStrategy(4, 4, rank=RANK, execution="batched")
        t = trainer(strategy, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
        t.fit(module, loader(16 * 5, shuffle=True), ckpt_path=resume)
        return clone(module.state_dict())

    whole = fit(3)
    assert_equal(whole, fit(3, resume=tmp_path / "step=5-3.ckpt"))


def saved_after(tmp_path: Path, steps: int = 4, **choices: Any) -> dict[str, Any]:
    t = trainer(LTEStrategy(4, 3, rank=RANK, **choices), max_steps=steps)
    t.fit(Module(), loader(160))
    t.save_checkpoint(tmp_path / "whole.ckpt")
    return torch.load(tmp_path / "whole.ckpt", weights_only=True)  # type: ignore[no-any-return]


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no clocks": lambda lte: lte.pop("clocks"),
    "nothing of devices": lambda lte: lte.pop("own"),
    "no parts": lambda lte: lte["weights"]["net.first"].pop("parts"),
    "no factors": lambda lte: lte["factors"].clear(),
    "factors of other heads": lambda lte: lte["factors"]["net.first"].update(A=torch.zeros(1, 3, 10)),
    "no version": lambda lte: lte.update(version=None),
    "replicas of a list": lambda lte: lte.update(replicas=[]),
    "one row of moments": lambda lte: lte["optimizers"][0]["net.first.weight.A"].update(
        exp_avg={"heads": torch.zeros(1, 3, 10)}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_anything_changes(tmp_path: Path, damage: str) -> None:
    saved = saved_after(tmp_path)
    DAMAGES[damage](saved["lte"])
    torch.save(saved, tmp_path / "damaged.ckpt")
    module = Module()
    with pytest.raises(ValueError, match=r"damaged .*fit without ckpt_path"):
        trainer(LTEStrategy(4, 3, rank=RANK), max_steps=6).fit(module, loader(160), ckpt_path=tmp_path / "damaged.ckpt")
    assert all(type(m).__module__.startswith(("torch.nn", "tests")) for m in module.modules())


def test_a_damaged_checkpoint_is_refused_by_python_without_asserts(tmp_path: Path) -> None:
    saved = saved_after(tmp_path)["lte"]
    DAMAGES["no version"](saved)
    path = str(tmp_path / "damaged.pt")
    torch.save(saved, path)
    code = f"import torch, lightning_lte.checkpoint; lightning_lte.checkpoint.check_shape(torch.load({path!r}))"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "damaged (ValueError: version None)" in done.stderr


def test_another_optimizer_is_named(tmp_path: Path) -> None:
    saved_after(tmp_path)
    with pytest.raises(ValueError, match="optimizers AdamW there, SGD here"):
        trainer(LTEStrategy(4, 3, rank=RANK), max_steps=6).fit(
            Module(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), loader(160), ckpt_path=tmp_path / "whole.ckpt"
        )


def test_a_run_that_is_resumed_at_its_end_is_merged(tmp_path: Path) -> None:
    module = Module()
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=5)
    trainer(LTEStrategy(4, 100, rank=RANK), max_steps=5, callbacks=[keep], enable_checkpointing=True).fit(
        module, loader(160)
    )
    again = Module()
    trainer(LTEStrategy(4, 100, rank=RANK), max_steps=5).fit(again, loader(160), ckpt_path=tmp_path / "last.ckpt")
    assert_equal(clone(module.state_dict()), clone(again.state_dict()))


def test_weights_that_were_changed_after_fit_are_saved_without_heads(tmp_path: Path) -> None:
    t = trainer(LTEStrategy(4, 3, rank=RANK), max_steps=4)
    module = Module()
    t.fit(module, loader(160))
    with torch.no_grad():
        module.net.norm.weight.fill_(7)
    with pytest.warns(UserWarning, match="have changed since `fit`"):
        t.save_checkpoint(tmp_path / "edited.ckpt")
    assert "lte" not in torch.load(tmp_path / "edited.ckpt", weights_only=True)
