"""Watching weights through the first steps: checksums, and what it takes in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lte import Explorer, LTEConfig, trial
from lightning_lte.trial import checksum
from tests.allocations import peak

# Its weights are so large that all else is small beside one of them.
WIDTH = 1024
WEIGHT = 4 * WIDTH**2


def literal_checksum(weight: Tensor) -> int:
    """Every number's bits, times its row and its column, counted from 1."""
    bits = {4: torch.int32, 8: torch.int64}[weight.element_size()]
    rows = weight.reshape(len(weight), -1).contiguous().view(bits).tolist()
    total = sum((i + j) * value for i, row in enumerate(rows, 1) for j, value in enumerate(row, 1))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("piece", [1, 10, 25, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checksum_is_the_same_in_pieces(piece: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PIECE", piece)
    torch.manual_seed(0)
    convolution = torch.randn(6, 3, 2, 2, dtype=dtype)
    last = convolution.to(memory_format=torch.channels_last)
    for weight in (torch.randn(7, dtype=dtype), torch.randn(9, 4, dtype=dtype).T, convolution, last):
        assert int(checksum(weight)) == literal_checksum(weight)
    assert int(checksum(last)) == int(checksum(convolution))
    assert int(checksum(torch.zeros(0, 3, dtype=dtype))) == 0
    scalar = torch.tensor(2.0, dtype=dtype)
    assert int(checksum(scalar)) == literal_checksum(scalar.reshape(1, 1))


def test_a_checksum_tells_places_apart_within_pieces_and_across(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PIECE", 8)  # two rows
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    rows = [[1, 0, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5], [5, 1, 2, 3, 4, 0]]
    other = weight.clone()
    other[3, 2] *= -1
    changed = [*(weight[order] for order in rows), weight[:, [0, 2, 1, 3]], other]
    assert len({int(checksum(w)) for w in [weight, *changed]}) == 1 + len(changed)


def test_a_checksum_takes_a_small_piece_of_memory(tmp_path: Path) -> None:
    weight = torch.randn(WIDTH, WIDTH)
    assert peak(lambda: checksum(weight), tmp_path) < WEIGHT / 2


def test_first_steps_and_merges_take_no_more_than_one_weight_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    explorer = Explorer(net, optimizer, LTEConfig(1, 100, rank=4))
    x = torch.randn(2, WIDTH)

    def backward(loss: Tensor) -> None:
        with explorer.backward():
            loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        explorer.step()

    for watched in (True, True, False):
        with explorer.heads():
            loss = net(x).square().mean()
        # The whole gradient of one weight, while it is watched.
        assert peak(lambda loss=loss: backward(loss), tmp_path) < (1.5 if watched else 0.5) * WEIGHT
        assert peak(explorer.after_backward, tmp_path) < WEIGHT / 2
        assert peak(step, tmp_path) < WEIGHT / 2
    # The sum of deltas, and their mean.
    assert WEIGHT < peak(explorer.merge, tmp_path) < 2.5 * WEIGHT
