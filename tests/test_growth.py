"""A number of heads that grows along the run, against literal workers that get others beside them."""

from __future__ import annotations

import copy
import csv
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_lte import At, Explorer, LTEConfig, LTEStrategy, Transport
from lightning_lte.heads import Factors, spread
from lightning_lte.layers.base import HeadedLayer
from lightning_lte.optimizers import magnitude_names
from tests.modules import (
    IN,
    RANK,
    Kinds,
    Module,
    Net,
    Recorder,
    ScaledNet,
    Slices,
    adamw,
    adamw_of_large_eps,
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
from tests.test_checkpoint import assert_equal
from tests.test_exactness import OUTER, TOLERANCE, BatchNormed, assert_same, first_A, oracle_beside, step_both
from tests.test_manual import Game, Manual

PLAN = {4: 4, 9: 8}  # step 4 is in the middle of a period of 3, and after step 9 all is merged
BATCH = 16  # samples of all heads


def fresh_A(explorer: Explorer) -> Any:
    factors = {f.name: f for f in explorer.injection.factors.values()}
    return lambda name, head, heads: factors[name]._draw_one(head, f"of {heads}")


def train_both(
    config: LTEConfig,
    optimizer: Any,
    *,
    kind: Any = Net,
    width: int = IN,
    steps: int = 14,
    clip: float | None = None,
    batch: int = BATCH,
) -> Explorer:
    """Train through heads and through workers and compare after each step; returns what has the heads."""
    model = make_net(kind)
    plain = copy.deepcopy(model)
    opt = optimizer(model.parameters())
    explorer = Explorer(model, opt, config)
    oracle = oracle_beside(explorer, plain, optimizer, clip, grow=config.grow_heads, fresh_A=fresh_A(explorer))
    for step in range(steps):
        x, y = make_data(batch, seed=step, width=width)
        explorer.act()
        count = explorer.count
        assert count == config.heads_at(step)
        step_both(explorer, opt, oracle, x, y, clip)
        if count > 1 or not list(model.buffers()):  # one head alone shows its running statistics as they are now
            assert_same(explorer, oracle)
    explorer.finish()
    for name, value in oracle.finish().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, **TOLERANCE)
    assert not any(isinstance(layer, HeadedLayer) for layer in model.modules())
    return explorer


# ---- the same as workers


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("heads", [1, 2])
def test_growing_equals_the_oracle(heads: int, execution: Any, after_merge: Any, optimizer: Any) -> None:
    config = LTEConfig(heads, 3, rank=RANK, after_merge=after_merge, execution=execution, grow_heads=PLAN)
    explorer = train_both(config, optimizer)
    assert explorer.count == explorer.config.heads == 8 and not explorer.config.grow_heads


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), id="Adam-amsgrad"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, weight_decay=0.1), id="AdamW-fused"),
        pytest.param(lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1), id="Adagrad"),
        pytest.param(lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5), id="RMSprop"),
    ],
)
def test_optimizers_equal_the_oracles(optimizer: Any) -> None:
    train_both(LTEConfig(2, 3, rank=RANK, execution="batched", grow_heads=PLAN), optimizer)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    "choices",
    [
        {"outer_optimizer": OUTER[0]},
        {"overlap": 2},
        {"overlap": 4, "stagger": 2, "outer_optimizer": OUTER[3]},
        {"stagger": 3, "after_merge": "reset"},
        {"replicas": "step"},
        {"replicas": "freeze"},
        {"freeze_a": True},
        {"freeze_a": True, "after_merge": "reset", "replicas": "freeze"},
        {"refresh": 1},
    ],
    ids="-".join,
)
def test_merges_in_other_ways_equal_the_oracle(choices: dict[str, Any], heads: int) -> None:
    """Merges on their way land, and groups that merge in turn all merge, before heads grow."""
    config = LTEConfig(heads, 4, rank=RANK, execution="batched", grow_heads={5: 4, 10: 8}, **choices)
    train_both(config, adamw, steps=19)


@pytest.mark.parametrize("heads", [1, 2])
def test_each_head_is_clipped_by_its_own_norm(heads: int) -> None:
    train_both(LTEConfig(heads, 3, rank=RANK, execution="batched", grow_heads=PLAN), sgd, clip=0.05)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", [ScaledNet, BatchNormed])
def test_heads_that_take_turns_share_nothing_from_then_on(kind: Any, heads: int) -> None:
    config = LTEConfig(heads, 3, rank=RANK, execution="sequential", grow_heads=PLAN)
    train_both(config, adamw_of_large_eps, kind=kind, batch=32)


@pytest.mark.parametrize("heads", [1, 2])
def test_layers_of_every_kind_equal_the_oracle(heads: int) -> None:
    choices: dict[str, Any] = {"split": {"linear1": 2}, "execution": "batched", "grow_heads": {4: 4}}
    train_both(LTEConfig(heads, 3, rank=RANK, **choices), adamw_of_large_eps, kind=Kinds, width=2 * 6 * 6 + 5, steps=8)


def test_norms_as_vector_and_scalar_equal_the_oracle() -> None:
    config = LTEConfig(2, 3, rank=RANK, execution="batched", norms="vector-scalar", grow_heads=PLAN)
    train_both(config, adamw)


# ---- what a fresh head starts with


def explorer_of(heads: int, plan: dict[int, int], optimizer: Any = adamw, **choices: Any) -> tuple[Explorer, Any, Any]:
    model = make_net()
    opt = optimizer(model.parameters())
    config = LTEConfig(heads, **{"merge_every": 3, "rank": RANK, **choices}, grow_heads=plan)
    return Explorer(model, opt, config), model, opt


def steps(explorer: Explorer, model: nn.Module, opt: Any, numbers: range, batch: int = BATCH) -> None:
    for step in numbers:
        train_step(explorer, model, opt, make_data(batch, seed=step))


def test_heads_keep_their_factors_and_fresh_ones_start_from_the_merged_weight() -> None:
    explorer, model, opt = explorer_of(2, {6: 6})
    steps(explorer, model, opt, range(6))
    before = {
        f.name: clone({"A": f.A, "B": f.B, "anchor_A": f.anchor_A, "anchor_B": f.anchor_B}) for f in factors(explorer)
    }
    weights, stream = clone(model.state_dict()), torch.get_rng_state()
    explorer.act()
    assert explorer.config.heads == explorer.count == 6
    assert torch.equal(torch.get_rng_state(), stream)
    torch.testing.assert_close(clone(model.state_dict()), weights, rtol=0, atol=0)
    for f in factors(explorer):
        for key, rows in before[f.name].items():
            assert torch.equal(getattr(f, key)[::3], rows), (f.name, key)
        others = [1, 2, 4, 5]
        assert not f.B[others].any() and f.anchor_B is not None and not f.anchor_B[others].any()
        assert f.anchor_A is not None and torch.equal(f.anchor_A, f.A)
        for head in range(6):
            assert torch.equal(f.effective(head), f.weight)


def factors(explorer: Explorer) -> list[Factors]:
    return list(explorer.injection.factors.values())


def test_what_is_drawn_depends_on_the_seed_the_layer_and_the_head_and_is_drawn_once() -> None:
    """Head 1 of 4 must not start as head 1 of 2 did, which has become head 2."""
    drawn = []
    for heads, plan in ((2, {3: 4}), (1, {3: 4}), (4, {})):
        explorer, model, opt = explorer_of(heads, plan, sgd, execution="batched", seed=5)
        starts = first_A(explorer)
        steps(explorer, model, opt, range(3))
        explorer.act()
        later = first_A(explorer)
        drawn.append((starts, later))
    (two, grown), (_, from_one), (four, _) = drawn
    for name in two:
        assert torch.equal(grown[name][1::2], from_one[name][1::2])
        everything = [*two[name], *four[name][2:], *grown[name][1::2]]
        for i, A in enumerate(everything):
            assert not any(torch.allclose(A, other) for other in everything[:i])
        # Orthogonal, and as large as at the start.
        torch.testing.assert_close(
            grown[name][1] @ grown[name][1].mT, two[name][0] @ two[name][0].mT, rtol=1e-5, atol=1e-5
        )


def test_a_fresh_head_makes_no_larger_steps_than_others() -> None:
    """With moments of zero, and a count of steps that says that they are means over many, Adam's would be 3.2 times
    the learning rate at first and up to 6.6 times soon after."""
    explorer, model, opt = explorer_of(2, {60: 4}, merge_every=60)
    rate = opt.defaults["lr"]
    steps(explorer, model, opt, range(60))
    explorer.act()
    sizes = []
    for step in range(60, 80):
        before = [f.B.detach().clone() for f in factors(explorer)]
        steps(explorer, model, opt, range(step, step + 1))
        moved = [(f.B - b).detach().abs()[1::2] for f, b in zip(factors(explorer), before, strict=True)]
        sizes.append(torch.cat([m.flatten() for m in moved]).median() / rate)
    # From a first moment of zero Adam makes 0.1 of a step; from zeros alone it would be 0.76 after 60 steps.
    assert 0 < sizes[0] < 0.3 and max(sizes) < 1


KEPT = [
    (torch.optim.SGD, {"momentum": 0.9}, set()),
    (torch.optim.AdamW, {}, {"exp_avg_sq"}),
    (torch.optim.Adam, {"amsgrad": True, "fused": True}, {"exp_avg_sq", "max_exp_avg_sq"}),
    (torch.optim.NAdam, {"capturable": True}, {"exp_avg_sq"}),
    (torch.optim.Adagrad, {}, {"sum"}),
    (torch.optim.Adamax, {}, {"exp_inf"}),
    (torch.optim.Adadelta, {}, {"square_avg", "acc_delta"}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, {"square_avg"}),
    (torch.optim.Rprop, {}, {"step_size"}),
]


@pytest.mark.parametrize(("kind", "settings", "names"), KEPT, ids=lambda v: getattr(v, "__name__", None))
def test_magnitudes_are_found_whatever_the_optimizer(kind: Any, settings: dict[str, Any], names: set[str]) -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = kind([param], lr=0.01, **settings)
    for _ in range(2):
        assert magnitude_names(optimizer) == names
        assert param.grad is None and float(param.detach()) == 1
        optimizer.state[param] = {"step": torch.tensor(1.0), "sum": torch.ones(1)}  # of use for some


def test_of_an_optimizer_that_can_not_be_tried_a_fresh_head_takes_over_all() -> None:
    class Stubborn(torch.optim.AdamW):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError

    explorer, model, opt = explorer_of(2, {3: 4}, lambda params: Stubborn(params, lr=0.01))
    steps(explorer, model, opt, range(3))
    explorer.act()
    for f in factors(explorer):
        for key in ("exp_avg", "exp_avg_sq"):
            moment = opt.state[f.B][key]
            assert moment.any() and torch.equal(moment[::2], moment[1::2])


def test_spread_puts_each_row_before_others_of_zeros() -> None:
    assert spread(torch.tensor([[1.0], [2.0]]), 3).flatten().tolist() == [1, 0, 0, 2, 0, 0]


def test_gradients_that_accumulate_meanwhile_are_not_lost() -> None:
    """Of two optimizers one may accumulate while the other steps."""
    for heads in (1, 2):
        explorer, model, opt = explorer_of(heads, {3: 4}, execution="batched")
        steps(explorer, model, opt, range(3))
        names = {**explorer.substitution.held(opt)}
        for p in names.values():
            p.grad = torch.full_like(p, 3.0)
        explorer.act()
        for name, p in explorer.substitution.held(opt).items():
            own = (
                spread(torch.full((heads,), 3.0), 4 // heads) if name.endswith((".A", ".B")) else torch.full((4,), 3.0)
            )
            assert p.grad is not None, name
            assert torch.equal(p.grad, own.view(-1, *[1] * (p.dim() - 1)).expand_as(p).to(p)), name


def test_what_int8_lost_counts_in_full_among_more_heads() -> None:
    explorer, model, opt = explorer_of(2, {3: 4})
    steps(explorer, model, opt, range(3))
    for f in factors(explorer):
        f.error = torch.full(f.weight.shape, 0.5)
    explorer.act()
    assert all(bool((f.error == 1.0).all()) for f in factors(explorer) if f.error is not None)


# ---- how local heads share the device then


def test_one_forward_for_more_heads_is_proved_anew() -> None:
    for heads in (1, 2):
        explorer, model, opt = explorer_of(heads, PLAN, execution="auto")
        steps(explorer, model, opt, range(10))
        proved = [note for note in explorer.report.notes if "proved" in note]
        assert [note.split()[0] for note in proved] == [str(n) for n in (heads, 4, 8) if n > 1]
        assert explorer.execution == "batched"


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_take_turns_where_the_proof_fails(heads: int) -> None:
    explorer = train_both_auto(heads)
    assert explorer.execution == "sequential" and explorer.count == 8


def train_both_auto(heads: int) -> Explorer:
    """As sequential from the start: what one head has is what a head in turn has."""
    ends = []
    for execution in ("auto", "sequential"):
        model = make_net(BatchNormed)
        opt = adamw(model.parameters())
        config = LTEConfig(heads, 3, rank=RANK, execution=execution, grow_heads=PLAN)  # type: ignore[arg-type]
        explorer = Explorer(model, opt, config)
        steps(explorer, model, opt, range(12), batch=32)
        explorer.finish()
        ends.append((explorer, clone(model.state_dict())))
    torch.testing.assert_close(ends[0][1], ends[1][1], **TOLERANCE)
    return ends[0][0]


def test_the_report_says_when_it_grew_and_how_many_there_are() -> None:
    explorer, model, opt = explorer_of(1, PLAN, execution="batched")
    steps(explorer, model, opt, range(10))
    for before, after, step in ((1, 4, 4), (4, 8, 9)):
        assert f"The number of heads grew from {before} to {after}: after step {step}." in explorer.report.notes
    assert {entry.copies for entry in explorer.report.entries} == {8}


def test_a_merge_of_its_own_comes_before_only_if_something_is_unmerged() -> None:
    explorer, model, opt = explorer_of(2, PLAN)
    steps(explorer, model, opt, range(12))
    # The next one that is due after step 4, and after 7, is counted from there.
    assert [record.step for record in explorer.records] == [3, 4, 7, 9, 12]


def test_heads_grow_at_their_step_whatever_the_schedule() -> None:
    explorer, model, opt = explorer_of(2, {5: 4}, merge_every=At([2]))
    steps(explorer, model, opt, range(6))
    assert explorer.count == 4 and [record.step for record in explorer.records] == [2, 5]


def test_heads_that_begin_after_full_rank_steps_grow_then() -> None:
    explorer, model, opt = explorer_of(2, {2: 4, 7: 8}, full_rank_steps=4)
    counts = []
    for step in range(9):
        steps(explorer, model, opt, range(step, step + 1))
        counts.append(explorer.count)
    assert counts == [2] * 4 + [4] * 3 + [8] * 2


def test_a_weight_that_lost_its_heads_stays_without() -> None:
    explorer, model, opt = explorer_of(2, PLAN)
    steps(explorer, model, opt, range(3))
    explorer.make_replicas({"second": "a test"})
    steps(explorer, model, opt, range(3, 12))
    assert [f.name for f in factors(explorer)] == ["first"] and explorer.count == 8
    assert explorer.report.entry("second.weight").copies == 1


# ---- the same wherever heads sit


def on_devices(choices: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = make_net()
    opt = optimizer(model.parameters())
    config = LTEConfig(4, **{"merge_every": 3, "execution": "batched", **choices}, rank=RANK, grow_heads={4: 8, 9: 16})  # type: ignore[arg-type]
    transport = Transport(world, rank)
    explorer = Explorer(model, opt, config, transport)
    quiet = []
    for step in range(12):
        if explorer.growth_due:
            if explorer.unmerged:
                explorer.merge()
            sent = transport.bytes_sent
            explorer.act()
            quiet.append(transport.bytes_sent == sent)
        batch = tuple(part.chunk(world)[rank] for part in make_data(32, seed=step))
        train_step(explorer, model, opt, batch)  # type: ignore[arg-type]
    explorer.finish()
    return {"weights": clone(model.state_dict()), "quiet": quiet, "notes": explorer.report.notes}


@pytest.mark.parametrize(
    ("choices", "optimizer"),
    [
        ({}, adamw),
        ({"execution": "auto"}, sgd),
        ({"execution": "sequential", "after_merge": "reset"}, adamw),
        ({"overlap": 2, "stagger": 2, "outer_optimizer": OUTER[0], "verify_every": 1}, adamw),
    ],
    ids=["keep", "auto", "reset-in-turn", "other-merges"],
)
def test_a_run_that_grows_is_the_same_wherever_heads_sit(choices: dict[str, Any], optimizer: Any) -> None:
    alone = on_devices(choices, optimizer)
    for world in (2, 4):
        results = run(on_devices, world, choices, optimizer)
        for result in results:
            torch.testing.assert_close(result["weights"], results[0]["weights"], rtol=0, atol=0)
            torch.testing.assert_close(result["weights"], alone["weights"], **TOLERANCE)
            assert result["quiet"] == [True, True]


# ---- through Lightning


SAVED = (3, 4, 5, 6, 9, 10)  # of heads that grow after steps 4 and 9: before, at, and after
LAST = 13


def fit(
    folder: str, execution: str, devices: int, resume: int | None = None, saved_on: int = 1, **choices: Any
) -> dict[str, Any]:
    rank = int(os.environ["RANK"]) if devices > 1 else 0
    path = f"{folder}/{execution}-{{}}-{{}}.ckpt"

    def save(t: Trainer, _: Any) -> None:
        if resume is None and t.global_step in SAVED:
            t.save_checkpoint(path.format(devices, t.global_step))

    strategy = LTEStrategy(2, 3, rank=RANK, execution=execution, grow_heads=PLAN, **choices)  # type: ignore[arg-type]
    t = trainer(strategy, devices=devices, max_steps=LAST, callbacks=[Recorder(save)])
    module = Module(make_net(), adamw)
    seed_everything(3)
    t.fit(module, Slices(devices, rank), ckpt_path=None if resume is None else path.format(saved_on, resume))
    state = kept(t)
    return {"weights": clone(module.state_dict()), "lte": {k: state[k] for k in TO_COMPARE if state}}


TO_COMPARE = ("heads", "execution", "clocks", "factors", "replicas", "optimizers", "statistics", "merged_steps")


def fit_all(folder: str, execution: str, devices: int, saved_on: int | None = None) -> dict[Any, Any]:
    if saved_on is None:
        return {None: fit(folder, execution, devices)}
    return {step: fit(folder, execution, devices, step, saved_on) for step in SAVED}


@pytest.mark.parametrize(
    ("execution", "choices"),
    [
        ("auto", {}),
        ("sequential", {"after_merge": "reset"}),
        ("batched", {"overlap": 2, "outer_optimizer": OUTER[0]}),
        ("batched", {"stagger": 2, "replicas": "step"}),
        ("auto", {"checkpoint": "sharded"}),
    ],
)
def test_checkpoints_before_at_and_after_growth_go_on_exactly(
    tmp_path: Path, execution: str, choices: dict[str, Any]
) -> None:
    folder = str(tmp_path)
    whole = fit(folder, execution, 1, **choices)
    assert whole["lte"]["heads"] == 8
    paths = [f"{folder}/{execution}-1-{step}.ckpt" for step in SAVED]
    metas = [f"{path}/meta.pt" if os.path.isdir(path) else path for path in paths]
    heads = [torch.load(meta, weights_only=True)["lte"]["heads"] for meta in metas]
    assert heads == [2, 2, 4, 4, 4, 8]
    for step in SAVED:
        assert_equal(fit(folder, execution, 1, step, **choices), whole, f"from step {step}")


@pytest.mark.parametrize("execution", ["auto", "sequential"])
def test_what_is_frozen_at_first_and_not_as_heads_grow_goes_on_exactly(tmp_path: Path, execution: Any) -> None:
    class Thawed(Module):
        def __init__(self) -> None:
            super().__init__(make_net(), adamw)
            self.net.norm.requires_grad_(False)

        def on_train_batch_start(self, *args: Any) -> None:
            self.net.norm.requires_grad_(self.trainer.global_step >= 3)

    path = tmp_path / "grown.ckpt"

    def fit(resume: Path | None) -> dict[str, Tensor]:
        save = Recorder(lambda t, _: t.global_step == 5 and t.save_checkpoint(path))
        strategy = LTEStrategy(1, 3, rank=RANK, execution=execution, grow_heads={4: 4})
        module = Thawed()
        trainer(strategy, max_steps=10, callbacks=[save]).fit(module, Slices(1, 0), ckpt_path=resume)
        assert strategy.report().entry("net.norm.weight").copies == 4
        return clone(module.state_dict())

    assert_equal(fit(None), fit(path))


def test_checkpoints_go_on_on_another_number_of_devices(tmp_path: Path) -> None:
    folder = str(tmp_path)
    whole = {1: fit(folder, "auto", 1), 2: run(fit_all, 2, folder, "auto", 2, group=False)[0][None]}
    torch.testing.assert_close(whole[1]["weights"], whole[2]["weights"], **TOLERANCE)
    for saved_on in (1, 2):
        results = run(fit_all, 2, folder, "auto", 2, saved_on, group=False, timeout_s=120)
        for rank, step in ((rank, step) for rank in results for step in SAVED):
            torch.testing.assert_close(rank[step]["weights"], whole[1]["weights"], **TOLERANCE)
            assert saved_on == 1 or all(
                torch.equal(v, whole[2]["weights"][n]) for n, v in rank[step]["weights"].items()
            )
    for step in SAVED:
        torch.testing.assert_close(
            fit(folder, "auto", 1, step, saved_on=2)["weights"], whole[1]["weights"], **TOLERANCE
        )


def test_a_checkpoint_of_other_heads_is_refused(tmp_path: Path) -> None:
    fit(str(tmp_path), "batched", 1)
    path = tmp_path / "batched-1-10.ckpt"  # of 8 heads
    module = Module(make_net(), adamw)
    with pytest.raises(ValueError, match=r"heads=8 there, heads=2, grow_heads=\{20: 6\} here"):
        trainer(LTEStrategy(2, 3, rank=RANK, grow_heads={20: 6}), max_steps=LAST).fit(
            module, Slices(1, 0), ckpt_path=path
        )


def test_a_run_of_fewer_heads_goes_on_with_more(tmp_path: Path) -> None:
    """And so it does where they grow at once."""
    module, path = Module(make_net(), adamw), tmp_path / "two.ckpt"
    t = trainer(LTEStrategy(2, 3, rank=RANK), max_steps=5)
    t.fit(module, Slices(1, 0))
    t.save_checkpoint(path)
    strategy = LTEStrategy(2, 3, rank=RANK, grow_heads={1: 8})
    counts = Recorder(lambda t, _: t.strategy.explorer.count)
    trainer(strategy, max_steps=7, callbacks=[counts]).fit(Module(make_net(), adamw), Slices(1, 0), ckpt_path=path)
    assert counts.seen == [8, 8]


def test_lightning_says_so_and_learning_rates_carry_over(capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.AdamW(
                [{"params": self.net.first.parameters(), "lr": 0.02}, {"params": self.net.second.parameters()}], lr=0.01
            )
            return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 2, 0.5), "interval": "step"}]

    seen = Recorder(lambda t, m: [(g["lr"], len(g["params"])) for g in t.optimizers[0].param_groups])
    with caplog.at_level("INFO"):
        module = Scheduled()
        strategy = LTEStrategy(1, 3, rank=RANK, grow_heads={2: 4})
        trainer(strategy, max_steps=5, callbacks=[seen]).fit(module, loader(160, 16))
    rates = [0.02, 0.01, 0.01, 0.005, 0.005]
    assert seen.seen == [[(pytest.approx(r), 2), (pytest.approx(r / 2), 1)] for r in rates]
    said = caplog.text + "".join(capfd.readouterr())
    assert "LTE trains through 4 heads" in said and "The number of heads grew from 1 to 4: after step 2." in said
    assert len(module.optimizers().optimizer.param_groups[0]["params"]) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("execution", ["auto", "batched"])
def test_manual_optimization_grows_as_automatic(execution: Any) -> None:
    ends = []
    for kind, how in ((Manual, execution), (Module, "sequential")):
        module = kind()
        strategy = LTEStrategy(1, 3, rank=RANK, execution=how, grow_heads=PLAN)
        trainer(strategy, max_steps=12).fit(module, loader(16 * 12, 16))
        assert "grew from 4 to 8" in str(strategy.report())
        ends.append(clone(module.state_dict()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


def play(folder: str, devices: int) -> list[dict[str, Tensor]]:
    rank = int(os.environ["RANK"]) if devices > 1 else 0
    module = Game(toggle=False)
    strategy = LTEStrategy(2, 3, rank=RANK, grow_heads={6: 4, 9: 8})
    counts = Recorder(lambda t, _: t.strategy.explorer.config.heads)
    trainer(strategy, devices=devices, max_steps=27, callbacks=[counts]).fit(module, Slices(devices, rank))
    # Two steps of the judge and one of the forger in each batch; the judge's are more.
    assert counts.seen == [2] * 3 + [4] * 2 + [8] * 4
    return clone(module.state_dict())  # type: ignore[return-value]


def test_a_game_of_two_optimizers_grows_alike_wherever_heads_sit(tmp_path: Path) -> None:
    """With one head per device they take turns from the first growth on only."""
    alone = play(str(tmp_path), 1)
    for weights in run(play, 2, str(tmp_path), 2, group=False):
        torch.testing.assert_close(weights, alone, **TOLERANCE)


def test_the_logger_gets_the_number_of_heads(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="", version="")
    strategy = LTEStrategy(1, 3, rank=RANK, grow_heads=PLAN)
    trainer(strategy, max_steps=11, logger=logger, log_every_n_steps=1).fit(Module(), loader(16 * 12, 16))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["lte/merges"]]
    assert [float(row["lte/heads"]) for row in rows] == [1, 1, 4, 4, 8]


def test_it_compiles() -> None:
    ends = []
    for compiled in (False, True):
        explorer, model, opt = explorer_of(1, {4: 4, 6: 8}, execution="batched")
        net = torch.compile(model, backend="eager") if compiled else model
        for step in range(9):
            train_step(explorer, net, opt, make_data(BATCH, seed=step))
        explorer.finish()
        ends.append(clone(model.state_dict()))
    torch.testing.assert_close(ends[0], ends[1], **TOLERANCE)


def test_split_batch_is_asked_for_as_many_parts_as_there_are_heads() -> None:
    asked: list[int] = []

    class Splitting(Module):
        def split_batch(self, batch: Any, heads: int) -> list[Any]:
            asked.append(heads)
            return list(zip(*(part.chunk(heads) for part in batch), strict=True))

    strategy = LTEStrategy(1, 3, rank=RANK, grow_heads=PLAN)
    trainer(strategy, max_steps=11).fit(Splitting(), loader(16 * 12, 16))
    assert asked == [4] * 5 + [8] * 2


def test_the_trainer_accumulates_and_clips_each_head_by_its_own_norm() -> None:
    ends = []
    for execution in ("batched", "sequential"):
        module = Module(optimizer=sgd)
        strategy = LTEStrategy(1, 3, rank=RANK, execution=execution, grow_heads=PLAN)  # type: ignore[arg-type]
        t = trainer(strategy, max_steps=12, gradient_clip_val=0.05, accumulate_grad_batches=2)
        t.fit(module, loader(16 * 24, 16))
        ends.append(clone(module.state_dict()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


# ---- what is refused, before anything is trained


BAD: list[tuple[Any, type[Exception], str]] = [
    ([8], TypeError, r"received \[8\]. Give a dict such as grow_heads=\{1000: 8\}"),
    ({"10": 8}, TypeError, "received '10'"),
    ({10: 8.0}, TypeError, r"received 8\.0"),
    ({True: 8}, TypeError, "received True"),
    ({0: 8}, ValueError, "received {0: 8}. Give heads=8 for the start"),
    ({10: 4}, ValueError, "received 4 heads from step 10 on, after 4"),
    ({10: 6}, ValueError, "must be a multiple of the one before.*received 6 heads"),
    ({20: 8, 10: 16}, ValueError, "received 8 heads from step 20 on, after 16. Give 32"),
]


@pytest.mark.parametrize(("plan", "kind", "words"), BAD)
def test_bad_plans_are_refused(plan: Any, kind: type[Exception], words: str) -> None:
    for make in (LTEConfig, partial(LTEStrategy)):
        with pytest.raises(kind, match=words):
            make(4, grow_heads=plan)


def test_numbers_of_numpys_are_plain_in_a_plan() -> None:
    plan = LTEConfig(4, grow_heads={np.int64(10): np.int32(8)}).grow_heads  # type: ignore[dict-item]
    assert plan == {10: 8} and all(type(number) is int for pair in plan.items() for number in pair)


def test_heads_that_a_loop_grows_by_itself_must_be_a_multiple() -> None:
    explorer, model, opt = explorer_of(2, {})
    steps(explorer, model, opt, range(3))
    with pytest.raises(ValueError, match="received 3 heads from step 1 on, after 2"):
        explorer.grow(3, "for a test")
    assert explorer.count == 2 and not any("for a test" in note for note in explorer.report.notes)
    explorer.grow(6, "for a test")
    assert explorer.count == 6 and "The number of heads grew from 2 to 6: for a test." in explorer.report.notes


def test_one_head_per_device_must_divide_the_plan_too() -> None:
    strategy = LTEStrategy(grow_heads={10: 8})
    t = trainer(strategy, devices=3)
    with pytest.raises(ValueError, match="received 8 heads from step 10 on, after 3"):
        t.strategy.setup_environment()


def test_a_batch_that_later_heads_do_not_divide_is_refused_before_the_first_step() -> None:
    module = Module()
    with pytest.raises(ValueError, match="evenly over its 8 heads; received a batch size of 12"):
        trainer(LTEStrategy(1, rank=RANK, grow_heads={5: 8}), max_steps=9).fit(module, loader(48, 12))
    assert not module.batch_sizes


def test_an_optimizer_that_would_mix_later_heads_is_refused() -> None:
    model = make_net()
    opt = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="With 4 heads on a device the optimizer must update each element"):
        Explorer(model, opt, LTEConfig(1, rank=RANK, grow_heads={5: 4}))
    assert type(model.first) is nn.Linear
