"""Wrong answers are found before they are given."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, LTEStrategy
from lightning_lte.optimizers import acts_per_element, check_optimizers, decays_apart, magnitude_names, moment_names
from tests.modules import RANK, Module, Net, adamw, backward, loader, make_data, make_net, sgd, train_step, trainer


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 4))]


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD(params(), lr=0.1, momentum=0.9),
        torch.optim.Adam(params(), amsgrad=True),
        torch.optim.AdamW(params(), fused=True),
        torch.optim.Adagrad(params()),
        torch.optim.RMSprop(params()),
        torch.optim.Adadelta(params()),
        torch.optim.Rprop(params()),
        torch.optim.NAdam(params()),
    ],
    ids=lambda o: type(o).__name__,
)
def test_updates_per_element_are_allowed(optimizer: torch.optim.Optimizer) -> None:
    assert acts_per_element(optimizer)
    check_optimizers([optimizer], 4)


class Normalised(torch.optim.Optimizer):
    """Steps along the gradient over its norm, as LARS and LAMB do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data -= group["lr"] * p.grad / p.grad.norm()


class Global(torch.optim.Optimizer):
    """Steps along the gradient over the norm of all of it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.data -= 0.1 * p.grad / norm


def lamb(params: Any) -> torch.optim.Optimizer:
    return timm.optim.Lamb(params)


def cautious(params: Any) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(params, opt="cadamw", lr=0.1)


def clipping(params: Any) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(params, opt="adafactor", lr=0.1)  # by the size of updates


def warmed_up(params: Any) -> torch.optim.Optimizer:
    optimizer = lamb(params)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)  # the learning rate is 0 now
    return optimizer


def wrapped(params: Any) -> torch.optim.Optimizer:
    return timm.optim.create_optimizer_v2(params, opt="lookahead_lamb", lr=0.1)


class RateFree(torch.optim.Optimizer):
    """Finds one step size for all it trains, from a tiny one on that grows as long as they go one way, as Prodigy and
    D-Adaptation do."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})
        self._size, self._first = 1e-6, {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in held:
            self._first.setdefault(p, p.detach().clone())
        gone = sum(float((p.grad * (self._first[p] - p.detach())).sum()) for p in held)
        self._size = max(self._size, gone / sum(float(p.grad.abs().sum()) for p in held))
        for p in held:
            p.data -= self.param_groups[0]["lr"] * self._size * 2 * p.grad.sign()


@pytest.mark.parametrize(
    "make", [torch.optim.Adafactor, Normalised, Global, lamb, cautious, clipping, warmed_up, wrapped, RateFree]
)
def test_updates_that_mix_elements_are_refused_for_several_heads_only(make: Any) -> None:
    optimizer = make(params())
    assert not acts_per_element(optimizer)
    check_optimizers([optimizer], 1)
    with pytest.raises(ValueError, match=f"received {type(optimizer).__name__}.*one head per device"):
        check_optimizers([optimizer], 4)


class Projecting(torch.optim.Optimizer):
    """Steps in a subspace of each matrix in groups that have a rank, as GaLore does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    basis = torch.linalg.svd(p.grad)[0][:, : group["rank"]] if group["rank"] else None
                    p.data -= group["lr"] * (p.grad if basis is None else basis @ (basis.t() @ p.grad))


@pytest.mark.parametrize("heads", [1, 4])
def test_optimizers_that_fail_on_stacks_of_matrices_are_refused_where_heads_train(heads: int) -> None:
    net = make_net()
    thin = [net.out.weight, net.norm.weight]
    matrices = [p for name, p in net.named_parameters() if p.dim() == 2 and name != "out.weight"]
    defaults = {"lr": 0.1, "rank": 0}
    before = type(net.first)
    projecting = Projecting([{"params": matrices, "rank": 2}, {"params": thin}], defaults)
    with pytest.raises(
        ValueError, match=r"in stacks of .* received .*test_guard.Projecting, .* shape \(4, 4\) and fails .*optim.AdamW"
    ):
        Explorer(net, projecting, LTEConfig(heads, 2, rank=RANK))
    assert type(net.first) is before
    # What no head trains is stepped as it is.
    plain = Projecting([{"params": matrices}, {"params": [net.out.weight], "rank": 2}], defaults)
    Explorer(net, plain, LTEConfig(heads, 2, rank=RANK, exclude_modules="out")).close()


class Drawing(torch.optim.Optimizer):
    """Steps with noise, from every random stream, as PSGD's preconditioners do; and draws as it is made."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.01})
        self._draw()

    def _draw(self) -> float:
        return float(torch.rand(())) + random.random() + float(np.random.rand())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad * self._draw()


def test_trying_an_optimizer_draws_nothing_from_the_users_streams() -> None:
    optimizer = Drawing(params())
    expected = []
    for ask in (lambda _: None, acts_per_element, moment_names, magnitude_names, decays_apart):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        ask(optimizer)
        expected.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert len(set(expected)) == 1


def test_trying_an_optimizer_leaves_it_alone() -> None:
    own = params()
    optimizer = torch.optim.AdamW(own, weight_decay=0.5)
    own[0].grad = torch.ones(4, 4)
    optimizer.step()
    before, state = own[0].detach().clone(), optimizer.state_dict()
    for gradient in (None, torch.ones(4, 4)):
        own[0].grad = gradient
        assert acts_per_element(optimizer)
    assert torch.equal(own[0], before)
    assert optimizer.state_dict()["state"][0]["step"] == state["state"][0]["step"] == 1


def test_settings_of_a_group_count() -> None:
    class Sometimes(Normalised):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data -= p.grad / (p.grad.norm() if group.get("normalise") else 1)

    assert acts_per_element(Sometimes(params()))
    assert not acts_per_element(Sometimes([{"params": params(), "normalise": True}]))


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="torch optimizers; received 'sgd'"):
        check_optimizers(["sgd"], 1)  # type: ignore[list-item]


class ScheduleFree(torch.optim.SGD):
    """One that trains at one point and evaluates at another."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_optimizers_with_two_points_are_refused_where_heads_train() -> None:
    net = make_net()
    with pytest.raises(ValueError, match=r"received ScheduleFree, which has both.*heads train 2"):
        Explorer(net, ScheduleFree(net.parameters(), lr=0.1), LTEConfig(1, rank=RANK))
    assert type(net.first) is nn.Linear

    def parted(heads: int) -> Explorer:
        weights = [p for p in net.parameters() if p.dim() > 1]
        rest = [p for p in net.parameters() if p.dim() == 1]
        return Explorer(net, [sgd(weights), ScheduleFree(rest, lr=0.1)], LTEConfig(heads, rank=RANK))

    parted(1).close()
    with pytest.raises(ValueError, match="heads train 4"):
        parted(2)


def explorer_over(net: nn.Module, heads: int = 4, **choices: Any) -> tuple[Explorer, torch.optim.Optimizer]:
    opt = sgd([p for p in net.parameters() if p.requires_grad])
    return Explorer(net, opt, LTEConfig(heads, 3, rank=RANK, **{"execution": "batched", **choices})), opt


class Starving(torch.autograd.Function):
    """Hands no gradient on to what made its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def test_heads_that_get_no_gradient_are_named() -> None:
    class Starved(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.second(Starving.apply(self.norm(self.first(x))))))

    net = Starved().double()
    explorer, _ = explorer_over(net)
    x, y = make_data(16)
    with explorer.heads():
        loss = cross_entropy(net(x), y)
    loss.backward()
    with pytest.warns(UserWarning, match=r"heads of first took part .* exclude_modules=\['first'\]"):
        explorer.after_backward()


@pytest.mark.filterwarnings("error")
def test_layers_that_take_no_part_are_not_named() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.idle(self.first(x))
            return super().forward(x)

    net = Idle().double()
    explorer, opt = explorer_over(net)
    for step in range(4):
        x, y = make_data(16, seed=step)
        backward(explorer, net, x, y)
        opt.step()
        explorer.step()


def test_gradients_of_heads_do_not_pile_up_where_users_zero_the_modules_own() -> None:
    """`module.zero_grad()` can't reach the factors."""
    states = []
    for zero in (lambda net, opt: net.zero_grad(), lambda net, opt: opt.zero_grad()):
        net = make_net()
        explorer, opt = explorer_over(net)
        for step in range(5):
            x, y = make_data(16, seed=step)
            zero(net, opt)
            with explorer.heads():
                loss = cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            explorer.step()
        explorer.finish()
        states.append(net.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_gradients_from_before_are_not_taken_for_a_use_outside_the_layer() -> None:
    net = make_net()
    x, y = make_data(16)
    cross_entropy(net(x), y).backward()
    explorer, _ = explorer_over(net)
    backward(explorer, net, x, y)


def test_what_goes_wrong_while_it_is_set_up_leaves_everything_as_it_was() -> None:
    net = make_net()
    opt = adamw(net.parameters())
    groups = [list(g["params"]) for g in opt.param_groups]
    with pytest.raises(ValueError, match="matches no module"):
        Explorer(net, opt, LTEConfig(4, rank=RANK, target_modules=["nothing"]))
    assert type(net.first) is nn.Linear
    for group, before in zip(opt.param_groups, groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], before, strict=True))


@pytest.mark.parametrize("period", [1, 3])
def test_a_step_that_is_not_counted_yet_is_not_lost_with_the_heads_of_a_weight(period: int) -> None:
    net = make_net()
    opt = sgd(net.parameters())
    explorer = Explorer(net, opt, LTEConfig(2, period, rank=RANK, execution="batched"))
    for step in range(3):
        train_step(explorer, net, opt, make_data(8, seed=step))
    x, y = make_data(8, seed=3)
    backward(explorer, net, x, y)
    opt.step()
    (f,) = [f for f in explorer.injection.factors.values() if f.name == "first"]
    expected = torch.stack([f.effective(h) for h in range(2)]).mean(0) + 1
    with torch.no_grad():
        net.first.weight.add_(1)
    with pytest.warns(UserWarning, match="Trained without heads, as replicas: first"):
        explorer.step()
    torch.testing.assert_close(net.first.weight.detach(), expected)


@pytest.mark.parametrize("how", ["another", "set up again"])
def test_optimizers_that_are_exchanged_while_training_are_refused(how: str) -> None:
    class Exchanging(Module):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1 and how == "another":
                self.trainer.optimizers = [adamw(self.parameters())]
            elif self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    module = Exchanging(optimizer=adamw)
    with pytest.raises(RuntimeError, match=r"through the optimizers that `fit` began with; received .* `param_groups`"):
        trainer(LTEStrategy(4, 3, rank=RANK), max_epochs=3).fit(module, loader())
    assert type(module.net.first) is nn.Linear


class UsedElsewhere(Net):
    """Multiplies its output by what a weight adds up to."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.second.weight.sum())


def test_a_graph_that_runs_backward_once_more_finds_the_weights_of_its_forward() -> None:
    net = UsedElsewhere().double()
    opt = sgd(net.parameters())
    explorer = Explorer(net, opt, LTEConfig(2, 4, rank=RANK, execution="batched"))
    x, y = make_data(8)
    with explorer.heads():
        output = net(x)
    cross_entropy(output, y).backward(retain_graph=True)
    with pytest.warns(UserWarning, match="Trained without heads, as replicas: second"):
        explorer.after_backward()
    output.square().mean().backward()
    explorer.after_backward()
