from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lte.schedule import Every, MergeSchedule, as_schedule


@given(st.integers(1, 50), st.integers(0, 200))
def test_every_merges_at_the_multiples_of_the_period(period: int, steps: int) -> None:
    schedule, last_merge, merged = Every(period), 0, []
    for step in range(1, steps + 1):
        if schedule.due(step, last_merge):
            last_merge = step
            merged.append(step)
    assert merged == list(range(period, steps + 1, period))


@given(st.integers(1, 50), st.integers(0, 100), st.integers(0, 100))
def test_a_merge_out_of_turn_starts_a_whole_period(period: int, last_merge: int, passed: int) -> None:
    assert Every(period).due(last_merge + passed, last_merge) == (passed >= period)


def test_the_answer_depends_on_the_arguments_alone() -> None:
    schedule = Every(3)
    assert [schedule.due(3, 0) for _ in range(3)] == [True] * 3
    assert not schedule.due(2, 0)


def test_a_number_becomes_a_schedule_and_a_schedule_stays_the_same_object() -> None:
    class Never(MergeSchedule):
        def due(self, step: int, last_merge: int) -> bool:
            return False

    never = Never()
    assert as_schedule(never) is never
    assert repr(as_schedule(7)) == "Every(7)"


@pytest.mark.parametrize(
    ("value", "kind"), [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError), ("10", TypeError)]
)
def test_a_period_that_cannot_be_is_refused_with_rule_value_and_remedy(value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"merge_every must be .*received {value!r}.*Give .*merge_every="):
        as_schedule(value)  # type: ignore[arg-type]
