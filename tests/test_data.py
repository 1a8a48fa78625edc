"""Which samples each head really sees: every one of an epoch goes to one head, on however many devices they sit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from lightning_lte import LTEStrategy
from lightning_lte.heads import Factors
from tests.modules import RANK, Module, Recorder, clone, loader, sgd, trainer
from tests.processes import run

DEVICES, LOCAL, BATCH, EPOCHS = 2, 2, 8, 2
WIDTH = 12

# Of each batch, by (epoch, batch): what each local head of a device computed with, and what came from the loader.
Seen = dict[tuple[int, int], tuple[list[list[int]], list[int]]]


class Numbers(Dataset):
    """Samples that are their own index."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((WIDTH,), float(index))


class Stream(IterableDataset):
    """The numbers from 0 on, or one device's part of them; and of these each worker of its loader takes a part."""

    def __init__(self, samples: int, rank: int = 0, devices: int = 1) -> None:
        self.samples, self.rank, self.devices = samples, rank, devices

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        first, step = self.rank * workers + worker, self.devices * workers
        yield from (torch.full((WIDTH,), float(index)) for index in range(first, self.samples, step))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) / 1000)


class Counting(Module):
    def __init__(self, make_loader: Callable[[Trainer], DataLoader]) -> None:
        super().__init__(Layers(), lambda p: torch.optim.SGD(p, lr=1e-6))
        self.make_loader = make_loader
        self.batch_idx = 0
        self.steps: list[list[int]] = []

    def train_dataloader(self) -> DataLoader:
        return self.make_loader(self.trainer)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        self.steps.append(batch[:, 0].int().tolist())
        return self.net(batch).square().mean()


def fit(
    make_loader: Callable[[Trainer], DataLoader], execution: Any, heads: int, devices: int
) -> tuple[Seen, list[list[int]], str]:
    """Train for some epochs.

    Returns:
        What was seen; what each call of `training_step` got; how heads shared the device.
    """
    seen: Seen = {}
    how: list[str] = []
    module = Counting(make_loader)
    apply = Factors.apply

    def watched(self: Factors, base: Tensor, x: Tensor, head: int | None = None, part: int | None = None) -> Tensor:
        # x is (n, rows, in): the slices with which the heads that act multiply their factors. What a trial of the first
        # batch shows is written over by the step itself.
        if self.name == "net.first":
            own, _ = seen[module.current_epoch, module.batch_idx]
            for position, rows in enumerate(x):
                own[position if head is None else head] = rows[:, 0].round().int().tolist()
        return apply(self, base, x, head, part)

    class Watch(Callback):
        def on_train_batch_start(self, t: Any, m: Any, batch: Tensor, batch_idx: int) -> None:
            seen[m.current_epoch, batch_idx] = [[] for _ in range(heads // devices)], batch[:, 0].int().tolist()
            module.batch_idx = batch_idx

        def on_train_end(self, t: Any, m: Any) -> None:
            how.append(t.strategy.explorer.execution)

    strategy = LTEStrategy(heads, 3, rank=2, execution=execution)
    t = trainer(strategy, devices=devices, max_epochs=EPOCHS, callbacks=[Watch()])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(Factors, "apply", watched)
        patch.setattr(Factors, "applies", lambda *_: False)  # one operation would hide the inputs
        warnings.filterwarnings("error", "Trained without heads")
        t.fit(module)
    return seen, module.steps, how[0]


# Samples, and whether the loader drops a smaller last batch.
EPOCHS_OF = [(64, False), (46, False), (45, False), (34, False), (12, False), (46, True)]


def with_numbers(execution: str) -> list[tuple[Seen, list[list[int]], str]]:
    def make(samples: int, drop_last: bool) -> Callable[[Trainer], DataLoader]:
        return lambda _: DataLoader(Numbers(samples), BATCH, shuffle=True, drop_last=drop_last)

    return [fit(make(*both), execution, DEVICES * LOCAL, DEVICES) for both in EPOCHS_OF]


@pytest.fixture(scope="module", params=["auto", "batched", "sequential"])
def results(request: Any) -> tuple[str, dict[tuple[int, bool], list[tuple[Seen, list[list[int]], str]]]]:
    """How heads were to share devices, and what the devices saw of each of `EPOCHS_OF`."""
    devices = run(with_numbers, DEVICES, request.param, group=False, timeout_s=120)
    return request.param, {key: [device[i] for device in devices] for i, key in enumerate(EPOCHS_OF)}


def of_epoch(seen: Seen, epoch: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Of each batch of an epoch in their order: the samples of each local head, and those of the loader."""
    batches = [both for (own, _), both in sorted(seen.items()) if own == epoch]
    return [heads for heads, _ in batches], [loaded for _, loaded in batches]


def flat(lists: Any) -> list[Any]:
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize(
    ("samples", "padded", "repeated"),
    [
        (64, 0, 0),  # divides
        (46, 0, 0),  # a last batch of 7 on each device: slices of 4 and 3
        (45, 1, 0),  # one sample is used twice, so that all devices have as many
        (34, 0, 2),  # a last batch of one sample, which both heads of a device get
        (12, 0, 0),  # fewer than a batch
    ],
)
def test_every_sample_of_an_epoch_goes_to_one_head(results: Any, samples: int, padded: int, repeated: int) -> None:
    execution, seen_of = results
    orders = []
    for epoch in range(EPOCHS):
        by_head: list[list[int]] = []
        for rank, (seen, _, how) in enumerate(seen_of[samples, False]):
            assert how == ("sequential" if execution == "sequential" else "batched")
            batches, loaded = of_epoch(seen, epoch)
            # What the sampler gives a device is dealt out in batches, and these in slices, in its order.
            sampler = DistributedSampler(Numbers(samples), DEVICES, rank, shuffle=True, seed=0)
            sampler.set_epoch(epoch)
            given = list(sampler)
            assert loaded == [given[i : i + BATCH] for i in range(0, len(given), BATCH)]
            for heads, batch in zip(batches, loaded, strict=True):
                assert flat(heads) == batch or (len(batch) < LOCAL and heads == [batch] * LOCAL)
                assert max(map(len, heads)) - min(map(len, heads)) <= 1
            by_head += [flat(heads[head] for heads in batches) for head in range(LOCAL)]
            orders.append(given)
        counts = Counter(flat(by_head))
        assert set(counts) == set(range(samples)), "a sample was left out"
        assert counts.total() == samples + padded + repeated
        assert sum(times - 1 for times in counts.values()) == padded + repeated
    assert orders[0] != orders[DEVICES]  # each epoch is shuffled anew


def test_the_loader_alone_leaves_samples_out(results: Any) -> None:
    """With `drop_last` the smaller last batch of each device."""
    counts = Counter(flat(flat(flat(of_epoch(seen, 0)[0] for seen, _, _ in results[1][46, True]))))
    assert set(counts.values()) == {1} and counts.total() == DEVICES * 2 * BATCH


def test_training_step_gets_the_batch_once_or_each_heads_slice_in_turn(results: Any) -> None:
    execution, seen_of = results
    for seen, steps, _ in seen_of[46, False]:
        expected: list[list[int]] = []
        for epoch in range(EPOCHS):
            for heads, batch in zip(*of_epoch(seen, epoch), strict=True):
                # The last batch, of 7, is dealt out in turn either way.
                expected += heads if execution == "sequential" or len(batch) < BATCH else [batch]
        assert steps == expected  # what the trial of a first batch leaves in the module is put back


def with_stream(samples: int, execution: str, split: bool) -> tuple[Seen, list[list[int]], str]:
    def make(t: Trainer) -> DataLoader:
        parts = (t.global_rank, t.world_size) if split else ()
        return DataLoader(Stream(samples, *parts), BATCH)

    return fit(make, execution, DEVICES * LOCAL, DEVICES)


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
def test_a_stream_that_is_split_between_devices_is_split_between_their_heads(execution: str) -> None:
    results = run(with_stream, DEVICES, 64, execution, True, group=False)
    for epoch in range(EPOCHS):
        counts: Counter[int] = Counter()
        for rank, (seen, _, _) in enumerate(results):
            batches, loaded = of_epoch(seen, epoch)
            assert [flat(heads) for heads in batches] == loaded
            assert all(len(own) == BATCH // LOCAL for heads in batches for own in heads)
            assert flat(loaded) == list(range(rank, 64, DEVICES))
            counts.update(flat(loaded))
        assert counts == Counter(range(64))


def test_a_stream_that_is_not_split_gives_devices_the_same_samples_and_local_heads_different_ones() -> None:
    """As in data-parallel training: who writes a stream splits it."""
    (first, _, _), (second, _, _) = run(with_stream, DEVICES, 32, "batched", False, group=False)
    assert first == second
    for heads in of_epoch(first, 0)[0]:
        assert not set(heads[0]) & set(heads[1]) and len(heads[0]) == len(heads[1]) == BATCH // LOCAL


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "auto"), (4, "batched"), (4, "sequential")])
def test_on_one_device_the_batches_of_a_loader_are_dealt_out_as_they_come(heads: int, execution: str) -> None:
    seen, _, _ = fit(lambda _: DataLoader(Numbers(45), BATCH, shuffle=True), execution, heads, 1)
    for epoch in range(EPOCHS):
        batches, loaded = of_epoch(seen, epoch)
        assert [flat(own) for own in batches] == loaded
        assert Counter(flat(loaded)) == Counter(range(45))
    assert of_epoch(seen, 0) != of_epoch(seen, 1)


def test_workers_of_a_loader_that_split_a_stream_give_heads_different_samples() -> None:
    seen, _, _ = fit(lambda _: DataLoader(Stream(64), BATCH, num_workers=2), "auto", 4, 1)
    for epoch in range(EPOCHS):
        batches, loaded = of_epoch(seen, epoch)
        assert [flat(own) for own in batches] == loaded and Counter(flat(loaded)) == Counter(range(64))


def test_a_batch_that_is_dealt_out_in_turn_leaves_batched_execution_as_it_was() -> None:
    """Replicas of heads' own stay so, and all is as if heads always took turns."""
    results = []
    for execution in ("batched", "sequential"):
        module = Module(optimizer=sgd)
        strategy = LTEStrategy(4, 3, rank=RANK, execution=execution)  # type: ignore[arg-type]
        own = dict(module.named_parameters())
        shown = Recorder(lambda t, m, own=own: [p is own[name] for name, p in m.named_parameters()])
        t = trainer(strategy, max_epochs=3, callbacks=[shown])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Trained without heads")
            t.fit(module, loader(45, 8))
        assert all(map(all, shown.seen))
        results.append(clone(module.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
