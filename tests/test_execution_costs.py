"""The benchmarks run, and what they count is what is required. Times are theirs alone: no test depends on any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.execution import Row, main, table
from lightning_lte import Explorer, LTEConfig
from lightning_lte.batch import Layout
from lightning_lte.execution import decide
from tests.modules import RANK, adamw
from tests.test_proof import (
    WIDTH,
    Attention,
    Deep,
    Flat,
    Mixing,
    Normed,
    Pooled,
    Positions,
    Shared,
    TimeFirst,
    TwoViews,
    images,
)


class Failing(nn.Module):
    """Refuses a whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ValueError("too many samples")
        return x


@pytest.mark.parametrize(
    ("body", "tokens", "execution", "passes"),
    [
        (Attention, 8, "batched", 2),
        (Shared, 8, "batched", 2),
        (Positions, 8, "batched", 2),
        (TimeFirst, 8, "sequential", 2),
        (TimeFirst, 9, "sequential", 2),  # which 4 heads don't divide
        (Mixing, 8, "sequential", 2),
        (Flat, 8, "sequential", 2),
        (TwoViews, 8, "sequential", 2),
        (Normed, 8, "sequential", 0),
        (Failing, 8, "sequential", 1),
    ],
)
def test_the_proof_sends_each_sample_twice_through_the_model_at_most(
    body: type[nn.Module], tokens: int, execution: str, passes: int
) -> None:
    """Whatever it finds, and counted where the samples come in."""
    x, y = images()
    x = torch.cat([x, x], 1)[:, :tokens]
    net = Pooled(Deep(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), body())))  # type: ignore[arg-type]
    explorer = Explorer(net, adamw(net.parameters()), LTEConfig(4, rank=RANK))
    samples: list[int] = []
    first = net.body.body[0]  # type: ignore[index, union-attr]
    first.register_forward_pre_hook(lambda _, args: samples.append(len(args[0])))
    decide(explorer, lambda own: cross_entropy(net(own[0]), own[1]), (x, y), Layout((x, y)).split((x, y), 4))
    assert explorer.execution == execution
    assert sum(samples) == passes * len(x)


def test_the_benchmark_of_execution_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["test_vit", "test_resnet"]  # timm's own for tests
    rows = main(["--models", *names, "--batch", "4", "--heads", "2", "--rounds", "2", "--threads", "1"])
    printed = capsys.readouterr().out
    assert table(rows) in printed and "seed 0" in printed and f"torch {torch.__version__}" in printed
    assert [{row.what.partition(":")[0] for row in rows if row.model == name} for name in names] == [
        {"sequential", "batched", "a merge / full rank's whole step", "proof"},
        {"sequential", "a merge / full rank's whole step", "proof"},  # it has batch norm
    ]
    assert all(len(row.ratios) == 2 and row.heads == 2 for row in rows)
    passes = [row for row in rows if row.what == "proof: samples through the model / batch"]
    assert [row.ratios for row in passes] == [[2.0, 2.0], [0.0, 0.0]]
    assert all(row.limit is not None and row.median <= row.limit for row in passes)


def test_batches_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--batch", "6", "--heads", "2", "4"])


def test_a_row_has_median_and_quartiles_of_its_rounds() -> None:
    row = Row("model", 4, "proof: time / full rank's forward", [3.0, 1.0, 2.0, 5.0, 4.0])
    assert (row.median, row.quartiles, row.limit) == (3.0, (2.0, 4.0), None)
    assert Row("model", 4, "sequential: forward + backward / ...", [1.5]).quartiles == (1.5, 1.5)
    assert table([row]).endswith("| model | 4 | proof: time / full rank's forward | 3.00 | 2.00 to 4.00 |  |")
