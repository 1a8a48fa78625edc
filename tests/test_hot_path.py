"""What a step does between merges: it waits for no device, and profilers see it by name."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport, product
from lightning_lte.execution import run
from tests import processes
from tests.modules import (
    RANK,
    WIDTH,
    Module,
    Net,
    adamw,
    after_backward,
    clone,
    loader,
    make_data,
    make_net,
    sgd,
    trainer,
)

# Two steps in which weights are watched, and a third one.
SETTLED = 3
PERIOD = 3


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: reading a value, and copying to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Waits:
        own = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.seen.append("tolist")
            return own(tensor)

        self._patches.setattr(Tensor, "tolist", tolist)  # reads its values past all dispatch
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize(("heads", "after_merge"), [(1, "keep"), (4, "keep"), (4, "reset")])
def test_no_step_between_merges_waits_for_a_device(execution: Any, heads: int, after_merge: Any) -> None:
    net = Net().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    config = LTEConfig(heads, SETTLED + 4, rank=RANK, execution=execution, after_merge=after_merge)
    explorer = Explorer(net, optimizer, config)
    x, y = make_data(16)

    def step() -> None:
        loss = run(explorer, lambda own: cross_entropy(net(own[0]), own[1]), (x, y))
        with explorer.backward():
            loss.backward()
        after_backward(explorer, optimizer, clip=1.0)

    for _ in range(SETTLED):
        step()
    with Waits() as waits:
        for _ in range(3):
            step()
        assert waits.seen == [] and explorer.merges == 0
        step()  # a merge decides by what it finds, so it shows that waits are seen
    assert waits.seen and explorer.merges == 1


class WithStatistics(Net):
    """A net with batch norm, which has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]


class Replay(TorchDispatchMode):
    """Does once more what was done inside, as a CUDA graph would: with the same tensors, and no Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def __call__(self) -> None:
        for func, args, kwargs, before in self._calls:
            results = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(before), results, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Idle(Net):
    """With a parameter that takes no part, and one that takes part on the device with an even rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.nowhere, self.somewhere = (nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y if dist.get_rank() % 2 else y + self.somewhere.sum()


def waits_of_averaged_steps(choices: dict[str, Any], idle: bool) -> tuple[list[str], list[float]]:
    """What a device waits for in two steps that average gradients, and parameters that take part less afterwards."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    net = (Idle() if idle else Net()).double()
    # Weight decay and momentum would move what has a gradient of zeros.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    explorer = Explorer(net, optimizer, LTEConfig(4, 30, rank=RANK, execution="batched", **choices), transport)
    x, y = make_data(8)
    waits = Waits()
    for number in range(SETTLED + 2):
        with waits if number >= SETTLED else nullcontext():
            loss = run(explorer, lambda own: cross_entropy(net(own[0]).square(), own[1]), (x, y))
            with explorer.backward():
                loss.backward()
            after_backward(explorer, optimizer)
    for replica in explorer.injection.replicas:
        replica.param.data.copy_(replica.copies[0])
    return waits.seen, [float(p[0]) for p in (net.nowhere, net.somewhere)] if isinstance(net, Idle) else []


@pytest.mark.parametrize("choices", [{"replicas": "step"}, {"full_rank_steps": 20}], ids=str)
def test_averaging_gradients_waits_for_no_device_but_where_one_has_none(choices: dict[str, Any]) -> None:
    assert [seen for seen, _ in processes.run(waits_of_averaged_steps, 2, choices, False)] == [[], []]
    found = processes.run(waits_of_averaged_steps, 2, choices, True)
    assert [seen for seen, _ in found] == [["tolist"] * 2] * 2
    # As in data-parallel training, what takes part nowhere stays as it is, and all agree on what does somewhere.
    assert [params[0] for _, params in found] == [1, 1]
    assert found[0][1][1] == found[1][1][1] != 1


class Made(TorchDispatchMode):
    """Notes which operations make a tensor of one of some sizes, other than a view."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if isinstance(y, Tensor) and y.numel() in self.sizes and not func.is_view and "view" not in str(func):
            self.seen.append((str(func), y.numel()))
        return y


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("split", [{}, {"second": 3}])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_a_step_makes_nothing_of_the_size_of_factors_but_differences_and_their_gradients(
    heads: int, after_merge: Any, split: dict[str, int]
) -> None:
    net = nn.Sequential(OrderedDict(first=nn.Linear(46, 26), second=nn.Linear(26, 66)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    # Of a lower rank some are transposed on a CPU: see thin.py.
    config = LTEConfig(heads, 100, rank=9, execution="batched", after_merge=after_merge, split=split)
    explorer = Explorer(net, optimizer, config)
    x = torch.randn(20, 46)

    def forward_and_backward() -> None:
        with explorer.heads():
            loss = net(x).square().mean()
        with explorer.backward():
            loss.backward()

    for _ in range(SETTLED):
        forward_and_backward()
        explorer.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        explorer.step()
    factors = [p for f in explorer.injection.factors.values() for p in f.trained.values()]
    assert len(factors) == 4
    with Made({p.numel() for p in factors}) as made:
        forward_and_backward()
    assert all(p.grad is not None for p in factors)
    names = [name for name, _ in made.seen]
    products = [name for name in names if name.startswith("aten.bmm")]
    differences = [name for name in names if name.startswith("aten.sub")]
    assert len(products) == 4 and len(names) == len(products) + len(differences), names
    assert bool(differences) == (after_merge == "keep")


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shape", [(8, 46), (8, 3, 46), (4, 3, 46), (4, 2, 3, 46)])
@pytest.mark.parametrize("split", [{}, {"0": 2}])
def test_a_linear_layer_is_one_step_of_autograd(heads: int, shape: tuple[int, ...], split: dict[str, int]) -> None:
    """Views of inputs, of factors and of what comes out would be steps of their own, forward and backward."""
    net = nn.Sequential(nn.Linear(46, 26))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(heads, 100, rank=2, execution="batched", split=split))
    for f in explorer.injection.factors.values():
        f.end_trial()
    x = torch.randn(shape, requires_grad=True)
    with explorer.heads():
        y = net(x)
    assert y.shape == (*shape[:-1], 26) and not y._is_view()
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    before = [type(step).__name__ for step, _ in y.grad_fn.next_functions if step is not None]
    assert before == ["AccumulateGrad"] * 4  # x, bias, A and B


class Watching(Callback):
    """Looks at whole batches, all but the first ones and those with merges."""

    def __init__(self, period: int) -> None:
        self.period, self.waits, self.watched = period, Waits(), 0

    def _looks_at(self, batch: int) -> bool:
        return batch >= SETTLED and (batch + 1) % self.period != 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._looks_at(batch_idx):
            self.watched += 1
            self.waits.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._looks_at(batch_idx):
            self.waits.__exit__(None, None, None)


def test_no_batch_under_lightning_waits_for_a_device() -> None:
    # SGD: torch's Adam keeps a counter on the CPU, and reads it, which is no wait for a device.
    watching = Watching(period=5)
    strategy = LTEStrategy(heads=2, merge_every=5, rank=RANK, execution="batched")
    trainer(strategy, max_epochs=1, callbacks=[watching], gradient_clip_val=1.0).fit(
        Module(optimizer=sgd), loader(samples=12 * 16)
    )
    assert watching.watched == 7 and watching.waits.seen == []


def test_a_profiler_sees_heads_and_merges_by_name() -> None:
    net = Net()
    optimizer = adamw(net.parameters())
    explorer = Explorer(net, optimizer, LTEConfig(2, 1, rank=RANK, execution="batched"))
    x, y = (t.float() if t.is_floating_point() else t for t in make_data(16))
    with profile() as profiler:
        with explorer.heads():
            loss: Tensor = cross_entropy(net(x), y)
        loss.backward()
        explorer.after_backward()
        optimizer.step()
        explorer.step()
    names = {event.name for event in profiler.events() or []}
    assert {"lte::heads", "lte::merge start", "lte::merge exchange", "lte::merge land"} <= names


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"heads": 1},
        {"execution": "sequential"},
        {"after_merge": "reset", "reset_a": "redraw", "reset_moments": 0.5},
        {"refresh": 1},
        {"overlap": 1},
        {"stagger": 2},
        {"weight_decay": "weights"},
        {"outer_optimizer": partial(torch.optim.SGD, lr=0.7)},
        {"freeze_a": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("half", [False, True])
def test_a_step_that_is_replayed_goes_on_through_merges(
    chosen: dict[str, Any], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph does it: docs/assumptions.md says what to capture."""
    monkeypatch.setattr(product, "is_captured", lambda device: True)
    ends = []
    for captures in (False, True):
        net = make_net(WithStatistics).to(torch.float32 if half else torch.float64)
        optimizer = sgd(net.parameters(), lr=0.02)
        config = LTEConfig(**{"heads": 4, "merge_every": PERIOD, "rank": RANK, "execution": "batched", **chosen})
        explorer = Explorer(net, optimizer, config)
        batch = [t.to(net.out.weight.dtype) if t.is_floating_point() else t for t in make_data(16)]

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = run(explorer, lambda own: cross_entropy(net(own[0]), own[1]), batch)  # noqa: B023
            with explorer.backward():  # noqa: B023
                loss.backward()
            explorer.after_backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        replay, alive = Replay(), []
        for number in range(4 * PERIOD):
            for static, own in zip(batch, make_data(16, seed=number), strict=True):
                static.copy_(own)
            if number == SETTLED:
                # A graph that lives on, and with it the copies that autocast made of weights.
                with torch.autocast("cpu", torch.bfloat16, enabled=half), explorer.all_heads():
                    alive.append(net.eval()(batch[0]))
                net.train()
            if captures and number > SETTLED:
                replay()
            else:
                with replay if number == SETTLED else nullcontext():
                    step()
            optimizer.zero_grad()
            explorer.step()
        assert explorer.merges >= 4
        explorer.finish()
        ends.append(clone(net.state_dict()))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
