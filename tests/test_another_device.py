"""Training on another device than the CPU: nothing is left behind on the CPU, and no step waits for the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from lightning_lte import Explorer, LTEConfig, product
from lightning_lte.batch import Layout
from lightning_lte.execution import run
from lightning_lte.optimizers import acts_per_element, decays_apart, magnitude_names, moment_names
from lightning_lte.outer import OuterOptimizer
from lightning_lte.trial import checksum
from tests.another_device import DEVICE, Elsewhere, another_device, move_
from tests.modules import Kinds, after_backward, make_data, make_net, train_step

PERIOD, STEPS = 3, 7
# Weights are watched in the first two steps, and a merge comes with the third. The last step goes on from a checkpoint.
QUIET = (3, 4, 6)


class WithStatistics(nn.Module):
    """Batch norm, which has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(80, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Scaled(WithStatistics):
    """A parameter without dimensions, such as CLIP's `logit_scale`, of which optimizers count steps, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@pytest.fixture(autouse=True)
def heads_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    # It asks whether tensors are of torch's own classes, and whether autocast is on for their device.
    applies = lambda x, *_: x.dtype == torch.float64  # noqa: E731
    monkeypatch.setattr(product, "applies", applies)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"heads": 1},
        {"execution": "sequential"},
        {"after_merge": "reset", "reset_a": "redraw", "reset_moments": 0.5},
        {"freeze_a": True},
        {"norms": "vector-scalar", "embeddings": "replica"},
        {"replicas": "step"},
        {"weight_decay": "weights"},
        {"overlap": 1},
        {"stagger": 2, "refresh": 1},
        {"grow_heads": {1: 8}},
        {"verify_every": 1},
        {"full_rank_steps": 2},
        {"outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    ],
    ids=str,
)
def test_training_on_another_device_is_the_same(chosen: dict[str, Any]) -> None:
    _check(Kinds, {"execution": "batched", **chosen})


def test_running_statistics_on_another_device_are_the_same() -> None:
    _check(WithStatistics, {})


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"execution": "sequential"},
        {"after_merge": "reset", "reset_a": "redraw", "reset_moments": 0.5},
        {"grow_heads": {4: 8}},
        {"weight_decay": "weights"},
        {"overlap": 2},
        {"outer_optimizer": partial(torch.optim.SGD, lr=0.7)},
    ],
    ids=str,
)
def test_a_default_device_of_the_users_makes_no_difference(chosen: dict[str, Any]) -> None:
    def trained() -> dict[str, Any]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0 if "weight_decay" in chosen else 0.9)
        optimizer.param_groups[0]["weight_decay"] = 0.01
        explorer = Explorer(net, optimizer, LTEConfig(4, 3, rank=2, **chosen))
        for batch in batches:
            train_step(explorer, net, optimizer, batch)
        explorer.load_state_dict(explorer.state_dict())
        explorer.finish()
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    batches = [make_data(16 + step % 2, seed=step) for step in range(7)]
    net = make_net()
    expected = trained()
    net = make_net()
    torch.set_default_device("meta")  # where nothing has a value
    try:
        found = trained()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Kinds, Scaled])
def test_no_step_between_merges_waits_for_another_device(kind: type[nn.Module]) -> None:
    waits: list[list[str]] = []
    with another_device():
        _train(kind, {"execution": "batched"}, there=True, waits=waits)
    assert [waits[step] for step in QUIET] == [[], [], []]
    assert waits[PERIOD - 1]  # a merge decides by what it finds, so it shows that waits are seen


@pytest.mark.parametrize(
    "chosen",
    [{}, {"replicas": "step"}, {"overlap": 1}, {"after_merge": "reset", "reset_moments": 0.5}],
    ids=str,
)
def test_a_merge_waits_for_another_device_as_often_for_many_weights_as_for_one(chosen: dict[str, Any]) -> None:
    counts = []
    for kind in (Kinds, Scaled):
        waits: list[list[str]] = []
        with another_device():
            _train(kind, {"execution": "batched", **chosen}, there=True, waits=waits)
        counts.append(len(waits[PERIOD - 1]))
    assert counts[0] == counts[1] <= 7


def test_weights_that_are_kept_on_the_cpu_and_written_there_are_rounded_on_the_other_device() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    explorer = Explorer(net, optimizer, LTEConfig(1, 10, rank=3, base="int8"))
    for seed in range(3):
        train_step(explorer, net, optimizer, make_data(16, seed=seed))
    bases = [f.rounded for f in explorer.injection.factors.values() if f.rounded is not None]
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(1.1)
    for base in bases:
        base.device = DEVICE  # as if forwards ran there
    with another_device(), pytest.warns(UserWarning, match="All weights were written from outside"):
        explorer.act()
    assert bases and all(isinstance(part, Elsewhere) for base in bases for part in base._parts)
    # There it is also looked at whether somebody else has written to them.
    watched = [w for w in explorer.guard._watched if w.factors is not None and w.factors.rounded in bases]
    with another_device():
        bits = [(w.bits(), checksum(w.param)) for w in watched]
        assert len(bits) == len(bases) and all(isinstance(there, Elsewhere) for there, _ in bits)
        assert all(int(there) == int(here) for there, here in bits)
        assert not explorer.guard.found(settling=False)


@pytest.mark.parametrize("samples", [3, 7, 8])
def test_no_batch_is_dealt_out_with_a_wait(samples: int) -> None:
    """Also one that the heads don't divide, or that has fewer samples than they."""
    batch = make_data(samples)
    layout = Layout(batch)
    expected = [layout.split(batch, 4, 2), layout.filled_up(batch, 4)]
    Elsewhere.waits.clear()
    with another_device():
        there = [Elsewhere(t) for t in batch]
        found = [layout.split(there, 4, 2), layout.filled_up(there, 4)]
    assert not Elsewhere.waits
    held = tree_map(lambda t: t.held, found)
    torch.testing.assert_close(held, [list(map(list, expected[0])), list(expected[1])])


@pytest.mark.parametrize("where", ["cpu", DEVICE.type])
def test_an_outer_optimizer_counts_its_steps_where_it_wants_them(where: str) -> None:
    class Weight:
        name = "weight"

        def exact(self) -> Tensor:
            return Elsewhere(torch.ones(2, 2))

    outer = OuterOptimizer(partial(torch.optim.AdamW, capturable=where != "cpu"))
    moments = {"exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2)}
    with another_device():
        outer.load_state_dict([Weight()], {"weight": {"step": torch.tensor(3.0), **moments}})  # type: ignore[list-item]
    ((param, optimizer),) = outer._optimizers.values()
    devices = {key: value.device.type for key, value in optimizer.state[param].items()}
    assert devices == {"step": where, "exp_avg": DEVICE.type, "exp_avg_sq": DEVICE.type}


@pytest.mark.parametrize("tensors", ["lr", "betas"])
def test_an_optimizer_is_tried_whose_settings_are_tensors_on_another_device(tensors: str) -> None:
    """As those are that a CUDA graph is to follow."""
    given = {"lr": Elsewhere(torch.tensor(0.01))}
    if tensors == "betas":
        given["betas"] = (Elsewhere(torch.tensor(0.9)), Elsewhere(torch.tensor(0.99)))  # type: ignore[assignment]
    with another_device():
        param = nn.Parameter(Elsewhere(torch.ones(2, 2)))
        optimizer = torch.optim.AdamW([param], **given, foreach=False, capturable=True)  # type: ignore[arg-type]
        assert acts_per_element(optimizer) and decays_apart(optimizer) is True
        assert (magnitude_names(optimizer), moment_names(optimizer)) == ({"exp_avg_sq"}, {"exp_avg", "exp_avg_sq"})
    assert optimizer.param_groups[0]["lr"] is given["lr"]


def test_a_checkpoint_waits_for_merges_before_it_copies_what_rounding_took() -> None:
    """An exchange that ends meanwhile leaves something else there."""
    net = make_net()
    explorer = Explorer(net, torch.optim.SGD(net.parameters(), lr=0.1), LTEConfig(1, 10, rank=3))
    f = next(iter(explorer.injection.factors.values()))
    f.error = Elsewhere(torch.zeros(f.weight.shape))

    class Travelling:
        def state_dict(self) -> dict[str, Any]:
            assert f.error is not None
            f.error.add_(1)
            return {}

    explorer.flights = [Travelling()]  # type: ignore[list-item]
    assert explorer.local_state()["wire_errors"][f.name]["value"].eq(1).all()


def test_tensors_of_two_devices_are_refused() -> None:
    there, here = Elsewhere(torch.ones(2)), torch.ones(2)
    with pytest.raises(RuntimeError, match="one device"):
        there + here
    with pytest.raises(RuntimeError, match="one device"):
        here.add_(there)
    with pytest.raises(RuntimeError, match="one device"):
        here[there > 0]
    with another_device(), pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device=DEVICE, generator=torch.Generator())
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]  # a number of the CPU's may take part


def _check(kind: type[nn.Module], chosen: dict[str, Any]) -> None:
    here = _train(kind, chosen, there=False)
    with another_device():
        there = _train(kind, chosen, there=True)
    for name, value in here.items():
        torch.testing.assert_close(there[name].held, value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def _train(
    kind: type[nn.Module], chosen: dict[str, Any], *, there: bool, waits: list[list[str]] | None = None
) -> dict[str, Any]:
    """The weights after some steps, between which a checkpoint is loaded into a new model.

    Args:
        kind: of net.
        chosen: for its config.
        there: whether it is on another device.
        waits: what each step has waited for is added to it.
    """
    config = LTEConfig(**{"heads": 4, "merge_every": PERIOD, "rank": 3, **chosen})
    net, optimizer, explorer = _made(kind, config, there)
    for step in range(STEPS):
        if step == PERIOD + 2:
            weights, state = {k: v.clone() for k, v in net.state_dict().items()}, explorer.state_dict()
            assert state is not None
            net, optimizer, explorer = _made(kind, config, there)
            net.load_state_dict(weights)
            explorer.load_state_dict(state)
        Elsewhere.waits.clear()
        x, y = (Elsewhere(t) if there else t for t in make_data(16, seed=step, width=80))
        loss = run(explorer, lambda own, net=net: cross_entropy(net(own[0]), own[1]), (x, y))
        with explorer.backward():
            loss.backward()
        after_backward(explorer, optimizer, clip=1.0)
        if waits is not None:
            waits.append(list(Elsewhere.waits))
    explorer.close()
    return {name: value.detach() for name, value in net.state_dict().items()}


def _made(kind: type[nn.Module], config: LTEConfig, there: bool) -> tuple[nn.Module, torch.optim.Optimizer, Explorer]:
    net: nn.Module = make_net(kind)
    net = move_(net) if there else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    return net, optimizer, Explorer(net, optimizer, config)
