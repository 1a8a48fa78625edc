"""Merges before validations: what they see, on every device, and who else is in the way."""

from __future__ import annotations

import csv
import datetime
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import At, BeforeValidation, Explorer, LTECallback, LTEConfig, LTEStrategy
from tests.modules import RANK, Module, Recorder, adamw, clone, loader, make_data, make_net, sgd, trainer
from tests.processes import run
from tests.test_checkpoint import assert_equal
from tests.test_manual import Game
from tests.test_schedule import fit_in_part


def strategy(merge_every: Any = None, heads: int = 4, **choices: Any) -> LTEStrategy:
    return LTEStrategy(heads, merge_every or BeforeValidation(), rank=RANK, **choices)


class Seen(Callback):
    """What a validation finds: steps, merges, what heads hold that the module lacks, and the weights."""

    def __init__(self) -> None:
        self.at: list[tuple[int, int]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.sanity = 0

    def on_validation_batch_start(self, t: Trainer, m: Any, *_: Any) -> None:
        if t.sanity_checking:
            self.sanity += 1
            return
        explorer = t.strategy.explorer  # type: ignore[attr-defined]
        assert not explorer.unmerged
        for f in explorer.injection.factors.values():
            for head in range(f.count):
                torch.testing.assert_close(f.effective(head), f.weight.detach(), rtol=0, atol=0)
        held = {p for group in t.optimizers[0].param_groups for p in group["params"]}
        assert held <= set(m.parameters())  # optimizers show the user's own, as between batches
        self.at.append((explorer.clock.step, explorer.merges))
        self.weights.append(clone(m.state_dict()))

    def on_validation_end(self, t: Trainer, *_: Any) -> None:
        if not t.sanity_checking:
            self.losses.append(float(t.callback_metrics["val_loss"]))


def fit(
    *callbacks: Callback,
    merge_every: Any = None,
    heads: int = 4,
    devices: int = 1,
    optimizer: Any = adamw,
    execution: Any = "auto",
    **choices: Any,
) -> tuple[Seen, Module]:
    """Three epochs of 5 batches with a validation after the 3rd and, unless told otherwise, after no other."""
    seen, module = Seen(), Module(optimizer=optimizer)
    settings: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 3, **choices}
    t = trainer(
        strategy(merge_every, heads, execution=execution), devices=devices, callbacks=[*callbacks, seen], **settings
    )
    t.fit(module, loader(16 * 5 * devices, shuffle=False), loader(16 * devices))
    return seen, module


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_validations_see_all_that_heads_have_learned_and_the_sanity_check_merges_nothing(execution: str) -> None:
    seen, _ = fit(execution=execution)
    assert seen.sanity == 1
    assert seen.at == [(3, 1), (8, 2), (13, 3)]
    assert_as_stated(seen)


@pytest.mark.parametrize("choices", [{"overlap": 2}, {"stagger": 2}, {"overlap": 2, "stagger": 3}], ids=str)
def test_validations_do_not_go_ahead_of_merges_on_their_way_or_of_weights_whose_turn_has_not_come(
    choices: dict[str, int],
) -> None:
    seen = Seen()
    t = trainer(strategy(BeforeValidation(also=6), **choices), max_epochs=3, val_check_interval=3, callbacks=[seen])
    t.fit(Module(), loader(80), loader(16))
    assert [step for step, _ in seen.at] == [3, 8, 13]
    assert_as_stated(seen)


def test_before_heads_begin_there_is_nothing_to_merge() -> None:
    seen = Seen()
    t = trainer(strategy(full_rank_steps=4), max_epochs=3, val_check_interval=3, callbacks=[seen])
    t.fit(Module(), loader(80), loader(16))
    assert seen.at == [(3, 0), (8, 1), (13, 2)]
    assert_as_stated(seen)


def assert_as_stated(seen: Seen) -> None:
    """The losses are those of a plain net with the weights that were seen."""
    x, y = make_data(16)
    for weights, loss in zip(seen.weights, seen.losses, strict=True):
        plain = make_net()
        plain.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
        assert cross_entropy(plain(x), y).item() == pytest.approx(loss, rel=1e-5)
    assert seen.losses[0] != seen.losses[1] != seen.losses[2]


def test_the_merge_is_that_of_the_same_steps_given_by_number() -> None:
    """Nothing else changes by it."""
    _, module = fit()
    _, other = fit(merge_every=At([3, 8, 13]))
    assert_equal(clone(module.state_dict()), clone(other.state_dict()))


def test_a_validation_between_accumulated_batches_sees_all_steps_that_were_made() -> None:
    seen, module = fit(accumulate_grad_batches=2)
    assert seen.at == [(1, 1), (4, 2), (7, 3)]
    assert all(p.isfinite().all() for p in module.parameters())


def test_where_a_merge_was_due_just_before_a_validation_there_is_one_and_not_two() -> None:
    seen, _ = fit(merge_every=BeforeValidation(also=At([3, 5])))
    assert seen.at == [(3, 1), (8, 3), (13, 4)]


def test_checkpoints_of_a_validation_have_all_that_was_learned(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    seen, _ = fit(keep, enable_checkpointing=True)
    for (step, _), weights in zip(seen.at, seen.weights, strict=True):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert saved["lte"]["clocks"][0]["last_merge"] == saved["lte"]["clocks"][0]["step"] == step
        assert_equal(dict(saved["state_dict"]), weights)


def test_these_merges_are_logged_too(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="", version="")
    fit(merge_every=BeforeValidation(also=4), logger=logger, log_every_n_steps=1)
    with open(tmp_path / "metrics.csv") as file:
        rows = {int(row["step"]): float(row["lte/merges"]) for row in csv.DictReader(file) if row["lte/merges"]}
    # After steps 3, 7, 8, 12 and 13, in Lightning's count from 0; and at the end, when 15 were done.
    assert rows == {2: 1, 6: 2, 7: 3, 11: 4, 12: 5, 15: 6}


class Averaged(Callback):
    """Puts other weights in for each validation, as averaging callbacks do."""

    def on_validation_start(self, t: Trainer, m: Any) -> None:
        self.kept = clone(m.state_dict())
        m.load_state_dict({name: value * 0.5 for name, value in self.kept.items()})

    def on_validation_end(self, t: Trainer, m: Any) -> None:
        m.load_state_dict(self.kept)


class StopAt(Callback):
    """Asks Lightning to stop after a step, for which it validates once more."""

    def on_train_batch_end(self, t: Trainer, *_: Any) -> None:
        t.should_stop = t.global_step == 4


@pytest.mark.parametrize("stops", [False, True])
def test_weights_that_are_swapped_for_validation_are_not_merged_into(stops: bool) -> None:
    class Own(Seen):
        def on_validation_batch_start(self, t: Trainer, *_: Any) -> None:
            assert not t.strategy.explorer.unmerged  # type: ignore[attr-defined]

    stop = [StopAt()] if stops else []  # a validation that was not to be foreseen
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*written.*")
        _, swapped = fit(*stop, Averaged(), Own())
    _, plain = fit(*stop)
    assert_equal(clone(swapped.state_dict()), clone(plain.state_dict()))


def test_a_validation_that_comes_as_training_is_told_to_stop_sees_all() -> None:
    seen, _ = fit(StopAt())
    assert seen.at == [(3, 1), (4, 2)]
    seen, _ = fit(EarlyStopping("val_loss", mode="max", patience=1))
    assert [step for step, _ in seen.at] == [3, 8]


class NoCallbacks(Callback):
    """Takes all callbacks away that are not needed here, as Lightning's tuners do."""

    def on_train_start(self, t: Trainer, *_: Any) -> None:
        t.callbacks[:] = [c for c in t.callbacks if not isinstance(c, LTECallback)]  # type: ignore[attr-defined]


class Break(Callback):
    """Breaks a head."""

    def on_train_batch_end(self, t: Trainer, *_: Any) -> None:
        if t.global_step == 6:
            with torch.no_grad():
                next(iter(t.strategy.explorer.injection.factors.values())).A[1, 0, 0] = torch.nan  # type: ignore[attr-defined]


def test_merging_before_validation_does_not_need_the_callback() -> None:
    with pytest.warns(UserWarning, match="heads 1 were not"):
        seen, module = fit(NoCallbacks(), Break())
    assert seen.at == [(3, 1), (8, 2), (13, 3)]
    with pytest.warns(UserWarning, match="heads 1 were not"):
        _, other = fit(Break())
    assert_equal(clone(module.state_dict()), clone(other.state_dict()))


@pytest.mark.parametrize("callbacks", [[], [NoCallbacks()]])
def test_a_weight_that_loses_its_heads_at_such_a_merge_is_trained_on(callbacks: list[Callback]) -> None:
    class WrittenLate(Module):
        """Writes to a weight past autograd, which is found at the next merge."""

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 7:
                self.net.second.weight.data.mul_(1.01)

    weights = Recorder(lambda t, m: m.net.second.weight.detach().clone())
    t = trainer(strategy(), max_epochs=3, val_check_interval=3, callbacks=[*callbacks, weights])
    with pytest.warns(UserWarning, match="as replicas: net.second"):
        t.fit(WrittenLate(optimizer=lambda p: torch.optim.Adagrad(p, lr=0.01)), loader(80), loader(16))
    # Found before the validation after step 8, and trained itself from step 9 on.
    changed = [not torch.equal(before, after) for before, after in pairwise(weights.seen)]
    assert changed[8:] == [True] * 6


# ---- several optimizers, several devices


class Players(Game):
    """A game; the second optimizer makes two steps in each batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        explorer = self.trainer.strategy.explorer
        if not self.trainer.sanity_checking:
            assert not explorer.unmerged
            self.seen.append([(clock.step, clock.last_merge, clock.merges) for clock in explorer.clocks])


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "sequential"), (4, "batched")])
def test_all_optimizers_are_merged_and_each_counts_for_itself(heads: int, execution: str) -> None:
    module = Players(toggle=False)
    module.seen = []
    schedule = BeforeValidation(also=lambda step, last_merge: step == 5)
    t = trainer(strategy(schedule, heads, execution=execution), max_epochs=2, val_check_interval=3)
    t.fit(module, loader(80), loader(16))
    # The judge came to its step 5 in the third batch, and the forger in the fifth.
    assert module.seen == [[(3, 3, 1), (6, 6, 2)], [(8, 8, 3), (16, 16, 3)]]


def _fit_on_two(heads: int, merge_every: Any) -> tuple[list[Any], list[dict[str, Tensor]], dict[str, Tensor]]:
    seen, module = fit(heads=heads, devices=2, optimizer=sgd, merge_every=merge_every)
    return seen.at, seen.weights, clone(module.state_dict())


@pytest.mark.parametrize("heads", [2, 4])
def test_all_devices_merge_before_they_validate(heads: int) -> None:
    (at, weights, after), (other_at, other_weights, other_after) = run(_fit_on_two, 2, heads, None, group=False)
    assert at == other_at == [(3, 1), (8, 2), (13, 3)]
    assert_equal(weights, other_weights)
    assert_equal(after, other_after)
    assert_equal(after, run(_fit_on_two, 2, heads, At([3, 8, 13]), group=False)[0][2])


def _resume_on_two(folder: str, hook: str) -> Any:
    return fit_in_part(folder, BeforeValidation, 8, hook, devices=2)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_two_devices_go_on_as_if_not_stopped(tmp_path: Path, hook: str) -> None:
    for whole, resumed, saved, merged in run(_resume_on_two, 2, str(tmp_path), hook, group=False, timeout_s=120):
        assert saved == {"step": 8, "last_merge": 8} and merged == [3, 8, 13]
        assert_equal(whole, resumed)


def _told_to_terminate() -> list[bool]:
    """Which devices know of it when their first validation begins; Lightning leaves on them soon after."""
    knows: list[bool] = []

    class Told(Callback):
        def on_train_batch_start(self, t: Trainer, *_: Any) -> None:
            if t.global_step == 2 and t.global_rank == 1:
                t._signal_connector.received_sigterm = True

        def on_validation_start(self, t: Trainer, *_: Any) -> None:
            if not t.sanity_checking:
                knows.append(t.received_sigterm)

    t = trainer(strategy(heads=2), devices=2, max_epochs=3, val_check_interval=3, callbacks=[Told()])
    with pytest.raises(SIGTERMException):
        t.fit(Module(optimizer=sgd), loader(160), loader(32))
    return knows


def test_devices_hear_at_these_merges_that_one_was_told_to_terminate() -> None:
    assert run(_told_to_terminate, 2, group=False) == [[True], [True]]


def _by_the_clock() -> None:
    choices: dict[str, Any] = {"max_epochs": 1, "val_check_interval": datetime.timedelta(seconds=1)}
    with pytest.raises(ValueError, match=r"must validate after the same step; received .*as a number of batches"):
        trainer(strategy(), devices=2, **choices).fit(Module(), loader(), loader())
    trainer(strategy(3), devices=2, **choices).fit(Module(), loader(), loader())


def test_validations_by_the_clock_are_refused_on_several_devices() -> None:
    run(_by_the_clock, 2, group=False)
    seen, _ = fit(val_check_interval=datetime.timedelta(seconds=0))
    assert seen.at[0] == (1, 1) and len(seen.at) == 15


# ---- without Lightning


def test_a_plain_loop_reads_the_flag_and_merges_by_itself() -> None:
    model = make_net()
    optimizer = adamw(model.parameters())
    config = LTEConfig(4, BeforeValidation(also=At([5])), rank=RANK, execution="batched")
    explorer = Explorer(model, optimizer, config)
    merged = []
    for step in range(1, 9):
        x, y = make_data(16, seed=step)
        with explorer.heads():
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        explorer.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        explorer.step()
        if step % 3 == 0 and explorer.merges_before_validation:
            with torch.inference_mode():
                explorer.merge()
        merged.append(explorer.clock.last_merge)
    explorer.finish()
    assert merged == [0, 0, 3, 3, 5, 6, 6, 6]
    again = Explorer(model, optimizer, LTEConfig(4, rank=RANK))
    assert not again.merges_before_validation
