"""torch.compile: one graph for training, over merges, validation and resumed runs, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import Explorer, LTEConfig, LTEStrategy
from tests.modules import IN, RANK, Kinds, Module, Net, adamw, clone, make_data, make_net, sgd, train_step, trainer

HEADS = 4
WIDTH = {Net: IN, Kinds: 2 * 6 * 6 + 5}
# What heads that share a device, and one alone, may do.
WAYS: list[dict[str, Any]] = [
    {"heads": HEADS, "execution": "batched"},
    {"heads": HEADS, "execution": "batched", "after_merge": "reset"},
    {"heads": HEADS, "execution": "sequential"},
    {"heads": HEADS, "execution": "sequential", "after_merge": "reset", "reset_a": "redraw"},
    {"heads": 1},
    {"heads": 1, "after_merge": "reset"},
]
per_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(str(v) for v in way.values()))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Silent(Module):
    """`self.log` breaks a graph, in Lightning as it is."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


def compiled(where: str, kind: Any, backend: str = "eager") -> Any:
    """A LightningModule that is compiled as a whole, in its net, or in its step."""
    module = Silent(make_net(kind), sgd)
    if where == "net":
        module.net = torch.compile(module.net, backend=backend, fullgraph=True)
    elif where == "net in place":
        module.net.compile(backend=backend, fullgraph=True)
    elif where == "step":
        module.training_step = torch.compile(module.training_step, backend=backend, fullgraph=True)  # type: ignore[method-assign]
    elif where == "module":
        return torch.compile(module, backend=backend, fullgraph=True)
    return module


def batches(kind: Any) -> DataLoader:
    x, y = make_data(48, width=WIDTH[kind])
    return DataLoader(TensorDataset(x, y), batch_size=16)


@per_way
@pytest.mark.parametrize(
    ("where", "of_training", "of_validation"), [("net", 1, 1), ("net in place", 1, 1), ("module", 1, 1), ("step", 1, 0)]
)
def test_one_graph_over_merges_validation_and_a_resumed_run(
    way: dict[str, Any], where: str, of_training: int, of_validation: int, tmp_path: Path
) -> None:
    module = compiled(where, Net)

    def fit(steps: int, **more: Any) -> Any:
        t = trainer(LTEStrategy(merge_every=2, rank=RANK, **way), max_steps=steps, num_sanity_val_steps=0)
        t.fit(module, batches(Net), batches(Net), **more)
        return t

    fit(2)
    assert graphs() == of_training
    fit(7).save_checkpoint(tmp_path / "seven.ckpt")
    assert graphs() == of_training + of_validation
    with torch._dynamo.config.patch(error_on_recompile=True):
        fit(11, ckpt_path=tmp_path / "seven.ckpt", weights_only=False)
    assert graphs() == of_training + of_validation


@per_way
def test_layers_of_every_kind_are_in_one_graph_and_give_the_numbers_of_those_that_are_not_compiled(
    way: dict[str, Any],
) -> None:
    ends = []
    for where in ("nowhere", "net in place"):
        module = compiled(where, Kinds)
        trainer(LTEStrategy(merge_every=2, rank=RANK, split={"linear1": 2}, **way), max_steps=5).fit(
            module, batches(Kinds)
        )
        ends.append(clone(module.state_dict()))
    assert graphs() == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11)


def test_heads_that_share_a_device_by_proof_are_in_one_graph() -> None:
    """The proof itself runs without torch.compile."""
    module = compiled("net", Net)
    s = LTEStrategy(HEADS, 2, rank=RANK)
    trainer(s, max_steps=5).fit(module, batches(Net))
    assert "(batched): proved" in str(s.report()) and graphs() == 1


class Outermost(Net):
    """Has time outermost inside, which one forward over all heads can't deal out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1))


def test_the_proof_looks_inside_of_what_is_compiled() -> None:
    module = compiled("net", Outermost)
    s = LTEStrategy(HEADS, 2, rank=RANK)
    trainer(s, max_steps=2).fit(module, batches(Net))
    assert "(sequential)" in str(s.report())


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_heads_that_come_later_make_no_other_graphs_than_their_number(execution: Any) -> None:
    module = compiled("net in place", Net)
    s = LTEStrategy(2, 2, rank=RANK, execution=execution, grow_heads={3: 4})
    trainer(s, max_steps=9).fit(module, batches(Net))
    # The number of heads is the shape of a batched product. Heads that take turns see a smaller slice each, the shape
    # of which torch.compile takes for one that may change, as without heads.
    assert graphs() == 2


class ByHand(Silent):
    automatic_optimization = False  # type: ignore[assignment]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_manual_optimization_with_a_compiled_net(execution: Any, freeze_a: bool) -> None:
    """Heads that take turns run in threads of their own here, and share the graph."""
    ends = []
    for is_compiled in (False, True):
        module = ByHand(make_net(Net), sgd)
        if is_compiled:
            module.net.compile(backend="eager", fullgraph=True)
        s = LTEStrategy(HEADS, 2, rank=RANK, execution=execution, freeze_a=freeze_a)
        trainer(s, max_steps=5).fit(module, batches(Net))
        ends.append(clone(module.state_dict()))
    assert graphs() == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11)


class Dropped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_modes_and_forwards_without_heads_have_a_graph_each_and_no_more(execution: Any) -> None:
    net = make_net(Dropped)
    opt = adamw(net.parameters())
    explorer = Explorer(net, opt, LTEConfig(HEADS, 2, rank=RANK, execution=execution))
    if execution == "sequential":
        explorer.go_sequential("the test wants it")
    run: Any = torch.compile(net, backend="eager", fullgraph=True)
    seen = []
    for step in range(6):
        net.train()
        train_step(explorer, run, opt, make_data(16, seed=step))
        net.eval()
        train_step(explorer, run, opt, make_data(16, seed=step))
        with torch.no_grad():
            run(make_data(16)[0])
        net.train()
        run(make_data(16)[0])
        seen.append(graphs())
    assert seen == [4] * 6


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self._inner, self.first(x), use_reentrant=False))

    def _inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.norm(x))))


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_activation_checkpointing_inside_of_a_compiled_net(execution: Any) -> None:
    ends = []
    for kind, where in ((Net, "nowhere"), (Checkpointed, "net in place")):
        module = compiled(where, kind, "aot_eager")
        trainer(LTEStrategy(HEADS, 2, rank=RANK, execution=execution), max_steps=5).fit(module, batches(Net))
        ends.append(clone(module.state_dict()))
    assert graphs() == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@per_way
def test_inductor_gives_the_numbers_of_what_is_not_compiled(way: dict[str, Any]) -> None:
    ends = []
    for where in ("nowhere", "net in place"):
        module = compiled(where, Kinds, "inductor")
        trainer(LTEStrategy(merge_every=2, rank=RANK, **way), max_steps=5).fit(module, batches(Kinds))
        ends.append(clone(module.state_dict()))
    assert graphs() == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-7, atol=1e-9)
