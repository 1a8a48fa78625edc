"""Rows that are read when they are asked for: the same as those of a tensor."""

from __future__ import annotations

import pytest
import torch

from lightning_lte.checkpoint import rows_for
from lightning_lte.rows import Rows

COUNTS = (2, 1, 3)


def parts(read: list[int]) -> tuple[Rows, torch.Tensor]:
    whole = torch.arange(12).view(6, 2)

    def reader(device: int) -> torch.Tensor:
        read.append(device)
        return whole.split(COUNTS)[device]

    return Rows([(count, lambda device=device: reader(device)) for device, count in enumerate(COUNTS)]), whole


@pytest.mark.parametrize(
    ("chosen", "devices"),
    [
        (slice(None), [0, 1, 2]),
        (slice(0, 2), [0]),
        (slice(1, 3), [0, 1]),
        (slice(2, 3), [1]),
        (slice(4, 6), [2]),
        (slice(1, 5), [0, 1, 2]),
        (3, [2]),
        (0, [0]),
    ],
)
def test_rows_are_those_of_the_whole_and_only_their_devices_are_read(chosen: int | slice, devices: list[int]) -> None:
    read: list[int] = []
    rows, whole = parts(read)
    assert len(rows) == 6 and not read
    assert torch.equal(rows[chosen], whole[chosen]) and read == devices
    assert rows.dim() == 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("heads", [6, 12])
def test_each_device_gets_the_same_rows_as_from_a_tensor(world_size: int, heads: int) -> None:
    rows, whole = parts([])
    expanded = whole.repeat_interleave(heads // 6, dim=0)
    for rank in range(world_size):
        expected = expanded.tensor_split(world_size)[rank]
        assert torch.equal(rows_for(rows, heads, world_size, rank, heads // world_size), expected)
        assert torch.equal(rows_for(whole, heads, world_size, rank, heads // world_size), expected)
