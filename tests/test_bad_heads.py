"""Heads that are not finite: they are found in time, and start again or stop training, as the user chose."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer

from lightning_lte import Explorer, LTEConfig, LTEStrategy, MergeRecord, Transport
from lightning_lte.execution import run as run_step
from lightning_lte.heads import Factors
from tests.modules import (
    RANK,
    WIDTH,
    Module,
    Recorder,
    ScaledNet,
    adamw,
    backward,
    clone,
    loader,
    make_data,
    make_net,
    sgd,
    trainer,
)
from tests.processes import run
from tests.test_checkpoint import assert_equal

HEADS, BAD, PERIOD = 4, 2, 5
MOMENTUM = partial(SGD, lr=0.7, momentum=0.9)
Make = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.5),
    "SGD with momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.01, foreach=False),
    "AdamW, foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "AdamW, amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.01),
}


class Loop:
    """A plain loop in float32, as overflow is that of float32."""

    def __init__(self, make: Make, net: Any = None, **choices: Any) -> None:
        self.net = make_net().float() if net is None else net
        self.optimizer = make(self.net.parameters())
        config = LTEConfig(HEADS, PERIOD, rank=RANK, execution="batched", **choices)
        self.explorer = Explorer(self.net, self.optimizer, config)
        self.steps = 0

    @property
    def factors(self) -> list[Factors]:
        return list(self.explorer.injection.factors.values())

    def step(self, poison: Callable[[], object] = lambda: None) -> MergeRecord | None:
        """Train on a batch; `poison` may change gradients."""
        self.steps += 1
        x, y = make_data(16, seed=self.steps)
        with self.explorer.heads():
            loss = cross_entropy(self.net(x.float()), y)
        loss.backward()
        self.explorer.after_backward()
        poison()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.explorer.step()

    def moments(self) -> list[Tensor]:
        """Of all that heads have of their own, with the heads as dimension 0."""
        states = self.explorer.substitution.states(self.optimizer)
        own = self.explorer.per_head
        return [t for p, s in states.items() if p in own for t in s.values() if torch.is_tensor(t) and t.dim() > 1]


# The steps of SGD are finite, if absurd, where a finite gradient overflows when it is squared.
POISONS = [
    (name, gradient)
    for name in OPTIMIZERS
    for gradient in (torch.nan, torch.inf, -torch.inf, 1e30)
    if gradient != 1e30 or "SGD" not in name
]


@pytest.mark.parametrize("where", ["A", "B", "replica"])
@pytest.mark.parametrize(("name", "gradient"), POISONS)
def test_a_gradient_that_is_not_finite_or_overflows_shows_at_the_next_merge(
    name: str, gradient: float, where: str
) -> None:
    loop = Loop(OPTIMIZERS[name])
    f = loop.factors[0]
    replica = next(r for r in loop.explorer.injection.replicas if r.stack is not None)
    learned: dict[str, list[Tensor]] = {}

    def poison() -> None:
        trained: Any = {"A": f.A, "B": f.B, "replica": replica.stack}[where]
        trained.grad[BAD].view(-1)[1] = gradient

    def look(*_: Any) -> None:
        learned.update({f.name: [f.effective(h) for h in range(HEADS) if h != BAD] for f in loop.factors})

    for _ in range(PERIOD - 1):
        loop.step()
    loop.optimizer.register_step_post_hook(look)
    record = loop.step(poison)
    assert record is not None and record.restarted == (BAD,)
    for f in loop.factors:
        torch.testing.assert_close(f.weight.detach(), sum(learned[f.name]) / 3)
    assert all(moment.isfinite().all() for moment in loop.moments())

    held = [t.detach().clone() for f in loop.factors for t in (f.A, f.B)]
    for _ in range(2):
        loop.step()
    # Every element learns again, where one with an infinite moment would stay as it is for ever.
    for tensor, then in zip((t.detach() for f in loop.factors for t in (f.A, f.B)), held, strict=True):
        assert (tensor[BAD] != then[BAD]).all()
    records = [loop.step() for _ in range(2 * PERIOD)]
    assert [r.restarted for r in records if r] == [(), ()]


class Poisoned(Module):
    """The samples of head 2 have an infinite number in them at step 4."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.trainer.global_step == 3 and len(x) == 16:
            x = x.clone()
            x[9, 0] = torch.inf
        elif self.trainer.global_step == 3:  # a head in its turn
            self.turn = getattr(self, "turn", -1) + 1
            x = torch.full_like(x, torch.inf) if self.turn == BAD else x
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize("make", [sgd, adamw, OPTIMIZERS["AdamW, fused"]])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_a_sample_that_is_not_finite_takes_its_own_head_out_and_no_other(execution: Any, make: Any) -> None:
    module = Poisoned(optimizer=make)
    records = Recorder(lambda t, _: t.strategy.last_record and t.strategy.last_record.restarted)
    t = trainer(LTEStrategy(HEADS, PERIOD, rank=RANK, execution=execution), max_steps=11, callbacks=[records])
    with pytest.warns(UserWarning, match=r"heads 2 were not finite.*bad_heads='stop' ends training"):
        t.fit(module, loader(16 * 11))
    assert records.seen[4:] == [(BAD,)] * 5 + [()] * 2
    assert all(p.isfinite().all() for p in module.parameters())


class Spectral(nn.Module):
    """Complex numbers for each frequency, as in Fourier neural operators: replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.frequencies = nn.Parameter(torch.ones(WIDTH // 2 + 1, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.frequencies, WIDTH))


@pytest.mark.parametrize("what", ["value", "gradient", "first moment"])
def test_a_complex_replica_that_is_not_finite_takes_its_head_out(what: str) -> None:
    torch.manual_seed(0)
    net = Spectral()
    optimizer = Adam(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(HEADS, PERIOD, rank=RANK, execution="sequential"))
    replica = next(r for r in explorer.injection.replicas if r.param is net.frequencies)
    assert replica.stack is not None
    for step in range(PERIOD):
        x = torch.randn(4 * HEADS, WIDTH)
        loss = run_step(explorer, lambda own: net(own).square().mean(), x)
        with explorer.backward():
            loss.backward()
        explorer.after_backward()
        if step == PERIOD - 1:
            assert replica.stack.grad is not None
            state = optimizer.state[replica.stack]
            spoilt = {"value": replica.stack, "gradient": replica.stack.grad, "first moment": state["exp_avg"]}[what]
            spoilt.detach()[BAD, 1] = torch.nan
        optimizer.step()
        record = explorer.step()
    assert record is not None and record.restarted == (BAD,)
    kept = optimizer.state[replica.stack]
    assert all(t.isfinite().all() for t in (net.frequencies, replica.stack, kept["exp_avg"], kept["exp_avg_sq"]))


def test_factors_whose_product_overflows_are_not_finite() -> None:
    loop = Loop(adamw)
    f = loop.factors[0]
    with torch.no_grad():
        f.A[BAD], f.B[BAD] = 1e20, 1e20
        f.A[0], f.B[0] = 1e25, 0.0  # its effective weight is W, which is as finite as any
    assert f.finite().tolist() == [True, True, False, True]
    record = loop.explorer.merge()
    assert record.restarted == (BAD,) and bool(f.weight.isfinite().all())


def test_moments_of_a_replica_that_heads_share_are_mended_and_no_head_is_bad() -> None:
    loop = Loop(OPTIMIZERS["Adam"], make_net(ScaledNet).float())
    shared = next(r for r in loop.explorer.injection.replicas if r.stack is None)
    for _ in range(PERIOD - 1):
        loop.step()

    def poison() -> None:
        shared.trained.grad[1] = 1e30  # type: ignore[index]

    record = loop.step(poison)
    assert record is not None and record.restarted == ()
    assert all(t.isfinite().all() for t in loop.optimizer.state[shared.trained].values())
    before = shared.param.detach().clone()
    loop.step()
    assert (shared.param != before).all()


def test_a_head_that_is_not_finite_leaves_no_trace_in_a_weight_that_loses_its_heads() -> None:
    """What heads have learned is added to it then, in the middle of a period."""
    loop = Loop(adamw)
    f = loop.factors[1]
    for _ in range(PERIOD - 2):
        loop.step()
    with torch.no_grad():
        f.B[BAD, 0, 0] = torch.nan
    good = [f.effective(head) for head in range(HEADS) if head != BAD]
    loop.explorer.make_replicas({f.name: "it is used elsewhere"})
    torch.testing.assert_close(f.weight.detach(), sum(good) / 3)


def break_head(explorer: Explorer, head: int) -> None:
    """Give a local head gradients that are not finite in all it trains, also in replicas that are one device's own."""
    for own in explorer.per_head:
        if own.grad is not None:
            own.grad[head] = torch.nan
    for replica in explorer.injection.replicas:
        if replica.stack is None and explorer.count == 1 and replica.param.grad is not None:
            replica.param.grad.fill_(torch.nan)


@pytest.mark.parametrize("choices", [{}, {"overlap": 2}, {"overlap": 5}, {"outer_optimizer": MOMENTUM}], ids=str)
@pytest.mark.parametrize("stagger", [2, 3])
def test_a_head_starts_anew_once_in_what_merges_later_too(stagger: int, choices: dict[str, Any]) -> None:
    loop = Loop(adamw, stagger=stagger, **choices)
    explorer = loop.explorer
    found = []
    for step in range(1, 5 * PERIOD):
        poison = partial(break_head, explorer, BAD) if step == PERIOD + 2 else lambda: None
        record = loop.step(poison)
        if record is not None and record.restarted:
            found.append(record.restarted)
            for f in loop.factors:
                torch.testing.assert_close(f.effective(BAD), f.weight.detach(), rtol=0, atol=1e-6)
    assert found == [(BAD,)]
    assert all(replica.copies.isfinite().all() for replica in explorer.injection.replicas)
    explorer.finish()
    assert all(param.isfinite().all() for param in loop.net.parameters())


def test_a_head_starts_anew_once_in_what_other_optimizers_train_too() -> None:
    net = make_net().float()
    optimizers = [adamw(net.first.parameters()), adamw([*net.second.parameters(), *net.out.parameters()])]
    explorer = Explorer(net, optimizers, LTEConfig(HEADS, PERIOD, rank=RANK, execution="batched"))
    found = []
    for step in range(1, 5 * PERIOD):
        x, y = make_data(16, seed=step)
        backward(explorer, net, x.float(), y)
        if step == PERIOD + 2:
            break_head(explorer, BAD)
        for number, optimizer in enumerate(optimizers):
            if number == 0 or step > 2:  # the second merges two batches later
                optimizer.step()
                record = explorer.step(optimizer)
                found += [record.restarted] if record is not None and record.restarted else []
            optimizer.zero_grad()
    assert found == [(BAD,)]
    explorer.finish()
    assert all(param.isfinite().all() for param in net.parameters())


def _broken_on_the_second(choices: dict[str, Any]) -> tuple[list[tuple[int, ...]], dict[str, Tensor]]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    net = make_net().float()
    optimizer = adamw(net.parameters())
    explorer = Explorer(net, optimizer, LTEConfig(2, PERIOD, rank=RANK, **choices), transport)
    found = []
    for step in range(1, 5 * PERIOD):
        x, y = make_data(16, seed=2 * step + transport.rank)
        backward(explorer, net, x.float(), y)
        if step == PERIOD + 2 and transport.rank == 1:
            break_head(explorer, 0)
        optimizer.step()
        optimizer.zero_grad()
        record = explorer.step()
        found += [record.restarted] if record is not None and record.restarted else []
    explorer.finish()
    return found, clone(net.state_dict())


@pytest.mark.parametrize("choices", [{"stagger": 2}, {"stagger": 3, "overlap": 3}], ids=str)
def test_a_device_whose_head_starts_anew_goes_on_from_what_the_others_have(choices: dict[str, Any]) -> None:
    (found, own), (same, other) = run(_broken_on_the_second, 2, choices)
    assert found == same == [(1,)]
    assert all(value.isfinite().all() for value in own.values())
    assert_equal(own, other)


def test_a_merge_on_its_way_does_not_bring_back_what_a_head_has_lost() -> None:
    """A gradient that overflows when it is squared leaves the head's factors finite, which are on their way already."""
    loop = Loop(adamw, stagger=2, overlap=3)
    explorer = loop.explorer
    replica = next(r for r in explorer.injection.replicas if r.name == "first.bias")

    def poison() -> None:
        assert replica.stack is not None and replica.stack.grad is not None
        replica.stack.grad[BAD] = 1e25

    record = None
    while record is None or not record.restarted:
        record = loop.step(poison if explorer.flights and explorer.clock.merges > 1 else lambda: None)
    assert not explorer.flights
    for _ in range(2):
        for f in loop.factors:
            torch.testing.assert_close(f.effective(BAD), f.weight.detach(), rtol=0, atol=1e-6)
        explorer.merge()


def test_a_last_merge_that_is_refused_gives_the_module_back() -> None:
    loop = Loop(adamw)
    for _ in range(PERIOD - 1):
        loop.step()
    with torch.no_grad():
        loop.factors[0].B.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="no head of 4 has finite factors"):
        loop.explorer.finish()
    held = loop.optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, loop.net.parameters(), strict=True))


# ---- the other policy


def everything(loop: Loop) -> list[Tensor]:
    factors = [t for f in loop.factors for t in (f.A, f.B, f.anchor_A, f.anchor_B) if t is not None]
    replicas = [replica.copies for replica in loop.explorer.injection.replicas]
    return [t.detach().clone() for t in (*loop.net.parameters(), *factors, *replicas, *loop.moments())]


@pytest.mark.parametrize("bad", [(2,), (0, 3)])
@pytest.mark.parametrize("where", ["factors", "replica", "moments"])
def test_stop_names_the_heads_and_changes_nothing(bad: tuple[int, ...], where: str) -> None:
    loop = Loop(adamw, bad_heads="stop")
    for _ in range(PERIOD + 2):
        loop.step()
    f = loop.factors[0]
    replica = next(r for r in loop.explorer.injection.replicas if r.stack is not None)
    moments = loop.explorer.substitution.states(loop.optimizer)[f.A]["exp_avg_sq"]
    with torch.no_grad():
        for head in bad:
            {"factors": f.B, "replica": replica.stack, "moments": moments}[where][head].view(-1)[0] = torch.inf  # type: ignore[index]
    before = everything(loop)
    words = rf"At merge 2, after step 7, heads {', '.join(map(str, bad))} of 4 are not finite.*bad_heads='restart'"
    for _ in range(2):  # to try again is no use
        with pytest.raises(FloatingPointError, match=words):
            loop.explorer.merge()
    assert_equal(before, everything(loop))
    assert loop.explorer.clock.merges == 1 and not loop.explorer.merging
    loop.explorer.close()  # the module is given back all the same


def test_stop_lets_finite_heads_be() -> None:
    results = []
    for policy in ("restart", "stop"):
        loop = Loop(adamw, bad_heads=policy)
        for _ in range(2 * PERIOD + 1):
            loop.step()
        results.append(everything(loop))
    assert_equal(*results)


class Break(Callback):
    """Breaks a head of the second device after a merge."""

    def on_train_batch_end(self, t: Trainer, *_: Any) -> None:
        if t.global_step == 4 and t.global_rank == 1:
            with torch.no_grad():
                next(iter(t.strategy.explorer.injection.factors.values())).A[-1, 0, 0] = torch.nan  # type: ignore[attr-defined]


def _stopped(heads: int, choices: dict[str, Any]) -> tuple[str, dict[str, Tensor], dict[str, Tensor], list[str]]:
    at_merge: dict[str, Tensor] = {}

    def look(t: Trainer, m: Any) -> None:
        if t.global_step == 4:
            at_merge.update(clone(m.state_dict()))

    module = Module(optimizer=sgd)
    strategy = LTEStrategy(heads, 3, rank=RANK, bad_heads="stop", **choices)
    t = trainer(strategy, devices=2, max_epochs=1, callbacks=[Recorder(look), Break()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FloatingPointError) as error:
            t.fit(module, loader(16 * 2 * 10, 16))
    said = [str(w.message) for w in caught if "FloatingPointError" in str(w.message)]
    assert all(type(m).__module__.startswith(("torch.nn", "tests")) for m in module.modules())
    weights = {n: v for n, v in module.state_dict().items() if n in ("net.first.weight", "net.second.weight")}
    return str(error.value), at_merge, clone(weights), said


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("choices", [{}, {"overlap": 1}], ids=str)
def test_stop_ends_training_on_all_devices_with_the_weights_of_the_merge_before(
    heads: int, choices: dict[str, Any]
) -> None:
    (words, at_merge, after, said), other = run(_stopped, 2, heads, choices, group=False)
    assert words == other[0] and f"heads {heads - 1} of {heads} are not finite" in words
    for name, value in after.items():
        assert torch.equal(value, at_merge[name]) and torch.equal(value, other[2][name]), name
    assert any("the weights are those of the merge at step 3" in sentence for sentence in said), said


# ---- moments of other shapes


def _with_adafactor() -> list[tuple[tuple[int, ...], bool]]:
    model = make_net().float()
    optimizer = Adafactor(model.parameters(), lr=0.01)
    transport = Transport(2, dist.get_rank())
    explorer = Explorer(model, optimizer, LTEConfig(2, 3, rank=RANK), transport)
    seen = []
    for step in range(1, 7):
        x, y = make_data(8, seed=step)
        backward(explorer, model, x.float(), y)
        if step == 2 and transport.rank == 1:
            next(iter(explorer.injection.factors.values())).B.grad[0, 0, 0] = 1e30  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        record = explorer.step()
        if record:
            states = [t for s in explorer.substitution.states(optimizer).values() for t in s.values()]
            seen.append((record.restarted, all(bool(t.isfinite().all()) for t in states if torch.is_tensor(t))))
    return seen


def test_moments_of_other_shapes_than_their_parameters_are_seen_and_mended() -> None:
    """Adafactor keeps squared gradients by rows and columns, of a head alone on its device."""
    assert run(_with_adafactor, 2) == [[((1,), True), ((), True)]] * 2
