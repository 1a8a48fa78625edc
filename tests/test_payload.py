"""What merges send: fewer bytes, and nothing that gets lost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lte.merge import Merge
from lightning_lte.payload import is_dense
from lightning_lte.running_statistics import RunningStatistics
from lightning_lte.transport import Transport
from tests.processes import run
from tests.test_merge import HEADS, config, learn, made, merge_all, weights


def merges_on_wire(choices: dict[str, Any], rounds: int, exactly: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """After every merge: W, what W will be once all that rounding took is merged, and the bytes.

    Those whose numbers are in `exactly` are in full precision, as merges by hand are.
    """
    transport = Transport(dist.get_world_size(), dist.get_rank())
    chosen = config(**choices)
    injection = made(chosen, torch.float32, transport)
    seen = []
    for merges in range(rounds):
        learn(injection, seed=merges)
        exact = merges in exactly
        record = merge_all(injection, chosen, transport, step=merges + 1, merges=merges, exact=exact)
        due: dict[str, Tensor] = {}
        for f in injection.factors.values():
            left = f.summed_delta(torch.ones(f.count, dtype=torch.bool))
            left = left if f.error is None else left + f.error
            transport.sum_([left])
            due[f.name] = f.weight.detach() + left / HEADS
        seen.append({"W": weights(injection), "due": due, "bytes": record.bytes_sent})
    return seen


@pytest.mark.parametrize(
    "choices",
    [
        {"wire": "int8", "payload": "dense"},
        {"wire": "int8", "payload": "factors"},
        {"wire": "bfloat16", "payload": "factors"},
    ],
    ids=str,
)
def test_what_rounding_takes_comes_with_the_next_merge(choices: dict[str, Any]) -> None:
    rounds = 12
    [exact] = run(merges_on_wire, 1, {}, rounds)
    results = run(merges_on_wire, 2, choices, rounds)
    off = []
    for own, other, expected in zip(*results, exact, strict=True):
        for name, W in own["W"].items():
            assert torch.equal(W, other["W"][name])
            torch.testing.assert_close(own["due"][name], expected["W"][name], rtol=1e-4, atol=1e-4)
        off.append(max(float((W - expected["W"][n]).abs().max()) for n, W in own["W"].items()))
    # Rounding shows, and it does not add up: a merge is off by a part of its own step, not of all steps so far.
    assert off[0] > 0
    moved = [max(float((b["W"][n] - a["W"][n]).abs().max()) for n in a["W"]) for a, b in pairwise(exact)]
    assert max(o / m for o, m in zip(off[1:], moved, strict=True)) < 0.1


@pytest.mark.parametrize("wire", ["int8", "bfloat16"])
def test_nothing_is_lost_after_a_merge_in_full_precision(wire: str) -> None:
    """Anchors are what the wire can't hold then."""
    rounds = 8
    [exact] = run(merges_on_wire, 1, {}, rounds)
    results = run(merges_on_wire, 2, {"wire": wire, "payload": "factors"}, rounds, (2, 3, 5))
    for own, other, expected in zip(*results, exact, strict=True):
        for name, W in own["W"].items():
            assert torch.equal(W, other["W"][name])
            torch.testing.assert_close(own["due"][name], expected["W"][name], rtol=1e-4, atol=1e-4)
    sent = [own["bytes"] for own in results[0]]
    assert sent[7] == sent[1] < sent[4]  # anchors travel in full once, after they were not rounded


def test_dense_sums_in_bfloat16_are_off_by_its_rounding() -> None:
    [exact] = run(merges_on_wire, 1, {}, 3)
    for own in run(merges_on_wire, 2, {"wire": "bfloat16", "payload": "dense"}, 3):
        for seen, expected in zip(own, exact, strict=True):
            for name, W in seen["W"].items():
                torch.testing.assert_close(W, expected["W"][name], rtol=0.05, atol=0.05)


def test_fewer_bits_are_fewer_bytes() -> None:
    sent = {}
    for wire in ("float32", "bfloat16", "int8"):
        for payload in ("dense", "factors", "auto"):
            sent[wire, payload] = run(merges_on_wire, 2, {"wire": wire, "payload": payload}, 1)[0][0]["bytes"]
        assert sent[wire, "auto"] <= min(sent[wire, "dense"], sent[wire, "factors"])
    for payload in ("dense", "factors", "auto"):
        assert sent["int8", payload] < sent["bfloat16", payload] < sent["float32", payload]


def test_a_reset_sends_dense_deltas_where_factors_would_be_rounded() -> None:
    injection = made(config(after_merge="reset"))
    for f in injection.factors.values():
        assert is_dense(f, 2, "int8") and is_dense(f, 2, "bfloat16", "factors")
        assert not is_dense(f, 2, "float32", "factors")


def on_the_way(choices: dict[str, Any]) -> dict[str, Tensor]:
    """Factors change between the start of a merge and its exchange."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    chosen = config(**choices)
    injection = made(chosen, torch.float32, transport)
    learn(injection, seed=0)
    factors = list(injection.factors.values())
    statistics = RunningStatistics(injection.module)
    travelling = Merge(factors, injection.replicas, statistics, transport, chosen, step=1, merges=0)
    travelling.start({})
    learn(injection, seed=1)
    travelling.exchange()
    learn(injection, seed=2)
    travelling.land({})
    return weights(injection)


@pytest.mark.parametrize("payload", ["dense", "factors"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_a_merge_on_its_way_has_what_heads_had_at_its_start(wire: str, payload: str) -> None:
    choices = {"wire": wire, "payload": payload}
    for travelled, at_once in zip(run(on_the_way, 2, choices), run(merges_on_wire, 2, choices, 1), strict=True):
        torch.testing.assert_close(travelled, at_once[0]["W"], rtol=0, atol=0)
