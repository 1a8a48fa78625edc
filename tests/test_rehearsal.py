"""What a step did is undone, whatever kind of state a module keeps."""

from __future__ import annotations

import itertools
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lte import LTEStrategy
from lightning_lte.rehearsal import Determined, untouched
from tests.modules import CLASSES, IN, RANK, Module, Recorder, adamw, loader, trainer


@dataclass(slots=True)
class Counted:
    samples: int = 0


@dataclass(slots=True)
class CountedAndListed(Counted):
    seen: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    seen: list[int]


class Private:
    """Slots that are private, empty, and beside a dict."""

    __slots__ = ("__dict__", "__own", "later")

    def __init__(self) -> None:
        self.__own = 0
        self.free = 0

    def count(self) -> None:
        self.__own += 1
        self.free += 1

    def counts(self) -> tuple[int, int]:
        return self.__own, self.free


def holding(**values: Any) -> Any:
    module: Any = nn.Module()
    for name, value in values.items():
        setattr(module, name, value)
    return module


def test_objects_with_slots_are_put_back() -> None:
    own = CountedAndListed(3, [1])
    seen, private = own.seen, Private()
    module = holding(own=own, frozen=Frozen([1]), private=private)
    with untouched(module) as again:
        for _ in range(2):
            module.own.samples += 5
            module.own.seen.append(2)
            module.own.seen = None
            module.frozen.seen.append(2)
            private.count()
            private.later = 1
            again()
            assert own == CountedAndListed(3, [1]) and own.seen is seen and module.own is own
            assert module.frozen == Frozen([1])
            assert private.counts() == (0, 0) and not hasattr(private, "later")
        del own.samples
    assert own.samples == 3


def test_what_is_in_tuples_is_put_back() -> None:
    pair: tuple[list[int], Tensor] = ([1], torch.zeros(2))
    module = holding(pair=pair)
    with untouched(module):
        pair[0].append(2)
        pair[1].add_(1)
    assert module.pair is pair and pair[0] == [1] and not pair[1].any()


class Endless(tuple):
    """A tuple without a length, as e3nn's `Irreps` are."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError


class Uncounted(dict):  # type: ignore[type-arg]
    def __len__(self) -> int:
        raise NotImplementedError


def test_containers_with_a_length_of_their_own_hinder_nobody() -> None:
    module = holding(pair=Endless([{"a": 1}, 2]), table=Uncounted(a=1))
    with untouched(module):
        next(tuple.__iter__(module.pair))["a"] = 5
        module.table["a"] = 5
    assert next(tuple.__iter__(module.pair)) == {"a": 1} and dict.__getitem__(module.table, "a") == 1


def test_ordered_dicts_are_put_back_whole() -> None:
    cache = OrderedDict(first=1, second=2)
    module = holding(cache=cache)
    with untouched(module):
        cache["third"] = 3
        cache.move_to_end("first")
    assert module.cache is cache and list(cache.items()) == [("first", 1), ("second", 2)]
    assert cache.popitem(last=False) == ("first", 1)


def test_arrays_of_all_shapes_are_put_back() -> None:
    scalar, fixed = np.array(1.0), np.broadcast_to(np.array(1.0), (3,))
    module = holding(scalar=scalar, fixed=fixed)
    with untouched(module):
        scalar += 1
        module.fixed = None
    assert scalar == 1 and module.scalar is scalar and module.fixed is fixed


def test_tensors_are_put_back_however_they_lie_in_memory() -> None:
    number, columns = torch.tensor(0.1), torch.arange(3.0)
    module = holding(
        all_one=number.expand(4, 2), rows=columns.expand(4, 3), empty=number.expand(0), none=torch.zeros(1, 3)[:, :0]
    )
    module.register_buffer("windows", torch.arange(6.0).unfold(0, 3, 1))
    with untouched(module):
        module.all_one[0, 0] = 5
        module.rows[2] += 5
        module.windows[0] += 5
        assert number == 5 and columns[0] == 5
    assert number == torch.tensor(0.1) and torch.equal(columns, torch.arange(3.0))
    assert torch.equal(module.windows, torch.arange(6.0).unfold(0, 3, 1))


def halve_data(module: nn.Linear) -> None:
    module.weight.data = module.weight.data / 2


def exchange(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach() / 2)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.weight.data.div_(2),
        lambda m: torch._foreach_div_([m.weight, m.bias], 2.0),
        lambda m: torch.div(m.weight, 2, out=m.weight),
        lambda m: torch.div(m.weight.data, 2, out=m.weight.data),
        lambda m: m.weight.set_(m.weight / 2),
        halve_data,
        exchange,
    ],
)
@torch.no_grad()
def test_parameters_are_put_back_however_they_are_written(write: Callable[[nn.Linear], Any]) -> None:
    module = nn.Linear(3, 2)
    weight, before = module.weight, module.weight.clone()
    with untouched(module) as again:
        write(module)
        again()
        assert torch.equal(module.weight, before)
        write(module)
    assert module.weight is weight and torch.equal(weight, before)


@pytest.mark.parametrize("which", ["first", "second"])
def test_parameters_that_lie_in_one_storage_are_put_back(which: str) -> None:
    """As those of cuDNN's recurrent networks do."""
    flat = torch.arange(6.0)
    module = holding(first=nn.Parameter(flat[:2]), second=nn.Parameter(flat[2:]))
    with untouched(module), torch.no_grad():
        getattr(module, which).mul_(2)
        module.first.data = module.first * 2
    assert torch.equal(flat, torch.arange(6.0)) and module.first.data_ptr() == flat.data_ptr()


class Wrapping(Tensor):
    """A tensor that holds its numbers in another one, as those of quantisation libraries do."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapping:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise NotImplementedError(func)


@pytest.mark.parametrize("make", [lambda: torch.eye(3).to_sparse(), lambda: Wrapping(torch.eye(3))])
def test_parameters_without_a_storage_hinder_nobody(make: Callable[[], Tensor]) -> None:
    kept = nn.Parameter(make(), requires_grad=False)
    module = holding(kept=kept, layer=nn.Linear(3, 2))
    before = module.layer.weight.detach().clone()
    with untouched(module), torch.no_grad():
        module.layer.weight.mul_(2)
    assert torch.equal(module.layer.weight, before) and module.kept is kept


def test_modules_that_are_exchanged_or_added_are_put_back() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    module = holding(own=first, later=None)
    with untouched(module):
        module.own, module.later = second, second
    assert module.own is first and module.later is None and list(module.children()) == [first]


def test_flags_and_hooks_of_parameters_are_put_back() -> None:
    module = nn.Linear(3, 2)
    handle = module.weight.register_hook(lambda gradient: 3 * gradient)
    with untouched(module) as again:
        for _ in range(2):
            handle.remove()
            for param in (module.weight, module.bias):
                param.register_hook(lambda gradient: 5 * gradient)
                param.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
            module.requires_grad_(False)
            again()
    module(torch.ones(1, 3)).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.eq(3).all()
    assert module.bias.grad is not None and module.bias.grad.eq(1).all()


def test_the_trial_leaves_no_write_behind() -> None:
    """A step that halves a parameter halves it once for each batch, whatever is tried before."""

    class Halving(Module):
        def __init__(self) -> None:
            super().__init__()
            self.halved = nn.Parameter(torch.ones(()), requires_grad=False)

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.halved.data = self.halved.data / 2
            return super().training_step(batch, index)

    module = Halving()
    strategy = LTEStrategy(heads=4, rank=RANK, merge_every=2)
    trainer(strategy, max_steps=3).fit(module, loader())
    assert "batched" in strategy.report().notes[-1] and float(module.halved) == 1 / 8


def test_the_streams_of_all_gpus_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all weights are on the CPU, as those are that forwards read in low precision elsewhere."""
    streams = [torch.zeros(1), torch.ones(1)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [own.clone() for own in streams])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: streams.__setitem__(slice(None), new))
    with untouched(nn.Linear(2, 2)):
        streams[1] += 5
    assert torch.cat(streams).tolist() == [0, 1]


class Masking(Module):
    """Leaves something out of each batch, as it draws until there is something."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        left_out = torch.zeros(len(x), dtype=torch.bool)
        while not left_out.any():
            left_out = torch.rand(len(x)) < 0.2
        return super().training_step((x.masked_fill(left_out[:, None], 0), y), index)


def test_a_step_that_draws_until_it_suits_is_not_tried_for_good() -> None:
    strategy = LTEStrategy(4, 3, rank=RANK)
    trainer(strategy, max_steps=3).fit(Masking(), loader())
    assert re.search(r"sequential.*drew random numbers more than \d+ times", strategy.report().notes[-1])


class Asking(Module):
    """Has another thread answer in each step, as actors do, and takes what a third one puts into a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.asked = self.answered = 0
        self.over = False
        self.ready: queue.Queue[int] = queue.Queue(2)
        self.taken: list[int] = []

    def on_fit_start(self) -> None:
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.answer, self.fill)]
        for thread in self.threads:
            thread.start()

    def answer(self) -> None:
        with self.changed:
            while not self.over:
                self.answered = self.asked
                self.changed.notify_all()
                self.changed.wait()

    def fill(self) -> None:
        for number in itertools.count():
            self.ready.put(number)
            if self.over:
                return

    def training_step(self, batch: Any, index: int) -> Tensor:
        with self.changed:
            self.asked += 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.answered == self.asked, timeout=10)
        self.taken.append(self.ready.get(timeout=10))
        return super().training_step(batch, index)

    def on_fit_end(self) -> None:
        with self.changed:
            self.over = True
            self.changed.notify_all()
        self.ready.get()


def test_the_trial_takes_nothing_from_other_threads() -> None:
    module = Asking()
    strategy = LTEStrategy(4, 3, rank=RANK)
    trainer(strategy, max_steps=6).fit(module, loader())
    assert "batched" in strategy.report().notes[-1]
    first = module.taken[0]
    assert first >= 5  # the trial has taken some, which nobody can put back
    assert module.taken == list(range(first, first + 6))


def _warmed(optimizer: torch.optim.Optimizer) -> Any:
    parts = [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in (0.5, 0.25)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2])


@pytest.mark.parametrize("execution", ["auto", "sequential", "batched"])
@pytest.mark.parametrize("of", [lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5), _warmed])
def test_schedulers_that_a_step_steps_make_one_step_for_each_batch(execution: Any, of: Callable[..., Any]) -> None:
    class Stepping(Module):
        def configure_optimizers(self) -> Any:
            opt = adamw(self.parameters())
            # Lightning itself never steps it.
            return [opt], [{"scheduler": of(opt), "frequency": 1000}]

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.lr_schedulers().step()  # type: ignore[union-attr]
            return super().training_step(batch, index)

    def rates(strategy: Any) -> list[float]:
        seen = Recorder(lambda t, _: t.optimizers[0].param_groups[0]["lr"])
        t = trainer(strategy, max_steps=3, callbacks=[seen])
        t.fit(Stepping(), loader())
        assert "step" not in vars(t.lr_scheduler_configs[0].scheduler)
        return seen.seen

    assert rates(LTEStrategy(4, 3, rank=RANK, execution=execution)) == rates("auto")


def test_the_trial_puts_back_what_a_step_does_to_param_groups() -> None:
    class Building(Module):
        def __init__(self) -> None:
            super().__init__()
            self.built: Any = None

        def training_step(self, batch: Any, index: int) -> Tensor:
            group: Any = self.optimizers().param_groups[0]  # type: ignore[union-attr]
            group["lr"] /= 2
            if self.built is None:
                self.built = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)
                self.optimizers().add_param_group({"params": list(self.built.parameters())})  # type: ignore[union-attr]
            return cross_entropy(self.built(self.net(batch[0])), batch[1])

    module = Building()
    strategy = LTEStrategy(4, 3, rank=RANK)
    t = trainer(strategy, max_steps=2)
    t.fit(module, loader())
    assert "batched" in strategy.report().notes[-1]
    groups = t.optimizers[0].param_groups
    assert groups[0]["lr"] == 0.01 / 4
    assert [p for group in groups[1:] for p in group["params"]] == list(module.built.parameters())


def test_what_cannot_be_put_back_does_not_keep_the_rest_from_it() -> None:
    class Sealed(list[int]):
        def clear(self) -> None:
            raise RuntimeError("sealed")

    module = holding(log=Sealed([1]), inner=holding(seen=[1]))
    module.weight = nn.Parameter(torch.ones(2))
    stream = torch.get_rng_state()

    with pytest.raises(RuntimeError, match="sealed"), untouched(module), torch.no_grad():
        module.weight.add_(torch.rand(2))
        module.inner.seen.append(2)
        module.eval()

    assert module.weight.tolist() == [1, 1] and module.inner.seen == [1] and module.training
    assert torch.equal(torch.get_rng_state(), stream)


class Told(TorchDispatchMode):
    """What operations are called with, in place of calling them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.last = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
        outputs = tuple(torch.empty(0) for _ in func._schema.returns)
        return outputs if len(outputs) > 1 else outputs[0]


def test_operations_that_draw_by_themselves_draw_nothing() -> None:
    x = torch.ones(2, 3, 4)
    with Told() as told, Determined():
        # Dropout between the layers of cuDNN's recurrent networks.
        torch.ops.aten._cudnn_rnn(x, [x], 1, None, x, None, 2, 4, 0, 2, True, 0.5, True, False, [], None)
        assert told.last["dropout"] == 0 and told.last["train"] is True
        # Its generator is made once, for all of training.
        torch.ops.aten._cudnn_init_dropout_state(0.5, True, 0)
        assert told.last["dropout"] == 0.5
    with Determined():
        assert torch.equal(nn.functional.rrelu(-x, training=True), nn.functional.rrelu(-x))
        assert (torch.distributions.Gamma(x, x).sample() == 1).all()
        assert (torch.distributions.Dirichlet(x).sample() == 0.25).all()
        assert (torch.distributions.Beta(x, x).sample() == 0.5).all()
        assert (torch.binomial(4 * x, x / 2) == 1).all()


def test_only_the_order_of_equal_numbers_is_turned_round() -> None:
    with Determined():
        assert torch.rand(4).argsort().tolist() == [3, 2, 1, 0]
        assert torch.rand(4).topk(4).indices.tolist() != [0, 1, 2, 3]
        assert torch.rand(2, 3).sort(0).indices[:, 0].tolist() == [1, 0]
        assert torch.tensor([0.1, 0.9, 0.3]).topk(1).indices.tolist() == [1]
        assert sorted(torch.tensor([0.0, 1.0, 0.0, 1.0]).topk(2).indices.tolist()) == [1, 3]
        assert torch.rand(0).argsort().tolist() == [] and torch.tensor(1.0).sort().indices == 0


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_are_put_back(layout: Any) -> None:
    graph = torch.eye(3).to_sparse(layout=layout)
    module = holding(graph=graph)
    with untouched(module):
        graph.mul_(2)
        assert torch.equal(graph.to_dense(), 2 * torch.eye(3))
    assert torch.equal(graph.to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    "state",
    [
        lambda: np.array(0.0),
        lambda: torch.tensor(0.1).expand(IN),
        lambda: torch.eye(IN, dtype=torch.float64).to_sparse(),
        lambda: torch.eye(IN, dtype=torch.float64).to_sparse_csr(),
    ],
)
@pytest.mark.parametrize("buffer", [True, False])
def test_no_state_keeps_heads_from_one_forward(state: Callable[[], Any], buffer: bool) -> None:
    class Stateful(Module):
        def __init__(self) -> None:
            super().__init__()
            self.counted = Counted()
            if buffer and isinstance(state(), Tensor):
                self.register_buffer("state", state())
            else:
                self.state = state()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            self.counted.samples += len(x)
            x = (self.state @ x.T).T if isinstance(self.state, Tensor) and self.state.dim() == 2 else x + self.state
            return super().training_step([x, y], batch_idx)

    module, strategy = Stateful(), LTEStrategy(4, rank=RANK)
    trainer(strategy, max_steps=1, limit_val_batches=0).fit(module, loader(16))
    assert "in one forward (batched)" in strategy.report().notes[-1]
    assert module.counted.samples == 16


class Listening(Module):
    """Listens to a layer from its first forward on, as transformers does where hidden states are asked for."""

    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.listens = False
        self.heard = 0

    def hear(self, *_: Any) -> None:
        self.heard += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.listens:
            self.net.second.register_forward_hook(self.hear)
            self.listens = True
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
        return loss


@pytest.mark.parametrize("manual", [False, True])
def test_hooks_of_a_first_forward_are_registered_once(manual: bool) -> None:
    module = Listening(manual)
    trainer(LTEStrategy(4, rank=RANK), max_steps=2, limit_val_batches=0).fit(module, loader(32))
    assert len(module.net.second._forward_hooks) == 1
    # In manual optimization attributes are those of the first head, which has heard its own forwards.
    assert module.heard == 2
