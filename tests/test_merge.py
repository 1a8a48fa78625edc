from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_lte import Explorer, payload
from lightning_lte.config import LTEConfig
from lightning_lte.heads import Factors
from lightning_lte.injection import Injection, inject
from lightning_lte.merge import Merge, MergeRecord
from lightning_lte.payload import is_dense
from lightning_lte.running_statistics import RunningStatistics
from lightning_lte.transport import Transport
from tests.processes import run

HEADS, RANK, SCALE = 4, 2, 1.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.gain = nn.Parameter(torch.ones(()))
        self.two = nn.Linear(9, 6, bias=False)


def config(**choices: Any) -> LTEConfig:
    return LTEConfig(heads=HEADS, rank=RANK, alpha=SCALE * RANK, **choices)


def made(chosen: LTEConfig, dtype: torch.dtype = torch.float64, transport: Transport | None = None) -> Injection:
    transport = transport or Transport()
    torch.manual_seed(0)
    model = Net().to(dtype)
    count = chosen.heads // transport.world_size
    return inject(model, set(model.parameters()), chosen, count=count, first=transport.rank * count)


def learn(injection: Injection, seed: int) -> None:
    """Move every head's factors and replicas, a head by its number wherever it sits."""

    def step(name: str, head: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * head + len(name))
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        first = next(iter(injection.factors.values())).first
        for f in injection.factors.values():
            for i in range(f.count):
                f.A[i] += step(f"{f.name}.A", first + i, f.A[i])
                f.B[i] += step(f"{f.name}.long.B", first + i, f.B[i])
        for replica in injection.replicas:
            if replica.stack is None:
                replica.param += step(replica.name, first, replica.param)
            else:
                for i, own in enumerate(replica.stack):
                    own += step(replica.name, first + i, own)


def merge_all(
    injection: Injection, chosen: LTEConfig, transport: Transport, states: Any = None, **more: Any
) -> MergeRecord:
    factors = list(injection.factors.values())
    statistics = RunningStatistics(injection.module)
    return Merge(factors, injection.replicas, statistics, transport, chosen, **more).run(states or {})


def merged(
    injection: Injection, chosen: LTEConfig, *optimizers: Optimizer, merges: int = 0, **more: Any
) -> MergeRecord:
    states = {p: s for opt in optimizers for p, s in opt.state.items()}
    return merge_all(injection, chosen, Transport(), states, step=10 * (merges + 1), merges=merges, **more)


def weights(injection: Injection) -> dict[str, Tensor]:
    return {f.name: f.weight.detach().clone() for f in injection.factors.values()}


def literal_deltas(f: Factors) -> list[Tensor]:
    """s (B A - B' A') of each local head."""
    products = [f.B[h].detach() @ f.A[h].detach() for h in range(f.count)]
    if f.anchor_A is not None and f.anchor_B is not None:
        products = [p - f.anchor_B[h] @ f.anchor_A[h] for h, p in enumerate(products)]
    return [f.scale * p for p in products]


@pytest.mark.parametrize(
    "choices", [{}, {"after_merge": "reset"}, {"after_merge": "reset", "reset_a": "redraw"}], ids=str
)
def test_merges_add_the_mean_delta_and_bring_every_head_back_to_the_base_weight(choices: dict[str, Any]) -> None:
    chosen = config(**choices)
    injection = made(chosen)
    expected = weights(injection)
    for merges in range(3):
        learn(injection, seed=merges)
        for f in injection.factors.values():
            expected[f.name] += sum(literal_deltas(f)) / HEADS
        before = {f.name: f.A.detach().clone() for f in injection.factors.values()}
        record = merged(injection, chosen, merges=merges)
        assert (record.step, record.merges, record.restarted) == (10 * (merges + 1), merges + 1, ())
        torch.testing.assert_close(weights(injection), expected)
        for f in injection.factors.values():
            for head in range(HEADS):
                torch.testing.assert_close(f.effective(head), f.weight.detach(), rtol=0, atol=0)
            assert torch.equal(f.A, before[f.name]) == (chosen.reset_a == "keep")
            assert f.B.any() == (chosen.after_merge == "keep")
            if chosen.reset_a == "redraw":
                assert torch.equal(f.A, f.draw(merges=merges + 1).to(f.A))


def test_keep_telescopes_to_the_factors_as_they_are_now() -> None:
    chosen = config()
    injection = made(chosen)
    start = weights(injection)
    for merges in range(5):
        learn(injection, seed=merges)
        merged(injection, chosen, merges=merges)
    for f in injection.factors.values():
        expected = start[f.name] + SCALE / HEADS * sum(f.B[h].detach() @ f.A[h].detach() for h in range(HEADS))
        torch.testing.assert_close(f.weight.detach(), expected)


def test_products_are_averaged_and_never_factors() -> None:
    chosen = config()
    injection = made(chosen)
    start = weights(injection)
    learn(injection, seed=0)
    merged(injection, chosen)
    for f in injection.factors.values():
        of_means = start[f.name] + SCALE * f.B.detach().mean(0) @ f.A.detach().mean(0)
        assert not torch.allclose(f.weight, of_means, atol=0.1)


@pytest.mark.parametrize("where", ["A", "B", "replica"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_a_head_that_is_not_finite_is_left_out_and_starts_from_the_base_weight(
    where: str, value: float, after_merge: Any
) -> None:
    chosen, bad = config(after_merge=after_merge), 2
    injection = made(chosen)
    start = weights(injection)
    learn(injection, seed=0)
    for f in injection.factors.values():
        good = [d for head, d in enumerate(literal_deltas(f)) if head != bad]
        start[f.name] += sum(good) / (HEADS - 1)
    f = next(iter(injection.factors.values()))
    replica = next(r for r in injection.replicas if r.stack is not None)
    assert replica.stack is not None
    mean = replica.stack.detach()[[0, 1, 3]].mean(0)
    with torch.no_grad():
        {"A": f.A, "B": f.B, "replica": replica.stack}[where][bad].view(-1)[0] = value

    record = merged(injection, chosen)
    assert record.restarted == (bad,)
    assert record.delta_norm is not None and record.disagreement is not None and record.delta_norm < 1e3
    torch.testing.assert_close(weights(injection), start)
    for f in injection.factors.values():
        assert torch.equal(f.A[bad], f.draw(merges=1).to(f.A)[bad]) and not f.B[bad].any()
        torch.testing.assert_close(f.effective(bad), f.weight.detach())
        assert bool(f.finite().all())
    torch.testing.assert_close(replica.stack.detach(), mean.expand(HEADS, *mean.shape))
    learn(injection, seed=1)
    assert merged(injection, chosen, merges=1).restarted == ()


def test_moments_of_a_restarted_head_are_zeroed_and_those_of_the_others_kept() -> None:
    chosen = config()
    injection = made(chosen)
    f, other = injection.factors.values()
    stack, gain = (next(r for r in injection.replicas if r.name == name) for name in ("one.bias", "gain"))
    optimizer = AdamW([f.A, f.B, other.A, other.B, stack.trained, gain.trained])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
            if p.dim() and len(p) == HEADS:
                p.grad[1] = torch.nan
    gain.trained.grad = torch.tensor(torch.nan, dtype=torch.float64)
    optimizer.step()
    with torch.no_grad():
        gain.param.fill_(1.0)  # else no head of the device would be finite
    assert merged(injection, chosen, optimizer).restarted == (1,)
    for p in (f.A, f.B, stack.trained):
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = [bool((m != 0).all()) for m in optimizer.state[p][moment]]
            assert kept == [True, False, True, True] and not optimizer.state[p][moment][1].any()
    state = optimizer.state[gain.trained]
    assert (state["exp_avg"], state["exp_avg_sq"], state["step"]) == (0, 0, 1)


def test_where_no_head_is_finite_the_merge_is_refused_and_nothing_changes() -> None:
    chosen = config()
    injection = made(chosen)
    learn(injection, seed=0)
    with torch.no_grad():
        for head, f in zip(range(HEADS), [*injection.factors.values()] * HEADS, strict=False):
            f.B[head, 0, 0] = torch.nan
    held = [*injection.module.parameters(), *(t for f in injection.factors.values() for t in (f.A, f.B))]
    before = [t.detach().clone() for t in held]
    with pytest.raises(FloatingPointError, match=r"after step 10 no head of 4 .*Lower the learning rate"):
        merged(injection, chosen)
    for tensor, then in zip(held, before, strict=True):
        torch.testing.assert_close(tensor.detach(), then, rtol=0, atol=0, equal_nan=True)


@given(
    out=st.integers(1, 300),
    into=st.integers(1, 300),
    rank=st.integers(1, 24),
    count=st.integers(1, 4),
    world=st.integers(2, 64),
    keep=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_payload_with_fewer_bytes_is_chosen(
    out: int, into: int, rank: int, count: int, world: int, keep: bool, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(torch.zeros(out, into, dtype=dtype))
    f = Factors("w", weight, rank=min(rank, into), scale=1, count=count, first=0, seed=0, init="kaiming", keep=keep)
    dense = Fraction(2 * (world - 1) * f.summed_delta(torch.ones(count, dtype=torch.bool)).nbytes, world)
    factors = (world - 1) * sum(t.nbytes for t in f.current())
    assert is_dense(f, world) == (dense <= factors)


def with_moments(injection: Injection) -> Optimizer:
    """An optimizer whose moments on the factors are 1, 2, 3 ... along each head."""
    factors = [p for f in injection.factors.values() for p in (f.A, f.B)]
    optimizer = SGD(factors, lr=0.1, momentum=0.9)
    for p in factors:
        rising = torch.arange(1, p[0].numel() + 1, dtype=p.dtype).view_as(p[0])
        optimizer.state[p]["momentum_buffer"] = torch.stack([rising * (-1) ** head for head in range(HEADS)])
    return optimizer


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9, 1.0])
def test_a_reset_zeroes_the_smallest_moments_of_each_head(fraction: float) -> None:
    chosen = config(after_merge="reset", reset_moments=fraction)
    injection = made(chosen)
    learn(injection, seed=0)
    optimizer = with_moments(injection)
    merged(injection, chosen, optimizer)
    for state in optimizer.state.values():
        for own in state["momentum_buffer"].flatten(1).abs():
            gone = round(fraction * len(own))
            assert own.tolist() == [0] * gone + list(range(gone + 1, len(own) + 1))


def _train_step(explorer: Explorer, net: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    with explorer.heads():
        loss = (net(x) - x[:, :5]).square().mean()
    loss.backward()
    explorer.after_backward()
    optimizer.step()
    optimizer.zero_grad()
    explorer.step()


def test_a_reset_of_some_moments_leaves_steps_of_a_bounded_size() -> None:
    """With Adam, an element with a first moment and no second one would jump."""
    for fraction in (0.0, 0.3, 0.9, 1.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))
        before = net[0].weight.detach().clone()
        optimizer = AdamW(net.parameters(), lr=1e-3)
        chosen = LTEConfig(1, 5, rank=2, after_merge="reset", reset_moments=fraction)
        explorer = Explorer(net, optimizer, chosen)
        for step in range(30):
            _train_step(explorer, net, optimizer, torch.randn(8, 9, generator=torch.Generator().manual_seed(step)))
        explorer.finish()
        assert (net[0].weight - before).abs().max() < 0.3


def test_an_interrupted_merge_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5)).double()
        optimizer = AdamW(net.parameters(), lr=1e-2)
        explorer = Explorer(net, optimizer, LTEConfig(1, 50, rank=2))
        for step in range(5):
            x = torch.randn(8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            _train_step(explorer, net, optimizer, x)
        if interrupted:
            with monkeypatch.context() as patch:
                patch.setattr(Factors, "settle", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    explorer.merge()
        explorer.finish()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_autocast_takes_nothing_from_a_merge() -> None:
    """In manual optimization steps, and merges with them, come inside of it."""
    ends = []
    for enabled in (False, True):
        chosen = config()
        injection = made(chosen, torch.float32)
        learn(injection, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            record = merged(injection, chosen)
        ends.append((weights(injection), record.delta_norm, record.disagreement))
    assert ends[0][1:] == ends[1][1:]
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)


def test_keep_leaves_moments_alone() -> None:
    chosen = config()
    injection = made(chosen)
    learn(injection, seed=0)
    optimizer = with_moments(injection)
    before = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    merged(injection, chosen, optimizer)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in before.items())


def test_the_record_measures_what_was_added_and_how_far_heads_differ() -> None:
    chosen = config()
    injection = made(chosen)
    learn(injection, seed=0)
    learned = {f.name: literal_deltas(f) for f in injection.factors.values()}
    start = weights(injection)
    record = merged(injection, chosen)
    added = torch.cat([(w - start[name]).flatten() for name, w in weights(injection).items()])
    assert record.delta_norm == pytest.approx(float(added.norm()))
    squares = sum(float(d.square().sum()) for deltas in learned.values() for d in deltas) / HEADS
    assert record.disagreement == pytest.approx((squares / float(added.square().sum()) - 1) ** 0.5)
    assert record.bytes_sent == 0 and record.time_s > 0


def test_disagreement_is_0_for_equal_heads_and_the_largest_for_orthogonal_ones() -> None:
    chosen = config()
    for expected in (0.0, (HEADS - 1) ** 0.5):
        injection = made(chosen)
        with torch.no_grad():
            for f in injection.factors.values():
                f.A.zero_()
                for head in range(HEADS):
                    f.A[head, 0, head if expected else 0] = 1
                    f.B[head, :, 0] = 1
                assert f.anchor_A is not None
                f.anchor_A.zero_()
        assert merged(injection, chosen).disagreement == pytest.approx(expected, abs=1e-6)


def test_a_merge_of_nothing_has_no_disagreement_and_one_unmeasured_no_norm() -> None:
    chosen = config()
    injection = made(chosen)
    nothing = merged(injection, chosen)
    assert nothing.delta_norm == 0 and nothing.disagreement is None
    learn(injection, seed=0)
    unmeasured = merged(injection, chosen, measure=False)
    assert unmeasured.delta_norm is None and unmeasured.disagreement is None


@pytest.mark.parametrize("policy", ["merge", "step", "freeze"])
def test_replicas_are_averaged_at_merges_by_the_policy_merge_alone(policy: Any) -> None:
    chosen = config(replicas=policy)
    injection = made(chosen)
    learn(injection, seed=0)
    before = {r.name: r.copies.clone() for r in injection.replicas}
    merged(injection, chosen)
    for replica in injection.replicas:
        expected = before[replica.name]
        if policy == "merge":
            expected = expected.mean(0, keepdim=True).expand_as(expected)
            torch.testing.assert_close(replica.param.detach(), expected[0])
        torch.testing.assert_close(replica.copies, expected)


def test_in_half_precision_what_the_weight_cannot_hold_is_carried_to_the_next_merge() -> None:
    chosen = config()
    injection = made(chosen, torch.bfloat16)
    wide = {name: w.float() for name, w in weights(injection).items()}
    for merges in range(20):
        with torch.no_grad():
            for f in injection.factors.values():
                f.A.fill_(2**-6)
                f.B += 2**-6  # each delta is a small part of what W can tell apart
        for f in injection.factors.values():
            wide[f.name] += f.summed_delta(torch.ones(HEADS, dtype=torch.bool)) / HEADS
        merged(injection, chosen, merges=merges)
    for f in injection.factors.values():
        assert f.remainder is not None
        torch.testing.assert_close(f.weight.detach().float() + f.remainder, wide[f.name], rtol=0, atol=1e-5)


def on_devices(after_merge: Any, bad: tuple[int, ...], dense: bool | None) -> dict[str, Any]:
    """Three merges of the same four heads, however many processes they are spread over."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    if dense is not None:
        payload.is_dense = lambda *_: dense
    chosen = config(after_merge=after_merge)
    injection = made(chosen, transport=transport)
    records = []
    for merges in range(3):
        learn(injection, seed=merges)
        if merges == 1:
            for f in injection.factors.values():
                for head in bad:
                    if f.first <= head < f.first + f.count:
                        with torch.no_grad():
                            f.B[head - f.first] = torch.nan
        records.append(
            merge_all(
                injection,
                chosen,
                transport,
                step=merges,
                merges=merges,
            )
        )
    shared = {r.name for r in injection.replicas if r.stack is None}
    return {
        "W": {name: p.detach() for name, p in injection.module.named_parameters() if name not in shared},
        "restarted": [r.restarted for r in records],
        "measured": [(r.delta_norm, r.disagreement) for r in records],
        "bytes": sum(r.bytes_sent for r in records),
    }


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("bad", [(), (2,), (2, 3)], ids=str)
def test_the_base_weights_do_not_depend_on_where_heads_sit_or_what_is_sent(
    after_merge: Any, bad: tuple[int, ...]
) -> None:
    [alone] = run(on_devices, 1, after_merge, bad, None)
    assert alone["restarted"] == [(), bad, ()]
    sent = {}
    for dense in (True, False, None):
        results = run(on_devices, 2, after_merge, bad, dense)
        for result in results:
            for name, W in result["W"].items():
                assert torch.equal(W, results[0]["W"][name])
                if name in alone["W"]:
                    torch.testing.assert_close(W, alone["W"][name])
            assert result["restarted"] == alone["restarted"]
            torch.testing.assert_close(torch.tensor(result["measured"]), torch.tensor(alone["measured"]))
        sent[dense] = results[0]["bytes"]
    assert sent[None] <= min(sent[True], sent[False])


def with_statistics_that_are_assigned() -> list[float]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    norm = nn.BatchNorm1d(2)
    statistics = RunningStatistics(norm)
    norm.running_mean = torch.full_like(norm.running_mean, transport.rank)
    statistics.take(transport, apart=False)
    statistics.exchange(transport)
    statistics.land()
    return norm.running_mean.tolist()


def test_running_statistics_that_are_assigned_are_averaged_over_the_devices() -> None:
    assert run(with_statistics_that_are_assigned, 2) == [[0.5, 0.5]] * 2


def with_statistics(bad: bool) -> tuple[list[float], list[float]]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    chosen = config()
    injection = made(chosen, transport=transport)
    norm: Any = injection.module.norm
    norm.running_mean.fill_(1.0 + transport.rank)
    if bad and transport.rank == 1:
        norm.running_var[0] = torch.nan
    merge_all(injection, chosen, transport, step=1, merges=0)
    return norm.running_mean.tolist(), norm.running_var.tolist()


@pytest.mark.parametrize("bad", [False, True])
def test_running_statistics_are_averaged_over_the_devices_where_they_are_finite(bad: bool) -> None:
    assert run(with_statistics, 2, bad) == [([1.5] * 9, [1.0] * 9)] * 2


def with_shared_replica() -> float:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    chosen = config()
    injection = made(chosen, transport=transport)
    gain = injection.module.get_parameter("gain")
    with torch.no_grad():
        gain.fill_(1.0 if transport.rank == 0 else 4.0)
        if transport.rank == 1:
            next(iter(injection.factors.values())).A[0] = torch.nan
    merge_all(injection, chosen, transport, step=1, merges=0)
    return float(gain)


def test_a_replica_that_local_heads_share_counts_once_for_each_good_head() -> None:
    assert run(with_shared_replica, 2) == [(1 + 1 + 4) / 3] * 2


def test_heads_that_get_statistics_of_their_own_while_a_merge_travels_keep_what_they_see() -> None:
    """As where a run goes on on fewer devices, whose heads turn out to have to take turns."""
    norm = torch.nn.BatchNorm1d(1)
    statistics = RunningStatistics(norm)
    one = torch.ones(())
    statistics.load_taken_state(
        {
            "totals": {"running_mean": torch.tensor([6.0]), "running_var": torch.tensor([2.0])},
            "counts": {"running_mean": 2 * one, "running_var": 2 * one},
            "before": {"running_mean": torch.zeros(1, 1), "running_var": torch.ones(1, 1)},
        }
    )
    statistics.split(2)
    statistics.select(1)
    norm.running_mean += 5  # type: ignore[operator]
    statistics.select(None)
    statistics.land()
    assert norm.running_mean.tolist() == [3]  # type: ignore[union-attr, operator]
    assert statistics.rows()["running_mean"].tolist() == [[3], [8]]
