"""What real LightningModules do to their weights while they train; each is trained right, or refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize

from lightning_lte import LTEStrategy
from tests import clipping
from tests.modules import (
    IN,
    RANK,
    WIDTH,
    Module,
    Net,
    Recorder,
    ScaledNet,
    Slices,
    clone,
    loader,
    make_net,
    sgd,
    trainer,
)
from tests.processes import run


def train(module: Module, heads: int = 1, steps: int = 7, callbacks: Any = (), **choices: Any) -> LTEStrategy:
    strategy = LTEStrategy(heads, 3, rank=RANK, **choices)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*isinstance.treespec.*")
        warnings.filterwarnings("ignore", ".*val_dataloader.*")
        trainer(strategy, max_steps=steps, callbacks=list(callbacks)).fit(module, loader(160))
    return strategy


def role(strategy: LTEStrategy, name: str) -> tuple[str, str]:
    entry = strategy.report().entry(name)
    return entry.role, entry.reason


class Functional(Net):
    """Uses a weight as a tensor, too, as tied decoders do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + (x @ self.first.weight.T).mean())


class Decoded(Net):
    """Uses a weight first as a tensor and then in its layer, under activation checkpointing that autograd can't see."""

    def forward(self, x: Tensor) -> Tensor:
        again = torch.utils.checkpoint.checkpoint(lambda t: t @ self.first.weight.T, x, use_reentrant=False)
        return super().forward(x) * (1 + again.mean())


class Squashed(Net):
    """Normalises a weight in every forward, as SwAV's prototypes are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.copy_(nn.functional.normalize(self.first.weight.clone(), dim=1))
        return super().forward(x)


class Masked(Net):
    """Multiplies the data of a weight, past autograd's eyes, as PixelCNN's masked convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(WIDTH, IN).tril())

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data *= self.mask
        return super().forward(x)


class SelfCheckpoint(torch.autograd.Function):
    """Runs a layer again in backward and differentiates its parameters only, as older reversible code does."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.layer, ctx.params = layer, params
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.layer(x)
            inner = torch.autograd.grad(y, (x, *ctx.params), gradients)
        return (None, *inner)


class Rerun(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = SelfCheckpoint.apply(self.first, x, *self.first.parameters())
        return self.out(torch.tanh(self.second(torch.tanh(self.norm(x)))))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Functional, "used outside its layer"),
        (Decoded, "used outside its layer"),
        (Squashed, "writes to it"),
        (Masked, "writes to it"),
        (Rerun, "torch.autograd.grad"),
    ],
)
def test_what_cannot_be_factored_is_a_replica_from_the_first_step_on(net: Callable[[], nn.Module], words: str) -> None:
    """As exact as if the user had excluded it."""
    states = []
    for choices in ({}, {"exclude_modules": ["net.first"]}):
        module = Module(make_net(net), sgd)
        strategy = train(module, **choices)
        assert role(strategy, "net.first.weight")[0] == "replica"
        assert role(strategy, "net.second.weight")[0] == "factored"
        states.append(clone(module.state_dict()))
        if not choices:
            assert words in role(strategy, "net.first.weight")[1]
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("net", [Functional, Squashed, Masked])
def test_several_heads_share_it(net: Callable[[], nn.Module], execution: Any) -> None:
    module = Module(make_net(net), sgd)
    before = clone(module.state_dict())
    with pytest.warns(UserWarning, match=r"Trained without heads, as replicas: net\.first"):
        strategy = train(module, heads=4, execution=execution)
    assert role(strategy, "net.first.weight")[0] == "replica"
    assert strategy.report().entry("net.first.weight").copies == 1
    assert not torch.equal(module.net.first.weight, before["net.first.weight"])


class Centred(Net):
    """Writes to a bias and uses the weight of a norm as a tensor, of which each head would have its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.bias.sub_(self.first.bias.mean())
        return super().forward(x) * self.norm.weight.mean()


def test_what_is_written_or_used_elsewhere_is_shared_by_the_heads() -> None:
    module = Module(make_net(Centred), sgd)
    strategy = train(module, heads=4, execution="batched")
    copies = {entry.name: entry.copies for entry in strategy.report().entries}
    assert copies["net.first.bias"] == copies["net.norm.weight"] == 1
    assert copies["net.norm.bias"] == copies["net.first.weight"] == 4
    # One step after the last centring.
    assert abs(float(module.net.first.bias.mean())) < 1e-2 and not torch.equal(
        module.net.first.bias, make_net(Centred).first.bias
    )


def test_adaptive_loss_weights_ask_for_a_gradient() -> None:
    """VQGAN weighs its losses by their gradients on the last layer."""

    class Weighed(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            first, second = cross_entropy(logits, batch[1]), logits.square().mean()
            last = self.net.second.weight
            norms = [torch.autograd.grad(own, last, retain_graph=True)[0].norm() for own in (first, second)]
            return first + (norms[0] / (norms[1] + 1e-4)).clamp(0, 10).detach() * second

    states = []
    for choices in ({}, {"exclude_modules": ["second"]}):
        module = Weighed(optimizer=sgd)
        strategy = train(module, **choices)
        states.append(clone(module.state_dict()))
        if not choices:
            assert "torch.autograd.grad" in role(strategy, "net.second.weight")[1]
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-14)


def test_first_order_maml_sets_all_gradients_and_is_refused_by_name() -> None:
    class Maml(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            learner = copy.deepcopy(self.net)
            assert type(learner.first) is nn.Linear
            cross_entropy(learner(batch[0]), batch[1]).backward()
            opt = self.optimizers()
            opt.zero_grad()
            for own, inner in zip(self.net.parameters(), learner.parameters(), strict=True):
                own.grad = inner.grad
            opt.step()

    with pytest.raises(RuntimeError, match=r"none is left .*net\.first \(something sets its gradient\)"):
        train(Maml())


class Teacher(Module):
    """A momentum teacher that sits in the module and in the optimizer, as BYOL, MoCo and DINO have it."""

    def __init__(self, flagged: bool) -> None:
        super().__init__(optimizer=sgd)
        self.teacher = copy.deepcopy(self.net)
        self.teacher.requires_grad_(flagged)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - target).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for own, student in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.mul_(0.9).add_(student, alpha=0.1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("flagged", [True, False])
def test_momentum_teachers_follow_their_students(flagged: bool, heads: int) -> None:
    module = Teacher(flagged)
    start = module.teacher.first.weight.detach().clone()
    students: list[Tensor] = []

    class Keep(Callback):
        def on_train_batch_end(self, t: Any, m: Any, *args: Any) -> None:
            students.append(m.net.first.weight.detach().clone())

    strategy = train(module, heads=heads, callbacks=[Keep()])
    assert role(strategy, "teacher.first.weight")[0] == "replica"
    assert role(strategy, "net.first.weight")[0] == "factored"
    expected = start
    for student in students:
        expected = 0.9 * expected + 0.1 * student
    torch.testing.assert_close(module.teacher.first.weight.detach(), expected)
    assert strategy.report().entry("teacher.first.bias").copies == 1


def test_weights_that_are_clipped_after_each_step() -> None:
    """WGAN's critic, whose data is written past autograd's eyes when the step is over."""

    class Clipped(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            for own in self.net.second.parameters():
                own.data.clamp_(-0.05, 0.05)

    module = Clipped(optimizer=sgd)
    strategy = train(module)
    assert role(strategy, "net.second.weight")[0] == "replica"
    assert role(strategy, "net.first.weight")[0] == "factored"
    assert module.net.second.weight.abs().max() <= 0.05


@pytest.mark.parametrize("heads", [1, 4])
def test_what_is_written_later_on_loses_its_heads_then(heads: int) -> None:
    class Later(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 4:
                self.net.first.weight.data *= 0.9
                self.net.first.bias.data *= 0.9

    with pytest.warns(UserWarning, match=r"Trained without heads, as replicas: net\.first"):
        strategy = train(Later(optimizer=sgd), heads=heads, steps=9)
    assert role(strategy, "net.first.weight")[0] == "replica"
    assert role(strategy, "net.second.weight")[0] == "factored"


def test_what_is_used_later_on_loses_its_heads_then() -> None:
    class Later(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if self.trainer.global_step < 4 else loss + self.net.first.weight.square().mean()

    with pytest.warns(UserWarning, match=r"Trained without heads, as replicas: net\.first"):
        strategy = train(Later(optimizer=sgd), heads=4, steps=9)
    assert role(strategy, "net.first.weight")[0] == "replica"


def written_late_on_two_devices(everywhere: bool) -> tuple[dict[str, Tensor], str]:
    class Later(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 4 and (everywhere or self.global_rank == 1):
                self.net.first.weight.data *= 0.9

    module = Later(optimizer=sgd)
    strategy = LTEStrategy(4, 3, rank=RANK, execution="batched")
    trainer(strategy, devices=2, max_epochs=1).fit(module, loader(16 * 2 * 10))
    return clone(module.state_dict()), role(strategy, "net.first.weight")[0]


@pytest.mark.parametrize("everywhere", [True, False])
def test_devices_hear_at_the_next_merge_of_what_one_found_later(everywhere: bool) -> None:
    (first, one), (second, other) = run(written_late_on_two_devices, 2, everywhere, group=False)
    assert one == other == "replica"
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def all_written_on_one_of_two_devices() -> str:
    class Later(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 4 and self.global_rank == 1:
                for own in self.parameters():
                    own.data *= 0.5

    try:
        trainer(LTEStrategy(2, 3, rank=RANK), devices=2, max_epochs=1).fit(Later(optimizer=sgd), loader(16 * 2 * 10))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_all_weights_written_on_one_device_alone_are_an_error_on_all() -> None:
    for said in run(all_written_on_one_of_two_devices, 2, group=False, timeout_s=120):
        assert "written on ranks [1] only" in said


def test_clamping_all_weights_in_each_step_is_refused() -> None:
    class Clipped(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            for own in self.net.parameters():
                own.data.clamp_(-0.05, 0.05)

    with pytest.warns(UserWarning, match="All weights were written"), pytest.raises(RuntimeError, match="none is left"):
        train(Clipped(optimizer=sgd), steps=9)


@pytest.mark.parametrize("heads", [1, 4])
def test_what_is_pruned_loses_its_heads(heads: int) -> None:
    class Prune(ModelPruning):
        def on_train_epoch_end(self, *args: Any) -> None: ...

        def on_train_batch_end(self, t: Any, module: Any, *args: Any) -> None:
            if t.global_step == 4:
                self.apply_pruning(0.5)

    module = Module(optimizer=sgd)
    callback = Prune("l1_unstructured", parameters_to_prune=[(module.net.second, "weight")])
    strategy = train(module, heads=heads, callbacks=[callback], steps=9)
    assert role(strategy, "net.second.weight") == ("replica", "another tensor was put in its place")
    assert (module.net.second.weight == 0).float().mean() > 0.3


def test_gradual_unfreezing() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net.first)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net.first, optimizer)

    class Tuned(Module):
        def configure_optimizers(self) -> Any:
            return sgd(p for p in self.parameters() if p.requires_grad)

    module = Tuned()
    before = clone(module.state_dict())
    seen = Recorder(lambda t, m: torch.equal(m.net.first.weight, before["net.first.weight"]))
    strategy = LTEStrategy(4, 3, rank=RANK)
    trainer(strategy, max_epochs=2, callbacks=[Unfreeze(), seen]).fit(module, loader())
    assert seen.seen == [True] * 3 + [False] * 3
    assert role(strategy, "net.first.weight") == ("replica", "came into an optimizer while training ran")
    assert role(strategy, "net.second.weight")[0] == "factored"


@pytest.mark.parametrize("heads", [1, 4])
def test_weights_may_be_frozen_as_heads_begin(heads: int) -> None:
    class Frozen(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net.first.requires_grad_(not 1 <= self.trainer.global_step < 6)

    module = Frozen(optimizer=sgd)
    seen = Recorder(lambda t, m: clone(m.net.first.state_dict()))
    strategy = train(module, heads=heads, steps=9, full_rank_steps=2, callbacks=[seen])
    assert role(strategy, "net.first.weight")[0] == "factored"
    for state in seen.seen[1:6]:
        torch.testing.assert_close(state, seen.seen[0], rtol=0, atol=0)
    for name, value in module.net.first.state_dict().items():
        assert not torch.equal(value, seen.seen[0][name])


def unfrozen_on_two_devices() -> tuple[dict[str, Tensor], str]:
    class Late(Module):
        def configure_optimizers(self) -> Any:
            return sgd(p for name, p in self.named_parameters() if "first" not in name)

        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 2:
                self.trainer.optimizers[0].add_param_group({"params": list(self.net.first.parameters())})

    module = Late()
    strategy = LTEStrategy(2, 3, rank=RANK)
    trainer(strategy, devices=2, max_epochs=1).fit(module, loader(16 * 2 * 7))
    return clone(module.state_dict()), role(strategy, "net.first.weight")[1]


def test_what_comes_into_an_optimizer_later_is_averaged_at_merges() -> None:
    (first, why), (second, _) = run(unfrozen_on_two_devices, 2, group=False)
    assert why == "came into an optimizer while training ran"
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def replaced_on_two_devices() -> tuple[dict[str, Tensor], tuple[str, str]]:
    class Uneven(Functional):
        """Only one device sees the use; both have to know."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.distributed.get_rank() == 1 else Net.forward(self, x)

    module = Module(make_net(Uneven), sgd)
    strategy = LTEStrategy(4, 3, rank=RANK, execution="batched")
    trainer(strategy, devices=2, max_epochs=1).fit(module, loader(16 * 2 * 7))
    return clone(module.state_dict()), role(strategy, "net.first.weight")


def test_devices_agree_on_what_cannot_be_factored() -> None:
    (first, one), (second, other) = run(replaced_on_two_devices, 2, group=False)
    assert one == other == ("replica", "it is used outside its layer, too")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_resumed_run_knows_what_could_not_be_factored(tmp_path: Any) -> None:
    class Once(Functional):
        """As a loss that is used in the first epoch only."""

        used = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.used else Net.forward(self, x)

    def fit(steps: int, resume: Any = None) -> Module:
        module = Module(make_net(Once), sgd)
        module.net.used = resume is None
        strategy = LTEStrategy(4, 3, rank=RANK, execution="batched")
        t = trainer(strategy, max_steps=steps)
        t.fit(module, loader(160), ckpt_path=resume)
        assert role(strategy, "net.first.weight") == ("replica", "it is used outside its layer, too")
        t.save_checkpoint(tmp_path / "last.ckpt")
        return module

    fit(4)
    fit(7, resume=tmp_path / "last.ckpt")


def test_a_resumed_run_knows_what_heads_in_turn_share(tmp_path: Path) -> None:
    """A clamp that changes nothing is told in the first steps alone, which are over when heads get copies."""

    class Clamping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            return cross_entropy(logits - logits.mean(0), batch[1])  # samples meet, so heads take turns

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.net.gain.clamp_(-9, 9)

    def fit(steps: int, resume: Any = None) -> dict[str, Tensor]:
        module = Clamping(make_net(ScaledNet), sgd)
        strategy = LTEStrategy(4, 3, rank=RANK)
        t = trainer(strategy, max_steps=steps)
        t.fit(module, Slices(1, 0), ckpt_path=resume)
        t.save_checkpoint(tmp_path / "last.ckpt")
        assert strategy.report().entry("net.gain").copies == 1
        assert strategy.report().entry("net.norm.bias").copies == 4
        return clone(module.state_dict())

    fit(3)
    resumed, whole = fit(7, resume=tmp_path / "last.ckpt"), fit(7)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_switching_requires_grad_to_and_fro() -> None:
    """Energy models freeze themselves while they sample inside the step."""

    class Energy(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            flags = [p.requires_grad for p in self.net.parameters()]
            self.net.requires_grad_(False)
            x = batch[0].clone().requires_grad_()
            for _ in range(2):
                x = x - 0.01 * torch.autograd.grad(self.net(x).sum(), x)[0].detach()
                x.requires_grad_()
            for p, flag in zip(self.net.parameters(), flags, strict=True):
                p.requires_grad_(flag)
            loss = super().training_step((x.detach(), batch[1]), batch_idx)
            assert all(p.requires_grad for p in self.net.parameters())
            return loss

    for heads in (1, 4):
        module = Energy(optimizer=sgd)
        strategy = train(module, heads=heads)
        assert role(strategy, "net.first.weight")[0] == "factored"


class Game(Module):
    """A GAN in manual optimization: the generator steps less often, and each side is toggled while the other learns."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = make_net()
        self.toggle = toggle
        self.judge_moved: list[bool] = []

    def configure_optimizers(self) -> Any:
        return [sgd(self.net.parameters()), sgd(self.judge.parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        generator, judge = self.optimizers()
        pad = nn.functional.pad

        def fool() -> Tensor:
            return -self.judge(pad(self.net(batch[0]), (0, IN - 3))).mean()

        if batch_idx % 2 == 0:
            if self.toggle:
                self.toggle_optimizer(generator)
            self.manual_backward(fool())
            generator.step()
            generator.zero_grad()
            if self.toggle:
                self.untoggle_optimizer(generator)
                factors = self.trainer.strategy.explorer.injection.factors.values()
                self.judge_moved.append(any(f.A.grad is not None for f in factors if "judge" in f.name))
        if self.toggle:
            self.toggle_optimizer(judge)
        judge.zero_grad()
        fake = self.judge(pad(self.net(batch[0]).detach(), (0, IN - 3))).mean()
        self.manual_backward(fake - self.judge(batch[0]).mean())
        judge.step()
        if self.toggle:
            self.untoggle_optimizer(judge)


def test_each_optimizer_has_a_merge_clock_of_its_own() -> None:
    module = Game()
    clocks = Recorder(lambda t, _: [(c.step, c.merges) for c in t.strategy.explorer.clocks])
    before = clone(module.state_dict())
    strategy = LTEStrategy(1, 3, rank=RANK)
    trainer(strategy, max_epochs=1, callbacks=[clocks]).fit(module, loader(16 * 7))
    assert clocks.seen == [
        [(1, 0), (1, 0)], [(1, 0), (2, 0)], [(2, 0), (3, 1)], [(2, 0), (4, 1)], [(3, 1), (5, 1)], [(3, 1), (6, 2)],
        [(4, 1), (7, 2)],
    ]  # fmt: skip
    # What is toggled off gets no gradient in its heads either.
    assert module.judge_moved == [False] * 4
    for name in ("net.first.weight", "judge.first.weight"):
        assert role(strategy, name)[0] == "factored"
        assert not torch.equal(module.state_dict()[name], before[name])


def test_without_toggling_zero_grad_reaches_the_heads() -> None:
    states = []
    for toggle in (True, False):
        module = Game(toggle)
        train(module)
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_parametrized_layers_are_replicas(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = make_net()
    wrap(net.first)
    module = Module(net.double(), sgd)
    before = clone(module.state_dict())
    strategy = train(module, heads=4)
    roles = {e.name: e.role for e in strategy.report().entries}
    assert not any(r == "factored" for name, r in roles.items() if "first" in name)
    assert roles["net.second.weight"] == "factored"
    changed = [name for name in before if "first" in name and not torch.equal(before[name], module.state_dict()[name])]
    assert changed


def test_parameters_that_only_an_optimizer_knows_are_averaged_too() -> None:
    outside = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    class Outside(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.net(batch[0]) + outside, batch[1])

        def configure_optimizers(self) -> Any:
            return sgd([*self.parameters(), outside])

    strategy = train(Outside())
    assert role(strategy, "outside.0") == ("replica", "an optimizer holds it, and the module does not")
    assert outside.any()


def test_gradient_penalties_go_through_the_heads_twice() -> None:
    class Penalised(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            logits = self.net(x)
            (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            return cross_entropy(logits, batch[1]) + gradient.square().sum(1).mean()

    states = []
    for execution in ("batched", "sequential"):
        module = Penalised(optimizer=sgd)
        strategy = train(module, heads=4, execution=execution)
        assert role(strategy, "net.first.weight")[0] == role(strategy, "net.second.weight")[0] == "factored"
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=1e-10, atol=1e-12)


class Pixels(nn.Module):
    """A convolution between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.out = nn.Linear(IN, 32), nn.Conv2d(2, 16, 3), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(torch.tanh(self.first(x)).unflatten(1, (2, 4, 4)))).flatten(1))


def by_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (torch.ones_like(x),))[1]  # type: ignore[no-any-return]


def by_vjp(net: nn.Module, x: Tensor) -> Tensor:
    y, pulled_back = torch.func.vjp(net, x)
    return pulled_back(torch.ones_like(y))[0]  # type: ignore[no-any-return]


def by_grad(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda own: net(own).square().sum())(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("derivative", [by_jvp, by_vjp, by_grad])
def test_penalties_through_transforms_of_torch_func_are_the_same_in_turns(derivative: Callable[..., Tensor]) -> None:
    class Penalised(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            penalty = derivative(self.net, batch[0]).square().sum(1).mean()
            return super().training_step(batch, batch_idx) + 0.01 * penalty

    states = []
    for execution in ("batched", "sequential"):
        module = Penalised(make_net(Pixels), partial(sgd, lr=0.01))
        strategy = train(module, heads=4, execution=execution)
        assert role(strategy, "net.first.weight")[0] == role(strategy, "net.conv.weight")[0] == "factored"
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=1e-10, atol=1e-12)


def test_functional_calls_compute_with_what_they_are_given() -> None:
    """A teacher whose weights live outside the module, as EMA by torch.func has them."""

    class Outside(Module):
        def __init__(self) -> None:
            super().__init__(optimizer=sgd)
            self.teacher = {n: p.detach().clone() * 0.5 for n, p in self.net.named_parameters()}
            self.worst = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            plain = make_net()
            plain.load_state_dict({**plain.state_dict(), **self.teacher})
            with torch.no_grad():
                found = torch.func.functional_call(self.net, self.teacher, batch[0])
                self.worst = max(self.worst, float((found - plain(batch[0])).abs().max()))
            return super().training_step(batch, batch_idx)

    for heads, execution in ((1, "auto"), (4, "batched"), (4, "sequential")):
        module = Outside()
        strategy = train(module, heads=heads, execution=execution)
        assert module.worst < 1e-12
        assert role(strategy, "net.first.weight")[0] == "factored"


def clip_in_hook(module: Module) -> None:
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-7)


def clip_by_name_in_hook(module: Module) -> None:
    clip_grad_norm_(module.net.parameters(), max_norm=1e-7)


def clip_values_in_hook(module: Module) -> None:
    nn.utils.clip_grad_value_(module.parameters(), 1e-8)


def clip_in_another_module(module: Module) -> None:
    clipping.clip(module.parameters(), 1e-7)


def clip_what_optimizers_hold(module: Module) -> None:
    for group in module.trainer.optimizers[0].param_groups:
        clip_grad_norm_(group["params"], 1e-7)


CLIPS = [clip_in_hook, clip_by_name_in_hook, clip_values_in_hook, clip_in_another_module, clip_what_optimizers_hold]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "batched"), (4, "sequential")])
def test_clipping_by_hand_reaches_the_heads(clip: Callable[[Module], None], heads: int, execution: Any) -> None:
    class Clipping(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            clip(self)

    module = Clipping(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    before = clone(module.state_dict())
    train(module, heads=heads, execution=execution)
    moved = [float((value - before[name]).abs().max()) for name, value in module.state_dict().items()]
    assert 0 < max(moved) < 1e-5
    assert (
        torch.nn.utils.clip_grad_norm_ is clip_grad_norm_ and clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"
    )


@pytest.mark.parametrize("clip", [clip_in_another_module, clip_what_optimizers_hold])
def test_clipping_by_hand_takes_each_heads_own_norm(clip: Callable[[Module], None]) -> None:
    norms: list[Tensor] = []

    class Clipping(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            clip(self)
            gradients = [p.grad.flatten(1) for p in self.trainer.strategy.explorer.per_head]
            norms.append(torch.cat(gradients, dim=1).norm(dim=1))

    train(Clipping(optimizer=sgd), heads=4)
    for norm in norms:
        torch.testing.assert_close(norm, torch.full_like(norm, 1e-7), rtol=0.1, atol=0)


def test_clipping_by_hand_minds_what_is_not_finite() -> None:
    class Exploding(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for f in self.trainer.strategy.explorer.injection.factors.values():
                f.B.grad[0, 0, 0] = torch.inf
            nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)

    with pytest.raises(RuntimeError, match="must be finite, as error_if_nonfinite=True was given"):
        train(Exploding(), heads=4)


@pytest.mark.parametrize("accumulate", [2])
def test_uses_elsewhere_are_found_while_gradients_accumulate(accumulate: int) -> None:
    strategy = LTEStrategy(4, 3, rank=RANK, execution="batched")
    t = trainer(strategy, max_steps=5, accumulate_grad_batches=accumulate)
    t.fit(Module(make_net(Functional), sgd), loader(160))
    assert role(strategy, "net.first.weight") == ("replica", "it is used outside its layer, too")


@pytest.mark.parametrize("size", [1e-2, 1e-6])
def test_weak_uses_elsewhere_are_found_too(size: float) -> None:
    class Penalised(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + size * self.net.first.weight.norm()

    strategy = train(Penalised(optimizer=sgd))
    assert role(strategy, "net.first.weight")[0] == "replica"


def test_clipping_other_modules_is_left_alone() -> None:
    norms: list[float] = []

    class Beside(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for own in (nn.Parameter(torch.zeros(3)), torch.zeros(3, requires_grad=True)):
                own.grad = torch.tensor([3.0, 4.0, 0.0])
                given: Any = [own] if isinstance(own, nn.Parameter) else own
                norms.append(float(nn.utils.clip_grad_norm_(given, 1.0, norm_type=1)))
                assert own.grad.abs().sum() <= 1

    train(Beside(), heads=4)
    assert set(norms) == {7.0}


def test_functions_that_were_taken_for_keeps_are_torchs_own_after_training() -> None:
    class Keeping(Module):
        def on_train_start(self) -> None:
            from torch.nn.utils import clip_grad_norm_, clip_grad_value_

            self.clips = [(clip_grad_norm_, 1.0), (clip_grad_value_, 1e-3)]

    module = Keeping()
    train(module, heads=4)
    for clip, limit in module.clips:
        for param in module.parameters():
            param.grad = torch.full_like(param, 100.0)
        clip(module.parameters(), limit)
        assert torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm() <= 1.0


def test_functions_that_others_have_exchanged_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(before: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(before.__name__)
            return before(*args, **kwargs)

        return run

    class Zeroing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            nn.Linear(1, 1).zero_grad()
            torch.amp.GradScaler("cpu", enabled=False).unscale_(torch.optim.SGD([self.own], 0.1))
            return super().training_step(batch, batch_idx)

        def on_fit_start(self) -> None:
            self.own = torch.ones(1, requires_grad=True)
            self.own.grad = torch.ones(1)

    exchanged = [(nn.Module, "zero_grad"), (torch.amp.GradScaler, "unscale_")]
    for owner, name in exchanged:
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    theirs = [getattr(owner, name) for owner, name in exchanged]
    train(Zeroing())
    assert {"zero_grad", "unscale_"} <= set(calls)
    assert [getattr(owner, name) for owner, name in exchanged] == theirs


def test_hooks_on_parameters_keep_their_meaning() -> None:
    module = Module(optimizer=sgd)
    frozen_rows = torch.ones(WIDTH, 1, dtype=torch.float64)
    frozen_rows[:5] = 0
    module.net.second.weight.register_hook(lambda g: g * frozen_rows)
    module.net.first.bias.register_hook(lambda g: g * 0)
    before = clone(module.state_dict())
    strategy = train(module, heads=4)
    assert role(strategy, "net.second.weight") == ("replica", "gradient hooks are registered on it")
    assert torch.equal(module.net.second.weight[:5], before["net.second.weight"][:5])
    assert not torch.equal(module.net.second.weight[5:], before["net.second.weight"][5:])
    assert torch.equal(module.net.first.bias, before["net.first.bias"])


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "batched"), (4, "sequential")])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_hooks_on_parameters_that_are_registered_while_training_runs(heads: int, execution: Any, at: int) -> None:
    kept = torch.ones(WIDTH, 1, dtype=torch.float64)
    kept[:5] = 0

    class Masking(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            step = self.trainer.global_step
            if step == at:
                self.net.second.weight.register_hook(lambda g: g * kept)
                self.net.first.bias.register_hook(lambda g: g * 0)
                self.net.out.bias.register_hook(lambda g: None)
            # The step in which it is found adds what the heads had learned before.
            if step == (at + 1 if at else 0):
                self.before = clone(self.state_dict())

    module = Masking(optimizer=partial(torch.optim.SGD, lr=0.1))
    strategy = train(module, heads=heads, execution=execution)
    assert role(strategy, "net.second.weight") == ("replica", "gradient hooks are registered on it")
    after = module.state_dict()
    assert torch.equal(after["net.second.weight"][:5], module.before["net.second.weight"][:5])
    assert not torch.equal(after["net.second.weight"][5:], module.before["net.second.weight"][5:])
    assert torch.equal(after["net.first.bias"], module.before["net.first.bias"])
    assert not torch.equal(after["net.out.bias"], module.before["net.out.bias"])


def test_hooks_on_all_parameters_are_refused_with_their_removal_as_the_remedy() -> None:
    class Watched(Module):
        def on_train_start(self) -> None:
            for param in self.parameters():
                param.register_hook(lambda g: None)

    with pytest.raises(RuntimeError, match=r"gradient hooks are registered on it.*Remove the hooks.*log=None"):
        train(Watched(), heads=4)


OUTER = [
    partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("outer", [None, *OUTER], ids=["none", "momentum", "decay"])
@pytest.mark.parametrize("heads", [1, 4])
def test_what_is_frozen_half_way_stays_where_it_was_merged(heads: int, outer: Any) -> None:
    class Freezing(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            if self.trainer.global_step == 3:  # just merged
                self.net.first.requires_grad_(False)
                self.net.norm.requires_grad_(False)
                self.at = clone(self.state_dict())

    module = Freezing(optimizer=sgd)
    train(module, heads=heads, execution="batched" if heads > 1 else "auto", outer_optimizer=outer)
    for name in ("net.first.weight", "net.first.bias", "net.norm.weight", "net.norm.bias"):
        assert torch.equal(module.state_dict()[name], module.at[name])
    assert not torch.equal(module.net.second.weight, module.at["net.second.weight"])


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "batched"), (4, "sequential")])
def test_a_clamp_after_each_step_holds(heads: int, execution: Any) -> None:
    """CLIP's logit scale."""

    class Scale(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    class Clamped(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.net.scale.clamp_(0.99, 1.01)

    module = Clamped(make_net(Scale), sgd)
    train(module, heads=heads, execution=execution, steps=10)
    assert 0.99 <= float(module.net.scale) <= 1.01


class ActNorm(nn.Module):
    """Glow's, which the first batch sets: a flag says that this is done."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(IN)), nn.Parameter(torch.ones(IN))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialized:
            self.loc.data.copy_(-x.mean(0))
            self.scale.data.copy_(1 / x.std(0))
            self.initialized.fill_(1)
        return self.scale * (x + self.loc)


class Flow(Module):
    def __init__(self, manual: bool) -> None:
        super().__init__(nn.Sequential(ActNorm(), Net()).double(), lambda params: torch.optim.SGD(params, lr=1e-9))
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0] + 50), batch[1])
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "auto"), (4, "sequential")])
def test_what_the_first_data_sets_is_set_for_all_heads(manual: bool, heads: int, execution: Any) -> None:
    module = Flow(manual)
    train(module, heads=heads, execution=execution)
    assert (module.net[0].loc + 50).abs().max() < 2


def test_what_each_head_writes_to_its_own_is_not_handed_on() -> None:
    """But from the first to the second: that they all write shows in the second's turn."""

    class Decays(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            own = self.net.out.bias
            seen.append(own.detach().clone())
            own.data.mul_(0.5)
            return cross_entropy(self.net(batch[0]), batch[1])

    seen: list[Tensor] = []
    module = Decays(optimizer=lambda params: torch.optim.SGD(params, lr=1e-9))
    t = trainer(LTEStrategy(4, 10, rank=RANK, execution="sequential"), max_steps=2)
    t.fit(module, loader())
    start = seen[0]
    for turn, halvings in enumerate([0, 1, 0, 0, 1, 2, 1, 1]):
        torch.testing.assert_close(seen[turn], start / 2**halvings, rtol=1e-6, atol=1e-8)


class ClampsInStep(Module):
    def __init__(self, assigns: bool) -> None:
        super().__init__(optimizer=sgd)
        self.assigns = assigns

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for own in (self.net.first.bias, self.net.norm.weight):
            if self.assigns:
                own.data = own.data.clamp(-0.1, 0.1)
            else:
                own.data.clamp_(-0.1, 0.1)
        return super().training_step(batch, batch_idx)


def test_what_a_head_assigns_to_the_data_of_its_own_replicas_is_as_written() -> None:
    states = []
    for assigns in (False, True):
        module = ClampsInStep(assigns)
        strategy = train(module, heads=4, execution="sequential")
        assert strategy.report().entry("net.first.bias").copies == 4
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("heads", [1, 4])
def test_weights_that_are_loaded_before_the_first_step_are_the_start(heads: int) -> None:
    class Loading(Module):
        def on_train_start(self) -> None:
            with torch.no_grad():
                for own in self.parameters():
                    own.data.fill_(0.25)

    module = Loading(optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))
    strategy = train(module, heads=heads)
    assert role(strategy, "net.first.weight")[0] == "factored"
    for value in module.state_dict().values():
        torch.testing.assert_close(value, torch.full_like(value, 0.25))


def test_weights_that_are_loaded_half_way_are_gone_on_from() -> None:
    class Loading(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 4:
                self.load_state_dict({n: torch.full_like(v, 0.25) for n, v in self.state_dict().items()})

    module = Loading(optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        train(module, heads=4)
    for value in module.state_dict().values():
        torch.testing.assert_close(value, torch.full_like(value, 0.25))


@pytest.mark.parametrize("way", ["the bare optimizer", "around Lightning's"])
def test_steps_that_go_past_lightning_are_counted(way: str) -> None:
    class Raw(Module):
        def __init__(self) -> None:
            super().__init__(optimizer=sgd)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            opt = (
                self.optimizers(use_pl_optimizer=False) if way == "the bare optimizer" else self.optimizers().optimizer
            )
            opt.zero_grad()
            cross_entropy(self.net(batch[0]), batch[1]).backward()
            opt.step()

    module, automatic = Raw(), Module(optimizer=sgd)
    clocks = Recorder(lambda t, _: (t.strategy.explorer.clock.step, t.strategy.explorer.merges))
    trainer(LTEStrategy(1, 3, rank=RANK), max_epochs=1, callbacks=[clocks], limit_train_batches=7).fit(
        module, loader(160)
    )
    assert clocks.seen == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2)]
    train(automatic)
    torch.testing.assert_close(clone(module.state_dict()), clone(automatic.state_dict()), rtol=1e-12, atol=1e-14)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.batch_norm(self.first(x))))))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("net", [Net, Normed])
def test_stochastic_weight_averaging(net: Callable[[], nn.Module], heads: int) -> None:
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    module = Module(make_net(net), sgd)
    trainer(LTEStrategy(heads, 2, rank=RANK), max_epochs=4, callbacks=[swa]).fit(module, loader(48))
    assert type(module.net.first) is nn.Linear
    if net is Net:  # with batch norm, Lightning itself goes on for an epoch
        averaged = dict(swa._average_model.named_parameters())  # type: ignore[union-attr]
        for name, value in module.named_parameters():
            torch.testing.assert_close(value, averaged[name])


def test_weights_that_are_swapped_for_validation_and_back() -> None:
    class Swap(Callback):
        def on_validation_start(self, t: Any, m: Any) -> None:
            self.kept = clone(m.state_dict())
            m.load_state_dict({n: v * 0.5 for n, v in self.kept.items()})

        def on_validation_end(self, t: Any, m: Any) -> None:
            m.load_state_dict(self.kept)

    states = []
    for callbacks in ([Swap()], []):
        module = Module(optimizer=sgd)
        strategy = LTEStrategy(4, 3, rank=RANK)
        t = trainer(strategy, max_epochs=3, callbacks=callbacks, val_check_interval=2, num_sanity_val_steps=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*from outside.*")
            t.fit(module, loader(16 * 4), loader(16))
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_parametrizations_that_come_while_training_leave_a_clean_module() -> None:
    class Late(Module):
        def on_train_start(self) -> None:
            parametrizations.weight_norm(self.net.first)

    module = Late(optimizer=sgd)
    strategy = train(module, heads=4)
    assert role(strategy, "net.first.weight")[0] == "replica"
    assert [c.__name__ for c in type(module.net.first).__mro__[:3]] == ["ParametrizedLinear", "Linear", "Module"]
    parametrize.remove_parametrizations(module.net.first, "weight")
    assert type(module.net.first) is nn.Linear


def test_copies_that_users_make_by_their_own_rules_are_plain() -> None:
    class Copied(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Copied:
            twin = type(self)(self.in_features, self.out_features)
            twin.load_state_dict(self.state_dict())
            return twin.double()

    class Copying(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            twin = copy.deepcopy(self.net.first)
            expected = nn.functional.linear(batch[0], self.net.first.weight, twin.bias)
            torch.testing.assert_close(twin(batch[0]), expected)
            return super().training_step(batch, batch_idx)

    net = make_net()
    net.first = Copied(IN, WIDTH).double()
    train(Copying(net, sgd), heads=4, execution="batched")


def test_classes_that_cannot_be_extended_are_replicas() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    net = make_net()
    net.first = Final(IN, WIDTH).double()
    strategy = train(Module(net, sgd), heads=4)
    assert role(strategy, "net.first.weight") == ("replica", "Final can't be extended (final)")


class OnSphere(nn.Parameter):
    """A parameter of norm one, which its optimizer sees to, as geoopt's do with manifolds."""


class SphericalSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if isinstance(p, OnSphere):
                    p /= p.norm()
        return loss


class Spherical(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gain = OnSphere(torch.full((WIDTH,), WIDTH**-0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x))) * self.gain
        return self.out(torch.tanh(self.second(h)))


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "batched"), (4, "sequential")])
def test_parameters_of_a_class_of_their_own_are_trained_in_place(heads: int, execution: Any) -> None:
    net = make_net(Spherical)
    net.second.weight = OnSphere(net.second.weight.detach() / net.second.weight.norm())
    net.gain = OnSphere(net.gain.detach())
    start = net.second.weight.detach().clone()
    strategy = train(Module(net, partial(SphericalSGD, lr=0.1)), heads, execution=execution)
    for name in ("net.second.weight", "net.gain"):
        entry = strategy.report().entry(name)
        assert (entry.role, entry.copies) == ("replica", 1) and "OnSphere" in entry.reason
    for param in (net.second.weight, net.gain):
        assert type(param) is OnSphere
        torch.testing.assert_close(param.norm().item(), 1.0, rtol=1e-12, atol=0)
    assert not torch.equal(net.second.weight, start)


def test_layers_in_eval_mode_are_trained_as_ever() -> None:
    """transformers' from_pretrained leaves models in eval mode, and Lightning keeps them there."""
    states = []
    for mode in (True, False):
        module = Module(optimizer=sgd)
        module.net.train(mode)
        strategy = train(module, heads=4, execution="batched")
        assert role(strategy, "net.first.weight")[0] == "factored"
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_layers_that_are_called_often_or_not_at_all() -> None:
    class Uneven(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rare, self.never = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            y = self.first(x)
            for _ in range(60):
                y = torch.tanh(self.second(y))
            return self.out(y + (self.rare(y) if self.calls % 4 == 3 else 0))

    states = []
    for execution in ("batched", "sequential"):
        module = Module(make_net(Uneven), sgd)
        before = clone(module.state_dict())
        if execution == "sequential":
            module.net.calls = 0
        strategy = train(module, heads=1, execution=execution)
        assert role(strategy, "net.rare.weight")[0] == role(strategy, "net.never.weight")[0] == "factored"
        assert torch.equal(module.net.never.weight, before["net.never.weight"])
        assert not torch.equal(module.net.rare.weight, before["net.rare.weight"])
        states.append(clone(module.state_dict()))


def test_second_order_optimizers_run_with_one_head() -> None:
    class Newton(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    module = Newton()
    losses = Recorder(lambda t, _: float(t.callback_metrics["loss"]))
    strategy = LTEStrategy(1, 2, rank=RANK)
    trainer(strategy, max_epochs=8, callbacks=[losses]).fit(module, loader(16))
    assert role(strategy, "net.first.weight")[0] == "factored"
    assert losses.seen[-1] < 0.8 * losses.seen[0]


class Writes(Module):
    """Writes to its batch, as a good part of all training steps do."""

    def __init__(self, how: str, body: Callable[[], nn.Module] = nn.Identity) -> None:
        net = make_net()
        net.body = body().double()
        super().__init__(net, sgd)
        self.how = how
        self.seen: list[tuple[float, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.how == "assigns":
            batch[0] = x = batch[0] / 3
        else:
            x.div_(3)
            y[y == 0] = 1
        self.seen.append((float(x.abs().max()), int(y.min())))
        return cross_entropy(self.net.body(self.net(x)), y)


class Named(Module):
    """Takes its labels out of the batch, as code for transformers does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = batch.pop("y")
        return cross_entropy(self.net(batch["x"]), y)


def named(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
def test_labels_may_be_taken_out_of_the_batch(execution: Any) -> None:
    strategy = LTEStrategy(4, 3, rank=RANK, execution=execution)
    trainer(strategy, max_steps=4).fit(Named(optimizer=sgd), loader(64, collate_fn=named))
    assert strategy.explorer is None and strategy.report().entries
    assert ("proved on the first batch" in str(strategy.report())) == (execution == "auto")


@pytest.mark.parametrize("how", ["assigns", "writes in place"])
@pytest.mark.parametrize("body", [nn.Identity, lambda: nn.BatchNorm1d(3)], ids=["batched", "in turn"])
def test_what_a_step_writes_to_its_batch_is_written_once(how: str, body: Callable[[], nn.Module]) -> None:
    """And not by the trial as well; nor does it reach what autograd keeps of other heads' slices."""
    results = []
    for execution in ("auto", "sequential"):
        module = Writes(how, body)
        strategy = LTEStrategy(4, 3, rank=RANK, execution=execution)  # type: ignore[arg-type]
        trainer(strategy, max_steps=4).fit(module, loader(64))
        results.append(clone(module.state_dict()))
        largest = max(float(x.abs().max()) for x, _ in loader(64)) / 3
        assert max(size for size, _ in module.seen) == pytest.approx(largest)
        assert how == "assigns" or all(least == 1 for _, least in module.seen)
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-11)


class Swapping(Module):
    """Has other weights in its net, or in a part of it, while it validates."""

    def __init__(self, part: str | None) -> None:
        super().__init__(optimizer=sgd)
        self.part = part

    def on_validation_start(self) -> None:
        if self.part is not None:
            self.kept = copy.deepcopy(self.get_submodule(self.part).state_dict())
            self.get_submodule(self.part).load_state_dict({k: 0.9 * v for k, v in self.kept.items()})

    def on_validation_end(self) -> None:
        if self.part is not None:
            self.get_submodule(self.part).load_state_dict(self.kept)


def swapped_for_validation(devices: int, part: str | None) -> tuple[dict[str, Tensor], tuple[str, str]]:
    module, strategy = Swapping(part), LTEStrategy(2, 3, rank=RANK)
    # A validation after each step, the first two included.
    t = trainer(strategy, devices=devices, max_steps=7, val_check_interval=1, num_sanity_val_steps=0)
    t.fit(module, loader(160), loader(16))
    return clone(module.state_dict()), role(strategy, "net.first.weight")


@pytest.mark.parametrize("part", ["net", "net.first"])
@pytest.mark.parametrize("devices", [1, 2])
def test_weights_swapped_for_validation_and_back_are_as_they_were_from_the_first_step_on(
    devices: int, part: str, recwarn: Any
) -> None:
    if devices == 1:
        (plain, _), (swapped, (kind, _)) = swapped_for_validation(1, None), swapped_for_validation(1, part)
    else:
        (plain, _), _ = run(swapped_for_validation, 2, 2, None, group=False)
        (swapped, (kind, _)), _ = run(swapped_for_validation, 2, 2, part, group=False)
    assert kind == "factored"
    assert not any("written from outside" in str(w.message) for w in recwarn)
    assert all(torch.equal(value, swapped[name]) for name, value in plain.items())


def test_writes_before_a_validation_count_in_the_first_steps() -> None:
    class Clamping(Swapping):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.net.first.weight.clamp_(-100, 100)  # which changes nothing

    module, strategy = Clamping("net"), LTEStrategy(1, 3, rank=RANK)
    t = trainer(strategy, max_steps=4, val_check_interval=1, num_sanity_val_steps=0)
    t.fit(module, loader(160), loader(16))
    assert role(strategy, "net.first.weight")[0] == "replica"


def pruned_on_two(replicas: Any) -> tuple[str, dict[str, Tensor]]:
    module = Module(optimizer=sgd)
    prune = ModelPruning("l1_unstructured", amount=0.3, parameters_to_prune=[(module.net.first, "weight")])
    t = trainer(LTEStrategy(2, 3, rank=RANK, replicas=replicas), devices=2, max_epochs=3, callbacks=[prune])
    try:
        t.fit(module, loader(160))
    except ValueError as error:
        return str(error), clone(module.state_dict())
    return "", clone(module.state_dict())


def test_pruning_on_two_devices_is_refused_or_takes_the_same_masks() -> None:
    for words, _ in run(pruned_on_two, 2, "merge", group=False):
        assert "received ModelPruning on 2 devices with replicas='merge'. Give replicas='step'" in words
    (words, own), (_, other) = run(pruned_on_two, 2, "step", group=False)
    assert not words and torch.equal(own["net.first.weight"], other["net.first.weight"])
    assert float((own["net.first.weight"] == 0).double().mean()) > 0.3


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"heads": 4, "execution": "sequential", "overlap": 2},
        {"full_rank_steps": 5},
        {"grow_heads": {5: 4}},
        {"base": "int8", "base_copy": "error-feedback"},
        {"base": "bf16", "weight_decay": "weights"},
    ],
    ids=str,
)
def test_a_sweep_of_learning_rates_leaves_no_trace(choices: dict[str, Any], tmp_path: Path) -> None:
    def fitted(*callbacks: Callback) -> dict[str, Tensor]:
        module = Module(optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
        module.lr = 0.01
        strategy = LTEStrategy(**{"heads": 2, "merge_every": 3, "rank": RANK, **choices})
        t = trainer(strategy, max_steps=9, callbacks=list(callbacks), default_root_dir=tmp_path)
        t.fit(module, loader(320))
        return clone(module.state_dict())

    plain, swept = fitted(), fitted(LearningRateFinder(num_training_steps=14, update_attr=False))
    assert all(torch.equal(value, swept[name]) for name, value in plain.items())


@pytest.mark.parametrize("heads", [1, 4])
def test_weights_are_watched_after_a_sweep_too(heads: int, tmp_path: Path) -> None:
    """Who asks for the gradient of a weight gets it, in every step; heads would leave none to ask for."""

    class Asking(Module):
        lr = 0.01

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            (gradient,) = torch.autograd.grad(loss, self.net.second.weight, retain_graph=True)
            return loss * (1 + gradient.norm().detach())

    module, sweep = Asking(optimizer=sgd), LearningRateFinder(num_training_steps=8, update_attr=False)
    strategy = LTEStrategy(heads, 3, rank=RANK)
    trainer(strategy, max_steps=5, callbacks=[sweep], default_root_dir=tmp_path).fit(module, loader(320))
    assert role(strategy, "net.second.weight") == (
        "replica",
        "something asks for its gradient with torch.autograd.grad",
    )
