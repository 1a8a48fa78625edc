from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_lte.substitution import Substitution

NAMES = ("a.weight", "a.bias", "b.weight", "b.bias")


class Case:
    """Four parameters in two groups; the weights give way to factors."""

    def __init__(self, make: Callable[..., Optimizer] = SGD, named: bool = False) -> None:
        self.params = [nn.Parameter(torch.ones(3, 2) * i) for i in range(4)]
        self.factors = [nn.Parameter(torch.ones(1, 2) * i) for i in range(4)]
        content: Any = list(zip(NAMES, self.params, strict=True)) if named else self.params
        self.optimizer = make(
            [
                {"params": content[:3], "lr": 0.1, "weight_decay": 0.01, "note": "first"},
                {"params": content[3:], "lr": 0.2},
            ],
            lr=1.0,
        )
        self.before = self.optimizer.state_dict()

    def substitution(self) -> Substitution:
        a, _, b, _ = self.params
        first, second, third, fourth = self.factors
        replacements = {a: {"a.A": first, "a.B": second}, b: {"b.A": third, "b.B": fourth}}
        return Substitution([self.optimizer], replacements, dict(zip(self.params, NAMES, strict=True)))

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def same(found: Iterable[object], expected: Iterable[object]) -> bool:
    return [id(f) for f in found] == [id(e) for e in expected]


def step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_factors_take_the_place_of_their_weight_in_its_group_and_in_order() -> None:
    case = Case()
    groups = [group for group in case.groups]
    case.substitution()
    assert same(case.groups, groups)
    assert same(case.groups[0]["params"], [*case.factors[:2], case.params[1], *case.factors[2:]])
    assert same(case.groups[1]["params"], [case.params[3]])


def test_settings_of_groups_carry_over() -> None:
    case = Case()
    settings = [{k: v for k, v in group.items() if k != "params"} for group in case.groups]
    case.substitution()
    assert [{k: v for k, v in group.items() if k != "params"} for group in case.groups] == settings


def test_a_scheduler_made_before_steers_the_factors() -> None:
    case = Case()
    scheduler = LambdaLR(case.optimizer, lambda epoch: 0.5**epoch)
    case.substitution()
    step(case.optimizer)
    scheduler.step()
    assert [group["lr"] for group in case.groups] == [0.05, 0.1]
    before = case.factors[3].detach().clone()
    step(case.optimizer)
    torch.testing.assert_close(case.factors[3].detach(), before - 0.05 * (1 + 0.01 * before))


def test_the_optimizer_trains_the_factors_and_not_the_weight() -> None:
    case = Case(AdamW)
    case.substitution()
    start = [p.detach().clone() for p in case.params + case.factors]
    step(case.optimizer)
    changed = [not torch.equal(p, s) for p, s in zip(case.params + case.factors, start, strict=True)]
    assert changed == [False, True, False, True] + [True] * 4


def test_param_names_follow() -> None:
    case = Case(named=True)
    case.substitution()
    assert case.groups[0]["param_names"] == ["a.A", "a.B", "a.bias", "b.A", "b.B"]
    assert case.groups[1]["param_names"] == ["b.bias"]


def test_held_parameters_are_known_by_name() -> None:
    case = Case()
    held = case.substitution().held(case.optimizer)
    assert list(held) == ["a.A", "a.B", "a.bias", "b.A", "b.B", "b.bias"]
    assert held["b.A"] is case.factors[2] and held["b.bias"] is case.params[3]


def test_an_empty_replacement_takes_a_parameter_out() -> None:
    case = Case(named=True)
    substitution = case.substitution()
    substitution.replace({case.params[1]: {}, nn.Parameter(torch.zeros(1)): {}})
    assert case.groups[0]["param_names"] == ["a.A", "a.B", "b.A", "b.B"]
    substitution.undo()
    assert same(case.groups[0]["params"], case.params[:3])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("make", [SGD, AdamW])
def test_undo_is_the_inverse(make: Callable[..., Optimizer], named: bool) -> None:
    case = Case(make, named)
    substitution = case.substitution()
    step(case.optimizer)
    substitution.undo()
    assert case.optimizer.state_dict()["param_groups"] == case.before["param_groups"]
    assert same([p for group in case.groups for p in group["params"]], case.params)
    assert not any(factor in case.optimizer.state for factor in case.factors)
    step(case.optimizer)


def test_undo_gives_back_the_names_that_the_user_gave() -> None:
    case = Case(named=True)
    for group in case.groups:
        group["param_names"] = [f"mine.{name}" for name in group["param_names"]]
    substitution = case.substitution()
    assert substitution.plain_state(case.optimizer)["param_groups"][1]["param_names"] == ["mine.b.bias"]
    substitution.undo()
    assert [n for group in case.groups for n in group["param_names"]] == [f"mine.{name}" for name in NAMES]


def test_moments_of_what_was_not_replaced_outlive_substitution_and_undo() -> None:
    case = Case(AdamW)
    step(case.optimizer)
    moments = case.optimizer.state[case.params[1]]["exp_avg"]
    substitution = case.substitution()
    assert case.optimizer.state[case.params[1]]["exp_avg"] is moments
    assert case.params[0] not in case.optimizer.state
    substitution.undo()
    assert case.optimizer.state[case.params[1]]["exp_avg"] is moments


class Early(Adagrad):
    """Can't step without the state that it makes when it is constructed, as torch's own could not for long."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        assert all(self.state.get(p) for group in self.param_groups for p in group["params"])
        return super().step(*args, **kwargs)


def test_an_optimizer_that_makes_its_state_when_constructed_steps_before_and_after_undo() -> None:
    case = Case(Early)
    substitution = case.substitution()
    step(case.optimizer)
    substitution.undo()
    step(case.optimizer)


def test_an_optimizer_that_makes_its_state_when_constructed_steps_weights_whose_heads_are_yet_to_begin() -> None:
    case = Case(Early)
    substitution = case.substitution()
    substitution.rest()
    substitution.forget()
    assert case.params[0] in case.groups[0]["params"]
    step(case.optimizer)
    substitution.act()
    step(case.optimizer)


def test_an_optimizer_that_makes_its_state_when_constructed_steps_a_weight_that_loses_its_heads() -> None:
    case = Case(Early)
    substitution = case.substitution()
    step(case.optimizer)
    substitution.rest()
    substitution.restore(case.params[0])
    substitution.act()
    assert case.params[0] in case.groups[0]["params"]
    step(case.optimizer)
    substitution.undo()
    step(case.optimizer)


def test_the_plain_state_is_that_of_the_users_own_optimizer_without_moments() -> None:
    case = Case(named=True)
    plain = case.substitution().plain_state(case.optimizer)
    assert plain == {"state": {}, "param_groups": case.before["param_groups"]}
    Case(named=True).optimizer.load_state_dict(plain)


def test_settings_of_a_plain_state_are_taken_over_where_groups_are_shaped_alike() -> None:
    case = Case()
    substitution = case.substitution()
    saved = copy.deepcopy(case.before)
    saved["param_groups"][0]["lr"] = 0.7
    params = list(case.groups[0]["params"])
    assert substitution.load_plain_state(case.optimizer, saved)
    assert case.groups[0]["lr"] == 0.7 and same(case.groups[0]["params"], params)
    saved["param_groups"][0]["params"].pop()
    saved["param_groups"][0]["lr"] = 0.9
    assert not substitution.load_plain_state(case.optimizer, saved)
    assert case.groups[0]["lr"] == 0.7


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_optimizers_count_in_groups_goes_with_their_moments(goes_on: bool) -> None:
    saved = copy.deepcopy(Case().before)
    saved["param_groups"][0].update(step=7, lr=0.7)
    case = Case()
    case.groups[1]["step"] = 3
    assert case.substitution().load_plain_state(case.optimizer, saved, goes_on)
    assert case.groups[0]["lr"] == 0.7
    assert [group.get("step") for group in case.groups] == ([7, None] if goes_on else [None, 3])


def test_settings_of_another_optimizer_are_not_taken_over() -> None:
    case = Case()
    saved = Case(AdamW).before
    assert not case.substitution().load_plain_state(case.optimizer, saved)


def test_a_group_added_during_training_stays_as_it_is() -> None:
    case = Case()
    substitution = case.substitution()
    late = nn.Parameter(torch.ones(2))
    case.optimizer.add_param_group({"params": [late], "lr": 0.3})
    plain = substitution.plain_state(case.optimizer)
    assert [g["params"] for g in plain["param_groups"]] == [[0, 1, 2], [3], [4]]
    assert substitution.load_plain_state(case.optimizer, plain)
    step(case.optimizer)
    substitution.undo()
    assert same([p for group in case.groups for p in group["params"]], [*case.params, late])


def test_several_optimizers_are_kept_apart() -> None:
    one, two = Case(), Case(AdamW)
    names = dict(zip(one.params + two.params, NAMES + NAMES, strict=True))
    replacements = {one.params[0]: {"a.A": one.factors[0]}, two.params[3]: {"b.A": two.factors[3]}}
    substitution = Substitution([one.optimizer, two.optimizer], replacements, names)
    assert same(one.groups[0]["params"], [one.factors[0], *one.params[1:3]])
    assert same(two.groups[0]["params"], two.params[:3]) and same(two.groups[1]["params"], [two.factors[3]])
    substitution.undo()
    assert same([p for group in two.groups for p in group["params"]], two.params)


def test_at_rest_groups_and_states_show_the_users_own_parameters_and_acting_puts_all_back() -> None:
    case = Case(AdamW, named=True)
    substitution = case.substitution()
    step(case.optimizer)
    inside = [list(group["params"]) for group in case.groups]
    names, moments = case.groups[0]["param_names"], case.optimizer.state[case.factors[0]]["exp_avg"]
    lists = [group["params"] for group in case.groups]
    for _ in range(2):  # twice does no harm
        substitution.rest()
    assert same([p for group in case.groups for p in group["params"]], case.params)
    assert case.groups[0]["param_names"] == list(NAMES[:3])
    assert set(case.optimizer.state) <= set(case.params)
    assert case.optimizer.state_dict()["param_groups"] == case.before["param_groups"]
    assert substitution.states(case.optimizer)[case.factors[0]]["exp_avg"] is moments
    assert list(substitution.held(case.optimizer)) == ["a.A", "a.B", "a.bias", "b.A", "b.B", "b.bias"]
    for _ in range(2):
        substitution.act()
    for group, expected in zip(case.groups, inside, strict=True):
        assert same(group["params"], expected)
    assert case.groups[0]["param_names"] == names
    assert case.optimizer.state[case.factors[0]]["exp_avg"] is moments
    assert all(own is group["params"] for own, group in zip(lists, case.groups, strict=True))
    step(case.optimizer)


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)


def exchange(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.state = defaultdict(dict)


def clear(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.state.clear()


# Adagrad makes its state once, when it is constructed, and can't step without.
@pytest.mark.parametrize(("make", "reset"), [(AdamW, load), (AdamW, exchange), (AdamW, clear), (Adagrad, load)])
def test_who_resets_the_state_at_rest_resets_that_of_factors(
    make: Callable[..., Optimizer], reset: Callable[..., None]
) -> None:
    case = Case(make)
    start = copy.deepcopy(case.before)
    substitution = case.substitution()
    for _ in range(2):
        step(case.optimizer)
    substitution.rest()
    reset(case.optimizer, start)
    with pytest.warns(UserWarning, match=f"The state of {make.__name__} was cleared or loaded"):
        substitution.rest()
    assert not set(case.factors) & substitution.states(case.optimizer).keys()
    substitution.act()
    step(case.optimizer)
    assert {float(case.optimizer.state[p]["step"]) for p in case.factors} == {1.0}


def test_a_checkpoint_asked_for_after_a_reset_has_nothing_of_the_factors() -> None:
    case = Case(AdamW)
    substitution = case.substitution()
    step(case.optimizer)
    substitution.rest()
    clear(case.optimizer, {})
    with pytest.warns(UserWarning, match="cleared or loaded"):
        assert not substitution.states(case.optimizer)


@pytest.mark.filterwarnings("error")
def test_states_are_kept_where_nobody_resets_them() -> None:
    case = Case(AdamW)
    substitution = case.substitution()
    step(case.optimizer)
    case.optimizer.load_state_dict(case.optimizer.state_dict())  # what is to be seen is all of it
    substitution.rest()
    moments = {"exp_avg": torch.ones(1, 2)}
    substitution.set_state(case.optimizer, case.factors[0], moments)  # as from a checkpoint
    case.groups[0]["lr"] = 0.7
    case.optimizer.state.pop(case.params[1])
    substitution.rest()
    substitution.act()
    assert case.optimizer.state[case.factors[0]] is moments
    assert set(case.factors) <= case.optimizer.state.keys()


def test_what_is_added_while_it_acts_and_while_it_rests_is_kept() -> None:
    case = Case(AdamW)
    substitution = case.substitution()
    one, two, three = (nn.Parameter(torch.ones(2)) for _ in range(3))
    case.groups[0]["params"].append(one)
    substitution.rest()
    case.groups[1]["params"].append(two)
    case.optimizer.add_param_group({"params": [three]})
    substitution.act()
    step(case.optimizer)
    substitution.undo()
    assert same(
        [p for group in case.groups for p in group["params"]], [*case.params[:3], one, case.params[3], two, three]
    )
    assert {one, two, three} <= set(case.optimizer.state)


def test_an_optimizer_that_holds_on_to_its_list_of_parameters_sees_the_factors() -> None:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    A = nn.Parameter(torch.ones(1, 2))
    optimizer = torch.optim.LBFGS(params)
    substitution = Substitution([optimizer], {params[0]: {"A": A}}, {})
    target = torch.tensor([3.0, -1.0])
    optimizer.step(lambda: _backward((A[0] + params[1] - target).square().sum()))
    assert not torch.equal(A.detach(), torch.ones(1, 2)) and torch.equal(params[0].detach(), torch.ones(3, 2))
    substitution.undo()
    assert same(optimizer.param_groups[0]["params"], params)


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss
