"""Batched execution is taken where it is right, and nowhere else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_lte import LTEStrategy
from lightning_lte.float32 import Widened
from lightning_lte.rehearsal import alike, untouched
from tests.modules import RANK, Module, clone, loader, make_net, trainer

WIDTH = 16


def verdict(
    net: nn.Module, batch: tuple[Tensor, Tensor], step: Callable[..., Any] | None = None, precision: Any = "32-true"
) -> tuple[str, str]:
    """What `auto` decides for a net on 4 heads, and the sentence in the report."""

    class Own(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if step is not None:
                return step(self.net, batch)
            return cross_entropy(self.net(batch[0]), batch[1])

    torch.manual_seed(0)
    strategy = LTEStrategy(4, 3, rank=RANK)
    decided: list[str] = []

    class Watched(Own):
        def on_train_batch_end(self, *args: Any) -> None:
            decided.append(self.trainer.strategy.explorer.execution)

    data = TensorDataset(*(part.repeat(2, *[1] * (part.dim() - 1)) for part in batch))
    trainer(strategy, max_steps=2, precision=precision).fit(Watched(net), DataLoader(data, len(batch[0])))
    return decided[-1], strategy.report().notes[-1]


def images(samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 8, WIDTH, generator=generator), torch.randint(0, 3, (samples,), generator=generator)


class Pooled(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Windows(nn.Module):
    """Folds tokens into dimension 0, samples outermost, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 2, WIDTH)).reshape(x.shape)


class TimeFirst(nn.Module):
    """Dimension 0 is time; both lengths are 8, so that shapes tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Mixing(nn.Module):
    """A sample sees its neighbour in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.roll(1, 0))


class Flat(nn.Module):
    """Drops the batch dimension where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.mean((0, 1)))


def test_transformers_are_batched() -> None:
    assert verdict(Pooled(nn.Sequential(Attention(), nn.LayerNorm(WIDTH), Attention())), images())[0] == "batched"
    assert verdict(Pooled(nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)), images())[0] == "batched"


def test_windows_with_samples_outermost_are_batched() -> None:
    assert verdict(Pooled(Windows()), images())[0] == "batched"


def test_time_outermost_is_sequential_though_shapes_agree() -> None:
    execution, why = verdict(Pooled(TimeFirst()), images())
    assert execution == "sequential" and "net.body.inner does not see the batch outermost" in why


class CalledDirectly(TimeFirst):
    """Calls a layer's forward, and not the layer: hooks see nothing of that."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x.transpose(0, 1)).transpose(0, 1)


def test_layers_whose_forward_is_called_directly_are_seen_too() -> None:
    execution, why = verdict(Pooled(CalledDirectly()), images())
    assert execution == "sequential" and "net.body.inner does not see the batch outermost" in why


class Mapped(TimeFirst):
    """Maps a layer over the samples, with the derivative of its output beside it, as physics-informed networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda own: self.inner(own).square().sum()))(x)


def test_layers_that_see_samples_one_by_one_are_sequential_and_named() -> None:
    execution, why = verdict(Pooled(Mapped()), images())
    assert execution == "sequential" and "net.body.inner is called inside of torch.func.vmap" in why


class OnAGPU(nn.Module):
    """Takes TF32 where that is allowed, in a kernel that another number of samples would not have had."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
            allowed = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
            rounds = any(kind.fp32_precision == "tf32" for kind in allowed)
        # TunableOp reads the older setting before each product.
        rounds |= torch.backends.cuda.matmul.allow_tf32
        return self.inner(x * (1 + rounds * len(x) / 2**13))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_trial_is_in_full_float32_whatever_training_is(precision: str) -> None:
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    try:
        torch.set_float32_matmul_precision(precision)
        before = [kind.fp32_precision for kind in kinds]
        assert verdict(Pooled(OnAGPU()), images())[0] == "batched"
        assert torch.get_float32_matmul_precision() == precision and torch.backends.cudnn.allow_tf32
        assert [kind.fp32_precision for kind in kinds] == before
    finally:
        torch.set_float32_matmul_precision("highest")


class Rounding(nn.Module):
    """Layers whose products are rounded otherwise with more rows, as kernels are chosen by it.

    Args:
        shared: how much of the mean of all samples each of them gets.
        takes: the dtype that the layers insist on, as some kernels do.
    """

    def __init__(self, shared: float = 0.0, takes: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.shared, self.takes = shared, takes

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            if self.takes not in (None, y.dtype):
                raise TypeError(f"only {self.takes} is supported")
            last_bit = torch.finfo(y.dtype).eps * (len(x) > 2)
            x = (y + y * last_bit + self.shared * y.mean(0)).tanh()
        return x


HALF = ["bf16-mixed", "bf16-true"]


@pytest.mark.parametrize("precision", HALF)
def test_rounding_in_half_precision_is_not_taken_for_samples_that_mix(precision: str) -> None:
    """It adds up over the layers, here to 6 %."""
    assert verdict(Pooled(Rounding()), images(), precision=precision)[0] == "batched"


@pytest.mark.parametrize("precision", ["32-true", *HALF])
def test_samples_that_mix_by_less_than_half_precision_rounds_take_turns(precision: str) -> None:
    execution, reason = verdict(Pooled(Rounding(shared=0.002)), images(), precision=precision)
    assert execution == "sequential" and "samples mix" in reason


@pytest.mark.parametrize("precision", HALF)
def test_a_step_that_needs_half_precision_is_tried_in_it(precision: str) -> None:
    net = Rounding(takes=torch.bfloat16)
    net.layers = net.layers[:2]
    assert verdict(Pooled(net), images(), precision=precision)[0] == "batched"


def test_what_is_widened_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(4, WIDTH)
    half = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    weight, bias = half.weight.float(), half.bias.float()
    with Widened() as widened:
        layer(x)
        assert not widened.used
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert widened.used
        # What a cast under it would round is kept, but not what was rounded before.
        assert torch.equal(half(x.bfloat16()), nn.functional.linear(x, weight, bias))
        assert torch.equal(half(x.bfloat16()).softmax(-1, dtype=torch.float16), half(x).softmax(-1))


def test_what_is_widened_is_written_to_as_it_is() -> None:
    buffer = torch.zeros(2, 3, dtype=torch.bfloat16)
    with Widened() as widened:
        row = buffer[0]
        row += torch.full((3,), 1 / 3)
        buffer[1].copy_(torch.full((3,), 1 / 3))
        buffer.index_add_(0, torch.tensor([1]), torch.ones(1, 3))
        assert buffer.dtype == torch.bfloat16
    third = torch.tensor(1 / 3).bfloat16()
    assert torch.equal(buffer, torch.stack([third.expand(3), (third + 1).expand(3)]))
    assert not widened.narrow


@torch.library.custom_op("lte_tests::half_alone", mutates_args=())
def half_alone(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        raise RuntimeError("only float16 and bfloat16 are supported")
    return x + 1


half_alone.register_autograd(lambda ctx, gradient: gradient)


class HalfAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Rounding(), Rounding()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(half_alone(self.before(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", HALF)
def test_operations_that_have_no_float32_get_half_precision(precision: str) -> None:
    assert verdict(Pooled(HalfAlone()), images(), precision=precision)[0] == "batched"


class Padded(nn.Module):
    """A transformer that is told what is padding, which torch hands on as a mask of minus infinities."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.layer, self.shift = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True), shift

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(8) > 3 + x[:, :1, 0].sign()
        return self.layer(x, src_key_padding_mask=padding.roll(self.shift, 0))


def test_masks_are_no_reason_against_batched() -> None:
    assert verdict(Pooled(Padded()), images())[0] == "batched"


def test_masks_of_other_samples_are_one() -> None:
    assert verdict(Pooled(Padded(shift=1)), images())[0] == "sequential"


class Imaginary(nn.Module):
    """Samples meet in the imaginary part of what a complex layer receives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.inner(torch.complex(y, y.roll(1, 0))).real


def test_samples_that_meet_in_imaginary_parts_are_seen() -> None:
    execution, why = verdict(Pooled(Imaginary()), images())
    assert execution == "sequential" and "net.body.inner does not see the batch outermost" in why


@pytest.mark.parametrize("body", [Mixing, Flat])
def test_samples_that_meet_are_sequential(body: type[nn.Module]) -> None:
    assert verdict(Pooled(body()), images())[0] == "sequential"


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def test_batch_norm_is_sequential() -> None:
    execution, why = verdict(Pooled(Normed()), images())
    assert execution == "sequential" and "net.body.norm (BatchNorm1d)" in why


def test_losses_over_pairs_of_samples_are_sequential() -> None:
    def contrastive(net: nn.Module, batch: Any) -> Tensor:
        features = nn.functional.normalize(net(batch[0]), dim=-1)
        return cross_entropy(features @ features.T * 10, torch.arange(len(features)))

    execution, why = verdict(Pooled(Windows()), images(), contrastive)
    assert execution == "sequential" and "is not the mean of the losses" in why


def test_losses_that_are_not_finite_prove_nothing() -> None:
    class Infinite(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) / 0.0

    strategy = LTEStrategy(4, 3, rank=RANK)
    with pytest.warns(UserWarning), pytest.raises(FloatingPointError):
        trainer(strategy, max_steps=3).fit(Infinite(), loader())
    assert "the loss of the first batch is not finite" in str(strategy.report())


def test_losses_that_are_sums_are_sequential() -> None:
    def summed(net: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(net(batch[0]), batch[1], reduction="sum")

    assert verdict(Pooled(Windows()), images(), summed)[0] == "sequential"


class Pictures(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch_sizes.append(len(batch[0]))
        return torch.stack([self.net(x.double()).mean() for x in batch[0]]).mean()


@pytest.mark.parametrize("grow", [0, 1])
def test_lists_of_images_are_dealt_out_by_the_loaders_batch_size(grow: int) -> None:
    """3 channels, or rows, of 8 images; Lightning would take 3 for the batch size."""
    pictures = [(torch.randn(3 + grow * i, 10), i) for i in range(8)]
    data = DataLoader(pictures, 8, collate_fn=lambda rows: ([x for x, _ in rows], torch.arange(8)))  # type: ignore[arg-type]
    module = Pictures()
    trainer(LTEStrategy(4, rank=RANK), max_steps=1).fit(module, data)
    assert module.batch_sizes[-4:] == [2] * 4


class Graph:
    """As PyTorch Geometric has them: nodes of several graphs in one tensor."""

    def __init__(self, nodes: Tensor, of: Tensor) -> None:
        self.nodes, self.of = nodes, of

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return self


class Graphs(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pooled = torch.zeros(int(batch.of.max()) + 1, 3, dtype=torch.float64).index_add(
            0, batch.of, self.net(batch.nodes)
        )
        self.batch_sizes.append(len(pooled))
        return pooled.square().mean()


def graphs() -> DataLoader[Any]:
    graph = Graph(torch.randn(11, 10, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]))
    return DataLoader([0] * 4, 4, collate_fn=lambda rows: graph)  # type: ignore[arg-type]


def test_objects_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"objects of kind Graph .*one head per device, or define `split_batch"):
        trainer(LTEStrategy(2, rank=RANK), max_steps=1).fit(Graphs(), graphs())


def test_a_hook_splits_what_nobody_else_can() -> None:
    class Split(Graphs):
        def split_batch(self, batch: Graph, heads: int) -> list[Graph]:
            parts = []
            for own in torch.arange(4).chunk(heads):
                mine = (batch.of >= own[0]) & (batch.of <= own[-1])
                parts.append(Graph(batch.nodes[mine], batch.of[mine] - own[0]))
            return parts

    module, strategy = Split(), LTEStrategy(2, rank=RANK)
    trainer(strategy, max_steps=1).fit(module, graphs())
    assert module.batch_sizes == [2, 2]
    assert "in turn (sequential): split_batch splits the batch" in strategy.report().notes[-1]


def test_the_trial_leaves_no_trace() -> None:
    """Metrics, counters, buffers, random streams and logged values are as if it had not been."""

    class Traced(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(3))
            self.history: list[float] = []
            self.totals = {"n": 0, "sum": torch.zeros(1)}
            self.draws: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.queue += 1
            self.totals["n"] += 1
            self.totals["sum"] += 1  # type: ignore[assignment]
            loss = super().training_step(batch, batch_idx)
            self.history.append(float(loss))
            self.new_attribute = 1
            self.draws += [torch.rand(1).item(), random.random(), float(np.random.rand())]
            return loss

    module = Traced()
    history = module.history
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(5)
    expected = [torch.rand(1).item(), random.random(), float(np.random.rand())]
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(5)
    trainer(LTEStrategy(4, rank=RANK), max_steps=1, limit_val_batches=0).fit(module, loader(16))
    assert module.history is history and len(history) == 1
    assert module.queue.tolist() == [1, 1, 1]
    assert module.totals["n"] == 1 and module.totals["sum"].item() == 1  # type: ignore[union-attr]
    assert module.training
    # A loader draws one number when its iterator is made; the step's draws follow.
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()
    expected[0] = torch.rand(1).item()
    assert module.draws == expected


def test_heads_are_alike_for_a_while_alone() -> None:
    stack, before = nn.Parameter(torch.randn(3, 2, 2)), torch.randn(3, 2, 2)
    stack.data.copy_(before)
    with alike([stack]):
        assert all(torch.equal(own, before[0]) for own in stack)
    assert torch.equal(stack, before)


def test_untouched_puts_back_what_a_block_changes() -> None:
    net = make_net()
    net.notes = [1, [2], {"a": torch.ones(2)}]  # type: ignore[assignment]
    before = clone(net.state_dict())
    notes = net.notes
    with untouched(net) as again:
        for _ in range(2):
            net.notes[1].append(3)  # type: ignore[index, union-attr]
            net.notes[2]["a"] += 1  # type: ignore[index, call-overload]
            net.extra = 5  # type: ignore[assignment]
            again()
            assert notes[1] == [2] and not hasattr(net, "extra")  # type: ignore[index]
    assert net.notes is notes and torch.equal(notes[2]["a"], torch.ones(2))  # type: ignore[index, call-overload]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


class TwoViews(nn.Module):
    """Two views of the batch one after the other in dimension 0, which is 2 B long."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.inner(torch.cat([x, -x])).chunk(2)
        return first + second


class Shared(nn.Module):
    """A layer whose input has nothing to do with the batch, though its length is one that heads divide."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("positions", torch.randn(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.positions)


def test_dimension_0_that_is_not_the_batch_is_sequential() -> None:
    execution, why = verdict(Pooled(TwoViews()), images())
    assert execution == "sequential" and "net.body.inner does not see the batch outermost" in why


class Positions(nn.Module):
    """Looks up positions once for all samples, as BERT and GPT-2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.table(torch.arange(x.shape[1]).unsqueeze(0)))


class Deep(nn.Module):
    def __init__(self, body: type[nn.Module]) -> None:
        super().__init__()
        self.body, self.more = body(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.body(x))


@pytest.mark.parametrize(("body", "shared"), [(Shared, "inner"), (Positions, "table")])
def test_a_layer_whose_input_is_not_the_batch_is_shared_and_hinders_nobody(body: type[nn.Module], shared: str) -> None:
    strategy = LTEStrategy(4, 3, rank=RANK)
    trainer(strategy, max_steps=1).fit(Module(Pooled(Deep(body))), DataLoader(TensorDataset(*images()), 8))
    assert "in one forward (batched)" in strategy.report().notes[-1]
    entry = strategy.report().entry(f"net.body.body.{shared}.weight")
    assert (entry.role, entry.reason, entry.copies) == ("replica", "its layer's input is not the batch", 1)
    assert strategy.report().entry("net.body.more.weight").copies == 4


@pytest.mark.parametrize("states", [(WIDTH,), (1, WIDTH), (4, WIDTH)])
def test_a_policy_that_also_plays_in_the_step_keeps_its_heads_which_take_turns(states: tuple[int, ...]) -> None:
    def step(net: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            net(torch.ones(states))
        return cross_entropy(net(batch[0]), batch[1])

    policy = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, 3))
    execution, why = verdict(policy, (images()[0][:, 0], images()[1]), step)
    assert execution == "sequential" and "called with the batch and with something else, too: net.0" in why


class Borrowed(nn.Module):
    """Hands its layer's parameters to a function, as torchvision's Swin does; its bias starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.lent.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(nn.functional.linear(x, self.lent.weight, self.lent.bias))


def test_parameters_that_are_lent_to_functions_do_not_hinder_the_proof() -> None:
    assert verdict(Pooled(Borrowed()), images())[0] == "batched"


@pytest.mark.parametrize("body", [Windows, Shared, Positions])
def test_the_proof_costs_two_forward_passes(body: type[nn.Module]) -> None:
    rows: list[int] = []

    def counted(net: nn.Module, batch: Any) -> Tensor:
        rows.append(len(batch[0]))
        return cross_entropy(net(batch[0]), batch[1])

    assert verdict(Pooled(Deep(body)), images(), counted)[0] == "batched"
    proof, steps = rows[:-2], rows[-2:]
    assert sum(proof) == 2 * 8 and steps == [8, 8]


class TrainOnly(nn.Module):
    """Samples meet in train mode alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.how == "centred":
                x = x - x.mean(0)
            elif self.how == "normalised":
                x = nn.functional.batch_norm(x.mT, None, None, training=True).mT
            elif self.how == "mixed up":
                x = 0.7 * x + 0.3 * x[torch.randperm(len(x))]
            elif self.how == "sorted by chance":
                x = 0.7 * x + 0.3 * x[torch.rand(len(x)).argsort()]
            elif self.how == "picked by chance":
                x = 0.7 * x + 0.3 * x[torch.rand(len(x)).topk(len(x)).indices]
            else:
                x = 0.5 * x + 0.5 * x.roll(1, 0)
        return self.inner(x)


@pytest.mark.parametrize("how", ["centred", "normalised", "mixed up", "sorted by chance", "picked by chance", "rolled"])
def test_samples_that_meet_in_train_mode_alone_are_sequential(how: str) -> None:
    assert verdict(Pooled(TrainOnly(how)), images())[0] == "sequential"


def test_layers_that_start_at_zero_hide_nothing() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            nn.init.zeros_(self.zero.weight)
            nn.init.zeros_(self.zero.bias)

        def forward(self, x: Tensor) -> Tensor:
            y = self.zero(x)
            return x + self.inner(y + y.roll(1, 0))

    net = Pooled(Hidden())
    assert verdict(net, images())[0] == "sequential"


@pytest.mark.parametrize(
    "body",
    [
        lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)),
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.3, batch_first=True),
        lambda: SelfAttention(),
        lambda: DropPath(),
        lambda: Noisy(),
        lambda: MaskedOut(),
    ],
    ids=["dropout", "transformer", "attention", "drop path", "noise", "masked out"],
)
def test_chance_is_no_reason_against_batched(body: Callable[[], nn.Module]) -> None:
    assert verdict(Pooled(body()), images())[0] == "batched"


class MaskedOut(nn.Module):
    """Leaves half of the patches of each sample out, as masked autoencoders draw them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[:2]).argsort(dim=1)[:, : x.shape[1] // 2]
        return self.inner(x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])))


class DropPath(nn.Module):
    """Stochastic depth, as timm draws it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        keep = x.new_empty(len(x), 1, 1).bernoulli_(0.8) if self.training else 1
        return x + self.inner(x) * keep


class Noisy(nn.Module):
    """Noise of a strength drawn for each sample, as diffusion models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.level = nn.Linear(WIDTH, WIDTH), nn.Embedding(50, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        level = torch.randint(0, 50, (len(x),))
        return self.inner(x + torch.randn_like(x) * 0.1 + self.level(level).unsqueeze(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_trial_puts_back_what_the_users_own_objects_hold() -> None:
    class Log:
        def __init__(self) -> None:
            self.lines = 0

    class Holder(Module):
        def __init__(self) -> None:
            super().__init__()
            self.counter, self.log_book = Counter(), Log()
            self.array, self.metrics = np.zeros(2), [MeanMetric()]
            self.generator, self.numpy_generator = torch.Generator().manual_seed(1), np.random.default_rng(1)
            self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.drawn: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.counter["calls"] += 1
            self.log_book.lines += 1
            self.array += 1
            self.metrics[0].update(1.0)
            self.frozen.data += 1
            self.drawn += [torch.rand(1, generator=self.generator).item(), float(self.numpy_generator.random())]
            assert self.logger is not None
            self.logger.log_metrics({"own": 1.0})
            return super().training_step(batch, batch_idx)

    logged: list[Any] = []

    class Kept(DummyLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            logged.append(metrics)

    module = Holder()
    array = module.array
    trainer(LTEStrategy(4, rank=RANK), max_steps=1, logger=Kept()).fit(module, loader(16))
    assert module.counter["calls"] == module.log_book.lines == module.frozen.item() == 1
    assert module.array is array and array.tolist() == [1, 1]
    assert module.metrics[0].weight == 1
    assert module.drawn == [
        torch.rand(1, generator=torch.Generator().manual_seed(1)).item(), float(np.random.default_rng(1).random())
    ]  # fmt: skip
    assert sum("own" in metrics for metrics in logged) == 1
