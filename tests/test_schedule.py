"""When merges come: what each schedule answers, and what the strategy makes of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import At, BeforeValidation, Every, Growing, LTEStrategy, MergeSchedule, Piecewise, When
from lightning_lte.schedule import as_schedule
from tests.modules import RANK, Module, Recorder, adamw, clone, kept, loader, make_data, make_net, trainer
from tests.test_checkpoint import assert_equal


def powers_of_two(step: int, last_merge: int) -> bool:
    return step & (step - 1) == 0


def merges_of(schedule: MergeSchedule, steps: int, start: tuple[int, int] = (0, 0)) -> list[int]:
    """The steps up to `steps` after which a run merges that goes on from a clock of `step` and `last_merge`."""
    step, last_merge = start
    merged = []
    while step < steps:
        step += 1
        if schedule.due(step, last_merge):
            last_merge = step
            merged.append(step)
    return merged


# ---- what a schedule answers

schedules: st.SearchStrategy[MergeSchedule] = st.recursive(
    st.one_of(
        st.builds(Every, st.integers(1, 40)),
        st.builds(At, st.lists(st.integers(1, 200), min_size=1)),
        st.builds(
            lambda first, more: Piecewise({**more, 0: first}),
            st.integers(1, 40),
            st.dictionaries(st.integers(1, 200), st.integers(1, 40), max_size=4),
        ),
        st.builds(
            lambda first, factor, more, start: Growing(first, factor, first + more, start),
            st.integers(1, 20),
            st.floats(1, 4),
            st.integers(0, 60),
            st.integers(0, 50),
        ),
        st.just(When(powers_of_two)),
    ),
    lambda inner: st.builds(BeforeValidation, st.none() | inner),
    max_leaves=3,
)


@given(st.integers(1, 50), st.integers(0, 200))
def test_every_merges_at_the_multiples_of_the_period(period: int, steps: int) -> None:
    assert merges_of(Every(period), steps) == list(range(period, steps + 1, period))


@given(st.integers(1, 50), st.integers(0, 100), st.integers(0, 100))
def test_a_merge_out_of_turn_starts_a_whole_period(period: int, last_merge: int, passed: int) -> None:
    assert Every(period).due(last_merge + passed, last_merge) == (passed >= period)


@given(schedules, st.integers(0, 250), st.sets(st.integers(1, 250), max_size=3))
def test_whoever_goes_on_from_a_clock_merges_as_if_not_interrupted(
    schedule: MergeSchedule, stop: int, by_hand: set[int]
) -> None:
    """With merges out of turn, too: the clock is all that the answers depend on."""
    held, fresh = copy.deepcopy(vars(schedule)), pickle.loads(pickle.dumps(schedule))
    whole: list[int] = []
    step, last_merge, at_stop = 0, 0, (0, 0)
    while step < 250:
        step += 1
        if schedule.due(step, last_merge) or step in by_hand:
            last_merge = step
            whole.append(step)
        if step == stop:
            at_stop = (step, last_merge)
    assert repr(vars(schedule)) == repr(held)  # nothing was kept
    step, last_merge = at_stop
    resumed = [own for own in whole if own <= step]
    while step < 250:
        step += 1
        if fresh.due(step, last_merge) or step in by_hand:
            last_merge = step
            resumed.append(step)
    assert resumed == whole
    assert sorted(set(whole)) == whole  # once after a step, and forward in time


@given(schedules, st.integers(1, 300), st.data())
def test_the_answer_is_a_bool_and_depends_on_the_arguments_alone(
    schedule: MergeSchedule, step: int, data: st.DataObject
) -> None:
    last_merge = data.draw(st.integers(0, step - 1))
    answer = schedule.due(step, last_merge)
    assert isinstance(answer, bool)
    for other in data.draw(st.lists(st.integers(1, 300), max_size=5)):
        schedule.due(other, 0)
    assert schedule.due(step, last_merge) is answer


@given(st.lists(st.integers(1, 100), min_size=1))
def test_at_merges_after_the_given_steps_and_no_others(steps: list[int]) -> None:
    assert merges_of(At(steps), 120) == sorted(set(steps))
    assert merges_of(At(tuple(np.array(steps))), 120) == sorted(set(steps))


def test_piecewise_takes_the_period_of_the_last_step_that_is_given() -> None:
    assert merges_of(Piecewise({0: 5, 1000: 20}), 1060) == [*range(5, 1000, 5), 1015, 1035, 1055]
    # A shorter period ends a longer one that runs.
    assert merges_of(Piecewise({0: 100, 50: 20}), 130) == [50, 70, 90, 110, 130]
    assert merges_of(Piecewise({12: 2, 0: 4}), 18) == [4, 8, 12, 14, 16, 18]


@given(st.integers(1, 30), st.integers(0, 200))
def test_piecewise_of_one_piece_is_every(period: int, steps: int) -> None:
    assert merges_of(Piecewise({0: period}), steps) == merges_of(Every(period), steps)
    assert merges_of(Growing(period, 1, period), steps) == merges_of(Every(period), steps)


@given(st.integers(1, 30), st.floats(1, 5), st.integers(0, 400))
def test_each_period_of_growing_is_the_one_before_times_the_factor(first: int, factor: float, more: int) -> None:
    last = first + more
    merged = [0, *merges_of(Growing(first, factor, last), 3000)]
    periods = [after - before for before, after in pairwise(merged)]
    assert periods[0] == first and max(periods) <= last
    for before, after in pairwise(periods):
        assert after == last or abs(after - factor * before) <= 1 + 1e-6
        assert after >= before


def test_growing_as_its_documentation_says() -> None:
    merges = [10, 25, 47, 81, 131, 207, 307, 407, 507]
    assert merges_of(Growing(10, 1.5, 100), 520) == merges
    # As after 1000 full-rank steps.
    later = merges_of(Growing(10, 1.5, 100, start=1000), 1520, start=(1000, 1000))
    assert later == [1000 + step for step in merges]


def test_before_validation_carries_a_flag_and_asks_the_other_schedule() -> None:
    assert not any(s.before_validation for s in (Every(3), At([3]), Piecewise({0: 3}), Growing(3, 2, 9)))
    assert BeforeValidation().before_validation and merges_of(BeforeValidation(), 100) == []
    for also in (5, Every(5), lambda step, last_merge: step % 5 == 0):
        assert merges_of(BeforeValidation(also), 12) == [5, 10]
    # Groups of weights that merge in turn are spread as that schedule does.
    assert [BeforeValidation(also=12).delay(group, 3) for group in range(3)] == [0, 4, 8]
    assert [BeforeValidation().delay(group, 3) for group in range(3)] == [0, 1, 2]


def test_what_the_user_gives_becomes_a_schedule_and_a_schedule_stays_the_same_object() -> None:
    class Never(MergeSchedule):
        def due(self, step: int, last_merge: int) -> bool:
            return False

    never = Never()
    assert as_schedule(never) is never
    assert merges_of(as_schedule(powers_of_two), 9) == [1, 2, 4, 8]
    assert merges_of(as_schedule(np.int64(4)), 9) == [4, 8]  # type: ignore[arg-type]
    assert merges_of(as_schedule(lambda step, last_merge: np.bool_(step == 3)), 9) == [3]  # type: ignore[arg-type]
    assert list(map(repr, map(as_schedule, (7, powers_of_two)))) == ["Every(7)", "When(powers_of_two)"]


@given(schedules)
def test_a_repr_shows_all_that_a_schedule_depends_on(schedule: MergeSchedule) -> None:
    names = {c.__name__: c for c in (At, BeforeValidation, Every, Growing, Piecewise, When)}
    again = eval(repr(schedule), {**names, "powers_of_two": powers_of_two})
    assert merges_of(again, 200) == merges_of(schedule, 200) and repr(again) == repr(schedule)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError), ("10", TypeError), ({0: 5}, TypeError)],
)
def test_a_period_that_cannot_be_is_refused_with_rule_value_and_remedy(value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"merge_every must be .*received {value!r}.*Give .*merge_every="):
        as_schedule(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "kind", "shown"),
    [
        (lambda: At([]), ValueError, "none"),
        (lambda: At([3, 0]), ValueError, "0"),
        (lambda: At([2.0]), TypeError, "2.0"),  # type: ignore[list-item]
        (lambda: At([True]), TypeError, "True"),
        (lambda: At(5), TypeError, "5"),  # type: ignore[arg-type]
        (lambda: At("12"), TypeError, "'12'"),  # type: ignore[arg-type]
        (lambda: Piecewise([(0, 5)]), TypeError, r"\[\(0, 5\)\]"),  # type: ignore[arg-type]
        (lambda: Piecewise({}), ValueError, r"periods from \[\] on"),
        (lambda: Piecewise({10: 5, 20: 6}), ValueError, r"periods from \[10, 20\] on"),
        (lambda: Piecewise({0: 0}), ValueError, "0"),
        (lambda: Piecewise({0: 2.5}), TypeError, "2.5"),  # type: ignore[dict-item]
        (lambda: Piecewise({-1: 5, 0: 5}), ValueError, "-1"),
        (lambda: Piecewise({"0": 5}), TypeError, "'0'"),  # type: ignore[dict-item]
        (lambda: Growing(0, 2, 9), ValueError, "0"),
        (lambda: Growing(2, 0.5, 9), ValueError, "0.5"),
        (lambda: Growing(2, float("nan"), 9), ValueError, "nan"),
        (lambda: Growing(2, float("inf"), 9), ValueError, "inf"),
        (lambda: Growing(2, "2", 9), TypeError, "'2'"),  # type: ignore[arg-type]
        (lambda: Growing(2, True, 9), TypeError, "True"),
        (lambda: Growing(9, 2, 2), ValueError, "first=9, last=2"),
        (lambda: Growing(2, 2, 9.5), TypeError, "9.5"),  # type: ignore[arg-type]
        (lambda: Growing(2, 2, 9, -1), ValueError, "-1"),
        (lambda: BeforeValidation(0), ValueError, "0"),
        (lambda: BeforeValidation("all"), TypeError, "'all'"),  # type: ignore[arg-type]
        (lambda: as_schedule(Every), TypeError, "the class Every"),  # type: ignore[arg-type]
        (lambda: as_schedule(int), TypeError, "the class int"),  # type: ignore[arg-type]
        (lambda: as_schedule(lambda step: True), TypeError, "<function"),  # type: ignore[misc, arg-type]
        (lambda: as_schedule(lambda a, b, c: True), TypeError, "<function"),  # type: ignore[misc, arg-type]
        (lambda: as_schedule(lambda step, _: step % 10).due(3, 0), TypeError, "3"),  # type: ignore[arg-type, return-value]
        (lambda: as_schedule(lambda step, _: None).due(3, 0), TypeError, "None"),  # type: ignore[arg-type, return-value]
    ],
)
def test_other_values_that_cannot_be_are_refused_likewise(
    make: Callable[[], object], kind: type[Exception], shown: str
) -> None:
    with pytest.raises(kind, match=rf"must .*received .*{shown}.*(Give|Return|Make)\b"):
        make()


# ---- runs


def fit_in_part(
    folder: str, make: Callable[[], Any], at: int, hook: str = "on_train_batch_end", interval: int = 3, devices: int = 1
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int], list[int]]:
    """Fit for 3 epochs of 5 batches, each with one validation, and the same in two parts.

    Args:
        make: makes the schedule.
        at: optimizer steps done when the checkpoint is saved from which the second part goes on.
        hook: of the last callback, in which that is.
        interval: batches of an epoch until its validation.

    Returns:
        All there is at the end of both runs, the clock in the checkpoint, and after which steps the first run merged.
    """
    path = Path(folder, "part.ckpt")

    class Save(Callback):
        pass

    def save(_: Any, t: Trainer, *args: Any) -> None:
        if t.global_step == at and not path.exists():
            t.save_checkpoint(path)
            t.strategy.barrier()

    setattr(Save, hook, save)

    def fit(resume: Path | None = None) -> tuple[dict[str, Any], list[int]]:
        torch.manual_seed(7 if resume is None else 99)
        clocks = Recorder(lambda t, _: t.strategy.explorer.clock.last_merge)
        strategy = LTEStrategy(2 * devices, make(), rank=RANK, execution="batched")
        callbacks = [clocks, *([] if resume else [Save()])]
        t = trainer(
            strategy,
            devices=devices,
            max_epochs=3,
            val_check_interval=interval,
            use_distributed_sampler=False,
            callbacks=callbacks,
        )
        module = Module(make_net(), adamw)
        # All batches of a device are alike, as Lightning starts the loader anew when it goes on within an epoch.
        x, y = (part.repeat(5, *[1] * (part.dim() - 1)) for part in make_data(16, seed=1 + t.global_rank))
        data = DataLoader(TensorDataset(x, y), 16)
        t.fit(module, data, loader(16), ckpt_path=resume)
        state = kept(t)
        # A validation draws random numbers, and Lightning leaves out one that was due when the checkpoint was saved.
        state.pop("generators", None)
        return {"after": clone(module.state_dict()), "lte": state}, sorted({*clocks.seen} - {0})

    whole, merged = fit()
    resumed, _ = fit(path)
    saved = torch.load(path, weights_only=True)["lte"]["clocks"][0]
    return whole, resumed, {key: saved[key] for key in ("step", "last_merge")}, merged


@pytest.mark.parametrize(
    ("make", "at", "last", "merged"),
    [
        (lambda: Every(3), 7, 6, [3, 6, 9, 12, 15]),
        (lambda: At([2, 7, 8, 13]), 6, 2, [2, 7, 8, 13]),
        (lambda: Piecewise({0: 2, 7: 4}), 8, 6, [2, 4, 6, 10, 14]),
        (lambda: Growing(1, 1.6, 6), 8, 6, [1, 3, 6, 11]),
        (lambda: powers_of_two, 7, 4, [1, 2, 4, 8]),
        (BeforeValidation, 6, 3, [3, 8, 13]),
        (lambda: BeforeValidation(also=4), 11, 8, [3, 7, 8, 12, 13]),
    ],
    ids=["every", "at", "piecewise", "growing", "function", "validation", "validation-and-besides"],
)
def test_a_run_with_any_schedule_goes_on_in_the_middle_of_a_period_as_if_not_stopped(
    tmp_path: Path, make: Callable[[], Any], at: int, last: int, merged: list[int]
) -> None:
    whole, resumed, saved, seen = fit_in_part(str(tmp_path), make, at)
    assert saved == {"step": at, "last_merge": last} and seen == merged
    assert_equal(whole, resumed)


@pytest.mark.parametrize("interval", [3, 5])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_end",  # Lightning does not make up for the validation after that batch
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
    ],
)
def test_a_run_that_merges_before_validations_goes_on_exactly_wherever_it_was_saved(
    tmp_path: Path, hook: str, interval: int
) -> None:
    at = 10 if hook == "on_train_epoch_end" else 5 + interval
    whole, resumed, saved, _ = fit_in_part(str(tmp_path), lambda: BeforeValidation(also=4), at, hook, interval)
    assert saved["step"] == at and (saved["last_merge"] == at or (interval == 3 and at == 10))
    assert_equal(whole, resumed)
