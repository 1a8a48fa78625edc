"""Dealing batches out loses no sample and mixes none."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_lte import batch as batches

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: torch.Tensor
    names: list[str]


def numbers(n: int) -> torch.Tensor:
    return torch.arange(n)


@pytest.mark.parametrize(
    "batch",
    [
        numbers(6),
        (numbers(6), torch.zeros(6, 3)),
        [numbers(6), 3.5, None],
        {"x": numbers(6), "nested": {"y": [torch.zeros(6, 2, 2)]}, "mode": "train"},
        OrderedDict(x=numbers(6)),
        Pair(numbers(6), torch.ones(6)),
        Record(numbers(6), list("abcdef")),
        (numbers(6), torch.tensor(1.0)),
    ],
)
def test_structures_are_measured_and_kept(batch: Any) -> None:
    assert batches.size(batch) == 6
    parts = batches.split(batch, 3)
    assert len(parts) == 3 and all(type(part) is type(batch) and batches.size(part) == 2 for part in parts)


@pytest.mark.parametrize(
    "batch", [3, "text", [], {"x": numbers(6), "y": numbers(5)}, (numbers(6), object()), [torch.tensor(1.0)]]
)
def test_what_can_not_be_measured_is_refused_with_the_remedy(batch: Any) -> None:
    with pytest.raises(ValueError, match="one head per device"):
        batches.size(batch)
    assert batches.is_even(batch, 4)


@given(samples=st.integers(1, 40), count=st.integers(1, 9))
def test_every_sample_is_used_in_order_and_no_head_goes_without(samples: int, count: int) -> None:
    parts = batches.split(numbers(samples), count)
    assert len(parts) == count
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    dealt = torch.cat(parts).tolist()
    assert dealt[:samples] == list(range(samples)) and len(dealt) == max(samples, count)


@given(samples=st.integers(1, 40), count=st.integers(1, 9))
def test_filling_up_repeats_from_the_start(samples: int, count: int) -> None:
    filled = batches.filled_up(numbers(samples), count).tolist()
    assert len(filled) % count == 0 and len(filled) - samples < count
    assert filled[:samples] == list(range(samples))


def test_strings_are_dealt_out_with_their_samples() -> None:
    first, second = batches.split({"x": numbers(4), "text": ["a", "b", "c", "d"]}, 2)
    assert first["text"] == ["a", "b"] and second["text"] == ["c", "d"]
