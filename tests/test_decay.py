"""weight_decay="weights": the optimizers' weight decay pulls W towards zero, at merges, and not the factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport
from lightning_lte.optimizers import acts_per_element, decays_apart, magnitude_names
from tests.modules import FACTORED, RANK, Module, clone, loader, make_data, make_net, train_step, trainer
from tests.processes import run
from tests.test_exactness import HEADS, OUTER, on_devices, train_both

LR, DECAY = 0.01, 0.5


def adamw(params: Iterable[nn.Parameter], **more: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, **more)


def decaying(**choices: Any) -> LTEConfig:
    return LTEConfig(HEADS, **{"merge_every": 3, "rank": RANK, "weight_decay": "weights", **choices})


@pytest.mark.parametrize(
    "optimizer", [adamw, partial(torch.optim.SGD, lr=0.1, weight_decay=0.05)], ids=["AdamW", "SGD"]
)
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_training_equals_the_oracle(execution: Any, after_merge: Any, optimizer: Any) -> None:
    train_both(decaying(execution=execution, after_merge=after_merge), optimizer, steps=11)


@pytest.mark.parametrize(
    "choices",
    [
        {"overlap": 2},
        {"merge_every": 6, "stagger": 3, "overlap": 4, "outer_optimizer": OUTER[0]},
        {"outer_optimizer": OUTER[3], "after_merge": "reset"},
        {"freeze_a": True},
        {"replicas": "step"},
    ],
    ids=str,
)
def test_other_choices_beside_it_equal_the_oracle(choices: dict[str, Any]) -> None:
    train_both(decaying(**choices), adamw)


def explorer_of(optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], **choices: Any) -> tuple[Explorer, Optimizer]:
    model = make_net()
    opt = optimizer(model.parameters())
    return Explorer(model, opt, decaying(**choices)), opt


def factors_of(explorer: Explorer) -> list[Tensor]:
    return [t.detach().clone() for f in explorer.injection.factors.values() for t in (f.A, f.B)]


def step_without_gradient(explorer: Explorer, opt: Optimizer, leave_out: bool = False) -> None:
    with explorer.heads():
        loss = 0 * cross_entropy(explorer.module(make_data(8)[0]), make_data(8)[1])
    loss.backward()
    if not leave_out:
        opt.step()
    opt.zero_grad()
    explorer.step()


@pytest.mark.parametrize("period", [1, 4])
def test_without_a_gradient_weights_shrink_as_at_full_rank_and_factors_stay(period: int) -> None:
    explorer, opt = explorer_of(adamw, merge_every=period, execution="batched")
    plain = make_net()
    full = adamw(plain.parameters())
    factors = factors_of(explorer)
    for _ in range(8):
        step_without_gradient(explorer, opt)
        for p in plain.parameters():
            p.grad = torch.zeros_like(p)
        full.step()
    assert explorer.clock.merges == 8 // period
    # Replicas of heads decay in the optimizer, as they did.
    torch.testing.assert_close(explorer.module.state_dict(), plain.state_dict(), rtol=1e-12, atol=0)
    torch.testing.assert_close(factors_of(explorer), factors, rtol=1e-12, atol=0)


def test_with_factors_it_is_as_it_was_and_weights_do_not_shrink() -> None:
    explorer, opt = explorer_of(adamw, weight_decay="factors", execution="batched")
    weights = clone(explorer.module.state_dict())
    factors = factors_of(explorer)
    for _ in range(3):
        step_without_gradient(explorer, opt)
    for name in FACTORED:
        assert torch.equal(explorer.module.state_dict()[f"{name}.weight"], weights[f"{name}.weight"])
    torch.testing.assert_close(factors_of(explorer), [f * (1 - LR * DECAY) ** 3 for f in factors], rtol=1e-12, atol=0)


def test_each_group_has_a_decay_and_a_rate_of_its_own_that_may_change() -> None:
    model = make_net()
    first = [model.first.weight]
    rest = [p for p in model.parameters() if p is not model.first.weight]
    opt = torch.optim.AdamW([{"params": first, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}], lr=0.01)
    before = clone(model.state_dict())
    explorer = Explorer(model, opt, decaying(execution="batched"))
    step_without_gradient(explorer, opt)
    opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"] = 0.02, 0.3
    step_without_gradient(explorer, opt)
    explorer.finish()
    expected = before["first.weight"] * (1 - 0.01 * 0.1) * (1 - 0.02 * 0.3)
    torch.testing.assert_close(model.first.weight.detach(), expected, rtol=1e-12, atol=0)
    assert torch.equal(model.second.weight, before["second.weight"])


def test_what_was_not_stepped_does_not_decay() -> None:
    """Without a gradient optimizers leave a parameter out, and fused ones a step whose gradients overflowed."""
    explorer, opt = explorer_of(partial(adamw, fused=True), execution="batched", merge_every=10)
    [frozen] = [f for f in explorer.injection.factors.values() if f.name == "first"]
    frozen.weight.requires_grad_(False)
    step_without_gradient(explorer, opt)
    assert [f.left for f in explorer.injection.factors.values()] == [1.0, 1 - LR * DECAY]
    factors = factors_of(explorer)
    # What `torch.amp.GradScaler` does.
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    step_without_gradient(explorer, opt)
    assert [float(f.left) for f in explorer.injection.factors.values()] == pytest.approx([1.0, 1 - LR * DECAY])
    assert all(torch.equal(a, b) for a, b in zip(factors_of(explorer), factors, strict=True))
    # Where they did not, all of it counts: in float32, 1 less a small decay would be off by a part of that, or 1.
    opt.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    step_without_gradient(explorer, opt)
    left = [float(f.left) for f in explorer.injection.factors.values()]
    assert left == pytest.approx([1.0, (1 - LR * DECAY) ** 2], rel=1e-14)


@contextmanager
def hidden_decay(optimizer: Optimizer) -> Iterator[None]:
    """For a class that decays by itself, and whose base is not to."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0
    yield
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


class Calling(torch.optim.AdamW):
    """Calls the step of its base."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Hiding(torch.optim.Adam):
    """Hides its decay from its base."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
        with hidden_decay(self):
            super().step(closure)


@pytest.mark.parametrize("kind", [Calling, Hiding])
def test_a_class_that_calls_the_step_of_its_base_decays_once(kind: Any) -> None:
    explorer, opt = explorer_of(partial(kind, lr=LR, weight_decay=DECAY), execution="batched")
    factors = factors_of(explorer)
    step_without_gradient(explorer, opt)
    torch.testing.assert_close(factors_of(explorer), factors, rtol=1e-12, atol=0)
    assert {f.left for f in explorer.injection.factors.values()} == {1 - LR * DECAY}


def test_the_optimizer_decays_by_itself_again_when_training_is_over() -> None:
    explorer, opt = explorer_of(adamw, execution="batched")
    for step in range(4):
        train_step(explorer, explorer.module, opt, make_data(16, seed=step))
    explorer.finish()
    before = explorer.module.first.weight.detach().clone()  # type: ignore[union-attr]
    for p in explorer.module.parameters():
        p.grad = torch.zeros_like(p)
    opt.state.clear()
    opt.step()
    expected = before * (1 - LR * DECAY)
    torch.testing.assert_close(explorer.module.first.weight.detach(), expected, rtol=1e-12, atol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("automatic", [True, False])
def test_with_lightning_weights_shrink_as_at_full_rank(execution: Any, automatic: bool) -> None:
    class Flat(Module):
        """Has nothing to learn."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = 0 * cross_entropy(self(batch[0]), batch[1])
            if automatic:
                return loss
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            return None

    def fit(**choices: Any) -> dict[str, Tensor]:
        module = Flat(make_net(), adamw)
        module.automatic_optimization = automatic
        trainer(max_epochs=1, **choices).fit(module, loader(16 * 7, 16))
        return clone(module.state_dict())

    strategy = LTEStrategy(HEADS, 3, rank=RANK, weight_decay="weights", execution=execution)
    torch.testing.assert_close(fit(strategy=strategy), fit(strategy="auto"), rtol=1e-6, atol=0)


def test_devices_agree_to_the_bit_and_with_one_device() -> None:
    choices = (HEADS, "keep", "merge", None, "batched", {"weight_decay": "weights"})
    one = on_devices(*choices)  # type: ignore[arg-type]
    several = run(on_devices, 2, *choices)
    for name, value in one.items():
        torch.testing.assert_close(several[0][name], value, rtol=1e-9, atol=1e-11)
        assert torch.equal(several[0][name], several[1][name])


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_weights_in_half_precision_shrink_with_what_they_could_not_hold(base: Any) -> None:
    model = make_net().float()
    if base == "float32":
        model = model.bfloat16()
    before = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().double().clone() for name in FACTORED}
    opt = adamw(model.parameters())
    explorer = Explorer(model, opt, decaying(execution="batched", base=base, merge_every=1), Transport())
    dtype = next(model.parameters()).dtype
    steps = 20
    for _ in range(steps):
        with explorer.heads():
            loss = 0 * cross_entropy(model(make_data(8)[0].to(dtype)).float(), make_data(8)[1])
        loss.backward()
        explorer.after_backward()
        opt.step()
        opt.zero_grad()
        explorer.step()
    for f in explorer.injection.factors.values():
        expected = before[f"{f.name}.weight"] * (1 - LR * DECAY) ** steps
        torch.testing.assert_close(f.exact().double(), expected, rtol=2e-5, atol=1e-6)


def steps_unequally(everything: bool) -> tuple[dict[str, Tensor], list[float]]:
    """The second device leaves a step out, as a gradient scaler does that found an infinity."""
    rank = dist.get_rank()
    model = make_net()
    opt = adamw(model.parameters())
    config = LTEConfig(2, 3, rank=RANK, weight_decay="weights", verify_every=1)
    explorer = Explorer(model, opt, config, Transport(2, rank))
    before = model.first.weight.detach().clone()
    for step in range(2 if everything else 3):
        step_without_gradient(explorer, opt, leave_out=(rank, step) == (1, 1))
    if everything:
        explorer.merge(everything=True)
    factor = (model.first.weight.detach() / before).flatten()
    torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    return clone(model.state_dict()), [float(factor[0])]


@pytest.mark.parametrize("everything", [False, True])
def test_devices_that_made_other_steps_agree_on_the_mean(everything: bool) -> None:
    (first, [factor]), (second, _) = run(steps_unequally, 2, everything)
    for name in FACTORED:
        assert torch.equal(first[f"{name}.weight"], second[f"{name}.weight"])
    steps, c = (2, LR * DECAY) if everything else (3, LR * DECAY)
    assert factor == pytest.approx(((1 - c) ** steps + (1 - c) ** (steps - 1)) / 2, rel=1e-12)


def test_weights_that_are_loaded_in_the_middle_of_a_period_are_as_they_were_loaded() -> None:
    explorer, opt = explorer_of(adamw, execution="batched", merge_every=10)
    for _ in range(4):
        step_without_gradient(explorer, opt)
    loaded = clone(explorer.module.state_dict())
    loaded = {name: value + 1 for name, value in loaded.items()}
    explorer.module.load_state_dict(loaded)
    with pytest.warns(UserWarning, match="written from outside"):
        explorer.after_backward()
    explorer.finish()
    for name in FACTORED:
        assert torch.equal(explorer.module.state_dict()[f"{name}.weight"], loaded[f"{name}.weight"])


def test_weights_that_lose_their_heads_keep_the_decay_so_far() -> None:
    explorer, opt = explorer_of(adamw, execution="batched", merge_every=10)
    before = explorer.module.get_parameter("first.weight").detach().clone()
    for _ in range(4):
        step_without_gradient(explorer, opt)
    explorer.make_replicas({"first": "for a test"})
    after = explorer.module.get_parameter("first.weight").detach()
    torch.testing.assert_close(after, before * (1 - LR * DECAY) ** 4, rtol=1e-12, atol=0)


def test_small_decays_in_tensors_add_up_as_they_are() -> None:
    explorer, opt = explorer_of(
        lambda p: torch.optim.AdamW(p, lr=torch.tensor([1e-4]), weight_decay=1e-3), execution="batched", merge_every=200
    )
    for _ in range(100):
        step_without_gradient(explorer, opt)
    for f in explorer.injection.factors.values():
        assert 1 - float(f.left) == pytest.approx(1e-5, rel=1e-4)


def test_an_optimizer_without_rates_or_decays_is_let_be() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.01 * p.grad)

    explorer, opt = explorer_of(Plain, execution="batched")
    step_without_gradient(explorer, opt)
    assert {f.left for f in explorer.injection.factors.values()} == {1.0}


# ---- what is refused


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adam, lr=LR, weight_decay=0.1),
        partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.RMSprop, lr=LR, weight_decay=0.1),
    ],
    ids=["Adam", "SGD-momentum", "RMSprop"],
)
def test_decay_that_is_mixed_with_gradients_is_refused_before_anything_changes(optimizer: Any) -> None:
    model = make_net()
    opt = optimizer(model.parameters())
    with pytest.raises(ValueError, match=r"lr \* weight_decay .*received .*0\.1.*Choose AdamW"):
        Explorer(model, opt, decaying())
    assert list(opt.param_groups[0]["params"]) == list(model.parameters()) and type(model.first) is nn.Linear
    # Without a decay any of them will do, until they have one.
    opt.param_groups[0]["weight_decay"] = 0
    explorer = Explorer(model, opt, decaying(execution="batched"))
    step_without_gradient(explorer, opt)
    factors = factors_of(explorer)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"received .*0\.1"):
        step_without_gradient(explorer, opt)
    assert all(torch.equal(a, b) for a, b in zip(factors_of(explorer), factors, strict=True))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(adamw, foreach=True),
        partial(adamw, fused=True),
        partial(adamw, amsgrad=True),
        partial(adamw, capturable=False, maximize=True),
        partial(torch.optim.NAdam, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
        partial(torch.optim.SGD, lr=torch.tensor(LR), weight_decay=0.1),
    ],
)
def test_decay_apart_from_gradients_is_not(optimizer: Any) -> None:
    explorer, opt = explorer_of(optimizer, execution="batched")
    step_without_gradient(explorer, opt)
    assert all(0.9 < float(f.left) < 1 for f in explorer.injection.factors.values())


class Cautious(torch.optim.AdamW):
    """Decays only what a step would make smaller all the same."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * group["weight_decay"] * p * (p * p.grad > 0))
        with hidden_decay(self):
            super().step(closure)


class Counting(torch.optim.AdamW):
    """Holds something beside groups and states."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


class Untried(torch.optim.AdamW):
    """Can't be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


def test_what_decays_apart_is_found_by_trying() -> None:
    def apart(kind: Any) -> bool | str:
        return decays_apart(kind([nn.Parameter(torch.ones(2))], lr=LR, weight_decay=0.0))

    assert apart(Counting) is True and apart(torch.optim.AdamW) is True
    assert apart(Cautious) is False and apart(torch.optim.Adam) is False and apart(torch.optim.NAdam) is False
    assert apart(Untried) == "TypeError: no copies"
    with pytest.raises(ValueError, match=r"could not be tried \(TypeError: no copies\)"):
        explorer_of(partial(Untried, lr=LR, weight_decay=0.1))


def test_trying_an_optimizer_calls_none_of_its_hooks() -> None:
    opt = Counting([nn.Parameter(torch.ones(2))], lr=LR)
    called: list[str] = []
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))
    torch.optim.lr_scheduler.ConstantLR(opt)
    assert decays_apart(opt) is True and acts_per_element(opt) and magnitude_names(opt)
    assert not called and opt.steps == 0


def test_a_decay_that_leaves_nothing_is_refused() -> None:
    explorer, opt = explorer_of(partial(torch.optim.AdamW, lr=2.0, weight_decay=0.5), execution="batched")
    with pytest.raises(ValueError, match=r"must be below 1.*received 1 for AdamW"):
        step_without_gradient(explorer, opt)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hooks_are_left(fails: bool) -> None:
    model = make_net()
    opt = adamw(model.parameters())
    if fails:
        with pytest.raises(ValueError):
            Explorer(model, opt, decaying(target_modules=["nothing"]))
    else:
        Explorer(model, opt, decaying()).close()
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_the_choice_is_checked() -> None:
    with pytest.raises(ValueError, match="weight_decay must be one of 'factors', 'weights'; received 'both'"):
        LTEConfig(2, weight_decay="both")  # type: ignore[arg-type]
