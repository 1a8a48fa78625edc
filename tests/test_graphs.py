"""Graphs, as PyTorch Geometric has them: a batch is one large graph, with the nodes of all samples in one tensor.

Nobody but the module can split it, so the module has a hook. Which graphs a head gets is up to that hook: the one below
deals them out in order, as even as can be, and repeats a batch of fewer graphs than heads from its start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import LTEStrategy
from tests.modules import CLASSES, RANK, Recorder, adamw, clone, trainer
from tests.oracle import Oracle
from tests.processes import run
from tests.test_exactness import TOLERANCE, assert_same, first_A

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, GINConv, global_mean_pool

FEATURES, WIDTH, PERIOD = 8, 16, 3
# The layer of GCNConv is PyTorch Geometric's own, those of GINConv are torch's.
FACTORED = {"convolution.lin", "isomorphism.nn.0", "isomorphism.nn.3"}


class GraphNet(LightningModule):
    """Classifies graphs, or the nodes of one. It has replicas of all kinds: biases, a bare parameter, a norm."""

    def __init__(self, pool: bool = True, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.pool = pool
            self.convolution = GCNConv(FEATURES, WIDTH)
            # The gradient of a bias before a batch norm is rounding alone, which Adam would make large.
            first = nn.Linear(WIDTH, WIDTH, bias=False)
            mlp = nn.Sequential(first, norm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
            self.isomorphism = GINConv(mlp, train_eps=True)
            self.out = nn.Linear(WIDTH, CLASSES)
        self.double()
        self.seen: list[int] = []

    def forward(self, batch: Any) -> Tensor:
        x = self.convolution(batch.x, batch.edge_index).relu()
        x = self.isomorphism(x, batch.edge_index).relu()
        return self.out(global_mean_pool(x, batch.batch, batch.num_graphs) if self.pool else x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(getattr(batch, "num_graphs", 1))
        loss = self.loss(self(batch), batch)
        self.log("loss", loss, batch_size=self.seen[-1])
        return loss

    def loss(self, logits: Tensor, batch: Any) -> Tensor:
        return cross_entropy(logits, batch.y)

    def configure_optimizers(self) -> Any:
        return adamw(self.parameters())


class Splitting(GraphNet):
    """With the hook, as docs/assumptions.md has it."""

    def split_batch(self, batch: Batch, heads: int) -> list[Batch]:
        graphs = batch.to_data_list()
        # Every head needs a graph: a batch of fewer is repeated from its start.
        numbers = torch.arange(max(len(graphs), heads)) % len(graphs)
        return [Batch.from_data_list([graphs[i] for i in part]) for part in numbers.tensor_split(heads)]


class Nodes(GraphNet):
    """Classifies the nodes of one graph, some of which it trains on."""

    def __init__(self) -> None:
        # The running statistics of a head that is alone are the module's own at once, those of the oracle at merges.
        super().__init__(pool=False, norm=nn.LayerNorm)

    def loss(self, logits: Tensor, batch: Any) -> Tensor:
        return cross_entropy(logits[batch.train_mask], batch.y[batch.train_mask])


def random_graph(seed: int, nodes: int | None = None) -> Data:
    """A graph with a label; or with one for each node, if their number is given."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(3, 9, (), generator=generator)) if nodes is None else nodes
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    edges = torch.randint(0, count, (2, 3 * count), generator=generator)
    y = torch.randint(0, CLASSES, (1 if nodes is None else count,), generator=generator)
    mask = torch.rand(count, generator=generator) < 0.5
    return Data(x=x, edge_index=edges, y=y) if nodes is None else Data(x=x, edge_index=edges, y=y, train_mask=mask)


def random_graphs(count: int) -> list[Data]:
    return [random_graph(seed) for seed in range(count)]


def fit_against_oracle(
    module: GraphNet, loader: DataLoader, heads: int, parts: Sequence[Callable[[], Sequence[Any]]], **kwargs: Any
) -> LTEStrategy:
    """Train, and compare every head after every batch with a model of its own that has an optimizer of its own.

    Args:
        module: the user's.
        loader: as many batches as `parts`.
        heads: all on one device.
        parts: for each batch a function that makes what each head gets of it.
    """
    plain, oracles = copy.deepcopy(module), []

    class Follow(Recorder):
        def on_train_start(self, t: Any, m: Any) -> None:
            first = first_A(t.strategy.explorer)
            assert set(first) == FACTORED
            oracles.append(Oracle(plain, first, scale=2.0, period=PERIOD, optimizer=adamw))

    def follow(t: Any, m: Any) -> int:
        (oracle,) = oracles
        oracle.step([(part, part) for part in parts[len(recorder.seen)]()], module.loss)
        assert_same(t.strategy.explorer, oracle)
        return oracle.merges

    recorder = Follow(follow)
    strategy = LTEStrategy(heads, PERIOD, rank=RANK)
    trainer(strategy, max_epochs=1, callbacks=[recorder], **kwargs).fit(module, loader)
    assert recorder.seen == [step // PERIOD for step in range(1, len(parts) + 1)]
    for name, value in oracles[0].finish().state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, **TOLERANCE)
    return strategy


def kinds(module: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(layer) for name, layer in module.named_modules()}


@pytest.mark.parametrize("heads", [2, 4])
def test_without_the_hook_a_batch_of_graphs_is_refused_before_anything_changes(heads: int) -> None:
    module = GraphNet()
    before, classes = clone(module.state_dict()), kinds(module)
    with pytest.raises(ValueError, match=r"objects of kind DataBatch .*define `split_batch\(self, batch, heads\)`"):
        trainer(LTEStrategy(heads, rank=RANK), max_epochs=1).fit(module, DataLoader(random_graphs(16), 8))
    assert module.seen == [] and kinds(module) == classes
    assert list(before) == list(module.state_dict())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


# Graphs of a batch, and how many of them each head gets.
DEALT = [(2, 8, [4, 4]), (4, 8, [2, 2, 2, 2]), (4, 5, [2, 1, 1, 1]), (4, 3, [1, 1, 1, 1])]


@pytest.mark.parametrize(("heads", "batch_size", "sizes"), DEALT)
def test_heads_on_parts_of_a_batch_equal_models_of_their_own(heads: int, batch_size: int, sizes: list[int]) -> None:
    """Of 5 graphs the first head gets 2, and of 3 the fourth head gets the first one again: so the hook has it."""
    graphs, batches = random_graphs(7 * batch_size), 7

    def parts_of(batch: int) -> list[Batch]:
        own = graphs[batch * batch_size : (batch + 1) * batch_size]
        own = [*own, *own][: sum(sizes)]
        starts = [sum(sizes[:head]) for head in range(heads)]
        return [Batch.from_data_list(own[s : s + size]) for s, size in zip(starts, sizes, strict=True)]

    module = Splitting()
    keys, classes = list(module.state_dict()), kinds(module)
    parts = [lambda batch=batch: parts_of(batch) for batch in range(batches)]
    strategy = fit_against_oracle(module, DataLoader(graphs, batch_size), heads, parts)
    assert module.seen == sizes * batches
    assert "in turn (sequential): split_batch splits the batch" in strategy.report().notes[-1]
    assert list(module.state_dict()) == keys and kinds(module) == classes


@pytest.mark.parametrize("heads", [2, 4])
def test_it_learns(heads: int) -> None:
    module, graphs = Splitting(), random_graphs(16)
    whole = Batch.from_data_list(graphs)

    def loss() -> float:
        with torch.no_grad():
            return cross_entropy(copy.deepcopy(module).eval()(whole), whole.y).item()

    before = loss()
    trainer(LTEStrategy(heads, PERIOD, rank=RANK), max_epochs=40).fit(module, DataLoader(graphs, 8, shuffle=True))
    assert loss() < before / 2


def test_a_hook_that_leaves_heads_without_a_part_is_told_so() -> None:
    class Scant(GraphNet):
        def split_batch(self, batch: Batch, heads: int) -> list[Batch]:
            return [Batch.from_data_list([graph]) for graph in batch.to_data_list()]

    with pytest.raises(ValueError, match="each of the 4 local heads; received 3 parts"):
        trainer(LTEStrategy(4, rank=RANK), max_epochs=1).fit(Scant(), DataLoader(random_graphs(3), 4))


def test_one_head_on_one_large_graph_needs_no_hook() -> None:
    graph = random_graph(0, nodes=200)
    module = Nodes()
    keys, classes = list(module.state_dict()), kinds(module)
    loader = DataLoader([graph] * 7, 1)
    fit_against_oracle(module, loader, 1, [lambda: [graph]] * 7)
    assert module.seen == [1] * 7
    assert list(module.state_dict()) == keys and kinds(module) == classes


def weights_on_two_devices() -> dict[str, Tensor]:
    module = GraphNet()
    trainer(LTEStrategy(2, PERIOD, rank=RANK), devices=2, max_epochs=1).fit(module, DataLoader(random_graphs(16), 4))
    assert module.seen == [4, 4]
    return clone(module.state_dict())


def test_one_head_per_device_needs_no_hook() -> None:
    first, second = run(weights_on_two_devices, 2, group=False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_convolutions_alone_can_be_trained() -> None:
    """None of their weights is in a layer of torch's."""

    class Convolutions(Splitting):
        def __init__(self) -> None:
            super().__init__()
            self.isomorphism = GCNConv(WIDTH, WIDTH).double()

    strategy = LTEStrategy(2, rank=RANK)
    trainer(strategy, max_steps=2).fit(Convolutions(), DataLoader(random_graphs(8), 8))
    factored = {entry.name for entry in strategy.report().entries if entry.role == "factored"}
    assert factored == {"convolution.lin.weight", "isomorphism.lin.weight"}
