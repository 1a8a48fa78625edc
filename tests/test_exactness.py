"""The package against the literal oracle, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport
from lightning_lte.execution import run as run_step
from lightning_lte.gradients import clip_grad_norm_
from lightning_lte.running_statistics import RunningStatistics
from tests.modules import (
    FACTORED,
    IN,
    RANK,
    WIDTH,
    Kinds,
    Module,
    Net,
    Recorder,
    ScaledNet,
    adamw,
    adamw_of_large_eps,
    after_backward,
    clone,
    loader,
    make_data,
    make_net,
    sgd,
    train_step,
    trainer,
)
from tests.oracle import Oracle
from tests.processes import run

HEADS = 4
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def first_A(explorer: Explorer) -> dict[str, Tensor]:
    return {f.name: f.A.detach().clone() for f in explorer.injection.factors.values()}


def assert_same(explorer: Explorer, oracle: Oracle) -> None:
    """Every head's effective weights and replicas, and the merged model, are the oracle's.

    A replica that the local heads share is trained in place, so the module shows it as it is now.
    """
    for f in explorer.injection.factors.values():
        for head in range(explorer.count):
            torch.testing.assert_close(f.effective(head), oracle.worker_weight(head, f.name), **TOLERANCE)
    for replica in explorer.injection.replicas:
        for head in range(explorer.count):
            own = replica.copies[head if len(replica.copies) > 1 else 0]
            torch.testing.assert_close(own, oracle.workers[head].replicas[replica.name].detach(), **TOLERANCE)
    merged = oracle.merged.state_dict()
    in_place = {replica.name for replica in explorer.injection.replicas if replica.stack is None}
    for name, value in explorer.module.state_dict().items():
        if name not in in_place:
            torch.testing.assert_close(value, merged[name], **TOLERANCE)


def oracle_beside(
    explorer: Explorer, plain: nn.Module, optimizer: Any, clip: float | None = None, **choices: Any
) -> Oracle:
    """Workers that do literally what the heads of an explorer are to do.

    Args:
        explorer: that nothing was trained through.
        plain: its module as it was.
        optimizer: makes one from parameters.
        clip: see `Oracle`.
        **choices: what else `Oracle` takes.
    """
    config, groups = explorer.config, {}
    named = {f.name: f for f in explorer.injection.factors.values()}
    [group_of_all] = optimizer([nn.Parameter(torch.zeros(1))]).param_groups
    decay = group_of_all["lr"] * group_of_all.get("weight_decay", 0) if config.weight_decay == "weights" else 0.0
    for group in range(config.stagger):
        factors, replicas = explorer._grouped(0, group)
        delay = group * config.merge_every // config.stagger  # type: ignore[operator]
        groups[delay] = [f.name for f in factors] + [replica.name for replica in replicas]
        assert groups[delay]
    return Oracle(
        plain,
        first_A(explorer),
        scale=2.0,
        period=config.merge_every,  # type: ignore[arg-type]
        after_merge=config.after_merge,
        replicas=config.replicas,
        optimizer=optimizer,
        clip=clip,
        outer=config.outer_optimizer,
        overlap=config.overlap,
        freeze_a=config.freeze_a,
        decay=decay,
        groups=groups,
        refresh=config.refresh,
        fresh_vectors=lambda name, n, merges: named[name]._draw_one(n, f"refreshed at {merges}", named[name].refresh),
        **choices,
    )


def step_both(
    explorer: Explorer, opt: torch.optim.Optimizer, oracle: Oracle, x: Tensor, y: Tensor, clip: float | None
) -> None:
    """A training step through heads, by hand, and one of the oracle, on the same slices."""
    model, count = explorer.module, explorer.count
    slices = list(zip(x.chunk(count), y.chunk(count), strict=True))
    if explorer.execution == "sequential":
        losses = []
        for head, (own_x, own_y) in enumerate(slices):
            with explorer.head(head):
                losses.append(cross_entropy(model(own_x), own_y))
        loss = torch.stack(losses).mean()
    else:
        with explorer.heads():
            loss = cross_entropy(model(x), y)
    loss.backward()
    after_backward(explorer, opt, clip)
    oracle.step(slices, cross_entropy)


def train_both(
    config: LTEConfig,
    optimizer: Any,
    *,
    kind: Callable[[], nn.Module] = Net,
    factored: Collection[str] = FACTORED,
    width: int = IN,
    steps: int = 23,
    clip: float | None = None,
) -> None:
    if config.execution == "auto":
        config = replace(config, execution="batched")
    model = make_net(kind)
    plain = copy.deepcopy(model)
    opt = optimizer(model.parameters())
    explorer = Explorer(model, opt, config)
    assert set(first_A(explorer)) == set(factored)
    oracle = oracle_beside(explorer, plain, optimizer, clip)
    x_eval, _ = make_data(5, seed=99, width=width)
    for step in range(steps):
        x, y = make_data(8 * HEADS, seed=step, width=width)
        step_both(explorer, opt, oracle, x, y, clip)
        assert_same(explorer, oracle)
        if config.replicas != "step":
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(x_eval), oracle.merged.eval()(x_eval), **TOLERANCE)
            model.train()
    started = oracle.merges + len(explorer.flights)
    delays = [group * config.merge_every // config.stagger for group in range(config.stagger)]  # type: ignore[operator]
    assert explorer.clock.merges == started == sum((steps - d) // config.merge_every for d in delays)  # type: ignore[operator]
    explorer.finish()
    for name, value in oracle.finish().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, **TOLERANCE)


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("period", [1, 3, 10])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_training_equals_the_oracle(execution: Any, period: int, after_merge: Any) -> None:
    config = LTEConfig(HEADS, period, rank=RANK, after_merge=after_merge, execution=execution)
    train_both(config, adamw)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("optimizer", [adamw, sgd, torch.optim.Adagrad], ids=lambda o: o.__name__)
def test_heads_begin_after_full_rank_steps_with_the_state_of_replicas(optimizer: Any, heads: int) -> None:
    model = make_net()
    plain = copy.deepcopy(model)
    opt, plain_opt = optimizer(model.parameters()), optimizer(plain.parameters())
    explorer = Explorer(model, opt, LTEConfig(heads, 3, rank=RANK, execution="batched", full_rank_steps=5))
    starts = first_A(explorer)

    for step in range(5):
        x, y = make_data(8 * heads, seed=step)
        train_step(explorer, model, opt, (x, y))
        cross_entropy(plain(x), y).backward()
        plain_opt.step()
        plain_opt.zero_grad()
        torch.testing.assert_close(clone(model.state_dict()), clone(plain.state_dict()), rtol=0, atol=0)
        assert explorer.full_rank and not explorer.unmerged
    oracle = Oracle(plain, starts, scale=2.0, period=3, optimizer=optimizer)
    for worker in oracle.workers:
        for name, replica in worker.replicas.items():
            state = plain_opt.state[plain.get_parameter(name)]
            worker.optimizer.state[replica] = copy.deepcopy(dict(state))
    for step in range(5, 15):
        x, y = make_data(8 * heads, seed=step)
        train_step(explorer, model, opt, (x, y))
        oracle.step(list(zip(x.chunk(heads), y.chunk(heads), strict=True)), cross_entropy)
        assert_same(explorer, oracle)
    assert (explorer.clock.step, explorer.clock.merges) == (15, 3) and not explorer.full_rank


OUTER = [
    partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    partial(torch.optim.SGD, lr=1.0),
    partial(torch.optim.Adagrad, lr=0.01),
    partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("outer", OUTER, ids=lambda o: f"{o.func.__name__}-{o.keywords['lr']}")
def test_outer_optimizers_equal_the_oracle(outer: Any, after_merge: Any) -> None:
    train_both(LTEConfig(HEADS, 3, rank=RANK, after_merge=after_merge, outer_optimizer=outer), adamw)


def test_an_outer_sgd_of_rate_1_is_the_plain_sum_to_the_bit() -> None:
    plain, outer = (trained(outer_optimizer=o) for o in (None, OUTER[1]))
    torch.testing.assert_close(plain, outer, rtol=0, atol=0)


def trained(**choices: Any) -> dict[str, Tensor]:
    model = make_net()
    opt = sgd(model.parameters())
    explorer = Explorer(model, opt, LTEConfig(HEADS, 3, rank=RANK, **choices))
    for step in range(8):
        train_step(explorer, model, opt, make_data(16, seed=step))
    explorer.finish()
    return clone(model.state_dict())


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize(("period", "overlap"), [(3, 1), (5, 3), (4, 4)])
def test_merges_that_travel_while_training_goes_on_equal_the_oracle(execution: Any, period: int, overlap: int) -> None:
    train_both(LTEConfig(HEADS, period, rank=RANK, execution=execution, overlap=overlap), adamw)


@pytest.mark.parametrize(
    ("stagger", "overlap", "outer"), [(2, 0, None), (3, 0, OUTER[0]), (2, 2, None), (3, 4, OUTER[3])]
)
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_groups_that_merge_in_turn_equal_the_oracle(execution: Any, stagger: int, overlap: int, outer: Any) -> None:
    config = LTEConfig(
        HEADS, 6, rank=RANK, execution=execution, stagger=stagger, overlap=overlap, outer_optimizer=outer
    )
    train_both(config, adamw)


def test_all_of_it_with_resets() -> None:
    train_both(LTEConfig(HEADS, 6, rank=RANK, after_merge="reset", stagger=3, outer_optimizer=OUTER[0]), adamw)


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_norms_as_vector_and_scalar_equal_the_oracle(execution: Any, after_merge: Any) -> None:
    config = LTEConfig(HEADS, 3, rank=RANK, after_merge=after_merge, execution=execution, norms="vector-scalar")
    train_both(config, adamw, kind=Norms, factored=[*FACTORED, *NORMS])


class Norms(Net):
    """A norm of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.GroupNorm(2, WIDTH)
        self.instances = nn.InstanceNorm1d(WIDTH, affine=True)
        self.rms = nn.RMSNorm((2, WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))
        y = self.instances(torch.stack([y, y.square(), y.flip(1)], dim=2))[..., 2] + self.groups(y)
        return self.out(self.rms(y.unflatten(1, (2, -1))).flatten(1))


NORMS = [f"{name}{key}" for name in ("norm", "groups", "instances") for key in ("", ".bias")] + ["rms"]


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
def test_losses_that_are_sums_equal_the_oracle(execution: Any) -> None:
    """Each head's loss is the sum over its own slice, however heads share the device."""
    model, total = make_net(), partial(cross_entropy, reduction="sum")
    plain = copy.deepcopy(model)
    opt = sgd(model.parameters(), lr=0.005)
    config = LTEConfig(HEADS, 3, rank=RANK, execution=execution, loss_reduction="sum")
    explorer = Explorer(model, opt, config)
    optimizer = partial(sgd, lr=0.005)
    oracle = Oracle(plain, first_A(explorer), scale=2.0, period=3, optimizer=optimizer, clip=5.0)
    for step in range(11):
        x, y = make_data(8 * HEADS, seed=step)
        slices = list(zip(x.chunk(HEADS), y.chunk(HEADS), strict=True))
        loss = run_step(explorer, lambda own: total(model(own[0]), own[1]), (x, y))
        means = [total(worker.model(a), b) for worker, (a, b) in zip(oracle.workers, slices, strict=True)]
        torch.testing.assert_close(loss, torch.stack(means).mean(), **TOLERANCE)
        with explorer.backward():
            loss.backward()
        explorer.after_backward()
        explorer.clip_grad_norm_(5.0)
        opt.step()
        opt.zero_grad()
        explorer.step()
        oracle.step(slices, total)
        assert_same(explorer, oracle)
    assert explorer.execution == ("sequential" if execution == "sequential" else "batched")


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_layers_of_every_kind_equal_the_oracle(execution: Any, bias: bool, after_merge: Any) -> None:
    config = LTEConfig(HEADS, 3, rank=RANK, after_merge=after_merge, execution=execution, split={"linear1": 2})
    factored = ["embedding", "conv", "groups", "up", "sequence", "block.self_attn.in_proj_weight"]
    factored += [f"attention.{part}_proj_weight" for part in "qkv"] + ["attention.out_proj", "block.self_attn.out_proj"]
    factored += ["block.linear1", "block.linear2"]
    kind = partial(Kinds, bias=bias)
    train_both(config, adamw, kind=kind, factored=factored, width=2 * 6 * 6 + 5, steps=10)


def test_sequential_heads_have_bare_parameters_of_their_own() -> None:
    train_both(LTEConfig(HEADS, 3, rank=RANK, execution="sequential"), adamw, kind=ScaledNet)


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1), id="SGD"),
        pytest.param(sgd, id="SGD-momentum"),
        pytest.param(
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), id="SGD-nesterov"
        ),
        pytest.param(lambda p: torch.optim.Adam(p, lr=0.01), id="Adam"),
        pytest.param(lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-2, amsgrad=True), id="Adam-amsgrad-large-eps"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, weight_decay=0.1), id="AdamW-foreach"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, weight_decay=0.1), id="AdamW-fused"),
        pytest.param(lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1), id="Adagrad"),
        pytest.param(lambda p: torch.optim.RMSprop(p, lr=0.01), id="RMSprop"),
    ],
)
def test_optimizers_equal_the_oracles(optimizer: Any, after_merge: Any) -> None:
    train_both(LTEConfig(HEADS, 3, rank=RANK, after_merge=after_merge), optimizer, steps=10)


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_each_head_is_clipped_by_its_own_norm(execution: Any) -> None:
    train_both(LTEConfig(HEADS, 3, rank=RANK, execution=execution), sgd, clip=0.05, steps=10)


def clipped_where_there_are_gradients() -> Tensor:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    factor = nn.Parameter(torch.ones(1, 3))
    if transport.rank == 1:
        factor.grad = torch.ones(1, 3)
    clip_grad_norm_([factor], {factor}, 1.0, 1, transport, acting=None, synchronised=True)
    return transport.stack(torch.tensor([transport.rank]))


def test_a_device_without_gradients_does_not_keep_the_others_waiting() -> None:
    for ranks in run(clipped_where_there_are_gradients, 2, timeout_s=30):
        assert ranks.tolist() == [0, 1]


def test_a_complex_parameter_is_clipped_as_all_others() -> None:
    factor, replica = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    factor.grad, replica.grad = torch.full((1, 3), 2.0), torch.tensor([1 + 1j, 2j])
    norms = clip_grad_norm_([replica, factor], {factor}, 0.1, 1, Transport(), acting=None, synchronised=False)
    torch.testing.assert_close(norms, torch.tensor([18.0**0.5]))
    torch.testing.assert_close(factor.grad, torch.full((1, 3), 0.2 / 18.0**0.5))
    torch.testing.assert_close(replica.grad, torch.tensor([1 + 1j, 2j]) * 0.1 / 18.0**0.5)


def test_a_parameter_without_dimensions_is_clipped_as_all_others() -> None:
    class Tempered(Net):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.temperature

    train_both(LTEConfig(HEADS, 3, rank=RANK, execution="sequential"), sgd, kind=Tempered, clip=0.05, steps=5)


@pytest.mark.parametrize("replicas", ["freeze", "step"])
def test_other_treatments_of_replicas_equal_the_oracle(replicas: Any) -> None:
    train_both(LTEConfig(HEADS, 3, rank=RANK, replicas=replicas), adamw, steps=10)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_merging_every_step_is_multi_head_lora(freeze_a: bool) -> None:
    """f(x) = W x + (s/N) sum_n B_n A_n x, trained directly: section 3 of the paper."""
    model = make_net()
    for p in (model.norm.weight, model.norm.bias, model.first.bias, model.out.weight, model.out.bias):
        p.requires_grad_(False)
    plain = copy.deepcopy(model)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    explorer = Explorer(model, opt, LTEConfig(HEADS, 1, rank=RANK, execution="batched", freeze_a=freeze_a))
    A = {n: nn.Parameter(a) for n, a in first_A(explorer).items()}
    B = {n: nn.Parameter(torch.zeros(HEADS, plain.get_submodule(n).out_features, RANK).double()) for n in A}
    start = {n: plain.get_submodule(n).weight.detach().clone() for n in A}
    # A worker steps along its own loss's gradient; here each pair sees 1/N of it.
    direct = torch.optim.SGD([*(() if freeze_a else A.values()), *B.values()], lr=0.1 * HEADS)

    def weights() -> dict[str, Tensor]:
        return {f"{n}.weight": start[n] + 2.0 / HEADS * (B[n] @ A[n]).sum(0) for n in A}

    for step in range(12):
        x, y = make_data(8, seed=step)
        with explorer.heads():
            # Every head sees the same data.
            loss = cross_entropy(model(x.repeat(HEADS, 1)), y.repeat(HEADS))
        loss.backward()
        opt.step()
        opt.zero_grad()
        explorer.step()
        direct.zero_grad()
        cross_entropy(torch.func.functional_call(plain, weights(), (x,)), y).backward()
        direct.step()
        for name, weight in weights().items():
            torch.testing.assert_close(model.get_parameter(name).detach(), weight.detach(), **TOLERANCE)


# ---- through Lightning


def lightning_against_oracle(
    execution: str, *, clip: float | None, accumulate: int, after_merge: str = "keep", replicas: str = "merge"
) -> None:
    model = make_net()
    oracles: list[Oracle] = []

    def follow(t: Any, module: Module) -> int:
        assert_same(t.strategy.explorer, oracle_steps())
        return t.strategy.explorer.clock.merges

    batches = list(loader(16 * 12, 16))
    done = iter(range(len(batches)))

    def oracle_steps() -> Oracle:
        x, y = batches[next(done)]
        oracles[0].step(list(zip(x.chunk(HEADS), y.chunk(HEADS), strict=True)), cross_entropy)
        return oracles[0]

    class WithOracle(Module):
        def on_train_start(self) -> None:
            explorer = self.trainer.strategy.explorer
            oracles.append(
                Oracle(
                    Module(), first_A(explorer), scale=2.0, period=3, optimizer=sgd, clip=clip, accumulate=accumulate,
                    after_merge=after_merge, replicas=replicas,  # type: ignore[arg-type]
                )
            )  # fmt: skip

    strategy = LTEStrategy(
        HEADS,
        3,
        rank=RANK,
        execution=execution,
        after_merge=after_merge,
        replicas=replicas,  # type: ignore[arg-type]
    )
    recorder = Recorder(follow)
    t = trainer(
        strategy, max_epochs=1, callbacks=[recorder], gradient_clip_val=clip, accumulate_grad_batches=accumulate
    )
    module = WithOracle(model, sgd)
    t.fit(module, loader(16 * 12, 16))
    assert recorder.seen[-1] == 12 // accumulate // 3
    for name, value in oracles[0].finish().state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, **TOLERANCE)


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_fit_equals_the_oracle(execution: str, after_merge: str) -> None:
    lightning_against_oracle(execution, clip=None, accumulate=1, after_merge=after_merge)


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_fit_clips_and_accumulates_as_separate_workers_would(execution: str) -> None:
    lightning_against_oracle(execution, clip=0.05, accumulate=2)


def test_fit_with_gradients_of_replicas_averaged_equals_the_oracle() -> None:
    lightning_against_oracle("batched", clip=None, accumulate=2, replicas="step")


# ---- the same heads on several processes


def on_devices(
    heads: int,
    after_merge: str,
    replicas: str,
    clip: float | None,
    execution: str,
    more: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = make_net()
    opt = adamw(model.parameters())
    config = LTEConfig(
        heads,
        **{"merge_every": 3, **(more or {})},
        rank=RANK,
        after_merge=after_merge,  # type: ignore[arg-type]
        replicas=replicas,  # type: ignore[arg-type]
        execution=execution,  # type: ignore[arg-type]
    )
    explorer = Explorer(model, opt, config, Transport(world, rank))
    for step in range(10):
        x, y = (t.chunk(world)[rank] for t in make_data(4 * heads, seed=step))
        with explorer.heads():
            loss = cross_entropy(model(x), y)
        loss.backward()
        after_backward(explorer, opt, clip)
    explorer.finish()
    return clone(model.state_dict())


@pytest.mark.parametrize(
    ("after_merge", "replicas", "clip"),
    [("keep", "merge", None), ("reset", "merge", 0.05), ("keep", "step", None)],
)
def test_eight_heads_give_the_same_weights_wherever_they_sit(
    after_merge: str, replicas: str, clip: float | None
) -> None:
    args = (8, after_merge, replicas, clip, "batched")
    alone = on_devices(*args)
    for world in (2, 4):
        states = run(on_devices, world, *args)
        for state in states:
            for name, value in state.items():
                assert torch.equal(value, states[0][name]), f"{name} differs between the ranks of {world}"
                torch.testing.assert_close(value, alone[name], **TOLERANCE)


@pytest.mark.parametrize(
    "choices",
    [
        {"outer_optimizer": OUTER[0]},
        {"overlap": 2},
        {"merge_every": 4, "stagger": 3, "verify_every": 1},
        {"refresh": 1},
        {"refresh": 1, "payload": "factors", "freeze_a": True},
        {"merge_every": 4, "stagger": 2, "overlap": 3, "outer_optimizer": OUTER[3], "verify_every": 1},
    ],
    ids=lambda c: "-".join(c),
)
def test_merges_in_other_ways_give_the_same_wherever_heads_sit(choices: dict[str, Any]) -> None:
    args = (8, "keep", "merge", None, "batched", choices)
    alone = on_devices(*args)
    for world in (2, 4):
        states = run(on_devices, world, *args)
        for state in states:
            torch.testing.assert_close(state, states[0], rtol=0, atol=0)
            torch.testing.assert_close(state, alone, **TOLERANCE)


def test_replicas_stay_equal_on_all_devices_where_their_gradients_are_averaged_and_heads_clipped() -> None:
    states = run(on_devices, 2, 4, "keep", "step", 0.05, "batched")
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_head_on_each_device_gives_the_same_as_all_on_one() -> None:
    args = (4, "keep", "merge", None, "batched")
    alone = on_devices(*args)
    for state in run(on_devices, 4, *args):
        for name, value in state.items():
            torch.testing.assert_close(value, alone[name], **TOLERANCE)


class BatchNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.batch_norm(self.first(x))))))


class Assigning(Net):
    """Normalises what it observes, as policies do: new tensors take the place of its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            with torch.no_grad():
                total, shift = self.count + len(x), x.mean(0) - self.running_mean
                squares = self.running_var * self.count + x.var(0) * len(x) + shift**2 * self.count * len(x) / total
                self.running_mean = self.running_mean + shift * len(x) / total
                self.running_var, self.count = squares / total, total
        return self.out(torch.tanh(self.second((x - self.running_mean) / self.running_var.sqrt())))


@pytest.mark.parametrize("kind", [BatchNormed, Assigning])
def test_heads_that_take_turns_have_running_statistics_of_their_own(kind: Callable[[], nn.Module]) -> None:
    """As workers have, each with a copy of the whole model; merges average them."""
    train_both(LTEConfig(HEADS, 3, rank=RANK, execution="sequential"), adamw_of_large_eps, kind=kind, steps=10)


def test_running_statistics_that_are_assigned_between_batches_are_those_of_all_heads() -> None:
    net = make_net(BatchNormed)
    optimizer = sgd(net.parameters())
    explorer = Explorer(net, optimizer, LTEConfig(HEADS, 100, rank=RANK, execution="sequential"))
    train_step(explorer, net, optimizer, make_data(4 * HEADS))
    assigned = torch.full_like(net.batch_norm.running_mean, 100)
    net.batch_norm.running_mean = assigned
    train_step(explorer, net, optimizer, make_data(4 * HEADS))
    explorer.finish()
    assert net.batch_norm.running_mean is assigned
    assert (assigned > 80).all() and (assigned != 100).all()


@pytest.mark.parametrize("execution", ["auto", "sequential"])
def test_heads_begin_with_the_running_statistics_of_full_rank_steps(execution: Any) -> None:
    net = make_net(BatchNormed)
    optimizer = sgd(net.parameters())
    config = LTEConfig(HEADS, 100, rank=RANK, execution=execution, full_rank_steps=5)
    explorer = Explorer(net, optimizer, config)
    for step in range(5):
        train_step(explorer, net, optimizer, make_data(4 * HEADS, seed=step))
    before = clone(dict(net.named_buffers()))
    assert before["batch_norm.running_mean"].any()
    explorer.act()
    assert not explorer.full_rank
    with explorer.head(1):
        torch.testing.assert_close(clone(dict(net.named_buffers())), before, rtol=0, atol=0)


def test_running_statistics_are_not_lost_where_they_are_swapped_out_and_in_again() -> None:
    """As by callbacks that validate with averaged weights; who loads others means every head's."""

    def trained(swapped: bool, loaded: bool = False) -> dict[str, Tensor]:
        net = make_net(BatchNormed)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        explorer = Explorer(net, optimizer, LTEConfig(HEADS, 100, rank=RANK, execution="sequential"))
        for step in range(6):
            train_step(explorer, net, optimizer, make_data(4 * HEADS, seed=step))
            if swapped:
                before = clone(dict(net.named_buffers()))
                for name, buffer in net.named_buffers():
                    buffer.zero_()
                    buffer.copy_(before[name])
            if loaded and step == 3:
                net.batch_norm.reset_running_stats()
        explorer.finish()
        return clone(dict(net.named_buffers()))

    plain = trained(swapped=False)
    torch.testing.assert_close(trained(swapped=True), plain, rtol=0, atol=0)
    assert int(plain["batch_norm.num_batches_tracked"]) == 6
    assert int(trained(swapped=False, loaded=True)["batch_norm.num_batches_tracked"]) == 2


def merged_statistics(net: nn.Module, *of_heads: float) -> None:
    """Have each head's running variances be one number, and merge them."""
    statistics = RunningStatistics(net)
    statistics.split(len(of_heads))
    for head, value in enumerate(of_heads):
        statistics.select(head)
        for name, buffer in net.named_buffers():
            if "running_var" in name:
                buffer.fill_(value)
    statistics.select(None)
    statistics.take(Transport(), apart=False)
    statistics.exchange(Transport())
    statistics.land()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_in_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    net = nn.BatchNorm1d(WIDTH, dtype=dtype)
    merged_statistics(net, 40000.0, 60000.0)  # float16 ends at 65504
    torch.testing.assert_close(net.running_var, torch.full((WIDTH,), 50000.0).to(dtype))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_running_statistics_are_merged_beside_a_scripted_layer_that_heads_share() -> None:
    net = nn.Sequential(torch.jit.script(nn.BatchNorm1d(WIDTH)), nn.BatchNorm1d(WIDTH))
    merged_statistics(net, 3.0, 5.0)
    torch.testing.assert_close(net[1].running_var, torch.full((WIDTH,), 4.0))


@pytest.mark.parametrize("execution", ["batched", "sequential", "auto"])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_modules_with_scripted_parts_train(heads: int, execution: Any) -> None:
    class Scripted(Net):
        def __init__(self) -> None:
            super().__init__()
            part = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
            self.part = torch.jit.script(part.double())

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.part(self.first(x))))

    net = make_net(Scripted)
    before = clone(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    explorer = Explorer(net, optimizer, LTEConfig(heads, 2, rank=RANK, execution=execution))
    for step in range(6):
        train_step(explorer, net, optimizer, make_data(4 * HEADS, seed=step))
    explorer.finish()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    # What adds the same to all samples before a batch norm has no gradient but for rounding.
    assert moved >= before.keys() - {"norm.weight", "norm.bias", "first.bias", "part.0.bias"}
