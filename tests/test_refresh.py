"""refresh=k: at each merge k of the r vectors of every head start anew, one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import nn

from lightning_lte import Explorer, LTEConfig, LTEStrategy
from lightning_lte.optimizers import moment_names
from lightning_lte.payload import is_dense, sizes
from tests.modules import RANK, Module, adamw, clone, loader, make_data, make_net, sgd, train_step, trainer
from tests.test_exactness import HEADS, OUTER, train_both
from tests.test_merge import learn, literal_deltas, merged, weights


def refreshing(**choices: Any) -> LTEConfig:
    return LTEConfig(HEADS, **{"merge_every": 3, "rank": RANK, "refresh": 1, **choices})


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_training_equals_the_oracle(execution: Any, after_merge: Any, optimizer: Any) -> None:
    train_both(refreshing(execution=execution, after_merge=after_merge), optimizer)


@pytest.mark.parametrize(
    "choices",
    [
        {"refresh": 2},
        {"merge_every": 1},
        {"merge_every": 4, "stagger": 2},
        {"outer_optimizer": OUTER[3]},
        {"freeze_a": True},
        {"weight_decay": "weights"},
        {"replicas": "step", "after_merge": "reset"},
    ],
    ids=str,
)
def test_other_choices_beside_it_equal_the_oracle(choices: dict[str, Any]) -> None:
    train_both(refreshing(**choices), adamw)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), id="SGD-Nesterov"),
        pytest.param(partial(torch.optim.Adam, lr=0.01, amsgrad=True), id="Adam-amsgrad"),
        pytest.param(partial(torch.optim.AdamW, lr=0.01, fused=True), id="AdamW-fused"),
        pytest.param(partial(torch.optim.RMSprop, lr=0.01, momentum=0.5), id="RMSprop"),
    ],
)
def test_moments_of_other_optimizers_equal_the_oracles(optimizer: Any) -> None:
    train_both(refreshing(), optimizer, steps=14)


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_vectors_start_anew_in_turn_and_the_others_live_on(after_merge: Any) -> None:
    injection = made_of(after_merge)
    chosen, expected = refreshing(refresh=2, after_merge=after_merge, rank=5), weights(injection)
    for merges in range(4):
        learn(injection, seed=merges)
        before = {f.name: (f.A.detach().clone(), f.B.detach().clone()) for f in injection.factors.values()}
        for f in injection.factors.values():
            expected[f.name] += sum(literal_deltas(f)) / HEADS
        merged(injection, chosen, merges=merges)
        # Nothing is lost: W has all that was learned, and every head starts from it.
        torch.testing.assert_close(weights(injection), expected)
        anew = {(2 * merges) % 5, (2 * merges + 1) % 5}
        for f in injection.factors.values():
            A, B = before[f.name]
            for head in range(HEADS):
                torch.testing.assert_close(f.effective(head), f.weight.detach())
            for vector in range(5):
                fresh = vector in anew
                assert (f.A[..., vector, :] != A[..., vector, :]).all() == fresh
                assert torch.equal(f.A[..., vector, :], A[..., vector, :]) != fresh
                gone = fresh or after_merge == "reset"
                assert torch.equal(f.B[..., vector], torch.zeros_like(B[..., vector]) if gone else B[..., vector])


def made_of(after_merge: Any, rank: int = 5, **choices: Any) -> Any:
    model = make_net()
    config = refreshing(refresh=2, after_merge=after_merge, rank=rank, **choices)
    return Explorer(model, adamw(model.parameters()), config).injection


def test_a_vector_that_starts_anew_is_as_long_as_those_of_the_start() -> None:
    injection = made_of("keep")
    for f in injection.factors.values():
        lengths = f.A.detach().norm(dim=-1)
        f.start_vectors_anew(1)
        torch.testing.assert_close(f.A.detach().norm(dim=-1), lengths)
        # And heads differ.
        assert not torch.equal(f.A[0, ..., 0, :], f.A[1, ..., 0, :])


def test_heads_of_rank_one_live_on_as_they_are() -> None:
    """Vectors (norms as vector-scalar, layers with a rank of 1) have nothing that would live on."""
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)).double()
    config = refreshing(rank=3, norms="vector-scalar", rank_pattern={"2": 1})
    explorer = Explorer(model, adamw(model.parameters()), config)
    assert {f.name: f.refresh for f in explorer.injection.factors.values()} == {
        "0": 1,
        "1": 0,
        "1.bias": 0,
        "2": 0,
    }


def test_one_head_of_low_rank_reaches_all_directions_of_a_weight() -> None:
    """In 12 periods a head of rank 3 trains 3 + 11 vectors; without refresh, A frozen, these 3."""
    ranks = {}
    for refresh in (0, 1):
        model = nn.Linear(12, 12, bias=False).double()
        start = model.weight.detach().clone()
        opt = sgd(model.parameters())
        config = LTEConfig(1, 1, rank=3, refresh=refresh, freeze_a=True)
        explorer = Explorer(model, opt, config)
        x = torch.randn(64, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for _ in range(12):
            with explorer.heads():
                loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            explorer.after_backward()
            opt.step()
            opt.zero_grad()
            explorer.step()
        explorer.finish()
        ranks[refresh] = int(torch.linalg.matrix_rank(model.weight.detach() - start, rtol=1e-9))
    assert ranks == {0: 3, 1: 12}


@given(rank=st.integers(2, 7), refresh=st.integers(1, 6), merges=st.integers(1, 9))
def test_each_vector_starts_anew_once_before_any_does_twice(rank: int, refresh: int, merges: int) -> None:
    refresh = min(refresh, rank - 1)
    model = nn.Linear(20, 20).double()
    config = LTEConfig(2, rank=rank, refresh=refresh)
    explorer = Explorer(model, sgd(model.parameters()), config)
    (f,) = explorer.injection.factors.values()
    times = torch.zeros(rank)
    for number in range(merges):
        times[f.start_vectors_anew(number)] += 1
    assert times.sum() == merges * refresh and times.max() - times.min() <= 1


def test_a_wire_of_few_bits_sends_dense_what_a_fresh_vector_would_forget() -> None:
    (f, *_) = made_of("keep", wire="int8").factors.values()
    assert is_dense(f, 2, "int8")
    f.refresh = 0
    assert not is_dense(f, 2, "int8", "factors")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"refresh": -1}, "refresh must be .* received -1.*Give refresh=1"),
        ({"refresh": 0.5}, "refresh must be .* received 0.5"),
        ({"refresh": True}, "refresh must be .* received True"),
        (
            {"refresh": RANK},
            f"below the rank.* received refresh={RANK} with rank={RANK}.*Give a higher rank or",
        ),
        ({"refresh": 9, "rank_pattern": {"first": 8}}, "received refresh=9 with rank=8"),
        ({"overlap": 1}, "received refresh=1 with overlap=1. Give refresh=0 or overlap=0"),
        ({"after_merge": "reset", "reset_a": "redraw"}, "reset_a='redraw' all of them; received refresh=1"),
        ({"payload": "factors", "wire": "int8"}, "With refresh factors are sent in full precision alone"),
        ({"shard": 2}, "received shard=2 with refresh=1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        refreshing(**choices)


def test_the_strategy_refreshes_and_nothing_of_it_is_left() -> None:
    module = Module(optimizer=adamw)
    seen: list[list[int]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append([f.refreshed for f in trainer.strategy.explorer.injection.factors.values()])

    trainer(LTEStrategy(HEADS, 2, rank=RANK, refresh=1), max_steps=5, callbacks=[Watch()]).fit(module, loader(80, 16))
    assert [set(counts) for counts in seen] == [{0}, {1}, {1}, {2}, {2}]
    assert type(module.net.first) is nn.Linear


def test_a_layer_of_a_higher_rank_may_have_more_vectors_that_start_anew() -> None:
    assert refreshing(refresh=RANK, rank_pattern={"first": RANK + 1}).refresh == RANK


class Codes(torch.optim.Optimizer):
    """Keeps its moments in 8 bits, of which the code 128 means zero."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["codes"] = torch.full(p.shape, 128, dtype=torch.uint8)
            p.data -= 0.1 * (p.grad + state["codes"].to(p.dtype) - 128)


def test_moments_in_codes_stay_as_they_are() -> None:
    explorer, opt = trained(lambda params: Codes(params, {}), steps=3)
    for f in explorer.injection.factors.values():
        assert f.refreshed == 1
        for p in f.trained.values():
            assert (opt.state[p]["codes"] == 128).all()


def test_step_sizes_are_no_moments() -> None:
    explorer, opt = trained(lambda params: torch.optim.Rprop(params, lr=0.01), steps=3)
    for f in explorer.injection.factors.values():
        assert f.refreshed == 1
        of_A, of_B = opt.state[f.A], opt.state[f.B]
        assert of_A["step_size"][..., 0, :].all() and not of_A["prev"][..., 0, :].any()
        assert of_B["step_size"][..., 0].all() and not of_B["prev"][..., 0].any()


def trained(optimizer: Any, steps: int, **choices: Any) -> tuple[Explorer, torch.optim.Optimizer]:
    model = make_net()
    opt = optimizer(model.parameters())
    explorer = Explorer(model, opt, refreshing(execution="batched", **choices))
    for step in range(steps):
        train_step(explorer, model, opt, make_data(16, seed=step))
    return explorer, opt


class Copies(torch.optim.Optimizer):
    """Steps a copy of its own of each parameter, as those for half precision do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            master = self.state[p].setdefault("master", p.detach().clone().float())
            master -= 0.1 * p.grad.float()
            p.data.copy_(master)


@pytest.mark.parametrize("choices", [{}, {"refresh": 0, "after_merge": "reset"}], ids=str)
def test_optimizers_that_would_write_back_what_starts_anew_are_refused(choices: dict[str, Any]) -> None:
    model = make_net()
    with pytest.raises(ValueError, match="received Copies, which keeps copies of what it trains: master"):
        Explorer(model, Copies(model.parameters(), {}), refreshing(**choices))
    assert type(model.first) is nn.Linear
    Explorer(model, Copies(model.parameters(), {}), refreshing(refresh=0))


def test_a_merge_while_gradients_are_accumulated_leaves_none_of_what_was() -> None:
    explorer, _ = trained(sgd, steps=2, merge_every=100)
    model = explorer.module
    with explorer.heads():
        loss = torch.nn.functional.cross_entropy(model(make_data(16)[0]), make_data(16)[1])
    loss.backward()
    explorer.after_backward()
    explorer.merge()
    for f in explorer.injection.factors.values():
        assert f.A.grad is not None and f.B.grad is not None
        assert not f.A.grad[..., 0, :].any() and f.A.grad[..., 1:, :].any()
        assert not f.B.grad[..., 0].any() and f.B.grad[..., 1:].any()


def test_frozen_factors_that_travel_with_every_merge_are_counted() -> None:
    (f, *_) = made_of("keep", freeze_a=True).factors.values()
    assert sizes(f)[1] == f.A.nbytes + f.B.nbytes
    f.refresh = 0
    assert sizes(f)[1] == f.B.nbytes


def test_what_was_learned_while_a_merge_travelled_survives_a_resume_with_refresh() -> None:
    explorer, _ = trained(sgd, steps=4, refresh=0, overlap=2)
    assert explorer.flights
    state, module_state = explorer.state_dict(), clone(explorer.module.state_dict())
    resumed, _ = trained(sgd, steps=0)
    resumed.module.load_state_dict(module_state)
    resumed.load_state_dict(state)
    factors = list(resumed.injection.factors.values())
    flight = {f.name: state["flights"][0]["merge"]["totals"][f.name] / HEADS for f in factors}
    expected = {f.name: torch.stack([f.effective(h) for h in range(HEADS)]).mean(0) for f in factors}
    resumed.finish()
    for f in factors:
        assert flight[f.name].norm() > 1e-3
        torch.testing.assert_close(f.weight.detach(), expected[f.name])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(torch.optim.SGD, momentum=0.9), {"momentum_buffer"}),
        (partial(torch.optim.AdamW, amsgrad=True, fused=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (torch.optim.Adamax, {"exp_avg", "exp_inf"}),
        (torch.optim.Rprop, {"prev"}),
        (torch.optim.ASGD, set()),  # a mean of parameters is no moment, and neither are its step sizes
        (torch.optim.Adafactor, {"row_var", "col_var", "variance"}),
        (partial(Codes, defaults={}), set()),
    ],
)
def test_moments_are_what_is_zero_while_gradients_are(make: Any, expected: set[str]) -> None:
    kwargs = {} if "defaults" in getattr(make, "keywords", {}) else {"lr": 0.1}
    assert moment_names(make([torch.nn.Parameter(torch.ones(4, 4))], **kwargs)) == expected
