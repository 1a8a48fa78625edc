"""When what is merged: groups, merges on their way, and what happens to them in between."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, Transport, flight, merge, merging, sharded
from lightning_lte.execution import run as run_step
from lightning_lte.merge import Merge
from lightning_lte.payload import Payload
from lightning_lte.stopwatch import Stopwatch
from tests.modules import RANK, backward, clone, make_data, make_net, sgd, train_step
from tests.processes import run

HEADS = 4
MOMENTUM = partial(torch.optim.SGD, lr=0.7, momentum=0.9)


class Loop:
    """A plain loop over batches of their own."""

    def __init__(self, transport: Transport | None = None, heads: int = HEADS, **choices: Any) -> None:
        self.net = make_net()
        self.opt = sgd(self.net.parameters())
        config = LTEConfig(heads, **{"merge_every": 4, "execution": "batched", **choices}, rank=RANK)
        self.explorer = Explorer(self.net, self.opt, config, transport)
        self.factors = list(self.explorer.injection.factors.values())
        self.done = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            train_step(self.explorer, self.net, self.opt, make_data(16, seed=self.done))
            self.done += 1

    def go_on_from(self, done: int, weights: dict[str, Tensor], optimizer: Any, state: Any) -> None:
        self.net.load_state_dict(weights)
        self.opt.load_state_dict(optimizer)
        self.explorer.load_state_dict(state)
        self.done = done

    @torch.no_grad()
    def write(self, value: float) -> None:
        """Write to all weights from outside."""
        for param in self.net.parameters():
            param.fill_(value)

    def weights(self) -> dict[str, Tensor]:
        return clone({f.name: f.weight for f in self.explorer.injection.factors.values()})


def check_that_writes_stay(loop: Loop) -> None:
    """Heads go on from weights that are all written from outside, and change nothing where they learn nothing."""
    loop.write(0.01)
    for group in loop.opt.param_groups:
        group.update(lr=0.0, momentum=0.0)
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        loop.steps(4)
    loop.explorer.finish()
    for weight in loop.weights().values():
        torch.testing.assert_close(weight, torch.full_like(weight, 0.01))


def test_weights_written_while_a_merge_travels_stay_as_they_were_written() -> None:
    loop = Loop(overlap=3)
    loop.steps(5)
    assert loop.explorer.flights
    check_that_writes_stay(loop)


def test_weights_written_before_the_second_step_are_what_heads_go_on_from() -> None:
    """While it is still watched whether something else than merges writes to them."""
    loop = Loop()
    loop.steps(1)
    check_that_writes_stay(loop)
    assert not loop.explorer.made_replicas and all(p.grad is None for p in loop.explorer.injection.factors)


def test_weights_written_in_half_precision_are_all_that_is() -> None:
    """What the weights that were there before could not hold is not added to them."""
    net = make_net().bfloat16()
    optimizer = sgd(net.parameters())
    explorer = Explorer(net, optimizer, LTEConfig(HEADS, 4, rank=RANK, execution="batched"))
    for step in range(10):
        x, y = make_data(16, seed=step)
        train_step(explorer, net, optimizer, (x.bfloat16(), y))
    assert any(bool(f.remainder.any()) for f in explorer.injection.factors.values() if f.remainder is not None)
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        explorer.act()
    explorer.merge()
    assert not any(bool(f.weight.any()) for f in explorer.injection.factors.values())
    explorer.close()


def test_heads_go_on_from_weights_of_which_some_are_what_they_were() -> None:
    """As those of a layer that is never used, when weights of before are loaded."""
    loop = Loop(merge_every=3)
    before = clone(loop.net.state_dict())
    loop.steps(4)
    with torch.no_grad():
        loop.net.load_state_dict({**before, "second.weight": loop.net.second.weight.clone()})
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        loop.steps(1)
    assert not loop.explorer.made_replicas


def test_a_merge_in_inference_mode_is_as_any_other() -> None:
    def trained(inference: bool) -> dict[str, Tensor]:
        net = make_net()
        opt = sgd(net.parameters())
        outer = partial(torch.optim.SGD, lr=0.7, momentum=0.9)
        explorer = Explorer(net, opt, LTEConfig(2, 100, rank=RANK, execution="batched", outer_optimizer=outer))
        for step in range(6):
            train_step(explorer, net, opt, make_data(8, seed=step))
            with torch.inference_mode(inference):
                explorer.merge()
        explorer.finish()
        return clone(net.state_dict())

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_what_heads_learn_in_steps_that_nobody_counts_is_merged_in_the_end(wire: str) -> None:
    loop = Loop(merge_every=3, wire=wire)
    before = loop.weights()
    for seed in range(5):
        backward(loop.explorer, loop.net, *make_data(16, seed=seed))
        loop.opt.step()  # and no explorer.step()
    factors = list(loop.explorer.injection.factors.values())
    with pytest.warns(UserWarning, match="no step was counted"):
        loop.explorer.finish()
    for f in factors:
        mean = f.scale * sum(f.B[h] @ f.A[h] for h in range(HEADS)) / HEADS
        torch.testing.assert_close(f.weight.detach(), before[f.name] + mean.detach())
        assert mean.detach().norm() > 0


@pytest.mark.parametrize("choices", [{}, {"execution": "sequential"}, {"base": "bfloat16"}], ids=str)
@pytest.mark.parametrize("done", [5, 8])
def test_forwards_see_weights_that_were_written_since_the_last_step(done: int, choices: dict[str, Any]) -> None:
    """As in the epoch without steps in which a callback that averaged weights computes running statistics. After 8
    steps the heads have just been merged."""
    loop = Loop(**choices)
    loop.steps(done)
    assert loop.explorer.unmerged == (done == 5)
    x, y = make_data(16)
    with torch.no_grad():
        for i, param in enumerate(loop.net.parameters()):
            param.fill_((i - 3) / 64)  # which bfloat16 has exactly
        expected = cross_entropy(loop.net(x), y)
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        loss = run_step(loop.explorer, lambda own: cross_entropy(loop.net(own[0]), own[1]), (x, y))
    torch.testing.assert_close(loss, expected)
    for f in loop.explorer.injection.factors.values():
        assert all(torch.equal(f.effective(head), f.weight) for head in range(f.count))


def test_weights_may_be_written_soon_after_a_loop_went_back() -> None:
    """Who writes to all of them at two merges in a row is refused, and going back is no such write."""
    loop = Loop()
    loop.steps(4)
    weights, optimizer = clone(loop.net.state_dict()), copy.deepcopy(loop.opt.state_dict())
    state = loop.explorer.state_dict()
    loop.steps(4)
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        loop.go_on_from(4, weights, optimizer, state)
    check_that_writes_stay(loop)


def test_parameters_that_come_later_do_not_change_the_groups_of_others() -> None:
    """A weight would be merged twice if it changed its group while it is on its way."""
    loop = Loop(stagger=2, overlap=3)
    start = loop.weights()
    loop.steps(6)
    explorer = loop.explorer
    assert len(explorer.flights) == 2
    loop.opt.add_param_group({"params": [nn.Parameter(torch.zeros(2000, dtype=torch.float64))]})
    loop.steps(10)
    explorer.finish()
    for f in explorer.injection.factors.values():
        mean = f.scale * sum(f.B[h] @ f.A[h] - 0 for h in range(HEADS)) / HEADS
        torch.testing.assert_close(f.weight.detach(), start[f.name] + mean.detach())


def test_the_bits_of_all_weights_are_verified_whatever_group_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lte import merging

    seen: set[str] = set()
    monkeypatch.setattr(merging, "verify", lambda factors, *_: seen.update(f.name for f in factors))
    loop = Loop(stagger=2, verify_every=2)
    loop.steps(20)
    assert seen == {"first", "second"}


def test_an_outer_optimizer_does_not_move_what_has_learned_nothing() -> None:
    loop = Loop(outer_optimizer=MOMENTUM)
    loop.steps(8)
    before = loop.weights()
    loop.explorer.merge()
    loop.explorer.finish()
    torch.testing.assert_close(loop.weights(), before, rtol=0, atol=0)


ROUNDED = (
    {"wire": "int8", "payload": "factors"},
    {"wire": "int8", "payload": "dense"},
    {"wire": "bfloat16", "payload": "factors"},
    {"wire": "int8", "payload": "factors", "overlap": 2},
    {"wire": "int8", "payload": "factors", "stagger": 2},
)


def test_in_the_end_nothing_stays_in_heads_that_rounding_took() -> None:
    for own in run(_rounded_to_the_end, 2):
        for weight, expected in own:
            torch.testing.assert_close(weight, expected)


def _rounded_to_the_end() -> list[tuple[Tensor, Tensor]]:
    """Training that ends with the step of a merge, and after it."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    found = []
    for choices in ROUNDED:
        for steps in (12, 13):
            loop = Loop(transport, **choices)
            start = loop.weights()
            loop.steps(steps)
            loop.explorer.finish()
            for f in loop.factors:
                total = f.scale * sum(f.B[h] @ f.A[h] for h in range(f.count)).detach()
                transport.sum_([total])
                found.append((f.weight.detach().float(), (start[f.name] + total / HEADS).float()))
    return found


def test_an_outer_optimizer_makes_no_step_for_what_rounding_took_alone() -> None:
    for before, after in run(_outer_to_the_end, 2):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def _outer_to_the_end() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    loop = Loop(transport, wire="int8", payload="factors", outer_optimizer=MOMENTUM)
    loop.steps(8)
    before = loop.weights()
    loop.explorer.finish()
    return before, {f.name: f.weight.detach().clone() for f in loop.factors}


def _found_while_merges_travel() -> dict[str, Tensor]:
    loop = Loop(Transport(dist.get_world_size(), dist.get_rank()), merge_every=8, stagger=2, overlap=8)
    loop.steps(5)
    with torch.no_grad():
        loop.net.second.weight.mul_(0.9)
    loop.steps(9)
    assert len(loop.explorer.flights) == 2
    loop.explorer.finish()
    return clone(loop.net.state_dict())


def test_a_merge_that_lands_others_leaves_none_behind() -> None:
    """Weights lose their heads when it lands, before which all others have to."""
    own, other = run(_found_while_merges_travel, 2)
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def _written_on_the_second() -> str:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    loop = Loop(transport, overlap=2, wire="int8", payload="factors")
    loop.steps(9)
    if transport.rank == 1:
        loop.write(0.5)
    try:
        loop.steps(8)
    except RuntimeError as error:
        return str(error)
    return ""


def test_devices_whose_weights_were_written_apart_say_so_though_their_merges_travel() -> None:
    for words in run(_written_on_the_second, 2):
        assert "Whoever writes to all weights has to do so on all devices alike" in words


def test_what_another_optimizer_trains_may_be_frozen_at_a_merge() -> None:
    """As `toggle_optimizer` does it, where the other trains no weight with heads."""
    net = make_net()
    optimizers = [torch.optim.Adam([*net.first.parameters(), *net.second.parameters()])]
    optimizers.append(torch.optim.Adam([*net.norm.parameters(), *net.out.parameters()]))
    explorer = Explorer(net, optimizers, LTEConfig(1, 2, rank=RANK))
    for step in range(4):
        x, y = make_data(16, seed=step)
        backward(explorer, net, x, y)
        for optimizer, other in zip(optimizers, optimizers[::-1], strict=True):
            frozen = [p for group in other.param_groups for p in group["params"]]
            for param in frozen:
                param.requires_grad_(False)
            optimizer.step()
            explorer.step(optimizer)
            for param in frozen:
                param.requires_grad_(True)
            optimizer.zero_grad()
    assert explorer.merges == 4
    explorer.finish()


def test_the_spread_of_heads_is_that_of_all_that_a_record_tells_of() -> None:
    net = make_net()
    optimizers = [sgd(net.first.parameters()), sgd([*net.second.parameters(), *net.out.parameters()])]
    explorer = Explorer(net, optimizers, LTEConfig(HEADS, 100, rank=RANK, execution="batched"))
    x, y = make_data(16)
    for _ in range(4):
        backward(explorer, net, x, y)
        for optimizer in optimizers:
            optimizer.step()
            explorer.step(optimizer)
            optimizer.zero_grad()
    deltas = [[(f.effective(h) - f.weight).detach() for h in range(HEADS)] for f in explorer.injection.factors.values()]
    squares = sum(float(delta.square().sum()) for own in deltas for delta in own) / HEADS
    mean = sum(float((sum(own) / HEADS).square().sum()) for own in deltas)
    record = explorer.merge()
    assert record.delta_norm == pytest.approx(mean**0.5)
    assert record.disagreement == pytest.approx((squares / mean - 1) ** 0.5)
    explorer.finish()


def test_a_module_is_as_it_was_where_devices_can_not_meet_at_the_start() -> None:
    class Alone(Transport):
        def beside(self) -> Transport:
            raise RuntimeError("nobody is there")

    net = make_net()
    optimizer = sgd(net.parameters())
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match="nobody is there"):
        Explorer(net, optimizer, LTEConfig(HEADS, 4, rank=RANK, overlap=2), Alone())
    assert type(net.first) is nn.Linear
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))


def test_a_state_is_loaded_when_merges_on_their_way_have_been_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read what is loaded, and the next ones would be mixed up with them."""
    loop = Loop(overlap=2)
    loop.steps(3)
    state = loop.explorer.state_dict()
    assert state is not None
    done: list[int] = []
    monkeypatch.setattr(Merge, "exchange", lambda _: time.sleep(0.5) or done.append(1))
    loop.steps(1)
    loop.explorer.load_state_dict(state)
    assert done and not loop.explorer.flights


class Stream:
    """A stream of a GPU that this machine has not: it notes what waits for what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


def test_a_merge_on_its_way_has_a_stream_of_its_own_which_waits_for_what_reads_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    training, side = Stream("training", log), Stream("the merge", log)
    monkeypatch.setattr(flight, "_stream_on", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    # Blocks turn to the stream and the device from before in the end: in a thread that is device 0, whatever the rank.
    monkeypatch.setattr(torch.cuda, "stream", None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(f"turned to {stream.name}"))
    exchange, land = Merge.exchange, Merge.land
    monkeypatch.setattr(Merge, "exchange", lambda *given: log.append("exchange") or exchange(*given))
    monkeypatch.setattr(Merge, "land", lambda *given: log.append("land") or land(*given))
    on_gpu = partial(flight.Flight, device=torch.device("cuda", 1))
    monkeypatch.setattr(merging, "Flight", lambda *given, device: on_gpu(*given))
    loop = Loop(stagger=2, overlap=1)
    loop.steps(7)
    started = ["the merge waits for training", "turned to the merge", "exchange"]
    landed = ["training waits for the merge", "land", "the merge waits for training"]
    assert log == [*started, *landed, *started, *landed]


@pytest.mark.parametrize("overlap", [0, 1])
def test_merges_on_a_gpu_are_timed_by_its_own_clock(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may be steps ahead of it, and waits in a merge for all that the device had to do before."""
    now, waits = 0.0, []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            self.at = now

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    exchange, check = Payload.exchange, Merge._check_good

    def exchanged(payload: Payload) -> None:
        nonlocal now
        now += 250.0  # of its milliseconds, for each of the weights
        exchange(payload)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    for module in (merge, merging):
        on_gpu = lambda device: Stopwatch(torch.device("cuda"))  # noqa: E731
        monkeypatch.setattr(module, "Stopwatch", on_gpu)
    monkeypatch.setattr(Payload, "exchange", exchanged)
    monkeypatch.setattr(Merge, "_check_good", lambda own: time.sleep(0.1) or check(own))
    loop = Loop(overlap=overlap)
    loop.steps(4)
    assert not (overlap and waits)
    for travelling in loop.explorer.flights:
        travelling._thread.join()
    loop.steps(1)
    record = loop.explorer.last_record
    assert record is not None and waits
    # What travels meanwhile is none of the time that training stands still.
    assert record.time_s == record.wait_s == (0.0 if overlap else 0.5)


def _wait_at_the_start() -> tuple[float, float]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    loop = Loop(transport, overlap=3)
    loop.steps(3)  # the first steps, in which devices tell each other what they found, and one more
    if transport.rank == 1:
        time.sleep(2.0)
    start = time.monotonic()
    loop.steps(1)
    waited = time.monotonic() - start
    assert loop.explorer.flights
    loop.steps(3)
    assert loop.explorer.last_record is not None
    loop.explorer.finish()
    return waited, loop.explorer.last_record.wait_s


def test_a_device_does_not_wait_where_a_merge_starts_on_its_way() -> None:
    (waited, _), _ = run(_wait_at_the_start, 2)
    assert waited < 1.5


def test_merges_of_one_step_are_all_on_record() -> None:
    loop = Loop()
    loop.steps(9)
    loop.explorer.merge()
    assert [record.step for record in loop.explorer.records] == [4, 8, 9]
    assert loop.explorer.records[-1] is loop.explorer.last_record


def step_of(explorer: Explorer, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    """A step of one of several optimizers, by hand."""
    backward(explorer, explorer.module, batch[0], batch[1])
    optimizer.step()
    explorer.module.zero_grad()
    explorer.step(optimizer)


@pytest.mark.parametrize("first", [0, 1])
def test_steps_of_a_second_optimizer_over_the_same_weights_are_merged_in_the_end(first: int) -> None:
    """Weights merge by the clock of the optimizer that holds them first; the last step is that of the other."""
    net = make_net()
    optimizers = [sgd(net.parameters()), torch.optim.SGD(net.parameters(), lr=0.05)]
    explorer = Explorer(net, optimizers, LTEConfig(HEADS, 4, rank=RANK, execution="batched"))
    start = clone({f.name: f.weight for f in explorer.injection.factors.values()})
    for step, number in enumerate([first] + [0] * 4 + [1] * 3):
        step_of(explorer, optimizers[number], make_data(16, seed=step))
    assert explorer.unmerged
    factors = list(explorer.injection.factors.values())
    explorer.finish()
    for f in factors:
        mean = f.scale * sum(f.B[h] @ f.A[h] for h in range(HEADS)) / HEADS
        torch.testing.assert_close(f.weight.detach(), start[f.name] + mean.detach())
        assert mean.detach().norm() > 0


def full_rank_first(count: int) -> tuple[Explorer, list[torch.optim.Optimizer]]:
    """Four steps before heads begin, by optimizers over the same weights in turn."""
    net = make_net()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(count)]
    explorer = Explorer(net, optimizers, LTEConfig(HEADS, 4, rank=RANK, execution="batched", full_rank_steps=9))
    for step in range(4):
        cross_entropy(net(make_data(16, seed=step)[0]), make_data(16, seed=step)[1]).backward()
        explorer.after_backward()
        optimizers[step % count].step()
        net.zero_grad()
        explorer.step(optimizers[step % count])
    return explorer, optimizers


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("merge", [False, True])
def test_training_that_ends_before_heads_begin_keeps_what_it_learned(count: int, merge: bool) -> None:
    explorer, _ = full_rank_first(count)
    learned = clone(explorer.module.state_dict())
    if merge:
        explorer.merge()
    explorer.finish()
    torch.testing.assert_close(clone(explorer.module.state_dict()), learned)
    assert not torch.equal(learned["out.weight"], make_net().out.weight)


def _joins_later() -> dict[str, Tensor]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    net = make_net()
    optimizers = [sgd(net.parameters()), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)]
    explorer = Explorer(net, optimizers, LTEConfig(2, 2, rank=RANK), transport)
    for step, number in enumerate([0, 0, 1, 0, 0, 1]):
        if step == 2:
            explorer.rest()
            optimizers[1].add_param_group({"params": [net.first.bias, net.second.weight]})
        explorer.act()
        x, y = (t.chunk(2)[transport.rank] for t in make_data(16, seed=step))
        step_of(explorer, optimizers[number], (x, y))
    explorer.finish()
    return clone(net.state_dict())


def test_the_last_step_of_an_optimizer_that_weights_joined_later_is_merged() -> None:
    one, other = run(_joins_later, 2)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def stopped_at(steps: list[int]) -> list[dict[str, Tensor]]:
    """The weights of a device after its steps, and after a last merge."""
    rank = dist.get_rank()
    loop = Loop(Transport(dist.get_world_size(), rank), heads=2, merge_every=3)
    for step in range(steps[rank]):
        train_step(loop.explorer, loop.net, loop.opt, make_data(8, seed=10 * rank + step))
    seen = [loop.weights()]
    loop.explorer.merge(everything=True)
    return [*seen, loop.weights()]


def test_a_last_merge_is_that_of_all_weights_where_devices_stopped_at_a_merge_and_after_it() -> None:
    (at, first), (after, second) = run(stopped_at, 2, [3, 4])
    torch.testing.assert_close(at, after, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not any(torch.equal(at[name], weight) for name, weight in first.items())


def _found_before_a_checkpoint(folder: str) -> Any:
    """A checkpoint after a weight was written and before the merge at which all devices hear of it."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    loop = Loop(transport)
    loop.steps(6)
    with torch.no_grad():
        loop.net.second.weight.mul_(0.9)
    loop.steps(1)
    weights, optimizer = clone(loop.net.state_dict()), copy.deepcopy(loop.opt.state_dict())
    saved = transport.gather(loop.explorer.state_dict())
    state = saved[0] if saved else None
    own = loop.explorer.local_state()
    sharded.save({"state_dict": weights}, own, loop.explorer.weight_names, folder, transport)
    shared = [state]
    dist.broadcast_object_list(shared, src=0)
    loop.steps(5)
    for each in (shared[0], sharded.load(folder)["lte"]):
        other = Loop(transport)
        other.go_on_from(loop.done - 5, weights, optimizer, each)
        other.steps(5)
        assert other.explorer.made_replicas == loop.explorer.made_replicas
        torch.testing.assert_close(clone(other.net.state_dict()), clone(loop.net.state_dict()), rtol=0, atol=0)
    return state, weights, optimizer, loop.explorer.made_replicas


def test_what_heads_turned_out_not_to_train_is_in_a_checkpoint_before_all_devices_hear_of_it(tmp_path: Path) -> None:
    (state, weights, optimizer, made_replicas), _ = run(_found_before_a_checkpoint, 2, str(tmp_path / "sharded"))
    assert "second" in made_replicas
    alone = Loop()
    alone.go_on_from(7, weights, optimizer, state)
    alone.steps(1)
    assert alone.explorer.made_replicas == made_replicas


def _in_a_default_dtype(default: torch.dtype, chosen: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    net = make_net().float()
    opt = sgd(net.parameters())
    transport = Transport(dist.get_world_size(), dist.get_rank())
    config = LTEConfig(HEADS, 3, rank=RANK, execution="batched", **chosen)
    explorer = Explorer(net, opt, config, transport)
    norms = []
    try:
        for seed in range(7):
            x, y = make_data(8, seed=2 * seed + transport.rank)
            torch.set_default_dtype(default)
            backward(explorer, net, x.float(), y)
            norms.append(explorer.clip_grad_norm_(0.1))
            opt.step()
            opt.zero_grad()
            explorer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(f.error is None or f.error.dtype == torch.float32 for f in explorer.injection.factors.values())
    explorer.finish()
    return clone(net.state_dict()), norms


@pytest.mark.parametrize(
    "chosen", [{"wire": "int8", "payload": "dense"}, {"base": "int8", "base_copy": "error-feedback"}], ids=str
)
def test_the_default_dtype_of_the_moment_makes_no_difference(chosen: dict[str, Any]) -> None:
    """Lightning's bf16-true makes it bfloat16 for as long as a step of the user's lasts, and in manual optimization
    clipping and merges come inside of that."""
    expected, found = (run(_in_a_default_dtype, 2, dtype, chosen)[0] for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
