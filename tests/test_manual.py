"""Manual optimization with several heads on a device: n heads are n workers, whatever the step does."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import LTEStrategy
from lightning_lte.lockstep import _Turn
from tests.modules import (
    IN,
    RANK,
    Module,
    Net,
    Recorder,
    Words,
    adamw,
    clone,
    loader,
    make_data,
    make_net,
    sgd,
    trainer,
)
from tests.oracle import Worker
from tests.processes import run

HEADS, PERIOD, SLICE = 4, 3, 4
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def strategy(heads: int = HEADS, **kwargs: Any) -> LTEStrategy:
    return LTEStrategy(heads, PERIOD, rank=RANK, **kwargs)


class Manual(Module):
    def __init__(self, net: nn.Module | None = None, optimizer: Callable[..., Optimizer] = adamw) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        opt = self.optimizers()
        opt.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        opt.step()
        self.log("loss", loss)


class Twice(Manual):
    """Two optimizers share what they train, and each steps on the gradient of one backward."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opts = self.optimizers()
        for opt in opts:
            opt.zero_grad()
        self.manual_backward(self.loss(batch))
        for opt in opts:
            opt.step()

    def configure_optimizers(self) -> Any:
        return [sgd(self.parameters(), 0.04), sgd(self.net.first.parameters(), 0.06)]


class Grouped(Manual):
    """The same in one optimizer."""

    def configure_optimizers(self) -> Any:
        first = list(self.net.first.parameters())
        others = [p for p in self.parameters() if all(p is not own for own in first)]
        return torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": others}], lr=0.04, momentum=0.9)


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "auto"), (4, "batched")])
def test_optimizers_that_share_a_parameter_step_on_one_gradient(heads: int, execution: Any) -> None:
    """With a merge in the end alone: the clock of one of the two says when what they share is merged."""
    states = []
    for kind in (Twice, Grouped):
        module = kind(make_net())
        steps = 12 if kind is Twice else 6  # Lightning counts those of all optimizers
        trainer(LTEStrategy(heads, 100, rank=RANK, execution=execution), max_steps=steps).fit(module, loader(96))
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(*states, **EXACT)


class Bare(Manual):
    """Steps the optimizer itself, past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers(use_pl_optimizer=False)
        opt.zero_grad()
        self.loss(batch).backward()
        opt.step()


class WithClosure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()

        def closure() -> Tensor:
            opt.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        opt.step(closure)


class ZeroedByModule(Manual):
    """Zeroes gradients through the module, which doesn't have the heads among its parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch))  # of no use
        self.net.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.step()
        opt.zero_grad()


class Accumulating(Manual):
    """Steps after every second batch, and at the last."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2 or batch_idx == 3:
            opt.step()
            opt.zero_grad()


def fitted(module: Module, s: LTEStrategy, epochs: int = 3, **kwargs: Any) -> dict[str, Tensor]:
    trainer(s, max_epochs=epochs, **kwargs).fit(module, loader(16 * 4, 16))
    return clone(module.state_dict())


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("kind", [Manual, Bare, WithClosure, ZeroedByModule])
def test_manual_optimization_equals_automatic(kind: type[Manual], heads: int) -> None:
    manual = fitted(kind(), strategy(heads))
    automatic = fitted(Module(), strategy(heads, execution="sequential"))
    torch.testing.assert_close(manual, automatic, rtol=0 if kind is Manual else 1e-12, atol=0)


class SAM(Optimizer):
    """Sharpness-aware minimisation, as it is widely copied: a step goes past the optimizer to the one that it wraps."""

    def __init__(self, params: Any, rho: float) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = sgd(self.param_groups)  # type: ignore[arg-type]
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["before"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data = self.state[p]["before"]
        self.base_optimizer.step()


class Sharp(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.first_step()
        self.manual_backward(self.loss(batch))
        opt.second_step()


class SharpByOverride(Module):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.first_step()
        optimizer_closure()
        optimizer.second_step()


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("kind", [Sharp, SharpByOverride])
def test_steps_of_an_optimizer_that_another_one_wraps_count(kind: Any, heads: int, execution: Any) -> None:
    """Without a perturbation SAM is what it wraps."""
    recorder = Recorder(lambda t, _: t.strategy.explorer.merges)
    s = strategy(heads, execution=execution)
    sharp = fitted(kind(make_net(), partial(SAM, rho=0.0)), s, callbacks=[recorder])
    assert recorder.seen == [step // PERIOD for step in range(1, 13)]
    plain = fitted(Module(optimizer=sgd), strategy(heads, execution=execution))
    torch.testing.assert_close(sharp, plain)
    perturbed = fitted(kind(make_net(), partial(SAM, rho=0.05)), strategy(heads, execution=execution))
    assert not torch.equal(perturbed["net.second.weight"], plain["net.second.weight"])


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
def test_a_batch_split_by_hand_is_dealt_out_in_lockstep_whatever_execution_says(execution: Any) -> None:
    class Split(Manual):
        def split_batch(self, batch: Any, heads: int) -> list[Any]:
            return list(zip(batch[0].chunk(heads), batch[1].chunk(heads), strict=True))

    s = strategy(execution=execution)
    manual = fitted(Split(), s)
    torch.testing.assert_close(manual, fitted(Module(), strategy(execution="sequential")), rtol=0, atol=0)
    notes = [note for note in s.report().notes if "share this device" in note]
    assert notes == [f"{HEADS} heads share this device in turn (sequential): split_batch splits the batch."]


class Total(Manual):
    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class AutomaticTotal(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


def test_sums_over_samples_are_the_same_in_every_execution() -> None:
    def trained(module: Module, execution: Any) -> dict[str, Tensor]:
        return fitted(module, strategy(execution=execution, loss_reduction="sum"))

    slow = partial(sgd, lr=0.002)
    reference = trained(AutomaticTotal(optimizer=slow), "sequential")
    for module, executions in (AutomaticTotal, ("auto", "batched")), (Total, ("auto", "sequential")):
        for execution in executions:
            torch.testing.assert_close(trained(module(optimizer=slow), execution), reference, **EXACT)
    with pytest.raises(ValueError, match=r"loss_reduction='sum' with 4 heads on a device\. Give execution"):
        trained(Total(), "batched")


def test_sparse_gradients_of_what_heads_share_are_their_mean() -> None:
    manual = fitted(Manual(make_net(Words), sgd), strategy())
    automatic = fitted(Module(make_net(Words), sgd), strategy(execution="sequential"))
    torch.testing.assert_close(manual, automatic, **EXACT)


def test_accumulation_by_hand_equals_lightnings() -> None:
    manual = fitted(Accumulating(), strategy())
    automatic = fitted(Module(), strategy(execution="sequential"), accumulate_grad_batches=2)
    torch.testing.assert_close(manual, automatic, **EXACT)


def test_clipping_in_the_step_clips_each_head() -> None:
    class Clipping(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            if batch_idx % 2:
                self.clip_gradients(opt, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            else:
                clip_grad_norm_(self.parameters(), 0.1)
            opt.step()

    manual = fitted(Clipping(optimizer=sgd), strategy())
    automatic = fitted(Module(optimizer=sgd), strategy(execution="sequential"), gradient_clip_val=0.1)
    torch.testing.assert_close(manual, automatic, **EXACT)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("by", ["zero_grad", "clip_gradients", "clip_grad_value_"])
def test_gradients_of_a_backward_past_lightning_are_zeroed_and_clipped(by: str, bare: bool) -> None:
    class PastLightning(Manual):
        past = True

        def backward_of(self, loss: Tensor) -> None:
            loss.backward() if self.past else self.manual_backward(loss)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            opt = self.optimizers()
            zeroing = opt.optimizer if bare else opt
            zeroing.zero_grad()
            if by == "zero_grad":
                self.backward_of(100 * self.loss(batch))
                zeroing.zero_grad()
            self.backward_of(self.loss(batch))
            if by == "clip_gradients":
                self.clip_gradients(opt, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
            elif by == "clip_grad_value_":
                clip_grad_value_(self.parameters(), 1e-3)
            opt.step()

    past, known = PastLightning(optimizer=sgd), PastLightning(optimizer=sgd)
    known.past = False
    found, expected = (fitted(module, strategy(), epochs=1) for module in (past, known))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_heads_share_is_clipped_by_the_norm_of_the_head_whose_turn_it_is() -> None:
    shares: list[tuple[Tensor, Tensor]] = []

    class Clipping(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            held = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
            norm, before = torch.stack([p.grad.norm() for p in held]).norm(), self.net.norm.weight.grad.clone()
            self.clip_gradients(opt, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            shares.append((self.net.norm.weight.grad / before, (0.1 / norm).expand_as(before)))
            opt.step()

    fitted(Clipping(optimizer=sgd), strategy(replicas="step"), epochs=1)
    for share, wanted in shares:
        torch.testing.assert_close(share, wanted, rtol=1e-4, atol=0)


# ---- a GAN against workers


class Game(Manual):
    """A GAN whose judge learns twice in a step, from gradients left by the generator's loss unless they are zeroed."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.judge = make_net()
        self.toggle = toggle

    def configure_optimizers(self) -> Any:
        return [sgd(self.net.parameters()), adamw(self.judge.parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        game(self.net, self.judge, *self.optimizers(), batch[0], self.manual_backward, self if self.toggle else None)


def game(net: Any, judge: Any, forger: Any, critic: Any, real: Tensor, backward: Any, toggle: Any) -> None:
    def fake() -> Tensor:
        return nn.functional.pad(net(real), (0, IN - 3))

    for _ in range(2):
        if toggle is not None:
            toggle.toggle_optimizer(critic)
        critic.zero_grad()
        backward(judge(fake().detach()).mean() - judge(real).tanh().mean())
        critic.step()
        if toggle is not None:
            toggle.untoggle_optimizer(critic)
    if toggle is not None:
        toggle.toggle_optimizer(forger)
    forger.zero_grad()
    backward(-judge(fake()).mean())
    forger.step()
    if toggle is not None:
        toggle.untoggle_optimizer(forger)


class Player:
    """One worker of a game."""

    def __init__(self, net: nn.Module, judge: nn.Module, factors: dict[str, Tensor], head: int) -> None:
        def own(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): A[head] for n, A in factors.items() if n.startswith(prefix)}

        self.net = Worker(net, own("net."), 2.0, sgd, freeze=False)
        self.judge = Worker(judge, own("judge."), 2.0, adamw, freeze=False)
        # Clocks of the two optimizers; a merge of one comes where it is due, in the middle of a step.
        self.steps = {"net": 0, "judge": 0}


@torch.no_grad()
def merge(workers: list[Worker]) -> None:
    for name in workers[0].layers:
        layers = [worker.layers[name] for worker in workers]
        W = layers[0].W + sum(layer.delta() for layer in layers) / len(layers)
        for layer in layers:
            layer.W, layer.V = W.clone(), layer.product()
    for name in workers[0].replicas:
        mean = sum(worker.replicas[name] for worker in workers) / len(workers)
        for worker in workers:
            worker.replicas[name].copy_(mean)


def play_literally(module: Game, factors: dict[str, Tensor], batches: list[Tensor]) -> list[Player]:
    """The same game by workers that step one after the other, where the heads have to wait for each other."""
    workers = [Player(module.net, module.judge, factors, head) for head in range(HEADS)]
    for real in batches:
        # Each worker's step as a generator that stops after every step of an optimizer, so that merges can come there.
        running = [moves(worker, part) for worker, part in zip(workers, real.chunk(HEADS), strict=True)]
        for moved in zip(*running, strict=True):
            assert len(set(moved)) == 1
            which = moved[0]
            for worker in workers:
                worker.steps[which] += 1
            if workers[0].steps[which] % PERIOD == 0:
                merge([getattr(worker, which) for worker in workers])
    return workers


def moves(worker: Player, real: Tensor) -> Any:
    net, judge = worker.net.model, worker.judge.model

    def fake() -> Tensor:
        return nn.functional.pad(net(real), (0, IN - 3))

    for _ in range(2):
        worker.judge.optimizer.zero_grad()
        (judge(fake().detach()).mean() - judge(real).tanh().mean()).backward()
        worker.judge.optimizer.step()
        yield "judge"
    worker.net.optimizer.zero_grad()
    (-judge(fake()).mean()).backward()
    worker.net.optimizer.step()
    yield "net"


@pytest.mark.parametrize("toggle", [True, False])
def test_a_game_of_two_optimizers_equals_workers_with_models_of_their_own(toggle: bool) -> None:
    module = Game(toggle)
    factors: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            explorer = trainer.strategy.explorer
            factors.update({f.name: f.A.detach().clone() for f in explorer.injection.factors.values()})

    effective: list[Any] = []

    def look(t: Any, _: Any) -> None:
        found = t.strategy.explorer.injection.factors.values()
        effective.append({f.name: [f.effective(h).clone() for h in range(HEADS)] for f in found})

    trainer(strategy(), max_epochs=1, callbacks=[Start(), Recorder(look)]).fit(module, loader(16 * 8, 16))
    x, _ = make_data(16 * 8)
    plain = Game(toggle)
    workers = play_literally(plain, factors, list(x.split(16)))
    for head, worker in enumerate(workers):
        for which in ("net", "judge"):
            for name, layer in getattr(worker, which).layers.items():
                seen = effective[-1][f"{which}.{name}"][head]
                torch.testing.assert_close(seen, layer.W + layer.delta(), **EXACT)


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_what_is_toggled_off_gets_no_gradient_in_its_replicas_either(execution: str) -> None:
    class Forgery(Game):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            forger, critic = self.optimizers()
            with self.toggled_optimizer(forger):
                self.manual_backward(-self.judge(nn.functional.pad(self.net(batch[0]), (0, IN - 3))).mean())
                if batch_idx % 2:
                    forger.step()
            if batch_idx % 2 == 0:
                forger.step()
            forger.zero_grad()
            critic.step()  # there is nothing to learn for the judge, nor anything to decay

    module = Forgery(toggle=True)
    before = clone(module.state_dict())
    fitted(module, strategy(execution=execution), epochs=1)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("net.")}


# ---- once for all heads


def test_steps_are_counted_once() -> None:
    module = Game(toggle=False)
    t = trainer(strategy(), max_epochs=1, profiler=SimpleProfiler())
    t.fit(module, loader(16 * 4, 16))
    assert t.global_step == 3 * 4


def test_schedulers_step_once() -> None:
    class Scheduled(Manual):
        def configure_optimizers(self) -> Any:
            opt = sgd(self.parameters())
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()

    module = Scheduled()
    t = trainer(strategy(), max_epochs=1)
    t.fit(module, loader(16 * 3, 16))
    assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert "step" not in vars(t.lr_scheduler_configs[0].scheduler)


def test_what_heads_log_is_logged_once_as_their_mean() -> None:
    manual, automatic = Manual(), Module()
    seen = {}
    for module, s in ((manual, strategy()), (automatic, strategy(execution="sequential"))):
        logged = Recorder(lambda t, _: float(t.callback_metrics["loss"]))
        trainer(s, max_epochs=1, callbacks=[logged]).fit(module, loader(16 * 4, 16))
        seen[module] = logged.seen
    assert seen[manual] == seen[automatic]


# ---- what can't be


class Choosy(Manual):
    """Steps where the data says so."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch[0].mean() > 0:
            opt.step()
        opt.zero_grad()


def test_heads_that_step_unequally_are_an_error() -> None:
    module = Choosy()
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=r"equally often; after the same number of steps .* came to step .*none"):
        trainer(strategy(), max_epochs=1).fit(module, loader(160, 16))
    assert threading.active_count() == before
    assert type(module.net.first) is nn.Linear and nn.Module.zero_grad.__module__ == "torch.nn.modules.module"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_in_the_turn_of_a_head_ends_all_turns(error: BaseException) -> None:
    class Failing(Manual):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Failing.calls += 1
            if Failing.calls == 4 * HEADS + 2:
                raise error
            super().training_step(batch, batch_idx)

    module = Failing()
    before = threading.active_count()
    with pytest.raises(ValueError if isinstance(error, ValueError) else SystemExit):
        trainer(strategy(), max_epochs=1).fit(module, loader(160, 16))
    assert threading.active_count() == before
    assert type(module.net.first) is nn.Linear
    assert all(p.requires_grad for p in module.parameters())


def test_heads_in_turn_compute_on_the_stream_of_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stream torch turns to its device, too."""
    streams = threading.local()
    streams.now = "one of the user's"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.now)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(streams, "now", stream))
    turn = _Turn(0, torch.cuda.current_stream)
    turn.go_on()
    assert turn.output == "one of the user's"


class Typed(Manual):
    """Notes torch's default dtype, which precisions in one dtype change for a step, whenever it can be another."""

    fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        before = torch.get_default_dtype()
        super().training_step(batch, batch_idx)
        self.seen = {*getattr(self, "seen", set()), before, torch.get_default_dtype()}
        if self.fails:
            raise RuntimeError("no more")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_the_default_dtype_is_each_heads_own_and_comes_back(precision: Any, dtype: torch.dtype, fails: bool) -> None:
    seen = []

    def optimizer(params: Any) -> Optimizer:
        made = sgd(params)
        made.register_step_pre_hook(lambda *_: seen.append(torch.get_default_dtype()))
        return made

    module = Typed(make_net(), optimizer)
    module.fails = fails
    data = DataLoader(TensorDataset(*make_data(16)), batch_size=16)
    try:
        with pytest.raises(RuntimeError, match="no more") if fails else contextlib.nullcontext():
            trainer(strategy(), max_steps=1, precision=precision).fit(module, data)
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {dtype} and (fails or module.seen == {dtype})


def test_a_weight_used_elsewhere_loses_its_heads_and_trains_right() -> None:
    class Penalised(Manual):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.net.second.weight.square().mean()

    s = strategy()
    module = Penalised(optimizer=sgd)
    with pytest.warns(UserWarning, match=r"net\.second \(it is used outside its layer, too\)"):
        trainer(s, max_epochs=2).fit(module, loader(16 * 4, 16))

    class Same(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1]) + self.net.second.weight.square().mean()

    other = Same(optimizer=sgd)
    with pytest.warns(UserWarning, match=r"net\.second"):
        trainer(strategy(execution="sequential"), max_epochs=2).fit(other, loader(16 * 4, 16))
    torch.testing.assert_close(clone(module.state_dict()), clone(other.state_dict()), **EXACT)
    assert not any("_lte" in vars(m) for m in module.modules())


class BatchNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)  # type: ignore[assignment]


def test_running_statistics_are_each_heads_own() -> None:
    manual = fitted(Manual(make_net(BatchNormed)), strategy())
    automatic = fitted(Module(make_net(BatchNormed)), strategy(execution="sequential"))
    torch.testing.assert_close(manual, automatic, rtol=0, atol=0)


def test_a_merge_of_one_optimizer_leaves_the_statistics_of_another_alone() -> None:
    """The critic's step, with its merge, comes between the forger's forward and backward."""

    class Between(Game):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            forger, critic = self.optimizers()
            fake = nn.functional.pad(self.net(batch[0]), (0, IN - 3))
            critic.zero_grad()
            self.manual_backward(self.judge(fake.detach()).mean() - self.judge(batch[0]).tanh().mean())
            critic.step()
            forger.zero_grad()
            self.manual_backward(-self.judge(fake).mean())
            forger.step()

    module = Between(toggle=False)
    module.net, module.judge = make_net(BatchNormed), make_net(BatchNormed)
    trainer(strategy(), max_epochs=1).fit(module, loader(16 * 4, 16))
    assert not torch.equal(module.net.norm.running_mean, module.judge.norm.running_mean)


def test_a_run_goes_on_from_a_checkpoint_in_the_middle_of_a_period(tmp_path: Any) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    whole, resumed = Game(toggle=True), Game(toggle=True)
    t = trainer(strategy(), max_epochs=3, enable_checkpointing=True, callbacks=[keep()])
    t.fit(whole, loader(16 * 4, 16))
    path = tmp_path / "epoch=0.ckpt"
    assert [clock["step"] % PERIOD for clock in torch.load(path)["lte"]["clocks"]] == [1, 2]
    trainer(strategy(), max_epochs=3).fit(resumed, loader(16 * 4, 16), ckpt_path=path)
    torch.testing.assert_close(clone(resumed.state_dict()), clone(whole.state_dict()), rtol=0, atol=0)


def played(world_size: int) -> tuple[int, dict[str, Tensor]]:
    rank = int(os.environ.get("RANK", 0))
    x, y = make_data(16 * 7)
    rows = torch.arange(len(x)).view(7, world_size, -1)[:, rank].flatten()
    module = Game(toggle=True)
    t = trainer(strategy(), devices=world_size, max_epochs=1, use_distributed_sampler=False)
    t.fit(module, DataLoader(TensorDataset(x[rows], y[rows]), 16 // world_size))
    return t.global_step, clone(module.state_dict())


def test_heads_play_the_same_game_wherever_they_sit() -> None:
    [(steps, alone)] = [played(1)]
    for world_size in (2, 4):
        for steps_here, weights in run(played, world_size, world_size, group=False):
            assert steps_here == steps == 3 * 7
            torch.testing.assert_close(weights, alone, **EXACT)


# ---- what a step leaves on its module and finds again


class KeepsOnModule(Manual):
    """As in pix2pix: what a step has made is an attribute of the module, which another part of the step reads."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()
        self.x, self.net.y = batch
        for _ in range(2):
            opt.zero_grad()
            self.manual_backward(cross_entropy(self.net(self.x), self.net.y))
            opt.step()
        del self.x


class KeepsLocally(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers()
        for _ in range(2):
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()


def test_attributes_that_a_step_sets_are_each_heads_own() -> None:
    module = KeepsOnModule()
    torch.testing.assert_close(fitted(module, strategy()), fitted(KeepsLocally(), strategy()), rtol=0, atol=0)
    assert not hasattr(module, "x") and hasattr(module.net, "y")


@pytest.mark.parametrize("heads", [1, HEADS])
def test_steps_that_go_past_lightning_are_not_counted(heads: int) -> None:
    t = trainer(strategy(heads), max_epochs=1)
    t.fit(Bare(), loader(16 * 4, 16))
    assert t.global_step == 0


def test_an_optimizer_whose_step_takes_no_closure_steps() -> None:
    class Plain(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            super().step()

    plain = fitted(Bare(optimizer=lambda p: Plain(p, lr=0.1)), strategy())
    torch.testing.assert_close(
        plain, fitted(Bare(optimizer=partial(torch.optim.SGD, lr=0.1)), strategy()), rtol=0, atol=0
    )


def test_a_step_that_catches_everything_ends_all_the_same() -> None:
    class Stubborn(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for _ in range(3):
                with contextlib.suppress(BaseException):
                    Manual.training_step(self, batch, batch_idx)
                if batch_idx == 1 and len(batch[0]) == SLICE:
                    raise ValueError("mine")

    before = threading.active_count()
    with pytest.raises(ValueError, match="mine"):
        trainer(strategy(), max_epochs=1).fit(Stubborn(), loader(160, 16))
    assert threading.active_count() == before


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("execution", ["auto", "batched"])
def test_a_gradient_scaler_of_the_users_own_unscales_what_has_lost_its_heads(execution: Any, unscales: bool) -> None:
    """Before it does so, a weight that is used elsewhere must be in the optimizer, with the gradient that it has."""

    class Penalised(Manual):
        scaler: torch.amp.GradScaler

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            opt = self.optimizers().optimizer
            opt.zero_grad()
            loss = self.loss(batch) + self.net.second.weight.square().mean()
            self.scaler.scale(loss).backward()
            if unscales:
                self.scaler.unscale_(opt)
            self.scaler.step(opt)
            self.scaler.update()

    heads = 1 if execution == "auto" else HEADS
    ends = []
    for enabled in (False, True):
        # A power of two takes nothing from the gradients.
        Penalised.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        with pytest.warns(UserWarning, match=r"net\.second \(it is used outside its layer, too\)"):
            ends.append(fitted(Penalised(optimizer=sgd), strategy(heads, execution=execution)))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    assert torch.amp.GradScaler.unscale_.__module__ == "torch.amp.grad_scaler"


class Overflowing(Manual):
    """The first gradients are infinite on one of two devices."""

    def __init__(self) -> None:
        super().__init__(optimizer=sgd)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        opt = self.optimizers().optimizer
        opt.zero_grad()
        factor = torch.inf if batch_idx == 0 and self.global_rank == 1 else 1.0
        self.scaler.scale(self.loss(batch) * factor).backward()
        self.scaler.step(opt)
        self.scaler.update()


def scaled_on_two() -> tuple[float, dict[str, Tensor]]:
    module = Overflowing()
    trainer(strategy(2, full_rank_steps=2), devices=2, max_epochs=1).fit(module, loader(16 * 8))
    return module.scaler.get_scale(), clone(module.state_dict())


def test_before_heads_begin_gradient_scalers_leave_out_the_same_steps_on_all_devices() -> None:
    first, second = run(scaled_on_two, 2, group=False)
    assert first[0] == second[0] == 512
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)


def test_a_gradient_scaler_of_the_users_own_is_refused() -> None:
    module = Manual()
    module.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"received scaler with 4 heads on a device.*precision='16-mixed'"):
        trainer(strategy(), max_epochs=1).fit(module, loader())
    assert type(module.net.first) is nn.Linear
